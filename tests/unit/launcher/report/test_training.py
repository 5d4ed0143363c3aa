"""The table at the end of a run."""

from pathlib import Path

from rich.console import Console

from launcher.history.history import RunHistory
from launcher.report import training
from made_record import run_of
from trainer.events import Event, read_events
from trainer.run_dir import RunDir


def rows_of(run_dir: RunDir, events: list[Event]) -> dict[str, str]:
    """By name, as they are printed."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(training.summary(run_dir.config(), run_dir, RunHistory.of(events)))
    cells = [line.strip("│").split("│") for line in capture.get().splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in cells}


def test_held_out_loss_is_told_of_every_source(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path / "lion", num_steps=300)
    events = read_events(run_dir.events_path)
    first, *_, last = (event for event in events if event["kind"] == "evaluated")
    rows = rows_of(run_dir, events)
    assert rows["held-out loss"].startswith(f"{first['loss']:.4f} -> {last['loss']:.4f} (")
    assert rows["bits per byte"] == f"{first['loss'] / 3:.4f} -> {last['loss'] / 3:.4f}"
    assert rows["loss by source"] == f"web {last['loss'] + 0.2:.4f}, books {last['loss'] - 0.2:.4f}"


def test_a_record_of_an_earlier_version_tells_what_it_has(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path / "lion", num_steps=100)
    events = read_events(run_dir.events_path)
    for event in events:
        if event["kind"] == "evaluated":
            del event["bits_per_byte"], event["datasets"]
    rows = rows_of(run_dir, events)
    assert "held-out loss" in rows and not {"bits per byte", "loss by source"} & rows.keys()
