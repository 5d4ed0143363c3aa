"""A run from other terminals: Ctrl-C, `status`, `logs`, `stop` and `resume`, on real commands."""

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import drill
from deeds import Deed, Doer, find, kill
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed, processes_of
from launcher.cli.main import main
from small_run import broadgauge
from trainer.events import EventLog


def start(run: DrilledRun) -> subprocess.Popen[str]:
    """As from a terminal: a process group of its own."""
    return subprocess.Popen(
        run.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ctrl_c(times: int) -> Callable[[DrilledRun], bool]:
    """To all processes of the terminal."""

    def do(run: DrilledRun) -> bool:
        pid = find(run, "job")
        if pid is None:
            return False
        for _ in range(times):
            os.killpg(pid, signal.SIGINT)
        return True

    return do


@pytest.mark.slow
def test_ctrl_c_saves_and_stop_too_and_resume_goes_on(
    small_job: SmallJob, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    expected = undisturbed()
    run = small_job.new_run(tmp_path)
    command = start(run)
    with Doer(run, deque([Deed("Ctrl-C", ctrl_c(1), "event step", 2)]), []):
        _, complaint = command.communicate(timeout=drill.PATIENCE_SECONDS)
    (asked,) = run.events("preempted")
    step = asked["step"]
    assert command.returncode == 130, complaint
    assert complaint.strip() == (
        f"interrupted: Ctrl-C: stopped after step {step}, saved at step {step}; the same command goes on from there"
    )
    assert not processes_of(run)
    shown = json.loads(broadgauge("status", run.run_dir.path, "--json").stdout)
    assert (shown["state"], shown["step"], shown["saved_step"], shown["lives"]) == ("preempted", step, step, 1)

    command = start(run)
    deeds = [
        kill("rank", "event step", 1, rank=1),
        kill("rank", "event training_started", number=signal.SIGSTOP),
        Deed("stop", stop, "event step", 0),
    ]
    with Doer(run, deque(deeds), []):
        _, complaint = command.communicate(timeout=drill.PATIENCE_SECONDS)
    assert command.returncode == 75 and "`broadgauge stop`: stopped after step" in complaint
    shown = json.loads(broadgauge("status", run.run_dir.path, "--json").stdout)
    assert (shown["state"], shown["lives"], shown["failures"]) == ("preempted", 3, 1)
    assert "rank 1 was killed by SIGKILL" in shown["last_failure"] and shown["step"] < 16

    assert broadgauge("resume", run.run_dir.path).returncode == 0
    expect_as_if_undisturbed(run, expected)
    assert json.loads(broadgauge("status", run.run_dir.path, "--json").stdout)["state"] == "finished"


def stop(run: DrilledRun) -> bool:
    """While it is done `status` knows of it."""
    shown = json.loads(broadgauge("status", run.run_dir.path, "--json").stdout)
    assert (shown["state"], shown["detail"]) == ("working", "train")
    subprocess.Popen([run.command[0], "stop", str(run.run_dir.path)], stdout=subprocess.DEVNULL)
    while not run.run_dir.stop_path.exists():
        time.sleep(0.01)
    rank = find(run, "rank")
    assert rank is not None
    os.kill(rank, signal.SIGCONT)
    return True


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path, num_steps=2000)
    command = start(run)
    with Doer(run, deque([Deed("Ctrl-C", ctrl_c(1), "event step", 2), Deed("again", ctrl_c(1), "event step", 0)]), []):
        _, complaint = command.communicate(timeout=drill.PATIENCE_SECONDS)
    assert command.returncode == 130 and "interrupted" in complaint
    assert not processes_of(run)


@dataclass(frozen=True)
class Said:
    code: int | str | None
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`broadgauge ...` in this process, which has imported all that it needs."""

    def run(*arguments: object) -> Said:
        with pytest.raises(SystemExit) as end:
            main(list(map(str, arguments)))
        return Said(end.value.code, *capsys.readouterr())

    return run


def test_logs_are_gathered_and_the_first_error_is_found(small_job: SmallJob, command: Command, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path)
    logs = run.run_dir.logs
    for rank in range(2):
        (logs / f"rank-{rank}.log").write_text(f"old\nTraceback of long ago\nfirst {rank}\nsecond {rank}\n")
    shown = command("logs", run.run_dir.path, "--tail", 2).out.splitlines()
    assert shown == ["rank 0 | first 0", "rank 0 | second 0", "rank 1 | first 1", "rank 1 | second 1"]
    assert command("logs", run.run_dir.path, "--rank", 1, "--tail", 1).out == "rank 1 | second 1\n"
    assert command("logs", run.run_dir.path, "--error").out == "no failure is recorded\n"
    (logs / "rank-1.log").write_text("Traceback 1\nof before\nTraceback (most recent call last):\nValueError: no\n")
    log = EventLog(run.run_dir.events_path)
    path, error = str(logs / "rank-1.log"), "rank 1 raised ValueError: no"
    log.write("life_failed", what="rank", error=error, machine="", step=3, log=path)
    log.write("failed", error=f"JobFailed: {error}", log=None)
    log.close()
    shown = command("logs", run.run_dir.path, "--error").out.splitlines()
    assert shown[1:] == ["Traceback (most recent call last):", "ValueError: no"] and shown[0].startswith(
        "rank 1 raised"
    )
    wrong = command("logs", run.run_dir.path, "--rank", 7)
    assert wrong.code == 2 and "has no log of rank 7" in wrong.err


def test_what_is_no_run_or_not_at_work_is_refused(small_job: SmallJob, command: Command, tmp_path: Path) -> None:
    nothing = command("status", tmp_path)
    assert nothing.code == 2 and "holds no config.yaml of a run" in nothing.err
    run = small_job.new_run(tmp_path / "idle")
    idle = command("stop", run.run_dir.path)
    assert idle.code == 2 and "no command of this machine works on" in idle.err
    assert json.loads(command("status", run.run_dir.path, "--json").out)["state"] == "not begun"
