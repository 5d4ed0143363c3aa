"""Published architectures and recipes, one function each, citing the table it comes from.

A preset is plain nested data under the names of `trainer.config`; a run's YAML names one
(`preset: gpt3_small`) and overrides what it wants to change. Counts of tokens are per step (`global_batch_tokens`)
or over the run; learning rates are peaks.

Sources:
    GPT-1  Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1.
    GPT-2  Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2 and section 2.3.
    GPT-3  Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.1, table 2.1 and appendix B.
    Llama 2  Touvron et al. 2023, arXiv:2307.09288, section 2.2 and table 1.
    Llama 3  Dubey et al. 2024, arXiv:2407.21783, sections 1, 3.2 and 3.4 and table 3.
"""

from collections.abc import Callable
from typing import Any

Preset = dict[str, Any]

_MILLION = 10**6
_BILLION = 10**9


def gpt1() -> Preset:
    """GPT-1, 117M parameters: post-norm, 12 layers of 768; 100 epochs of batches of 64 x 512 (section 4.1)."""
    return {
        "model": {
            "num_layers": 12,
            "hidden_size": 768,
            "num_heads": 12,
            "vocab_size": 40478,
            "seq_length": 512,
            "norm_placement": "post",
            "dropout": 0.1,
        },
        "train": {"global_batch_size": 64},
        "optimizer": {
            "lr": 2.5e-4,
            "min_lr_fraction": 0.0,
            "warmup_tokens": 2000 * 64 * 512,
            "beta2": 0.999,
            "weight_decay": 0.01,
        },
    }


def _gpt2(num_layers: int, hidden_size: int, num_heads: int) -> Preset:
    """Table 2's row; pre-norm, context 1024, batch 512 (section 2.3).

    The paper states no learning rate; these rows take GPT-3's for the nearest size.
    """
    return {
        "model": {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "vocab_size": 50257,
            "seq_length": 1024,
            "dropout": 0.1,
        },
        "train": {"global_batch_size": 512},
    }


def gpt2_small() -> Preset:
    """GPT-2 small, 124M parameters (the paper's table says 117M; the released weights have 124M)."""
    return _gpt2(12, 768, 12) | {"optimizer": {"lr": 6.0e-4}}


def gpt2_medium() -> Preset:
    """GPT-2 medium, 355M parameters (345M in table 2)."""
    return _gpt2(24, 1024, 16) | {"optimizer": {"lr": 3.0e-4}}


def gpt2_large() -> Preset:
    """GPT-2 large, 774M parameters (762M in table 2)."""
    return _gpt2(36, 1280, 20) | {"optimizer": {"lr": 2.5e-4}}


def gpt2_xl() -> Preset:
    """GPT-2 XL, 1.56B parameters (1542M in table 2)."""
    return _gpt2(48, 1600, 25) | {"optimizer": {"lr": 2.0e-4}}


def _gpt3(num_layers: int, hidden_size: int, num_heads: int, batch_tokens: int, lr: float, ramp_tokens: int) -> Preset:
    """A row of table 2.1 with appendix B's recipe: context 2048, Adam (0.9, 0.95, 1e-8), clip 1.0, decay 0.1,
    warm-up over 375M tokens, cosine to 10 % over 260B tokens, 300B tokens in all.

    The batch grows from 32k tokens (16 sequences) over the first 4 to 12 billion "depending on the model size"; which
    size takes how many is not stated, and here is 4B, 8B and 12B, by the size of the batch.

    Dense and locally banded layers alternate (section 2.1). The paper does not state the width of the band: 256 is that
    of GPT-Neo, which replicates it. Nor does it speak of biases: without those of queries, keys and values, which are
    less than 0.03 % of the parameters, GPT-Neo's class opens the trained model.
    """
    return {
        "model": {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "vocab_size": 50257,
            "seq_length": 2048,
            "attention_window": 256,
            "biases": "all_but_qkv",
        },
        "train": {
            "global_batch_size": batch_tokens // 2048,
            "ramp_start_batch_size": 16,
            "ramp_tokens": ramp_tokens,
            "total_tokens": 300 * _BILLION,
        },
        "optimizer": {
            "lr": lr,
            "min_lr_fraction": 0.1,
            "warmup_tokens": 375 * _MILLION,
            "decay_tokens": 260 * _BILLION,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_grad_norm": 1.0,
        },
    }


def gpt3_small() -> Preset:
    """GPT-3 Small, 125M parameters; batch 0.5M tokens."""
    return _gpt3(12, 768, 12, batch_tokens=256 * 2048, lr=6.0e-4, ramp_tokens=4 * _BILLION)


def gpt3_medium() -> Preset:
    """GPT-3 Medium, 350M parameters; batch 0.5M tokens."""
    return _gpt3(24, 1024, 16, batch_tokens=256 * 2048, lr=3.0e-4, ramp_tokens=4 * _BILLION)


def gpt3_large() -> Preset:
    """GPT-3 Large, 760M parameters; 16 heads of 96; batch 0.5M tokens."""
    return _gpt3(24, 1536, 16, batch_tokens=256 * 2048, lr=2.5e-4, ramp_tokens=4 * _BILLION)


def gpt3_xl() -> Preset:
    """GPT-3 XL, 1.3B parameters; batch 1M tokens. Table 2.1 prints 24 heads of 128, which is not 2048; 16 heads are."""
    return _gpt3(24, 2048, 16, batch_tokens=512 * 2048, lr=2.0e-4, ramp_tokens=8 * _BILLION)


def gpt3_2_7b() -> Preset:
    """GPT-3 2.7B; 32 heads of 80; batch 1M tokens."""
    return _gpt3(32, 2560, 32, batch_tokens=512 * 2048, lr=1.6e-4, ramp_tokens=8 * _BILLION)


def gpt3_6_7b() -> Preset:
    """GPT-3 6.7B; 32 heads of 128; batch 2M tokens."""
    return _gpt3(32, 4096, 32, batch_tokens=1024 * 2048, lr=1.2e-4, ramp_tokens=8 * _BILLION)


def gpt3_13b() -> Preset:
    """GPT-3 13B; 40 heads of 128; batch 2M tokens. Table 2.1 prints hidden size 5140, which 40 x 128 = 5120 is not."""
    return _gpt3(40, 5120, 40, batch_tokens=1024 * 2048, lr=1.0e-4, ramp_tokens=8 * _BILLION)


def gpt3_175b() -> Preset:
    """GPT-3 175B; 96 heads of 128; batch 3.2M tokens, here 1,536 windows (3.15M) so that common layouts divide it."""
    return _gpt3(96, 12288, 96, batch_tokens=1536 * 2048, lr=0.6e-4, ramp_tokens=12 * _BILLION)


_LLAMA_MODEL: Preset = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_heads": 32,
    "positions": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "biases": "none",
    "tied_embeddings": False,
}


def _llama_optimizer(warmup_tokens: int) -> Preset:
    """AdamW (0.9, 0.95, 1e-5), clip 1.0, decay 0.1, cosine to 10 % (Llama 2, section 2.2); 3e-4 is for 7B and 8B."""
    return {
        "lr": 3.0e-4,
        "min_lr_fraction": 0.1,
        "warmup_tokens": warmup_tokens,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-5,
        "weight_decay": 0.1,
        "clip_grad_norm": 1.0,
    }


def llama2_7b() -> Preset:
    """Llama 2 7B; context 4096, batch 4M tokens, 2T tokens in all, warm-up over 2,000 steps.

    Its vocabulary has 32,000 tokens, and its feed-forward width 11,008 is that of the released weights.
    """
    batch_size = 1024
    return {
        "model": _LLAMA_MODEL
        | {"ffn_hidden_size": 11008, "vocab_size": 32000, "seq_length": 4096, "rotary_base": 10_000.0},
        "train": {"global_batch_size": batch_size, "total_tokens": 2000 * _BILLION},
        "optimizer": _llama_optimizer(warmup_tokens=2000 * batch_size * 4096),
    }


def llama3_8b() -> Preset:
    """Llama 3 8B before its context is lengthened: 8 key-value heads, rotary base 500,000, context 8192, lr 3e-4.

    Its vocabulary of 128,256 tokens is that of the released weights (128K in the paper), the run's length is the
    paper's "about 15T tokens". Batch, warm-up and the rest of the recipe are Llama 2's: the paper states them for its
    405B model only.
    """
    batch_size = 512
    return {
        "model": _LLAMA_MODEL
        | {
            "num_kv_heads": 8,
            "ffn_hidden_size": 14336,
            "vocab_size": 128256,
            "seq_length": 8192,
            "rotary_base": 500_000.0,
        },
        "train": {"global_batch_size": batch_size, "total_tokens": 15_000 * _BILLION},
        "optimizer": _llama_optimizer(warmup_tokens=2000 * batch_size * 8192),
    }


PRESETS: dict[str, Callable[[], Preset]] = {
    preset.__name__: preset
    for preset in (
        gpt1,
        gpt2_small,
        gpt2_medium,
        gpt2_large,
        gpt2_xl,
        gpt3_small,
        gpt3_medium,
        gpt3_large,
        gpt3_xl,
        gpt3_2_7b,
        gpt3_6_7b,
        gpt3_13b,
        gpt3_175b,
        llama2_7b,
        llama3_8b,
    )
}
