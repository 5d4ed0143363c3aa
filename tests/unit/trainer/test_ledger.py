"""The data ledger on histories made of real schedules and data: whole ones are proved, and every harm is named."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulated_run import SimulatedRun, write_data
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data import batches
from trainer.data.batches import Draws
from trainer.data.ledger import audit as audits
from trainer.data.ledger.audit import audit, samples_of
from trainer.data.ledger.coverage import Coverage, Samples, Use
from trainer.data.ledger.history import read_history
from trainer.data.ledger.report import Ledger
from trainer.events import surviving_steps
from trainer.run_dir import RunDir

SEQ = 6
NewRun = Callable[..., SimulatedRun]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared") / "data", {"a": 21, "b": 13}, SEQ)


def config_of(data: Path, total_samples: int = 96, ramp: bool = False, **checkpoint: Any) -> RunConfig:
    train: dict[str, Any] = {"total_tokens": total_samples * SEQ, "global_batch_size": 12, "micro_batch_size": 1}
    if ramp:  # 4 until 16 samples, 8 until 32, then 12
        train |= {"ramp_start_batch_size": 4, "ramp_tokens": 32 * SEQ}
    prepared = {"prepared": str(data), "blend": {"a": 2, "b": 1}}
    return from_tree({"model": {"seq_length": SEQ}, "train": train, "data": prepared, "checkpoint": checkpoint})


@pytest.fixture
def new_run(data: Path, tmp_path: Path) -> NewRun:
    """Begins a run."""
    made: list[SimulatedRun] = []

    def begin(origin: SimulatedRun | None = None, **settings: Any) -> SimulatedRun:
        if origin is not None:
            settings["resume_from"] = origin.newest().path
        made.append(SimulatedRun(tmp_path / f"run{len(made)}", config_of(data, **settings), origin))
        return made[-1]

    return begin


def draws_by_hand(ledger: Ledger, run_dir: RunDir) -> Counter[tuple[str, int, int]]:
    """How often each (data set, epoch, window) was drawn, step by step through `samples_of`."""
    drawn: Counter[tuple[str, int, int]] = Counter()
    for number in range(ledger.first_step, ledger.last_step + 1):
        _, draws, names = samples_of(run_dir, number)
        for dataset, epoch, window in zip(draws.datasets, draws.epochs, draws.windows, strict=True):
            drawn[names[dataset], int(epoch) + 1, int(window)] += 1
    return drawn


# -------------------------------------------------------------------------------------------------- histories that hold


def test_an_undisturbed_run_is_proved(new_run: NewRun) -> None:
    run = new_run()
    run.steps(8)
    run.save()
    ledger = audit(run.write())
    assert ledger.findings == ledger.notes == []
    assert (ledger.first_step, ledger.last_step, ledger.num_steps, ledger.num_steps_compared) == (1, 8, 8, 8)
    assert (ledger.num_computed, ledger.num_restarts, ledger.num_checkpoints_compared) == (8, 0, 1)
    (stretch,) = ledger.stretches
    assert (stretch.first_sample, stretch.last_sample, stretch.batch_size, stretch.reason) == (0, 95, 12, None)
    assert [(use.dataset, use.epoch, use.num_drawn, use.is_finished) for use in ledger.epochs] == [
        *(("a", 1, 21, True), ("a", 2, 21, True), ("a", 3, 21, True)),
        *(("b", 1, 13, True), ("b", 2, 13, True), ("a", 4, 1, False), ("b", 3, 6, False)),
    ]


def test_every_count_agrees_with_listing_the_samples_one_by_one(new_run: NewRun) -> None:
    run = new_run(ramp=True)
    run.steps(9)
    ledger = audit(run.write())
    drawn = draws_by_hand(ledger, run.run_dir)
    assert set(drawn.values()) == {1}
    by_epoch = Counter((dataset, epoch) for dataset, epoch, _ in drawn)
    assert {(use.dataset, use.epoch): use.num_drawn for use in ledger.epochs} == by_epoch


def test_crashes_rollbacks_a_ramp_and_other_numbers_of_replicas(new_run: NewRun) -> None:
    run = new_run(ramp=True)
    run.steps(3)
    run.save()
    run.steps(2)
    run.crash(data_parallel=2)  # voids 2
    run.steps(1)
    run.skip()
    run.crash(data_parallel=4)  # voids 2
    run.steps(4)
    run.save()
    run.steps(1)
    run.skip("gradient norm spike")
    run.roll_back(quarantine=[8, 9])  # voids 2
    run.steps(2)
    run.skip("not finite")
    run.save()
    run.steps(1)
    run.crash()  # voids 1
    run.steps(1)
    ledger = audit(run.write())
    assert ledger.findings == []
    assert (ledger.num_restarts, ledger.num_voided_by_restart) == (3, 5)
    assert (ledger.num_rollbacks, ledger.num_voided_by_rollback) == (1, 2)
    assert (ledger.last_step, ledger.num_computed, ledger.num_steps_compared) == (11, 9 + 7, 9)
    assert [(s.first_step, s.last_step, s.first_sample, s.last_sample, s.reason) for s in ledger.stretches] == [
        *((1, 4, 0, 15, None), (5, 6, 16, 31, None), (7, 7, 32, 43, None), (8, 9, 44, 67, "quarantined")),
        *((10, 10, 68, 79, "not finite"), (11, 11, 80, 91, None)),
    ]
    left_out = sum(use.num_left_out for use in ledger.epochs)
    assert (left_out, sum(use.num_learned for use in ledger.epochs)) == (36, 92 - 36)


def test_a_skipped_step_was_fed_its_samples_and_is_named(new_run: NewRun) -> None:
    run = new_run()
    run.steps(2)
    run.skip("not finite")
    run.steps(1)
    ledger = audit(run.write())
    assert ledger.findings == [] and ledger.num_steps_compared == 4
    (left_out,) = ledger.left_out
    assert (left_out.first_step, left_out.first_sample, left_out.last_sample) == (3, 24, 35)
    assert left_out.reason == "not finite"
    run.event_of(3)["tokens_xxh3"] = f"{1:016x}"
    assert (
        audit(run.write()).findings[0].startswith("step 3 was fed other tokens than the data has in samples 24 to 35")
    )


def test_a_run_that_goes_on_from_another_begins_its_proof_there(new_run: NewRun) -> None:
    first = new_run()
    first.steps(3)
    first.save()
    second = new_run(origin=first)
    second.steps(2)
    second.crash()  # it has no checkpoint of its own yet, and begins from the other's again
    second.steps(4)
    second.save()
    ledger = audit(second.write())
    assert ledger.findings == [] and ledger.num_checkpoints_compared == 1
    assert (ledger.first_step, ledger.last_step, ledger.begins_from) == (4, 7, first.newest().path)
    assert sum(use.num_elsewhere for use in ledger.epochs) == 36
    assert [use.is_finished for use in ledger.epochs if use.epoch == 1] == [True, True]
    restate(second, 7, data_digest="0" * 16)
    (finding,) = audit(second.run_dir).findings
    assert finding.startswith("the checkpoint of step 7 states the data digest 0000000000000000")
    shutil.rmtree(str(first.newest().path))
    ledger = audit(second.run_dir)
    expected = f"the data digests of checkpoints cannot be checked: {first.newest().path} states none"
    assert (ledger.findings, ledger.notes) == ([], [expected])


def test_events_of_older_versions_cannot_be_checked_and_are_no_failure(new_run: NewRun) -> None:
    run = new_run()
    run.steps(2)
    run.skip()
    run.steps(2)
    for number in range(1, 5):
        for key in ("tokens_xxh3", *(("first_sample", "num_samples") if number != 3 else ())):
            del run.event_of(number)[key]
    run.save()
    ledger = audit(run.write())
    assert ledger.findings == [] and ledger.num_steps_compared == 1 and ledger.num_checkpoints_compared == 1
    assert ledger.notes == ["the tokens of 4 steps cannot be checked: their events record no digest"]
    assert [(stretch.first_sample, stretch.last_sample) for stretch in ledger.stretches] == [
        (0, 23),
        (24, 35),
        (36, 59),
    ]
    run.event_of(2)["tokens"] += SEQ
    assert audit(run.write()).findings == ["step 2 states 150 tokens consumed, and its samples end at 144"]


# -------------------------------------------------------------------------------------------------------- harm is named


def disturbed(run: SimulatedRun) -> SimulatedRun:
    """Seven steps, a crash and a checkpoint behind them, into the second epoch of both data sets."""
    run.steps(3)
    run.save()
    run.steps(1)
    run.crash(data_parallel=2)
    run.steps(4)
    run.save()
    return run


def restate(run: SimulatedRun, step: int, **stated: Any) -> None:
    path = run.run_dir.checkpoints / f"step-{step:08d}" / "manifest.json"
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **stated}))


def swap_samples(run: SimulatedRun) -> None:
    """Step 5 is fed step 6's samples, and says so."""
    five, six = run.event_of(5), run.event_of(6)
    five["first_sample"], five["tokens_xxh3"] = six["first_sample"], six["tokens_xxh3"]


def shift_a_step(run: SimulatedRun) -> None:
    """Step 5 is fed samples from one later on."""
    event = run.event_of(5)
    event["first_sample"] += 1
    event["tokens_xxh3"] = f"{run.digest_of(49, 12) % 2**64:016x}"


def feed_other_tokens(run: SimulatedRun) -> None:
    """Step 5 is fed another batch than it says."""
    run.event_of(5)["tokens_xxh3"] = run.event_of(6)["tokens_xxh3"]


def repeat_a_step(run: SimulatedRun) -> None:
    run.events.append(run.event_of(7).copy())


def go_back_without_saying(run: SimulatedRun) -> None:
    run.events.append(run.event_of(4).copy())


def lose_a_step(run: SimulatedRun) -> None:
    run.events.remove(run.event_of(5))


def lose_steps(run: SimulatedRun) -> None:
    for number in (4, 5, 6):
        run.events.remove(run.event_of(number))


def lose_the_restart(run: SimulatedRun) -> None:
    run.events = [event for event in run.events if event["kind"] != "training_started" or event["step"] == 0]


def lose_the_beginning(run: SimulatedRun) -> None:
    starts = [place for place, event in enumerate(run.events) if event["kind"] == "training_started"]
    del run.events[: starts[1]]


def take_a_smaller_batch(run: SimulatedRun) -> None:
    event = run.event_of(7)
    event |= {"num_samples": 8, "tokens": 80 * SEQ, "tokens_xxh3": f"{run.digest_of(72, 8) % 2**64:016x}"}


def claim_nonsense(run: SimulatedRun) -> None:
    run.event_of(7)["num_samples"] = 10**15


def change_a_digest_and_its_checkpoint(run: SimulatedRun) -> None:
    restate(run, 7, data_digest="0123456789abcdef")


def change_what_a_checkpoint_consumed(run: SimulatedRun) -> None:
    restate(run, 7, consumed_samples=83)


def change_the_data(run: SimulatedRun) -> None:
    restate(run, 3, data={"tokenizer": "bb"})


HARMS: dict[Callable[[SimulatedRun], None], list[str]] = {
    swap_samples: [
        "step 5 has samples 60 to 71 and leaves out samples 48 to 59 (the schedule gives it 48 to 59)",
        "step 6 has samples 60 to 71, of which the steps before had samples 60 to 71 (the schedule gives it 60 to 71)",
        "step 6 draws window",
    ],
    shift_a_step: [
        "step 5 has samples 49 to 60 and leaves out sample 48 (the schedule gives it 48 to 59)",
        "step 6 has samples 60 to 71, of which the steps before had sample 60 (the schedule gives it 60 to 71)",
        "step 6 draws window",
    ],
    feed_other_tokens: ["step 5 was fed other tokens than the data has in samples 48 to 59: their xxh3-64 is"],
    repeat_a_step: ["step 7 is recorded twice with no restart in between: samples 72 to 83, then samples 72 to 83"],
    go_back_without_saying: ["step 4 is recorded twice with no restart in between: samples 36 to 47, then samples 36"],
    lose_a_step: ["no event records step 5, with samples 48 to 59", "the checkpoint of step 7 states the"],
    lose_steps: ["no event records steps 4 to 6, with samples 36 to 71", "epoch 2 of b ended without"],
    lose_the_restart: ["step 4 is recorded twice with no restart in between"],
    lose_the_beginning: ["no event records steps 1 to 3, with samples 0 to 35"],
    take_a_smaller_batch: [
        "step 7 has samples 72 to 79, and the schedule gives it 72 to 83",
        "the checkpoint of step 7 states 84 samples consumed, and the steps up to it used 80",
    ],
    claim_nonsense: ["step 7 records 1000000000000000 samples from 72 on, and the schedule gives it 72 to 83"],
    change_a_digest_and_its_checkpoint: ["the checkpoint of step 7 states the data digest 0123456789abcdef, and the"],
    change_what_a_checkpoint_consumed: ["the checkpoint of step 7 states 83 samples consumed, and the steps up to it"],
    change_the_data: ["the checkpoint of step 3 is of data whose tokenizer was bb, and that of the run's data is aa"],
}


@pytest.mark.parametrize("at_once", [1, 30, 1000])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_harm_is_named(
    harm: Callable[[SimulatedRun], None], at_once: int, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "_SAMPLES_AT_ONCE", at_once)
    run = disturbed(new_run())
    assert audit(run.write()).findings == []
    harm(run)
    findings = audit(run.write()).findings
    for expected in HARMS[harm]:
        assert any(finding.startswith(expected) for finding in findings), findings
    assert all("\n" not in finding for finding in findings)


def test_what_follows_a_hole_is_not_blamed_for_it(new_run: NewRun) -> None:
    run = disturbed(new_run())
    lose_steps(run)
    ledger = audit(run.write())
    assert [finding for finding in ledger.findings if finding.startswith("step 7")] == []
    assert [(stretch.first_step, stretch.last_step) for stretch in ledger.stretches] == [(1, 3), (7, 7)]


def test_a_step_recorded_late_is_named(new_run: NewRun) -> None:
    run = disturbed(new_run())
    event = run.event_of(5)
    run.events.remove(event)
    run.events.append(event)
    expected = "step 5 is recorded after step 7 with no restart in between: samples 48 to 59"
    assert audit(run.write()).findings == [expected]


def test_a_checkpoint_of_a_void_history_is_not_compared_and_would_be_found(new_run: NewRun) -> None:
    """Two lives reach step 6 and only the first saves it; the second, which leaves out two steps, survives."""
    run = new_run()
    run.steps(3)
    run.save()
    run.steps(3)
    run.save()
    run.crash(lose=1)
    run.steps(2)
    run.roll_back(quarantine=[4, 5])
    run.steps(4)
    ledger = audit(run.write())
    assert ledger.findings == [] and ledger.num_checkpoints_compared == 1
    run.events.append({"time": 0.0, "kind": "checkpoint_saved", "step": 6, "path": "elsewhere/step-00000006"})
    (finding,) = audit(run.write()).findings
    assert finding.startswith("the checkpoint of step 6 states the data digest") and "not of this history" in finding


def test_a_checkpoint_that_only_a_restart_mentions_is_compared(new_run: NewRun) -> None:
    """A run that is killed between committing a checkpoint and recording it."""
    run = new_run()
    run.steps(3)
    run.save()
    del run.events[-1]
    run.crash()
    run.steps(1)
    ledger = audit(run.write())
    assert ledger.findings == [] and ledger.num_checkpoints_compared == 1
    restate(run, 3, data_digest="0" * 16)
    assert [finding[:40] for finding in audit(run.run_dir).findings] == ["the checkpoint of step 3 states the data"]


def test_checkpoints_move_with_their_run(new_run: NewRun, tmp_path: Path) -> None:
    run = disturbed(new_run())
    shutil.copytree(run.write().path, tmp_path / "moved")
    restate(run, 7, data_digest="0" * 16)
    moved = audit(RunDir(tmp_path / "moved"))
    assert moved.findings == [] and moved.num_checkpoints_compared == 2
    shutil.rmtree(tmp_path / "moved" / "checkpoints")  # and are found where they were
    assert [finding[:26] for finding in audit(RunDir(tmp_path / "moved")).findings] == ["the checkpoint of step 7 s"]


def test_a_beginning_lost_after_another_runs_checkpoint_is_named(new_run: NewRun) -> None:
    first = new_run()
    first.steps(2)
    first.save()
    second = disturbed(new_run(origin=first))
    assert audit(second.write()).findings == []
    lose_the_beginning(second)
    expected = "no event records steps 1 to 5, with samples 0 to 59"
    assert audit(second.write()).findings == [expected]


def test_harm_to_what_is_void_is_no_matter(new_run: NewRun) -> None:
    run = new_run()
    run.steps(3)
    run.events += [run.event_of(2).copy(), run.event_of(2) | {"step": 9, "first_sample": 500}]
    run.crash()
    run.steps(4)
    assert audit(run.write()).findings == []


def test_a_changed_token_shows_in_every_epoch_that_drew_it(new_run: NewRun, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", {"a": 21, "b": 13}, SEQ)
    run = SimulatedRun(tmp_path / "run", config_of(folder))
    run.steps(8)
    assert audit(run.write()).findings == []
    tokens = np.memmap(folder / "a" / "train.bin", dtype=np.uint16, mode="r+")
    tokens[4 * SEQ + 2] ^= 1  # in the middle of window 4
    tokens.flush()
    drawn_by = [step for step in range(1, 9) for d, w in drawn(run.run_dir, step) if (d, w) == ("a", 4)]
    findings = audit(run.run_dir).findings
    assert len(findings) == len(drawn_by) >= 3
    assert [finding.partition(" was fed")[0] for finding in findings] == [f"step {step}" for step in drawn_by]
    assert audit(run.run_dir, check_tokens=False).findings == []


def drawn(run_dir: RunDir, step: int) -> list[tuple[str, int]]:
    _, draws, names = samples_of(run_dir, step)
    return [(names[d], int(w)) for d, w in zip(draws.datasets, draws.windows, strict=True)]


def test_an_order_that_is_no_permutation_is_found(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run and its ledger share the code of the order, and the ledger does not believe it."""
    whole = batches.permute_groups

    def broken(*arguments: Any) -> np.ndarray:
        windows = whole(*arguments)
        return np.where(windows == 5, 6, windows)

    monkeypatch.setattr(batches, "permute_groups", broken)
    run = new_run()
    run.steps(5)
    findings = audit(run.write()).findings
    assert any("draws window 6 of a again in epoch 1, as sample" in finding for finding in findings)
    assert "epoch 1 of a ended without window 5" in findings


def test_a_draw_that_is_passed_over_is_found(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    locate = type(run.data.blend).locate

    def passing_over(self: Any, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        datasets, indices = locate(self, positions)
        return datasets, indices + (indices > 10)

    monkeypatch.setattr(type(run.data.blend), "locate", passing_over)
    run.steps(8)
    findings = audit(run.write()).findings
    assert [finding.partition(" window")[0] for finding in findings] == [
        f"epoch 1 of {name} ended without" for name in "ab"
    ]


def test_coverage_of_epochs_left_out_and_of_epochs_that_come_back() -> None:
    coverage = Coverage(["a", "b"], [3, 2])

    def add(*draws: tuple[int, int, int]) -> list[str]:
        datasets, epochs, windows = np.array(draws).T
        positions = np.arange(len(draws))
        samples = Samples(positions, np.full_like(positions, 7), np.full_like(positions, Use.LEARNED))
        return list(coverage.add(samples, Draws(datasets, epochs, windows)))

    assert add((0, 0, 2), (1, 0, 1), (0, 0, 0)) == []
    assert add((1, 0, 1)) == ["step 7 draws window 1 of b again in epoch 1, as sample 0"]
    assert add((0, 0, 1), (0, 3, 1)) == ["epochs 2 to 3 of a were left out"]
    assert add((1, 1, 0)) == ["epoch 1 of b ended without window 0"]
    assert add((0, 3, 0), (0, 1, 2), (0, 1, 0)) == [
        "step 7 draws windows 2, 0 of a of epoch 2, which had ended, as samples 1, 2"
    ]
    assert [(use.dataset, use.epoch, use.num_drawn) for use in coverage.finished] == [("a", 1, 3), ("b", 1, 1)]
    assert [(use.dataset, use.epoch, use.num_drawn) for use in coverage.under_way()] == [("a", 4, 2), ("b", 2, 1)]


def test_few_samples_are_held_at_once(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "_SAMPLES_AT_ONCE", 20)
    run, seen = new_run(), list[tuple[Any, ...]]()
    run.steps(7)
    audit(run.write(), progress=lambda *progress: seen.append(progress))
    assert seen == [("ledger", done, 7, "steps") for done in (2, 4, 6, 7)]


# ------------------------------------------------------------------------------------------------------- any history


ACTIONS = st.one_of(
    st.tuples(st.just("steps"), st.integers(1, 4)),
    st.tuples(st.just("skip"), st.sampled_from(["loss spike", "not finite"])),
    st.tuples(st.just("save"), st.none()),
    st.tuples(st.just("crash"), st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 2))),
    st.tuples(st.just("roll back"), st.integers(1, 3)),
)


def do(run: SimulatedRun, action: str, value: Any) -> None:
    match action:
        case "steps":
            run.steps(value)
        case "skip":
            run.skip(value)
        case "save":
            run.save()
        case "crash":
            run.crash(*value)
        case "roll back":
            run.roll_back(range(max(1, run.step - value), run.step + 1))


@given(
    actions=st.lists(ACTIONS, max_size=14), ramp=st.booleans(), harm=st.integers(0, 10**6), at_once=st.integers(1, 99)
)
@settings(max_examples=60)
def test_any_history_is_proved_and_any_harm_to_it_found(
    data: Path, tmp_path_factory: pytest.TempPathFactory, actions: list[Any], ramp: bool, harm: int, at_once: int
) -> None:
    run = SimulatedRun(tmp_path_factory.mktemp("run"), config_of(data, total_samples=10_000, ramp=ramp))
    for action in [*actions, ("steps", 1)]:
        do(run, *action)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audits, "_SAMPLES_AT_ONCE", at_once)
        ledger = audit(run.write())
    assert ledger.findings == []
    learned, skipped = surviving_steps(run.events), surviving_steps(run.events, "step_skipped")
    history = read_history(run.events)
    assert [s.number for s in history.steps if s.reason is None] == [event["step"] for event in learned]
    assert [(s.number, s.reason) for s in history.steps if s.reason] == [(e["step"], e["reason"]) for e in skipped]
    assert set(draws_by_hand(ledger, run.run_dir).values()) == {1}
    computed = [e for e in run.events if e["kind"] in ("step", "step_skipped") and e.get("reason") != "quarantined"]
    assert ledger.num_computed == len(computed)
    voided = ledger.num_voided_by_restart + ledger.num_voided_by_rollback
    assert ledger.num_computed - voided == sum(step.is_computed for step in history.steps) == ledger.num_steps_compared

    survivors = [*learned, *skipped]
    victim = survivors[harm % len(survivors)]
    if victim["tokens_xxh3"] is not None and harm % 2:
        victim["tokens_xxh3"] = f"{int(victim['tokens_xxh3'], 16) ^ 1:016x}"
        expected = f"step {victim['step']} was fed other tokens"
    else:
        victim["first_sample"] += 1
        expected = f"step {victim['step']} has samples"
    assert any(finding.startswith(expected) for finding in audit(run.write()).findings)


# -------------------------------------------------------------------------------------------------------- what is shown


def test_the_samples_of_a_step(new_run: NewRun) -> None:
    run = new_run(ramp=True)
    run.steps(6)
    step, draws, names = samples_of(run.write(), 5)
    assert (step.first_sample, step.num_samples, names) == (16, 8, ("a", "b"))
    expected = run.data.draws(np.arange(16, 24))
    assert np.array_equal(draws.windows, expected.windows) and np.array_equal(draws.datasets, expected.datasets)
    with pytest.raises(UserError, match=r"step 7 is not in the history of .*, which has steps 1 to 6"):
        samples_of(run.run_dir, 7)


def test_what_is_no_run_is_refused(new_run: NewRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml of a run; give a folder like runs/NAME"):
        audit(RunDir(tmp_path))
    run = new_run()
    with pytest.raises(UserError, match="has done no step yet"):
        audit(run.write())
    run.steps(1)
    del run.event_of(1)["step"]
    with pytest.raises(UserError, match=r"the event .* cannot be understood"):
        audit(run.write())


def test_checkpoints_out_of_reach_are_counted(new_run: NewRun) -> None:
    run = disturbed(new_run())
    (run.run_dir.checkpoints / "step-00000003" / "manifest.json").unlink()
    run.events.append({"time": 0.0, "kind": "checkpoint_saved", "step": 5, "path": "s3://bucket/run/step-00000005"})
    ledger = audit(run.write())
    assert ledger.findings == [] and (ledger.num_checkpoints_compared, ledger.num_checkpoints_gone) == (1, 2)
