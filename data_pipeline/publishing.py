"""The last pass: parts of tokens become shards, the shards get their manifests, and everything its place."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import tokenizers as tokenizers_library

from data_pipeline.durable import move_into_place, write_synced
from data_pipeline.joining import JoinTask, TokenPart
from data_pipeline.manifest import (
    MANIFEST_FILE,
    PORTIONS,
    BadSplit,
    DatasetManifest,
    FileRecord,
    Manifest,
    Portion,
    PortionRecord,
    SourceRecord,
)
from data_pipeline.parts import PartRecord
from data_pipeline.settings import Settings
from data_pipeline.sources import Split
from data_pipeline.tally import Count, Tally
from data_pipeline.tokenization import Tokenizer
from trainer.section import UserError

TOKENIZER_FOLDER = "tokenizer"
DROPPED_FILE = "dropped.jsonl"


@dataclass(frozen=True)
class Finished:
    """A split whose tokens are ready."""

    split: Split
    cleaned: PartRecord
    """Of the first pass."""
    tokens: TokenPart
    tally: Tally
    """Of what was decided over the whole corpus."""
    notes: Sequence[str]


def join_tasks(
    finished: Sequence[Finished], datasets: Iterable[str], tokenizer: Tokenizer, work: Path
) -> list[JoinTask]:
    """One for every portion of every data set, in their order; each data set has a folder in `work`."""
    tasks = []
    for name in datasets:
        (work / name).mkdir(parents=True, exist_ok=True)
        parts = tuple(each.tokens for each in finished if each.split.dataset == name)
        tasks += [JoinTask(name, portion, parts, str(tokenizer.dtype), work / name) for portion in PORTIONS]
    return tasks


def describe_dataset(
    name: str,
    finished: Sequence[Finished],
    portions: dict[Portion, PortionRecord],
    settings: Settings,
    tokenizer: Tokenizer,
    folder: Path,
) -> DatasetManifest:
    """Write the samples of dropped documents and the manifest of a data set beside its shards."""
    mine, tally = [each for each in finished if each.split.dataset == name], Tally()
    for each in mine:
        tally.merge(each.cleaned.tally)
        tally.merge(each.tally)
    lines = [
        orjson.dumps({"reason": reason, "id": place, "text": text})
        for reason, texts in sorted(tally.samples.items())
        for place, text in texts
    ]
    write_synced(folder / DROPPED_FILE, b"".join(line + b"\n" for line in lines))
    names = [DROPPED_FILE, *(f"{portion}.{kind}" for portion in PORTIONS for kind in ("bin", "idx"))]
    manifest = DatasetManifest(
        name=name,
        settings_fingerprint=settings.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        portions=portions,
        sources=[
            SourceRecord(
                split=each.split.id,
                place=each.split.place,
                content_hash=each.cleaned.content_hash,
                documents=each.cleaned.documents,
            )
            for each in mine
        ],
        dropped=dict(sorted(tally.dropped.items())),
        repaired=dict(sorted(tally.repaired.items())),
        files={each: FileRecord.of(folder / each) for each in sorted(names)},
    )
    manifest.write(folder)
    return manifest


def describe(
    datasets: Sequence[DatasetManifest],
    settings: Settings,
    blend: dict[str, float] | None,
    tokenizer_folder: Path,
    tokenizer: Tokenizer,
    bad: Sequence[BadSplit],
    notes: Sequence[str],
    work: Path,
) -> Manifest:
    """The manifest of the whole folder, of what lies ready in `work`."""
    files = {f"{TOKENIZER_FOLDER}/{path.name}": FileRecord.of(path) for path in sorted(tokenizer_folder.iterdir())}
    for dataset in datasets:
        files |= {f"{dataset.name}/{name}": record for name, record in dataset.files.items()}
        files[f"{dataset.name}/{MANIFEST_FILE}"] = FileRecord.of(work / dataset.name / MANIFEST_FILE)
    return Manifest(
        settings=settings,
        settings_fingerprint=settings.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        blend=blend,
        datasets={dataset.name: dataset.portions for dataset in datasets},
        dropped=_sums(dataset.dropped for dataset in datasets),
        repaired=_sums(dataset.repaired for dataset in datasets),
        bad_splits=list(bad),
        notes=list(notes),
        files=files,
        made_with=[f"tokenizers {tokenizers_library.__version__}", tokenizer.engine_name],
    )


def publish(manifest: Manifest, tokenizer_folder: Path, joined: Path, out: Path) -> None:
    """Move everything to its place, the manifest last.

    Raises:
        UserError: damaged data would be replaced by other data.
    """
    if (out / MANIFEST_FILE).exists() and Manifest.load(out).files != manifest.files:
        raise UserError(f"{out} is damaged and its text has changed since it was prepared; use another folder")
    move_into_place(tokenizer_folder, out / TOKENIZER_FOLDER)
    for name in manifest.datasets:
        move_into_place(joined / name, out / name)
    manifest.write(out)


def _sums(counts: Iterable[Mapping[str, Count]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for each in counts:
        for reason, count in each.items():
            sums[reason] = sums.get(reason, 0) + count.count
    return dict(sorted(sums.items()))
