"""The `data` section of a config: where text comes from, what is kept of it, and how it becomes tokens."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trainer.section import Section, Strings, UserError


class DatasetConfig(Section):
    sources: Strings
    """Files, folders, globs and URLs (any fsspec scheme), `hf:NAME` for a Hugging Face dataset, `python-stdlib`."""
    text_field: str = Field("text", min_length=1)
    """Field of a .jsonl record, or column of a table, that holds the text."""


class LanguageConfig(Section):
    keep: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] = Field({})
    """Languages to keep (ISO 639-1: en, ko, ...), each with its least probability; empty keeps every language."""


class QualityConfig(Section):
    rules: tuple[Literal["c4", "gopher", "gopher_repetition"], ...] = Field((), strict=False)
    """Sets of rules that a document must pass: of the C4 paper, of the Gopher paper, and the latter's on repetition."""
    classifier: str | None = None
    """File written by `broadgauge prepare train-classifier`: keeps documents by GPT-3's rule; empty keeps all."""
    pareto_alpha: float = Field(9.0, gt=0.0)
    """A document is kept if a Pareto draw of this shape is above 1 - score (GPT-3, appendix A)."""


class FuzzyConfig(Section):
    """Documents that are nearly the same, by MinHash."""

    permutations: int = Field(128, ge=1)
    """Hash functions of a signature; all of them estimate the similarity of two candidates."""
    bands: int = Field(21, ge=1)
    """Documents that agree on a whole band are candidates: 99.8 % of pairs at the default threshold do."""
    rows: int = Field(6, ge=1)
    """Hash functions of a band; bands x rows is at most permutations."""
    ngram: int = Field(5, ge=1)
    """Words of a shingle."""
    threshold: float = Field(0.8, gt=0.0, le=1.0)
    """Least similarity (Jaccard) at which two candidates count as the same."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bands * self.rows > self.permutations:
            raise ValueError(
                f"data.dedup.fuzzy: bands {self.bands} x rows {self.rows} is more than permutations "
                f"{self.permutations}; use {self.bands * self.rows} permutations"
            )
        return self


FUZZY_PRESETS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gpt3": {"bands": 10, "rows": 1},  # appendix A: 10 hashes; the other permutations verify the many candidates
}


class DedupConfig(Section):
    exact: bool = True
    """Keep one copy of documents that are equal once normalised."""
    fuzzy: Annotated[
        FuzzyConfig | None,
        BeforeValidator(lambda value: FUZZY_PRESETS.get(value, value) if isinstance(value, str) else value),
    ] = None
    """Keep one copy of documents that are nearly the same: `standard`, `gpt3`, or the numbers; empty: keep them all."""
    paragraphs: bool = False
    """Keep one copy of every paragraph of some length."""
    min_paragraph_chars: int = Field(100, ge=1)
    """Paragraphs shorter than this may repeat."""


class DecontaminateConfig(Section):
    against: Strings | None = None
    """Evaluation texts (.jsonl, .txt: files, folders, globs) whose overlaps are cut from the corpus; empty: none."""
    fields: tuple[str, ...] | None = Field(None, strict=False)
    """Fields of evaluation records to compare with; empty: every string in them."""
    ngram: int = Field(13, ge=1)
    """Words in a row that make an overlap (GPT-3, appendix C, as all numbers here)."""
    window_chars: int = Field(200, ge=0)
    """Characters cut on each side of an overlap."""
    min_piece_chars: int = Field(200, ge=0)
    """What is left between cuts is dropped when shorter."""
    max_pieces: int = Field(10, ge=1)
    """A document cut into more pieces is dropped."""
    max_documents: int = Field(10, ge=1)
    """Overlaps met in more documents are common phrases, and stay."""


class TokenizerConfig(Section):
    path: str | None = None
    """Folder of an existing tokenizer (tokenizer.json, or a SentencePiece tokenizer.model); empty trains one."""
    kind: Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"] = "bpe"
    """What to train: byte-level BPE as GPT-2's, or a SentencePiece model with byte fallback."""
    train_bytes: int | None = Field(None, ge=1)
    """Text, drawn by a hash of its content, to train on at most (bytes); empty: 2 GB, or 200 MB for SentencePiece."""
    engine: Literal["auto", "reference"] = "auto"
    """auto: a fast encoder, for as long as samples of every shard agree with the reference implementation."""

    @property
    def max_train_bytes(self) -> int:
        if self.train_bytes is not None:
            return self.train_bytes
        return 2_000_000_000 if self.kind == "bpe" else 200_000_000  # SentencePiece holds it all in memory


BLENDS: dict[str, dict[str, float]] = {
    "gpt3": {"common_crawl": 0.60, "webtext2": 0.22, "books1": 0.08, "books2": 0.08, "wikipedia": 0.03},  # table 2.2
}


class DataConfig(Section):
    sources: Strings | None = None
    """Where the text of a single data set comes from, see `datasets`; empty, without datasets: python-stdlib."""
    datasets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], DatasetConfig] = Field({})
    """Named data sets, in place of `sources`; of texts in several the copy in the one named first is kept."""
    blend: Annotated[
        dict[str, Annotated[float, Field(ge=0.0)]] | None,
        BeforeValidator(lambda value: BLENDS.get(value, value) if isinstance(value, str) else value),
    ] = None
    """Share of training samples from each data set (any scale), or `gpt3` for its table; empty: by their tokens."""
    text_field: str = Field("text", min_length=1)
    """Field of a .jsonl record, or column of a table, that holds the text of `sources`."""
    language: LanguageConfig = LanguageConfig()
    """Which languages to keep."""
    quality: QualityConfig = QualityConfig()
    """Which documents are worth training on."""
    dedup: DedupConfig = DedupConfig()
    """Of texts that repeat, one copy is kept."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """Evaluation texts to keep out of training."""
    heldout_fraction: float = Field(0.02, gt=0.0, lt=1.0)
    """Share of documents, chosen by a hash of their content, kept out of training for evaluation."""
    tokenizer: Annotated[
        TokenizerConfig, BeforeValidator(lambda value: {"path": value} if isinstance(value, str | None) else value)
    ] = TokenizerConfig()
    """Text to tokens; a folder's name alone means its `path`."""
    max_document_bytes: int = Field(64_000_000, ge=1)
    """Longer texts (UTF-8) are dropped, and never held in memory whole."""
    max_bad_splits: int = Field(0, ge=0)
    """Pieces of the sources that may fail every time; a preparation with more of them does not finish."""
    prepared: str | None = None
    """Folder that `broadgauge prepare` has written; empty means the run prepares its own from its sources."""

    @property
    def named_datasets(self) -> dict[str, DatasetConfig]:
        """`datasets`, or the one that `sources` stands for."""
        if self.datasets:
            return self.datasets
        return {"text": DatasetConfig(sources=self.sources or ("python-stdlib",), text_field=self.text_field)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "tokenizer" in self.datasets:
            raise ValueError("data.datasets: tokenizer is the name of another folder beside the data sets; use another")
        if self.sources is not None and self.datasets:
            raise ValueError("data.sources and data.datasets exclude each other; move the sources into a data set")
        if self.blend is not None:
            check_blend(self.blend, None if self.prepared else self.named_datasets)
        return self


def check_blend(weights: Mapping[str, float], datasets: Iterable[str] | None) -> None:
    """Refuse weights from which nothing would be drawn, or that are not one for each data set (where those are known).

    Raises:
        UserError: names what is missing or too much.
    """
    if not sum(weights.values()):
        raise UserError(f"data.blend: the weights of {', '.join(weights)} sum to 0; give one a weight above 0")
    if datasets is None:
        return
    names = list(datasets)
    if unknown := weights.keys() - set(names):
        raise UserError(f"data.blend: there is no data set {min(unknown)}; known: {', '.join(names)}")
    if missing := set(names) - weights.keys():
        raise UserError(f"data.blend: {min(missing)} has no weight; give it one (0 leaves it out) beside the others")
