"""Being asked to leave: SIGTERM, Ctrl-C, or a Ray node that is to be drained, makes the ranks save and end.

The request is a file in the run's folder, which rank 0 looks for after every step: whoever sees it coming, on whatever
machine, may write it, and the ranks agree on the step after which they stop. While no rank trains there is nothing to
save, and a signal ends the command at once, in order.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._private.state import state as ray_state

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import MANIFEST
from trainer.events import Event
from trainer.run_dir import RunDir
from trainer.stop import Preempted, StopRequest

_DRAIN_LOOK_SECONDS = 1.0
"""Between looks at which nodes are to be drained."""


class Preemption:
    """Whether the run has been asked to end, and by when its ranks must have."""

    def __init__(self, run_dir: RunDir, grace_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._grace_seconds, self._clock = run_dir, grace_seconds, clock
        self._deadline: float | None = None
        self._looked = clock()
        self._is_training = False
        self._asked: str | None = None
        """What the ranks were asked with, by us."""
        self.is_over = False
        """What is left is to clean up, which nothing may disturb."""
        self.reason: str | None = None
        """Why the run is to end."""
        self.is_interrupted = False
        """Whether it was by Ctrl-C."""

    @contextmanager
    def of_training(self) -> Iterator[None]:
        """Meanwhile a signal is a request, and `reason` tells of it. What was asked before is heard now."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
            self._clear()

    def begin(self) -> None:
        """A command has taken the run: what an earlier one was asked is over."""
        self._clear()

    def hear(self, *_: object) -> None:
        """Of SIGTERM; what comes after the first one must not disturb the end.

        Raises:
            Preempted: nothing is trained now.
        """
        if self._is_training:
            self.reason = self.reason or "SIGTERM"
        elif self.reason is None and not self.is_over:
            self.reason = "SIGTERM"
            raise Preempted("SIGTERM; the same command goes on")

    def hear_interrupt(self, *_: object) -> None:
        """Of Ctrl-C: once, and the ranks save and end; twice, and all ends at once.

        Raises:
            KeyboardInterrupt: it is the second, or nothing is trained now.
        """
        if self.is_over:
            return
        if not self._is_training or self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True
        self.reason = self.reason or "Ctrl-C"

    def ask_ranks(self, reason: str, seconds: float | None = None) -> None:
        """Ask the ranks to save and end, within the grace period or the seconds that are left, if those are fewer."""
        self.look_for_file()
        self._asked = reason
        with suppress(OSError):  # a disk that takes no file: then the ranks do not hear of it
            self._run_dir.stop_path.write_text(reason, encoding="utf-8")
        deadline = self._clock() + min(self._grace_seconds, self._grace_seconds if seconds is None else seconds)
        self._deadline = min(deadline, self._deadline or deadline)

    def forget(self) -> None:
        """The ranks that were asked are gone; those that come are not. What somebody else asks stays asked."""
        if self._deadline is None:
            return
        self._deadline = None
        self.look_for_file()
        if self.reason is None or self.reason == self._asked:
            self._clear()

    def _clear(self) -> None:
        self._run_dir.stop_path.unlink(missing_ok=True)
        self._deadline = None

    def look_for_file(self) -> None:
        """Whether somebody else has written the file: `broadgauge stop`, or a person."""
        if self.reason is None and self._deadline is None and self._run_dir.stop_path.exists():
            reason = StopRequest(self._run_dir.stop_path).reason()
            self.reason = reason if reason != self._asked else None

    def is_late(self) -> bool:
        """Whether the ranks were asked, and they, their saves or their uploads have not ended in time."""
        return self._deadline is not None and self._clock() > self._deadline

    def leaving_nodes(self) -> dict[str, float | None]:
        """Nodes that Ray is to drain (hex ids), with the seconds that they have left; empty between looks."""
        if self._clock() - self._looked < _DRAIN_LOOK_SECONDS:
            return {}
        self._looked = self._clock()
        draining = ray_state.get_draining_nodes()
        return {node: deadline / 1000 - time.time() if deadline else None for node, deadline in draining.items()}


@contextmanager
def unwrapped() -> Iterator[None]:
    """What a signal raises in Ray's compiled code comes out as itself, without the SystemError around it."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Preempted | KeyboardInterrupt):
            raise error.__cause__ from None
        raise


def stopped(told: Event, checkpoints: Path) -> str:
    """How ranks that were asked to save and end did so, by their event `preempted` and by what is on disk."""
    step, saved_step = told["step"], told["saved_step"]
    if saved_step and not (checkpoints / store.folder_name(saved_step) / MANIFEST).exists():
        return (
            f"stopped after step {step}, but its checkpoint could not be written; the same command goes on from the "
            "newest one"
        )
    return f"stopped after step {step}, saved at step {saved_step}; the same command goes on from there"


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
    """SIGTERM and Ctrl-C to this process are heard."""
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, preemption.hear),
        signal.SIGINT: signal.signal(signal.SIGINT, preemption.hear_interrupt),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
