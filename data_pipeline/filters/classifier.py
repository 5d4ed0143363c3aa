"""GPT-3's filter of quality (Brown et al. 2020, appendix A): a linear classifier of words, and the Pareto rule.

Features are the words' hashes modulo 2^20, counted (the paper's Spark HashingTF) and divided by the document's norm
(L2), so that a long document is not surer of itself than a short one of the same words. The score is the probability
that logistic regression gives a document of being one of the positives. Scoring needs numpy alone.

Shapes: `d` documents, `f` pairs of a document and a feature that it has.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from data_pipeline.document import Document
from data_pipeline.durable import write_atomically
from data_pipeline.tally import Tally
from data_pipeline.words import Int64s, WordTable
from trainer.section import UserError

Floats = NDArray[np.float64]

FEATURE_BITS = 20
FORMAT_VERSION = 1
_DRAW_SEED = 0x9E3779B97F4A7C15  # of the Pareto draws; any but those of other hashes of the text
_PROBE = "The quick brown fox, 42 naïve 東京 한국어"
_HEADER_FILE, _WEIGHTS_FILE = "header.json", "weights.npy"
_OLDEST_DATE = (1980, 1, 1, 0, 0, 0)  # that a zip file can state, so that the same weights give the same bytes


@dataclass(frozen=True)
class Features:
    """A sparse matrix [d, 2^20]."""

    num_documents: int
    document: Int64s
    """[f] Index of each pair's document, ascending."""
    indices: Int64s
    """[f] Feature, ascending within a document."""
    values: Floats
    """[f] Occurrences over the norm of the document's occurrences."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
        """Texts must be valid Unicode."""
        words = WordTable.of(texts)
        features = words.hashes & np.uint64((1 << FEATURE_BITS) - 1)
        document = np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(words.first_words))
        ordered = np.sort(document << np.uint64(FEATURE_BITS) | features)
        starts = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
        counts = np.diff(starts, append=len(ordered)).astype(np.float64)
        pairs = ordered[starts]
        owner = (pairs >> np.uint64(FEATURE_BITS)).astype(np.int64)
        indices = (pairs & np.uint64((1 << FEATURE_BITS) - 1)).astype(np.int64)
        norms = np.sqrt(np.bincount(owner, counts * counts, minlength=len(texts)))
        return cls(len(texts), owner, indices, counts / norms[owner])


@dataclass(frozen=True)
class Classifier:
    weights: NDArray[np.float32]
    """[2^20]"""
    bias: float

    def scores(self, texts: Sequence[str]) -> Floats:
        """[d] Probability of each text of being one of the positives."""
        features = Features.of(texts)
        products = self.weights[features.indices] * features.values
        # bincount adds in order, so that a text's score does not depend on the batch it is in
        margins = np.bincount(features.document, products, minlength=len(texts)) + self.bias
        return 1 / (1 + np.exp(-margins))

    @property
    def fingerprint(self) -> str:
        """Hash, in hex, of everything that decides a score."""
        identity = xxhash.xxh3_128(np.float64(self.bias).tobytes())
        identity.update(self.weights.tobytes())
        identity.update(_probe().encode())
        return identity.hexdigest()

    def save(self, path: Path) -> None:
        """Write one file (readable by `numpy.load` too); the same classifier gives the same bytes."""
        header = {"format": FORMAT_VERSION, "bias": self.bias, "words": _probe(), "fingerprint": self.fingerprint}
        weights = io.BytesIO()
        np.lib.format.write_array(weights, self.weights, allow_pickle=False)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in ((_HEADER_FILE, orjson.dumps(header)), (_WEIGHTS_FILE, weights.getvalue())):
                archive.writestr(zipfile.ZipInfo(name, _OLDEST_DATE), data, zipfile.ZIP_DEFLATED)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, packed.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """
        Raises:
            UserError: the file is missing, damaged, or of another version.
        """
        again = "write it again with `broadgauge prepare train-classifier`"
        if not path.is_file():
            raise UserError(f"data.quality.classifier: {path} is no file; {again}")
        try:
            with zipfile.ZipFile(path) as archive:
                header = orjson.loads(archive.read(_HEADER_FILE))
                weights = np.lib.format.read_array(io.BytesIO(archive.read(_WEIGHTS_FILE)), allow_pickle=False)
            version, words = header["format"], header["words"]
            classifier = cls(weights, float(header["bias"]))
            is_whole = weights.shape == (1 << FEATURE_BITS,) and header["fingerprint"] == classifier.fingerprint
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError, EOFError) as error:
            raise UserError(
                f"data.quality.classifier: {path} is no classifier or damaged ({error}); {again}"
            ) from error
        if version != FORMAT_VERSION or words != _probe():
            raise UserError(
                f"data.quality.classifier: {path} has format {version} and words {words}, this version reads format "
                f"{FORMAT_VERSION} and words {_probe()}; {again}"
            )
        if not is_whole:
            raise UserError(f"data.quality.classifier: {path} does not match its own fingerprint; {again}")
        return classifier


class ClassifierFilter:
    """A step. Keeps a document if a draw from a Pareto distribution is above 1 - its score.

    So documents of every score have some chance, and the corpus keeps some of what is out of the classifier's range:
    P(keep) = (2 - score)^-alpha, as numpy's Pareto is (1 - U)^(-1/alpha) - 1 for U uniform in [0, 1).
    """

    def __init__(self, classifier: Classifier, pareto_alpha: float) -> None:
        self._classifier = classifier
        self._alpha = pareto_alpha

    def __call__(self, documents: list[Document], tally: Tally) -> list[Document]:
        if not documents:
            return documents
        texts = [document.text for document in documents]
        is_kept = pareto_draws(texts, self._alpha) > 1 - self._classifier.scores(texts)
        kept = []
        for document, keep in zip(documents, is_kept.tolist(), strict=True):
            if keep:
                kept.append(document)
            else:
                tally.drop("low_quality", document.id, document.text)
        return kept


def pareto_draws(texts: Sequence[str], alpha: float) -> Floats:
    """[d] A draw for each text, from a hash of it: the same in any order, process and run."""
    digests = np.array([xxhash.xxh3_64_intdigest(text.encode(), _DRAW_SEED) for text in texts], np.uint64)
    uniform = (digests >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.power(1 - uniform, -1 / alpha) - 1


def _probe() -> str:
    """Changes whenever words are cut or hashed in another way, which would make weights meaningless."""
    return xxhash.xxh3_64_hexdigest(WordTable.of([_PROBE]).hashes.tobytes())
