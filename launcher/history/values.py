"""The values of a run's metrics, from its history. See `trainer.metrics.RUN`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, Self, get_args

from launcher.exposition import Labels, Values
from launcher.history.history import RestartReason, RunHistory
from launcher.history.times import TIME_STATES
from trainer import metrics
from trainer.config import RunConfig
from trainer.events import Event
from trainer.hardware import peak_flops
from trainer.heartbeat import STEP_PHASES
from trainer.metrics import STATISTICS
from trainer.plan import model_flops_per_token, num_parameters
from trainer.schedule import Schedule

RunState = Literal[
    "starting", "preparing", "training", "recovering", "exporting", "generating", "finished", "preempted", "failed"
]
RUN_STATES: tuple[RunState, ...] = get_args(RunState)
_OF_STAGE: dict[str, RunState] = {"prepare": "preparing", "export": "exporting", "generate": "generating"}
_OF_MODE: dict[str, RunState] = {"training": "training", "recovery": "recovering"}
_OF_END: dict[str, RunState] = {
    "run_finished": "finished",
    "preempted": "preempted",
    "failed": "failed",
    "diverged": "failed",
}

_SKIP_REASONS = ("not finite", "loss spike", "gradient norm spike", "quarantined")
_SAVE_FAILURES = ("save", "upload", "service")


@dataclass(frozen=True)
class Facts:
    """What a run's config says of it, once."""

    name: str
    preset: str
    layout: str
    precision: str
    num_parameters: int
    seq_length: int
    schedule: Schedule
    flops_per_token: int
    """See `model_flops_per_token`."""
    peak_flops: float | None
    """Of one device, where the config says it."""

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        return cls(
            name=config.name,
            preset=config.preset or "",
            layout=config.parallel.describe(),
            precision=config.train.precision,
            num_parameters=num_parameters(config.model),
            seq_length=config.model.seq_length,
            schedule=Schedule(config),
            flops_per_token=model_flops_per_token(config.model),
            peak_flops=config.monitoring.device_peak_flops,
        )


def state_of(history: RunHistory) -> RunState:
    """What the run is doing, if a command is at work; else how the last one ended, as far as it said."""
    if history.end is not None and history.end["kind"] in _OF_END:
        return _OF_END[history.end["kind"]]
    if history.stage == "train":
        return _OF_MODE.get(history.times.mode, "starting")
    return _OF_STAGE.get(history.stage or "", "starting")


def run_values(history: RunHistory, facts: Facts, now: float, disk_free_bytes: float) -> Values:
    """Of every metric of a run, as of now (Unix time)."""
    return {
        **_identity(history, facts, now),
        **_progress(history, facts),
        **_work(history, facts),
        **_speed(history, facts),
        **_checkpoints(history, now),
        **_results(history),
        metrics.RUN_DISK_FREE: _one(disk_free_bytes),
    }


def mfu(history: RunHistory, facts: Facts, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation at a speed (PaLM, arXiv:2204.02311, appendix B), where the devices' peak is known."""
    training = history.training or {}
    peak = facts.peak_flops or peak_flops(str(training.get("device", "")))
    num_ranks = training.get("ranks")
    return tokens_per_second * facts.flops_per_token / (peak * num_ranks) if peak and num_ranks else None


def _one(value: float | None) -> dict[Labels, float]:
    return {(): math.nan if value is None else value}


def _identity(history: RunHistory, facts: Facts, now: float) -> Values:
    now_in, times = state_of(history), history.times.until(now)
    total, device = sum(times.values()), str((history.training or {}).get("device", ""))
    said = (facts.name, version("broadgauge"), facts.preset, facts.layout, facts.precision, device)
    return {
        metrics.INFO: {(*said, str(facts.num_parameters)): 1},
        metrics.STATE: {(state,): float(state == now_in) for state in RUN_STATES},
        metrics.GOODPUT: _one(times["productive"] / total if total else None),
        metrics.TIME: {(state,): times[state] for state in TIME_STATES},
    }


def _progress(history: RunHistory, facts: Facts) -> Values:
    steps = history.steps

    def last(column: str) -> dict[Labels, float]:
        return _one(steps[column][-1] if len(steps) else None)

    return {
        metrics.STEP: _one(history.step),
        metrics.PLANNED_STEPS: _one(facts.schedule.num_steps),
        metrics.CONSUMED_TOKENS: _one(facts.schedule.consumed_tokens(history.step)),
        metrics.LAST_STEP: last("time"),
        metrics.LOSS: last("loss"),
        metrics.LOSS_MEDIAN: _one(history.recent_median("loss")),
        metrics.GRAD_NORM: last("grad_norm"),
        metrics.LEARNING_RATE: last("lr"),
        metrics.LOSS_SCALE: _one(1),
    }


def _work(history: RunHistory, facts: Facts) -> Values:
    done = history.done
    return {
        metrics.STEPS: _one(done["steps"]),
        metrics.TOKENS: _one(done["samples"] * facts.seq_length),
        metrics.SAMPLES: _one(done["samples"]),
        metrics.VOID_STEPS: _one(done["void"]),
        metrics.SKIPPED: {(_word(reason),): history.num_skipped[reason] for reason in _SKIP_REASONS},
        metrics.ROLLBACKS: _one(len(history.rollbacks)),
        metrics.QUARANTINED: _one(history.num_quarantined_samples),
    }


def _speed(history: RunHistory, facts: Facts) -> Values:
    steps = history.steps
    rate = history.tokens_per_second(facts.seq_length, history.recent) if len(steps) else None
    num_ranks = (history.training or {}).get("ranks")
    ranks, planned = history.ranks[-1] if history.ranks else None, history.planned
    return {
        metrics.STEP_DURATION: _one(steps["seconds"][-1] if len(steps) else None),
        metrics.STEP_MEDIAN: _one(history.recent_median("seconds")),
        metrics.PLANNED_STEP: _one(planned["step_seconds"] if planned else None),
        metrics.PLANNED_MEMORY: _one(planned["memory_bytes"] if planned else None),
        metrics.STEP_TIME: _one(history.step_seconds),
        metrics.PHASE_TIME: {(_word(phase),): history.phase_seconds[phase] for phase in STEP_PHASES},
        metrics.RANK_STEP: {(stat,): ranks[stat] if ranks else math.nan for stat in STATISTICS},
        metrics.SLOWEST_RANK: _one(ranks["slowest"] if ranks else None),
        metrics.STRAGGLERS: {(_word(phase),): history.stragglers[phase] for phase in STEP_PHASES},
        metrics.TOKEN_RATE: _one(rate),
        metrics.DEVICE_TOKEN_RATE: _one(rate / num_ranks if rate is not None and num_ranks else None),
        metrics.MODEL_FLOP_RATE: _one(None if rate is None else rate * facts.flops_per_token),
        metrics.MFU: _one(None if rate is None else mfu(history, facts, rate)),
        metrics.RANKS: _one(num_ranks or 0),
    }


def _checkpoints(history: RunHistory, now: float) -> Values:
    saves, newest = history.saves, history.saves.newest
    since = newest["time"] if newest else history.began
    return {
        metrics.SAVED: _one(saves.num_saved),
        metrics.SAVED_BYTES: _one(saves.num_bytes),
        metrics.SAVE_TIME: _one(saves.write_seconds),
        metrics.SAVE_DURATION: _one(newest["seconds"] if newest else None),
        metrics.SAVE_STALL: _one(saves.stall_seconds),
        metrics.SAVE_FAILURES: {(what,): saves.failures[what] for what in _SAVE_FAILURES},
        metrics.SAVE_SKIPPED: _one(saves.num_skipped),
        metrics.SAVED_AT: _one(newest["time"] if newest else 0),
        metrics.SAVED_AGE: _one(max(0.0, now - since) if since is not None else None),
        metrics.SAVED_STEP: _one(newest["step"] if newest else 0),
    }


def _results(history: RunHistory) -> Values:
    evaluation, sources = history.last_evaluation or {}, (history.data or {}).get("datasets", {})
    judged = history.judged[-1] if history.judgements else None
    dropped = {name: source.get("dropped", {}) for name, source in sources.items()}
    heldout = _scores({"heldout": evaluation}, "loss", "uniform_loss", "unigram_loss", "bits_per_byte")
    return {
        metrics.EVALUATION: heldout | _task_scores(judged),
        metrics.HELDOUT: _scores(history.heldout_sources, "loss", "bits_per_byte"),
        metrics.EVALUATED: _one(len(history.judgements)),
        metrics.UNEVALUATED: {(what,): history.unjudged[what] for what in ("skipped", "failed")},
        metrics.EVALUATED_STEP: _one(judged["step"] if judged else 0),
        metrics.RESTARTS: {(reason,): history.restarts[reason] for reason in get_args(RestartReason)},
        metrics.LIVES: _one(history.num_lives),
        metrics.EXCLUDED: _one(len(history.excluded)),
        metrics.DATA_DOCUMENTS: {(name,): source.get("documents", 0) for name, source in sources.items()},
        metrics.DATA_TOKENS: {(name,): source.get("tokens", 0) for name, source in sources.items()},
        metrics.DATA_DROPPED: {
            (name, reason): count for name, reasons in dropped.items() for reason, count in reasons.items()
        },
    }


def _scores(found: Mapping[str, Mapping[str, float | None]], *measures: str) -> dict[Labels, float]:
    """By what was evaluated and measure, where there is one."""
    return {
        (name, measure): value
        for name, scores in found.items()
        for measure in measures
        if (value := scores.get(measure)) is not None
    }


def _task_scores(judged: Event | None) -> dict[Labels, float]:
    """Of the newest checkpoint that was evaluated, by task and measure."""
    named = judged["scores"].items() if judged else ()
    return {(task, measure): value for name, value in named for task, _, measure in [name.rpartition("/")]}


def _word(text: str) -> str:
    """As a label's value."""
    return text.replace(" ", "_")
