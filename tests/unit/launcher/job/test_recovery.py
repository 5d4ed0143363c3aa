"""A run whose own checkpoints are lost goes on from those that were uploaded."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.job.recovery import fetch_newer
from made_checkpoints import write_checkpoint
from trainer.checkpoint.format import store
from trainer.checkpoint.remote.copies import Remote
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

TENSORS = {"master/weight": np.arange(64, dtype=np.float32).reshape(8, 8)}


def config_of(url: Path | str, **sections: Any) -> RunConfig:
    return from_tree({"checkpoint": {"upload_to": str(url)}, **sections})


def uploaded(folder: Path, url: Path, config: RunConfig, *steps: int) -> None:
    remote = Remote.open(str(url))
    for step in steps:
        made = write_checkpoint(folder / "made", step, TENSORS, files=2, config=config.model_dump(mode="json"))
        remote.upload(made)
        remote.commit(store.read(made))


class Recorded(list[tuple[str, dict[str, Any]]]):
    def __call__(self, kind: str, **fields: Any) -> None:
        self.append((kind, fields))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


def test_the_newest_is_fetched_where_nothing_as_new_is_here(tmp_path: Path) -> None:
    config, events = config_of(tmp_path / "remote"), Recorded()
    uploaded(tmp_path, tmp_path / "remote", config, 10, 20)
    checkpoints = tmp_path / "run"
    fetch_newer(config, checkpoints, events)
    assert store.steps(checkpoints) == [20] and store.verify(checkpoints / store.folder_name(20)).step == 20
    assert events.kinds == ["checkpoint_fetched"]
    fetch_newer(config, checkpoints, events)
    assert events.kinds == ["checkpoint_fetched"]  # it is here now


def test_a_truncated_one_here_does_not_count(tmp_path: Path) -> None:
    config, events = config_of(tmp_path / "remote"), Recorded()
    uploaded(tmp_path, tmp_path / "remote", config, 10, 20)
    checkpoints = tmp_path / "run"
    shutil.copytree(tmp_path / "made", checkpoints)
    (checkpoints / store.folder_name(20) / "rank-00001.safetensors").write_bytes(b"")
    fetch_newer(config, checkpoints, events)
    assert store.verify(checkpoints / store.folder_name(20)).step == 20 and events.kinds == ["checkpoint_fetched"]


def test_a_damaged_copy_gives_way_to_the_one_before(tmp_path: Path) -> None:
    config, events = config_of(tmp_path / "remote"), Recorded()
    uploaded(tmp_path, tmp_path / "remote", config, 10, 20)
    victim = tmp_path / "remote" / store.folder_name(20) / "rank-00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    fetch_newer(config, tmp_path / "run", events)
    assert store.steps(tmp_path / "run") == [10]
    assert events.kinds == ["checkpoint_rejected", "checkpoint_fetched"]


def test_another_run_s_checkpoints_are_refused_and_another_layout_is_not(tmp_path: Path) -> None:
    uploaded(tmp_path, tmp_path / "remote", config_of(tmp_path / "remote"), 10)
    with pytest.raises(UserError, match=r"of a run with another config .*seed.*; name another place"):
        fetch_newer(config_of(tmp_path / "remote", seed=7), tmp_path / "run", Recorded())
    assert not (tmp_path / "run").exists()
    fetch_newer(config_of(tmp_path / "remote", parallel={"data": 2}), tmp_path / "run", Recorded())
    assert store.steps(tmp_path / "run") == [10]


def test_a_run_without_a_checkpoint_does_not_start_anew_because_the_store_is_away(tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("not a folder")
    config, events = config_of(tmp_path / "remote" / "sub"), Recorded()
    nowhere = config_of("http://127.0.0.1:9/sub")
    with pytest.raises(UserError, match=r"does not start anew"):
        fetch_newer(nowhere, tmp_path / "run", events)
    write_checkpoint(tmp_path / "run", 10, TENSORS, config=config.model_dump(mode="json"))
    fetch_newer(nowhere, tmp_path / "run", events)
    assert events.kinds == ["checkpoint_rejected"] and "going on from what is here" in events[0][1]["reason"]


def test_without_a_place_nothing_is_looked_for(tmp_path: Path) -> None:
    fetch_newer(RunConfig(), tmp_path / "run", Recorded())
