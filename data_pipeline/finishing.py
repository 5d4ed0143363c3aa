"""The second pass over a part: what was decided over the whole corpus is applied to its text, which becomes tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import parts
from data_pipeline.decisions import PartDecisions
from data_pipeline.parts import PartRecord
from data_pipeline.settings import Settings
from data_pipeline.tally import Tally
from data_pipeline.tasks import Advance, Report
from data_pipeline.token_parts import TokenWriter, encoded_part
from data_pipeline.tokenization import Engine, SplitEncoder, Tokenizer, train_tokenizer


@dataclass(frozen=True)
class DecidedText:
    """A part of text and where to read what becomes of it."""

    part: Path
    number: int
    """Of the part, in the order of the corpus."""
    decisions: Path
    evaluation: Path | None
    settings: Settings

    def final_texts(self, tally: Tally, share: float = 1.0) -> Iterator[tuple[list[str], NDArray[np.bool_]]]:
        """Batches of texts as they are trained on, with which of them are held out.

        What is left out or cut is counted in `tally`. With a share below 1, so many of the documents, drawn by content.
        """
        data = self.settings.data
        rows = parts.read_documents(self.part)
        is_heldout = parts.is_heldout(rows, data.heldout_fraction)
        is_drawn = rows["digest_low"] < np.uint64(int(share * 2**64)) if share < 1.0 else np.ones(len(rows), bool)
        decided = PartDecisions.read(self.decisions, self.number, self.part, data, self.evaluation)
        first = 0
        for batch in parts.read_texts(self.part):
            texts: list[str] = []
            heldout: list[bool] = []
            for number, text in enumerate(batch, start=first):
                if is_drawn[number]:
                    final = decided.apply(number, text, tally)
                    texts += final
                    heldout += [bool(is_heldout[number])] * len(final)
            first += len(batch)
            if texts:
                yield texts, np.array(heldout)


@dataclass(frozen=True)
class FinishTask:
    """Makes `folder` the tokens of a part of text, unless it is that already."""

    name: str
    """Of the split, for a person."""
    text: DecidedText
    tokenizer: Path
    engine: Engine
    made_by: str
    """Fingerprint of the text, the decisions and the tokenizer."""
    folder: Path

    def run(self, report: Report) -> PartRecord:
        record = parts.find_part(self.folder, self.made_by)
        if record is not None:
            report(Advance(record.text_bytes, record.documents, record.num_tokens))
            return record
        tokenizer = Tokenizer.load(self.tokenizer, self.engine)
        with parts.new_part(self.folder) as temporary:
            record = encoded_part(tokenizer, self.made_by, lambda encoder: self._fill(temporary, encoder, report))
            parts.commit_part(temporary, self.folder, record)
        return record

    def _fill(self, folder: Path, encoder: SplitEncoder, report: Report) -> PartRecord:
        tally, num_bytes, num_documents = Tally(), 0, 0
        tokens = TokenWriter(folder, encoder)
        for texts, heldout in self.text.final_texts(tally):
            sizes = np.array([len(text.encode()) for text in texts], np.int64)
            tokens.add(texts, sizes, heldout)
            num_bytes += int(sizes.sum())
            num_documents += len(texts)
            report(Advance(num_bytes, num_documents, tokens.num_tokens))
        return PartRecord(
            made_by=self.made_by,
            documents=num_documents,
            text_bytes=num_bytes,
            portions=tokens.finish(),
            tally=tally,
            files=parts.records_of(folder),
        )


@dataclass(frozen=True)
class TrainTokenizerTask:
    """Trains the tokenizer on what the parts hold for training, or on a share of it drawn by content."""

    texts: tuple[DecidedText, ...]
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
        for part in self.texts:
            for texts, heldout in part.final_texts(Tally(), self.share):
                chosen = [text for text, is_heldout in zip(texts, heldout, strict=True) if not is_heldout]
                yield from chosen
                done += Advance(sum(map(len, chosen)), len(chosen))
                report(done)
