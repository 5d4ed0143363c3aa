"""What was planned for the layout that trains, beside what its first steps show of it.

A plan may be wrong, and so may be what makes it: neither ever ends a run.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from launcher.planning.cluster import Cluster
from launcher.planning.planner import Plan, make_plan
from launcher.planning.recognition import cluster_of
from trainer.config import RunConfig
from trainer.events import Event
from trainer.heartbeat import Beat

NUM_STEPS = 10
"""After which a plan is checked; the first, in which kernels are loaded and memory is had, does not count."""
_SLOW_RATIO = 1.5
_KINDS = ("planned", "unplanned")

Record = Callable[..., None]


class Foresight:
    """Of one command: tells what is planned when ranks begin, and checks it once for every layout."""

    def __init__(self, record: Record, written: Iterable[Event], *, on_gpus: bool) -> None:
        """`written` is the record so far: what a command before has told and checked is not told again."""
        self._record, self._on_gpus = record, on_gpus
        self._told: dict[str, Any] = {}
        self._is_checked = False
        for event in written:
            if event["kind"] in _KINDS:
                self._told, self._is_checked = _facts_of(event), False
            self._is_checked |= event["kind"] == "plan_checked"
        self._plan: Plan | None = None
        self._steps: list[Event] = []
        """Of these ranks."""
        self._memory_bytes = 0

    def began(self, config: RunConfig, device: str) -> None:
        """Ranks begin to train in this layout, on devices of this name."""
        self._steps, self._memory_bytes = [], 0
        self._plan, found = _planned(config, device, on_gpus=self._on_gpus)
        if found == self._told:
            return
        self._told, self._is_checked = found, False
        if self._plan is None:
            self._record("unplanned", **found)
        else:
            self._record("planned", **found)

    def step_done(self, event: Event) -> None:
        if self._awaits_steps:
            self._steps.append(event)

    def saw(self, beats: Mapping[int, Beat]) -> None:
        """What ranks say of their memory."""
        taken = (beat.memory.planned_for for beat in beats.values() if beat.num_steps)
        self._memory_bytes = max(self._memory_bytes, *taken, 0)

    @property
    def is_due(self) -> bool:
        """Whether there is enough to check a plan by."""
        return self._awaits_check and len(self._steps) >= NUM_STEPS

    def check(self) -> None:
        """By the steps there are, if there are any; a run may end before it is due."""
        if not self._awaits_check or len(self._steps) < 2:
            return
        assert self._plan is not None
        self._is_checked = True
        try:
            found = checked(self._plan, self._steps[1:NUM_STEPS], self._memory_bytes or None)
        except Exception as error:
            self._record("unplanned", **_unplanned(self._plan.config, f"the plan could not be checked: {_told(error)}"))
        else:
            self._record("plan_checked", **found)

    @property
    def _awaits_check(self) -> bool:
        return self._plan is not None and not self._is_checked

    @property
    def _awaits_steps(self) -> bool:
        return self._awaits_check and len(self._steps) < NUM_STEPS


def checked(plan: Plan, steps: list[Event], memory_bytes: int | None) -> dict[str, Any]:
    """Of the event `plan_checked`: by steps with the batch of the last one, as a ramp may be under way."""
    num_samples = steps[-1]["num_samples"]
    alike = [event["seconds"] for event in steps if event["num_samples"] == num_samples]
    seconds = median(alike)
    train = plan.config.train.model_copy(update={"global_batch_size": num_samples})
    of_such = _plan_between_saves(plan.config.model_copy(update={"train": train}), plan.cluster)
    ratio = seconds / of_such.step.seconds
    return {
        "step": steps[-1]["step"],
        "num_steps": len(alike),
        "num_samples": num_samples,
        "step_seconds": round(seconds, 6),
        "planned_step_seconds": of_such.step.seconds,
        "tokens_per_second": of_such.tokens_per_second / ratio,
        "planned_tokens_per_second": of_such.tokens_per_second,
        "mfu": of_such.mfu / ratio,
        "planned_mfu": of_such.mfu,
        "memory_bytes": memory_bytes,
        "planned_memory_bytes": plan.memory.total,
        "slow": plan.cluster.kind == "cuda" and ratio > _SLOW_RATIO,
    }


def _planned(config: RunConfig, device: str, *, on_gpus: bool) -> tuple[Plan | None, dict[str, Any]]:
    """A plan, if there can be one, and the fields of its event."""
    try:
        cluster = cluster_of(config, (device,), on_gpus=on_gpus)
        if cluster is None:
            known = f"{device} is no device that comes along; say what its machines are in launch.cluster"
            return None, _unplanned(config, known)
        plan = _plan_between_saves(config, cluster)
        return plan, {
            **_layout(config),
            "device": cluster.device,
            "step_seconds": plan.step.seconds,
            "step_parts": asdict(plan.step),
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.mfu,
            "memory_bytes": plan.memory.total,
            "memory_parts": asdict(plan.memory),
        }
    except Exception as error:
        return None, _unplanned(config, f"no plan could be made: {_told(error)}")


def _plan_between_saves(config: RunConfig, cluster: Cluster) -> Plan:
    """A step's time, as ranks tell it, is over before they save."""
    plan = make_plan(config, cluster)
    return replace(plan, step=replace(plan.step, checkpoint=0.0))


def _unplanned(config: RunConfig, reason: str) -> dict[str, Any]:
    return {**_layout(config), "reason": reason}


def _layout(config: RunConfig) -> dict[str, Any]:
    return {"nodes": config.launch.nodes, "layout": config.parallel.describe()}


def _facts_of(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("time", "kind")}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
