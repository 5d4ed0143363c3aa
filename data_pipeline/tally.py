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
    "language": "its most probable language is none to keep, or less probable than `data.language.keep` asks",
    # quality: C4 (Raffel et al. 2020, section 2.2)
    "c4_lorem_ipsum": "has the filler text `lorem ipsum`",
    "c4_curly_bracket": "has a `{`: source code, or a template",
    "c4_few_sentences": "fewer than 3 sentences in lines that end in punctuation and have 5 words or more",
    # quality: Gopher (Rae et al. 2021, appendix A.1.1)
    "gopher_word_count": "fewer than 50 words, or more than 100,000",
    "gopher_word_length": "words of fewer than 3 or more than 10 characters on average (alphabetic scripts only)",
    "gopher_hashes": "more than 0.1 hash signs a word",
    "gopher_ellipses": "more than 0.1 ellipses a word",
    "gopher_bullet_lines": "over 90 % of the lines begin with a bullet",
    "gopher_ellipsis_lines": "over 30 % of the lines end in an ellipsis",
    "gopher_no_letters": "fewer than 80 % of what stands between white space has a letter",
    "gopher_stop_words": "fewer than 2 of the, be, to, of, and, that, have, with (English only)",
    # quality: Gopher on repetition (the same, table A1)
    "gopher_repeated_lines": "over 30 % of the lines equal an earlier line",
    "gopher_repeated_paragraphs": "over 30 % of the paragraphs equal an earlier paragraph",
    "gopher_repeated_line_chars": "lines that equal an earlier line hold over 20 % of the characters",
    "gopher_repeated_paragraph_chars": "paragraphs that equal an earlier one hold over 20 % of the characters",
    "gopher_frequent_2grams": "the most frequent 2-gram holds over 20 % of the characters",
    "gopher_frequent_3grams": "the most frequent 3-gram holds over 18 % of the characters",
    "gopher_frequent_4grams": "the most frequent 4-gram holds over 16 % of the characters",
    "gopher_repeated_5grams": "5-grams that occurred earlier hold over 15 % of the characters",
    "gopher_repeated_6grams": "6-grams that occurred earlier hold over 14 % of the characters",
    "gopher_repeated_7grams": "7-grams that occurred earlier hold over 13 % of the characters",
    "gopher_repeated_8grams": "8-grams that occurred earlier hold over 12 % of the characters",
    "gopher_repeated_9grams": "9-grams that occurred earlier hold over 11 % of the characters",
    "gopher_repeated_10grams": "10-grams that occurred earlier hold over 10 % of the characters",
    # quality: GPT-3's classifier (Brown et al. 2020, appendix A)
    "low_quality": "a Pareto draw is not above 1 - the classifier's score",
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
    "boilerplate_lines": "lines about JavaScript, cookies and policies, cut by the rules of C4 (counted in lines)",
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
            # not clean yet, perhaps: halves of surrogate pairs cannot be written
            kept.append((place, text[:KEPT_CHARS].encode(errors="replace").decode()))

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
