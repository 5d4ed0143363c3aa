"""What a model and its training cost, as arithmetic on the config: parameters, operations, bytes on a rank.

Legend. The model: L layers, h hidden size, f feed-forward size, s sequence length, V vocabulary, n heads, m key-value
heads, d = h / n head size, w window. The layout: t tensor, c context, p pipeline, v virtual pipeline (chunks), r ranks
that ZeRO splits over (data x context). Bytes of an element: e, 2 in bf16 and 4 in fp32.

Activations are those of CUDA's kernels unless `launch.device` is cpu, where some keep more. The CPU's are measured by
tests; CUDA's, in bf16, follow from the kernels' backward formulas and differ only where a docstring says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from trainer.config import ModelConfig, ParallelConfig, RunConfig

FP32 = 4
_PERSISTENT_ELEMENTS = 100_000  # DeepSpeed's stage3_param_persistence_threshold: tensors up to this size stay gathered
_PIECE_ELEMENTS = 1_000_000_000  # DeepSpeed's sub_group_size

_Groups = tuple[list[int], list[int]]
"""Elements of a rank's tensors: of its matrices, which are decayed, and of biases and norms, which are not."""

# --------------------------------------------------------------------------------------------------------- parameters


class _Tensor(NamedTuple):
    elements: int
    is_split: bool
    """Whether each tensor-parallel rank has its own part."""
    is_matrix: bool
    """Matrices are decayed, which puts them into another group of the optimizer than biases and norms."""


@lru_cache(maxsize=64)
def num_parameters(model: ModelConfig, *, padded: bool = False) -> int:
    """Weights of the model, exactly; a matrix shared by the embedding and the output layer counts once.

    Args:
        padded: count the vocabulary rows that are held in memory (a multiple of `config.VOCAB_MULTIPLE`) and not only
            those that stand for a token. Published counts are unpadded.
    """
    vocab_rows = model.padded_vocab_size if padded else model.vocab_size
    return sum(tensor.elements for tensor in _tensors(model, vocab_rows))


def parameters_per_rank(config: RunConfig, stage: int = 0) -> int:
    """Weights that a rank of pipeline stage `stage` holds before ZeRO splits anything."""
    return sum(elements for group in _local_groups(config, stage) for elements in group)


def _local_groups(config: RunConfig, stage: int, chunks: int | None = None) -> _Groups:
    """A rank's tensors in the model's order; of its first `chunks` if given."""
    model, parallel = config.model, config.parallel
    matrices: list[int] = []
    vectors: list[int] = []
    for chunk in range(parallel.virtual_pipeline if chunks is None else chunks):
        pieces, piece = parallel.pipeline * parallel.virtual_pipeline, chunk * parallel.pipeline + stage
        for elements, is_split, is_matrix in _tensors(model, model.padded_vocab_size, pieces, piece):
            group = matrices if is_matrix else vectors
            group.append(elements // (parallel.tensor if is_split else 1))
    return matrices, vectors


def _tensors(model: ModelConfig, vocab_rows: int, stages: int = 1, stage: int = 0) -> Iterator[_Tensor]:
    """Every tensor of a pipeline stage, in the order in which the module has them.

    With several stages the last holds its own copy of a tied embedding.
    """
    h, is_first, is_last = model.hidden_size, stage == 0, stage == stages - 1
    if is_first:
        yield _Tensor(vocab_rows * h, is_split=True, is_matrix=True)
        if model.positions == "learned":
            yield _Tensor(model.seq_length * h, is_split=False, is_matrix=True)
    for _ in range(model.num_layers // stages):
        yield from _layer_tensors(model)
    if is_last and model.norm_placement == "pre":
        yield from _norm_tensors(model)
    if is_last and not (model.tied_embeddings and is_first):
        yield _Tensor(vocab_rows * h, is_split=True, is_matrix=True)


def _layer_tensors(model: ModelConfig) -> Iterator[_Tensor]:
    """megatron-core makes the projection before queries, keys and values."""
    qkv, projection, fc1, fc2 = matrices(model)
    has_biases, is_pre = model.biases != "none", model.norm_placement == "pre"
    blocks = (
        (_linear(projection, has_biases, splits_rows=False), _linear(qkv, model.biases == "all", splits_rows=True)),
        (_linear(fc1, has_biases, splits_rows=True), _linear(fc2, has_biases, splits_rows=False)),
    )
    for block in blocks:
        if is_pre:
            yield from _norm_tensors(model)
        for tensors in block:
            yield from tensors
        if not is_pre:
            yield from _norm_tensors(model)


def _linear(shape: tuple[int, int], has_bias: bool, splits_rows: bool) -> Iterator[_Tensor]:
    """A matrix and its bias, which is split where rows are."""
    rows, columns = shape
    yield _Tensor(rows * columns, is_split=True, is_matrix=True)
    if has_bias:
        yield _Tensor(rows, is_split=splits_rows, is_matrix=False)


def _norm_tensors(model: ModelConfig) -> Iterator[_Tensor]:
    """A weight and, unless it is an RMS norm, a bias."""
    yield from [_Tensor(model.hidden_size, is_split=False, is_matrix=False)] * (1 if model.norm == "rms" else 2)


def matrices(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of a layer's matrices: queries, keys and values; attention's projection; feed-forward in, out."""
    h, f = model.hidden_size, model.ffn_size
    qkv_rows = h + 2 * model.kv_heads * model.head_size
    fc1_rows = 2 * f if model.activation == "swiglu" else f
    return (qkv_rows, h), (h, h), (fc1_rows, h), (h, f)


# --------------------------------------------------------------------------------------------------------- operations


def model_flops_per_token(model: ModelConfig) -> int:
    """Floating-point operations that training on one token needs: forward plus backward, without recomputation.

    6 per weight of a matrix product (a multiply and an add, once forward and twice backward), plus 12 h k in every
    layer for attention's two products with k keys a query. k is s in a dense layer, in full although a causal kernel
    may skip half of it. With f = 4h this is 72 L h^2 (1 + s / 6h + V / 12Lh): Narayanan et al. 2021 (arXiv:2104.04473),
    section 5.1, less the forward pass that its equation 3 repeats for recomputation; Chowdhery et al. 2022 (PaLM,
    arXiv:2204.02311), appendix B, counts attention the same way. In a banded layer k is min(w, s), which is the same
    convention: the band in full, a dense layer once it is as wide as the sequence, and never credit for keys that no
    query sees. Key-value heads shared by queries shrink the weights alone: every query still meets k keys.
    The output layer counts with the true vocabulary, tied or not; the embedding is a look-up.

    Known error: norms, softmax, activation functions, biases, dropout and the optimizer are left out (about 1 % at
    h = 1024, s = 2048, less in wider models). The mean number of keys that a query truly sees is (s + 1) / 2 in a
    dense layer and w - w (w - 1) / 2s in a banded one, so that a run on a causal kernel is credited with too much:
    with all layers dense by 1.4 % for GPT-3 175B and 13 % for GPT-3 Small, banded as they are by 0.7 % and 7 %.
    """
    weights = model.num_layers * _matrix_weights(model) + model.vocab_size * model.hidden_size
    return 6 * weights + 3 * sum(_attention_flops(model, layer) for layer in range(model.num_layers))


def hardware_flops_per_token(config: RunConfig) -> int:
    """`model_flops_per_token` and what recomputation repeats: attention's two products, or every layer's forward pass.

    Korthikanti et al. 2022 (arXiv:2205.05198), section 5, for what is repeated. The output layer never is. Left out is
    what a fused attention kernel repeats by itself in its backward pass (the scores, 2 h k in every layer).
    """
    model = config.model
    repeated = {
        "none": 0,
        "selective": sum(_attention_flops(model, layer) for layer in range(model.num_layers)),
        "full": sum(2 * _matrix_weights(model) + _attention_flops(model, layer) for layer in range(model.num_layers)),
    }
    return model_flops_per_token(model) + repeated[config.train.recompute]


def _matrix_weights(model: ModelConfig) -> int:
    """Of one layer."""
    return sum(rows * columns for rows, columns in matrices(model))


def _attention_flops(model: ModelConfig, layer: int) -> int:
    """Forward, per token: scores and weighted values, 2 h each for every key."""
    return 4 * model.hidden_size * num_keys(model, layer)


def num_keys(model: ModelConfig, layer: int) -> int:
    """Keys that a query of this layer (0-based) is counted with; every second layer is banded."""
    window = model.attention_window if layer % 2 else None
    return min(window or model.seq_length, model.seq_length)


# -------------------------------------------------------------------------------------------------------- activations


def activation_bytes_per_microbatch(config: RunConfig, stage: int = 0) -> int:
    """What a rank of pipeline stage `stage` keeps of one micro-batch from its forward to its backward pass.

    The sum of what its layers and the ends of the model keep. Left out: random states of attention, and the cosines
    and sines of rotary positions (4 d s, once for all layers and micro-batches). Nor does it hold what lives only while
    it is computed: under recomputation the rest of one layer at a time.
    """
    is_first, is_last = stage == 0, stage == config.parallel.pipeline - 1
    layers = list(layers_of_stage(config, stage))
    num_banded = sum(layer % 2 for layer in layers)
    kept = (len(layers) - num_banded) * activation_bytes_per_layer(config, 0)
    kept += num_banded * activation_bytes_per_layer(config, 1) if num_banded else 0
    if is_first:
        kept += activation_bytes_of_embedding(config)
    if is_last:
        kept += activation_bytes_of_output(config)
    return kept


def microbatches_in_flight(parallel: ParallelConfig, num_microbatches: int, stage: int) -> float:
    """Most micro-batches of which a rank of `stage` keeps activations at once; fractions are chunks of its layers.

    A stage runs its warm-up of forward passes, then one more before the first backward pass. The warm-up is p - 1 -
    stage in 1F1B (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1) and, counted in chunks, 2 (p - 1 - stage) +
    (v - 1) p interleaved (section 2.2.2, as megatron-core's schedule has it): (1 + (p - 1) / pv) p micro-batches on
    the first stage, which is Korthikanti et al. 2022, section 4.2.3.
    """
    after, chunks = parallel.pipeline - 1 - stage, parallel.virtual_pipeline
    warm_up = after if chunks == 1 else 2 * after + (chunks - 1) * parallel.pipeline
    return min(warm_up + 1, num_microbatches * chunks) / chunks


def activation_bytes_per_layer(config: RunConfig, layer: int) -> int:
    """What a rank keeps of one micro-batch for one layer (0-based), in either order of norms.

    Of tokens that sequence parallelism splits too: the inputs of both norms with their statistics, the inputs of
    attention's and the feed-forward layer's first matrices (h e each), and two dropout masks. Full recomputation
    keeps the layer's input alone (h e).
    """
    input_bytes = config.model.hidden_size * _element_bytes(config)
    if config.train.recompute == "full":
        return _split_tokens(config) * input_bytes
    split = 2 * (_norm_bytes(config) + input_bytes + _dropout_bytes(config))
    return _split_tokens(config) * split + _attention_bytes(config, layer) + _feed_forward_bytes(config)


def activation_bytes_of_embedding(config: RunConfig) -> int:
    """Numbers of tokens (8), and which of them are not in this rank's rows (1); of positions (8); a dropout mask.

    The sequences of a micro-batch share their position numbers unless context parallelism has picked them.
    """
    parallel, tokens = config.parallel, _tokens(config)
    kept = tokens * (8 + (1 if parallel.tensor > 1 else 0)) + _split_tokens(config) * _dropout_bytes(config)
    if config.model.positions == "learned":
        kept += 8 * (tokens if parallel.context > 1 else config.model.seq_length)
    return kept


def activation_bytes_of_output(config: RunConfig) -> int:
    """What the last stage keeps for the final norm, the output layer and the loss.

    The norm's input; the output layer's (h e, of all tokens, also under sequence parallelism); logits in the model's
    dtype (V / t of e); per token the log of the softmax's sum (4), the label's column (8) and if it is here (1).
    """
    model = config.model
    logits = model.padded_vocab_size // config.parallel.tensor
    loss = _tokens(config) * ((model.hidden_size + logits) * _element_bytes(config) + FP32 + 8 + 1)
    return loss + (_split_tokens(config) * _norm_bytes(config) if model.norm_placement == "pre" else 0)


def _feed_forward_bytes(config: RunConfig) -> int:
    """The activation function's input and output, f / t wide each.

    Gated it is the first product, 2f / t wide, the gate's own output, megatron-core's copy of the other half, and the
    result.
    """
    kept = 5 if config.model.activation == "swiglu" else 2
    return kept * _tokens(config) * config.model.ffn_size // config.parallel.tensor * _element_bytes(config)


def _attention_bytes(config: RunConfig, layer: int) -> int:
    """From the product that makes queries, keys and values to the input of the projection, n and m heads of this rank.

    Always: the projection's input (n d e). Selective recomputation keeps attention's inputs beside it, `none` its
    inside: `_core_bytes`.
    """
    e, d, tokens = _element_bytes(config), config.model.head_size, _tokens(config)
    inside = _core_input_bytes(config) if config.train.recompute == "selective" else _core_bytes(config, layer)
    return tokens * _heads(config)[0] * d * e + inside


def _core_input_bytes(config: RunConfig) -> int:
    """Queries, keys and values as one tensor, (n + 2m) d e, of which values, and what is not copied, are views.

    Copies: queries whose groups of heads had to be joined.
    """
    n, m = _heads(config)
    return _tokens(config) * (n + 2 * m + (n if 1 < m < n else 0)) * config.model.head_size * _element_bytes(config)


def _core_bytes(config: RunConfig, layer: int) -> int:
    """What the attention kernel keeps beside its output, which is the projection's input.

    A flash kernel: its inputs and the log of each softmax's sum (4 n). Rotary positions copy queries and keys, and
    leave of the tensor they came in only values, which keep all of it. Under context parallelism the inputs are those
    gathered, (n + 2m) d e, none of them a view, and the output is not yet scattered: n d e more.
    """
    model, (n, m), tokens = config.model, _heads(config), _tokens(config)
    is_banded = num_keys(model, layer) < model.seq_length
    has_dropout = model.dropout > 0
    if (is_banded and _on_cpu(config)) or (has_dropout and (is_banded or _on_cpu(config))):
        return _blocks_bytes(config, is_banded)
    gathered = tokens * (2 * n + 2 * m) * model.head_size * _element_bytes(config)
    rotated = tokens * (2 * n + 3 * m) * model.head_size * _element_bytes(config)
    whole = rotated if model.positions == "rotary" else _core_input_bytes(config)
    return (gathered if config.parallel.context > 1 else whole) + tokens * n * FP32


def _blocks_bytes(config: RunConfig, is_banded: bool) -> int:
    """The same without a flash kernel for the case: bands on the CPU or with dropout, and all dropout on the CPU.

    A band is cut in k blocks of w queries, s filled up to whole ones, with keys and values for every head. The CPU's
    triangles keep queries, keys, values (d e each) and the softmax's sum (4), and their output where cutting off the
    filling or scattering over context-parallel ranks copies it. With dropout every block gets the one before as well:
    CUDA keeps queries, two blocks of keys and values, output and sum; the CPU writes attention out in fp32: queries,
    keys, values, and for each key a weight, its mask and their product. (Not counted: in fp32 the values of a dense
    layer are a view that keeps queries and keys alive, 2 n d e.)
    """
    model, d, e, context = config.model, config.model.head_size, _element_bytes(config), config.parallel.context
    block = num_keys(model, 1) if is_banded else model.seq_length
    filled = -(-model.seq_length // block) * block
    seen = 2 if is_banded else 1
    if model.dropout == 0:
        is_copied = filled > model.seq_length or context > 1
        per_query = d * e * (4 if is_copied else 3) + FP32
    elif _on_cpu(config):
        per_query = FP32 * (d * (1 + 2 * seen) + 3 * seen * block)
    else:
        per_query = d * e * (2 + 2 * seen) + FP32
    return _heads(config)[0] * config.train.micro_batch_size * filled * per_query // context


def _norm_bytes(config: RunConfig) -> int:
    """A norm's input and statistics, per token: mean and deviation, or for an RMS norm the deviation alone.

    The CPU keeps LayerNorm's statistics in the model's dtype; its RMS norm keeps input and result in fp32.
    """
    h, e = config.model.hidden_size, _element_bytes(config)
    if config.model.norm == "rms":
        return 2 * h * FP32 + FP32 if _on_cpu(config) else h * e + FP32
    return h * e + 2 * (e if _on_cpu(config) else FP32)


def _dropout_bytes(config: RunConfig) -> int:
    """A mask over h elements per token: one byte each, on the CPU as wide as the element."""
    element = _element_bytes(config) if _on_cpu(config) else 1
    return config.model.hidden_size * element if config.model.dropout > 0 else 0


def _tokens(config: RunConfig) -> int:
    """Of a micro-batch on one rank."""
    return config.train.micro_batch_size * config.model.seq_length // config.parallel.context


def _split_tokens(config: RunConfig) -> int:
    """Those that a rank holds between the split matrices."""
    return _tokens(config) // (config.parallel.tensor if config.parallel.sequence else 1)


def _heads(config: RunConfig) -> tuple[int, int]:
    """Attention heads and key-value heads of one rank, before context parallelism trades them."""
    return config.model.num_heads // config.parallel.tensor, config.model.kv_heads // config.parallel.tensor


def layers_of_stage(config: RunConfig, stage: int) -> Iterator[int]:
    """0-based; chunk i of stage j is the (i p + j)-th piece of the model."""
    stages = config.parallel.pipeline
    size = config.model.num_layers // (stages * config.parallel.virtual_pipeline)
    for chunk in range(config.parallel.virtual_pipeline):
        start = (chunk * stages + stage) * size
        yield from range(start, start + size)


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.train.precision == "bf16" else FP32


def _on_cpu(config: RunConfig) -> bool:
    return config.launch.device == "cpu"


# --------------------------------------------------------------------------------------------------------------- state


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds besides activations while a step's last gradients arrive, before the optimizer runs."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights and Adam's two moments."""
    offload_buffers: int
    """What DeepSpeed adds under offload: gradients and weights on their way."""
    host: int
    """How much of the total lies in the host's memory."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.offload_buffers


def state_bytes_per_rank(config: RunConfig, stage: int = 0, replica: int = 0) -> StateBytes:
    """Bytes of the P weights that a rank of pipeline stage `stage` holds or shares with r - 1 others, exactly.

    Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), section 3.1 and figure 1, with fp32 gradients:

        ZeRO   weights                  gradients   optimizer
        1      e P                      4 P         12 P / r
        2      e P                      4 P / r     12 P / r
        3      e P / r and small ones   4 P / r     12 P / r

    Matrices are one group of the optimizer, biases and norms another. ZeRO 1 and 2 lay a group's tensors end to end
    and fill it up to a multiple of 2 r elements; ZeRO 3 fills each tensor up to one of r. What fills up counts, save in
    gradients that are tensors of their own. Adam counts updates (4 bytes) in every group, which ZeRO 3 cuts into
    pieces of a billion elements a rank, and there a flag (1) says whether a gradient was not finite. "Small ones" are
    whole copies, filled up too, of tensors up to 100,000 elements. In fp32, ZeRO 2 keeps whole the gradients of
    tensors that a partition's border cuts, and of some interleaved chunks twice: the one thing in which the ranks of
    `replica`, 0 to r - 1 over data and context, differ.

    Offload moves the optimizer to the host, with ZeRO 2 and 3 the gradients too, and adds there 4 P / r for the
    gradients that the optimizer reads; under ZeRO 1 and 2 also e P / r for weights on their way back, and a buffer as
    large as the largest tensor on either side.

    Left out: under ZeRO 2 in fp32 the second copy of gradients that there is while a further micro-batch is added; up
    to 4 P / r more for gradients while the optimizer runs, when activations are gone; DeepSpeed's bucket of 4e7
    elements while gradients are reduced, which ZeRO 3 always keeps; under ZeRO 3 the gathered weights of the layer at
    work, up to 1e9 elements.
    """
    parallel, e, groups = config.parallel, _element_bytes(config), _local_groups(config, stage)
    ranks, total = parallel.data * parallel.context, parameters_per_rank(config, stage)
    if parallel.zero == 3:
        return _zero_3_bytes(groups, e, ranks, parallel.offload == "optimizer")
    share = sum(_share(group, ranks) for group in groups)
    weights, optimizer = e * ranks * share, 3 * FP32 * share + FP32 * len(groups)
    is_flat = e < FP32 and parallel.offload == "none"
    if parallel.zero == 1:
        gradients = FP32 * (ranks * share if is_flat else total)
    elif e < FP32:
        gradients = FP32 * share
    else:
        early = _local_groups(config, stage, parallel.virtual_pipeline - 1 if parallel.offload == "none" else 0)
        gradients = FP32 * _kept_gradients(groups, early, replica, ranks)
    if parallel.offload == "none":
        return StateBytes(weights, gradients, optimizer, 0, 0)
    largest = e * max(max(group) for group in groups)
    host = optimizer + (FP32 + e) * share + largest + (gradients if parallel.zero == 2 else 0)
    return StateBytes(weights, gradients, optimizer, (FP32 + e) * share + 2 * largest, host)


def _zero_3_bytes(groups: _Groups, e: int, ranks: int, offload: bool) -> StateBytes:
    share = sum(_ceil(elements, ranks) for group in groups for elements in group)
    gathered = (elements for group in groups for elements in group if elements <= _PERSISTENT_ELEMENTS)
    small = sum(ranks * _ceil(elements, ranks) for elements in gathered) if ranks > 1 else 0
    pieces = sum(_num_pieces([_ceil(elements, ranks) for elements in group]) for group in groups)
    gradients, optimizer = FP32 * share, 3 * FP32 * share + FP32 * pieces + 1
    extra = FP32 * share if offload else 0
    return StateBytes(e * (share + small), gradients, optimizer, extra, gradients + optimizer + extra if offload else 0)


def _kept_gradients(all_groups: _Groups, early: _Groups, replica: int, ranks: int) -> int:
    """Elements of gradients that ZeRO 2 keeps in fp32: of all tensors of which a part lies in a replica's partition.

    They have come in one buffer with the first backward pass, which is of the last chunk. Tensors that are not of that
    chunk (`early`) got zeros of their own, to add to, and without one that is there is no buffer.
    """
    shares = [_share(group, ranks) for group in all_groups]
    whole, zeros = (
        sum(_touched_elements(group, share, replica) for group, share in zip(groups, shares, strict=True))
        for groups in (all_groups, early)
    )
    return zeros + (whole if whole > zeros else 0)


def _touched_elements(tensors: list[int], share: int, replica: int) -> int:
    start, touched = 0, 0
    for elements in tensors:
        if start < (replica + 1) * share and replica * share < start + elements:
            touched += elements
        start += elements
    return touched


def _share(tensors: list[int], ranks: int) -> int:
    """A rank's part of them laid end to end, under ZeRO 1 and 2."""
    return 2 * _ceil(sum(tensors), 2 * ranks)


def _num_pieces(tensors: list[int]) -> int:
    """A piece ends with the tensor that makes it as large as `_PIECE_ELEMENTS`."""
    pieces, filled = 0, 0
    for elements in tensors:
        filled += elements
        if filled >= _PIECE_ELEMENTS:
            pieces, filled = pieces + 1, 0
    return pieces + (1 if filled else 0)


def _ceil(number: int, parts: int) -> int:
    return -(-number // parts)
