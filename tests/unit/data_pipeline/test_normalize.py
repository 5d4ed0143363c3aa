import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.document import Document
from data_pipeline.normalize import (
    END_OF_TEXT,
    ControlTokens,
    Normalizer,
    decode_utf8,
    is_text,
    remove_controls,
    repair_surrogates,
)
from data_pipeline.tally import Tally
from trainer.config import UserError

NORMALIZER = Normalizer([END_OF_TEXT, "<s>", "</s>", "<unk>"])
ANY_CHARACTER = st.characters(exclude_categories=())  # surrogates included
TOKEN_PIECES = [END_OF_TEXT, "<|", "endoftext", "|>", "<", ">", "s", "/", "</s>", "<s>", " "]
CHARACTERS = ["\u0338", "e\u0301", "\ud83d", "\ude42", "\r", "\n", "\x00", "\x85", "\x7f", "\u200d", "\u1100", "\u1161"]
PIECES = st.sampled_from(TOKEN_PIECES + CHARACTERS)
ANY_TEXT = st.lists(PIECES | st.text(ANY_CHARACTER, max_size=8), max_size=12).map("".join)


@given(ANY_TEXT)
def test_normalized_text_is_valid_composed_and_free_of_controls(text: str) -> None:
    clean, _ = NORMALIZER.normalize(text)
    clean.encode("utf-8")
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(token in clean for token in (END_OF_TEXT, "<s>", "</s>", "<unk>"))
    assert {c for c in clean if unicodedata.category(c) == "Cc"} <= {"\t", "\n"}


@given(ANY_TEXT)
def test_normalizing_again_changes_and_counts_nothing(text: str) -> None:
    clean, _ = NORMALIZER.normalize(text)
    assert NORMALIZER.normalize(clean) == (clean, {})


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\t\n"), max_size=50))
def test_text_that_needs_no_repair_is_left_alone(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert NORMALIZER.normalize(composed) == (composed, {})


@given(ANY_TEXT)
def test_surrogate_repair_agrees_with_a_character_by_character_reference(text: str) -> None:
    def joined(pair: re.Match[str]) -> str:
        high, low = pair[0][0], pair[0][1]
        return chr(0x10000 + ((ord(high) - 0xD800) << 10) + (ord(low) - 0xDC00))

    paired = re.sub("[\ud800-\udbff][\udc00-\udfff]", joined, text)
    assert repair_surrogates(text) == re.sub("[\ud800-\udfff]", "\ufffd", paired)


@given(st.text(st.sampled_from("ab\t\n\r\v\f\x00\x1b\x7f\x80\x85\x9f\xa0é\u2028\u200d東\ufeff"), max_size=20))
def test_control_removal_agrees_with_unicode_categories(text: str) -> None:
    ended = text.replace("\r\n", "\n")
    for line_end in "\r\v\f\x85":
        ended = ended.replace(line_end, "\n")
    expected = "".join(c for c in ended if c in "\t\n" or unicodedata.category(c) != "Cc")
    assert remove_controls(text) == (expected, len(ended) - len(expected))


@pytest.mark.parametrize(
    ("text", "clean", "repairs"),
    [
        ("plain", "plain", {}),
        ("half \ud83d", "half \ufffd", {"lone_surrogates": 1}),
        ("e\u0301", "é", {"not_nfc": 1}),
        ("e\x00\u0301", "é", {"control_characters": 1, "not_nfc": 1}),
        (f"a{END_OF_TEXT}b<s>", "a< |endoftext|>b< s>", {"control_token": 2}),
        ("<\x07s>", "< s>", {"control_characters": 1, "control_token": 1}),
        ("one\r\ntwo\rthree\ffour", "one\ntwo\nthree\nfour", {}),
        ("क\u094d\u200dष 👩\u200d💻", "क\u094d\u200dष 👩\u200d💻", {}),
        ("\x1b[1mbold\x1b[0m \x80", "[1mbold[0m ", {"control_characters": 3}),
    ],
)
def test_repairs_are_named_and_counted(text: str, clean: str, repairs: dict[str, int]) -> None:
    assert NORMALIZER.normalize(text) == (clean, repairs)


FEW_LETTERS = st.text("ab ", min_size=2, max_size=5).filter(lambda token: len(token) > 1 and token == token.strip(" "))


@given(st.lists(FEW_LETTERS, max_size=4), st.text("ab ", max_size=30))
def test_no_token_survives_or_arises_however_tokens_overlap(tokens: list[str], text: str) -> None:
    clean, count = ControlTokens(tokens).neutralize(text)
    assert not any(token in clean for token in tokens)
    assert count == sum(any(text.startswith(token, at) for token in tokens) for at in range(len(text)))
    assert ControlTokens(tokens).neutralize(clean) == (clean, 0)
    assert clean.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("tokens", [["ab", "a b", "a  b"], ["ab", "ba"], ["<s>", "<s><s>"]])
def test_tokens_that_a_single_space_would_make_or_leave(tokens: list[str]) -> None:
    clean, _ = ControlTokens(tokens).neutralize("abab a b a  b <s><s><s>")
    assert not any(token in clean for token in tokens)


@pytest.mark.parametrize("token", ["", "x", " x", "ab "])
def test_a_token_that_no_space_breaks_is_refused(token: str) -> None:
    with pytest.raises(UserError, match="rename it"):
        Normalizer(["<s>", token])


def test_as_a_step_it_counts_repairs_and_drops_empty_texts() -> None:
    tally = Tally()
    texts = ["kept", "\x00\x00", " \n\u3000", "", "e\u0301<s>"]
    documents = [Document(f"{i}", text) for i, text in enumerate(texts)]
    assert NORMALIZER(documents, tally) == [Document("0", "kept"), Document("4", "é< s>")]
    assert {reason: (c.count, c.places) for reason, c in tally.dropped.items()} == {"empty_text": (3, ["1", "2", "3"])}
    assert {reason: c.count for reason, c in tally.repaired.items()} == {
        "control_characters": 2,
        "not_nfc": 1,
        "control_token": 1,
    }


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
