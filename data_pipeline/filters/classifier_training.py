"""Trains the classifier of quality on texts that the user names good and texts that are not."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.filters.classifier import FEATURE_BITS, Classifier, Features
from data_pipeline.normalize import Normalizer
from data_pipeline.sources import UnreadableSplit, plan_splits, read_split
from data_pipeline.tally import Tally
from trainer.data_config import DataConfig, DatasetConfig
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
    left_out: dict[str, int] = field(default_factory=dict)
    """Records that could not be used, by reason (`data_pipeline.tally`)."""


def train_classifier(
    positives: Sequence[str], negatives: Sequence[str], out: Path, text_field: str = "text", seed: int = 0
) -> Report:
    """Train on text of any sources (see `data_pipeline.sources`) and write the classifier.

    Args:
        positives: what training data should be like.
        negatives: the raw corpus.
        out: file to write.
        text_field: of records and tables.
        seed: of the choice of held-out texts.

    Raises:
        UserError: a file cannot be used, or there are too few texts.
    """
    tally = Tally()
    good, raw = (
        _read_texts(kind, DatasetConfig(sources=tuple(sources), text_field=text_field), tally)
        for kind, sources in (("positives", positives), ("negatives", negatives))
    )
    try:
        classifier, report = fit(good, raw, seed)
    except UserError as error:
        raise UserError(f"{error} (left out while reading: {tally})") from error
    classifier.save(out)
    return replace(report, left_out={reason: count.count for reason, count in sorted(tally.dropped.items())})


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


def _read_texts(kind: str, dataset: DatasetConfig, tally: Tally) -> Iterator[str]:
    """Clean texts of the sources, as a corpus would be read; what cannot be used is counted and left out."""
    data = DataConfig(datasets={kind: dataset})
    normalizer = Normalizer(())
    for split in plan_splits(data).splits:
        try:
            for document in read_split(split, data.max_document_bytes, tally):
                yield from (clean.text for clean in normalizer([document], tally))
        except UnreadableSplit as error:
            raise UserError(f"train-classifier: {error}; mend the file, or leave it out") from error
