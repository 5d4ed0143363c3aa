"""The configuration of a run: one typed tree, read from YAML plus `a.b=value` overrides, validated in one place.

Everything else (the megatron-core config, the DeepSpeed JSON, the number of ranks) is derived from it. Nothing here
imports torch, so reading and checking a config takes milliseconds.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from trainer.rules import broken
from trainer.support import RULES

NORM_EPS = 1e-5  # of every layer norm, in the released models of all three papers
VOCAB_MULTIPLE = 128  # the padded vocabulary is a multiple of this, whatever the layout, so that layouts agree


class UserError(ValueError):
    """Something the user can mend. One line: the rule, the values, the fix. The command line exits 2 on it."""


_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMBT]?)")
_EXPONENT = {"": 0, "k": 3, "K": 3, "M": 6, "B": 9, "T": 12}


def _parse_count(value: Any) -> Any:
    """'375M' -> 375000000; everything else is left for the field's own validation."""
    match = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    count = Decimal(match[1]).scaleb(_EXPONENT[match[2]])  # exact: as a float, 4.1M would be no whole number
    return int(count) if count == int(count) else value


Tokens = Annotated[int, BeforeValidator(_parse_count), Field(ge=0)]
"""A number of tokens; accepts 300B, 375M, 4k as well as plain integers."""

Strings = Annotated[
    tuple[str, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    PlainSerializer(list),
]


class Section(BaseModel):
    """Base of every section: immutable, keyword-only, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class ModelConfig(Section):
    num_layers: int = Field(12, ge=1)
    """Transformer layers."""
    hidden_size: int = Field(768, ge=1)
    """Width of the residual stream (elements)."""
    num_heads: int = Field(12, ge=1)
    """Attention heads per layer; must divide hidden_size."""
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Width of the feed-forward layer (elements); empty means 4 x hidden_size."""
    vocab_size: int = Field(50257, ge=1)
    """Tokens in the vocabulary, the end-of-text token included; a tokenizer that the run trains has exactly so many."""
    seq_length: int = Field(2048, ge=2)
    """Tokens in one training sequence, and the longest context the model can read."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key-value heads per layer, each shared by a group of attention heads; empty gives every head its own."""
    attention_window: int | None = Field(None, ge=1)
    """Tokens that a position of every second layer sees, itself included (GPT-3's banded layers); empty: all dense."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector per position (GPT-1 to GPT-3) or rotations of queries and keys."""
    rotary_base: float = Field(10_000.0, gt=1.0)
    """Base of the rotary wavelengths; longer contexts use larger ones."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm, which has neither mean nor bias."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Norm before each sub-block (GPT-2, GPT-3) or after its residual addition (GPT-1)."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward layer: GELU between two matrices, or SiLU gating (two matrices in, one out)."""
    biases: Literal["all", "all_but_qkv", "none"] = "all"
    """Which linear layers have a bias; all_but_qkv leaves out queries, keys and values (GPT-Neo)."""
    tied_embeddings: bool = True
    """Share one matrix between the token embedding and the output layer."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability of dropping an element of an embedding, a residual branch or an attention weight."""
    init_std: float = Field(0.02, gt=0.0)
    """Standard deviation of the initial weights; residual projections get this over sqrt(2 x num_layers)."""

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix: vocab_size rounded up, independent of the layout."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class TrainConfig(Section):
    total_tokens: Tokens = 10**9
    """Tokens to train on over the whole run; rounded up to whole steps."""
    global_batch_size: int = Field(256, ge=1)
    """Sequences per optimizer step over all ranks."""
    ramp_start_batch_size: int | None = Field(None, ge=1)
    """Sequences in the first steps, and by how many the batch grows to global_batch_size; empty means no ramp."""
    ramp_tokens: Tokens = 0
    """Tokens over which the batch grows linearly (GPT-3, appendix B)."""
    micro_batch_size: int = Field(1, ge=1)
    """Sequences per forward and backward pass of one rank."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the model; master weights and optimizer state are fp32 in both."""
    transformer_engine: bool = False
    """On CUDA, TransformerEngine's norms and linear layers in place of PyTorch's; the package must be installed."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: keep everything, all but the inside of attention, or only each layer's input."""


class OptimizerConfig(Section):
    lr: float = Field(6.0e-4, gt=0.0)
    """Peak learning rate of AdamW."""
    min_lr_fraction: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate at the end of the decay, as a fraction of the peak."""
    warmup_tokens: Tokens = 0
    """Tokens over which the learning rate rises linearly from zero."""
    decay_tokens: Tokens | None = None
    """Tokens, warm-up included, after which the cosine has reached its end; empty means train.total_tokens."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay rate of the first moment per step."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay rate of the second moment per step."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled decay of matrices per unit of learning rate; norms and biases are never decayed."""
    clip_grad_norm: float = Field(1.0, ge=0.0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0 turns clipping off."""


class StabilityConfig(Section):
    spike_zscore: float = Field(8.0, ge=0.0)
    """A loss or gradient norm so many robust standard deviations above the window's median is a spike; 0: none is."""
    window: int = Field(64, ge=2)
    """Accepted steps that a spike is measured against; there is none before half of them."""
    max_skips_in_a_row: int = Field(3, ge=1)
    """Skipped steps in a row after which training goes back to the newest checkpoint and passes them over."""
    max_rollbacks: int = Field(2, ge=0)
    """Rollbacks, without a sound checkpoint beyond the trouble, after which the run ends as diverged."""


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Ranks that split every matrix."""
    pipeline: int = Field(1, ge=1)
    """Ranks that split the layers into consecutive stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Chunks of layers per pipeline rank; above 1 the schedule is the interleaved one."""
    context: int = Field(1, ge=1)
    """Ranks that split every sequence; attention trades its heads for whole sequences (Ulysses)."""
    data: int = Field(1, ge=1)
    """Replicas that split the batch."""
    sequence: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    zero: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what data-parallel ranks split (1 optimizer state, 2 and gradients, 3 and weights)."""
    offload: Literal["none", "optimizer"] = "none"
    """What is kept in the host's memory: nothing, or the optimizer with its state and the fp32 master weights."""

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def describe(self) -> str:
        interleaved = f" ({self.virtual_pipeline} chunks)" if self.virtual_pipeline > 1 else ""
        sequence = " with sequence parallel" if self.sequence else ""
        pipeline = f"pipeline {self.pipeline}{interleaved}"
        offload = " with the optimizer offloaded" if self.offload == "optimizer" else ""
        context = f" x context {self.context}" if self.context > 1 else ""
        return f"tensor {self.tensor}{sequence} x {pipeline}{context} x data {self.data}, ZeRO-{self.zero}{offload}"


class DatasetConfig(Section):
    sources: Strings
    """Files, folders, globs and URLs (any fsspec scheme), `hf:NAME` for a Hugging Face dataset, `python-stdlib`."""
    text_field: str = Field("text", min_length=1)
    """Field of a .jsonl record, or column of a table, that holds the text."""


class LanguageConfig(Section):
    keep: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] = {}
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
    bands: int = Field(16, ge=1)
    """Documents that agree on a whole band are candidates."""
    rows: int = Field(8, ge=1)
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
    train_bytes: int = Field(2_000_000_000, ge=1)
    """Text, drawn by a hash of its content, to train on at most (bytes)."""
    engine: Literal["auto", "reference"] = "auto"
    """auto: a fast encoder, for as long as samples of every shard agree with the reference implementation."""


BLENDS: dict[str, dict[str, float]] = {
    "gpt3": {"common_crawl": 0.60, "webtext2": 0.22, "books1": 0.08, "books2": 0.08, "wikipedia": 0.03},  # table 2.2
}


class DataConfig(Section):
    sources: Strings | None = None
    """Where the text of a single data set comes from, see `datasets`; empty, without datasets: python-stdlib."""
    datasets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], DatasetConfig] = {}
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
        TokenizerConfig, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)
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
        if self.sources is not None and self.datasets:
            raise ValueError("data.sources and data.datasets exclude each other; move the sources into a data set")
        if self.blend is not None:
            _check_blend(self.blend, None if self.prepared else self.named_datasets)
        return self


def _check_blend(blend: Mapping[str, float], datasets: Mapping[str, object] | None) -> None:
    if not sum(blend.values()):
        raise ValueError("data.blend: the weights sum to 0 and nothing would be drawn; give one a weight above 0")
    if datasets is not None and (unknown := blend.keys() - datasets.keys()):
        raise ValueError(f"data.blend: there is no data set {min(unknown)}; known: {', '.join(datasets)}")
    if datasets is not None and (silent := datasets.keys() - blend.keys()):
        raise ValueError(f"data.blend: {min(silent)} has no weight; give it one (0 leaves it out), or remove it")


class EvaluationConfig(Section):
    every_steps: int = Field(0, ge=0)
    """Steps between evaluations of the held-out loss; 0 evaluates only before and after training."""
    max_sequences: int | None = Field(None, ge=1)
    """Held-out sequences to evaluate on; empty means all of them."""


class CheckpointConfig(Section):
    every_steps: int = Field(1000, ge=1)
    """Steps between checkpoints; one more is written at the end."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints to keep; older ones are removed after a newer one is committed."""
    resume_from: str | None = None
    """A checkpoint of another run, written in any layout, to start from when this run has none of its own."""


class GenerateConfig(Section):
    prompt: str = Field("The ", min_length=1)
    """Text to continue with the exported model at the end of a run."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens to generate."""


class LaunchConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes CUDA where it exists."""
    nodes: int = Field(1, ge=1)
    """Machines, one agent each."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Ranks on each machine; empty spreads the layout's ranks evenly."""
    threads_per_rank: int | None = Field(None, ge=1)
    """CPU threads per rank; empty shares the machine's cores evenly."""


class RunConfig(Section):
    """A whole run, from raw text to an exported model."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs/<name>."""
    preset: str | None = None
    """A published size (see trainer/presets.py) whose values hold wherever this config says nothing."""
    seed: int = Field(1234, ge=0, lt=2**31)
    """Seed of initial weights, data order and dropout."""
    model: ModelConfig = ModelConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """Length, batch and arithmetic of training."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and the learning-rate schedule."""
    stability: StabilityConfig = StabilityConfig()
    """What happens to steps whose loss or gradients are no numbers, or far off."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is laid out over ranks."""
    data: DataConfig = DataConfig()
    """Text and tokenizer."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    generate: GenerateConfig = GenerateConfig()
    """The text sample at the end of a run."""
    launch: LaunchConfig = LaunchConfig()
    """Machines, processes and threads."""

    @property
    def tokens_per_step(self) -> int:
        """Of the full batch; `trainer.schedule` knows the steps of a ramp."""
        return self.train.global_batch_size * self.model.seq_length

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the full batch on each data-parallel replica."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data)

    @property
    def ranks_per_node(self) -> int:
        return self.launch.ranks_per_node or self.parallel.num_ranks // self.launch.nodes

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in broken(self, RULES):
            raise ValueError(rule.refusal(self, RULES))
        return self
