"""Counts of everything the pipeline dropped or repaired: a named reason, how often, and where it happened first."""

from dataclasses import dataclass, field

DROP_REASONS: dict[str, str] = {
    # reading
    "unreadable": "the file could not be opened or read on",
    "undecodable": "the file is not UTF-8 text",
    "empty_file": "the file holds nothing",
    "truncated": "a compressed file or archive ends, or is damaged, in the middle; counted once a gap",
    "decompression_bomb": "the file expands beyond 1 GB and 100 times its size; what follows is not read",
    "bad_record": "a record of an archive or table cannot be read",
    "not_text": "the record of an archive is neither HTML nor plain text",
    "bad_json": "the line is not a JSON object",
    "missing_field": "the record has no field of the name `text_field`",
    "field_not_text": "that field is not a string",
    "too_long": "the text is longer than `data.max_document_bytes`",
    # cleaning
    "empty_text": "the text is empty, or white space only",
    "language": "none of the languages to keep is probable enough",
    # the whole corpus
    "duplicate": "an earlier document has exactly this text",
    "near_duplicate": "an earlier document has nearly this text",
    "repeated_paragraphs": "every paragraph of the text stood in earlier documents",
    "contaminated": "overlaps with evaluation texts, and what is left between them is too little or too broken",
}
"""Why a document is not in the shards -> what that means; counted in documents (files, lines, records)."""

REPAIR_REASONS: dict[str, str] = {
    "broken_utf8": "bytes that are not UTF-8, replaced by U+FFFD (counted in sequences of bytes)",
    "lone_surrogates": "halves of surrogate pairs, joined or replaced by U+FFFD (counted in documents)",
    "not_nfc": "text brought to Unicode's composed form (counted in documents)",
    "control_characters": "control characters taken out (counted in characters)",
    "control_token": "the tokenizer's control tokens spelled out in the text, made harmless (counted in occurrences)",
    "repeated_paragraph": "paragraphs taken out because an earlier document has them (counted in paragraphs)",
    "contaminated_span": "overlaps with evaluation texts that were cut out (counted in spans)",
}
"""What was mended in the text that was read -> what that means."""

KEPT_PLACES = 20  # enough to find the cause; a corpus may hold millions of bad lines
KEPT_TEXTS = 5  # of dropped documents, for a person to judge the reason by
KEPT_CHARS = 2000


@dataclass
class Count:
    """How often something happened, and its first places (document ids: file, and line in a .jsonl)."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, count: int = 1) -> None:
        self.count += count
        if len(self.places) < KEPT_PLACES:
            self.places.append(place)

    def merge(self, other: "Count") -> None:
        self.count += other.count
        self.places = (self.places + other.places)[:KEPT_PLACES]

    def __str__(self) -> str:
        return f"{self.count} (first at {self.places[0]})"


@dataclass
class Tally:
    """Drops and repairs of one pass over some text."""

    dropped: dict[str, Count] = field(default_factory=dict)
    repaired: dict[str, Count] = field(default_factory=dict)
    samples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """By drop reason, the first few documents: (id, beginning of the text)."""

    def drop(self, reason: str, place: str, text: str = "") -> None:
        """Count a document that is left out; its text, where there is any, may be kept as a sample."""
        assert reason in DROP_REASONS, reason
        self.dropped.setdefault(reason, Count()).add(place)
        kept = self.samples.setdefault(reason, [])
        if text and len(kept) < KEPT_TEXTS:
            kept.append((place, text[:KEPT_CHARS]))

    def repair(self, reason: str, place: str, count: int = 1) -> None:
        assert reason in REPAIR_REASONS, reason
        self.repaired.setdefault(reason, Count()).add(place, count)

    def merge(self, other: "Tally") -> None:
        """Add what came later."""
        for mine, theirs in ((self.dropped, other.dropped), (self.repaired, other.repaired)):
            for reason, count in theirs.items():
                mine.setdefault(reason, Count()).merge(count)
        for reason, texts in other.samples.items():
            self.samples[reason] = (self.samples.get(reason, []) + texts)[:KEPT_TEXTS]

    def __str__(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items())) or "nothing dropped"
