import math
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest
import xxhash
from scipy.stats import kstest
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from data_pipeline.document import Document
from data_pipeline.filters.classifier import Classifier, ClassifierFilter, Features, pareto_draws
from data_pipeline.filters.classifier_training import Report, fit, train_classifier
from data_pipeline.tally import Tally
from data_pipeline.words import WordTable
from trainer.config import UserError

COMMON = ["the", "a", "of", "to", "and", "in", "is", "that", "it", "was", "with", "as", "東京", "한국어", "naïve"]
GOOD = ["theorem", "history", "species", "river", "measured", "century", "evidence", "because", "although", "protein"]
BAD = ["click", "buy", "cheap", "login", "cart", "subscribe", "sale", "now", "free", "shipping"]


def made_up(seed: int, good: bool, num_words: int = 60) -> str:
    """Half common words, and of the others seven in ten of one kind."""
    draw = random.Random(seed)
    kinds = (GOOD, BAD) if good else (BAD, GOOD)
    return " ".join(
        draw.choice(COMMON) if draw.random() < 0.7 else draw.choice(kinds[draw.random() < 0.3])
        for _ in range(num_words)
    )


POSITIVES = [made_up(seed, True) for seed in range(400)]
NEGATIVES = [made_up(10_000 + seed, False) for seed in range(250)]


@pytest.fixture(scope="module")
def fitted() -> tuple[Classifier, Report]:
    return fit(POSITIVES, NEGATIVES, seed=1)


def hashed_counts(text: str) -> dict[str, float]:
    """Features word by word, as the docstring says."""
    counts = Counter(str(word % (1 << 20)) for word in WordTable.of([text]).hashes.tolist())
    norm = math.sqrt(sum(count * count for count in counts.values()))
    return {feature: count / norm for feature, count in counts.items()}


def test_features_are_normalised_counts_of_hashed_words() -> None:
    texts = ["the cat and the dog and the end", "", "naïve 東京 東京", "..."]
    features = Features.of(texts)
    found: list[dict[str, float]] = [{} for _ in texts]
    for document, index, value in zip(features.document, features.indices, features.values, strict=True):
        found[document][str(index)] = value
    assert found == [pytest.approx(hashed_counts(text), rel=1e-15) for text in texts]
    assert Features.of([""]).num_documents == 1
    assert Features.of([]).num_documents == 0


def test_scores_are_those_of_scikit_learns_own_model(fitted: tuple[Classifier, Report]) -> None:
    classifier, report = fitted
    labelled = [(text, True) for text in POSITIVES] + [(text, False) for text in NEGATIVES]
    held = [(t, label) for t, label in labelled if xxhash.xxh3_64_intdigest(t.encode(), 1) % 100 < 10]
    kept = [(t, label) for t, label in labelled if xxhash.xxh3_64_intdigest(t.encode(), 1) % 100 >= 10]
    regression = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000, tol=1e-6)
    reference = make_pipeline(DictVectorizer(), regression)
    reference.fit([hashed_counts(text) for text, _ in kept], [label for _, label in kept])
    texts, labels = [t for t, _ in held], np.array([label for _, label in held])
    probabilities = reference.predict_proba([hashed_counts(text) for text in texts])[:, 1]
    np.testing.assert_allclose(classifier.scores(texts), probabilities, atol=1e-5)
    assert report.num_heldout == len(held)
    assert report.num_positives + report.num_negatives == len(kept)
    assert report.auc == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-3)
    right = (probabilities > 0.5) == labels
    assert report.accuracy == pytest.approx((right[labels].mean() + right[~labels].mean()) / 2)
    assert report.auc > 0.9


def test_a_score_depends_on_the_text_alone(fitted: tuple[Classifier, Report]) -> None:
    classifier, _ = fitted
    together = classifier.scores([*POSITIVES[:20], "", *NEGATIVES[:20]])
    alone = [classifier.scores([text])[0] for text in [*POSITIVES[:20], "", *NEGATIVES[:20]]]
    assert together.tolist() == alone


def test_training_again_writes_the_same_bytes(fitted: tuple[Classifier, Report], tmp_path: Path) -> None:
    classifier, report = fitted
    again, report_again = fit(POSITIVES, NEGATIVES, seed=1)
    assert report_again == report
    for name, one in (("a", classifier), ("b", again)):
        one.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Classifier.load(tmp_path / "a")
    assert loaded.fingerprint == classifier.fingerprint == report.fingerprint
    assert loaded.scores(POSITIVES).tolist() == classifier.scores(POSITIVES).tolist()


def test_draws_follow_numpys_pareto_and_documents_stay_as_the_paper_has_it() -> None:
    alpha, num = 9.0, 40_000
    draws = pareto_draws([f"document {number}" for number in range(num)], alpha)
    theirs = np.random.default_rng(0).pareto(alpha, num)
    assert kstest(draws, theirs).pvalue > 0.01
    for score in (0.0, 0.3, 0.5, 0.9, 0.99):
        expected = (2 - score) ** -alpha
        for kept in ((draws > 1 - score).mean(), (theirs > 1 - score).mean()):
            assert abs(kept - expected) < 4 * np.sqrt(expected * (1 - expected) / num)


def test_the_filter_keeps_by_score_and_draw_whatever_the_order(fitted: tuple[Classifier, Report]) -> None:
    classifier, _ = fitted
    texts = [made_up(50_000 + seed, good=seed % 2 == 0) for seed in range(600)]
    documents = [Document(str(seed), text) for seed, text in enumerate(texts)]
    step, tally = ClassifierFilter(classifier, 3.0), Tally()
    kept = step(documents, tally)
    scores = {document.id: classifier.scores([document.text])[0] for document in documents}
    assert tally.dropped["low_quality"].count == len(documents) - len(kept)
    good = sum(int(document.id) % 2 == 0 for document in kept)
    assert good > 2 * (len(kept) - good) > 0  # some of the bad stay, as the paper wants
    expected = sum((2 - score) ** -3.0 for score in scores.values())
    assert abs(len(kept) - expected) < 4 * np.sqrt(expected)
    one_by_one = [document for document in reversed(documents) if step([document], Tally())]
    assert one_by_one[::-1] == kept
    assert step([], Tally()) == []


def test_training_reads_files(tmp_path: Path, fitted: tuple[Classifier, Report]) -> None:
    records = [orjson.dumps({"body": text}) for text in POSITIVES]
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(records))
    names = [tmp_path / f"{number}.txt" for number in range(len(NEGATIVES))]
    for name, text in zip(names, NEGATIVES, strict=True):
        name.write_text(text, encoding="utf-8")
    out = tmp_path / "new" / "classifier"
    report = train_classifier([str(tmp_path / "good.jsonl")], [str(name) for name in names], out, "body", seed=1)
    assert report == fitted[1]
    assert Classifier.load(out).fingerprint == report.fingerprint


@pytest.mark.parametrize(
    ("content", "text_field", "message"),
    [
        (b'{"text": "a"}\nnot json', "text", r"1 positive texts .*bad_json 1 .first at .*good.jsonl@14"),
        (b'{"text": 3}', "text", "0 positive texts .*field_not_text 1"),
        (b'{"text": "a"}', "body", "0 positive texts .*missing_field 1"),
        (b'{"text": "a"}', "text", "1 positive texts to train on and 0 to measure by; give 50"),
    ],
)
def test_unusable_training_files_are_refused(tmp_path: Path, content: bytes, text_field: str, message: str) -> None:
    path = tmp_path / "good.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        train_classifier([str(path)], [str(path)], tmp_path / "out", text_field)
    assert not (tmp_path / "out").exists()


def test_missing_and_damaged_classifiers_are_refused(fitted: tuple[Classifier, Report], tmp_path: Path) -> None:
    path = tmp_path / "classifier"
    with pytest.raises(UserError, match="is no file; write it again with"):
        Classifier.load(path)
    fitted[0].save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:1000], b"pickle", whole[: len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="write it again"):
            Classifier.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"words": "0"}, "words 0"),
        ({"bias": 9.0}, "does not match its own fingerprint"),
        ({"bias": None}, "damaged"),
    ],
)
def test_a_classifier_of_another_version_is_refused(
    fitted: tuple[Classifier, Report], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "classifier"
    fitted[0].save(path)
    with zipfile.ZipFile(path) as archive:
        header, weights = orjson.loads(archive.read("header.json")), archive.read("weights.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", orjson.dumps(header | change))
        archive.writestr("weights.npy", weights)
    with pytest.raises(UserError, match=message):
        Classifier.load(path)


def test_weights_that_would_unpickle_are_refused(fitted: tuple[Classifier, Report], tmp_path: Path) -> None:
    path = tmp_path / "classifier"
    fitted[0].save(path)
    with zipfile.ZipFile(path) as archive:
        header = archive.read("header.json")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", header)
        archive.writestr("weights.npy", (tmp_path / "objects.npy").read_bytes())
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        Classifier.load(path)


def test_scoring_needs_numpy_alone() -> None:
    code = "import sys, data_pipeline.filters.classifier; print({'sklearn', 'scipy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
