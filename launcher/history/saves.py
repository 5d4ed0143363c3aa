"""How a run's saves went."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainer.events import Event

_MOST_RECENT = 200


@dataclass
class Saves:
    """Of all lives of a run, void steps too."""

    num_saved: int = 0
    num_skipped: int = 0
    """Checkpoints that were due and left out, as `checkpoint.when_busy` says."""
    num_skipped_snapshots: int = 0
    """Snapshots that only serve restarts, left out for the same reason."""
    num_waited: int = 0
    """Saves that had to wait for the one before."""
    waited_seconds: float = 0.0
    """For which training stood still in them."""
    stall_seconds: float = 0.0
    """For which it stood still in all, these included."""
    write_seconds: float = 0.0
    num_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By what failed: save, upload, service."""
    newest: Event | None = None
    """The last `checkpoint_saved`."""
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_RECENT))
    """Of the last ones: step, time, bytes, seconds."""
    _with_snapshot: int = -1
    """Step of the last snapshot: its checkpoint is written beside training."""
    _waited: tuple[int, float] = (-1, 0.0)
    """Step and seconds of the last wait; a snapshot that follows counts them too."""

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Saves":
        saves = cls()
        for event in events:
            saves.add(event)
        return saves

    @property
    def num_failed(self) -> int:
        return self.failures["save"]

    def add(self, event: Event) -> None:
        match event["kind"]:
            case "checkpoint_snapshot":
                self._with_snapshot = event["step"]
                waited_step, waited_seconds = self._waited
                self.stall_seconds += event["seconds"] - (waited_seconds if waited_step == event["step"] else 0.0)
            case "checkpoint_saved":
                self.num_saved, self.newest = self.num_saved + 1, event
                self.recent.append({name: event[name] for name in ("step", "time", "bytes", "seconds")})
                self.num_bytes += event["bytes"]
                self.write_seconds += event["seconds"]
                self.stall_seconds += event["seconds"] if self.held_training_up(event) else 0.0
            case "checkpoint_skipped" if event["durable"]:
                self.num_skipped += 1
            case "checkpoint_skipped":
                self.num_skipped_snapshots += 1
            case "checkpoint_waited":
                self.num_waited += 1
                self.waited_seconds += event["seconds"]
                self.stall_seconds += event["seconds"]
                self._waited = event["step"], event["seconds"]
            case "checkpoint_failed":
                self.failures["save"] += 1
            case "checkpoint_upload_failed":
                self.failures["upload"] += 1
            case "checkpoint_service_died":
                self.failures["service"] += 1

    def held_training_up(self, saved: Event) -> bool:
        """Whether training stood still while this checkpoint was written."""
        return bool(saved["step"] != self._with_snapshot)

    def __str__(self) -> str:
        """One line, without what did not happen."""
        said = [
            (self.num_skipped, f"{self.num_skipped} left out while the one before was being written"),
            (self.num_skipped_snapshots, f"{self.num_skipped_snapshots} snapshots for restarts left out"),
            (self.num_waited, f"{self.num_waited} waited for the one before, {self.waited_seconds:.1f} s in all"),
            (self.num_failed, f"{self.num_failed} failed"),
        ]
        return "; ".join([f"{self.num_saved} saved", *(text for count, text in said if count)])
