"""How a run's saves went, counted from its events."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.events import Event


@dataclass(frozen=True)
class SaveCounts:
    """Of all lives of a run, void steps too."""

    num_saved: int
    num_skipped: int
    """Checkpoints that were due and left out, as `checkpoint.when_busy` says."""
    num_skipped_snapshots: int
    """Snapshots that only serve restarts, left out for the same reason."""
    num_waited: int
    """Saves that had to wait for the one before."""
    waited_seconds: float
    """For which training stood still in them."""
    num_failed: int

    @classmethod
    def of(cls, events: Iterable[Event]) -> "SaveCounts":
        counted: Counter[str] = Counter()
        waited_seconds = 0.0
        for event in events:
            match event["kind"]:
                case "checkpoint_skipped":
                    counted["checkpoint_skipped" if event["durable"] else "snapshot_skipped"] += 1
                case "checkpoint_waited":
                    counted["checkpoint_waited"] += 1
                    waited_seconds += event["seconds"]
                case kind:
                    counted[kind] += 1
        return cls(
            num_saved=counted["checkpoint_saved"],
            num_skipped=counted["checkpoint_skipped"],
            num_skipped_snapshots=counted["snapshot_skipped"],
            num_waited=counted["checkpoint_waited"],
            waited_seconds=waited_seconds,
            num_failed=counted["checkpoint_failed"],
        )

    def __str__(self) -> str:
        """One line, without what did not happen."""
        said = [
            (self.num_skipped, f"{self.num_skipped} left out while the one before was being written"),
            (self.num_skipped_snapshots, f"{self.num_skipped_snapshots} snapshots for restarts left out"),
            (self.num_waited, f"{self.num_waited} waited for the one before, {self.waited_seconds:.1f} s in all"),
            (self.num_failed, f"{self.num_failed} failed"),
        ]
        return "; ".join([f"{self.num_saved} saved", *(text for count, text in said if count)])
