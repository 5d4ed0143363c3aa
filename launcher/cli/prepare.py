"""`broadgauge prepare`: text to shards, and the verbs around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from launcher.cli.options import ConfigFile, RayOption, RunDirOption, SetOption, run_dir_of
from launcher.cli.terminal import working
from launcher.report.display import Display
from trainer import config_file
from trainer.config import UserError

if TYPE_CHECKING:
    from data_pipeline.tasks import Workers

_DEFAULT = "corpus"


class _DefaultVerb(TyperGroup):
    """`prepare CONFIG` is short for `prepare corpus CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultVerb, help="Turn text into a tokenizer and shards: `prepare CONFIG`.", no_args_is_help=True
)


@app.command(_DEFAULT)
def corpus(
    path: ConfigFile,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; the run's own data folder if not given.")
    ] = None,
    run_dir: RunDirOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes on this machine; one a core if not given.")
    ] = None,
    ray: RayOption = None,
    settings: SetOption = None,
) -> None:
    """Turn text into a tokenizer and shards. With --out, name the folder in `data.prepared` afterwards.

    Example: `broadgauge prepare configs/quickstart.yaml --out data/stdlib`,
    the same as `broadgauge prepare corpus configs/quickstart.yaml --out data/stdlib`
    """
    config = config_file.load(path, settings or ())
    display = working()
    if workers and ray:
        raise UserError("--workers counts processes on this machine and --ray uses a cluster's; give one of them")
    if out is None:
        from launcher.verbs import checks, stages

        where = run_dir_of(config, run_dir)
        where.check(config)
        checks.check_sources(config, where)
        with stages.claim(config, where, display) as claimed, _workers(workers, ray) as pool:
            stages.prepare_data(claimed, pool)
        return
    with _workers(workers, ray) as pool, display.stage("prepare") as bar:
        from data_pipeline import pipeline  # while workers start
        from launcher.report import data as data_report

        prepared = pipeline.prepare(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_length=config.model.seq_length,
            out=out,
            workers=pool,
            progress=bar,
        )
        bar.result = data_report.describe(prepared)
    data_report.show(prepared, display)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Prepared data.", show_default=False)],
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set of several; the first if not given.")
    ] = None,
    heldout: Annotated[bool, typer.Option("--heldout", help="Held-out documents, not those to train on.")] = False,
    dropped: Annotated[
        str | None, typer.Option(metavar="REASON", help="Documents that were dropped for this reason: the kept sample.")
    ] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of the first document.")] = 0,
    count: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 3,
) -> None:
    """What prepared data holds: tokens by data set, drops by reason, and documents.

    Example: `broadgauge prepare inspect data/web --dropped near_duplicate`
    """
    from data_pipeline import inspection
    from data_pipeline.manifest import Manifest
    from launcher.report import data as data_report

    display = Display(Console())
    data_report.show(Manifest.load(path), display)
    found = (
        inspection.dropped(path, dataset, dropped)
        if dropped
        else inspection.documents(path, dataset, "heldout" if heldout else "train", first, count)
    )
    for title, text in found:
        display.line(f"\n--- {title}\n{text}")


@app.command("train-classifier")
def train_classifier(
    positive: Annotated[list[str], typer.Option(metavar="SOURCE", help="Text to keep; may be given several times.")],
    negative: Annotated[list[str], typer.Option(metavar="SOURCE", help="Raw text; may be given several times.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the classifier.", show_default=False)],
    text_field: Annotated[str, typer.Option(help="Field of a .jsonl record that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(min=0, help="Of the split into training and test.")] = 0,
) -> None:
    """Train GPT-3's quality classifier; name the file in `data.quality.classifier`.

    Example: `broadgauge prepare train-classifier --positive books/ --negative crawl/*.wet.gz --out quality.npz`
    """
    from data_pipeline.filters import classifier_training

    with working(stderr=True).stage("train"):
        report = classifier_training.train_classifier(positive, negative, out, text_field, seed)
    left_out = ", ".join(f"{count} {reason}" for reason, count in report.left_out.items()) or "none"
    print(
        f"{out}: trained on {report.num_positives:,} positives and {report.num_negatives:,} negatives; on "
        f"{report.num_heldout:,} texts it has not seen, accuracy {report.accuracy:.3f} and AUC {report.auc:.3f}; "
        f"records left out: {left_out}"
    )


@contextmanager
def _workers(num_workers: int | None, ray: str | None) -> Iterator["Workers"]:
    if ray is None:
        from data_pipeline.workers import LocalWorkers, num_cores

        with LocalWorkers(num_workers or num_cores()) as local:
            yield local
        return
    from launcher.job.ray_workers import ray_workers

    with ray_workers(ray) as pool:
        yield pool
