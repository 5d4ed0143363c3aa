"""The engine: megatron-core chunks inside one DeepSpeed ZeRO engine. The only file that imports deepspeed.

megatron-core's schedule calls forward and backward; DeepSpeed owns the gradients' reduction over data-parallel ranks,
clipping, the optimizer and its fp32 master weights. `fragments` opens that state to checkpoints and initialisation,
as boxes of global tensors, so that neither depends on the layout or the ZeRO stage.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from trainer import parallel
from trainer.config import RunConfig
from trainer.data.batches import MicroBatch
from trainer.model.gpt import build_chunks
from trainer.model.init import initial_values
from trainer.model.sharding import Box, placements
from trainer.pipeline import StageView, run_schedule, sum_over_replicas
from trainer.training_state import FIRST_MOMENT, MASTER, SECOND_MOMENT, STATE_KINDS

if not torch.cuda._is_compiled() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is imported
import deepspeed
import deepspeed.ops
import deepspeed.runtime.bf16_optimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

# Without these DeepSpeed would compile a C++ op (a minute), log its whole config on every rank, and collect garbage to
# print how much memory is in use (a second).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.ERROR)
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


REDUCE_BUCKET_ELEMENTS = 40_000_000  # gradients that travel together; DeepSpeed's default holds 2 GB for them

Accept = Callable[[float, float], bool]
"""Whether a step with this loss and this gradient norm may update the weights. The same answer on every rank."""


@dataclass(frozen=True)
class StepStats:
    """What one step did."""

    loss: float
    """Mean nats per token over the global batch."""
    grad_norm: float
    """Global L2 norm before clipping; infinite where a gradient is not finite."""
    num_tokens: int
    updated: bool
    """Whether the weights were updated."""


@dataclass(frozen=True)
class Fragment:
    """A block of this rank's share of the training state; `tensors` are views, of shape box.shape, to read or fill."""

    box: Box
    is_main: bool
    """False where another model-parallel rank holds a copy and speaks for it."""
    tensors: dict[str, Tensor]
    """fp32, by state kind: master weights and Adam's two moments."""


class _Chunks(torch.nn.Module):
    """One module for DeepSpeed that owns all chunks of this rank."""

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.chunks[index](*args, **kwargs)
        return output


class _GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates.

    All of DeepSpeed's optimizers call it last, with the gradient norm known. A refused step goes their usual way, so
    that gradients are reduced and cleared as ever, and the weights are derived anew from unchanged master weights.
    """

    updated: bool | None
    """In this step; None until DeepSpeed calls, once for every group. It need not when the norm is not finite."""
    may_update: Callable[[], bool]

    def open(self, may_update: Callable[[], bool]) -> None:
        """Begin a step; `may_update` is asked once."""
        self.updated, self.may_update = None, may_update

    def step(self, closure: Any = None) -> Any:
        if self.updated is None:
            self.updated = self.may_update()
        return super().step(closure) if self.updated else None


class Engine:
    """Trains this rank's share of the model."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._chunks = build_chunks(config)
        self._root = _Chunks(self._chunks).to(device)
        self._placements = placements(self._chunks)
        self._shared_embedding = self._find_shared_embedding()
        self._count_copies_once()
        self._optimizer = _GatedAdamW(
            _parameter_groups(self._root, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            fused=True,
        )
        if config.parallel.sequence and config.parallel.zero > 1:
            self._reduce_sequence_parallel_gradients_as_they_come()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=self._root,
            optimizer=self._optimizer,
            config=deepspeed_config(config),
            mpu=parallel.DeepSpeedTopology(),
            dist_init_required=False,
        )
        self._root.register_forward_hook(self._renew_backward_state)
        if hasattr(self._zero, "get_grads_for_reduction"):
            self._engine.buffered_allreduce_fallback = self._average_flat_gradients
        if self._shared_embedding is not None and config.parallel.zero > 1:
            self._sum_shared_embedding_when_reduced()
        if config.parallel.zero == 3 and config.parallel.pipeline > 1:
            # To prefetch weights ZeRO-3 traces modules, and has all ranks agree on the order by broadcasts in forward.
            # Stages run different modules at different times and would deadlock: here modules fetch as they run.
            self._zero.parameter_offload.fwd_pre_hook.remove()
        self.stages = [
            StageView(chunk, lambda *args, _index=index, **kwargs: self._engine(_index, *args, **kwargs))
            for index, chunk in enumerate(self._chunks)
        ]

    # ------------------------------------------------------------------------------------------------------ training

    def train_step(
        self, micro_batches: Sequence[MicroBatch], lr: float, step: int, accept: Accept = lambda loss, grad_norm: True
    ) -> StepStats:
        """One step over this replica's micro-batches; `step` (0-based) names the dropout streams.

        Unless loss and gradients are finite and `accept` agrees, the step leaves the training state as it was.
        """
        self._root.train()
        if self.config.model.dropout > 0:
            parallel.seed_dropout(self.config.seed, step)
        for group in self._zero.param_groups:
            group["lr"] = lr
        if len(self._chunks) > 1:
            self._clear_partitioned_gradients()
        total, count = run_schedule(self.stages, self.config.model, micro_batches, forward_only=False)
        self._finalize_gradients()
        loss_sum, num_tokens = sum_over_replicas(total, count)
        loss = loss_sum / num_tokens

        def may_update() -> bool:
            grad_norm = float(self._zero._global_grad_norm)
            return math.isfinite(loss) and math.isfinite(grad_norm) and accept(loss, grad_norm)

        self._optimizer.open(may_update)
        self._engine.step()
        if not self._optimizer.updated:
            self._drop_gradients()
        return StepStats(loss, float(self._engine.get_global_grad_norm()), num_tokens, bool(self._optimizer.updated))

    def _drop_gradients(self) -> None:
        """What DeepSpeed leaves behind, and would add to, when the norm of an offloaded optimizer is not finite."""
        if self.config.parallel.offload == "optimizer" and self.config.parallel.zero < 3:
            self._zero.averaged_gradients.clear()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Sum of token losses (nats) and number of tokens over all replicas; the same on every rank."""
        self._root.eval()
        return sum_over_replicas(*run_schedule(self.stages, self.config.model, micro_batches, forward_only=True))

    def _finalize_gradients(self) -> None:
        """Model-parallel sums of the accumulated gradients, before DeepSpeed's reduction over data-parallel ranks."""
        if self.config.parallel.sequence and self.config.parallel.zero == 1:
            partial = [
                _accumulated_gradient(parameter)
                for parameter in self._root.parameters()
                if getattr(parameter, "sequence_parallel", False)
            ]
            flat = _flatten_dense_tensors(partial)
            dist.all_reduce(flat, group=parallel.tensor_group())
            for gradient, summed in zip(partial, _unflatten_dense_tensors(flat, partial), strict=True):
                gradient.copy_(summed)
        if self._shared_embedding is not None and self.config.parallel.zero == 1:
            dist.all_reduce(_accumulated_gradient(self._shared_embedding), group=parallel.embedding_group())

    def _average_flat_gradients(self, **_: Any) -> None:
        """bf16 ZeRO 1, over replicas and in place; DeepSpeed would copy all gradients to another buffer and back."""
        if (num_replicas := parallel.data_group().size()) > 1:
            for flat in self._zero.get_grads_for_reduction()[0]:
                dist.all_reduce(flat, group=parallel.data_group())
                flat.div_(num_replicas)

    def _clear_partitioned_gradients(self) -> None:
        """DeepSpeed overwrites the last step's gradients in a step's first backward alone, which is of one chunk."""
        if self.config.parallel.zero == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        elif self.config.parallel.offload == "optimizer":
            for gradient in self._zero.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def _reduce_sequence_parallel_gradients_as_they_come(self) -> None:
        """ZeRO 2 and 3 reduce during backward, too early for `_finalize_gradients`."""

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=parallel.tensor_group())
            return gradient

        for parameter in self._root.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(summed)

    def _sum_shared_embedding_when_reduced(self) -> None:
        """ZeRO 2 and 3 reduce during backward, and hand out whole gradients only once DeepSpeed has finalized them."""
        finalize = self._zero.finalize_gradient_accumulation_boundary

        def finalize_and_sum() -> None:
            finalize()
            weight, group = self._shared_embedding, parallel.embedding_group()
            if self.config.parallel.zero == 3:  # every part of one stage's copy has its like on the other stage
                part = safe_get_local_grad(weight)
                dist.all_reduce(part, group=group)
                safe_set_local_grad(weight, part)
                return
            whole = safe_get_full_grad(weight)
            dist.all_reduce(whole, group=group)
            safe_set_full_grad(weight, whole)
            if self.config.parallel.offload == "optimizer" and weight._hp_mapping is not None:
                # finalizing has taken the norm of what is offloaded, too early
                part = weight._hp_mapping.get_lp_grad_fragment(weight._index_in_param_group)
                self._zero.norm_for_param_grads[self._zero.get_param_id(weight)] = part.norm()

        self._zero.finalize_gradient_accumulation_boundary = finalize_and_sum

    def _renew_backward_state(self, root: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        """A forward hook: let each backward find DeepSpeed's state as one forward leaves it.

        DeepSpeed resets it in forward, but under 1F1B several backwards follow one forward. The output is the one
        that DeepSpeed is about to register its own hook on, so this one runs before it.
        """
        if not output.requires_grad:
            return
        # ZeRO-3 releases a module's weights once gradients of so many of its inputs have come
        num_inputs = {m: m.ds_grads_remaining for m in root.modules() if hasattr(m, "ds_grads_remaining")}

        def renew(_: Tensor) -> None:
            self._zero.clear_backward_seen_flag()
            for module, count in num_inputs.items():
                module.ds_grads_remaining = count

        output.register_hook(renew)

    def _find_shared_embedding(self) -> Any:  # a parameter or None; DeepSpeed hangs its own attributes on it
        """This rank's copy of the matrix that the first and the last pipeline stage share, if it has one."""
        if not self.config.model.tied_embeddings or parallel.pipeline_size() == 1:
            return None
        ends = (chunk for chunk in self._chunks if chunk.pre_process or chunk.post_process)
        return next((chunk.shared_embedding_or_output_weight() for chunk in ends), None)

    def _count_copies_once(self) -> None:
        """Of a parameter that several model-parallel ranks hold, one copy counts in the gradient norm."""
        parameter: Any  # DeepSpeed reads these marks; ZeRO-3 knows the second alone
        for parameter, placement in self._placements.items():
            parameter.ds_pipe_replicated = not placement.is_main
            parameter.tensor_model_parallel = placement.is_main

    # --------------------------------------------------------------------------------------------------------- state

    def reset_state(self) -> None:
        """Weights as the seed has them, moments at zero."""
        self.prepare_state(0)
        for fragment in self.fragments():
            fragment.tensors[MASTER].copy_(initial_values(fragment.box, self.config.model, self.config.seed))
        self.refresh_weights()

    def prepare_state(self, num_updates: int) -> None:
        """Bring Adam's state to zeros, as after `num_updates` updates, so that `fragments` can be filled."""
        for flat in self._master_buffers():
            state = self._zero.optimizer.state[flat]
            for kind in (FIRST_MOMENT, SECOND_MOMENT):  # in place after the first time: two copies may not fit
                state[kind] = state[kind].zero_() if kind in state else torch.zeros_like(flat.data)
            state["step"] = torch.tensor(float(num_updates), device=flat.device)
        if hasattr(self._zero, "_hp_optimizer_states_linked"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def num_updates(self) -> int:
        """Updates that the weights have seen, as Adam counts them."""
        return int(self._zero.optimizer.state[self._master_buffers()[0]]["step"])

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the training state. No communication; call `refresh_weights` after filling it."""
        for parameter, start, tensors in self._flat_fragments():
            placement = self._placements[parameter]
            length = tensors[MASTER].numel()
            for whole in placement.boxes:
                for box in whole.cut(start, start + length):
                    views = {
                        kind: flat.detach().narrow(0, box.flat_start - start, box.numel).view(box.shape)
                        for kind, flat in tensors.items()
                    }
                    yield Fragment(box, placement.is_main, views)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Derive the weights that forward uses from the master weights."""
        if self.config.parallel.zero < 3:
            self._zero.update_lp_params()
            return
        parameter: Any  # DeepSpeed hangs its own attributes on it
        for parameter, _, tensors in self._flat_fragments():
            parameter.ds_tensor.data[: tensors[MASTER].numel()].copy_(tensors[MASTER])
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _flat_fragments(self) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, Tensor]]]:
        """(parameter, first flat element this rank keeps of it, 1-d views of its master weights and moments)."""
        # Views of the flat buffers themselves: with two parameter groups DeepSpeed links the moments of the second
        # late, and its readers copy what is offloaded.
        buffers = self._master_buffers()
        for parameter in self._placements:
            address = self._address(parameter)
            if address is None:
                continue
            index, offset, start, length = address
            state = self._zero.optimizer.state[buffers[index]]
            flats = {MASTER: buffers[index].data} | {kind: state[kind] for kind in STATE_KINDS[1:]}
            yield parameter, start, {kind: flat.narrow(0, offset, length) for kind, flat in flats.items()}

    def _address(self, parameter: Any) -> tuple[int, int, int, int] | None:
        """(index of the master buffer, offset in it, first flat element of the parameter, length) of this rank's part.

        None where all of it lies on other data-parallel ranks.
        """
        if self.config.parallel.zero == 3:
            index, offset, padded_length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self._zero._get_param_partition_rank(parameter) * padded_length
            return index, offset, start, max(0, min(padded_length, parameter.ds_numel - start))
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        kept, source = mapping.hp_fragment_address, mapping.lp_fragment_address
        return mapping.param_group_index, kept.start, source.start, kept.numel

    def _master_buffers(self) -> list[Tensor]:
        """This rank's flat fp32 master weights, one per parameter group; each ZeRO stage names them its own way."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(getattr(self._zero, name) for name in names if getattr(self._zero, name, None))


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for this run. Accumulation is left to megatron-core's schedule."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": config.parallel.zero, "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "steps_per_print": 10**9,
    }
    if config.parallel.offload == "optimizer":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases and norms are not."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _accumulated_gradient(parameter: Tensor) -> Tensor:
    """Where DeepSpeed ZeRO 1 accumulates: in fp32 beside a bf16 parameter, else in the parameter's own grad."""
    names = ("_hp_grad", "grad_accum", "grad")  # the second is the first's name under offload of the optimizer
    gradient = next((found for name in names if (found := getattr(parameter, name, None)) is not None), None)
    assert gradient is not None, "no gradient was accumulated"
    return gradient
