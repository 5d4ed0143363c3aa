"""DeepSpeed ZeRO around this rank's chunks: gradients, clipping, optimizer, fp32 masters. The only import of deepspeed.

DeepSpeed was made for one backward per forward, of one model in one order, and for model-parallel ranks that hold
nothing in common. Under megatron-core's schedules none of this holds; what it takes differs between the ZeRO stages
and is done here: stage 1 leaves all gradients until the step, 2 and 3 reduce them while they come.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from trainer import parallel
from trainer.config import RunConfig
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.optimizer import GatedAdamW
from trainer.model.sharding import Placement

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


class Zero:
    """All chunks of this rank in one DeepSpeed engine."""

    def __init__(
        self, config: RunConfig, chunks: Sequence[GPTModel], placements: Mapping[torch.nn.Parameter, Placement]
    ) -> None:
        self._config = config
        self._shared_embedding = _find_shared_embedding(config, chunks)
        _count_copies_once(placements)
        self.module = _Chunks(chunks)
        self._adamw = GatedAdamW(self.module, config.optimizer)
        if config.parallel.sequence and config.parallel.zero > 1:
            self._sum_sequence_parallel_gradients_as_they_come()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self.optimizer: Any  # DeepSpeed's, around ours
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=self._adamw,
            config=deepspeed_config(config),
            mpu=parallel.DeepSpeedTopology(),
            dist_init_required=False,
        )
        self.module.register_forward_hook(self._renew_backward_state)
        if hasattr(self.optimizer, "get_grads_for_reduction"):
            self._engine.buffered_allreduce_fallback = self._average_flat_gradients
        if self._shared_embedding is not None and config.parallel.zero > 1:
            self._sum_shared_embedding_when_reduced()
        if config.parallel.zero == 3 and config.parallel.pipeline > 1:
            # To prefetch weights ZeRO-3 traces modules, and has all ranks agree on the order by broadcasts in forward.
            # Stages run different modules at different times and would deadlock: here modules fetch as they run.
            self.optimizer.parameter_offload.fwd_pre_hook.remove()
            self.optimizer._get_norm_groups = self._norm_of_everything

    # -------------------------------------------------------------------------------------------------------- a step

    def begin_step(self) -> None:
        """DeepSpeed overwrites the last step's gradients in a step's first backward alone, which is of one chunk."""
        if len(self.module.chunks) == 1:
            return
        if self._config.parallel.zero == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        elif self._config.parallel.offload == "optimizer":
            for gradient in self.optimizer.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        """The forward pass of one chunk; backward on what it returns accumulates gradients."""
        return self._engine(index, *args, **kwargs)

    def finalize_gradients(self) -> None:
        """Model-parallel sums of the accumulated gradients, before DeepSpeed's reduction over data-parallel ranks."""
        if self._config.parallel.zero > 1:
            return  # they were reduced during backward
        if self._config.parallel.sequence:
            partial = [_accumulated_gradient(parameter) for parameter in self._sequence_parallel_parameters()]
            flat = _flatten_dense_tensors(partial)
            dist.all_reduce(flat, group=parallel.tensor_group())
            for gradient, summed in zip(partial, _unflatten_dense_tensors(flat, partial), strict=True):
                gradient.copy_(summed)
        if self._shared_embedding is not None:
            dist.all_reduce(_accumulated_gradient(self._shared_embedding), group=parallel.embedding_group())

    def update(self, lr: float, accept: Callable[[float], bool]) -> tuple[bool, float]:
        """Reduce and clip the gradients, and update the weights if `accept` agrees to their norm.

        Returns:
            Whether the weights were updated, and the norm before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._adamw.open(lambda: accept(float(self.optimizer._global_grad_norm)))
        self._engine.step()
        if not self._adamw.updated:
            self._drop_gradients()
        return bool(self._adamw.updated), float(self._engine.get_global_grad_norm())

    def _drop_gradients(self) -> None:
        """What DeepSpeed leaves behind, and would add to, when the norm of an offloaded optimizer is not finite."""
        if self._config.parallel.offload == "optimizer" and self._config.parallel.zero < 3:
            self.optimizer.averaged_gradients.clear()

    # --------------------------------------------------------------------------------------------------------- hooks

    def _renew_backward_state(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        """A forward hook: let each backward find DeepSpeed's state as one forward leaves it.

        DeepSpeed resets it in forward, but under 1F1B several backwards follow one forward. The output is the one
        that DeepSpeed is about to register its own hook on, so this one runs before it.
        """
        if not output.requires_grad:
            return
        # ZeRO-3 releases a module's weights once gradients of so many of its inputs have come
        num_inputs = {m: m.ds_grads_remaining for m in module.modules() if hasattr(m, "ds_grads_remaining")}

        def renew(_: Tensor) -> None:
            self.optimizer.clear_backward_seen_flag()
            for part, count in num_inputs.items():
                part.ds_grads_remaining = count

        output.register_hook(renew)

    def _average_flat_gradients(self, **_: Any) -> None:
        """bf16 ZeRO 1, over replicas and in place; DeepSpeed would copy all gradients to another buffer and back."""
        if (num_replicas := parallel.data_group().size()) > 1:
            for flat in self.optimizer.get_grads_for_reduction()[0]:
                dist.all_reduce(flat, group=parallel.data_group())
                flat.div_(num_replicas)

    def _norm_of_everything(self) -> list[Tensor]:
        """ZeRO-3, in one sum over all ranks.

        DeepSpeed cuts the parameters of a rank into parts of a billion elements, and sums part by part over all ranks,
        which would wait for each other for ever: stages have not equally many.
        """
        parts = self.optimizer.fp16_groups
        parameters = [parameter for part in parts for parameter in part]
        if self._config.parallel.offload == "optimizer":
            return [self.optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters)]
        gradients = [gradient for index in range(len(parts)) for gradient in self.optimizer.averaged_gradients[index]]
        return [self.optimizer.get_grad_norm_direct(gradients, parameters)]

    def _sequence_parallel_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.module.parameters() if getattr(p, "sequence_parallel", False)]

    def _sum_sequence_parallel_gradients_as_they_come(self) -> None:
        """ZeRO 2 and 3 reduce during backward, too early for `finalize_gradients`."""

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=parallel.tensor_group())
            return gradient

        for parameter in self._sequence_parallel_parameters():
            parameter.register_hook(summed)

    def _sum_shared_embedding_when_reduced(self) -> None:
        """ZeRO 2 and 3 reduce during backward, and hand out whole gradients only once DeepSpeed has finalized them."""
        finalize = self.optimizer.finalize_gradient_accumulation_boundary

        def finalize_and_sum() -> None:
            finalize()
            weight, group = self._shared_embedding, parallel.embedding_group()
            if self._config.parallel.zero == 3:  # every part of one stage's copy has its like on the other stage
                part = safe_get_local_grad(weight)
                dist.all_reduce(part, group=group)
                safe_set_local_grad(weight, part)
                return
            whole = safe_get_full_grad(weight)
            dist.all_reduce(whole, group=group)
            safe_set_full_grad(weight, whole)
            if self._config.parallel.offload == "optimizer" and weight._hp_mapping is not None:
                # finalizing has taken the norm of what is offloaded, too early
                part = weight._hp_mapping.get_lp_grad_fragment(weight._index_in_param_group)
                self.optimizer.norm_for_param_grads[self.optimizer.get_param_id(weight)] = part.norm()

        self.optimizer.finalize_gradient_accumulation_boundary = finalize_and_sum


class _Chunks(torch.nn.Module):
    """One module for DeepSpeed that owns all chunks of this rank."""

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.chunks[index](*args, **kwargs)
        return output


def _find_shared_embedding(config: RunConfig, chunks: Sequence[GPTModel]) -> Any:  # DeepSpeed hangs attributes on it
    """This rank's copy of the matrix that the first and the last pipeline stage share; None if it has none."""
    if not config.model.tied_embeddings or config.parallel.pipeline == 1:
        return None
    ends = (chunk for chunk in chunks if chunk.pre_process or chunk.post_process)
    return next((chunk.shared_embedding_or_output_weight() for chunk in ends), None)


def _count_copies_once(placements: Mapping[torch.nn.Parameter, Placement]) -> None:
    """Of a parameter that several model-parallel ranks hold, one copy counts in the gradient norm."""
    parameter: Any  # DeepSpeed reads these marks; ZeRO-3 knows the second alone
    for parameter, placement in placements.items():
        parameter.ds_pipe_replicated = not placement.is_main
        parameter.tensor_model_parallel = placement.is_main


def _accumulated_gradient(parameter: Tensor) -> Tensor:
    """Where DeepSpeed ZeRO 1 accumulates: in fp32 beside a bf16 parameter, else in the parameter's own grad."""
    names = ("_hp_grad", "grad_accum", "grad")  # the second is the first's name under offload of the optimizer
    gradient = next((found for name in names if (found := getattr(parameter, name, None)) is not None), None)
    assert gradient is not None, "no gradient was accumulated"
    return gradient
