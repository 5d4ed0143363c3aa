"""The training state: the flat buffers in which DeepSpeed ZeRO keeps it, seen as boxes of global tensors.

Checkpoints and initialisation read and fill `TrainingState.fragments`, so that neither depends on the layout or the
ZeRO stage. What DeepSpeed names differently from stage to stage is known here alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.config import RunConfig
from trainer.model.init import initial_values
from trainer.model.sharding import Box, Placement
from trainer.training_state import FIRST_MOMENT, MASTER, SECOND_MOMENT, STATE_KINDS


@dataclass(frozen=True)
class Fragment:
    """A block of this rank's share of the training state; `tensors` are views, of shape box.shape, to read or fill."""

    box: Box
    is_main: bool
    """False where another model-parallel rank holds a copy and speaks for it."""
    tensors: dict[str, Tensor]
    """fp32, by state kind: master weights and Adam's two moments."""


class TrainingState:
    """This rank's share of master weights and moments."""

    def __init__(self, config: RunConfig, zero: Any, placements: Mapping[torch.nn.Parameter, Placement]) -> None:
        """`zero` is DeepSpeed's optimizer around ours."""
        self._config = config
        self._zero = zero
        self._placements = placements

    def reset(self) -> None:
        """Weights as the seed has them, moments at zero."""
        self.prepare(0)
        for fragment in self.fragments():
            fragment.tensors[MASTER].copy_(initial_values(fragment.box, self._config.model, self._config.seed))
        self.refresh_weights()

    def prepare(self, num_updates: int) -> None:
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
        if self._config.parallel.zero < 3:
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
        if self._config.parallel.zero == 3:
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
