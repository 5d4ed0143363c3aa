"""Every metric of a run, declared once: name, type, unit, labels, meaning. Endpoints, rules, dashboards follow it.

There are two kinds of endpoint. A machine's agent serves `NODE`, what its ranks have in common: a job of 10,000 ranks
on 1,250 machines may have 20,000 series in all, which leaves 15 for a machine. The command serves `RUN`, the run as a
whole, once. No label says a step, a rank or a hash: each of their values would be a series for ever.

Names follow Prometheus: one prefix, base units, the unit last, `_total` for what only grows. Values that a restart
takes back (the step, productive time) are gauges.
"""

from dataclasses import dataclass
from typing import Literal

PREFIX = "broadgauge"

Kind = Literal["gauge", "counter", "info"]
Unit = Literal["", "seconds", "bytes", "ratio"]

STATISTICS = ("min", "mean", "max")
"""Values of the label `stat`: over the ranks of a machine, or of all."""


@dataclass(frozen=True)
class Metric:
    """One family of series."""

    name: str
    """Without the suffix that the exposition adds: `_total` of a counter, `_info` of an info."""
    kind: Kind
    unit: Unit
    labels: tuple[str, ...]
    help: str

    @property
    def series(self) -> str:
        """The name under which its values are found."""
        return self.name + {"gauge": "", "counter": "_total", "info": "_info"}[self.kind]


NODE: list[Metric] = []
"""Of a machine."""
RUN: list[Metric] = []
"""Of a run."""


def _declared(where: list[Metric], kind: Kind, name: str, help: str, *labels: str) -> Metric:
    unit: Unit = next((each for each in ("seconds", "bytes", "ratio") if name.endswith(f"_{each}")), "")
    metric = Metric(f"{PREFIX}_{name}", kind, unit, labels, help)
    where.append(metric)
    return metric


def _node(name: str, help: str, *labels: str) -> Metric:
    return _declared(NODE, "gauge", f"node_{name}", help, *labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return _declared(RUN, "gauge", name, help, *labels)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return _declared(RUN, "counter", name, help, *labels)


# ----------------------------------------------------------------------------------------------------------- a machine

NODE_RANKS = _node("ranks", "Ranks of the machine that have said something.")
NODE_STEP = _node(
    "step_seconds", "Of the last step, what local ranks worked themselves and did not wait for other ranks.", "stat"
)
NODE_SLOWEST_RANK = _node("slowest_rank", "Number of the local rank that worked longest in its last step.")
NODE_PHASE = _node("phase_seconds", "Time in each phase of the last step, mean of local ranks.", "phase")
NODE_ALLOCATED = _node(
    "device_memory_allocated_bytes", "Device memory in tensors after the last step; 0 on CPUs.", "stat"
)
NODE_RESERVED = _node(
    "device_memory_reserved_bytes", "Device memory that the fullest local rank holds, used or not; 0 on CPUs."
)
NODE_RESIDENT = _node("resident_memory_bytes", "Host memory that all local ranks hold together.")

# ------------------------------------------------------------------------------------------------------------- the run

INFO = _declared(
    RUN,
    "info",
    "run",
    "What the run is; always 1.",
    *("name", "version", "preset", "layout", "precision", "device", "parameters"),
)
STATE = _gauge("run_state", "1 for what the run is doing now, 0 for everything else.", "state")
GOODPUT = _gauge("goodput_ratio", "Productive share of the time for which commands have trained the run.")
TIME = _gauge("time_seconds", "Time for which commands have trained the run, by what came of it.", "state")

STEP = _gauge("step", "Last completed step of the history that counts: a restart or a rollback takes it back.")
PLANNED_STEPS = _gauge("planned_steps", "Steps of the whole run.")
CONSUMED_TOKENS = _gauge("consumed_tokens", "Training tokens consumed up to that step.")
LAST_STEP = _gauge("last_step_timestamp_seconds", "When the last step was completed (Unix time).")
LOSS = _gauge("loss", "Training loss of the last step (nats per token).")
LOSS_MEDIAN = _gauge("loss_recent_median", "Median training loss of the last 100 steps (nats per token).")
GRAD_NORM = _gauge("grad_norm", "Global L2 norm of the last step's gradients before clipping.")
LEARNING_RATE = _gauge("learning_rate", "Of the last step.")
LOSS_SCALE = _gauge("loss_scale", "Factor on the loss; always 1, as bf16 and fp32 need none.")

STEPS = _counter("steps", "Steps that have updated the weights, void ones included.")
TOKENS = _counter("tokens", "Training tokens of those steps.")
SAMPLES = _counter("samples", "Training sequences of those steps.")
VOID_STEPS = _counter("void_steps", "Steps that a restart or a rollback has made void.")
SKIPPED = _counter("skipped_steps", "Steps from which the weights have not learned.", "reason")
ROLLBACKS = _counter("rollbacks", "Times that training went back to a checkpoint because it diverged.")
QUARANTINED = _counter("quarantined_samples", "Training sequences passed over because they led into trouble.")

STEP_DURATION = _gauge("step_duration_seconds", "Of the last step, on rank 0.")
STEP_MEDIAN = _gauge("step_duration_median_seconds", "Median of the last 100 steps, on rank 0.")
PLANNED_STEP = _gauge("planned_step_seconds", "Of a step with the full batch, as planned; NaN where no plan is known.")
PLANNED_MEMORY = _gauge("planned_memory_bytes", "Of the fullest rank, as planned; NaN where no plan is known.")
STEP_TIME = _counter("step_time_seconds", "Time in steps, on rank 0.")
PHASE_TIME = _counter("phase_time_seconds", "Time in each phase of steps, on rank 0.", "phase")
RANK_STEP = _gauge(
    "rank_step_seconds", "What ranks worked themselves in a step, over all ranks; others wait for the longest.", "stat"
)
SLOWEST_RANK = _gauge("slowest_rank", "Number of the rank that worked longest.")
STRAGGLERS = _counter("stragglers", "Ranks that were found to hold the others up.", "phase")

TOKEN_RATE = _gauge("tokens_per_second", "Training tokens a second, median of the last 100 steps.")
DEVICE_TOKEN_RATE = _gauge("device_tokens_per_second", "The same for each device.")
MODEL_FLOP_RATE = _gauge("model_flops_per_second", "Floating-point operations of the model a second, on all devices.")
MFU = _gauge("mfu_ratio", "Model FLOPs utilisation: of what the devices could do at their peak; NaN where not known.")
RANKS = _gauge("ranks", "Ranks of the current layout.")

SAVED = _counter("checkpoints_saved", "Checkpoints committed.")
SAVED_BYTES = _counter("checkpoint_saved_bytes", "Bytes of committed checkpoints.")
SAVE_TIME = _counter("checkpoint_save_seconds", "Time that writing checkpoints took, mostly beside training.")
SAVE_DURATION = _gauge("checkpoint_last_save_seconds", "Time that writing the newest checkpoint took.")
SAVE_STALL = _counter("checkpoint_stall_seconds", "Time for which training stood still to save.")
SAVE_FAILURES = _counter(
    "checkpoint_failures", "Checkpoints that could not be written or uploaded, or services that died.", "what"
)
SAVE_SKIPPED = _counter("checkpoints_skipped", "Checkpoints that were due and left out.")
SAVED_AT = _gauge("checkpoint_timestamp_seconds", "When the newest checkpoint was committed (Unix time); 0: none is.")
SAVED_AGE = _gauge("checkpoint_age_seconds", "Time since then, or since training began where there is none.")
SAVED_STEP = _gauge("checkpoint_step", "Step of the newest checkpoint; 0: none is.")

EVALUATION = _gauge("evaluation_score", "Result of the newest evaluation of a task.", "task", "measure")
HELDOUT = _gauge(
    "heldout_score",
    "Result of the newest held-out evaluation on a source: nats per token, bits per byte.",
    "source",
    "measure",
)
EVALUATED = _gauge("evaluated_checkpoints", "Checkpoints whose evaluation counts: a rollback takes later ones back.")
EVALUATED_STEP = _gauge("evaluated_step", "Step of the newest of them; 0: none is.")
UNEVALUATED = _counter("unevaluated_checkpoints", "Checkpoints that were not evaluated, by why.", "what")
RESTARTS = _counter("restarts", "Times that ranks were started again, by what had ended them.", "reason")
LIVES = _counter("lives", "Times that ranks were started.")
EXCLUDED = _counter("excluded_machines", "Machines that were left out because they kept failing.")

DATA_DOCUMENTS = _gauge("data_documents", "Documents in the training data.", "source")
DATA_TOKENS = _gauge("data_tokens", "Tokens in the training data.", "source")
DATA_DROPPED = _gauge("data_dropped_documents", "Documents that preparing the data has dropped.", "source", "reason")
RUN_DISK_FREE = _gauge("run_disk_free_bytes", "Free where the run's folder lies, as the command sees it.")
