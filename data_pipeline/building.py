"""One preparation: the passes over the corpus in order, each of which goes on where an interrupted one stopped."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline import parts, publishing
from data_pipeline.cleaning import CleanTask
from data_pipeline.decisions import PartDecisions, decide, tally_copies
from data_pipeline.decontamination import read_evaluation
from data_pipeline.durable import move_into_place
from data_pipeline.finishing import DecidedText, FinishTask, TrainTokenizerTask
from data_pipeline.joining import TokenPart, without_copies
from data_pipeline.manifest import PORTIONS, BadSplit, FileRecord, Manifest, check_enough
from data_pipeline.parts import PartRecord
from data_pipeline.progress import Progress, meter
from data_pipeline.publishing import Finished
from data_pipeline.settings import Settings
from data_pipeline.sources import Plan, Split
from data_pipeline.tally import Tally
from data_pipeline.tasks import Failed, Task, Workers
from data_pipeline.tokenization import Tokenizer, control_tokens_of, install_tokenizer
from trainer.data_config import DataConfig
from trainer.section import UserError

WORK_FOLDER = ".work"
"""In the folder of the prepared data, while it is being made."""
_NGRAMS = "ngrams.npy"
_CLASSIFIER = "classifier.npz"
_VERSION = 1  # of what the passes do: finished parts of another one are not used


class PreparationFailed(RuntimeError):
    """Work failed every time it was tried; the text is one line for a person."""


@dataclass(frozen=True)
class _Part:
    """A finished part of the first pass."""

    split: Split
    folder: Path
    record: PartRecord


class Build:
    """One use: `run`."""

    def __init__(
        self, data: DataConfig, settings: Settings, plan: Plan, out: Path, workers: Workers, progress: Progress
    ) -> None:
        """`data` is as the user gave it: `settings` hold only what decides the bytes."""
        self._data, self._settings, self._plan, self._out = data, settings, plan, out
        self._workers, self._progress = workers, progress
        self._notes = list(plan.notes)
        self._made_by = _hash(_VERSION, settings.fingerprint_of_parts, *_named_files(settings.data))
        self._work = out / WORK_FOLDER / self._made_by

    def run(self, min_train_tokens: int) -> Manifest:
        """See `data_pipeline.pipeline.prepare`."""
        self._make_work_folder()
        given = self._install_tokenizer() if self._settings.data.tokenizer.path is not None else None
        grams = self._read_evaluation()
        cleaned, bad = self._clean(given, grams)
        if not any(part.record.documents for part in cleaned):
            raise UserError(f"data.sources: no usable text ({_merged(p.record.tally for p in cleaned)}); replace them")
        decided = self._decide(cleaned, grams)
        if self._settings.needs_text:
            texts = [
                DecidedText(part.folder, number, decided, grams, self._settings) for number, part in enumerate(cleaned)
            ]
            tokenizer = given or self._train_tokenizer(cleaned, texts, decided)
            finished = self._finish(cleaned, texts, decided, tokenizer)
        else:
            assert given is not None
            tokenizer = given
            finished = self._without_copies(cleaned, decided, tokenizer)
        return self._publish(finished, bad, tokenizer, min_train_tokens)

    # --------------------------------------------------------------------------------------------------------- passes

    def _make_work_folder(self) -> None:
        """Work of other settings is removed: nobody would go on with it here."""
        self._work.mkdir(parents=True, exist_ok=True)
        for other in self._work.parent.iterdir():
            if other != self._work:
                shutil.rmtree(other)

    def _install_tokenizer(self) -> Path:
        source = Path(str(self._settings.data.tokenizer.path)).expanduser()
        return self._once("tokenizer", lambda folder: install_tokenizer(source, folder, self._settings.seq_length))

    def _install_classifier(self) -> Path | None:
        """A copy: workers find it wherever they run, and it is the same one for all splits."""
        if self._settings.data.quality.classifier is None:
            return None
        source = Path(self._settings.data.quality.classifier).expanduser()
        return self._once("classifier", lambda folder: shutil.copyfile(source, folder / _CLASSIFIER)) / _CLASSIFIER

    def _read_evaluation(self) -> Path | None:
        """File of the evaluation texts' n-grams, if the corpus is to be kept apart from any."""
        if self._settings.data.decontaminate.against is None:
            return None
        found = read_evaluation(self._settings.data.decontaminate)
        if found.num_short:
            self._notes.append(
                f"data.decontaminate: {found.num_short} of {found.num_strings} evaluation strings have fewer than "
                f"{found.ngram} words and cannot be looked for"
            )
        return self._once(f"evaluation-{found.fingerprint}", lambda folder: found.save(folder / _NGRAMS)) / _NGRAMS

    def _clean(self, tokenizer: Path | None, grams: Path | None) -> tuple[list[_Part], list[BadSplit]]:
        settings = self._settings
        fused = None if settings.needs_text else tokenizer
        literals = Tokenizer.load(tokenizer, "reference").control_tokens if tokenizer else self._tokens_to_be()
        classifier, made_by, folder = self._install_classifier(), self._made_by_with(grams), self._part_folder("clean")
        tasks = [
            CleanTask(
                split=split,
                settings=settings,
                made_by=made_by,
                control_tokens=literals,
                classifier=classifier,
                evaluation_ngrams=grams,
                tokenizer=fused,
                engine=self._data.tokenizer.engine,
                folder=folder / split.id,
            )
            for split in self._plan.splits
        ]
        outcomes = self._workers.run(
            tasks, meter(self._progress, "clean", sum(s.size_bytes for s in self._plan.splits))
        )
        cleaned, bad = [], []
        for task, outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, Failed):
                bad.append(BadSplit(split=task.split.id, place=task.split.place, reason=outcome.reason))
            else:
                cleaned.append(_Part(task.split, task.folder, outcome.result))
        self._refuse_too_many(bad)
        return cleaned, bad

    def _refuse_too_many(self, bad: Sequence[BadSplit]) -> None:
        if len(bad) > self._data.max_bad_splits:
            first = f"{bad[0].place}: {bad[0].reason}"
            raise PreparationFailed(
                f"{len(bad)} of {len(self._plan.splits)} splits failed and data.max_bad_splits allows "
                f"{self._data.max_bad_splits} (first {first}); the rest is kept: mend it and run again, or allow more"
            )

    def _decide(self, cleaned: Sequence[_Part], grams: Path | None) -> Path:
        folders = [part.folder for part in cleaned]
        key = _hash(self._made_by_with(grams), *(f"{part.split.id} {part.record.content_hash}" for part in cleaned))
        return self._once(
            f"decisions-{key}", lambda folder: decide(folders, self._settings.data, folder, self._progress)
        )

    def _train_tokenizer(self, cleaned: Sequence[_Part], texts: Sequence[DecidedText], decided: Path) -> Path:
        total = sum(part.record.text_bytes for part in cleaned)
        share = min(1.0, self._settings.data.tokenizer.max_train_bytes / total)

        def train(folder: Path) -> None:
            task = TrainTokenizerTask(tuple(texts), share, self._settings, folder)
            self._run_all([task], "train tokenizer", int(total * share))

        return self._once(decided.name.replace("decisions", "tokenizer"), train)

    def _finish(
        self, cleaned: Sequence[_Part], texts: Sequence[DecidedText], decided: Path, tokenizer: Path
    ) -> list[Finished]:
        folder = self._part_folder("tokens")
        made_by = _hash(decided.name, Tokenizer.load(tokenizer, "reference").fingerprint)
        tasks = [
            FinishTask(
                name=part.split.place,
                text=text,
                tokenizer=tokenizer,
                engine=self._data.tokenizer.engine,
                made_by=made_by,
                folder=folder / part.folder.name,
            )
            for part, text in zip(cleaned, texts, strict=True)
        ]
        records = self._run_all(tasks, "tokenize", sum(part.record.text_bytes for part in cleaned))
        return [
            Finished(part.split, part.record, TokenPart(task.folder, record.portions), record.tally, record.notes)
            for part, task, record in zip(cleaned, tasks, records, strict=True)
        ]

    def _without_copies(self, cleaned: Sequence[_Part], decided: Path, tokenizer_folder: Path) -> list[Finished]:
        """Where the first pass made tokens: those of the documents that are kept."""
        data, tokenizer, finished = self._settings.data, Tokenizer.load(tokenizer_folder, "reference"), []
        for number, part in enumerate(cleaned):
            mine = PartDecisions.read(decided, number, part.folder, data, None)
            tokens = without_copies(part.folder, mine.verdicts, data.heldout_fraction)
            tally = tally_copies(mine, part.folder, data.heldout_fraction, tokenizer)
            finished.append(Finished(part.split, part.record, tokens, tally, part.record.notes))
        return finished

    def _publish(
        self, finished: Sequence[Finished], bad: Sequence[BadSplit], tokenizer_folder: Path, min_train_tokens: int
    ) -> Manifest:
        settings, tokenizer = self._settings, Tokenizer.load(tokenizer_folder, "reference")
        names, joined = list(settings.data.datasets), self._work / "joined"
        tasks = publishing.join_tasks(finished, names, tokenizer, joined)
        portions = self._run_all(tasks, "join", None)
        made = {(task.dataset, task.portion): portion for task, portion in zip(tasks, portions, strict=True)}
        datasets = [
            publishing.describe_dataset(
                name, finished, {p: made[name, p] for p in PORTIONS}, settings, tokenizer, joined / name
            )
            for name in names
        ]
        notes = self._notes + [f"{each.split.place}: {note}" for each in finished for note in each.notes]
        notes += [
            f"data set {name} has no training text left, and cannot be drawn from: see what was dropped"
            for name in names
            if not made[name, "train"].documents
        ]
        manifest = publishing.describe(
            datasets, settings, self._data.blend, tokenizer_folder, tokenizer, bad, notes, joined
        )
        check_enough(manifest.portions, settings.seq_length, min_train_tokens)
        publishing.publish(manifest, tokenizer_folder, joined, self._out)
        return manifest

    # --------------------------------------------------------------------------------------------------------- helpers

    def _made_by_with(self, grams: Path | None) -> str:
        """Fingerprint of the settings and of all files that they name, the sources aside."""
        return _hash(self._made_by, grams.parent.name if grams else "")

    def _part_folder(self, name: str) -> Path:
        folder = self._work / name
        folder.mkdir(exist_ok=True)
        parts.remove_unfinished(folder)
        return folder

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder of the work that `make` fills, unless it is there: it is whole or not at all."""
        folder = self._work / name
        if not folder.exists():
            temporary = folder.with_name(f"{name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            make(temporary)
            move_into_place(temporary, folder)
        return folder

    def _run_all(self, tasks: Sequence[Task], stage: str, total_bytes: int | None) -> list[Any]:
        """Results of tasks none of which may fail.

        Raises:
            PreparationFailed: one did, every time.
        """
        results = []
        outcomes = self._workers.run(tasks, meter(self._progress, stage, total_bytes))
        for task, outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, Failed):
                raise PreparationFailed(f"{stage}: {task.name} failed ({outcome.reason}); run again to go on")
            results.append(outcome.result)
        return results

    def _tokens_to_be(self) -> tuple[str, ...]:
        """Control tokens of the tokenizer that will be trained."""
        return control_tokens_of(self._settings.data.tokenizer.kind)


def _hash(*parts: object) -> str:
    return xxhash.xxh3_128_hexdigest("\0".join(map(str, parts)).encode())


def _named_files(data: DataConfig) -> Iterable[str]:
    """What the files that the settings name hold, the sources aside."""
    if data.tokenizer.path is not None:
        yield Tokenizer.load(Path(data.tokenizer.path).expanduser(), "reference").fingerprint
    if data.quality.classifier is not None:
        yield FileRecord.of(Path(data.quality.classifier).expanduser()).xxh3_128


def _merged(tallies: Iterable[Tally]) -> Tally:
    merged = Tally()
    for tally in tallies:
        merged.merge(tally)
    return merged
