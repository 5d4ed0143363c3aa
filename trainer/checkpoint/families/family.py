"""What a Hugging Face class is to us: the models it can hold, and where each of its tensors lies in our global ones.

A family is a table. A row says which elements of a global tensor are the elements of one of theirs, as a view of ours
(`trainer.checkpoint.families.views`): reading through it exports, and writing through it would import.

Shapes: L layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from trainer.checkpoint.families.views import View, vocabulary, whole
from trainer.checkpoint.safetensors_stream import StreamedTensor
from trainer.config import ModelConfig


@dataclass(frozen=True)
class Requirement:
    """What a model must be like; `field` and `wanted` are the setting that would make it so."""

    field: str
    wanted: str
    is_met: Callable[[ModelConfig], bool]


def field_is(field: str, wanted: str | None) -> Requirement:
    return Requirement(field, wanted or "null", lambda model: getattr(model, field) == wanted)


KEYS_FOR_EVERY_HEAD = Requirement("num_kv_heads", "null", lambda model: model.kv_heads == model.num_heads)


@dataclass(frozen=True)
class Row:
    """One of their tensors, or one per layer where the names say so."""

    ours: str
    """Name of the global tensor; `decoder.layers.` begins those that stack all layers: [L, ...]."""
    theirs: str
    """Name of the tensor; {layer} stands for the layer's number."""
    view: View = whole
    divisor: Callable[[ModelConfig], float] | None = None
    """Theirs are ours divided by this."""


def weight_and_bias(ours: str, theirs: str, weight_view: View = whole) -> tuple[Row, Row]:
    return Row(f"{ours}.weight", f"{theirs}.weight", weight_view), Row(f"{ours}.bias", f"{theirs}.bias")


def head_row(theirs: str) -> Row:
    """The output layer, which a model with tied embeddings has not."""
    return Row(_OUTPUT_LAYER, theirs, vocabulary)


_OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class Family:
    """One class of `transformers`."""

    architecture: str
    """Name of the class."""
    requirements: tuple[Requirement, ...]
    rows: tuple[Row, ...]
    """Those of one global tensor stand together: it is then read once."""
    config: Callable[[ModelConfig], dict[str, Any]]
    """The arguments of the class's config that differ from family to family."""

    def unmet(self, model: ModelConfig) -> list[Requirement]:
        return [requirement for requirement in self.requirements if not requirement.is_met(model)]

    def tensors(self, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[StreamedTensor]:
        """The tensors of this model, as they are read from the global ones.

        Args:
            shapes: of every parameter that the class has for this model, by name.
        """
        named = list(self._named(model))
        unpaired = shapes.keys() ^ {name for name, _, _ in named}
        assert not unpaired, f"the table of {self.architecture} differs from the class: {sorted(unpaired)}"
        return [
            StreamedTensor(name, shapes[name], row.ours, partial(_read, row, model, layer, shapes[name]))
            for name, row, layer in named
        ]

    def _named(self, model: ModelConfig) -> Iterator[tuple[str, Row, int | None]]:
        """(name, row, layer)"""
        for row in self.rows:
            if row.ours == _OUTPUT_LAYER and model.tied_embeddings:
                continue
            if "{layer}" not in row.theirs:
                yield row.theirs, row, None
                continue
            for layer in range(model.num_layers):
                yield row.theirs.format(layer=layer), row, layer


def _read(row: Row, model: ModelConfig, layer: int | None, shape: tuple[int, ...], source: Tensor) -> Tensor:
    values = row.view(source if layer is None else source[layer], model).reshape(shape)
    return values if row.divisor is None else values / row.divisor(model)
