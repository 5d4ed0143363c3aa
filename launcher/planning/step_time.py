"""How long a training step takes, by part.

Legend as in `trainer.plan`: h hidden size, f feed-forward size, s sequence length, V vocabulary, n heads; t tensor,
c context, p pipeline, v virtual pipeline. T = micro-batch x s / c tokens of a micro-batch on a rank.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from launcher.planning.cluster import Cluster
from launcher.planning.constants import CONSTANTS, Constants
from launcher.planning.practice import OURS, Practice
from launcher.planning.rates import Group, Rates
from launcher.planning.saving import SaveTimes
from launcher.planning.shared import Shared
from trainer import plan
from trainer.config import RunConfig

_OPTIMIZER_BYTES = 38
"""Moved for a parameter: fp32 gradient twice (its norm, the update) and zeroed (12), master weight and two moments read
and written (24), the model's weight written (2)."""
_ADDING_BYTES = 8
"""Of a weight's fp32 gradient: read and written as a micro-batch adds to it."""
_TRADING_PASSES = 5
"""Of what context-parallel ranks exchange, through memory: read and written twice, half of it once more."""


@dataclass(frozen=True)
class Work:
    """Seconds of a rank on a piece of the model, for one micro-batch in one direction."""

    matrix: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    """Communication that computation does not hide."""
    context: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.matrix + other.matrix,
            self.attention + other.attention,
            self.memory + other.memory,
            self.tensor + other.tensor,
            self.context + other.context,
        )

    def times(self, factor: float) -> "Work":
        return Work(
            factor * self.matrix,
            factor * self.attention,
            factor * self.memory,
            factor * self.tensor,
            factor * self.context,
        )

    @property
    def seconds(self) -> float:
        return self.matrix + self.attention + self.memory + self.tensor + self.context


@dataclass(frozen=True)
class Passes:
    """A micro-batch's way through a piece of the model."""

    forward: Work = Work()
    backward: Work = Work()
    repeated: Work = Work()
    """Of the forward pass, by recomputation."""

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward, self.repeated + other.repeated)

    def times(self, factor: float) -> "Passes":
        return Passes(self.forward.times(factor), self.backward.times(factor), self.repeated.times(factor))

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds + self.repeated.seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on its critical path; the sum of all parts is the step."""

    matrix: float
    """Matrix products of linear layers, forward and backward."""
    attention: float
    """Scores, softmax and weighted values."""
    memory_bound: float
    """What only moves numbers: norms, activations, dropout, adding up gradients, the loss."""
    recomputation: float
    """Forward passes that are repeated, with their communication."""
    tensor: float
    """Tensor- and sequence-parallel communication that is not hidden."""
    context: float
    """Context-parallel communication."""
    pipeline: float
    """Activations and their gradients between stages, not hidden; and the gradient of an embedding that two share."""
    bubble: float
    """Waiting of stages for the first and the last micro-batches."""
    data: float
    """Gradients and weights between data-parallel replicas, not hidden."""
    optimizer: float
    input: float = 0.0
    """Reading the next step's data, beyond what the step itself hides."""
    checkpoint: float = 0.0
    """For which saving holds training up, spread over all steps."""

    @property
    def seconds(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class StepModel:
    """A run on a cluster, by a practice."""

    config: RunConfig
    cluster: Cluster
    practice: Practice = OURS
    constants: Constants | None = None
    """None: those of the cluster's kind."""
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)
    """With models of other layouts, which differ in `parallel`, batch and recomputation alone."""

    def __post_init__(self) -> None:
        self.shared.claim(self.config.model, self.cluster, self.practice, self.constants)

    @cached_property
    def rates(self) -> Rates:
        return Rates(self.cluster, self._constants, 2 if self.config.train.precision == "bf16" else 4)

    @cached_property
    def _constants(self) -> Constants:
        return self.constants or CONSTANTS[self.cluster.kind]

    def step(self) -> StepTime:
        """Of the full batch, with what storage adds to it."""
        step = self.without_storage()
        if not self.practice.uses_storage:
            return step
        step = replace(step, input=max(0.0, self._reading_seconds() - step.seconds))
        return replace(step, checkpoint=SaveTimes(self.config, self.cluster).seconds_per_step(step.seconds))

    def without_storage(self) -> StepTime:
        """Of the full batch.

        1F1B: the slowest stage works on all micro-batches, and waits once for each other stage, a v-th of that when
        interleaved (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
        """
        parallel, num = self.config.parallel, self.config.num_microbatches
        slowest, seconds = self.shared.get(self._slowest, "slowest", *self._computation_key)
        bubble = (seconds - slowest.seconds) / parallel.virtual_pipeline
        both = (slowest.forward + slowest.backward).times(num)
        return StepTime(
            matrix=both.matrix,
            attention=both.attention,
            memory_bound=both.memory,
            recomputation=num * slowest.repeated.seconds,
            tensor=both.tensor,
            context=both.context,
            pipeline=self._pipeline_seconds(num),
            bubble=bubble,
            data=self._exposed(*self._data_seconds(slowest, num)),
            optimizer=self._optimizer_seconds(),
        )

    def _reading_seconds(self) -> float:
        """A machine reads the sequences of each replica that it has ranks of once, while the step before is done."""
        model, parallel = self.config.model, self.config.parallel
        here = min(parallel.num_ranks, self.cluster.devices_per_node)
        replicas = min(parallel.data, -(-here // (parallel.tensor * parallel.context)))
        tokens = replicas * self.config.tokens_per_step / parallel.data
        token_bytes = 2 if model.vocab_size <= 2**16 else 4
        return tokens * token_bytes / self.cluster.storage_bytes_per_second

    # ---------------------------------------------------------------------------------------------------- computation

    @cached_property
    def stages(self) -> list[Passes]:
        """One micro-batch on each pipeline stage."""
        last = self.config.parallel.pipeline - 1
        return [self._piece(self._layers(stage), stage == 0, stage == last) for stage in range(last + 1)]

    @cached_property
    def chunks(self) -> list[list[Passes]]:
        """The same for each chunk of a stage: the first holds the embedding, the very last the output layer."""
        parallel = self.config.parallel
        return [
            [self._chunk(stage, chunk) for chunk in range(parallel.virtual_pipeline)]
            for stage in range(parallel.pipeline)
        ]

    def _chunk(self, stage: int, chunk: int) -> Passes:
        parallel = self.config.parallel
        is_first = stage == chunk == 0
        is_last = (stage, chunk) == (parallel.pipeline - 1, parallel.virtual_pipeline - 1)
        layers = self._layers(stage)
        share = len(layers) / parallel.virtual_pipeline
        return self._piece(layers[round(chunk * share) : round((chunk + 1) * share)], is_first, is_last)

    def _slowest(self) -> tuple[Passes, float]:
        """Of the stages, and the seconds of all of them together."""
        return max(self.stages, key=lambda stage: stage.seconds), sum(stage.seconds for stage in self.stages)

    def _layers(self, stage: int) -> list[int]:
        counts = self.practice.layers_of_stages
        return list(range(counts[stage]) if counts else plan.layers_of_stage(self.config, stage))

    def _piece(self, layers: list[int], is_first: bool, is_last: bool) -> Passes:
        """Of as many layers of each kind as it has: dense, and banded where there is a window, every second one."""
        banded = sum(layer % 2 for layer in layers)
        key = ("piece", *self._piece_key, len(layers), banded, is_first, is_last)
        return self.shared.get(lambda: self._passes(len(layers) - banded, banded, is_first, is_last), *key)

    def _passes(self, num_dense: int, num_banded: int, is_first: bool, is_last: bool) -> Passes:
        dense, banded = self.shared.get(lambda: (self._layer(0), self._layer(1)), "layers", *self._piece_key)
        layers = dense.times(num_dense) + banded.times(num_banded)
        return layers + (self._embedding() if is_first else Passes()) + (self._output() if is_last else Passes())

    @cached_property
    def _piece_key(self) -> tuple[Hashable, ...]:
        """What the time of a layer depends on."""
        parallel, train = self.config.parallel, self.config.train
        return parallel.tensor, parallel.sequence, parallel.context, train.micro_batch_size, train.recompute

    @cached_property
    def _computation_key(self) -> tuple[Hashable, ...]:
        """What the times of all stages depend on."""
        return (*self._piece_key, self.config.parallel.pipeline, self.config.parallel.virtual_pipeline)

    def _layer(self, layer: int) -> Passes:
        products = self._products()
        attention_forward, attention_backward = self._attention(layer)
        moving_forward, moving_backward = self._moving()
        tensor_forward, tensor_backward = self._tensor_seconds()
        context = self._context_seconds()
        adding, result_bytes = self._gradient_bytes()
        matrix = sum(self.rates.product_seconds(*shape) for shape in products)
        weights_matrix = sum(self.rates.product_seconds(k, n, m, result_bytes) for m, n, k in products)
        num_weights = sum(n * k for _, n, k in products)
        moving_backward += self.rates.moving_seconds(adding * num_weights, 4 if adding else 0)
        hides = self.practice.hides_tensor
        forward = Work(
            matrix,
            attention_forward,
            moving_forward,
            self._exposed(tensor_forward, matrix if hides == "all" else 0.0),
            context,
        )
        backward = Work(
            matrix + weights_matrix,
            attention_backward,
            moving_backward,
            self._exposed(tensor_backward, {"nothing": 0.0, "backward": weights_matrix}.get(hides, 2 * matrix)),
            context,
        )
        repeated = {"none": Work(), "selective": Work(attention=attention_forward, context=context), "full": forward}
        return Passes(forward, backward, repeated[self.config.train.recompute])

    def _products(self) -> list[tuple[float, float, float]]:
        """(m, n, k) of a layer's matrix products, forward."""
        t, tokens = self.config.parallel.tensor, self._tokens
        (qkv, h), _, (fc1, _), (_, f) = plan.matrices(self.config.model)
        return [(tokens, qkv / t, h), (tokens, h, h / t), (tokens, fc1 / t, h), (tokens, h, f / t)]

    def _attention(self, layer: int) -> tuple[float, float]:
        """Forward and backward. A flash kernel skips half of a causal layer and repeats the scores backwards."""
        model, parallel = self.config.model, self.config.parallel
        keys, queries = plan.num_keys(model, layer), self._tokens
        heads = model.num_heads / parallel.tensor
        if self.practice.attention == "flash":
            seen = keys / 2 if keys == model.seq_length else keys
            flops = 4 * queries * heads * model.head_size * seen
            share = self.practice.attention_share or self._constants.attention_share
            share /= 1 + self._constants.attention_half_keys / keys
            return self.rates.attention_seconds(flops, share), self.rates.attention_seconds(2.5 * flops, share)
        # batched over heads and sequences: the shape of one, the time of all
        num = heads * queries / model.seq_length
        pair = [(model.seq_length, keys, model.head_size), (model.seq_length, model.head_size, keys)]
        kernel = self._constants.kernel_seconds
        products = num * sum(self.rates.product_seconds(*shape) - kernel for shape in pair) + 2 * kernel
        # an element of a matrix of scores: read and written by the masked softmax (2 e), read and written by dropout
        # with its mask (2 e + 1); backwards both again, the softmax's with its output as well
        e, scores = self.rates.element_bytes, heads * queries * keys
        dropout = 2 * e + 1 if model.dropout > 0 else 0
        forward = self.rates.moving_seconds(scores * (2 * e + dropout), 2)
        backward = self.rates.moving_seconds(scores * (3 * e + dropout), 2)
        return products + forward, 2 * products + backward

    def _moving(self) -> tuple[float, float]:
        """Forward and backward: norms (2 h e), bias, dropout and residual (3 h e and masks), activation, positions.

        Backwards each moves half as much again: it reads what came in beside the gradient.
        """
        model, parallel, e = self.config.model, self.config.parallel, self.rates.element_bytes
        h, wide, t = model.hidden_size, model.ffn_size / parallel.tensor, parallel.tensor
        split = t if parallel.sequence else 1
        masks = 2 * h if model.dropout > 0 else 0
        residual = (6 * h * e + masks) / split
        activation = (3 if model.activation == "swiglu" else 2) * wide * e
        rotation = 2 * (h + model.kv_heads * model.head_size) * e / t if model.positions == "rotary" else 0
        others = residual + activation + rotation
        norms = 4 * h * e / split
        more_forward, more_backward, more_kernels = (0.0, 0.0, 0) if self.practice.fuses_pointwise else self._unfused()
        forward = self.rates.moving_seconds(
            self._tokens * (norms + others + more_forward), 5 + (1 if rotation else 0) + more_kernels
        )
        backward = self.rates.moving_seconds(
            self._tokens * (1.5 * (norms + others) + more_backward), 9 + (2 if rotation else 0) + more_kernels
        )
        return forward, backward

    def _unfused(self) -> tuple[float, float, int]:
        """What kernels apart move besides, for a token forward and backward; and how many more they are.

        A bias reads and writes what it is added to, and its gradient reads that once; dropout reads and writes too. Of
        a gated activation the gate reads and writes, its other half is copied, and both are multiplied: 7 passes of its
        width for 3 forward, 12 for 4.5 backward.
        """
        model, parallel, e = self.config.model, self.config.parallel, self.rates.element_bytes
        t, split = parallel.tensor, parallel.tensor if parallel.sequence else 1
        after, inside = 2 * model.hidden_size / split, model.ffn_size / t
        qkv = (model.num_heads + 2 * model.kv_heads) * model.head_size / t if model.biases == "all" else 0.0
        biased = 0.0 if model.biases == "none" else after + qkv + inside * (2 if model.activation == "swiglu" else 1)
        dropped = after if model.dropout > 0 else 0.0
        is_gated = model.activation == "swiglu"
        forward = 2 * biased + 2 * dropped + (4 * inside if is_gated else 0.0)
        backward = biased + (7.5 * inside if is_gated else 0.0)
        kernels = (4 if biased else 0) + (2 if dropped else 0) + (2 if is_gated else 0)
        return forward * e, backward * e, kernels

    def _gradient_bytes(self) -> tuple[float, float]:
        """Of a weight's gradient: moved by a kernel that adds it up, and by the product that makes it."""
        e = self.rates.element_bytes
        if self.practice.fuses_gradients:
            return 0.0, _ADDING_BYTES
        return e + _ADDING_BYTES * self.practice.reduced_bytes / 4, e

    def _embedding(self) -> Passes:
        h, e = self.config.model.hidden_size, self.rates.element_bytes
        looked_up = self.rates.moving_seconds(3 * self._tokens * h * e, 3)
        tensor = self.rates.reduce_seconds(self._tokens * h * e, self._tensor_group)
        return Passes(Work(memory=looked_up, tensor=tensor), Work(memory=looked_up))

    def _output(self) -> Passes:
        model, t = self.config.model, self.config.parallel.tensor
        columns, h = model.padded_vocab_size / t, model.hidden_size
        product = self.rates.product_seconds(self._tokens, columns, h)
        adding, result_bytes = self._gradient_bytes()
        weights = self.rates.product_seconds(h, columns, self._tokens, result_bytes)
        loss = self._tokens * columns * self.practice.loss_bytes / 2
        forward = Work(product, memory=self.rates.moving_seconds(loss, 3))
        moved = self.rates.moving_seconds(loss + adding * columns * h, 3)
        tensor = self.rates.reduce_seconds(self._tokens * h * self.rates.element_bytes, self._tensor_group)
        return Passes(forward, Work(product + weights, memory=moved, tensor=tensor))

    # -------------------------------------------------------------------------------------------------- communication

    def _tensor_seconds(self) -> tuple[float, float]:
        """Two all-reduces of the layer's width in each direction.

        Under sequence parallelism each is a reduce-scatter and an all-gather, which move as much; backwards the inputs
        of two products are gathered once more for the gradients of their weights (Korthikanti et al. 2022,
        arXiv:2205.05198, section 4.2.2).
        """
        num_bytes = self._tokens * self.config.model.hidden_size * self.rates.element_bytes
        both = 2 * self.rates.reduce_seconds(num_bytes, self._tensor_group)
        again = 2 * self.rates.gather_seconds(num_bytes, self._tensor_group) if self.config.parallel.sequence else 0.0
        return both, both + again

    def _context_seconds(self) -> float:
        """Ulysses: queries, keys and values to whole sequences of some heads, and the result back.

        What is sent is put together and what comes is put in order: half of it is turned round, all of it copied twice.
        """
        model, parallel = self.config.model, self.config.parallel
        if parallel.context == 1:
            return 0.0
        group = Group.of(parallel.context, parallel.tensor, self.cluster)
        head_bytes = self._tokens * model.head_size / parallel.tensor * self.rates.element_bytes
        exchanged = [num * head_bytes for num in (model.num_heads, model.kv_heads, model.kv_heads, model.num_heads)]
        copies = self.rates.moving_seconds(_TRADING_PASSES * sum(exchanged), 3 * len(exchanged))
        return copies + sum(self.rates.exchange_seconds(num_bytes, group) for num_bytes in exchanged)

    def _pipeline_seconds(self, num: int) -> float:
        """A stage's messages, forward and backward, of every micro-batch and chunk; and those that bubbles wait for."""
        parallel = self.config.parallel
        steady = 0.0 if self.practice.hides_pipeline else 2 * num * parallel.virtual_pipeline * self.message_seconds
        return steady + 2 * (parallel.pipeline - 1) * self.message_seconds + self._shared_embedding_seconds()

    def _shared_embedding_seconds(self) -> float:
        """Once a step the first and the last stage sum the gradients of their copies of a tied embedding.

        Under ZeRO 3 each rank sums its part.
        """
        model, parallel = self.config.model, self.config.parallel
        if parallel.pipeline == 1 or not model.tied_embeddings:
            return 0.0
        split = parallel.tensor * (parallel.data * parallel.context if parallel.zero == 3 else 1)
        elements = model.padded_vocab_size * model.hidden_size / split
        pair = Group(2, 1 if self._stages_cross_nodes else 2)
        return self.rates.reduce_seconds(self.practice.reduced_bytes * elements, pair)

    @property
    def _stages_cross_nodes(self) -> bool:
        """Once a run takes more than one machine, the slowest of the messages between stages leave it."""
        return self.config.parallel.num_ranks > self.cluster.devices_per_node

    @cached_property
    def message_seconds(self) -> float:
        """A micro-batch's activations, or their gradients, from one stage to the next."""
        parallel = self.config.parallel
        if parallel.pipeline == 1:
            return 0.0
        whole = self._tokens * self.config.model.hidden_size * self.rates.element_bytes
        is_split = parallel.sequence or self.practice.splits_messages
        message = self.rates.send_seconds(whole / (parallel.tensor if is_split else 1), self._stages_cross_nodes)
        if is_split and not parallel.sequence:
            message += self.rates.gather_seconds(whole, self._tensor_group)
        return message

    @property
    def hidden_share(self) -> float | None:
        """Of what replicas send each other in a step: what computation hides; None where they send nothing."""
        slowest, _ = self.shared.get(self._slowest, "slowest", *self._computation_key)
        communication, beside = self._data_seconds(slowest, self.config.num_microbatches)
        return 1 - self._exposed(communication, beside) / communication if communication else None

    def _data_seconds(self, slowest: Passes, num: int) -> tuple[float, float]:
        """Adding up gradients, and weights to and from the ranks that own them; and for how long it may be hidden.

        ZeRO 1 and none: once a step, beside the last backward pass and the next first forward pass where it is hidden;
        beside those of p micro-batches when interleaved, as chunks are done one after the other.
        ZeRO 2 reduces gradients in every micro-batch; 3 scatters them, and gathers weights twice in each too. An
        all-reduce moves twice as much as a reduce-scatter.
        """
        parallel, e = self.config.parallel, self.rates.element_bytes
        group = Group.of(parallel.context * parallel.data, parallel.tensor, self.cluster)
        if group.size == 1:
            return 0.0, 0.0
        weights = self._most_weights
        scatter = self.rates.gather_seconds(self.practice.reduced_bytes * weights, group)
        gather = self.rates.gather_seconds(e * weights, group) if self.practice.shards_optimizer else 0.0
        reduce = scatter if self.practice.scatters_gradients else 2 * scatter
        one, together = slowest.seconds, parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        if parallel.zero == 3:
            all_of_it, beside = num * (scatter + 2 * gather), num * one
        elif parallel.zero == 2:
            all_of_it, beside = num * reduce + gather, num * one
        else:
            all_of_it, beside = reduce + gather, together * one
        return all_of_it, beside if self.practice.hides_data else 0.0

    def _optimizer_seconds(self) -> float:
        """Offloaded, gradients go to the machine (4 bytes) and weights come back (e)."""
        parallel = self.config.parallel
        share = parallel.data * parallel.context if self.practice.shards_optimizer else 1
        mine = self._most_weights / share
        if parallel.offload == "optimizer":
            return self.rates.offloaded_seconds(_OPTIMIZER_BYTES * mine, (4 + self.rates.element_bytes) * mine)
        return self.rates.moving_seconds(_OPTIMIZER_BYTES * mine, 10)

    @cached_property
    def _most_weights(self) -> int:
        """Of a rank of any stage: the first or the last has a matrix of the vocabulary besides its layers."""
        config, last = self.config, self.config.parallel.pipeline - 1
        return self.shared.get(
            lambda: max(plan.parameters_per_rank(config, stage) for stage in (0, last)),
            "weights",
            config.parallel.tensor,
            config.parallel.pipeline,
        )

    def _exposed(self, communication: float, beside: float) -> float:
        """What of it takes time although it may run beside so much computation."""
        return communication - self._constants.overlap_share * min(communication, beside)

    @property
    def _tensor_group(self) -> Group:
        return Group.of(self.config.parallel.tensor, 1, self.cluster)

    @property
    def _tokens(self) -> float:
        return self.config.train.micro_batch_size * self.config.model.seq_length / self.config.parallel.context
