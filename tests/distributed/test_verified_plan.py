"""`plan --verify`: ranks that DeepSpeed and megatron-core build on the meta device, against the plan's arithmetic."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cli.main import main
from launcher.report import verification
from launcher.verbs.verifying import Verification, differences, verify
from planned_runs import LLAMA_CLASS
from trainer.config import RunConfig
from trainer.config_file import from_tree, override

# Nothing divides evenly: partitions of every ZeRO stage are filled up, and their borders cut tensors.
MODEL = {"num_layers": 4, "hidden_size": 400, "num_heads": 8, "vocab_size": 1000, "seq_length": 48}
LLAMA: dict[str, Any] = LLAMA_CLASS | {"model.num_kv_heads": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "DP3": {"parallel.data": 3},
    "DP3 CP2": {"parallel.data": 3, "parallel.context": 2},
    "TP2 SP PP2 DP3": {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2, "parallel.data": 3},
    "PP2 interleaved DP3": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.data": 3},
    "PP4 DP2": {"parallel.pipeline": 4, "parallel.data": 2},
}
QUICK: dict[str, dict[str, Any]] = {
    "ZeRO-1 bf16": LAYOUTS["TP2 SP PP2 DP3"],
    "ZeRO-1 fp32": LAYOUTS["PP4 DP2"] | {"train.precision": "fp32"},
    "ZeRO-2 bf16": LAYOUTS["DP3 CP2"] | {"parallel.zero": 2},
    "ZeRO-2 fp32, interleaved": LAYOUTS["PP2 interleaved DP3"] | {"parallel.zero": 2, "train.precision": "fp32"},
    "ZeRO-3 bf16, Llama-class": LAYOUTS["TP2 SP PP2 DP3"] | {"parallel.zero": 3} | LLAMA,
    "ZeRO-2 offloaded": LAYOUTS["DP3"] | {"parallel.zero": 2, "parallel.offload": "optimizer"},
    "post-norm": LAYOUTS["DP3"]
    | {"parallel.zero": 2, "train.precision": "fp32", "model.norm_placement": "post", "model.biases": "all_but_qkv"},
}
EVERY = {
    f"{layout}, ZeRO-{zero} {precision} {offload} {model}": LAYOUTS[layout]
    | {"parallel.zero": zero, "train.precision": precision, "parallel.offload": offload}
    | changes
    for layout in LAYOUTS
    for zero in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for offload in ("none", "optimizer")
    for model, changes in {"GPT": {}, "Llama-class": LLAMA}.items()
}
GPT3: dict[str, Any] = {
    "preset": "gpt3_175b",
    "parallel": {"tensor": 8, "pipeline": 16, "data": 8, "sequence": True},
    "launch": {"device": "cuda", "nodes": 128},
}
"""On 1,024 ranks."""


def config_of(settings: dict[str, Any]) -> RunConfig:
    tree = {"model": dict(MODEL), "train": {"global_batch_size": 24}, "launch": {"device": "cpu"}}
    return override(tree, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def corners(config: RunConfig) -> list[int]:
    """Ranks of the first, an inner and the last stage, each with its first and last tensor rank and replica."""
    tensor, replicas, stages = config.parallel.tensor, config.parallel.data, config.parallel.pipeline
    return [
        (stage * replicas + replica) * tensor + place
        for stage in (0, stages // 2, stages - 1)
        for replica in (0, replicas - 1)
        for place in (0, tensor - 1)
    ]


@pytest.mark.parametrize("case", QUICK)
def test_every_rank_is_as_planned(case: str) -> None:
    config = config_of(QUICK[case])
    found = verify(config)
    assert found.differences == []
    assert [rank.rank for rank in found.ranks] == list(range(config.parallel.num_ranks))
    assert {rank.stage for rank in found.ranks} == set(range(config.parallel.pipeline))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY)
def test_every_rank_is_as_planned_in_every_layout(case: str) -> None:
    assert verify(config_of(EVERY[case])).differences == []


def test_corners_of_gpt3_on_1024_ranks() -> None:
    config = from_tree(GPT3)
    found = verify(config, corners(config))
    assert len(found.ranks) == found.num_equal == 12
    assert sum(rank.num_parameters for rank in found.ranks) / len(found.ranks) == pytest.approx(175e9 / 128, rel=0.07)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gpt3_on_1024_ranks() -> None:
    found = verify(from_tree(GPT3))
    assert len(found.ranks) == found.num_equal == 1024


def test_a_wrong_plan_is_found() -> None:
    """One layer more a stage; another ZeRO stage; another precision."""
    config = config_of({"parallel.data": 2, "parallel.pipeline": 2})
    built = verify(config, [0, 3]).ranks
    assert differences(config, built) == []
    deeper = config_of({"parallel.data": 2, "parallel.pipeline": 2, "model.num_layers": 6})
    assert {(each.rank, each.what) for each in differences(deeper, built)} == {
        (rank, what) for rank in (0, 3) for what in ("num_parameters", "weights", "gradients", "optimizer")
    }
    split = config_of({"parallel.data": 2, "parallel.pipeline": 2, "parallel.zero": 2})
    assert {each.what for each in differences(split, built)} == {"gradients"}
    wide = config_of({"parallel.data": 2, "parallel.pipeline": 2, "train.precision": "fp32"})
    assert {each.what for each in differences(wide, built)} == {"weights"}


def test_one_byte_of_one_rank_is_seen_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of({"parallel.data": 2})
    first, second = verify(config).ranks
    off_by_one = [first, replace(second, optimizer=second.optimizer + 1)]
    (difference,) = differences(config, off_by_one)
    assert (difference.rank, difference.what, difference.built - difference.planned) == (1, "optimizer", 1)
    Console(width=120).print(verification.screen(Verification(off_by_one, [difference], 1.0)))
    out = capsys.readouterr().out
    assert f"rank 1: optimizer {difference.built:,}, planned {difference.planned:,}" in out
    assert "1 of 2 ranks equal" in out


def test_the_command_tells_stages_and_verdict(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config_file_text(), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path), "--verify"])
    assert end.value.code == 0
    assert "4 of 4 ranks equal to the plan, to the byte" in capfd.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path), "--verify", "--json"])
    tree = json.loads(capfd.readouterr().out)
    assert (tree["num_ranks"], tree["num_equal"], tree["differences"]) == (4, 4, [])
    assert {rank["stage"] for rank in tree["ranks"]} == {0, 1}


def config_file_text() -> str:
    tree = {"model": MODEL, "parallel": {"pipeline": 2, "data": 2}, "launch": {"device": "cpu"}, "data": {}}
    return json.dumps({"name": "small", **tree, "train": {"global_batch_size": 24}})
