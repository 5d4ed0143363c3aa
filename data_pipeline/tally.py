"""Counts of everything the pipeline dropped or repaired: a named reason, how often, and where it happened first."""

from dataclasses import dataclass, field
from typing import Literal

DropReason = Literal[
    "unreadable", "undecodable", "bad_json", "missing_field", "field_not_text", "empty_text", "duplicate"
]
"""Why a document is not in the shards; counted in documents (files, or lines of a .jsonl).

unreadable      the file could not be opened
undecodable     the file is not UTF-8 text
bad_json        the line is not a JSON object
missing_field   the record has no field of the name `data.text_field`
field_not_text  that field is not a string
empty_text      the text is empty, or white space only
duplicate       an earlier document has exactly this text
"""

RepairReason = Literal["broken_utf8", "lone_surrogates", "not_nfc", "control_token"]
"""What was mended in the text that was read.

broken_utf8      bytes that are not UTF-8, replaced by U+FFFD (counted in sequences of bytes)
lone_surrogates  halves of surrogate pairs, joined or replaced by U+FFFD (counted in documents)
not_nfc          text brought to Unicode's composed form (counted in documents)
control_token    end-of-text tokens spelled out in the text, made harmless (counted in occurrences)
"""

KEPT_PLACES = 20  # enough to find the cause; a corpus may hold millions of bad lines


@dataclass
class Count:
    """How often something happened, and its first places (document ids: file, and line in a .jsonl)."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, count: int = 1) -> None:
        self.count += count
        if len(self.places) < KEPT_PLACES:
            self.places.append(place)

    def __str__(self) -> str:
        return f"{self.count} (first at {self.places[0]})"


@dataclass
class Tally:
    """Drops and repairs of one pass over the sources."""

    dropped: dict[str, Count] = field(default_factory=dict)
    repaired: dict[str, Count] = field(default_factory=dict)

    def drop(self, reason: DropReason, place: str) -> None:
        self.dropped.setdefault(reason, Count()).add(place)

    def repair(self, reason: RepairReason, place: str, count: int = 1) -> None:
        self.repaired.setdefault(reason, Count()).add(place, count)

    def __str__(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items())) or "nothing dropped"
