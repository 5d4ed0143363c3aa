"""The export of every family: what our model computes is what the class of transformers computes."""

import itertools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor

from parity import reference_of
from ranks import run_on_ranks
from trainer.checkpoint.format import store
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.huggingface import export
from trainer.checkpoint.huggingface.families.choice import FAMILIES, family_of
from trainer.checkpoint.huggingface.families.shapes import shape_of
from trainer.checkpoint.waiting_save import save
from trainer.config import ModelConfig, RunConfig, UserError
from trainer.config_file import from_tree
from trainer.engine.engine import Engine
from trainer.inference.frozen import FrozenModel
from trainer.training_state import MASTER

VOCAB, SEQ, WINDOW = 90, 20, 7  # 90 tokens pad to 128 rows; the window divides neither 20 nor its half
TOLERANCE = 1e-5
SIZES = {"num_layers": 4, "hidden_size": 48, "num_heads": 6, "vocab_size": VOCAB, "seq_length": SEQ}
GPT1 = {"norm_placement": "post"}
GPT_NEO = {"biases": "all_but_qkv", "attention_window": WINDOW}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "biases": "none"}
UNTIED, ODD_FFN, ODD_LAYERS = {"tied_embeddings": False}, {"ffn_hidden_size": 37}, {"num_layers": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {}),
    "GPT-2 untied": ("GPT2LMHeadModel", UNTIED),
    "GPT-2, odd ffn, odd layers": ("GPT2LMHeadModel", ODD_FFN | ODD_LAYERS),
    "GPT-2, every key-value head named": ("GPT2LMHeadModel", {"num_kv_heads": 6}),
    "GPT-1": ("OpenAIGPTLMHeadModel", GPT1),
    "GPT-1 untied": ("OpenAIGPTLMHeadModel", GPT1 | UNTIED),
    "GPT-1, odd layers": ("OpenAIGPTLMHeadModel", GPT1 | ODD_LAYERS | {"ffn_hidden_size": 192}),
    "GPT-Neo": ("GPTNeoForCausalLM", GPT_NEO),  # heads of 8: their root is no power of 2
    "GPT-Neo, heads of 16": ("GPTNeoForCausalLM", GPT_NEO | {"num_heads": 3}),
    "GPT-Neo untied": ("GPTNeoForCausalLM", GPT_NEO | UNTIED),
    "GPT-Neo, odd ffn, odd layers": ("GPTNeoForCausalLM", GPT_NEO | ODD_FFN | ODD_LAYERS),
    "GPT-Neo of one layer": ("GPTNeoForCausalLM", GPT_NEO | {"num_layers": 1}),
    "GPT-Neo, window 1": ("GPTNeoForCausalLM", GPT_NEO | {"attention_window": 1}),
    "GPT-Neo, window that divides": ("GPTNeoForCausalLM", GPT_NEO | {"attention_window": 5}),
    "GPT-Neo, all but one seen": ("GPTNeoForCausalLM", GPT_NEO | {"attention_window": SEQ - 1}),
    "GPT-Neo, window beyond the context": ("GPTNeoForCausalLM", GPT_NEO | {"attention_window": 256}),
    "GPT-Neo, dense": ("GPTNeoForCausalLM", GPT_NEO | {"attention_window": None}),
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Llama untied": ("LlamaForCausalLM", LLAMA | UNTIED),
    "Llama, grouped": ("LlamaForCausalLM", LLAMA | {"num_kv_heads": 2}),
    "Llama, one key-value head": ("LlamaForCausalLM", LLAMA | {"num_kv_heads": 1} | UNTIED),
    "Llama, grouped, odd ffn, odd layers": ("LlamaForCausalLM", LLAMA | {"num_kv_heads": 3} | ODD_FFN | ODD_LAYERS),
    "Llama, another base": ("LlamaForCausalLM", LLAMA | {"rotary_base": 500_000.0}),
}


@dataclass
class Trained:
    config: RunConfig
    checkpoint: Path
    logits: Tensor


def config_of(**model: Any) -> RunConfig:
    return from_tree({"model": SIZES | model, "train": {"global_batch_size": 2, "precision": "fp32"}})


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, SEQ), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> dict[str, Trained]:
    """Of every case a checkpoint of random weights, norms and biases too, and what our model makes of it."""
    root = tmp_path_factory.mktemp("checkpoints")
    configs = {name: config_of(**changes) for name, (_, changes) in CASES.items()}

    def rank(_: RunConfig, device: torch.device) -> dict[str, Tensor]:
        logits = {}
        for name, config in configs.items():
            reference = reference_of(config.model)
            reference.randomize(seed=3)
            whole, engine = reference.global_tensors(), Engine(config, device)
            engine.state.prepare(1)
            for fragment in engine.state.fragments():
                place = tuple(slice(o, o + n) for o, n in zip(fragment.box.offset, fragment.box.shape, strict=True))
                fragment.tensors[MASTER].copy_(whole[fragment.box.key][place])
            save(engine, root / name, Manifest(1, 2, config.model_dump(mode="json")))
            frozen = FrozenModel(config, root / name / store.folder_name(1), device)
            logits[name] = frozen.logits(tokens)
        return logits

    (logits,) = run_on_ranks(config_of(), rank)
    return {name: Trained(configs[name], root / name / store.folder_name(1), logits[name]) for name in CASES}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "word": 1}, unk_token="word")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folders(trained: dict[str, Trained], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name, case in trained.items():
        temporary = export.export_model(case.checkpoint, case.config, tokenizer, root / name, {})
        export.commit(temporary, root / name)
    return {name: root / name for name in trained}


def opened(folder: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


@torch.no_grad()
def largest_difference(folder: Path, tokens: Tensor, logits: Tensor) -> float:
    return (opened(folder)(tokens).logits - logits).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_the_class_computes_what_our_model_does(
    case: str, trained: dict[str, Trained], folders: dict[str, Path], tokens: Tensor
) -> None:
    ours = trained[case].logits
    assert ours.shape == (3, SEQ, VOCAB) and ours.std() > 0.1, "logits that hardly vary would show nothing"
    assert type(opened(folders[case])).__name__ == CASES[case][0]
    assert largest_difference(folders[case], tokens, ours) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("GPT-Neo", {"window_size": WINDOW - 1}),
        ("GPT-Neo", {"window_size": WINDOW + 1}),
        ("GPT-Neo", {"attention_types": [[["local", "global"], 2]], "attention_layers": ["local", "global"] * 2}),
        ("GPT-Neo, all but one seen", {"window_size": SEQ}),
        ("Llama, another base", {"rope_parameters": {"rope_type": "default", "rope_theta": 400_000.0}}),
        ("Llama", {"rms_norm_eps": 1e-4}),
        ("GPT-1", {"afn": "silu"}),
        ("GPT-2", {"activation_function": "gelu"}),
    ],
    ids=str,
)
def test_the_comparison_sees_a_config_that_is_slightly_wrong(
    case: str,
    change: dict[str, Any],
    trained: dict[str, Trained],
    folders: dict[str, Path],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(folders[case], folder)
    settings = json.loads((folder / "config.json").read_text())
    assert settings.keys() >= change.keys()
    (folder / "config.json").write_text(json.dumps(settings | change))
    assert largest_difference(folder, tokens, trained[case].logits) > 3 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_table_covers_every_element_of_ours_once(case: str) -> None:
    """Filled through the table's views, which is what an import would do; rows that pad the vocabulary are left out."""
    model = config_of(**CASES[case][1]).model
    filled = {name: torch.zeros_like(tensor) for name, tensor in reference_of(model).global_tensors().items()}
    for row in family_of(model).rows:
        if row.ours in filled:  # a tied model has no output layer
            for layer in filled[row.ours] if "{layer}" in row.theirs else [filled[row.ours]]:
                row.view(layer, model).add_(1)
    for name, tensor in filled.items():
        true_rows = VOCAB if name in ("embedding.word_embeddings.weight", "output_layer.weight") else len(tensor)
        assert (tensor[:true_rows] == 1).all() and not tensor[true_rows:].any(), name


@pytest.mark.parametrize("case", CASES)
def test_shapes_from_the_config_are_megatron_cores(case: str, trained: dict[str, Trained]) -> None:
    model = trained[case].config.model
    for name, shape in GlobalTensors(trained[case].checkpoint).shapes.items():
        assert shape_of(name, model) == (shape[1:] if ".layers." in name else shape)


# --------------------------------------------------------------------------------------------- which family holds it

AXES: dict[str, tuple[Any, ...]] = {
    "num_kv_heads": (None, 3),
    "attention_window": (None, WINDOW),
    "positions": ("learned", "rotary"),
    "norm": ("layer", "rms"),
    "norm_placement": ("pre", "post"),
    "activation": ("gelu", "swiglu"),
    "biases": ("all", "all_but_qkv", "none"),
    "tied_embeddings": (True, False),
    "ffn_hidden_size": (None, 64),
}
MODELS = [ModelConfig(**SIZES, **dict(zip(AXES, values, strict=True))) for values in itertools.product(*AXES.values())]


def test_no_two_families_hold_one_model() -> None:
    held = [[family.architecture for family in FAMILIES if not family.unmet(model)] for model in MODELS]
    assert {len(names) for names in held} == {0, 1}
    assert {name for names in held for name in names} == {family.architecture for family in FAMILIES}


def test_every_way_out_that_a_refusal_names_is_one() -> None:
    num_refused = 0
    for model in MODELS:
        try:
            family_of(model)
        except UserError as error:
            num_refused += 1
            assert "\n" not in str(error)
            for way_out in str(error).partition("nearest: ")[2].split(" or "):
                settings, name = re.fullmatch(r"(.+) \((\w+)\)", way_out).groups()  # type: ignore[union-attr]
                changes = dict(re.findall(r"model\.(\w+) (\w+)", settings))
                changed = model.model_dump() | {k: None if v == "null" else v for k, v in changes.items()}
                assert family_of(ModelConfig(**changed)).architecture == name
    assert num_refused > len(MODELS) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_window": 8},
            "no class of Hugging Face computes what this model does (model.biases all, model.attention_window 8); "
            "nearest: model.biases all_but_qkv (GPTNeoForCausalLM) or model.attention_window null (GPT2LMHeadModel)",
        ),
        (
            GPT1 | {"ffn_hidden_size": 64},
            "no class of Hugging Face computes what this model does (model.norm_placement post, "
            "model.ffn_hidden_size 64); nearest: model.norm_placement pre (GPT2LMHeadModel) or "
            "model.ffn_hidden_size null (OpenAIGPTLMHeadModel)",
        ),
        (
            LLAMA | {"biases": "all"},
            "no class of Hugging Face computes what this model does (model.biases all); "
            "nearest: model.biases none (LlamaForCausalLM)",
        ),
    ],
    ids=["banded", "GPT-1 with another ffn", "Llama with biases"],
)
def test_a_refusal_is_one_line_that_names_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        export.check_exportable(config_of(**changes))
    assert str(caught.value) == message
