"""What a Hugging Face class is to us: the models it can hold, and where each of its tensors lies in our global ones.

A family is a table. A row says which elements of a global tensor are the elements of one of theirs, as a view of ours
(`trainer.checkpoint.huggingface.families.views`): reading through it exports, and writing through it imports.

Shapes: L layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from trainer.checkpoint.huggingface.families.shapes import Shape, shape_of
from trainer.checkpoint.huggingface.families.views import View, vocabulary, whole
from trainer.checkpoint.huggingface.rounding import Scaling
from trainer.config import ModelConfig


@dataclass(frozen=True)
class Requirement:
    """What a model must be like; `field` and `wanted` are the setting that would make it so."""

    field: str
    wanted: str
    is_met: Callable[[ModelConfig], bool]


def field_is(field: str, wanted: str | None) -> Requirement:
    return Requirement(field, wanted or "null", lambda model: getattr(model, field) == wanted)


GELU_TANH = {"gelu_pytorch_tanh": "gelu_new"}
"""GELU by its tanh approximation has two names; they compute the same formula."""

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
class Part:
    """One of their tensors."""

    name: str
    shape: Shape
    row: Row

    def scaling(self, model: ModelConfig) -> Scaling | None:
        """How its numbers differ from ours; None where they are the same."""
        return None if self.row.divisor is None else Scaling(self.row.divisor(model))

    def is_rounded(self, model: ModelConfig) -> bool:
        scaling = self.scaling(model)
        return scaling is not None and not scaling.is_exact

    def read(self, ours: Tensor, model: ModelConfig) -> Tensor:
        """Its elements in ours, before they are divided."""
        return self.row.view(ours, model).reshape(self.shape)

    def fill(self, ours: Tensor, model: ModelConfig, values: Tensor) -> None:
        """Put its elements, multiplied, into ours."""
        view = self.row.view(ours, model)
        view.copy_(values.view(view.shape))


@dataclass(frozen=True)
class Slab:
    """One of our global tensors, or one layer of those that stack all layers, and theirs that lie in it."""

    ours: str
    layer: int | None
    parts: tuple[Part, ...]

    def shape(self, model: ModelConfig) -> Shape:
        return shape_of(self.ours, model)


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
    model: Callable[[Any], dict[str, Any]]
    """The model of one of its configs, as far as our settings can say it."""
    immaterial: frozenset[str] = frozenset()
    """Fields of the class's config that change nothing of what a model computes, beside those of every class."""
    synonyms: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Field -> value -> the one that we write and that means the same."""

    def unmet(self, model: ModelConfig) -> list[Requirement]:
        return [requirement for requirement in self.requirements if not requirement.is_met(model)]

    def slabs(self, model: ModelConfig, shapes: Mapping[str, Shape]) -> list[Slab]:
        """Where the tensors of this model lie.

        Args:
            shapes: of every parameter that the class has for this model, by name.
        """
        slabs = list(self._slabs(model, shapes))
        unpaired = shapes.keys() ^ {part.name for slab in slabs for part in slab.parts}
        assert not unpaired, f"the table of {self.architecture} differs from the class: {sorted(unpaired)}"
        return slabs

    def _slabs(self, model: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[Slab]:
        for ours, group in groupby(self.rows, key=lambda row: row.ours):
            if ours == _OUTPUT_LAYER and model.tied_embeddings:
                continue
            rows = list(group)
            is_stacked = "{layer}" in rows[0].theirs
            for layer in range(model.num_layers) if is_stacked else [None]:
                named = [(row.theirs.format(layer=layer), row) for row in rows]
                yield Slab(ours, layer, tuple(Part(name, shapes.get(name, ()), row) for name, row in named))
