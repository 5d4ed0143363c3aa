"""kill -9 of a preparation before every one of its effects on the disk, then running it again."""

import json
import subprocess
import sys
from pathlib import Path

KILLER = '''
"""Forks a preparation again and again, each killed a little later than the one before, each followed by a whole one."""
import json, os, shutil, signal, sys
from pathlib import Path

from data_pipeline.manifest import Manifest
from data_pipeline.pipeline import prepare
from trainer.config import DataConfig

source, workplace = sys.argv[1], Path(sys.argv[2])
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
    """Prepare in a forked process; returns the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        steps = Steps(out, fatal)
        sys.addaudithook(steps.audit)
        data = DataConfig(sources=(source,), heldout_fraction=0.2)
        prepare(data, vocab_size=280, seq_length=8, out=out, progress=steps)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the preparation failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


run(workplace / "whole")
whole = tree(workplace / "whole")
left_behind, kills = set(), 0
while True:
    out = workplace / "killed"
    killed = run(out, fatal=kills)
    if not killed:
        break
    kills += 1
    if (out / "manifest.json").exists():
        Manifest.load(out).verify(out)  # a manifest is never there without the data it describes
    left_behind |= set(tree(out)) if out.exists() else set()
    assert run(out) == 0
    assert tree(out) == whole, f"differs after a kill before step {kills}"
    shutil.rmtree(out)
print(json.dumps({"kills": kills, "left_behind": sorted(left_behind), "whole": sorted(whole)}))
'''


def test_a_killed_preparation_run_again_ends_in_the_same_bytes(corpus_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(corpus_folder / "part0.jsonl"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] > 25
    half_written = {f"{name}.tmp" for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "manifest.json")}
    assert half_written | set(result["whole"]) <= set(result["left_behind"]), "the kills were spread over the whole job"
