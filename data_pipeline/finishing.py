"""The second pass over a part: what was decided over the whole corpus is applied to its text, which becomes tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import parts
from data_pipeline.decisions import PartDecisions
from data_pipeline.parts import PartRecord
from data_pipeline.settings import Settings
from data_pipeline.tally import Tally
from data_pipeline.tasks import Advance, Report
from data_pipeline.token_parts import TokenWriter
from data_pipeline.tokenization import EngineMismatch, Tokenizer, train_tokenizer


@dataclass(frozen=True)
class FinishTask:
    """Makes `folder` the tokens of a part of text, unless it is that already."""

    place: str
    """Of the split, for a person."""
    text_part: Path
    decisions: Path
    settings: Settings
    tokenizer: Path
    engine: str
    made_by: str
    """Fingerprint of the text, the decisions and the tokenizer."""
    folder: Path

    @property
    def name(self) -> str:
        return self.place

    def run(self, report: Report) -> PartRecord:
        record = parts.find_part(self.folder, self.made_by)
        if record is not None:
            report(Advance(record.text_bytes, record.documents, sum(p.tokens for p in record.portions.values())))
            return record
        try:
            return self._make(report)
        except EngineMismatch as mismatch:
            return replace(self, engine="reference")._make(report, str(mismatch))

    def _make(self, report: Report, *notes: str) -> PartRecord:
        tally, num_bytes, num_documents = Tally(), 0, 0
        with parts.new_part(self.folder) as temporary:
            tokens = TokenWriter(temporary, Tokenizer.load(self.tokenizer, self.engine))
            for texts, heldout in final_texts(self.text_part, self.decisions, self.settings, tally):
                sizes = np.array([len(text.encode()) for text in texts], np.int64)
                tokens.add(texts, sizes, heldout)
                num_bytes += int(sizes.sum())
                num_documents += len(texts)
                report(Advance(num_bytes, num_documents, tokens.num_tokens))
            portions = tokens.finish()
            record = PartRecord(
                made_by=self.made_by,
                content_hash="",
                modified_ns=None,
                documents=num_documents,
                text_bytes=num_bytes,
                portions=portions,
                tally=tally,
                notes=list(notes),
                files=parts.records_of(temporary),
            )
            parts.commit_part(temporary, self.folder, record)
        return record


@dataclass(frozen=True)
class TrainTokenizerTask:
    """Trains the tokenizer on what the parts hold for training, or on a share of it drawn by content."""

    text_parts: tuple[tuple[Path, Path], ...]
    """Parts, each with its decisions."""
    share: float
    """Of the documents."""
    settings: Settings
    folder: Path

    @property
    def name(self) -> str:
        return "the tokenizer"

    def run(self, report: Report) -> None:
        """Raises:
        UserError: the vocabulary cannot have as many tokens as the model.
        """
        settings = self.settings
        train_tokenizer(
            self._texts(report), settings.data.tokenizer, settings.vocab_size, self.folder, settings.seq_length
        )

    def _texts(self, report: Report) -> Iterator[str]:
        done = Advance()
        for part, decisions in self.text_parts:
            for texts, heldout in final_texts(part, decisions, self.settings, Tally(), self.share):
                chosen = [text for text, is_heldout in zip(texts, heldout, strict=True) if not is_heldout]
                yield from chosen
                done += Advance(sum(map(len, chosen)), len(chosen))
                report(done)


def final_texts(
    text_part: Path, decisions: Path, settings: Settings, tally: Tally, share: float = 1.0
) -> Iterator[tuple[list[str], NDArray[np.bool_]]]:
    """Batches of texts as they are trained on, with which of them are held out.

    What is left out or cut is counted in `tally`. With a share below 1, so many of the documents, drawn by content.
    """
    rows = parts.read_documents(text_part)
    is_heldout = parts.is_heldout(rows, settings.data.heldout_fraction)
    is_drawn = rows["digest_low"] <= np.uint64(int(share * (2**64 - 2**12)))
    decided = PartDecisions.read(decisions, text_part, settings.data)
    first = 0
    for batch in parts.read_texts(text_part):
        texts: list[str] = []
        heldout: list[bool] = []
        for number, text in enumerate(batch, start=first):
            if is_drawn[number]:
                final = decided.apply(number, text, tally)
                texts += final
                heldout += [bool(is_heldout[number])] * len(final)
        first += len(batch)
        yield texts, np.array(heldout, bool)
