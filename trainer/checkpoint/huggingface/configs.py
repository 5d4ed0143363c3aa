"""Between config.json and our model settings, both ways. What we cannot honour is refused by the name of its field."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from trainer.checkpoint.huggingface.families.choice import FAMILIES
from trainer.checkpoint.huggingface.families.family import Family
from trainer.checkpoint.huggingface.families.shapes import Shape
from trainer.config import ModelConfig, UserError
from trainer.config_file import from_tree

CONFIG = "config.json"
_IMMATERIAL = frozenset(
    word
    for fields in {
        "what wrote it, and how it is to be opened": """
            _name_or_path name_or_path architectures model_type transformers_version dtype torch_dtype torchscript
            tokenizer_class attn_implementation _attn_implementation _attn_implementation_internal
            _attn_implementation_autoset use_bfloat16 pretraining_tp
        """,
        "what a call returns": """
            output_hidden_states output_attentions return_dict return_dict_in_generate output_scores use_cache
            gradient_checkpointing chunk_size_feed_forward tie_last_hidden_states
        """,
        "special tokens, which are the tokenizer's, and generation, which is generation_config.json's": """
            bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix task_specific_params
            do_sample max_length min_length max_new_tokens early_stopping num_beams num_beam_groups diversity_penalty
            temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
            encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
            remove_invalid_values suppress_tokens begin_suppress_tokens exponential_decay_length_penalty
        """,
        "other heads": """
            id2label label2id num_labels problem_type finetuning_task summary_type summary_use_proj summary_activation
            summary_proj_to_labels summary_first_dropout classifier_dropout
        """,
        "training from the start": "initializer_range",
    }.values()
    for word in fields.split()
)
"""Fields of any config that change nothing of what the trained model computes."""
_SPELLINGS = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}
"""Fields of older versions -> where the class puts what they say."""
_CLASS_FILLS_IN = ("n_inner", "intermediate_size", "num_key_value_heads", "head_dim")
"""Where null is the value that our settings have by default too."""


def write_configs(
    folder: Path, family: Family, model: ModelConfig, end_of_text: int | None, dtype: torch.dtype
) -> dict[str, Shape]:
    """Write config.json and generation_config.json; returns the shapes of the parameters that they ask for, by name.

    Args:
        end_of_text: id of the token that ends a text, and begins the first.
    """
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config = class_config(family, model, dtype=str(dtype).removeprefix("torch."), **special)
    config.save_pretrained(folder)
    generation = transformers.GenerationConfig(do_sample=True, top_k=50, pad_token_id=end_of_text, **special)
    generation.save_pretrained(folder)
    return parameter_shapes(family, config)


def parameter_shapes(family: Family, config: Any) -> dict[str, Shape]:
    """Of the class's model with this config, none of which is allocated."""
    with torch.device("meta"):
        model: Any = getattr(transformers, family.architecture)(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def shapes_of(family: Family, model: ModelConfig) -> dict[str, Shape]:
    return parameter_shapes(family, class_config(family, model))


def base_prefix(family: Family) -> str:
    """What names in a file may lack, when it was written by the class without the output layer."""
    return f"{getattr(transformers, family.architecture).base_model_prefix}."


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and the settings of a folder's model.

    Raises:
        UserError: there is no config.json, or a field of it is unknown or has a value that our models cannot have.
    """
    path = folder / CONFIG
    try:
        stated = json.loads(path.read_bytes())
        family = _family_of(path, stated)
        theirs = getattr(transformers, family.architecture).config_class.from_dict(stated)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {CONFIG}; name the folder of a model") from error
    except UserError:
        raise
    except Exception as error:  # what transformers raises for a field of the wrong type has no class of its own
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    _refuse_unknown(path, stated, family, theirs)
    try:
        model = _settings(family, theirs)
        ours = class_config(family, model).to_dict()
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} states no model that can be trained here: {error}") from error
    _refuse_different(path, family, theirs.to_dict(), ours)
    return family, model


def _family_of(path: Path, stated: dict[str, Any]) -> Family:
    architecture, model_type = (stated.get("architectures") or [None])[0], stated.get("model_type")
    for family in FAMILIES:
        config_class = getattr(transformers, family.architecture).config_class
        if architecture == family.architecture or (not architecture and model_type == config_class.model_type):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{path}: architectures is {architecture or model_type}, and what can be imported is {known}")


def _settings(family: Family, theirs: Any) -> ModelConfig:
    tree = family.model(theirs) | {
        "vocab_size": theirs.vocab_size,
        "tied_embeddings": theirs.tie_word_embeddings,
        "init_std": theirs.initializer_range or ModelConfig().init_std,
    }
    if tree.get("ffn_hidden_size") == 4 * tree["hidden_size"]:
        tree["ffn_hidden_size"] = None
    if tree.get("num_kv_heads") == tree["num_heads"]:
        tree["num_kv_heads"] = None
    return from_tree({"model": tree}).model


def class_config(family: Family, model: ModelConfig, **more: Any) -> Any:
    config_class: Any = getattr(transformers, family.architecture).config_class
    return config_class(
        architectures=[family.architecture],
        vocab_size=model.vocab_size,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tied_embeddings,
        **family.config(model),
        **{
            "bos_token_id": None,
            "eos_token_id": None,
            **more,
        },  # the classes' defaults may lie outside of the vocabulary
    )


def _refuse_unknown(path: Path, stated: dict[str, Any], family: Family, theirs: Any) -> None:
    """A field that the class does not know may be an extension that changes what the model computes."""
    known = type(theirs)().to_dict().keys() | type(theirs).attribute_map.keys() | _SPELLINGS.keys()
    unknown = stated.keys() - known - _IMMATERIAL - family.immaterial
    for name in sorted(unknown):
        if stated[name] is not None:
            raise UserError(
                f"{path}: {name} is {json.dumps(stated[name])}, and {family.architecture} has no such field; if it "
                "changes nothing of what the model computes, take it out"
            )


def _refuse_different(path: Path, family: Family, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Theirs must be the config that we would write for the model that theirs was taken for."""
    for name in sorted((theirs.keys() | ours.keys()) - _IMMATERIAL - family.immaterial):
        value, wanted = theirs.get(name), ours.get(name)
        value = family.synonyms.get(name, {}).get(value, value) if isinstance(value, str) else value
        if value != wanted and not (value is None and name in _CLASS_FILLS_IN):
            raise UserError(
                f"{path}: {name} is {json.dumps(value)}, which no model of this trainer computes; it can be imported "
                f"where it is {json.dumps(wanted)}"
            )
