import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.decontamination import (
    OVERLAP,
    EvaluationNgrams,
    common_ngrams,
    cut,
    read_evaluation,
    spans_by_document,
)
from data_pipeline.dedup import Verdict
from data_pipeline.words import WordTable
from trainer.config import UserError
from trainer.data_config import DecontaminateConfig

ENGLISH = "the model reads a token and writes another while gradients flow back through every layer of it"
KOREAN = "모델은 토큰을 읽고 다음 토큰을 예측하며 손실의 기울기는 모든 층을 거슬러 흐른다 그리고 다시 배운다"
ACCENTED = "Höhe naïve café élève über ÅNGSTRÖM señor coração"
ALL = f"{ENGLISH} {KOREAN} {ACCENTED}"


def made_up_text(seed: int, num_words: int, vocabulary: str = ALL) -> str:
    draw = random.Random(seed)
    words = (draw.choice(vocabulary.split()) + str(draw.randrange(9)) for _ in range(num_words))
    return " ".join(word + draw.choice(["", "", ",", ".", "!\n", " —", " 🙂"]) for word in words)


def words_at(text: str) -> list[tuple[str, int, int]]:
    return [(match[0].lower(), match.start(), match.end()) for match in re.finditer(r"[^\W_]+", text)]


def reference_overlaps(texts: Sequence[str], evaluation: Sequence[str], n: int) -> list[tuple[int, int, int]]:
    grams = set()
    for text in evaluation:
        words = [word for word, _, _ in words_at(text)]
        grams |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    found = []
    for document, text in enumerate(texts):
        words = words_at(text)
        for i in range(len(words) - n + 1):
            if tuple(word for word, _, _ in words[i : i + n]) in grams:
                found.append((document, words[i][1], words[i + n - 1][2]))
    return found


def reference_cut(text: str, spans: Sequence[tuple[int, int]], config: DecontaminateConfig) -> tuple[list[str], int]:
    """A character at a time."""
    stays = [True] * len(text)
    for first, end in spans:
        for at in range(max(0, first - config.window_chars), min(len(text), end + config.window_chars)):
            stays[at] = False
    marked = "".join(c if stay else "\0" for c, stay in zip(text, stays, strict=True))
    pieces = [piece.strip() for piece in marked.split("\0") if piece.strip()]
    kept = [] if len(pieces) > config.max_pieces else [p for p in pieces if len(p) >= config.min_piece_chars]
    return kept, len(re.findall("\0+", marked))


def evaluation_file(folder: Path, texts: Sequence[str]) -> DecontaminateConfig:
    (folder / "test.jsonl").write_bytes(b"".join(orjson.dumps({"question": text}) + b"\n" for text in texts))
    return DecontaminateConfig(against=(str(folder / "test.jsonl"),))


def places(overlaps: np.ndarray) -> list[tuple[int, int, int]]:
    return [(document, first, end) for document, first, end, _ in overlaps.tolist()]


def test_planted_overlaps_are_found_where_they_are(tmp_path: Path) -> None:
    evaluation = [made_up_text(seed, 40, vocabulary) for seed, vocabulary in enumerate([ENGLISH, KOREAN, ACCENTED] * 4)]
    config = evaluation_file(tmp_path, evaluation)
    texts = [made_up_text(1000 + seed, 300) for seed in range(40)]
    for number in range(33):
        question = evaluation[number % len(evaluation)].split()
        passage = " ".join(question[number % 5 : number % 5 + 20]).upper().replace(" ", "\n-- ")
        words = texts[number].split()
        at = (0, len(words), random.Random(number).randrange(len(words)))[
            number // 3 % 3
        ]  # at the start, the end, between
        texts[number] = " ".join([*words[:at], passage, *words[at:]])
    texts += ["", "zu kurz"]
    expected = reference_overlaps(texts, evaluation, config.ngram)
    found = read_evaluation(config).overlaps(texts)
    assert places(found) == expected
    assert {document for document, _, _ in expected} == set(range(33))
    assert places(read_evaluation(config).overlaps(texts, WordTable.of(texts))) == expected


@given(st.lists(st.text("ab é한.", max_size=40), max_size=5), st.lists(st.text("ab é한.", max_size=40), max_size=5))
def test_overlaps_are_those_of_the_definition(texts: list[str], evaluation: list[str]) -> None:
    hashes = np.unique(WordTable.of(evaluation).ngrams(2)[0])
    found = EvaluationNgrams(hashes, ngram=2, num_strings=0, num_short=0).overlaps(texts)
    assert places(found) == reference_overlaps(texts, evaluation, 2)


def test_ngrams_past_the_filter_are_still_compared() -> None:
    """Neighbours of n-grams share their top bits."""
    draw = np.random.default_rng(0)
    hashes = np.unique(draw.integers(0, 2**64, 200_000, np.uint64))
    ngrams = EvaluationNgrams(hashes, 13, 0, 0)
    probes = np.concatenate([hashes[::7], hashes[::7] + np.uint64(1), draw.integers(0, 2**64, 50_000, np.uint64)])
    assert ngrams._find(probes).tolist() == np.flatnonzero(np.isin(probes, hashes)).tolist()


def test_what_is_cut() -> None:
    draw, text, sizes = random.Random(6), made_up_text(5, 200)[:300], set()
    for _ in range(500):
        config = DecontaminateConfig(
            window_chars=draw.choice([0, 1, 15]),
            min_piece_chars=draw.choice([0, 5, 20]),
            max_pieces=draw.choice([1, 3, 10]),
        )
        firsts = [draw.randrange(300) for _ in range(draw.randint(0, 14))]
        spans = [(first, min(300, first + draw.randint(1, 60))) for first in firsts]
        expected = reference_cut(text, spans, config)
        assert cut(text, spans, config) == expected
        sizes.add(len(expected[0]))
    assert len(sizes) > 5


def test_windows_that_overlap_are_one_cut() -> None:
    config = DecontaminateConfig()
    text = "a" * 1000 + "b" * 13 + "c" * 300 + "d" * 13 + "e" * 1000
    near = [(1000, 1013), (1313, 1326)]
    assert cut(text, near, config) == (["a" * 800, "e" * 800], 1)
    assert cut(text, near, config.model_copy(update={"window_chars": 100})) == (["a" * 900, "e" * 900], 2)
    assert cut(text, [(0, 20)], config) == ([text[220:]], 1)
    assert cut("short and contaminated", [(0, 5)], config) == ([], 1)
    assert cut(text, [], config) == ([text], 0)


def test_a_document_in_more_than_ten_pieces_goes() -> None:
    config = DecontaminateConfig()
    for num_cuts, num_left in ((9, 10), (10, 0)):
        text = "x" * 1000 + ("y" * 13 + "x" * 1000) * num_cuts
        spans = [(1000 + 1013 * i, 1013 + 1013 * i) for i in range(num_cuts)]
        pieces, cuts = cut(text, spans, config)
        assert (len(pieces), cuts) == (num_left, num_cuts)


def test_ngrams_of_more_than_ten_kept_documents_are_common_phrases() -> None:
    draw = random.Random(11)
    parts, verdicts, documents = [], [], Counter[int]()
    for _ in range(5):
        records = sorted({(draw.randrange(12), at, at + 9, draw.randrange(60)) for at in range(150)})
        parts.append(np.array(records, OVERLAP))
        verdicts.append(np.array([draw.choice([0, 0, 0, 1, 2]) for _ in range(12)], np.uint8))
        kept = {(d, ngram) for d, _, _, ngram in records if verdicts[-1][d] == Verdict.KEEP}
        documents.update(ngram for _, ngram in kept)
    expected = sorted(ngram for ngram, count in documents.items() if count > 10)
    assert 10 in documents.values() and 11 in documents.values(), "the limit itself is tried"
    common = common_ngrams(parts, verdicts, 10)
    assert common.tolist() == expected
    spans = spans_by_document(parts[0], common)
    rare = [(d, first, end) for d, first, end, ngram in parts[0].tolist() if ngram not in expected]
    assert [(d, *span) for d, mine in spans.items() for span in mine] == rare


def test_a_common_phrase_stays_and_a_rare_one_goes(tmp_path: Path) -> None:
    phrase, question = made_up_text(1, 20, ENGLISH), made_up_text(2, 20, KOREAN)
    config = evaluation_file(tmp_path, [phrase, question]).model_copy(update={"window_chars": 0, "min_piece_chars": 20})
    texts = [f"{made_up_text(100 + i, 30)} {phrase} {made_up_text(200 + i, 30)}" for i in range(11)]
    texts[4] += " " + question
    ngrams = read_evaluation(config)
    overlaps = ngrams.overlaps(texts)
    common = common_ngrams([overlaps], [np.zeros(11, np.uint8)], config.max_documents)
    spans = spans_by_document(overlaps, common)
    assert list(spans) == [4]
    (left,), num_cuts = cut(texts[4], spans[4], config)
    assert num_cuts == 1 and phrase in left and not reference_overlaps([left], [question], 13)
    assert places(ngrams.without(common).overlaps(texts)) == [(4, *span) for span in spans[4]]
    one_is_dropped = np.array([0] * 10 + [Verdict.DUPLICATE], np.uint8)
    assert not len(common_ngrams([overlaps], [one_is_dropped], config.max_documents))


def test_evaluation_texts_come_from_files_folders_and_globs(tmp_path: Path) -> None:
    records = [
        {"question": "a b c d", "choices": ["e f g", {"deep": "h i j k"}], "id": 7, "none": None},
        {"question": "l m n", "other": "o p q"},
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.jsonl").write_bytes(b"\n".join(map(orjson.dumps, records)) + b"\n\n")
    (tmp_path / "two.txt").write_text("\ufeffr s t\nu v", encoding="utf-8")
    (tmp_path / "ignored.md").write_text("w x y z")

    def grams(*texts: str) -> list[int]:
        return np.unique(WordTable.of(texts).ngrams(3)[0]).tolist()

    everything = ("a b c d", "e f g", "h i j k", "l m n", "o p q", "r s t u v")
    questions = ("a b c d", "l m n")
    for against, fields, expected in (
        ((str(tmp_path),), None, everything),
        ((f"{tmp_path}/**/*",), None, everything),
        ((f"{tmp_path}/*.txt", f"{tmp_path}/sub"), None, everything),
        ((f"{tmp_path}/sub/one.jsonl",), ("question",), questions),
        ((f"{tmp_path}/sub/*.jsonl",), ("question", "choices"), (*questions, "e f g", "h i j k")),
    ):
        ngrams = read_evaluation(DecontaminateConfig(against=against, fields=fields, ngram=3))
        assert ngrams.hashes.tolist() == grams(*expected)
        assert (ngrams.num_strings, ngrams.num_short) == (len(expected), 0)


def test_evaluation_texts_are_compared_in_composed_form(tmp_path: Path) -> None:
    text = made_up_text(3, 30, ACCENTED)
    ngrams = read_evaluation(evaluation_file(tmp_path, [unicodedata.normalize("NFD", text)]))
    assert len(ngrams.overlaps([unicodedata.normalize("NFC", text)])) == 30 - 12


def test_short_strings_are_counted(tmp_path: Path) -> None:
    ngrams = read_evaluation(evaluation_file(tmp_path, [made_up_text(1, 13, ENGLISH), "yes", "", made_up_text(2, 12)]))
    assert (ngrams.num_strings, ngrams.num_short, len(ngrams.hashes)) == (4, 3, 1)


def test_evaluation_ngrams_survive_a_file(tmp_path: Path) -> None:
    ngrams = read_evaluation(evaluation_file(tmp_path, [made_up_text(1, 400), "short"]))
    ngrams.save(tmp_path / "ngrams.npy")
    loaded = EvaluationNgrams.load(tmp_path / "ngrams.npy")
    assert (loaded.ngram, loaded.num_strings, loaded.num_short) == (13, 2, 1)
    np.testing.assert_array_equal(loaded.hashes, ngrams.hashes)
    assert loaded.fingerprint == ngrams.fingerprint
    assert loaded.fingerprint != loaded.without(loaded.hashes[:1]).fingerprint
    again = read_evaluation(evaluation_file(tmp_path, ["short", made_up_text(1, 400)]))
    assert again.fingerprint == ngrams.fingerprint


@pytest.mark.parametrize(
    ("content", "changes", "expected"),
    [
        (b'{"question": "a b"}\n{broken\n', {}, "test.jsonl:2 is not JSON"),
        (b'{"answer": "a b"}\n', {"fields": ("question",)}, "test.jsonl:1 has none of question"),
        (b'["a b"]\n', {"fields": ("question",)}, "test.jsonl:1 has none of question"),
        (b'{"question": "too short"}\n', {}, "none of 1 strings has 13 words"),
        (b"", {"against": ("/nowhere/*.jsonl",)}, "names no .jsonl or .txt file"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, content: bytes, changes: dict[str, object], expected: str) -> None:
    config = evaluation_file(tmp_path, []).model_copy(update=changes)
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(expected)):
        read_evaluation(config)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"test\.txt is not UTF-8"):
        read_evaluation(DecontaminateConfig(against=(str(tmp_path),)))
