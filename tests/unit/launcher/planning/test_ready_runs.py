"""Runs in configs/: short files that fit their clusters with room to spare, and whose warnings are explained."""

import re
from pathlib import Path

import pytest

from launcher import memory
from launcher.planning import cluster as clusters
from launcher.planning.planner import make_plan
from trainer import config_file, plan
from trainer.config import RunConfig

CONFIGS = Path(__file__).parents[4] / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
READY = [path for path in RUNS if config_file.load(path).launch.cluster]
SHARED_MEMORY_BYTES = 1.0e12  # of a DGX: half of its 2 TB

EXPLAINED = {
    # run: what its plan warns of, and the words with which the file says why
    "gpt3-760m": ("heads of 96 elements", "heads of 96 elements are the paper's too"),
    "gpt3-2.7b": ("heads of 80 elements", "heads of 80 elements are the paper's too"),
    "quickstart": ("without parallel.sequence", "without `sequence`"),
}


def test_every_published_size_has_a_run() -> None:
    sizes = {
        "gpt1": ["117m"],
        "gpt2": ["small", "medium", "large", "xl"],
        "gpt3": ["125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b"],
        "llama3": ["8b-32k"],
    }
    assert {path.stem for path in READY} == {f"{model}-{size}" for model, names in sizes.items() for size in names}


@pytest.mark.parametrize("path", [*RUNS, *sorted((CONFIGS / "data").glob("*.yaml"))], ids=lambda path: path.stem)
def test_a_config_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_fits_its_cluster_and_its_warnings_are_explained(path: Path) -> None:
    config = config_file.load(path)
    found = make_plan(config, clusters.load(clusters.named_by(config)))
    assert found.free_bytes >= 0.1 * found.cluster.memory_bytes
    warned, explanation = EXPLAINED.get(path.stem, ("", ""))
    assert all(warned and warned in each.problem for each in found.advice), found.advice
    assert explanation in path.read_text()


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_run_is_its_preset_on_whole_machines(path: Path) -> None:
    config = config_file.load(path)
    assert config.name == path.stem
    published = config_file.from_tree({"preset": config.preset})
    assert plan.num_parameters(config.model) == plan.num_parameters(published.model)
    if path.stem.startswith("gpt3"):
        assert config.train.total_tokens == 300 * 10**9
    assert config.ranks_per_node == clusters.load(str(config.launch.cluster)).devices_per_node
    assert memory.room_bytes(config) <= SHARED_MEMORY_BYTES


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_data_that_a_run_is_to_find_prepared_is_made_by_a_config_for_its_vocabulary(path: Path) -> None:
    config = config_file.load(path)
    if config.data.prepared is None:
        assert all(source.startswith("hf:") for source in config.data.sources or ())
        return
    named = re.search(r"broadgauge prepare (configs/data/\S+) --out (\S+)", path.read_text())
    assert named and named[2] == config.data.prepared
    preparing: RunConfig = config_file.load(CONFIGS.parent / named[1])
    assert preparing.model.vocab_size == config.model.vocab_size
