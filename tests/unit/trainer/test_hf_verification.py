"""Verifying an export that is too large to be opened beside the trained model: by bits, and by a few layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor

from parity import reference_of
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.huggingface import export
from trainer.checkpoint.huggingface.abridgement import abridge, kept_layers
from trainer.checkpoint.huggingface.verification import ExportMismatch, check_logits, check_tensors
from trainer.config import RunConfig
from trainer.config_file import from_tree
from weights import write_checkpoint

SIZES = {"num_layers": 10, "hidden_size": 48, "num_heads": 6, "vocab_size": 90, "seq_length": 20}
GPT_NEO = {"biases": "all_but_qkv", "attention_window": 7}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "biases": "none", "tied_embeddings": False}
Made = tuple[RunConfig, Path, Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "word": 1}, unk_token="word")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Callable[..., Made]:
    """A config, a checkpoint of random weights, and its export."""

    def made(changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Made:
        config, out = from_tree({"model": SIZES | changes}), tmp_path / "export"
        reference = reference_of(config.model)
        reference.randomize(seed=2)
        checkpoint = write_checkpoint(tmp_path / "checkpoints", config, reference.global_tensors())
        temporary = export.export_model(checkpoint, config, tokenizer, out, {}, dtype=dtype, max_shard_bytes=100_000)
        export.commit(temporary, out)
        return config, checkpoint, out

    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [{}, GPT_NEO, LLAMA], ids=["GPT-2", "GPT-Neo", "Llama"])
def test_an_export_is_the_checkpoint_bit_for_bit(
    model: dict[str, Any], dtype: torch.dtype, make: Callable[..., Made]
) -> None:
    config, checkpoint, folder = make(model, dtype)
    found = check_tensors(folder, checkpoint, config.model, dtype, seed=1, sample=None)
    names = {name for path in folder.glob("model*.safetensors") for name in load_file(path)}
    assert found.num_tensors == found.of_tensors == len(names)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(ExportMismatch, match="is not what the checkpoint holds"):
        check_tensors(folder, checkpoint, config.model, other, seed=1, sample=None)


def flip_bit(path: Path, tensor: str) -> None:
    """The lowest of a tensor's last number."""
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    content = bytearray(path.read_bytes())
    end = json.loads(content[8 : 8 + header_bytes])[tensor]["data_offsets"][1]
    content[8 + header_bytes + end - 4] ^= 1
    path.write_bytes(content)


def file_of(folder: Path, tensor: str) -> Path:
    for path in [*folder.glob("model*.safetensors"), *folder.glob("rank*.safetensors")]:
        with safe_open(path, framework="pt") as handle:
            if tensor in handle.keys():  # noqa: SIM118  (not a dict)
                return path
    raise AssertionError(tensor)


def test_a_flipped_bit_is_found_on_either_side(make: Callable[..., Made]) -> None:
    config, checkpoint, folder = make(GPT_NEO)
    tensor = "transformer.h.7.attn.attention.q_proj.weight"
    flip_bit(file_of(folder, tensor), tensor)
    with pytest.raises(ExportMismatch, match=r"transformer\.h\.7\.attn\.attention\.q_proj\.weight of the export"):
        check_tensors(folder, checkpoint, config.model, torch.float32, seed=1, sample=None)
    flip_bit(file_of(folder, tensor), tensor)
    block = "master/decoder.layers.mlp.linear_fc2.weight[3:4,0:48,0:192]"
    flip_bit(file_of(checkpoint, block), block)
    with pytest.raises(ExportMismatch, match=r"transformer\.h\.3\.mlp\.c_proj\.weight of the export"):
        check_tensors(folder, checkpoint, config.model, torch.float32, seed=1, sample=None)


def test_a_sample_has_what_is_of_no_layer_and_others_by_the_seed(make: Callable[..., Made]) -> None:
    config, checkpoint, folder = make({})
    tensor = "transformer.ln_f.bias"
    found = check_tensors(folder, checkpoint, config.model, torch.float32, seed=1, sample=5)
    assert (found.num_tensors, found.of_tensors) == (4 + 5, 4 + 10 * 12)
    flip_bit(file_of(folder, "transformer.h.4.ln_1.weight"), "transformer.h.4.ln_1.weight")
    outcomes = []
    for seed in range(30):
        try:
            check_tensors(folder, checkpoint, config.model, torch.float32, seed, sample=12)
            outcomes.append(True)
        except ExportMismatch:
            outcomes.append(False)
    assert 1 <= outcomes.count(False) <= 10, "one of 120 tensors, 12 of them drawn: every tenth time"
    flip_bit(file_of(folder, tensor), tensor)
    with pytest.raises(ExportMismatch):
        check_tensors(folder, checkpoint, config.model, torch.float32, seed=1, sample=0)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6, 7, 10, 96])
def test_kept_layers_are_neighbours_in_order(num_layers: int) -> None:
    for seed in range(20):
        layers = kept_layers(num_layers, seed, 3)
        assert len(layers) == min(num_layers, 6) and layers == sorted(set(layers))
        assert layers[0] == 0 and layers[-1] < num_layers
        assert all(layer % 2 == place % 2 for place, layer in enumerate(layers))
    assert num_layers < 10 or len({tuple(kept_layers(num_layers, seed, 3)) for seed in range(20)}) > 3


@pytest.mark.parametrize("model", [{}, GPT_NEO, LLAMA], ids=["GPT-2", "GPT-Neo", "Llama"])
def test_an_abridged_model_is_the_whole_one_without_the_other_layers(
    model: dict[str, Any], make: Callable[..., Made], tmp_path: Path
) -> None:
    config, checkpoint, folder = make(model)
    short = abridge(folder, checkpoint, config, seed=4, out=tmp_path / "short", num_pairs=3)
    assert short.config.model.num_layers == len(short.layers) == 6
    whole, cut = dict(GlobalTensors(checkpoint)), dict(GlobalTensors(short.checkpoint))
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor[short.layers] if ".layers." in name else tensor)
    tokens = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(1))
    check_logits(short.export, logits_without_others(folder, short.layers, tokens), tokens)


@torch.no_grad()
def logits_without_others(folder: Path, layers: Any, tokens: Tensor) -> Tensor:
    """By transformers, from the whole export."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = whole.model if hasattr(whole, "model") else whole.transformer
    name = "layers" if hasattr(base, "layers") else "h"
    setattr(base, name, torch.nn.ModuleList(getattr(base, name)[layer] for layer in layers))
    base.config.num_hidden_layers = len(layers)
    return whole(tokens, use_cache=False).logits


def test_what_is_allowed_grows_with_large_logits(make: Callable[..., Made]) -> None:
    config, checkpoint, folder = make({})
    reference = reference_of(config.model)
    reference.load_global(dict(GlobalTensors(checkpoint)))
    tokens = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = reference(tokens)
    assert logits.abs().max() < 10 and check_logits(folder, logits, tokens).allowed == 1e-4
    logits[0, 0, 0] = 250.0
    with pytest.raises(ExportMismatch, match=r"and 0\.0025 is allowed"):
        check_logits(folder, logits, tokens)


def test_logits_of_bf16_weights_are_held_to_their_own_tolerance(make: Callable[..., Made]) -> None:
    config, checkpoint, folder = make({}, torch.bfloat16)
    reference = reference_of(config.model)
    reference.load_global(dict(GlobalTensors(checkpoint)))
    tokens = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = reference(tokens)
    found = check_logits(folder, logits, tokens, torch.bfloat16)
    assert 1e-4 < found.relative < 0.02 and found.largest > 1e-4
    with pytest.raises(ExportMismatch, match=r"by up to .* and 0\.0001 is allowed"):
        check_logits(folder, logits, tokens, torch.float32)
    with pytest.raises(ExportMismatch, match=r"of their size over 40 tokens, and 0\.1 is allowed"):
        check_logits(folder, logits.roll(1, dims=-1), tokens, torch.bfloat16)
