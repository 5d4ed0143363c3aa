"""Raw text to a folder that training reads: tokenizer/, train.bin/.idx, heldout.bin/.idx, manifest.json.

The same text and settings give the same bytes. Everything is built under temporary names, then renamed, and the
manifest comes last: a folder without one is nobody's data, and preparing it again starts over.
"""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import tokenizers

from data_pipeline.corpus import SPLITS, Corpus, Split
from data_pipeline.document import Document
from data_pipeline.durable import discard, publish, temporary_path
from data_pipeline.manifest import MANIFEST_FILE, FileRecord, Manifest, SourceRecord, SplitRecord, check_enough
from data_pipeline.settings import SPLIT_SEED, Settings
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import check_sources, origin
from data_pipeline.tokenization import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    check_tokenizer,
    check_vocab_size,
    install_tokenizer,
    train_bpe,
)
from trainer.config import DataConfig, UserError

TOKENIZER_FOLDER = "tokenizer"
_LOCK_FILE = ".prepare.lock"
_BATCH_CHARS = 1 << 20  # bounds what `tokenizers` holds while it encodes


class Progress(Protocol):
    """Hears how far a stage has come."""

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None: ...


class NoProgress:
    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        pass


def prepare(
    data: DataConfig,
    *,
    vocab_size: int,
    seq_length: int,
    out: Path,
    seed: int = SPLIT_SEED,
    min_train_tokens: int = 0,
    progress: Progress | None = None,
) -> Manifest:
    """Make sure that `out` holds the prepared data of these settings; does nothing where it already does.

    The sources are not looked at again once prepared. Files damaged since are made anew, from the same text only.

    Raises:
        UserError: a source, the tokenizer or the vocabulary cannot be used; the text is too small for a batch of
            `min_train_tokens` or for one held-out sequence; `out` holds something else or is in use.
    """
    settings = Settings.of(data, vocab_size, seq_length, seed)
    manifest = find_prepared(settings, out)
    if manifest is None:
        notes = preflight(settings, out)
        with _locked(out):
            manifest = find_prepared(settings, out)  # another process may have been faster
            if manifest is None:
                manifest = _build(settings, out, notes, min_train_tokens, progress or NoProgress())
    check_enough(manifest.splits, seq_length, min_train_tokens)
    return manifest


def find_prepared(settings: Settings, out: Path) -> Manifest | None:
    """The manifest of `out` if it holds these settings' data, whole.

    Raises:
        UserError: it holds the data of other settings.
    """
    if not (out / MANIFEST_FILE).exists():
        return None
    manifest = Manifest.load(out)
    differences = manifest.settings.differences(settings)
    if differences:
        raise UserError(f"{out} holds data prepared with other settings ({'; '.join(differences)}); use another folder")
    return None if manifest.damage(out) else manifest


def preflight(settings: Settings, out: Path) -> list[str]:
    """Refuse, before anything is written, what can be seen to fail; returns notes for the user about the sources.

    Raises:
        UserError: see `prepare`.
    """
    if out.exists():
        if not out.is_dir():
            raise UserError(f"{out} is not a folder; name another one to write prepared data to")
        names = {path.name for path in out.iterdir()}
        if names and not names & {_LOCK_FILE, MANIFEST_FILE}:
            raise UserError(f"{out} holds files that are no prepared data ({min(names)}, ...); use another folder")
    if settings.tokenizer is None:
        check_vocab_size(settings.vocab_size)
    else:
        check_tokenizer(Path(settings.tokenizer).expanduser(), settings.vocab_size)
    return check_sources(settings.sources)


def _build(settings: Settings, out: Path, notes: list[str], min_train_tokens: int, progress: Progress) -> Manifest:
    """Build everything under temporary names, then publish it; on an error nothing of it is left.

    What a killed preparation left is overwritten.
    """
    with ExitStack() as cleanup:
        cleanup.callback(_discard_temporaries, out)
        trained_on = _make_tokenizer(settings, out, progress)
        tokenizer = Tokenizer.load(temporary_path(out / TOKENIZER_FOLDER))
        writers = {
            split: cleanup.enter_context(ShardWriter(out / split, tokenizer.vocab_size, tokenizer.end_of_text_id))
            for split in SPLITS
        }
        corpus = Corpus(settings)
        _write_tokens(corpus, tokenizer, writers, trained_on.text_bytes if trained_on else None, progress)
        if trained_on and trained_on.identity != corpus.identity:
            raise UserError("the text of data.sources changed while it was read; run again once it is at rest")
        manifest = _describe(settings, out, notes, corpus, tokenizer, writers)
        check_enough(manifest.splits, settings.seq_length, min_train_tokens)
        if (out / MANIFEST_FILE).exists() and Manifest.load(out).files != manifest.files:
            raise UserError(f"{out} is damaged and its text has changed since it was prepared; use another folder")
        publish(out / TOKENIZER_FOLDER)
        for writer in writers.values():
            writer.commit()
        manifest.write(out)
    return manifest


def _make_tokenizer(settings: Settings, out: Path, progress: Progress) -> Corpus | None:
    """Write the tokenizer's folder; returns the corpus it was trained on, None for an existing tokenizer."""
    folder = temporary_path(out / TOKENIZER_FOLDER)
    if settings.tokenizer is not None:
        install_tokenizer(Path(settings.tokenizer).expanduser(), folder, settings.seq_length)
        return None
    corpus = Corpus(settings)

    def training_texts() -> Iterator[str]:
        for batch in _batches(corpus):
            progress.update("train tokenizer", corpus.text_bytes, None, "bytes")
            yield from (document.text for document, split in batch if split == "train")

    train_bpe(training_texts(), settings.vocab_size, folder, settings.seq_length)
    return corpus


def _write_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    writers: Mapping[Split, ShardWriter],
    total_bytes: int | None,
    progress: Progress,
) -> None:
    for batch in _batches(corpus):
        tokens = tokenizer.encode_batch([document.text for document, _ in batch])
        for split, writer in writers.items():
            writer.add([ids for ids, (_, of_split) in zip(tokens, batch, strict=True) if of_split == split])
        progress.update("tokenize", corpus.text_bytes, total_bytes, "bytes")
    for writer in writers.values():
        writer.finish()


def _batches(corpus: Corpus) -> Iterator[list[tuple[Document, Split]]]:
    """The corpus in lists of about `_BATCH_CHARS` characters."""
    batch: list[tuple[Document, Split]] = []
    num_chars = 0
    for document, split in corpus:
        batch.append((document, split))
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _describe(
    settings: Settings,
    out: Path,
    notes: list[str],
    corpus: Corpus,
    tokenizer: Tokenizer,
    writers: Mapping[Split, ShardWriter],
) -> Manifest:
    """The manifest of what lies finished under temporary names."""
    tokenizer_folder = temporary_path(out / TOKENIZER_FOLDER)
    files = {f"{TOKENIZER_FOLDER}/{name}": tokenizer_folder / name for name in (TOKENIZER_FILE, CONFIG_FILE)}
    for writer in writers.values():
        files |= {path.name: temporary_path(path) for path in (writer.bin_path, writer.idx_path)}
    return Manifest(
        settings=settings,
        settings_fingerprint=settings.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        splits={
            split: SplitRecord(
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                text_bytes=corpus.by_split[split].text_bytes,
            )
            for split, writer in writers.items()
        },
        sources=[
            SourceRecord(source=source, origin=origin(source), documents=count.documents, text_bytes=count.text_bytes)
            for source, count in corpus.by_source.items()
        ],
        dropped=corpus.tally.dropped,
        repaired=corpus.tally.repaired,
        notes=notes,
        files={name: FileRecord.of(path) for name, path in files.items()},
        made_with=f"tokenizers {tokenizers.__version__}",
    )


def _discard_temporaries(out: Path) -> None:
    shards = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")]
    for name in (TOKENIZER_FOLDER, *shards, MANIFEST_FILE):
        discard(out / name)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folder and hold it for this process; the kernel lets go when the process ends, however it ends.

    The lock's file stays: it marks a folder that an interrupted preparation may start over in.

    Raises:
        UserError: the folder cannot be written, or another process holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / _LOCK_FILE, "a", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); use another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out} is being prepared by another process; wait for it or stop it") from error
        yield
