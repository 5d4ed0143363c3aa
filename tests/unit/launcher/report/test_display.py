"""What a command says while it works, in each of its modes."""

import io
import json

import pytest
from rich.console import Console
from rich.table import Table

from launcher.report import display as display_module
from launcher.report.display import MODES, Display, Mode, printable


def said(mode: Mode, *, terminal: bool = False, monkeypatch: pytest.MonkeyPatch) -> str:
    """By a command that does a stage of 100 pieces, one every 4 seconds, and warns."""
    now = 0.0
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=terminal, width=100), mode)
    with display.stage("train") as bar:
        for done in range(100):
            now += 4
            bar.update("train: loss 1.5 [/red]", done + 1, 100, "steps")
        display.warn("step 7 skipped")
        bar.result = "the model learned"
    table = Table(show_header=False)
    table.add_row("a table")
    display.show(table)
    display.line("a line")
    return stream.getvalue()


def test_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("auto", "plain"):
        text = said(mode, monkeypatch=monkeypatch)  # type: ignore[arg-type]
        lines = text.splitlines()
        progress = [line for line in lines if "steps" in line]
        assert progress[0] == "  train: loss 1.5 [/red]: 4 of 100 steps" and len(progress) == 25
        assert "  warning: step 7 skipped" in lines and "train      400.0 s  the model learned" in lines
        assert "a table" in text and lines[-1] == "a line"


def test_a_terminal_has_a_bar_unless_it_is_to_be_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in said("auto", terminal=True, monkeypatch=monkeypatch)
    assert "━" not in said("plain", terminal=True, monkeypatch=monkeypatch)


def test_scripts_read_an_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in said("json", monkeypatch=monkeypatch).splitlines()]
    assert lines[0]["kind"] == "stage_started" and lines[0]["stage"] == "train"
    progress = [line for line in lines if line["kind"] == "progress"]
    assert len(progress) == 100 and progress[-1]["done"] == progress[-1]["total"] == 100
    assert progress[0]["doing"] == "train: loss 1.5 [/red]" and progress[0]["unit"] == "steps"
    (finished,) = (line for line in lines if line["kind"] == "stage_finished")
    assert finished["result"] == "the model learned" and finished["seconds"] == 400
    assert [line["text"] for line in lines if line["kind"] in ("warning", "line")] == ["step 7 skipped", "a line"]
    assert all(isinstance(line["time"], float) for line in lines)


def test_scripts_see_the_end_of_what_takes_no_time() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream), "json").stage("export") as bar:
        for doing in ("writing", "comparing"):
            for done in range(1, 4):
                bar.update(doing, done, 3, "tensors")
            bar.update(f"{doing}, still", 3, 3, "tensors")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    progress = [(line["doing"], line["done"]) for line in lines if line["kind"] == "progress"]
    assert progress == [("writing", 3), ("comparing", 3)]


def test_who_is_quiet_says_only_what_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("quiet", monkeypatch=monkeypatch) == "warning: step 7 skipped\n"


@pytest.mark.parametrize("mode", MODES)
def test_a_stage_that_fails_has_no_result(mode: Mode) -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), Display(Console(file=stream), mode).stage("train") as bar:
        bar.result = "trained"
        raise KeyError
    assert "trained" not in stream.getvalue() and "finished" not in stream.getvalue()


def test_a_stage_that_has_nothing_to_say_says_nothing() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream)).stage("verify"):
        pass
    assert stream.getvalue() == ""


def test_no_text_commands_the_terminal() -> None:
    assert printable("a\x1b[31m\u202eb\r\x07é\n\t") == "a\\x1b[31m\\u202eb\\r\\x07é\n\t"
    stream = io.StringIO()
    Display(Console(file=stream)).line("rank 1 said \x1b]0;owned\x07 [bold]")
    assert stream.getvalue() == "rank 1 said \\x1b]0;owned\\x07 [bold]\n"
