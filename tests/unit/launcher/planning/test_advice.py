"""Each misconfiguration is named with its fix, and following the fix ends the warning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.planning.cluster import load
from launcher.planning.planner import make_plan
from trainer import config_file
from trainer.config import UserError

ROOT = Path(__file__).parents[4]
SOUND: dict[str, Any] = {
    "preset": "gpt3_6_7b",
    "model.vocab_size": 50304,
    "train.ramp_start_batch_size": None,
    "train.ramp_tokens": 0,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 1024,
    "parallel.tensor": 2,
    "parallel.sequence": True,
    "parallel.data": 32,
}


@dataclass(frozen=True)
class Case:
    wrong: dict[str, Any]
    problem: str
    fixed: dict[str, Any]


CASES = {
    "no room": Case({"train.micro_batch_size": 32}, "has no room", {"train.micro_batch_size": 2}),
    "needless recomputation": Case({"train.recompute": "full"}, "without need", {"train.recompute": "none"}),
    "no sequence parallel": Case({"parallel.sequence": False}, "keep", {"parallel.sequence": True}),
    "tensor over machines": Case(
        {"parallel.tensor": 16, "parallel.data": 4}, "parallel.tensor 16 reaches over", {"parallel.tensor": 8}
    ),
    "context over machines": Case(
        {"parallel.tensor": 8, "parallel.context": 2, "parallel.data": 4},
        "x context 2 reaches over",
        {"parallel.tensor": 2},
    ),
    "idle devices": Case(
        {"parallel.tensor": 4, "parallel.data": 5, "train.global_batch_size": 1280},
        "devices of a machine",
        {"parallel.data": 4},
    ),
    "more machines than devices fill": Case(
        {"launch.nodes": 16}, "launch.nodes 16 leaves machines of 8 devices with 4 ranks", {"launch.nodes": 8}
    ),
    "too few micro-batches": Case(
        {"parallel.pipeline": 4, "parallel.data": 128}, "4 micro-batches for 4", {"parallel.data": 32}
    ),
    "long last stage": Case(
        {
            "preset": "gpt2_xl",
            "parallel.tensor": 1,
            "parallel.sequence": False,
            "parallel.pipeline": 16,
            "parallel.data": 2,
        },
        "for the output layer of model.vocab_size 50304",
        {"parallel.pipeline": 1},
    ),
    "gradients in every micro-batch": Case({"parallel.zero": 2}, "in every micro-batch", {"parallel.zero": 1}),
    "fp32": Case({"train.precision": "fp32"}, "matrix units idle", {"train.precision": "bf16"}),
    "padding": Case({"model.vocab_size": 900}, "padded to 1024", {"model.vocab_size": 1024}),
    "few tokens": Case(
        {"model.seq_length": 512, "train.micro_batch_size": 1}, "has 512 tokens", {"train.micro_batch_size": 4}
    ),
    "window over pieces": Case(
        {"parallel.context": 8, "parallel.data": 8, "model.attention_window": 512},
        "shorter than model.attention_window 512",
        {"parallel.context": 1},
    ),
    "thin matrices": Case(
        {"preset": "gpt2_medium", "parallel.tensor": 4}, "too thin", {"parallel.tensor": 1, "parallel.sequence": False}
    ),
    "tight": Case(
        {"train.micro_batch_size": 8, "model.num_layers": 44},
        "less than this plan may be off by",
        {"train.micro_batch_size": 4},
    ),
    "needless offload": Case(
        {"parallel.offload": "optimizer"}, "slower memory without need", {"parallel.offload": "none"}
    ),
    "ZeRO 2 in a pipeline": Case(
        {"parallel.zero": 2, "parallel.pipeline": 4, "parallel.data": 16},
        "sends gradients between replicas 32 times",
        {"parallel.zero": 1},
    ),
    "ZeRO 3 in a pipeline": Case(
        {"parallel.zero": 3, "parallel.pipeline": 4, "parallel.data": 16},
        "sends gradients and weights between replicas 32 times",
        {"parallel.zero": 1},
    ),
    "too small a batch for so many devices": Case(
        {"train.global_batch_size": 64}, "gradients and weights travel for", {"train.global_batch_size": 1024}
    ),
    "odd width": Case(
        {"model.hidden_size": 4128, "model.num_heads": 48},
        "model.hidden_size 4128 makes",
        {"model.hidden_size": 4096, "model.num_heads": 32},
    ),
    "odd feed-forward width": Case(
        {"model.ffn_hidden_size": 11008, "parallel.tensor": 8, "parallel.data": 8},
        "model.ffn_hidden_size 11008 over 8 tensor-parallel ranks",
        {"model.ffn_hidden_size": 11264},
    ),
    "seldom saved": Case(
        {"checkpoint.every_steps": 100_000, "launch.spares": 2},
        "a checkpoint every 100,000 steps",
        {"checkpoint.every_steps": 400},
    ),
    "odd heads": Case({"preset": "gpt3_2_7b"}, "heads of 80", {"preset": "gpt3_6_7b"}),
}


def warnings(settings: dict[str, Any]) -> list[str]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return [str(each) for each in make_plan(config_file.from_tree(tree), load("h100")).advice]


def test_a_sound_layout_is_not_warned_of() -> None:
    assert warnings(SOUND) == []


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_is_named_until_it_is_mended(name: str) -> None:
    case = CASES[name]
    assert [each for each in warnings(SOUND | case.wrong) if case.problem in each]
    assert not [each for each in warnings(SOUND | case.wrong | case.fixed) if case.problem in each]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads over ranks": ({"parallel.tensor": 3, "parallel.sequence": False}, "model.num_heads 32 is not divisible"),
    "layers over stages": ({"parallel.pipeline": 5}, "model.num_layers 32 is not divisible"),
    "groups of micro-batches": (
        {"parallel.pipeline": 4, "parallel.virtual_pipeline": 2, "parallel.data": 1, "train.global_batch_size": 1022},
        "parallel.virtual_pipeline",
    ),
    "pieces of sequences": ({"parallel.context": 2, "model.seq_length": 2046}, "model.seq_length 2046 is not"),
    "sequence parallel alone": ({"parallel.tensor": 1, "parallel.sequence": True}, "parallel.sequence"),
    "batch over replicas": ({"parallel.data": 48}, "train.global_batch_size 1024 is not divisible"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_its_fix(name: str) -> None:
    wrong, problem = REFUSED[name]
    with pytest.raises(UserError) as refused:
        warnings(SOUND | wrong)
    assert problem in str(refused.value) and "; use " in str(refused.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_planned(path: Path) -> None:
    config = config_file.load(path)
    plan = make_plan(config, load("cpu" if config.launch.device == "cpu" else "h100"))
    assert plan.fits and 0 < plan.mfu <= plan.hfu < 1
