"""kill -9 of a preparation before its effects on the disk, then running it again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLER = '''
"""Forks a preparation again and again, each killed a little later than the one before, each followed by a whole one."""
import json, os, random, shutil, signal, sys
from pathlib import Path

from data_pipeline.manifest import Manifest
from data_pipeline.pipeline import prepare
from inline_workers import InlineWorkers
from trainer.config import DataConfig

source, workplace, settings, num_kills = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
EFFECTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Steps:
    """Counts effects under a folder, and batches done; kills this process before the step of the given number."""

    def __init__(self, folder, fatal):
        self.folder, self.fatal, self.taken = str(folder), fatal, 0

    def audit(self, event, arguments):
        if event in EFFECTS and any(str(argument).startswith(self.folder) for argument in arguments):
            self.step()

    def update(self, *progress):
        self.step()

    def step(self):
        if self.taken == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.taken += 1


def run(out, fatal=None):
    """Prepare in a forked process; returns the signal that ended it, or 0, and the number of its steps if it ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        steps = Steps(out, fatal)
        sys.addaudithook(steps.audit)
        data = DataConfig(sources=(source,), heldout_fraction=0.2, **settings)
        prepare(data, vocab_size=280, seq_length=8, out=out, workers=InlineWorkers(), progress=steps)
        os.write(writer, str(steps.taken).encode())
        os._exit(0)
    os.close(writer)
    taken = os.read(reader, 100)
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the preparation failed"
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), int(taken or 0)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


_, num_steps = run(workplace / "whole")
whole = tree(workplace / "whole")
left_behind = set()
fatal_steps = sorted(random.Random(5).sample(range(num_steps), min(num_kills, num_steps)))
for fatal in fatal_steps:
    out = workplace / "killed"
    assert run(out, fatal)[0] == signal.SIGKILL
    if (out / "manifest.json").exists():
        Manifest.load(out).verify(out)  # a manifest is never there without the data it describes
    left_behind |= {path.name for path in out.rglob("*")} if out.exists() else set()
    assert run(out)[0] == 0
    assert tree(out) == whole, f"differs after a kill before step {fatal}"
    shutil.rmtree(out)
print(json.dumps({"steps": num_steps, "left_behind": sorted(left_behind)}))
'''
ROOT = Path(__file__).parents[3]
TRAINED: dict[str, object] = {"dedup": {"fuzzy": "standard", "paragraphs": True}}


def kill_and_go_on(source: Path, workplace: Path, settings: dict[str, object], num_kills: int) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(workplace), json.dumps(settings), str(num_kills)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["steps"], set(result["left_behind"])


def test_a_killed_preparation_run_again_ends_in_the_same_bytes(corpus_folder: Path, tmp_path: Path) -> None:
    num_steps, left_behind = kill_and_go_on(corpus_folder / "part0.jsonl", tmp_path, TRAINED, num_kills=12)
    assert num_steps > 60
    assert {".work", "part.json", "joined", "manifest.json"} <= left_behind, "the kills were spread over the whole job"


@pytest.mark.slow
def test_the_same_where_the_first_pass_tokenizes(corpus_folder: Path, tmp_path: Path) -> None:
    from data_pipeline.tokenization import train_bpe

    train_bpe(["some text to train a tokenizer on, and more of it"] * 50, 280, tmp_path / "tokenizer", 8)
    settings: dict[str, object] = {"tokenizer": str(tmp_path / "tokenizer")}
    num_steps, _ = kill_and_go_on(corpus_folder / "part0.jsonl", tmp_path, settings, num_kills=8)
    assert num_steps > 40


@pytest.mark.slow
def test_a_kill_before_every_single_effect(corpus_folder: Path, tmp_path: Path) -> None:
    kill_and_go_on(corpus_folder / "part0.jsonl", tmp_path, TRAINED, num_kills=10_000)
