"""The ledger of a run, from its folder: events, prepared data and checkpoints are read, and nothing is written."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.config import RunConfig, UserError
from trainer.data.batches import Draws, TrainingData
from trainer.data.ledger.anchors import Anchors
from trainer.data.ledger.coverage import Coverage, Samples, Use
from trainer.data.ledger.history import History, read_history
from trainer.data.ledger.order import PlacedStep, extend, place_steps
from trainer.data.ledger.report import Ledger, span
from trainer.data.ledger.tokens import compare_tokens
from trainer.data.prepared import PreparedFolder, fingerprints
from trainer.events import EventReader
from trainer.progress import Update, unheard
from trainer.run_dir import RunDir
from trainer.schedule import Schedule

_SAMPLES_AT_ONCE = 1 << 16


def audit(run_dir: RunDir, *, check_tokens: bool = True, progress: Update = unheard) -> Ledger:
    """Check the surviving history of a run, which may be going on.

    `check_tokens` reads every sample again, which takes about as long as reading the data for training did; without
    it, that steps used the samples which they record is not proved.

    Raises:
        UserError: there is no run, it has done no step, or its data cannot be read.
    """
    config, history = _open(run_dir)
    data = _data(run_dir, config)
    ledger = _begin(history, config, run_dir)
    anchors = Anchors(history, run_dir.checkpoints, fingerprints(config, run_dir.data_for(config)))
    ledger.notes += anchors.notes
    coverage = Coverage(data.blend.names, [reader.num_windows for reader in data.readers])
    for samples in _used_elsewhere(Schedule(config).consumed_samples(history.origin.step)):
        ledger.findings += coverage.add(samples, data.draws(samples.positions))
    for steps in _blocks(place_steps(history, config, ledger.findings)):
        for step in steps:
            extend(ledger.stretches, step)
            ledger.findings += anchors.follow(step)
        samples = _samples(steps)
        draws = data.draws(samples.positions)
        ledger.findings += coverage.add(samples, draws)
        if check_tokens:
            ledger.num_steps_compared += sum(step.record.digest is not None for step in steps)
            ledger.findings += compare_tokens(data, steps, draws)
        progress("ledger", steps[-1].record.number, ledger.last_step, "steps")
    ledger.epochs = [*coverage.finished, *coverage.under_way()]
    ledger.num_checkpoints_compared, ledger.num_checkpoints_gone = anchors.num_compared, anchors.num_gone
    return ledger


def samples_of(run_dir: RunDir, number: int) -> tuple[PlacedStep, Draws, Sequence[str]]:
    """A step of the surviving history, where each of its samples comes from, and the names of the data sets.

    Raises:
        UserError: see `audit`; or there is no such step.
    """
    config, history = _open(run_dir)
    for step in place_steps(history, config, []):
        if step.record.number == number:
            data = _data(run_dir, config)
            return step, data.draws(_samples([step]).positions), data.blend.names
    first, last = history.steps[0].number, history.steps[-1].number
    raise UserError(f"step {number} is not in the history of {run_dir.path}, which has steps {first} to {last}")


def _open(run_dir: RunDir) -> tuple[RunConfig, History]:
    if not run_dir.config_path.is_file():
        raise UserError(f"{run_dir.path} holds no config.yaml of a run; give a folder like runs/NAME")
    history = read_history(EventReader(run_dir.events_path).new_events())
    if not history.steps:
        raise UserError(f"{run_dir.path} has done no step yet; there is nothing to prove")
    return run_dir.config(), history


def _data(run_dir: RunDir, config: RunConfig) -> TrainingData:
    return TrainingData.open(PreparedFolder.open(run_dir.data_for(config)), config)


def _begin(history: History, config: RunConfig, run_dir: RunDir) -> Ledger:
    """The ledger with what the history alone says."""
    undigested = sum(step.is_computed and step.digest is None for step in history.steps)
    ledger = Ledger(
        first_step=history.origin.step + 1,
        last_step=history.steps[-1].number,
        num_steps=Schedule(config).num_steps,
        begins_from=history.origin.checkpoint,
        num_computed=history.num_computed,
        num_restarts=history.num_restarts,
        num_rollbacks=history.num_rollbacks,
        num_voided_by_restart=history.num_voided["restart"],
        num_voided_by_rollback=history.num_voided["rollback"],
        num_steps_without_digest=undigested,
        findings=list(history.findings),
    )
    if undigested:
        ledger.notes.append(f"the tokens of {undigested} steps cannot be checked: their events record no digest")
    ledger.findings += _missing_beginning(history, config, run_dir)
    return ledger


def _missing_beginning(history: History, config: RunConfig, run_dir: RunDir) -> Iterator[str]:
    """A history may only begin in the middle if another run's checkpoint is where it begins."""
    origin = history.origin
    if origin.step == 0:
        return
    is_other = config.checkpoint.resume_from and origin.checkpoint
    if not is_other or Path(str(origin.checkpoint)).resolve().is_relative_to(run_dir.checkpoints.resolve()):
        missing = span("sample", 0, Schedule(config).consumed_samples(origin.step))
        yield f"no event records {span('step', 1, origin.step + 1)}, with {missing}"


def _used_elsewhere(num_samples: int) -> Iterator[Samples]:
    """The samples before the first step of this run: the run that used them has a ledger of its own."""
    for first in range(0, num_samples, _SAMPLES_AT_ONCE):
        positions = np.arange(first, min(first + _SAMPLES_AT_ONCE, num_samples))
        yield Samples(positions, np.zeros_like(positions), np.full_like(positions, Use.ELSEWHERE))


def _blocks(steps: Iterable[PlacedStep]) -> Iterator[list[PlacedStep]]:
    """Steps in order, as many at once as make it worth while."""
    block: list[PlacedStep] = []
    num_samples = 0
    for step in steps:
        block.append(step)
        num_samples += step.num_samples
        if num_samples >= _SAMPLES_AT_ONCE:
            yield block
            block, num_samples = [], 0
    if block:
        yield block


def _samples(steps: Sequence[PlacedStep]) -> Samples:
    counts = [step.num_samples for step in steps]
    uses = [Use.LEARNED if step.record.reason is None else Use.LEFT_OUT for step in steps]
    return Samples(
        np.concatenate([np.arange(step.first_sample, step.end) for step in steps]),
        np.repeat([step.record.number for step in steps], counts),
        np.repeat(uses, counts),
    )
