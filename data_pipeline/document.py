"""The record that every step of the pipeline takes and gives."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text, packed with others into training sequences and ended by the end-of-text token."""

    id: str
    """Where the text was found, the same in every run: `corpus/a.txt`, `b.jsonl:17`, `python-stdlib/source/ast.py`."""
    text: str
    source: str
    """The entry of `data.sources` that it came from."""
