"""Trains the classifier of quality on texts that the user names good and texts that are not."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from data_pipeline.filters.classifier import FEATURE_BITS, Classifier, Features
from data_pipeline.normalize import decode_utf8
from trainer.section import UserError

LEAST_TEXTS = 50  # of each kind; fewer leave five to measure by
_HELDOUT_PERCENT = 10
_BATCH_TEXTS = 500
_INVERSE_PENALTY = 10.0  # hardly any: Spark's logistic regression, which the paper trained, has none unless asked to


@dataclass(frozen=True)
class Report:
    """How well the classifier tells held-out texts apart, which it has not seen."""

    num_positives: int
    """Texts trained on."""
    num_negatives: int
    num_heldout: int
    """Texts measured by, of both kinds."""
    accuracy: float
    """Fraction of held-out texts on the right side of a score of 0.5, both kinds weighing the same."""
    auc: float
    """Area under the ROC curve: how often a positive scores above a negative."""
    fingerprint: str


def train_classifier(
    positives: Sequence[str], negatives: Sequence[str], out: Path, text_field: str = "text", seed: int = 0
) -> Report:
    """Train on files and write the classifier.

    Args:
        positives: .jsonl files (a text a line) and others (a text a file, UTF-8): what training data should be like.
        negatives: the same: the raw corpus.
        out: file to write.
        text_field: of .jsonl records.
        seed: of the choice of held-out texts.

    Raises:
        UserError: a file cannot be used, or there are too few texts.
    """
    classifier, report = fit(_read_texts(positives, text_field), _read_texts(negatives, text_field), seed)
    classifier.save(out)
    return report


def fit(positive_texts: Iterable[str], negative_texts: Iterable[str], seed: int = 0) -> tuple[Classifier, Report]:
    """Logistic regression on nine texts in ten, measured by the tenth; which those are depends on the text alone.

    Both kinds weigh the same however many there are of each, so that 0.5 is where a text is as likely to be of one as
    of the other. Texts (valid Unicode) are read once; their features are held in memory, 12 bytes for every distinct
    word of a text.

    Raises:
        UserError: too few texts of a kind.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    train, heldout = _Examples(), _Examples()
    for name, texts, label in (("positive", positive_texts, True), ("negative", negative_texts, False)):
        _read_into(train, heldout, texts, label, seed)
        num_train, num_heldout = train.count(label), heldout.count(label)
        if num_train + num_heldout < LEAST_TEXTS or not num_train or not num_heldout:
            raise UserError(
                f"train-classifier: {num_train} {name} texts to train on and {num_heldout} to measure by; "
                f"give {LEAST_TEXTS} in all at least, different ones"
            )
    regression = LogisticRegression(C=_INVERSE_PENALTY, class_weight="balanced", max_iter=1000, tol=1e-6)
    matrix = train.matrix()
    seen = np.unique(matrix.indices)  # what no text has gets no weight
    regression.fit(matrix[:, seen], train.labels)
    weights = np.zeros(1 << FEATURE_BITS, np.float32)
    weights[seen] = regression.coef_[0]
    classifier = Classifier(weights, float(regression.intercept_[0]))
    labels, margins = np.array(heldout.labels), heldout.matrix() @ classifier.weights + classifier.bias
    is_right = (margins > 0) == labels
    report = Report(
        num_positives=train.count(True),
        num_negatives=train.count(False),
        num_heldout=len(labels),
        accuracy=float(is_right[labels].mean() + is_right[~labels].mean()) / 2,
        auc=float(roc_auc_score(labels, margins)),
        fingerprint=classifier.fingerprint,
    )
    return classifier, report


class _Examples:
    """Features and labels of texts, gathered batch by batch."""

    def __init__(self) -> None:
        self.labels: list[bool] = []
        self._rows: list[Any] = []

    def add(self, texts: list[str], label: bool) -> None:
        from scipy.sparse import csr_matrix

        features = Features.of(texts)
        entries = features.values, (features.document, features.indices)
        self._rows.append(csr_matrix(entries, (len(texts), 1 << FEATURE_BITS)))
        self.labels += [label] * len(texts)

    def count(self, label: bool) -> int:
        return self.labels.count(label)

    def matrix(self) -> Any:
        """[examples, 2^20], sparse"""
        from scipy.sparse import vstack

        return vstack(self._rows, format="csr")


def _read_into(train: _Examples, heldout: _Examples, texts: Iterable[str], label: bool, seed: int) -> None:
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, _BATCH_TEXTS)):
        is_heldout = [xxhash.xxh3_64_intdigest(text.encode(), seed) % 100 < _HELDOUT_PERCENT for text in batch]
        for examples, chosen in ((heldout, True), (train, False)):
            part = [text for text, held in zip(batch, is_heldout, strict=True) if held is chosen]
            if part:
                examples.add(part, label)


def _read_texts(paths: Sequence[str], text_field: str) -> Iterator[str]:
    for name in paths:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"train-classifier: {name} is no file; name .jsonl or text files")
        if path.suffix == ".jsonl":
            yield from _read_records(path, text_field)
        else:
            yield decode_utf8(path.read_bytes())[0]


def _read_records(path: Path, text_field: str) -> Iterator[str]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                record = None
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(
                    f"train-classifier: {path}:{number} is no JSON object with a text in {text_field!r}; "
                    f"mend the line or name another text_field"
                )
            yield text
