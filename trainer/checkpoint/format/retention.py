"""Which checkpoints stay: the last few, every k-th for ever, the best, and always the newest."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest, OtherFormat, Unreadable
from trainer.checkpoint.format.results import score_of
from trainer.config import CheckpointConfig, UserError


@dataclass(frozen=True)
class Present:
    """A sound checkpoint, as far as the policy looks at it."""

    step: int
    merit: float | None = None
    """By which it is among the best, the larger the better; None where it was not evaluated."""

    @classmethod
    def of(cls, manifest: Manifest, checkpoint: Path, policy: CheckpointConfig) -> Self:
        """By `checkpoint.best_by`: a score of its evaluation, or else the held-out loss."""
        if policy.best_by is not None:
            return cls(manifest.step, score_of(checkpoint, manifest, policy.best_by))
        return cls(manifest.step, None if manifest.heldout_loss is None else -manifest.heldout_loss)


Outcome = Literal["kept", "removed", "being read", "stuck"]
"""`being read` and `stuck` should be gone and are not yet; the next time may succeed."""


@dataclass(frozen=True)
class Fate:
    """What became of a checkpoint, and why."""

    step: int
    outcome: Outcome
    why: str


def reasons_to_keep(policy: CheckpointConfig, present: Iterable[Present], newest: int) -> dict[int, tuple[str, ...]]:
    """Step -> why it stays, oldest first; what is not in it may go, up to the step `newest`.

    Args:
        present: sound checkpoints alone: a damaged one must not take the place of one that can be loaded.
        newest: step of the checkpoint that was committed last. Those beyond it are of a life that was given up, when
            the run went back to an earlier one: they do not count, and are not spoken of.
    """
    lived = sorted((each for each in present if each.step <= newest), key=lambda each: each.step)
    every = policy.keep_every_steps
    reasons: dict[int, list[str]] = defaultdict(list, {newest: ["newest"]})
    for each in lived[-policy.keep_last :]:
        reasons[each.step].append(f"last {policy.keep_last}")
    for each in lived:
        if every and each.step % every == 0:
            reasons[each.step].append(f"every {every}")
    for each in _best(lived, policy.keep_best):
        reasons[each.step].append(f"best {policy.keep_best}")
    return {step: tuple(reasons[step]) for step in sorted(reasons)}


def _best(present: list[Present], count: int) -> list[Present]:
    """Those of most merit; of equal ones the later."""
    evaluated = [each for each in present if each.merit is not None and math.isfinite(each.merit)]
    return sorted(evaluated, key=lambda each: (each.merit, each.step), reverse=True)[:count]


def plan(checkpoints: Path, newest: int, policy: CheckpointConfig) -> list[Fate]:
    """What `prune` would do, oldest first, if nothing stands in its way."""
    sound, others = _look(checkpoints, newest, policy)
    stays = reasons_to_keep(policy, sound, newest)
    fates = [Fate(step, "kept", ", ".join(reasons)) for step, reasons in stays.items()]
    fates += [Fate(each.step, "removed", "no rule keeps it") for each in sound if each.step not in stays]
    fates += [each for each in others if each.step not in stays]
    return sorted(fates, key=lambda fate: fate.step)


def prune(checkpoints: Path, newest: int, policy: CheckpointConfig) -> list[Fate]:
    """Remove the checkpoints that no rule keeps, the oldest first, and say what became of each, in that order.

    One that is being read stays for now, and so does one that the system does not let go of: neither is an error.

    Args:
        newest: step of the checkpoint that was committed last; see `reasons_to_keep`.
    """
    return [_carry_out(checkpoints, fate) for fate in plan(checkpoints, newest, policy)]


def _carry_out(checkpoints: Path, fate: Fate) -> Fate:
    if fate.outcome != "removed":
        return fate
    try:
        gone = store.remove(checkpoints / store.folder_name(fate.step))
    except FileNotFoundError:
        gone = True  # somebody else was faster
    except OSError as error:
        return Fate(fate.step, "stuck", error.strerror or str(error))
    return fate if gone else Fate(fate.step, "being read", fate.why)


def _look(checkpoints: Path, newest: int, policy: CheckpointConfig) -> tuple[list[Present], list[Fate]]:
    """The sound checkpoints up to `newest`, and what is to become of the others."""
    sound, others = [], []
    for step in store.steps(checkpoints):
        if step > newest:
            continue
        folder = checkpoints / store.folder_name(step)
        try:
            sound.append(Present.of(store.read(folder), folder, policy))
        except UserError as error:
            others.append(_fate_without_manifest(step, error))
    return sound, others


def _fate_without_manifest(step: int, error: UserError) -> Fate:
    """A damaged checkpoint goes; one that only cannot be read just now, as when a file system is away, stays."""
    if isinstance(error, OtherFormat):
        return Fate(step, "kept", "of another version of this software")
    if isinstance(error, Unreadable):
        return Fate(step, "stuck", str(error))
    return Fate(step, "removed", "damaged: its manifest is not as it was written")
