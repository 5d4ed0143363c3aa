"""What an import accepts, and what it refuses by name: fields of config.json, and files of weights."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.huggingface import configs, importing
from trainer.config import UserError
from trainer.config_file import from_tree
from trainer.presets import PRESETS

# As they stand on the hub.
OPENAI_GPT = {
    "afn": "gelu",
    "architectures": ["OpenAIGPTLMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "openai-gpt",
    "n_ctx": 512,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 512,
    "n_special": 0,
    "predict_special_tokens": True,
    "resid_pdrop": 0.1,
    "summary_first_dropout": 0.1,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 40478,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
GPT_NEO = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 6,
    "attention_types": [[["global", "local"], 6]],
    "bos_token_id": 50256,
    "embed_dropout": 0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 12,
    "num_layers": 12,
    "resid_dropout": 0,
    "transformers_version": "4.9.0.dev0",
    "use_cache": True,
    "vocab_size": 50257,
    "window_size": 256,
}
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA3 = LLAMA2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": [128001, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
PUBLISHED = {
    "gpt1": OPENAI_GPT,
    "gpt2_small": GPT2,
    "gpt3_small": GPT_NEO,
    "llama2_7b": LLAMA2,
    "llama3_8b": LLAMA3,
}


def folder_with(config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_configs_are_our_presets(preset: str, tmp_path: Path) -> None:
    family, model = configs.read_config(folder_with(PUBLISHED[preset], tmp_path))
    assert [family.architecture] == PUBLISHED[preset]["architectures"]
    assert model == from_tree({"model": PRESETS[preset]()["model"]}).model


LLAMA31_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA31_ROPE["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is true"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights is false"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention is true"),
        (GPT2, {"activation_function": "relu"}, 'activation_function is "relu".* where it is "gelu_new"'),
        (GPT2, {"activation_function": "gelu"}, 'activation_function is "gelu"'),
        (GPT2, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06.* where it is 1e-05"),
        (GPT2, {"use_alibi": True}, "use_alibi is true, and GPT2LMHeadModel has no such field"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}, "architectures is GPT2DoubleHeadsModel"),
        (GPT2, {"architectures": None, "model_type": "mistral"}, "architectures is mistral"),
        (GPT2, {"n_head": 7}, "model.hidden_size 768 is not divisible"),
        (GPT2, {"n_layer": "twelve"}, "cannot be read: .*n_layer"),
        (OPENAI_GPT, {"afn": "relu"}, 'afn is "relu"'),
        (OPENAI_GPT, {"layer_norm_epsilon": 1e-12}, "layer_norm_epsilon is 1e-12"),
        (GPT_NEO, {"attention_types": [[["local", "global"], 6]]}, r"attention_layers is \[\"local"),
        (GPT_NEO, {"attention_types": [[["local"], 12]]}, "attention_layers is"),
        (GPT_NEO, {"attention_types": [[["global", "local"], 5]]}, "cannot be read: .*num_layers"),
        (LLAMA2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters is .*linear"),
        (LLAMA3, {"rope_scaling": LLAMA31_ROPE}, "rope_parameters is .*llama3"),
        (LLAMA2, {"attention_bias": True}, "attention_bias is true"),
        (LLAMA2, {"mlp_bias": True}, "mlp_bias is true"),
        (LLAMA2, {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        (LLAMA2, {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        (LLAMA2, {"head_dim": 64}, "head_dim is 64.* where it is 128"),
        (LLAMA2, {"sliding_window": 4096}, "sliding_window is 4096, and LlamaForCausalLM has no such field"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and len(value) < 5 else "",
)
def test_what_we_cannot_honour_is_refused_by_name(
    config: dict[str, Any], change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    changed = {key: value for key, value in (config | change).items() if key != "attention_layers"}
    with pytest.raises(UserError, match=named) as caught:
        configs.read_config(folder_with(changed, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (GPT2, {"activation_function": "gelu_pytorch_tanh"}),
        (GPT2, {"attn_pdrop": 0.0, "embd_pdrop": 0.2}),
        (GPT2, {"n_inner": 3072}),
        (GPT2, {"architectures": None}),
        (GPT2, {"temperature": 0.7, "pad_token_id": 3, "torch_dtype": "bfloat16", "future_field": None}),
        (LLAMA2, {"head_dim": 128, "pretraining_tp": 2, "hidden_act": "swish"}),
        (LLAMA2, {"num_key_value_heads": None}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and len(value) < 5 else "",
)
def test_what_changes_nothing_is_accepted(config: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    expected = configs.read_config(folder_with(config, tmp_path / "a"))
    assert configs.read_config(folder_with(config | change, tmp_path / "b")) == expected


def test_a_dense_gpt_neo_has_no_window(tmp_path: Path) -> None:
    dense = GPT_NEO | {"attention_types": [[["global"], 12]], "window_size": 128}
    del dense["attention_layers"]
    _, model = configs.read_config(folder_with(dense, tmp_path))
    assert model.attention_window is None


def test_no_folder_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        configs.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        configs.read_config(tmp_path)


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def their_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=90, n_positions=20, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(their_folder: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(their_folder, tmp_path / "theirs"))


def imported(folder: Path) -> Path:
    family, model = configs.read_config(folder)
    config = from_tree({"model": model.model_dump(mode="json")})
    return importing.import_weights(folder, family, config, folder.parent / "import", "somewhere", {})


def rewrite(folder: Path, **changes: Any) -> None:
    """Change tensors; None takes one out."""
    tensors = {name.replace(".", "__"): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    kept = {name.replace("__", "."): t for name, t in (tensors | changes).items() if t is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_and_masks_of_older_versions(theirs: Path) -> None:
    expected = dict(GlobalTensors(imported(theirs)))
    shutil.rmtree(theirs.parent / "import")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(theirs / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 20, 20) for layer in range(2)}
    masks |= {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors | masks, theirs / "model.safetensors", metadata={"format": "pt"})
    found = dict(GlobalTensors(imported(theirs)))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def point_outside(folder: Path) -> None:
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickle_instead, r"pickled weights \(pytorch_model\.bin\), .* save it again by save_pretrained"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (truncate, "is no whole safetensors file"),
        (point_outside, "names files outside of the folder"),
        (lose_a_shard, r"lacks model-00001-of-00002\.safetensors"),
        (lambda f: rewrite(f, transformer__ln_f__bias=None), r"lacks transformer\.ln_f\.bias"),
        (lambda f: rewrite(f, transformer__ln_f__bias=torch.ones(17)), r"of shape \(17,\), .* asks for \(16,\)"),
        (lambda f: rewrite(f, transformer__h__0__adapter=torch.ones(2)), r"holds transformer\.h\.0\.adapter, which"),
        (lambda f: rewrite(f, lm_head__weight=torch.ones(90, 16)), "is another matrix; set it to false"),
        (lambda f: rewrite(f, transformer__ln_f__bias=torch.ones(16, dtype=torch.int8)), "quantized"),
        (lambda f: rewrite(f, transformer__ln_f__bias=torch.ones(16, dtype=torch.float64)), "ln_f.bias is F64"),
    ],
    ids=["pickled", "none", "truncated", "outside", "shard", "missing", "shape", "surplus", "head", "int8", "fp64"],
)  # fmt: skip
def test_other_weights_are_refused_in_one_line(damage: Any, message: str, theirs: Path) -> None:
    damage(theirs)
    with pytest.raises(UserError, match=message) as caught:
        imported(theirs)
    assert "\n" not in str(caught.value)
    assert not (theirs.parent / "import" / "step-00000000").exists()


def test_padding_rows_are_zero(theirs: Path) -> None:
    embedding = GlobalTensors(imported(theirs))["embedding.word_embeddings.weight"]
    assert embedding.shape == (128, 16) and embedding[:90].all(dim=1).all() and not embedding[90:].any()
