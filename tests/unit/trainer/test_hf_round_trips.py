"""There and back, in both directions and of every family, not a bit is different."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor

from parity import reference_of
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.huggingface import configs, export, importing
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.training_state import MASTER
from weights import write_checkpoint

VOCAB, SEQ = 90, 20  # 90 tokens pad to 128 rows
SIZES = {"num_layers": 3, "hidden_size": 48, "num_heads": 6, "vocab_size": VOCAB, "seq_length": SEQ}
GPT1 = {"norm_placement": "post"}
GPT_NEO = {"biases": "all_but_qkv", "attention_window": 7}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "biases": "none"}

CASES: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "GPT-2 untied": {"tied_embeddings": False, "ffn_hidden_size": 37},
    "GPT-1": GPT1,
    "GPT-Neo": GPT_NEO,  # heads of 8: their root is no power of 2
    "GPT-Neo untied": GPT_NEO | {"tied_embeddings": False, "num_layers": 4},
    "GPT-Neo, heads of 16": GPT_NEO | {"num_heads": 3},
    "GPT-Neo, dense": GPT_NEO | {"attention_window": None},
    "Llama": LLAMA,
    "Llama, grouped, untied": LLAMA | {"num_kv_heads": 2, "tied_embeddings": False, "rotary_base": 500_000.0},
}
QUERIES = "decoder.layers.self_attention.linear_qkv.weight"


def config_of(case: str) -> RunConfig:
    return from_tree({"model": SIZES | CASES[case]})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "word": 1}, unk_token="word")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def imported(folder: Path, out: Path, max_file_bytes: int = 10**9) -> Path:
    family, model = configs.read_config(folder)
    config = from_tree({"model": model.model_dump(mode="json")})
    return importing.import_weights(folder, family, config, out, str(folder), {}, max_file_bytes=max_file_bytes)


def exported(checkpoint: Path, tokenizer: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    config = from_tree(read_manifest(checkpoint).config)
    export.commit(export.export_model(checkpoint, config, tokenizer, out, {}, dtype=dtype, max_shard_bytes=50_000), out)
    return out


def random_weights(config: RunConfig) -> dict[str, Tensor]:
    """Everywhere but in the rows that pad the vocabulary, which are not exported."""
    reference = reference_of(config.model)
    reference.randomize(seed=5)
    tensors = reference.global_tensors()
    for name in tensors.keys() & {"embedding.word_embeddings.weight", "output_layer.weight"}:
        tensors[name][VOCAB:] = 0
    return tensors


def their_model(case: str, folder: Path, dtype: torch.dtype) -> Path:
    """A model of transformers' own making, of random weights, in several files."""
    config = config_of(case)
    family = family_of(config.model)
    torch.manual_seed(3)
    their_class: Any = getattr(transformers, family.architecture)
    model = their_class(configs.class_config(family, config.model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back(case: str, tokenizer: Path, tmp_path: Path) -> None:
    config = config_of(case)
    weights = random_weights(config)
    checkpoint = write_checkpoint(tmp_path / "checkpoints", config, weights)
    back = imported(exported(checkpoint, tokenizer, tmp_path / "export"), tmp_path / "import", max_file_bytes=40_000)
    assert_same_bits(dict(GlobalTensors(back)), weights)
    manifest = read_manifest(back)
    assert from_tree(manifest.config).model == config.model
    assert (manifest.step, manifest.origin, manifest.kinds[0]) == (0, str(tmp_path / "export"), MASTER)
    assert len(manifest.files) > 3
    again = exported(back, tokenizer, tmp_path / "again")
    assert_same_bits(tensors_of(again), tensors_of(tmp_path / "export"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_their_model_comes_back(case: str, dtype: torch.dtype, tokenizer: Path, tmp_path: Path) -> None:
    theirs = their_model(case, tmp_path / "theirs", dtype)
    checkpoint = imported(theirs, tmp_path / "import")
    back = exported(checkpoint, tokenizer, tmp_path / "back", dtype)
    assert_same_bits(tensors_of(back), tensors_of(theirs))
    assert json.loads((back / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    twice = imported(back, tmp_path / "twice")
    assert_same_bits(dict(GlobalTensors(twice)), dict(GlobalTensors(checkpoint)))


@pytest.mark.parametrize("case", ["GPT-2", "GPT-Neo"])
def test_bf16_weights_come_back_from_an_export_in_fp32(case: str, tokenizer: Path, tmp_path: Path) -> None:
    theirs = their_model(case, tmp_path / "theirs", torch.bfloat16)
    back = exported(imported(theirs, tmp_path / "import"), tokenizer, tmp_path / "back")
    assert_same_bits(tensors_of(back), {name: tensor.float() for name, tensor in tensors_of(theirs).items()})


@pytest.mark.parametrize("case", CASES)
def test_an_export_in_bf16_rounds_once_and_then_comes_back(case: str, tokenizer: Path, tmp_path: Path) -> None:
    config = config_of(case)
    weights = random_weights(config)
    checkpoint = write_checkpoint(tmp_path / "checkpoints", config, weights)
    first = exported(checkpoint, tokenizer, tmp_path / "first", torch.bfloat16)
    back = imported(first, tmp_path / "import")
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    if "GPT-Neo" in case and config.model.head_size == 8:  # their quotients are rounded, not ours
        found = dict(GlobalTensors(back))
        torch.testing.assert_close(found.pop(QUERIES), rounded.pop(QUERIES), rtol=1 / 128, atol=0)
        assert_same_bits(found, rounded)
    else:
        assert_same_bits(dict(GlobalTensors(back)), rounded)
    assert_same_bits(tensors_of(exported(back, tokenizer, tmp_path / "again", torch.bfloat16)), tensors_of(first))


def test_what_rounding_loses_is_needed(tokenizer: Path, tmp_path: Path) -> None:
    """Without the file beside the weights, the queries of some come back a unit in the last place away."""
    config = config_of("GPT-Neo")
    weights = random_weights(config)
    folder = exported(write_checkpoint(tmp_path / "checkpoints", config, weights), tokenizer, tmp_path / "export")
    shutil.copytree(folder, tmp_path / "without")
    (tmp_path / "without" / export.ROUNDING_FILE).unlink()
    found = dict(GlobalTensors(imported(tmp_path / "without", tmp_path / "import")))
    units = found.pop(QUERIES).view(torch.int32) - weights.pop(QUERIES).view(torch.int32)
    assert units.abs().max() == 1 and 0.02 < units.abs().float().mean() < 0.1, "a third of them are queries"
    assert_same_bits(found, weights)


def test_only_inexact_roots_have_the_file(tokenizer: Path, tmp_path: Path) -> None:
    for case in CASES:
        config = config_of(case)
        checkpoint = write_checkpoint(tmp_path / case / "checkpoints", config, random_weights(config))
        folder = exported(checkpoint, tokenizer, tmp_path / case / "export")
        expected = "GPT-Neo" in case and config.model.head_size == 8
        assert (folder / export.ROUNDING_FILE).exists() == expected
