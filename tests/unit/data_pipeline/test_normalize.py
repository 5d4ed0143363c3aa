import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.normalize import (
    END_OF_TEXT,
    decode_utf8,
    is_text,
    neutralize_control_token,
    normalize,
    repair_surrogates,
)

ANY_CHARACTER = st.characters(exclude_categories=())  # surrogates included
PIECES = st.sampled_from([END_OF_TEXT, "<|", "endoftext", "|>", "<", ">", "\u0338", "e\u0301", "\ud83d", "\ude42", " "])
ANY_TEXT = st.lists(PIECES | st.text(ANY_CHARACTER, max_size=8), max_size=12).map("".join)


@given(ANY_TEXT)
def test_normalized_text_is_valid_composed_and_free_of_the_control_token(text: str) -> None:
    clean, _ = normalize(text)
    clean.encode("utf-8")
    assert unicodedata.is_normalized("NFC", clean)
    assert END_OF_TEXT not in clean


@given(ANY_TEXT)
def test_normalizing_again_changes_and_counts_nothing(text: str) -> None:
    clean, _ = normalize(text)
    assert normalize(clean) == (clean, {})


@given(st.text(max_size=50))
def test_text_that_needs_no_repair_is_left_alone(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    if END_OF_TEXT not in composed:
        assert normalize(composed) == (composed, {})


@given(ANY_TEXT)
def test_surrogate_repair_agrees_with_a_character_by_character_reference(text: str) -> None:
    def joined(pair: re.Match[str]) -> str:
        high, low = pair[0][0], pair[0][1]
        return chr(0x10000 + ((ord(high) - 0xD800) << 10) + (ord(low) - 0xDC00))

    paired = re.sub("[\ud800-\udbff][\udc00-\udfff]", joined, text)
    assert repair_surrogates(text) == re.sub("[\ud800-\udfff]", "\ufffd", paired)


@pytest.mark.parametrize(
    ("text", "repairs"),
    [
        ("plain", {}),
        ("half \ud83d", {"lone_surrogates": 1}),
        ("e\u0301", {"not_nfc": 1}),
        (f"a{END_OF_TEXT}b{END_OF_TEXT}", {"control_token": 2}),
        (f"e\u0301{END_OF_TEXT}\ude00", {"lone_surrogates": 1, "not_nfc": 1, "control_token": 1}),
    ],
)
def test_repairs_are_named_and_counted(text: str, repairs: dict[str, int]) -> None:
    assert normalize(text)[1] == repairs


def test_a_token_cannot_reappear_from_nested_pieces() -> None:
    clean, count = neutralize_control_token("<|endof<|endoftext|>text|>")
    assert count == 1
    assert END_OF_TEXT not in clean


@given(st.text(max_size=100))
def test_valid_utf8_decodes_as_it_is(text: str) -> None:
    expected = text.removeprefix("\ufeff")  # a byte-order mark is no text
    assert decode_utf8(text.encode()) == (expected, 0)


@pytest.mark.parametrize(
    ("data", "text", "num_broken"),
    [
        (b"caf\xe9 au lait", "caf\ufffd au lait", 1),
        (b"\xffab\xfe", "\ufffdab\ufffd", 2),
        ("genuine \ufffd and ".encode() + b"\x80", "genuine \ufffd and \ufffd", 1),
    ],
)
def test_broken_utf8_is_replaced_and_counted(data: bytes, text: str, num_broken: int) -> None:
    assert decode_utf8(data) == (text, num_broken)


def test_damaged_text_is_text_and_other_encodings_are_not() -> None:
    damaged = ("long enough " * 50).encode() + b"\xff"
    assert is_text(*decode_utf8(damaged))
    assert not is_text(*decode_utf8(("Größe und Übermut " * 20).encode("latin-1")))
    assert not is_text(*decode_utf8("plain".encode("utf-16")))
    assert not is_text(*decode_utf8(b"\x7fELF\x00\x01"))
