"""How good is it? Of a checkpoint or a Hugging Face folder, by hand, with the code that judges beside training.

In fp32 unless asked otherwise, so that a checkpoint and its export come out alike.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from data_pipeline.manifest import Manifest as DataManifest
from data_pipeline.pipeline import TOKENIZER_FOLDER
from launcher.evaluation.judge import Judge, judge_by
from launcher.evaluation.results import EvaluationResults
from launcher.evaluation.tokens import FolderTokenizer, check_tokenizer
from launcher.job.ranks import Ranks, ready_ranks
from launcher.verbs import inspection
from trainer import config_file
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.format.results import RESULTS_PATTERN, read_evaluation, read_results, write_results
from trainer.config import RunConfig, UserError
from trainer.events import read_events, void_checkpoints
from trainer.inference.requests import Answer, Request, read_answers, write_requests
from trainer.progress import ProgressFile, Update, counting, unheard
from trainer.run_dir import RunDir

Precision = Literal["fp32", "bf16", "run"]
HF_CONFIG = "config.json"
_MOST_NATS = 700.0
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx")
"""What models of Hugging Face call the most tokens that they read."""


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    tasks: Sequence[str] = ()
    max_examples: int | None = None
    contamination: bool = False
    harness: Sequence[str] = ()
    """Tasks of the lm-evaluation-harness."""
    harness_folders: Sequence[Path] = ()
    heldout: bool = True
    """Also the loss on held-out text, if there is data."""
    precision: Precision = "fp32"
    to_be_saved: bool = False
    """Results are to stand beside the checkpoint (`save`)."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    path: Path
    """A checkpoint, or a Hugging Face folder."""
    config: RunConfig
    """`data.prepared` is set where there is data."""
    tokenizer: Path
    """Its folder."""
    manifest: Manifest | None = None
    """Of a checkpoint."""

    @property
    def prepared(self) -> Path | None:
        return Path(self.config.data.prepared) if self.config.data.prepared else None


@dataclass
class Evaluation:
    """What was found."""

    subject: Subject
    results: EvaluationResults
    harness: list[dict[str, Any]] = field(default_factory=list)

    def as_tree(self) -> dict[str, Any]:
        """For a file, or another program."""
        results, heldout = self.results.as_tree(), self.results.heldout
        tree = {"checkpoint": str(self.subject.path), "step": self.results.step, **(heldout or {})}
        if heldout is not None:
            tree["perplexity"] = _perplexity(heldout["loss"])
        if self.results.tasks:
            tree |= {name: results[name] for name in ("scores", "tasks", "battery_fingerprint", "seed")}
        return tree | ({"harness": self.harness} if self.harness else {})


def evaluate(
    path: Path, data: Path | None, settings: Sequence[str], wanted: Wanted, update: Update = unheard
) -> Evaluation:
    """Raises:
    UserError: there is nothing to evaluate, or nothing to measure it by, or one does not fit the other.
    """
    if (path / HF_CONFIG).is_file():
        if wanted.to_be_saved:
            raise UserError(f"{path} is no checkpoint, so nothing is kept beside it; write a file with --out")
        subject = _export(path, data, settings, wanted, update)
    else:
        subject = _checkpoint(path, data, settings, wanted, update)
    judge = _judge(subject, wanted, update)
    if not (wanted.heldout and subject.prepared) and not judge.requests and not wanted.harness:
        raise UserError(f"nothing to measure {path} by; name tasks (--tasks), or prepared data (--data)")
    with ExitStack() as resources:
        run_dir = resources.enter_context(inspection.scratch_run())
        if subject.manifest is not None:
            resources.enter_context(store.being_read(subject.path))
        update("evaluate: starting ranks", 0, None, "ranks")
        asked = _Asked(subject, run_dir, resources.enter_context(ready_ranks(subject.config, run_dir)), update)
        heldout = asked.heldout() if wanted.heldout and subject.prepared else None
        answers = asked.answers(judge.requests)
        harness = _harness(asked, judge, wanted)
        step = subject.manifest.step if subject.manifest is not None else None
        update("evaluate: grading", 0, None, "tasks")
        return Evaluation(subject, judge.results(subject.path.name, step, answers, heldout), harness)


def save(evaluation: Evaluation) -> Path:
    """Beside the checkpoint that it is of (`Wanted.to_be_saved`), as the service of a run does; scores of other tasks
    stay, by which it may be the best."""
    subject, results = evaluation.subject, evaluation.results
    assert subject.manifest is not None
    before = read_results(subject.path, subject.manifest) or {"scores": {}}
    scores = {**before["scores"], **results.scores}
    return write_results(subject.path, subject.manifest, scores, results.model_dump(mode="json"))


def results_of(path: Path) -> tuple[list[EvaluationResults], list[str]]:
    """What was found of a run's checkpoints, by steps, as far as it is of the history that counts and answers the same
    questions as the newest; and why others are left out.

    Raises:
        UserError: nothing was found of any, or a file holds something else.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [(file, read_evaluation(file)) for file in sorted(folder.glob(RESULTS_PATTERN))]
    if not found:
        raise UserError(
            f"{path} has no results of evaluations; set evaluation.tasks for its run, or `broadgauge eval --save`"
        )
    gone = {store.folder_name(step) for step in void_checkpoints(read_events(RunDir(folder.parent).events_path))}
    void = [f"{name} is left out: the run went back before it" for file, _ in found if (name := _of(file)) in gone]
    read = [EvaluationResults.of(tree, file) for file, tree in found if _of(file) not in gone]
    if not read:
        raise UserError(f"{path} has results only of steps that the run has gone back before; let it go on")
    newest = max(read, key=lambda each: each.step or 0)
    reasons = {each.checkpoint: _unlike(each, newest) for each in read}
    alike = [each for each in read if reasons[each.checkpoint] is None]
    left_out = [f"{name} is left out: {reason}" for name, reason in reasons.items() if reason is not None]
    return sorted(alike, key=lambda each: each.step or 0), void + left_out


def _of(results: Path) -> str:
    """The name of their checkpoint."""
    return results.name.partition(".")[0]


def _unlike(one: EvaluationResults, newest: EvaluationResults) -> str | None:
    """Why it cannot be compared."""
    if one.battery_fingerprint != newest.battery_fingerprint:
        return f"it was asked other things than {newest.checkpoint}"
    if one.precision != newest.precision:
        return f"it was judged in {one.precision or 'a precision that is not known'}, not in {newest.precision}"
    return None


# -------------------------------------------------------------------------------------------------- what is evaluated


def _checkpoint(path: Path, data: Path | None, settings: Sequence[str], wanted: Wanted, update: Update) -> Subject:
    precision = [] if wanted.precision == "run" else [f"train.precision={wanted.precision}"]
    found = inspection.find(path, data, [*precision, *settings], "evaluate", update)
    assert found.config.data.prepared is not None
    return Subject(found.checkpoint, found.config, Path(found.config.data.prepared) / TOKENIZER_FOLDER, found.manifest)


def _export(folder: Path, data: Path | None, settings: Sequence[str], wanted: Wanted, update: Update) -> Subject:
    """A folder of Hugging Face, with the settings and the data of the run whose export it is, if it is one."""
    run_dir = RunDir(folder.resolve().parent)
    tree: dict[str, Any] = {}
    if run_dir.config_path.is_file():
        config = run_dir.config()
        tree = config.model_dump(mode="json")
        data = data or run_dir.data_for(config)
    model = _read_model(folder)
    of_run: dict[str, Any] = {name: tree[name] for name in ("seed", "evaluation") if name in tree}
    train = {"precision": "fp32" if wanted.precision == "run" else wanted.precision}
    prepared = {"prepared": str(data.resolve())} if data is not None else {}
    config = config_file.override(
        {**of_run, "model": model, "train": train, "data": prepared}, [*settings, inspection.ALONE]
    )
    if data is not None:
        manifest = DataManifest.load(data)
        manifest.verify(data, counting(update, "evaluate: verifying data", "bytes"))
        check_tokenizer(FolderTokenizer.load(folder), manifest.tokenizer_fingerprint, config.model.vocab_size, folder)
    return Subject(folder.resolve(), config, folder)


def _read_model(folder: Path) -> dict[str, int]:
    """What of its shape those who ask must know."""
    try:
        tree = orjson.loads((folder / HF_CONFIG).read_bytes())
        context = next(tree[name] for name in _CONTEXTS if name in tree)
        return {"seq_length": context, "vocab_size": tree["vocab_size"]}
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"{folder / HF_CONFIG} does not say how many tokens the model knows and reads (vocab_size and one of "
            f"{', '.join(_CONTEXTS)}); give the folder of a language model"
        ) from error


def _judge(subject: Subject, wanted: Wanted, update: Update) -> Judge:
    tokenizer = FolderTokenizer.load(subject.tokenizer)
    check_tokenizer(tokenizer, None, subject.config.model.vocab_size, subject.path)
    advance = counting(update, "evaluate: comparing with training text", "tokens")
    return judge_by(
        *(wanted.tasks, subject.config, subject.prepared, tokenizer, wanted.max_examples),
        contamination=wanted.contamination,
        advance=advance,
    )


# ------------------------------------------------------------------------------------------------------- who is asked


class _Asked:
    """Ranks that hold the subject while they are asked."""

    def __init__(self, subject: Subject, run_dir: RunDir, ranks: Ranks, update: Update) -> None:
        self._subject, self._run_dir, self._ranks, self._update = subject, run_dir, ranks, update

    def heldout(self) -> dict[str, Any]:
        output = self._run_dir.path / "heldout.json"
        told, advance = ProgressFile(output), counting(self._update, "evaluate: held-out text", "micro-batches")
        self._ranks.run("evaluate", lambda: told.tell(advance), checkpoint=self._subject.path, output=output)
        result: dict[str, Any] = orjson.loads(output.read_bytes())
        for scores in result["datasets"].values():
            scores["perplexity"] = _perplexity(scores["loss"])
        return result

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        if not requests:
            return []
        asked, output = self._run_dir.path / "requests.jsonl", self._run_dir.path / "answers.jsonl"
        write_requests(asked, requests)
        told, advance = ProgressFile(output), counting(self._update, "evaluate: answering", "requests")
        self._ranks.run(
            "answer",
            lambda: told.tell(advance),
            checkpoint=self._subject.path,
            output=output,
            requests=asked,
        )
        return read_answers(output, requests)


def _perplexity(loss: float | None) -> float | None:
    """None where the loss is no number, as that of a model that has diverged, or so large that its power is none."""
    return None if loss is None or loss > _MOST_NATS else math.exp(loss)


def _harness(asked: _Asked, judge: Judge, wanted: Wanted) -> list[dict[str, Any]]:
    if not wanted.harness:
        return []
    from launcher.evaluation.harness import run_harness  # an extra, and seconds to import

    battery = judge.battery
    found = run_harness(
        asked.answers,
        battery.tokenizer,
        battery.context_tokens,
        wanted.harness,
        wanted.harness_folders,
        wanted.max_examples,
        seed=battery.seed,
    )
    return [asdict(each) for each in found]
