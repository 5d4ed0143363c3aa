"""Being asked to leave: SIGTERM, or a Ray node that is to be drained, makes the ranks save and end.

The request is a file in the run's folder, which rank 0 looks for after every step: whoever sees it coming, on whatever
machine, may write it, and the ranks agree on the step after which they stop. While no rank trains there is nothing to
save, and SIGTERM ends the command at once, in order.
"""

import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._private.state import state as ray_state

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import MANIFEST
from trainer.events import Event, read_events
from trainer.run_dir import RunDir
from trainer.stop import Preempted

_DRAIN_LOOK_SECONDS = 1.0
"""Between looks at which nodes are to be drained."""


class Preemption:
    """Whether the run has been asked to end, and by when it must have."""

    def __init__(self, run_dir: RunDir, grace_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._grace_seconds, self._clock = run_dir, grace_seconds, clock
        self._deadline: float | None = None
        self._looked = clock()
        self._is_training = False
        self.is_over = False
        """What is left is to clean up, which nothing may disturb."""
        self.reason: str | None = None

    @contextmanager
    def of_training(self) -> Iterator[None]:
        """Meanwhile whoever is to end is asked, and given time."""
        self._run_dir.stop_path.unlink(missing_ok=True)
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
            self._run_dir.stop_path.unlink(missing_ok=True)

    def hear(self, *_: object) -> None:
        """Of a signal; what comes after the first one must not disturb the end.

        Raises:
            Preempted: nothing is trained now.
        """
        if self._is_training:
            self.ask("SIGTERM")
        elif self.reason is None and not self.is_over:
            self.reason = "SIGTERM"
            raise Preempted("SIGTERM; the same command goes on")

    def ask(self, reason: str, seconds: float | None = None) -> None:
        """Ask the ranks to save and end, within the grace period or the seconds that are left, if those are fewer."""
        if self.reason is None:
            self.reason = reason
            with suppress(OSError):  # a disk that takes no file: then the ranks do not hear of it
                self._run_dir.stop_path.write_text(reason, encoding="utf-8")
        deadline = self._clock() + min(self._grace_seconds, self._grace_seconds if seconds is None else seconds)
        self._deadline = min(deadline, self._deadline or deadline)

    def look_at_nodes(self, own: Collection[str]) -> None:
        """See whether Ray is to drain one of the run's own nodes (hex ids); at most once a second."""
        if self._clock() - self._looked < _DRAIN_LOOK_SECONDS:
            return
        self._looked = self._clock()
        for node, deadline_ms in ray_state.get_draining_nodes().items():
            if node not in own:
                continue
            seconds = deadline_ms / 1000 - time.time() if deadline_ms else None
            self.ask(f"node {node[:8]} is to be drained", seconds)

    def check_deadline(self) -> None:
        """Raises:
        Preempted: the ranks were asked, and they, their saves or their uploads have not ended in time.
        """
        if self._deadline is not None and self._clock() > self._deadline:
            events = read_events(self._run_dir.events_path)
            raise Preempted(f"{self.reason}: {late(events, self._run_dir.checkpoints, self._grace_seconds)}")


def late(events: Sequence[Event], checkpoints: Path, grace_seconds: float) -> str:
    """What was still to be done when the grace period was over, after the events of a run."""
    grace = f"when checkpoint.grace_seconds {grace_seconds:g} were over"
    told = [event for event in events if event["kind"] == "training_started" or "saved_step" in event]
    if not told or told[-1]["kind"] != "preempted":
        return (
            f"the ranks did not end in time (checkpoint.grace_seconds {grace_seconds:g}) and were killed; the same "
            "command goes on from the newest checkpoint"
        )
    step, saved_step = told[-1]["step"], told[-1]["saved_step"]
    if not (checkpoints / store.folder_name(saved_step) / MANIFEST).exists():
        return (
            f"stopped after step {step}, but its checkpoint was not on disk {grace}; the same command goes on from "
            "the newest one"
        )
    return (
        f"stopped after step {step}, saved at step {saved_step} here and not yet uploaded {grace}; the same command "
        "goes on from there, and uploads it"
    )


@contextmanager
def listening(preemption: Preemption) -> Iterator[None]:
    """SIGTERM to this process asks the run to end."""
    before = signal.signal(signal.SIGTERM, preemption.hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
