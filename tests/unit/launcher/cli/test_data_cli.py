"""`broadgauge data ledger`: what it prints, and how it ends."""

import json
from pathlib import Path

import pytest

from launcher.cli.main import main
from simulated_run import SimulatedRun, write_data
from trainer.config_file import from_tree

SEQ = 6


@pytest.fixture
def run(tmp_path: Path) -> SimulatedRun:
    """Twelve samples a step, one rollback behind them."""
    data = write_data(tmp_path / "data", {"web": 41, "books": 23}, SEQ)
    config = from_tree(
        {
            "model": {"seq_length": SEQ},
            "train": {"total_tokens": 120 * SEQ, "global_batch_size": 12},
            "data": {"prepared": str(data), "blend": {"web": 3, "books": 1}},
        }
    )
    history = SimulatedRun(tmp_path / "run", config)
    history.steps(3)
    history.save()
    history.skip()
    history.roll_back(quarantine=[4])
    history.steps(4)
    history.write()
    return history


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and standard output."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code, capsys.readouterr().out


def test_a_proof_fits_a_screen(run: SimulatedRun, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = outcome(capsys, "data", "ledger", run.run_dir.path)
    assert code == 0 and len(printed.splitlines()) < 24
    assert "steps 1 to 7 of 10: each sample used exactly once an epoch, 1 step left out; tokens of 6 steps" in printed
    assert "7 steps computed; 0 restarts voided 0 of them, 1 rollback 1\n" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["web", "41", "1", "53.7%", "54", "9"] in rows and ["books", "23", "0", "91.3%", "18", "3"] in rows
    assert ["4", "36", "to", "47", "quarantined"] in rows


def test_findings_end_with_1(run: SimulatedRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.event_of(6)["tokens_xxh3"] = "0" * 16
    run.write()
    code, printed = outcome(capsys, "data", "ledger", run.run_dir.path)
    assert code == 1 and "steps 1 to 7 of 10: not proved, 1 finding\n" in printed
    assert "  finding: step 6 was fed other tokens than the data has in samples 60 to 71" in printed
    code, printed = outcome(capsys, "data", "ledger", run.run_dir.path, "--no-tokens")
    assert code == 0 and "tokens not compared" in printed


def test_json_is_the_whole_history(run: SimulatedRun, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = outcome(capsys, "data", "ledger", run.run_dir.path, "--json")
    tree = json.loads(printed)
    assert code == 0 and tree["findings"] == [] and tree["num_steps_compared"] == 6
    found = [
        (step, stretch["first_sample"] + (step - stretch["first_step"]) * stretch["batch_size"], stretch["reason"])
        for stretch in tree["stretches"]
        for step in range(stretch["first_step"], stretch["last_step"] + 1)
    ]
    assert found == [(n, 12 * (n - 1), "quarantined" if n == 4 else None) for n in range(1, 8)]


def test_the_samples_of_a_step(run: SimulatedRun, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = outcome(capsys, "data", "ledger", run.run_dir.path, "--step", 4, "--json")
    tree = json.loads(printed)
    assert code == 0 and (tree["step"], tree["reason"]) == (4, "quarantined")
    assert [each["sample"] for each in tree["samples"]] == list(range(36, 48))
    code, printed = outcome(capsys, "data", "ledger", run.run_dir.path, "--step", 4)
    assert code == 0 and printed.startswith("step 4: 12 samples; left out: quarantined\n")
    rows = [line.split() for line in printed.splitlines()[2:]]
    assert rows == [[str(each[key]) for key in ("sample", "dataset", "epoch", "window")] for each in tree["samples"]]


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "data", "ledger", tmp_path)[0] == 2
