"""The engine: megatron-core chunks inside one DeepSpeed ZeRO engine. The only file that imports deepspeed.

megatron-core's schedule calls forward and backward; DeepSpeed owns the gradients' reduction over data-parallel ranks,
clipping, the optimizer and its fp32 master weights. `fragments` opens that state to checkpoints and initialisation,
as boxes of global tensors, so that neither depends on the layout or the ZeRO stage.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from trainer import parallel
from trainer.config import RunConfig
from trainer.data import MicroBatch
from trainer.model.gpt import build_chunks
from trainer.model.init import initial_values
from trainer.model.sharding import Box, placements
from trainer.pipeline import StageView, run_schedule, sum_over_replicas
from trainer.training_state import FIRST_MOMENT, MASTER, SECOND_MOMENT, STATE_KINDS

if not torch.cuda._is_compiled() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is imported
import deepspeed
import deepspeed.ops
from deepspeed.utils import logger as deepspeed_logger

# Without these DeepSpeed would compile a C++ op (a minute) and log its whole config on every rank.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.ERROR)


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did."""

    loss: float
    """Mean nats per token over the global batch."""
    grad_norm: float
    """Global L2 norm before clipping."""
    num_tokens: int


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
        self.optimizer: Any = None

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        output = self.chunks[index](*args, **kwargs)
        if output.requires_grad:
            # DeepSpeed resets its per-backward state in its forward. Under 1F1B several backwards follow one forward,
            # so reset it as each backward begins; registered here, it runs before the engine's own output hook.
            output.register_hook(lambda _: self.optimizer.clear_backward_seen_flag())
        return output


class Engine:
    """Trains this rank's share of the model."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._chunks = build_chunks(config)
        self._root = _Chunks(self._chunks).to(device)
        self._placements = placements(self._chunks)
        self._mark_replicated_embedding()
        self._optimizer = torch.optim.AdamW(
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
        self._root.optimizer = self._zero
        self.stages = [
            StageView(chunk, lambda *args, _index=index, **kwargs: self._engine(_index, *args, **kwargs))
            for index, chunk in enumerate(self._chunks)
        ]

    # ------------------------------------------------------------------------------------------------------ training

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, step: int) -> StepStats:
        """One optimizer step over this replica's micro-batches; `step` (0-based) names the dropout streams."""
        self._root.train()
        if self.config.model.dropout > 0:
            parallel.seed_dropout(self.config.seed, step)
        for group in self._zero.param_groups:
            group["lr"] = lr
        total, count = run_schedule(self.stages, self.config.model, micro_batches, forward_only=False)
        self._finalize_gradients()
        self._engine.step()
        loss_sum, num_tokens = sum_over_replicas(total, count)
        return StepStats(loss_sum / num_tokens, float(self._engine.get_global_grad_norm()), num_tokens)

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
        group = parallel.embedding_group() if self.config.model.tied_embeddings else None
        if group is not None and parallel.pipeline_size() > 1:
            for chunk in self._chunks:
                if chunk.pre_process or chunk.post_process:
                    weight = chunk.shared_embedding_or_output_weight()
                    dist.all_reduce(_accumulated_gradient(weight), group=group)

    def _reduce_sequence_parallel_gradients_as_they_come(self) -> None:
        """ZeRO 2 and 3 reduce during backward, too early for `_finalize_gradients`."""

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=parallel.tensor_group())
            return gradient

        for parameter in self._root.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(summed)

    def _mark_replicated_embedding(self) -> None:
        """The last stage's copy of a tied embedding must not count twice in the gradient norm."""
        for chunk in self._chunks:
            if chunk.post_process and not chunk.pre_process and chunk.share_embeddings_and_output_weights:
                chunk.output_layer.weight.ds_pipe_replicated = True

    # --------------------------------------------------------------------------------------------------------- state

    def reset_state(self) -> None:
        """Weights as the seed has them, moments at zero."""
        self.prepare_state(0)
        for fragment in self.fragments():
            fragment.tensors[MASTER].copy_(initial_values(fragment.box, self.config.model, self.config.seed))
        self.refresh_weights()

    def prepare_state(self, step: int) -> None:
        """Allocate Adam's state (zeros) as after `step` steps, so that `fragments` can be filled."""
        for flat in self._master_buffers():
            self._zero.optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device),
                FIRST_MOMENT: torch.zeros_like(flat.data),
                SECOND_MOMENT: torch.zeros_like(flat.data),
            }
        if hasattr(self._zero, "_hp_optimizer_states_linked"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

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
        parameter: Any  # DeepSpeed hangs its own attributes on it
        if self.config.parallel.zero == 3:
            for parameter in self._placements:
                rank = self._zero._get_param_partition_rank(parameter)
                flats = {MASTER: self._zero.get_local_fp32_param(parameter)}
                flats |= {kind: self._zero.get_local_fp32_param(parameter, kind) for kind in STATE_KINDS[1:]}
                start = rank * flats[MASTER].numel()
                length = max(0, min(flats[MASTER].numel(), parameter.ds_numel - start))  # the last part is padded
                yield parameter, start, {kind: flat[:length] for kind, flat in flats.items()}
            return
        # Read the flat buffers themselves: with two parameter groups DeepSpeed links the moments of the second late.
        buffers = self._master_buffers()
        for parameter in self._placements:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it lies on other data-parallel ranks
                continue
            buffer, address = buffers[mapping.param_group_index], mapping.hp_fragment_address
            state = self._zero.optimizer.state[buffer]
            flats = {MASTER: buffer.data} | {kind: state[kind] for kind in STATE_KINDS[1:]}
            start = mapping.lp_fragment_address.start
            yield parameter, start, {k: flat.narrow(0, address.start, address.numel) for k, flat in flats.items()}

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
        "zero_optimization": {"stage": config.parallel.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "steps_per_print": 10**9,
    }
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
    gradient = getattr(parameter, "_hp_grad", None)
    gradient = parameter.grad if gradient is None else gradient
    assert gradient is not None, "no gradient was accumulated"
    return gradient
