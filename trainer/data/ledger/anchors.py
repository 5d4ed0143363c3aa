"""What checkpoints state of the data that went into them, beside what the steps before them add up to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from trainer.data.digest import as_hex, from_hex
from trainer.data.ledger.history import History, Origin
from trainer.data.ledger.order import PlacedStep


class Anchors:
    """Follows the steps of a history, and compares the checkpoint of a step when it comes to it."""

    def __init__(self, history: History, checkpoints: Path, data: Mapping[str, str]) -> None:
        """`checkpoints` is the run's own folder of them, `data` its `trainer.data.prepared.fingerprints` now."""
        self._places, self._folder, self._data = history.checkpoints, checkpoints, data
        self._total = _digest_before(history.origin)
        self.num_compared = 0
        self.num_gone = 0
        self.notes: list[str] = []
        if self._total is None:
            self.notes.append(
                f"the data digests of checkpoints cannot be checked: {history.origin.checkpoint} states none"
            )

    def follow(self, step: PlacedStep) -> list[str]:
        """Take a step, and say in what its checkpoint, if there is one, differs."""
        record = step.record
        if record.is_computed:
            self._total = None if self._total is None or record.digest is None else self._total + record.digest
        path = self._places.get(record.number)
        if path is None:
            return []
        # where the run lies now comes first: it may have been moved, and the old place be another's
        manifest = read_manifest(self._folder / Path(path).name) or read_manifest(Path(path))
        if manifest is None:
            self.num_gone += 1
            return []
        self.num_compared += 1
        return [f"the checkpoint of step {record.number} {finding}" for finding in self._differences(manifest, step)]

    def _differences(self, manifest: Mapping[str, Any], step: PlacedStep) -> list[str]:
        found = []
        consumed, digest = manifest.get("consumed_samples"), manifest.get("data_digest")
        if consumed not in (None, step.end):
            found.append(f"states {consumed} samples consumed, and the steps up to it used {step.end}")
        if digest and self._total is not None and digest != as_hex(self._total):
            found.append(
                f"states the data digest {digest}, and the steps up to it add up to {as_hex(self._total)}: it is not "
                f"of this history"
            )
        for key, now in self._data.items():
            stated = (manifest.get("data") or {}).get(key, now)
            if stated != now:
                found.append(f"is of data whose {key} was {stated}, and that of the run's data is {now}")
        return found


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint of any version; None where there is none to be read, and so no checkpoint."""
    try:
        tree = orjson.loads((checkpoint / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _digest_before(origin: Origin) -> int | None:
    """The data digest of the history before the first step; None where it is not known."""
    if origin.step == 0:
        return 0
    manifest = read_manifest(Path(origin.checkpoint)) if origin.checkpoint else None
    digest = (manifest or {}).get("data_digest")
    return from_hex(digest) if digest else None
