"""One pass over the sources: clean, distinct documents, each assigned to training or to the held-out set."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import xxhash

from data_pipeline.document import Document
from data_pipeline.normalize import normalize
from data_pipeline.settings import Settings
from data_pipeline.sources import read_documents
from data_pipeline.tally import Tally
from trainer.config import UserError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass
class TextCount:
    """Documents and their bytes of UTF-8."""

    documents: int = 0
    text_bytes: int = 0

    def add(self, text_bytes: int) -> None:
        self.documents += 1
        self.text_bytes += text_bytes


class Corpus:
    """Iterate once; the counts are complete when the iteration is.

    Which split a document belongs to depends on its text alone, so documents can come and go around it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._identity = xxhash.xxh3_128()
        self.tally = Tally()
        self.by_split: dict[Split, TextCount] = {split: TextCount() for split in SPLITS}
        self.by_source: dict[str, TextCount] = {source: TextCount() for source in settings.sources}

    def __iter__(self) -> Iterator[tuple[Document, Split]]:
        """Documents in the order of the sources.

        Raises:
            UserError: at the end, if no document was usable.
        """
        settings, seen = self._settings, set[int]()
        for document in read_documents(settings.sources, settings.text_field, self.tally):
            text, repairs = normalize(document.text)
            for reason, count in repairs.items():
                self.tally.repair(reason, document.id, count)
            if not text.strip():
                self.tally.drop("empty_text", document.id)
                continue
            content = text.encode()
            digest = xxhash.xxh3_128_intdigest(content, settings.seed)
            if digest in seen:
                self.tally.drop("duplicate", document.id)
                continue
            seen.add(digest)
            self._identity.update(digest.to_bytes(16, "little"))
            split = self._split_of(digest)
            self.by_split[split].add(len(content))
            self.by_source[document.source].add(len(content))
            yield replace(document, text=text), split
        if not seen:
            sources = ", ".join(settings.sources)
            raise UserError(f"data.sources: no usable text in {sources} ({self.tally}); mend or replace it")

    @property
    def text_bytes(self) -> int:
        return sum(count.text_bytes for count in self.by_split.values())

    @property
    def identity(self) -> str:
        """Hash of every document given so far and their order, in hex."""
        return self._identity.hexdigest()

    def _split_of(self, digest: int) -> Split:
        return "heldout" if digest >> 64 < self._settings.heldout_fraction * 2**64 else "train"
