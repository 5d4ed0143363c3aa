"""The stages of a run, each usable alone: prepare, train, export, generate; and `run`, which is all of them.

A stage looks at the run's folder first and does only what is missing, so running again after an interruption, at
whatever moment, goes on from there.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.manifest import Manifest
from data_pipeline.pipeline import TOKENIZER_FOLDER, find_prepared, preflight, prepare
from data_pipeline.settings import Settings
from data_pipeline.tokenization import Tokenizer
from launcher import report
from launcher.display import Display, StageBar
from launcher.job import Ranks, check_embedded, ready_ranks
from trainer.checkpoint import store
from trainer.config import RunConfig, UserError
from trainer.events import EventLog, EventReader, read_events
from trainer.run_dir import RunDir


@dataclass
class Session:
    """One command at work on one run."""

    config: RunConfig
    run_dir: RunDir
    display: Display
    log: EventLog
    resources: ExitStack = field(default_factory=ExitStack)
    _ranks: Ranks | None = None

    def ranks(self) -> Ranks:
        """The run's warm agents, started when first needed and kept for the stages that follow."""
        if self._ranks is None:
            self._ranks = self.resources.enter_context(ready_ranks(self.config, self.run_dir))
        return self._ranks

    @contextmanager
    def stage(self, name: str) -> Iterator[StageBar]:
        """Show and record a stage."""
        self.log.write("stage_started", stage=name)
        started = time.monotonic()
        with self.display.stage(name) as bar:
            yield bar
        self.log.write("stage_finished", stage=name, seconds=round(time.monotonic() - started, 3), result=bar.result)


@contextmanager
def open_session(config: RunConfig, run_dir: RunDir, display: Display) -> Iterator[Session]:
    """Claim the run's folder for this process; what the session started is stopped when it ends.

    Raises:
        UserError: the folder belongs to another run, or another process works in it.
    """
    run_dir.check(config)
    with run_dir.locked(), ExitStack() as resources:
        run_dir.create(config)
        log = EventLog(run_dir.events_path)
        resources.callback(log.close)
        try:
            yield Session(config, run_dir, display, log, resources)
        except Exception as error:
            log.write("failed", error=f"{type(error).__name__}: {error}")
            raise


# ----------------------------------------------------------------------------------------------------------- whole run


def run(config: RunConfig, run_dir: RunDir, display: Display) -> None:
    """Raw text to a trained, evaluated, exported, sampled model."""
    check(config, run_dir)
    with open_session(config, run_dir, display) as session:
        if is_finished(config, run_dir):
            display.line(f"{run_dir.path} has finished already; nothing to do (its model lies in {run_dir.export})")
            return
        session.log.write(
            "run_started", resumed=run_dir.checkpoints.is_dir() and bool(store.steps(run_dir.checkpoints))
        )
        started = time.monotonic()
        prepare_data(session)
        check_prompt(config, run_dir)
        train(session)
        export(session)
        generate_sample(session)
        session.log.write("run_finished", seconds=round(time.monotonic() - started, 3))
        display.console.print(report.summary(config, run_dir, report.RunHistory.read(run_dir.events_path)))


def check_sources(config: RunConfig, run_dir: RunDir) -> None:
    """Refuse sources or a data folder that cannot be used, unless the data is there already.

    Raises:
        UserError: says what and how to mend it.
    """
    run_dir.check(config)
    if find_prepared(settings_of(config), run_dir.data) is None:
        preflight(settings_of(config), run_dir.data)


def check(config: RunConfig, run_dir: RunDir) -> None:
    """Refuse what can be seen to fail before anything is written or started.

    Raises:
        UserError: says what and how to mend it.
    """
    from trainer.checkpoint import hf

    check_embedded(config)
    run_dir.check(config)
    hf.check_exportable(config)
    if config.data.prepared:
        check_prepared(config, run_dir)
    else:
        check_sources(config, run_dir)
    check_resume_from(config)


def check_resume_from(config: RunConfig) -> None:
    """Raises:
    UserError: `checkpoint.resume_from` is no checkpoint, or one of another architecture.
    """
    if config.checkpoint.resume_from:
        checkpoint = store.find(Path(config.checkpoint.resume_from))
        store.check_architecture(store.read_manifest(checkpoint), config, checkpoint)


def is_finished(config: RunConfig, run_dir: RunDir) -> bool:
    if not (run_dir.events_path.exists() and (run_dir.export / "config.json").exists() and run_dir.loss_plot.exists()):
        return False
    return any(event["kind"] == "run_finished" for event in read_events(run_dir.events_path))


def is_trained(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether the last checkpoint is there, whole, and evaluated."""
    evaluated = any(
        event["kind"] == "evaluated" and event["step"] == config.num_steps for event in read_events(run_dir.events_path)
    )
    newest = store.newest_valid(run_dir.checkpoints) if evaluated and run_dir.loss_plot.exists() else None
    return newest is not None and newest.name == store.folder_name(config.num_steps)


# -------------------------------------------------------------------------------------------------------------- stages


def settings_of(config: RunConfig) -> Settings:
    return Settings.of(config.data, config.model.vocab_size, config.model.seq_length)


def prepare_data(session: Session) -> None:
    """Text -> tokenizer and shards, unless the run uses a folder that was prepared before."""
    config, run_dir = session.config, session.run_dir
    if config.data.prepared:
        check_prepared(config, run_dir)
        return
    with session.stage("prepare") as bar:
        manifest = prepare(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_length=config.model.seq_length,
            out=run_dir.data,
            min_train_tokens=config.tokens_per_step + 1,
            progress=bar,
        )
        bar.result = describe_data(manifest)
    session.log.write(
        "data_prepared",
        documents={name: split.documents for name, split in manifest.splits.items()},
        tokens={name: split.tokens for name, split in manifest.splits.items()},
        vocab_size=manifest.vocab_size,
        dropped={reason: count.count for reason, count in manifest.dropped.items()},
        repaired={reason: count.count for reason, count in manifest.repaired.items()},
    )


def describe_data(manifest: Manifest) -> str:
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    dropped = sum(count.count for count in manifest.dropped.values())
    return (
        f"{train.documents + heldout.documents:,} documents, {(train.text_bytes + heldout.text_bytes) / 1e6:.1f} MB -> "
        f"{train.tokens:,} training and {heldout.tokens:,} held-out tokens of {manifest.vocab_size:,}"
        + (f"; {dropped:,} documents dropped" if dropped else "")
    )


def check_prepared(config: RunConfig, run_dir: RunDir) -> Manifest:
    """The manifest of the data that the run trains on.

    Raises:
        UserError: there is none, its files are damaged, or its tokenizer does not fit the model.
    """
    folder = run_dir.data_for(config)
    manifest = Manifest.load(folder)
    manifest.verify(folder)
    if manifest.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{folder} was tokenized with {manifest.vocab_size} tokens and model.vocab_size is "
            f"{config.model.vocab_size}; set it to {manifest.vocab_size}, or prepare the data again"
        )
    return manifest


def check_prompt(config: RunConfig, run_dir: RunDir) -> None:
    """Raises:
    UserError: the run's prompt leaves no room in the context, which would only be seen after training.
    """
    tokenizer = Tokenizer.load(run_dir.data_for(config) / TOKENIZER_FOLDER)
    length = len(tokenizer.encode_batch([config.generate.prompt])[0])
    if length + 1 > config.model.seq_length:
        raise UserError(
            f"generate.prompt has {length} tokens, and with 1 new token it must fit model.seq_length "
            f"{config.model.seq_length}; shorten it"
        )


def train(session: Session) -> None:
    """Train to the end of the run from its newest checkpoint, with a held-out evaluation before and after."""
    config, run_dir = session.config, session.run_dir
    if is_trained(config, run_dir):
        session.display.line(f"train     trained already, to step {config.num_steps}")
        return
    with session.stage("train") as bar:
        events = EventReader(run_dir.events_path)
        events.skip_to_end()

        def show_progress() -> None:
            for event in events.new_events():
                if event["kind"] == "step":
                    rate = config.tokens_per_step / event["seconds"]
                    doing = f"train: loss {event['loss']:.3f}, {rate:,.0f} tokens/s"
                    bar.update(doing, event["step"], config.num_steps, "steps")
                elif event["kind"] == "evaluated":
                    bar.update(f"train: held-out loss {event['loss']:.3f}", event["step"], config.num_steps, "steps")

        bar.update("train: starting ranks", 0, config.num_steps, "steps")
        session.ranks().run("train", show_progress)
        history = report.RunHistory.read(run_dir.events_path)
        report.plot_losses(history, run_dir.loss_plot)
        bar.result = report.verdict(history.evaluations[0], history.evaluations[-1])


def export(session: Session) -> None:
    """The final checkpoint as a Hugging Face folder, checked against the trained model before it appears."""
    config, run_dir = session.config, session.run_dir
    with session.stage("export") as bar:
        checkpoint = run_dir.checkpoints / store.folder_name(config.num_steps)
        history = report.RunHistory.read(run_dir.events_path)
        facts = {
            "Trained on, tokens": config.num_steps * config.tokens_per_step,
            "Held-out loss, nats per token": history.evaluations[-1]["loss"],
            "Layout": config.parallel.describe(),
        }
        tokenizer = run_dir.data_for(config) / TOKENIZER_FOLDER
        difference, tokens = export_checkpoint(
            config, session.ranks(), checkpoint, tokenizer, run_dir.export, run_dir.path / ".logits.pt", facts
        )
        session.log.write("export_verified", largest_difference=difference, tokens=tokens)
        bar.result = f"{run_dir.export}: logits within {difference:.2g} of the trained model's over {tokens} tokens"


def export_checkpoint(
    config: RunConfig,
    ranks: Ranks,
    checkpoint: Path,
    tokenizer: Path,
    out: Path,
    logits_path: Path,
    facts: Mapping[str, object],
) -> tuple[float, int]:
    """Export, verify and put in place; returns the largest logit difference and the number of tokens compared.

    Raises:
        ExportMismatch: the export is not the trained model; nothing is left at `out`.
    """
    import torch  # seconds to import, as is transformers: not before a stage needs them

    from trainer.checkpoint import hf
    from trainer.checkpoint.global_tensors import GlobalTensors

    ranks.run("logits", lambda: None, checkpoint=checkpoint.resolve(), output=logits_path.resolve())
    trained = torch.load(logits_path, weights_only=True)
    logits_path.unlink()
    temporary = hf.export_model(GlobalTensors(checkpoint), config, tokenizer, out, facts)
    try:
        difference = hf.verify_export(temporary, trained["logits"], trained["tokens"])
    except hf.ExportMismatch:
        shutil.rmtree(temporary)
        raise
    hf.record_verification(temporary, difference, trained["tokens"].numel())
    hf.commit(temporary, out)
    return difference, trained["tokens"].numel()


def generate_sample(session: Session) -> None:
    """Continue the run's prompt with the exported model."""
    from trainer.checkpoint import hf

    config, run_dir = session.config, session.run_dir
    with session.stage("generate") as bar:
        prompt = config.generate.prompt
        text = hf.generate(run_dir.export, prompt, config.generate.max_new_tokens, config.seed)
        session.log.write("generated", prompt=prompt, text=text)
        bar.result = f"{prompt}|{text}".replace("\n", "\\n")
