"""Every published size, built as the real megatron-core model: on the meta device, so that 175B takes no memory."""

from math import prod

import pytest
import torch

from ranks import run_on_ranks
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.model.gpt import build_chunks
from trainer.plan import num_parameters
from trainer.presets import PRESETS

Shapes = dict[str, tuple[int, ...]]


def build_all(_: RunConfig, device: torch.device) -> dict[str, tuple[Shapes, bool]]:
    """By preset: the shape of every parameter, and whether all lie on the meta device."""
    built = {}
    for name in PRESETS:
        with torch.device("meta"):
            (chunk,) = build_chunks(from_tree({"preset": name}))
        parameters = dict(chunk.named_parameters())
        shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
        built[name] = shapes, all(parameter.is_meta for parameter in parameters.values())
    return built


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[Shapes, bool]]:
    (result,) = run_on_ranks(RunConfig(), build_all)
    return result


@pytest.mark.parametrize("name", PRESETS)
def test_megatron_builds_exactly_the_parameters_that_are_counted(
    name: str, built: dict[str, tuple[Shapes, bool]]
) -> None:
    shapes, all_on_meta = built[name]
    assert all_on_meta
    model = from_tree({"preset": name}).model
    assert sum(prod(shape) for shape in shapes.values()) == num_parameters(model, padded=True)
    assert shapes["embedding.word_embeddings.weight"] == (model.padded_vocab_size, model.hidden_size)
    layers = {int(key.split(".")[2]) for key in shapes if key.startswith("decoder.layers.")}
    assert layers == set(range(model.num_layers))


def test_llamas_have_the_parameters_of_the_released_weights(built: dict[str, tuple[Shapes, bool]]) -> None:
    """Their vocabularies, 32,000 and 128,256, need no padding."""
    counts = {name: sum(prod(shape) for shape in built[name][0].values()) for name in ("llama2_7b", "llama3_8b")}
    assert counts == {"llama2_7b": 6_738_415_616, "llama3_8b": 8_030_261_248}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_exported(name: str) -> None:
    classes = {"gpt1": "OpenAIGPTLMHeadModel", "gpt2": "GPT2LMHeadModel", "gpt3": "GPTNeoForCausalLM"}
    expected = classes.get(name.partition("_")[0], "LlamaForCausalLM")
    assert family_of(from_tree({"preset": name}).model).architecture == expected
