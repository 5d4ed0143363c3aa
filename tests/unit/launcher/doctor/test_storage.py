"""Places that a config names: read, written, and refused."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.doctor import machine
from launcher.doctor.checks.storage import Place, examine, places
from launcher.doctor.finding import Finding
from launcher.doctor.guard import outcome
from launcher.doctor.machine import Subject, checks
from made_checkpoints import write_checkpoint
from trainer.config import RunConfig
from trainer.config_file import from_tree
from unreliable_store import Trouble, UnreliableStore


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    UnreliableStore.trouble = Trouble()
    yield UnreliableStore.trouble
    UnreliableStore.trouble.released.set()
    UnreliableStore.trouble = Trouble()


def found(config: RunConfig) -> list[Finding]:
    """What the doctor says of the config's places."""
    return [outcome(check) for check in checks(Subject(config, Path("/"))) if check.name == "storage"]


def config(data: dict[str, Any] | None = None, **checkpoint: object) -> RunConfig:
    return from_tree({"data": data or {}, "checkpoint": checkpoint})


def test_places_are_those_that_the_run_uses() -> None:
    tree = {"datasets": {"web": {"sources": ["a", "s3://b/c"]}, "wiki": {"sources": ["d"], "text_field": "body"}}}
    assert places(config(tree, upload_to="s3://x/y", resume_from="runs/z")) == [
        Place("data.datasets.web.sources", "a", "source"),
        Place("data.datasets.web.sources", "s3://b/c", "source"),
        Place("data.datasets.wiki.sources", "d", "source", "body"),
        Place("checkpoint.upload_to", "s3://x/y", "upload"),
        Place("checkpoint.resume_from", "runs/z", "checkpoint"),
    ]
    prepared = config({"prepared": "data"}, weights_from="imports/gpt2")
    assert [place.kind for place in places(prepared)] == ["prepared", "checkpoint"]


def test_sources_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (good,) = found(config({"sources": [str(tmp_path)]}))
    assert (good.verdict, good.measured) == ("ok", f"data.sources {tmp_path}: 1 file(s), 14 bytes")
    (bad,) = found(config({"sources": [f"{tmp_path}/nowhere"]}))
    assert (bad.verdict, bad.measured) == ("fail", f"data.sources: {tmp_path}/nowhere does not exist")
    (tmp_path / "b.jsonl").mkdir()
    (tmp_path / "b.jsonl" / "c.jsonl").symlink_to("nothing")
    (broken,) = found(config({"sources": [str(tmp_path)]}))
    assert broken.verdict == "fail" and "c.jsonl cannot be read (No such file" in broken.measured


def test_prepared_data_is_opened(tmp_path: Path) -> None:
    (bad,) = found(config({"prepared": str(tmp_path)}))
    assert bad.verdict == "fail" and bad.measured.startswith(f"data.prepared: {tmp_path} holds no prepared data")


def test_a_store_for_uploads_is_written_and_nothing_is_left(tmp_path: Path, trouble: Trouble) -> None:
    _, good = found(config(upload_to=f"unreliable://{tmp_path}/run"))
    assert (good.verdict, good.measured) == (
        "ok",
        f"checkpoint.upload_to unreliable://{tmp_path}/run: written, read and removed",
    )
    assert "write" in trouble.operations
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    trouble.read_only = True
    _, bad = found(config(upload_to=f"unreliable://{tmp_path}/run"))
    assert bad.verdict == "fail" and "Read-only file system" in bad.measured
    assert bad.fix == "check the URL, your credentials and the network"


def test_a_store_that_hangs_fails(tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble.hangs_in = "list"
    monkeypatch.setattr(machine, "_STORE_SECONDS", 0.1)
    _, bad = found(config(upload_to=f"unreliable://{tmp_path}"))
    assert bad.verdict == "fail" and "has not ended in 0.1 s" in bad.measured


def test_a_source_that_hangs_fails(tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble.hangs_in = "look"
    monkeypatch.setattr(machine, "_STORAGE_SECONDS", 0.1)
    (bad,) = found(config({"sources": [f"unreliable://{tmp_path}/a.jsonl"]}))
    assert bad.measured == f"data.sources unreliable://{tmp_path}/a.jsonl: no answer in 0.1 s"


def test_a_checkpoint_to_start_from_is_looked_at(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 10, {"master/norm": np.zeros(6, "<f4")})
    _, good = found(config(resume_from=str(tmp_path)))
    assert good.verdict == "ok" and "step-00000010, " in good.measured
    file = next(checkpoint.glob("*.safetensors"))
    for damage in (lambda: os.truncate(file, 8), file.unlink):
        damage()
        _, bad = found(config(weights_from=str(checkpoint)))
        assert bad.verdict == "fail" and "is missing or not as long as the manifest says" in bad.measured
    _, none = found(config(resume_from=f"{tmp_path}/nowhere"))
    assert none.verdict == "fail" and "nowhere is no checkpoint" in none.measured


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    place = Place("data.sources", f"unknown://user:hunter2@{tmp_path}/a", "source")
    assert "hunter2" not in place.shown
    with pytest.raises(ValueError) as refusal:
        examine(place, 1.0)
    assert "hunter2" not in str(refusal.value)
