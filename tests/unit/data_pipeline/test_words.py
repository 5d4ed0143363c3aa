import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.words import WordTable

AWKWARD = (
    "aZ09 _-.,;:'\"!?\n\t\0éÉßẞİıΣσςΟΔΑЖжÅ½²ª×÷٣،؟·ǅⅨȺⱥ"  # noqa: RUF001
    "\N{KELVIN SIGN}\N{NO-BREAK SPACE}\N{EM DASH}\u2019\u200d\u0301\u0940\ufe0f\N{GRINNING FACE}"
    "한국어かなカー漢字々、。！？：；～｛「」\U00020000\U0002fa1d\U0001e943\U000e0101\U0010ffff"  # noqa: RUF001
)
TEXTS = st.lists(st.one_of(st.text(AWKWARD), st.text(st.characters(exclude_categories=["Cs"]))), max_size=6)


def words_of(text: str) -> list[tuple[str, int, int]]:
    """The words by the definition, a character at a time: (as they were written, first byte, byte behind)."""
    words: list[tuple[str, int, int]] = []
    place, joins = 0, False
    for character in text:
        category, size = unicodedata.category(character), len(character.encode())
        is_letter = category[0] in "LN" or (category in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f")
        is_letter = is_letter and ord(character) < 0x40000
        name = unicodedata.name(character, "")
        unspaced = is_letter and ("\u3000" <= character <= "\u9fff" or name.startswith("CJK COMPATIBILITY IDEO"))
        unspaced = unspaced or (is_letter and ord(character) >= 0x20000)
        if is_letter and joins and not unspaced:
            word, first, _ = words.pop()
            words.append((word + character, first, place + size))
        elif is_letter:
            words.append((character, place, place + size))
        joins = is_letter and not unspaced
        place += size
    return words


def lower(word: str) -> str:
    """Lower case without regard to the neighbours, of characters that keep their number of bytes."""
    lowered = ["σ" if c in "Σς" else c.lower() for c in word]  # noqa: RUF001
    return "".join(
        new if len(new.encode()) == len(old.encode()) else old for old, new in zip(word, lowered, strict=True)
    )


@given(TEXTS)
def test_words_are_those_of_the_definition(texts: list[str]) -> None:
    table = WordTable.of(texts)
    assert table.num_documents == len(texts)
    encoded = "".join(text + "\n" for text in texts).encode()
    seen: dict[str, int] = {}
    for document, text in enumerate(texts):
        expected = words_of(text)
        first_byte = table.first_bytes[document]
        assert encoded[first_byte : table.first_bytes[document + 1] - 1] == text.encode()
        slots = range(table.first_words[document], table.first_words[document + 1])
        found = [(int(table.starts[i] - first_byte), int(table.ends[i] - first_byte)) for i in slots]
        assert found == [(start, end) for _, start, end in expected]
        for slot, (word, _, _) in zip(slots, expected, strict=True):
            assert seen.setdefault(lower(word), int(table.hashes[slot])) == table.hashes[slot]
    assert len(set(seen.values())) == len(seen), "two words share a hash"
    assert table.first_words[-1] == len(table.hashes)


@given(TEXTS)
def test_a_document_has_the_same_words_alone_and_in_any_batch(texts: list[str]) -> None:
    together = WordTable.of(texts)
    for document, text in enumerate(texts):
        alone = WordTable.of([text])
        mine = slice(together.first_words[document], together.first_words[document + 1])
        np.testing.assert_array_equal(together.hashes[mine], alone.hashes)


@given(
    st.lists(st.text("ab é", max_size=30), max_size=6),
    st.integers(1, 9),
)
def test_ngrams_are_all_those_inside_a_document(texts: list[str], n: int) -> None:
    table = WordTable.of(texts)
    hashes, firsts = table.ngrams(n)
    expected, grams = [], []
    for document, text in enumerate(texts):
        words = [lower(word) for word, _, _ in words_of(text)]
        for i in range(len(words) - n + 1):
            expected.append(table.first_words[document] + i)
            grams.append(tuple(words[i : i + n]))
    assert firsts.tolist() == expected
    by_gram: dict[tuple[str, ...], int] = {}
    for gram, value in zip(grams, hashes.tolist(), strict=True):
        assert by_gram.setdefault(gram, value) == value
    assert len(set(by_gram.values())) == len(by_gram), "two n-grams share a hash"


def test_hashes_of_many_words_spread_and_differ() -> None:
    draw = random.Random(3)
    words = {"".join(draw.choices("abcdefghij0123", k=draw.randint(1, 90))) for _ in range(50_000)}
    hashes = WordTable.of([" ".join(sorted(words))]).hashes
    assert len(np.unique(hashes)) == len(words)
    ones = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.02


def test_order_and_repetition_matter_in_ngrams() -> None:
    grams = [tuple(WordTable.of([text]).ngrams(3)[0].tolist()) for text in ("a b c", "c b a", "a a b", "a b b")]
    assert len(set(grams)) == 4


def test_hashes_never_change() -> None:
    """Files of signatures and evaluation n-grams outlive the process that wrote them."""
    program = (
        "from data_pipeline.words import WordTable as W\n"
        "t = W.of(['The café, 한국어 漢', 'internationalization ' + 'x' * 100])\n"
        "print([hex(h) for h in t.hashes.tolist()], hex(int(t.ngrams(2)[0][0])))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    words = "c3650d0a4e099481 71a111f3711549a5 cfe4d10b71610b3e ad78f2746bf3c023 476a6860794f1d0c c90984ffdf50ce42"
    assert output.strip() == f"{[f'0x{word}' for word in words.split()]} 0x15f1470395513dae"


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        WordTable.of(["a", "\ud800"])


def test_no_documents_and_empty_documents() -> None:
    assert WordTable.of([]).num_documents == 0
    table = WordTable.of(["", " .", "a"])
    assert table.first_words.tolist() == [0, 0, 0, 1]
    assert table.ngrams(2)[0].shape == (0,)
