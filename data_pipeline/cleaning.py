"""The first pass over a split: read, clean, and leave a part with its text or, where nothing can change it, its tokens.

Everything that takes one document alone happens here. What takes the whole corpus (copies, phrases that stand in
evaluation texts) is decided later, from what this pass leaves beside the text.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_pipeline import parts
from data_pipeline.decisions import OverlapWriter
from data_pipeline.dedup import IndexWriter
from data_pipeline.document import Document, Step
from data_pipeline.filters.classifier import Classifier, ClassifierFilter
from data_pipeline.filters.language import LanguageFilter
from data_pipeline.filters.quality import QualityRules
from data_pipeline.manifest import Portion, PortionRecord
from data_pipeline.normalize import Normalizer
from data_pipeline.parts import PartRecord
from data_pipeline.settings import Settings
from data_pipeline.sources import Split, content_hash, is_unchanged, read_split
from data_pipeline.tally import Tally
from data_pipeline.tasks import Advance, Report
from data_pipeline.token_parts import TokenWriter, encoded_part
from data_pipeline.tokenization import Engine, SplitEncoder, Tokenizer
from trainer.data_config import DataConfig

_BATCH_CHARS = 1 << 20  # bounds what a worker holds; a longer document is a batch of its own


@dataclass(frozen=True)
class CleanTask:
    """Makes `folder` the part of one split, unless it is that already."""

    split: Split
    settings: Settings
    made_by: str
    """Fingerprint of the settings and of the files that they name."""
    control_tokens: tuple[str, ...]
    classifier: Path | None
    """File of the quality classifier, if one is asked for."""
    evaluation_ngrams: Path | None
    tokenizer: Path | None
    """Folder of the tokenizer where the part is to hold tokens; None where it is to hold text."""
    engine: Engine
    folder: Path

    @property
    def name(self) -> str:
        return self.split.place

    def run(self, report: Report) -> PartRecord:
        """Raises:
        UnreadableSplit: the sources cannot be read.
        """
        record = parts.find_part(self.folder, self.made_by)
        if record is not None and self._is_current(record):
            report(Advance(self.split.size_bytes, record.documents))
            return record
        with parts.new_part(self.folder) as temporary:
            if self.tokenizer is None:
                record = self._fill(temporary, report, None)
            else:
                tokenizer = Tokenizer.load(self.tokenizer, self.engine)
                record = encoded_part(tokenizer, self.split.id, lambda encoder: self._fill(temporary, report, encoder))
            parts.commit_part(temporary, self.folder, record)
        return record

    def _is_current(self, record: PartRecord) -> bool:
        """Whether the split's text is what it was; its hash is asked only where a file was written since."""
        if self.split.modified_ns == record.modified_ns:
            return True
        return self._hash() == record.content_hash

    def _hash(self) -> str:
        """Of the raw bytes; what is far away is not read once more for it."""
        return self.split.fingerprint if self.split.modified_ns is None else content_hash(self.split)

    def _fill(self, folder: Path, report: Report, encoder: SplitEncoder | None) -> PartRecord:
        """Clean the split's documents into a folder; returns what is in it."""
        tally = Tally()
        cleaned = _CleanedDocuments(self, folder, encoder)
        for batch in self._clean_batches(tally, cleaned, report):
            cleaned.add(batch)
        portions = cleaned.finish()
        content = self._hash()
        if not is_unchanged(self.split):
            raise RuntimeError(f"{self.split.place} has changed while it was read; run again once it is at rest")
        return PartRecord(
            made_by=self.made_by,
            content_hash=content,
            modified_ns=self.split.modified_ns,
            documents=cleaned.documents.num_documents,
            text_bytes=cleaned.documents.text_bytes,
            portions=portions,
            tally=tally,
            files=parts.records_of(folder),
        )

    def _clean_batches(self, tally: Tally, cleaned: "_CleanedDocuments", report: Report) -> Iterator[list[Document]]:
        input_bytes = 0

        def on_bytes(num: int) -> None:
            nonlocal input_bytes
            input_bytes += num
            report(Advance(input_bytes, cleaned.documents.num_documents, cleaned.num_tokens))

        steps = clean_steps(self.settings.data, self.control_tokens, self.classifier)
        documents = read_split(self.split, self.settings.data.max_document_bytes, tally, on_bytes=on_bytes)
        for batch in batched(documents):
            for step in steps:
                batch = step(batch, tally)
            if batch:
                yield batch
        report(Advance(self.split.size_bytes, cleaned.documents.num_documents, cleaned.num_tokens))


def clean_steps(data: DataConfig, control_tokens: Iterable[str], classifier: Path | None) -> list[Step]:
    """What a document goes through, in order; each step that the config asks for."""
    steps: list[Step] = [Normalizer(tuple(control_tokens))]
    if data.language.keep:
        steps.append(LanguageFilter(data.language))
    if data.quality.rules:
        steps.append(QualityRules(data.quality.rules))
    if classifier is not None:
        steps.append(ClassifierFilter(Classifier.load(classifier), data.quality.pareto_alpha))
    return steps


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of about `_BATCH_CHARS` characters."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class _CleanedDocuments:
    """Writes clean documents and all that is to be known of them into a part."""

    def __init__(self, task: CleanTask, folder: Path, encoder: SplitEncoder | None) -> None:
        data = task.settings.data
        self.documents = parts.DocumentsWriter(folder)
        self._seed, self._heldout_fraction = task.settings.seed, data.heldout_fraction
        self._index = IndexWriter(folder, data.dedup)
        self._overlaps = OverlapWriter(folder, task.evaluation_ngrams) if task.evaluation_ngrams else None
        self._text = parts.TextWriter(folder) if encoder is None else None
        self._tokens = TokenWriter(folder, encoder) if encoder else None

    @property
    def num_tokens(self) -> int:
        return self._tokens.num_tokens if self._tokens else 0

    def add(self, batch: list[Document]) -> None:
        texts = [document.text for document in batch]
        encoded = [text.encode() for text in texts]
        digests = [xxhash.xxh3_128_digest(text, self._seed) for text in encoded]
        rows = self.documents.add(batch, digests, encoded)
        self._index.add(texts, digests)
        if self._overlaps:
            self._overlaps.add(texts)
        if self._text:
            self._text.add(encoded)
        if self._tokens:
            self._tokens.add(texts, rows["text_bytes"], parts.is_heldout(rows, self._heldout_fraction))

    def finish(self) -> dict[Portion, PortionRecord]:
        self.documents.finish()
        self._index.finish()
        if self._overlaps:
            self._overlaps.finish()
        if self._text:
            self._text.finish()
        return self._tokens.finish() if self._tokens else {}
