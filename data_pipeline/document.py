"""The record that every step of the pipeline takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.tally import Tally


@dataclass(frozen=True, slots=True)
class Document:
    """One text, packed with others into training sequences and ended by the end-of-text token."""

    id: str
    """Where the text was found, the same in every run: `corpus/a.txt`, `b.jsonl@1728` (a byte), `crawl.wet@7093`."""
    text: str


Step = Callable[[list[Document], Tally], list[Document]]
"""One step of cleaning: takes about a megabyte of documents at a time, gives those that it keeps (changed or not), in
order, and counts every other one in the tally by a reason."""
