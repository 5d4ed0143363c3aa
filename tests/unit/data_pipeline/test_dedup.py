import random
import re
import tracemalloc
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dedup import (
    IndexWriter,
    Verdict,
    decide,
    index_files,
    read_removed_paragraphs,
    read_verdicts,
    remove_paragraphs,
)
from data_pipeline.dedup.clusters import Clusters
from data_pipeline.dedup.decide import WINDOW
from data_pipeline.dedup.minhash import band_keys, least_agreement, signatures
from data_pipeline.words import WordTable
from trainer.data_config import FUZZY_PRESETS, DedupConfig, FuzzyConfig

EVERYTHING = DedupConfig(fuzzy=FuzzyConfig(), paragraphs=True, min_paragraph_chars=30)
VOCABULARY = [f"{first}{second}" for first in "bdfgklmnprstvz" for second in ("a", "eno", "illi", "or", "uste", "yné")]


def made_up_words(draw: random.Random, num: int) -> list[str]:
    return draw.choices(VOCABULARY, k=num)


def edited(draw: random.Random, words: Sequence[str], num_edits: int) -> list[str]:
    changed = list(words)
    for _ in range(num_edits):
        changed[draw.randrange(len(changed))] = draw.choice(VOCABULARY)
    return changed


def made_up_corpus(seed: int) -> list[str]:
    """About 200 documents: distinct ones, copies, chains of near copies, short and empty ones, shared paragraphs."""
    draw = random.Random(seed)
    texts = ["", "", "one two", "One, two!", "...", "one two"]
    shared = [" ".join(made_up_words(draw, 12)) for _ in range(5)]
    for _ in range(40):
        words = made_up_words(draw, draw.randint(20, 300))
        texts.append(" ".join(words))
        texts += [texts[-1]] * draw.choice([0, 0, 0, 1, 3])
        for _ in range(draw.choice([0, 0, 1, 2, 6])):
            words = edited(draw, words, draw.choice([1, 1, 2, 5]))
            texts.append(" ".join(words))
    for _ in range(40):
        paragraphs = [" ".join(made_up_words(draw, draw.randint(1, 40))) for _ in range(4)] + draw.choices(shared, k=2)
        draw.shuffle(paragraphs)
        texts.append("\n\n".join(p.upper() if draw.random() < 0.2 else p for p in paragraphs))
    draw.shuffle(texts)
    return texts


def write_parts(folder: Path, texts: Sequence[str], sizes: Sequence[int], config: DedupConfig) -> list[Path]:
    """Indexes of consecutive parts of so many documents, fed in batches of various sizes."""
    assert sum(sizes) == len(texts)
    parts, first = [], 0
    for number, size in enumerate(sizes):
        parts.append(folder / f"part-{number}")
        parts[-1].mkdir(parents=True)
        writer = IndexWriter(parts[-1], config)
        for at in range(first, first + size, 7):
            batch = texts[at : min(at + 7, first + size)]
            writer.add(batch, [xxhash.xxh3_128_digest(text.encode()) for text in batch])
        writer.finish()
        assert sorted(path.name for path in parts[-1].iterdir()) == sorted(index_files(config))
        first += size
    return parts


def decisions(
    folder: Path, texts: Sequence[str], sizes: Sequence[int], config: DedupConfig, max_memory_bytes: int = 1 << 26
) -> tuple[list[int], dict[int, list[int]]]:
    """Of the whole corpus: verdicts, and document -> indices of the paragraphs it loses."""
    parts = write_parts(folder, texts, sizes, config)
    decide(parts, config, folder, max_memory_bytes=max_memory_bytes)
    verdicts: list[int] = []
    removed: dict[int, list[int]] = {}
    for part in range(len(parts)):
        if config.paragraphs:
            mine = read_removed_paragraphs(folder, part)
            removed |= {len(verdicts) + document: indices for document, indices in mine.items()}
        verdicts += read_verdicts(folder, part).tolist()
    return verdicts, removed


def reference(texts: Sequence[str], config: DedupConfig) -> tuple[list[int], dict[int, list[int]]]:
    """The same decisions, by looking at all pairs and one document at a time."""
    verdicts = [int(config.exact and text in texts[:number]) for number, text in enumerate(texts)]
    if config.fuzzy:
        alive = [number for number, verdict in enumerate(verdicts) if not verdict]
        for cluster in reference_clusters(texts, alive, config.fuzzy):
            for document in sorted(cluster)[1:]:
                verdicts[document] = Verdict.NEAR_DUPLICATE
    seen: set[str] = set()
    removed: dict[int, list[int]] = {}
    for document, text in enumerate(texts):
        for index, paragraph in enumerate(re.split(r"\n\s*\n", text) if verdicts[document] == Verdict.KEEP else []):
            plain = " ".join(paragraph.casefold().split())
            if config.paragraphs and len(plain) >= config.min_paragraph_chars:
                if plain in seen:
                    removed.setdefault(document, []).append(index)
                seen.add(plain)
    return verdicts, removed


def reference_clusters(texts: Sequence[str], alive: list[int], config: FuzzyConfig) -> list[set[int]]:
    rows = signatures(WordTable.of(texts), config).tolist()
    clusters = [{document} for document in alive]
    for left, right in combinations([document for document in alive if re.search(r"\w", texts[document])], 2):
        pairs = list(zip(rows[left], rows[right], strict=True))
        bands = [pairs[band * config.rows : (band + 1) * config.rows] for band in range(config.bands)]
        num_equal = sum(a == b for a, b in pairs)
        is_candidate = any(all(a == b for a, b in band) for band in bands)
        if is_candidate and num_equal >= least_agreement(config) * config.permutations:
            one = next(cluster for cluster in clusters if left in cluster)
            other = next(cluster for cluster in clusters if right in cluster)
            if one is not other:
                clusters.remove(other)
                one |= other
    return clusters


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def jaccard(left: str, right: str, n: int) -> float:
    one, other = shingles(left, n), shingles(right, n)
    return len(one & other) / len(one | other)


@pytest.mark.parametrize(
    "config",
    [
        EVERYTHING,
        DedupConfig(),
        DedupConfig(exact=False, fuzzy=FuzzyConfig(ngram=3, threshold=0.6)),
        DedupConfig(exact=False, paragraphs=True, min_paragraph_chars=1),
        DedupConfig(fuzzy=FuzzyConfig(**FUZZY_PRESETS["gpt3"])),
        DedupConfig(exact=False),
    ],
    ids=["everything", "exact", "fuzzy", "paragraphs", "gpt3", "nothing"],
)
def test_decisions_are_those_of_all_pairs(tmp_path: Path, config: DedupConfig) -> None:
    texts = made_up_corpus(seed=1)
    expected = reference(texts, config)
    found = decisions(tmp_path, texts, [70, 0, 1, 50, len(texts) - 121], config)
    assert found == expected
    if config == EVERYTHING:
        verdicts, removed = expected
        assert min(verdicts.count(verdict) for verdict in Verdict) > 20 and len(removed) > 10


@pytest.mark.parametrize(("max_memory_bytes", "num"), [(1, 20), (5_000, 150), (100_000, 150)])
def test_decisions_do_not_depend_on_the_memory_allowed(tmp_path: Path, max_memory_bytes: int, num: int) -> None:
    texts = made_up_corpus(seed=2)[:num] + ["the same text over and over again"] * num
    sizes = [num // 2, num, len(texts) - num // 2 - num]
    for name, config in {"all": EVERYTHING, "copies": DedupConfig(exact=False, fuzzy=FuzzyConfig())}.items():
        small = decisions(tmp_path / name / "small", texts, sizes, config, max_memory_bytes)
        assert small == decisions(tmp_path / name / "large", texts, sizes, config)


def test_memory_stays_within_what_is_allowed(tmp_path: Path) -> None:
    """The index holds 6 MB; a decision that is allowed 1 MB holds hardly more."""
    draw, config = random.Random(12), DedupConfig(fuzzy=FuzzyConfig(), paragraphs=True, min_paragraph_chars=10)
    texts = [" ".join(made_up_words(draw, 12)) for _ in range(5000)]
    texts += [f"{text} end" for text in texts[::2]] + texts[::4]
    parts = write_parts(tmp_path, texts, [3000, 3000, len(texts) - 6000], config)
    assert sum(path.stat().st_size for part in parts for path in part.iterdir()) > 6_000_000
    tracemalloc.start()
    decide(parts, config, tmp_path, max_memory_bytes=1_000_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_200_000


@pytest.mark.parametrize("sizes", [(1,) * 40, (40,), (0, 15, 0, 25, 0), (3, 37)], ids=["ones", "all", "empty", "two"])
def test_decisions_do_not_depend_on_how_the_corpus_is_cut(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    texts = made_up_corpus(seed=3)[:40]
    assert decisions(tmp_path, texts, sizes, EVERYTHING) == reference(texts, EVERYTHING)


def test_a_second_decision_gives_the_same_bytes_in_place_of_the_first(tmp_path: Path) -> None:
    texts = made_up_corpus(seed=4)
    parts = write_parts(tmp_path, texts, [100, len(texts) - 100], EVERYTHING)
    contents = []
    for max_memory_bytes in (10_000, 1 << 24):
        (tmp_path / "decisions.tmp" / "work").mkdir(parents=True, exist_ok=True)  # as a killed process leaves it
        decide(parts, EVERYTHING, tmp_path, max_memory_bytes=max_memory_bytes)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / "decisions").iterdir())})
    assert contents[0] == contents[1]
    assert not (tmp_path / "decisions.tmp").exists()


def test_an_index_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    texts = made_up_corpus(seed=5)
    digests = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
    (part,) = write_parts(tmp_path, texts, [len(texts)], EVERYTHING)
    whole = tmp_path / "whole"
    whole.mkdir()
    writer = IndexWriter(whole, EVERYTHING)
    writer.add(texts, digests, WordTable.of(texts))
    writer.finish()
    for name in index_files(EVERYTHING):
        assert (whole / name).read_bytes() == (part / name).read_bytes()


def test_clusters_are_the_connected_documents(tmp_path: Path) -> None:
    draw = random.Random(10)
    for trial in range(50):
        clusters, sets = Clusters(tmp_path / str(trial), 40), [{document} for document in range(40)]
        for _ in range(3):
            batch = [(draw.randrange(40), draw.randrange(40)) for _ in range(draw.randint(0, 15))]
            clusters.join(*np.array(batch, np.int64).reshape(-1, 2).T)
            for one, other in batch:
                sets = [s for s in sets if one not in s and other not in s] + [
                    set().union(*(s for s in sets if one in s or other in s))
                ]
            roots = clusters.roots(np.arange(40)).tolist()
            assert roots == [min(next(s for s in sets if document in s)) for document in range(40)]


def test_digests_are_compared_whole(tmp_path: Path) -> None:
    digests = [bytes(8) + bytes([0] * 7 + [last]) for last in (1, 2, 1)] + [bytes([last] + [0] * 15) for last in (3, 4)]
    config = DedupConfig(exact=True)
    writer = IndexWriter(tmp_path, config)
    writer.add(["a", "b", "c", "d", "e"], digests)
    writer.finish()
    decide([tmp_path], config, tmp_path)
    assert read_verdicts(tmp_path, 0).tolist() == [0, 0, Verdict.DUPLICATE, 0, 0]


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    texts = made_up_corpus(seed=6)
    parts = write_parts(tmp_path, texts, [len(texts)], EVERYTHING)
    calls: dict[str, list[tuple[int, int]]] = {}
    decide(
        parts,
        EVERYTHING,
        tmp_path,
        max_memory_bytes=5_000,
        progress=lambda stage, done, total: calls.setdefault(stage, []).append((done, total)),
    )
    assert list(calls) == ["exact", "fuzzy", "paragraphs"]
    for reports in calls.values():
        assert len(reports) > 3 and sorted(reports) == reports and reports[-1][0] == reports[-1][1]


def test_signatures_estimate_the_similarity_of_shingle_sets() -> None:
    draw, config = random.Random(7), FuzzyConfig(permutations=256)
    errors = []
    for _ in range(150):
        words = made_up_words(draw, draw.randint(2, 200))
        pair = [" ".join(words), " ".join(edited(draw, words, draw.randint(0, 20)))]
        rows = signatures(WordTable.of(pair), config)
        errors.append(np.mean(rows[0] == rows[1]) - jaccard(*pair, config.ngram))
    assert np.abs(np.mean(errors)) < 0.01
    assert np.std(errors) < (0.25 / config.permutations) ** 0.5


def test_planted_near_duplicates_are_found_and_different_documents_stay(tmp_path: Path) -> None:
    """Recall over pairs of any similarity from the threshold on, measured on the sets themselves."""
    draw, config = random.Random(8), DedupConfig(fuzzy=FuzzyConfig())
    originals, copies = [], []
    while len(copies) < 300:
        words = made_up_words(draw, draw.randint(40, 300))
        pair = " ".join(words), " ".join(edited(draw, words, draw.randint(1, 6)))
        if 0.8 <= jaccard(*pair, 5) < 1.0:
            originals.append(pair[0])
            copies.append(pair[1])
    verdicts, _ = decisions(tmp_path, originals + copies, [300, 300], config)
    assert not any(verdicts[:300])
    assert verdicts[300:].count(Verdict.NEAR_DUPLICATE) >= 0.99 * 300


def test_the_line_is_drawn_two_deviations_below_the_threshold() -> None:
    assert least_agreement(FuzzyConfig()) == pytest.approx(0.8 - 2 * (0.8 * 0.2 / 128) ** 0.5)
    assert least_agreement(FuzzyConfig(threshold=1.0)) == 1.0


def test_similar_documents_meet_among_very_many_of_the_same_key(tmp_path: Path) -> None:
    """All documents share the phrase that decides the only band, and a copy comes 400 documents behind its original."""
    draw, config = random.Random(9), FuzzyConfig(bands=1, rows=1)
    phrases = [" ".join(made_up_words(draw, config.ngram)) for _ in range(3000)]
    phrase = phrases[int(np.argmin(signatures(WordTable.of(phrases), config)[:, 0]))]
    originals = [" ".join([phrase, *made_up_words(draw, 30)]) for _ in range(400)]
    texts = originals + [f"{text} end" for text in originals]
    keys, _ = band_keys(signatures(WordTable.of(texts), config), config, 0)
    assert np.unique(keys, return_counts=True)[1].max() > 20 * WINDOW
    verdicts, _ = decisions(tmp_path, texts, [300, 500], DedupConfig(fuzzy=config), max_memory_bytes=20_000)
    assert not any(verdicts[:400])
    assert verdicts[400:].count(Verdict.NEAR_DUPLICATE) > 0.9 * 400


@given(
    st.lists(st.sampled_from(["a", "b c", " ", "\n", "\n\n", " \n \n", "\t"]), max_size=12), st.sets(st.integers(0, 6))
)
def test_removing_paragraphs_leaves_the_others_as_they_were(pieces: list[str], removed: set[int]) -> None:
    text = "".join(pieces)
    paragraphs = re.split(r"\n\s*\n", text)
    left = remove_paragraphs(text, removed)
    kept = [paragraph for index, paragraph in enumerate(paragraphs) if index not in removed]
    assert kept or left == ""
    assert left == text or len(kept) < len(paragraphs)
    if all(paragraph.strip() for paragraph in paragraphs):
        assert (re.split(r"\n\s*\n", left) if kept else []) == kept


def test_removing_paragraphs_keeps_their_own_blank_lines() -> None:
    text = "a\n\n\nb\n \nc\n\nd"
    assert remove_paragraphs(text, [0]) == "b\n \nc\n\nd"
    assert remove_paragraphs(text, {1, 3}) == "a\n \nc"
    assert remove_paragraphs(text, []) == text
    assert remove_paragraphs(text, range(4)) == ""


def test_no_parts_and_empty_parts(tmp_path: Path) -> None:
    decide([], EVERYTHING, tmp_path)
    assert list((tmp_path / "decisions").iterdir()) == []
    assert decisions(tmp_path, [], [0, 0], EVERYTHING) == ([], {})
