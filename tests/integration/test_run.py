"""The whole run, as a user starts it: raw text to a Hugging Face folder, interrupted anywhere, in any layout."""

import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import orjson
import pytest

from launcher.cli.main import main
from small_run import BROADGAUGE, NUM_STEPS, broadgauge, write_config
from trainer.events import Event, EventReader, read_events, surviving_steps

PATIENCE_SECONDS = 90


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nobody disturbed, and what it printed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    outcome = broadgauge("run", config_file, "--run-dir", run_dir)
    assert outcome.returncode == 0, outcome.stderr
    return run_dir, outcome.stdout


def events_of(run_dir: Path) -> list[Event]:
    return read_events(run_dir / "events.jsonl")


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in surviving_steps(events_of(run_dir))]


def final_evaluation(run_dir: Path) -> Event:
    last = [event for event in events_of(run_dir) if event["kind"] == "evaluated"][-1]
    return {key: value for key, value in last.items() if key != "time"}


def weights_digest(export: Path) -> str:
    return hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()


def ends_said(stderr: str) -> dict[str, tuple[int, str]]:
    """By `--progress json`: of what was done wholly how much it was, in what unit."""
    said = [line for line in map(orjson.loads, stderr.splitlines()) if line["kind"] == "progress"]
    return {line["doing"]: (line["done"], line["unit"]) for line in said if line["done"] == line["total"]}


def said_by_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """By the command, in this process, which has imported all that it needs."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return printed.out


def status_of(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    return said_by_main(capsys, "status", run_dir)


class TestUndisturbed:
    def test_leaves_what_it_promises(self, finished: tuple[Path, str]) -> None:
        run_dir, _ = finished
        for name in ("config.yaml", "events.jsonl", "loss.png", "export/model.safetensors", "export/README.md"):
            assert (run_dir / name).stat().st_size > 0, name
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000016", "step-00000024"]
        assert {path.name for path in (run_dir / "logs").glob("rank-*.log")} == {f"rank-{n}.log" for n in range(4)}
        assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_says_one_line_a_stage_and_the_verdict(self, finished: tuple[Path, str]) -> None:
        _, printed = finished
        for stage in ("prepare", "train", "export", "generate"):
            assert sum(line.startswith(stage) for line in printed.splitlines()) == 1
        assert "the model learned: held-out loss" in printed
        assert re.search(r"prepare \d+ s", printed)
        for fact in ("tokens/s", "perplexity", "model GFLOP/s", "time", "unigram", "uniform"):
            assert fact in printed
        assert "Warning" not in printed

    def test_learns(self, finished: tuple[Path, str]) -> None:
        evaluations = [event for event in events_of(finished[0]) if event["kind"] == "evaluated"]
        assert [event["step"] for event in evaluations] == [0, NUM_STEPS]
        before, after = evaluations
        assert before["loss"] == pytest.approx(before["uniform_loss"], abs=0.2)  # knows nothing yet
        assert after["loss"] < after["unigram_loss"] < after["uniform_loss"]

    def test_the_plan_stands_beside_what_came(
        self, finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_dir, printed = finished
        kinds = [event["kind"] for event in events_of(run_dir)]
        assert kinds.count("planned") == kinds.count("plan_checked") == 1 and "unplanned" not in kinds
        planned, found = (next(e for e in events_of(run_dir) if e["kind"] == k) for k in ("planned", "plan_checked"))
        steps = [event["seconds"] for event in events_of(run_dir) if event["kind"] == "step"]
        assert (found["step"], found["step_seconds"]) == (10, median(steps[1:10]))
        assert found["planned_step_seconds"] == planned["step_seconds"] > 0
        assert 1e8 < found["memory_bytes"] < 4e9 and 1e8 < planned["memory_bytes"] < 4e9
        (line,) = (line for line in printed.splitlines() if line.startswith("plan "))
        assert re.fullmatch(r"plan      step \S+ m?s, predicted \S+ m?s \(.*%\); memory \S+ GiB, predicted .*\)", line)
        assert "predicted" in printed[printed.index("run small") :]
        assert re.search(r"^plan +step .* predicted .*; tokens/s .*; MFU .*; memory ", status_of(run_dir, capsys), re.M)
        report = Path(said_by_main(capsys, "report", run_dir).strip())
        assert f'"planned":{planned["step_seconds"]}' in report.read_text()

    def test_records_every_step_once(self, finished: tuple[Path, str]) -> None:
        steps = [event for event in events_of(finished[0]) if event["kind"] == "step"]
        assert [event["step"] for event in steps] == list(range(1, NUM_STEPS + 1))
        assert all(event["grad_norm"] > 0 and event["seconds"] > 0 for event in steps)

    def test_does_nothing_when_run_again(
        self, finished: tuple[Path, str], config_file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_dir, _ = finished
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
        assert "has finished already" in said_by_main(capsys, "run", config_file, "--run-dir", run_dir)
        after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
        assert {path.name for path in after if after[path] != before.get(path)} <= {".lock"}

    def test_export_opens_without_our_code(self, finished: tuple[Path, str]) -> None:
        """In a process that cannot import the project, from another folder."""
        code = (
            "import sys, transformers\n"
            "sys.modules.update(trainer=None, launcher=None, data_pipeline=None)\n"
            "make = transformers.pipeline('text-generation', model=sys.argv[1])\n"
            "out = make('the model', max_length=16, num_return_sequences=2, no_repeat_ngram_size=2, pad_token_id=0)\n"
            "assert len(out) == 2 and all(o['generated_text'].startswith('the model') for o in out), out\n"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        command = [sys.executable, "-c", code, str(finished[0] / "export")]
        outcome = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr

    def test_export_states_its_verification(self, finished: tuple[Path, str]) -> None:
        run_dir, _ = finished
        verified = next(event for event in events_of(run_dir) if event["kind"] == "export_verified")
        assert verified["largest_difference"] <= 1e-4
        assert f"{verified['largest_difference']:.3g}" in (run_dir / "export" / "README.md").read_text()


class TestOtherVerbs:
    @pytest.mark.slow
    def test_eval_gives_the_run_s_own_figure_in_another_layout(self, finished: tuple[Path, str]) -> None:
        run_dir, _ = finished
        one_rank = ("--set", "parallel.tensor=1", "parallel.pipeline=1")
        outcome = broadgauge("--progress", "json", "eval", run_dir, *one_rank)
        assert outcome.returncode == 0, outcome.stderr
        assert ends_said(outcome.stderr)["evaluate: held-out text"] == (3, "micro-batches")  # of 4 sequences
        result = orjson.loads(outcome.stdout)
        recorded = final_evaluation(run_dir)
        assert result["step"] == NUM_STEPS and result["tokens"] == recorded["tokens"]
        assert result["unigram_loss"] == recorded["unigram_loss"]
        assert result["loss"] == pytest.approx(recorded["loss"], abs=5e-3)  # bf16
        assert result["perplexity"] == math.exp(result["loss"])
        assert 0 < result["bits_per_byte"] == pytest.approx(recorded["bits_per_byte"], abs=5e-3)
        (source,) = result["datasets"].values()
        assert source["perplexity"] == pytest.approx(result["perplexity"]) and source["tokens"] == result["tokens"]
        assert [str(each["first"]) for each in result["positions"]] == list(recorded["positions"])

    @pytest.mark.slow
    def test_export_of_an_earlier_checkpoint(self, finished: tuple[Path, str], tmp_path: Path) -> None:
        run_dir, _ = finished
        checkpoint = run_dir / "checkpoints" / "step-00000016"
        outcome = broadgauge("--progress", "json", "export", checkpoint, "--out", tmp_path / "hf")
        assert outcome.returncode == 0, outcome.stderr
        ends = ends_said(outcome.stderr)
        said = ("verifying", "verifying data", "writing", "comparing", "comparing logits")
        assert list(ends) == [f"export: {what}" for what in said]
        assert ends["export: writing"] == ends["export: comparing"] == (28, "tensors")
        assert (tmp_path / "hf" / "model.safetensors").exists()
        assert weights_digest(tmp_path / "hf") != weights_digest(run_dir / "export")

    def test_generate_says_the_likeliest_text_as_the_export_does(
        self, finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of the run by its own ranks, of the export by transformers; in fp32 on either side."""
        way = ("--prompt", "the model", "--max-new-tokens", "12", "--greedy", "--repetition-penalty", "1.1")
        printed = []
        for path, settings in ((finished[0], ["--set", "train.precision=fp32"]), (finished[0] / "export", [])):
            with pytest.raises(SystemExit) as end:
                main(["generate", str(path), *way, *settings])
            assert end.value.code == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
        assert printed[0].startswith("the model") and len(printed[0].strip()) > len("the model")

    @pytest.mark.slow
    def test_prepare_then_train_elsewhere_and_resume_from_it(
        self, finished: tuple[Path, str], config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`prepare --out`, then `train` on it on one rank from the other run's checkpoint: nothing is left to do."""
        said_by_main(capsys, "prepare", config_file, "--out", tmp_path / "data")
        for name in ("text/train.bin", "text/train.idx", "text/heldout.bin", "tokenizer/tokenizer.json"):
            assert (tmp_path / "data" / name).read_bytes() == (finished[0] / "data" / name).read_bytes()
        settings = (f"data.prepared={tmp_path / 'data'}", "parallel.tensor=1", "parallel.pipeline=1")
        continued = ("checkpoint.resume_from=" + str(finished[0] / "checkpoints" / "step-00000016"),)
        trained = broadgauge("train", config_file, "--run-dir", tmp_path / "run", "--set", *settings, *continued)
        assert trained.returncode == 0, trained.stderr
        steps = [event for event in events_of(tmp_path / "run") if event["kind"] == "step"]
        assert [event["step"] for event in steps] == list(range(17, NUM_STEPS + 1))
        assert [event["loss"] for event in steps] == pytest.approx(losses(finished[0])[16:], abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_one_rank_gives_the_losses_of_four(
    config_file: Path, finished: tuple[Path, str], tmp_path: Path, precision: str, tolerance: float
) -> None:
    common = (
        f"train.precision={precision}",
        f"data.prepared={finished[0] / 'data'}",
        "optimizer.lr=1e-3",
        "evaluation.max_sequences=4",
    )
    layouts = {"four": (), "one": ("parallel.tensor=1", "parallel.pipeline=1")}
    for name, layout in layouts.items():
        outcome = broadgauge("train", config_file, "--run-dir", tmp_path / name, "--set", *common, *layout)
        assert outcome.returncode == 0, outcome.stderr
    assert len(losses(tmp_path / "one")) == NUM_STEPS
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "four"), abs=tolerance)


# ------------------------------------------------------------------------------------------------------- interruptions


def run_and_interrupt(
    number: signal.Signals, config_file: Path, run_dir: Path, kind: str, at: int = 1, **fields: object
) -> tuple[int, str]:
    """Start the run and signal its process as soon as it has recorded `at` events of this kind with these fields.

    Returns its exit code and what it complained of.
    """
    reader = EventReader(run_dir / "events.jsonl")
    reader.skip_to_end()
    process = subprocess.Popen(
        [BROADGAUGE, "run", str(config_file), "--run-dir", str(run_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    seen = 0
    while seen < at:
        assert process.poll() is None, f"the run ended before {at} x {kind} {fields}"
        assert time.monotonic() < deadline
        new = list(reader.new_events())
        seen += sum(event["kind"] == kind and fields.items() <= event.items() for event in new)
        time.sleep(0.001)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, complaint


def run_and_kill(config_file: Path, run_dir: Path, kind: str, at: int = 1, **fields: object) -> None:
    code, _ = run_and_interrupt(signal.SIGKILL, config_file, run_dir, kind, at, **fields)
    assert code == -signal.SIGKILL


def ends_as_if_undisturbed(config_file: Path, run_dir: Path, undisturbed: Path) -> None:
    outcome = broadgauge("run", config_file, "--run-dir", run_dir)
    assert outcome.returncode == 0, outcome.stderr
    assert final_evaluation(run_dir) == final_evaluation(undisturbed)
    assert losses(run_dir) == losses(undisturbed)
    assert weights_digest(run_dir / "export") == weights_digest(undisturbed / "export")


@pytest.mark.slow
def test_kill_9_does_not_show_in_the_result(config_file: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_and_kill(config_file, run_dir, "step", at=11)  # between two checkpoints
    ends_as_if_undisturbed(config_file, run_dir, finished[0])


@pytest.mark.slow
def test_ctrl_c_saves_and_does_not_show_in_the_result(
    config_file: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    code, complaint = run_and_interrupt(signal.SIGINT, config_file, run_dir, "step")
    assert code == 130
    assert re.fullmatch(r"interrupted: Ctrl-C: stopped after step (\d+), saved at step \1; .*", complaint.strip())
    ends_as_if_undisturbed(config_file, run_dir, finished[0])


@pytest.mark.slow
def test_killed_at_every_stage_ends_as_if_undisturbed(
    config_file: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_and_kill(config_file, run_dir, "stage_started", stage="prepare")
    run_and_kill(config_file, run_dir, "training_started")
    run_and_kill(config_file, run_dir, "step", at=2)  # before the first checkpoint
    run_and_kill(config_file, run_dir, "checkpoint_saved")
    run_and_kill(config_file, run_dir, "step", at=3)  # between two checkpoints
    run_and_kill(config_file, run_dir, "checkpoint_saved", step=NUM_STEPS)  # before the evaluation after training
    run_and_kill(config_file, run_dir, "stage_started", stage="export")
    run_and_kill(config_file, run_dir, "stage_started", stage="generate")
    ends_as_if_undisturbed(config_file, run_dir, finished[0])
