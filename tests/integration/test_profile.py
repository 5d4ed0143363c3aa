"""A profile of ranks that train: it is there, and the run is as if nobody had asked."""

import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import drill
from deeds import Deed
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed
from launcher.verbs import profiling
from small_run import broadgauge
from trainer.config import UserError


def test_ranks_are_profiled_and_the_run_goes_on(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    expected, run, found = undisturbed(), small_job.new_run(tmp_path), list[Path]()

    def ask() -> None:
        found.extend(profiling.profile(run.run_dir.path, "9:11", [3, 1]))

    asking = threading.Thread(target=ask)
    drill.train_to_the_end(run, [Deed("profile", lambda run: asking.start() or True, "event step", 3)])
    asking.join(60)
    assert [path.name for path in found] == ["rank-1.json.gz", "rank-3.json.gz"]
    for path in found:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        updates = [event for event in events if event.get("name") == "Optimizer.step#GatedAdamW.step"]
        assert len(updates) == 3
    (told,) = run.events("profiled")
    assert (told["first_step"], told["last_step"], told["problem"]) == (9, 11, None)
    expect_as_if_undisturbed(run, expected)
    refused = broadgauge("profile", run.run_dir.path, "--steps", "20:21")
    assert refused.returncode == 2 and "no command of this machine works on" in refused.stderr


@pytest.mark.parametrize("steps", ["9", "9:", "a:b", "0:3", "9:8", "-1:3", ""])
def test_what_are_no_steps_is_refused(steps: str) -> None:
    with pytest.raises(UserError, match=r"is no range; give the first step and the last, like 15:17"):
        profiling._parsed(steps, 5)


def test_steps_that_have_passed_are_refused() -> None:
    with pytest.raises(UserError, match=r"--steps 6:9: step 5 is done and the next one begins; begin with 8 or later"):
        profiling._parsed("6:9", 5)
    assert profiling._parsed("7:9", 5) == (7, 9)
