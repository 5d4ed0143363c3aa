"""Clusters: those that come along are the vendors', and a file that is wrong says how."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from launcher.planning import cluster
from launcher.planning.planner import make_plan
from launcher.report.planning import screen
from trainer.config import UserError
from trainer.config_file import from_tree
from trainer.hardware import PEAK_FLOPS


@pytest.mark.parametrize("name", cluster.names())
def test_clusters_that_come_along_are_valid_and_cite_their_sources(name: str) -> None:
    found = cluster.load(name)
    comment = (cluster.FOLDER / f"{name}.yaml").read_text().partition("\ndevice:")[0]
    assert found.kind == "cpu" or all(word in comment for word in ("Peaks", "Achievable", "Links", "data sheet"))


@pytest.mark.parametrize("part_of_name", PEAK_FLOPS)
def test_peaks_are_those_that_mfu_is_reported_by(part_of_name: str) -> None:
    peaks = {cluster.load(name).bf16_flops for name in cluster.names() if part_of_name.lower() in name}
    assert peaks == {PEAK_FLOPS[part_of_name]}


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    text = (cluster.FOLDER / "h100.yaml").read_text() + "price_per_device_hour: 2.5\n"
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert cluster.load(str(path)) == cluster.load("h100").model_copy(update={"price_per_device_hour": 2.5})


@pytest.mark.parametrize(
    ("wanted", "text", "message"),
    [
        ("h10", None, "no cluster h10 comes along; did you mean h100?"),
        ("nowhere.yaml", None, "cannot read the cluster nowhere.yaml: No such file or directory"),
        ("typo", "devise: H100", "unknown key devise; did you mean device?"),
        ("h100.json", None, "no cluster h100.json comes along; did you mean h100?"),
        ("negative", "device: X\nbf16_flops: -1.0", "bf16_flops: input should be greater than or equal to 1, got -1.0"),
        ("short", "device: X", "bf16_flops: field required (and 11 more)"),
        ("\0.yaml", None, "cannot read the cluster"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, wanted: str, text: str | None, message: str) -> None:
    path = tmp_path / f"{wanted}.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(UserError) as refused:
        cluster.load(str(path) if text else wanted)
    assert message in str(refused.value)


@pytest.mark.parametrize("edge", ["ge", "le"])
@pytest.mark.parametrize("key", sorted(cluster.Cluster.model_fields.keys() - {"device", "kind"}))
def test_plans_of_clusters_at_the_edge_of_what_is_accepted_are_numbers(key: str, edge: str) -> None:
    """A slip of units gives a plan that looks wrong, not one that ends in a fault, or in no JSON."""
    accepted = cluster.Cluster.model_json_schema()["properties"][key]
    accepted = next((each for each in accepted.get("anyOf", ()) if "type" in each), accepted)
    value = accepted.get("maximum") if edge == "le" else accepted.get("minimum", accepted.get("exclusiveMinimum"))
    assert value is not None
    tree = cluster.load("h100").model_dump() | {key: value or (0 if "minimum" in accepted else 1e-300)}
    config = from_tree({"preset": "gpt3_6_7b", "parallel": {"tensor": 2, "pipeline": 2, "data": 8}})
    plan = make_plan(config, cluster.Cluster.model_validate(tree))
    json.dumps(plan.as_tree(), allow_nan=False)
    shown = io.StringIO()
    Console(file=shown, width=80).print(screen(plan))
    assert not {"inf", "nan"} & {*re.findall(r"[a-z]+", shown.getvalue())}


def test_a_cluster_that_says_nothing_is_refused_like_any_other_that_is_wrong() -> None:
    for wrong in ("", {}):
        with pytest.raises(UserError):
            cluster.load(cluster.named_by(from_tree({"launch": {"cluster": wrong}})))


def test_a_config_says_what_its_cluster_is() -> None:
    assert cluster.named_by(from_tree({"launch": {"cluster": "b200", "device": "cpu"}})) == "b200"
    assert cluster.named_by(from_tree({"launch": {"device": "cpu"}})) == "cpu"
    assert cluster.named_by(from_tree({})) == "h100"
