"""The reference itself is held to transformers' GPT-1, GPT-2, GPT-Neo and Llama.

They share nothing with it but PyTorch.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from reference_gpt import ReferenceGPT, train

LAYERS, HIDDEN, HEADS, FFN, VOCAB, PADDED, SEQ = 3, 32, 4, 96, 53, 64, 16
GPT1_FFN = 4 * HIDDEN  # transformers' GPT-1 knows no other

# (Hugging Face's module, megatron-core's module) of one layer; GPT-1's norms stand elsewhere than GPT-2's.
LINEARS = {
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}
PRE_NORMS = {"ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm"}
POST_NORMS = {"ln_1": "self_attn_bda.norm", "ln_2": "mlp_bda.norm"}


def reference(**changes: Any) -> ReferenceGPT:
    sizes: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "ffn_hidden_size": FFN,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "seq_length": SEQ,
    }
    return ReferenceGPT(**sizes | changes)


def hugging_face(kind: str) -> torch.nn.Module:
    """A randomly initialised model, its norms and biases made random too."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_positions": SEQ,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
    }
    if kind == "post":
        model: torch.nn.Module = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_inner=FFN, tie_word_embeddings=kind == "tied"))
    return perturbed(model)


@torch.no_grad()
def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def global_tensors(theirs: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """What megatron-core would call, stack and lay out the weights of a Hugging Face model."""
    post = kind == "post"
    words, positions = ("tokens_embed", "positions_embed") if post else ("wte", "wpe")
    theirs = {name.removeprefix("transformer."): value.detach().clone() for name, value in theirs.items()}
    ours = {
        "embedding.word_embeddings.weight": padded(theirs[f"{words}.weight"]),
        "embedding.position_embeddings.weight": theirs[f"{positions}.weight"],
    }
    for their_name, our_name in (LINEARS | (POST_NORMS if post else PRE_NORMS)).items():
        for part in ("weight", "bias"):
            layers = [theirs[f"h.{layer}.{their_name}.{part}"] for layer in range(LAYERS)]
            if their_name in LINEARS and part == "weight":
                layers = [layer.T for layer in layers]  # their Conv1D is [in, out]
            if their_name == "attn.c_attn":
                layers = [torch.cat(by_head(layer)) for layer in layers]
            ours[f"decoder.layers.{our_name}.{part}"] = torch.stack(layers)
    if not post:
        ours["decoder.final_layernorm.weight"] = theirs["ln_f.weight"]
        ours["decoder.final_layernorm.bias"] = theirs["ln_f.bias"]
    if kind == "untied":
        ours["output_layer.weight"] = padded(theirs["lm_head.weight"])
    return ours


def padded(rows: Tensor) -> Tensor:
    """Rows past the vocabulary that would win every prediction if they took part in one."""
    return torch.cat([rows, torch.full((PADDED - VOCAB, HIDDEN), 100.0)])


def by_head(blocks: Tensor) -> list[Tensor]:
    """[all q; all k; all v] -> [q_0, k_0, v_0, q_1, ...]"""
    d = HIDDEN // HEADS
    q, k, v = blocks.split(HIDDEN)
    return [block[head * d : (head + 1) * d] for head in range(HEADS) for block in (q, k, v)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["tied", "untied", "post"])
def test_logits_equal_transformers(kind: str) -> None:
    theirs = hugging_face(kind)
    ours = reference(
        norm_placement="post" if kind == "post" else "pre",
        tied_embeddings=kind != "untied",
        ffn_hidden_size=GPT1_FFN if kind == "post" else FFN,
    )
    ours.load_global(global_tensors(dict(theirs.named_parameters()), kind))
    assert_same_logits(ours, theirs)


def by_group(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """[n d, h], [m d, h], [m d, h] -> linear_qkv's rows: for each key-value head its queries, its key, its value"""
    parts = [matrix.chunk(kv_heads) for matrix in (q, k, v)]
    return torch.cat([rows for group in zip(*parts, strict=True) for rows in group])


@pytest.mark.parametrize("window", [1, 5, SEQ - 1, 256])
def test_logits_equal_transformers_gpt_neo(window: int) -> None:
    """Its scores are not divided by the root of the head size, so our queries must be larger by it."""
    torch.manual_seed(2)
    config = GPTNeoConfig(
        vocab_size=VOCAB,
        max_position_embeddings=SEQ,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        intermediate_size=FFN,
        attention_types=[[["global", "local"], 1], [["global"], 1]],
        window_size=window,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = perturbed(GPTNeoForCausalLM(config))
    named = {name.removeprefix("transformer."): value.detach().clone() for name, value in theirs.named_parameters()}
    layers = [
        {n.removeprefix(f"h.{i}."): v for n, v in named.items() if n.startswith(f"h.{i}.")} for i in range(LAYERS)
    ]
    tensors = {
        "embedding.word_embeddings.weight": padded(named["wte.weight"]),
        "embedding.position_embeddings.weight": named["wpe.weight"],
        "decoder.final_layernorm.weight": named["ln_f.weight"],
        "decoder.final_layernorm.bias": named["ln_f.bias"],
        "decoder.layers.self_attention.linear_qkv.weight": torch.stack(
            [
                by_group(
                    (HIDDEN / HEADS) ** 0.5 * layer["attn.attention.q_proj.weight"],
                    layer["attn.attention.k_proj.weight"],
                    layer["attn.attention.v_proj.weight"],
                    HEADS,
                )
                for layer in layers
            ]
        ),
    }
    for their_name, our_name in {
        "ln_1": "input_layernorm",
        "ln_2": "pre_mlp_layernorm",
        "attn.attention.out_proj": "self_attention.linear_proj",
        "mlp.c_fc": "mlp.linear_fc1",
        "mlp.c_proj": "mlp.linear_fc2",
    }.items():
        for part in ("weight", "bias"):
            tensors[f"decoder.layers.{our_name}.{part}"] = torch.stack(
                [layer[f"{their_name}.{part}"] for layer in layers]
            )
    ours = reference(attention_window=window, biases="all_but_qkv")
    ours.load_global(tensors)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    ("kv_heads", "tied", "base"), [(4, True, 10_000.0), (4, False, 500_000.0), (2, False, 10_000.0), (1, True, 100.0)]
)
def test_logits_equal_transformers_llama(kv_heads: int, tied: bool, base: float) -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=SEQ,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        intermediate_size=FFN,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings=tied,
    )
    theirs = perturbed(LlamaForCausalLM(config))
    named = {name: value.detach().clone() for name, value in theirs.named_parameters()}

    def stacked(name: str) -> Tensor:
        return torch.stack([named[f"model.layers.{layer}.{name}.weight"] for layer in range(LAYERS)])

    q, k, v = (stacked(f"self_attn.{part}_proj") for part in "qkv")
    tensors = {
        "embedding.word_embeddings.weight": padded(named["model.embed_tokens.weight"]),
        "decoder.layers.input_layernorm.weight": stacked("input_layernorm"),
        "decoder.layers.self_attention.linear_qkv.weight": torch.stack(
            [by_group(*layer, kv_heads) for layer in zip(q, k, v, strict=True)]
        ),
        "decoder.layers.self_attention.linear_proj.weight": stacked("self_attn.o_proj"),
        "decoder.layers.pre_mlp_layernorm.weight": stacked("post_attention_layernorm"),
        "decoder.layers.mlp.linear_fc1.weight": torch.cat([stacked("mlp.gate_proj"), stacked("mlp.up_proj")], dim=1),
        "decoder.layers.mlp.linear_fc2.weight": stacked("mlp.down_proj"),
        "decoder.final_layernorm.weight": named["model.norm.weight"],
    }
    if not tied:
        tensors["output_layer.weight"] = padded(named["lm_head.weight"])
    ours = reference(
        num_kv_heads=kv_heads,
        positions="rotary",
        rotary_base=base,
        norm="rms",
        activation="swiglu",
        biases="none",
        tied_embeddings=tied,
    )
    ours.load_global(tensors)
    assert_same_logits(ours, theirs)


@torch.no_grad()
def assert_same_logits(ours: ReferenceGPT, theirs: torch.nn.Module) -> None:
    batch = tokens(4, SEQ)
    for part in (batch, batch[:, :5]):
        expected = theirs(part).logits
        assert expected.std() > 0.1, "logits that hardly vary would show nothing"
        torch.testing.assert_close(ours(part), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"tied_embeddings": False}, {"norm_placement": "post"}])
def test_global_tensors_round_trip(options: dict[str, Any]) -> None:
    first, second = reference(**options), reference(**options)
    first.randomize(seed=1)
    second.randomize(seed=2)
    second.load_global(first.global_tensors())
    batch = tokens(2, SEQ)
    assert torch.equal(first(batch), second(batch))
    assert all(torch.equal(value, second.global_tensors()[name]) for name, value in first.global_tensors().items())


def test_missing_tensor_is_refused() -> None:
    model = reference()
    tensors = model.global_tensors()
    del tensors["decoder.final_layernorm.bias"]
    with pytest.raises(AssertionError, match="final_layernorm"):
        model.load_global(tensors)


def test_training_equals_transformers_trained_on_whole_batches() -> None:
    """Their loop sees each step's micro-batches as one batch, and decays whatever is a matrix in their model."""
    theirs = hugging_face("tied")
    ours = reference()
    before = global_tensors(dict(theirs.named_parameters()), "tied")
    ours.load_global(before)
    lrs, clip, decay, betas, eps = [1e-3, 2e-3, 1e-3, 5e-4], 0.5, 0.1, (0.9, 0.95), 1e-8
    steps = [[tokens(2, SEQ + 1, seed=3 * step + micro) for micro in range(3)] for step in range(len(lrs))]

    history = train(ours, steps, lrs=lrs, betas=betas, eps=eps, weight_decay=decay, clip=clip, precision="fp32")

    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": decay},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=betas,
        eps=eps,
    )
    for step, lr, (loss, grad_norm) in zip(steps, lrs, history, strict=True):
        whole = torch.cat(step)
        logits = theirs(whole[:, :-1]).logits
        their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten())
        their_loss.backward()
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        assert their_norm > clip, "the case must exercise clipping"
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(their_loss.item(), abs=1e-6)
        assert grad_norm == pytest.approx(their_norm.item(), rel=1e-6)
    expected = global_tensors(dict(theirs.named_parameters()), "tied")
    for name, value in ours.global_tensors().items():
        trained, trained_theirs = meaningful(name, value), meaningful(name, expected[name])
        assert not torch.equal(trained, meaningful(name, before[name])), f"{name} has not been trained"
        difference = (trained - trained_theirs).abs().max().item()
        assert difference < 2e-6, f"{name} differs by {difference}"


def meaningful(name: str, value: Tensor) -> Tensor:
    """Without what no gradient determines.

    Rows past the vocabulary do not exist in their model. A bias of the keys adds the same to every score of a query,
    which softmax ignores: its true gradient is zero, and Adam blows the rounding error up to a full step.
    """
    if name == "embedding.word_embeddings.weight":
        return value[:VOCAB]
    if name == "decoder.layers.self_attention.linear_qkv.bias":
        return value.view(LAYERS, HEADS, 3, -1)[:, :, [0, 2]]
    return value


def test_padded_rows_take_no_part() -> None:
    model = reference()
    model.randomize(seed=3)
    batch = tokens(2, SEQ + 1)
    model.loss(batch[:, :-1], batch[:, 1:]).backward()
    gradient = model.get_parameter("embedding.word_embeddings.weight").grad
    assert gradient is not None
    assert gradient[VOCAB:].count_nonzero() == 0
    assert gradient[:VOCAB].count_nonzero() == VOCAB * HIDDEN


def test_bf16_follows_fp32_and_keeps_fp32_weights() -> None:
    lrs = [1e-3] * 5
    steps = [[tokens(4, SEQ + 1, seed=step)] for step in range(len(lrs))]
    histories, weights = {}, {}
    for precision in ("fp32", "bf16"):
        model = reference()
        model.randomize(seed=4)
        histories[precision] = train(
            model, steps, lrs=lrs, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0, precision=precision
        )
        weights[precision] = model.global_tensors()
    losses = {precision: [loss for loss, _ in history] for precision, history in histories.items()}
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=2e-2)
    assert losses["bf16"] != losses["fp32"], "the bf16 run must have computed in bf16"
    for name, value in weights["bf16"].items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), f"{name} has been rounded to bf16"


def test_clip_of_zero_turns_clipping_off() -> None:
    """A large eps makes AdamW's step depend on the size of the gradient."""
    steps = [[tokens(2, SEQ + 1)]]
    weights = []
    for clip in (0.0, 1e9, 1e-3):
        model = reference()
        model.randomize(seed=5)
        train(model, steps, lrs=[1e-2], betas=(0.9, 0.95), eps=1e-2, weight_decay=0.0, clip=clip, precision="fp32")
        weights.append(model.global_tensors()["decoder.final_layernorm.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])
