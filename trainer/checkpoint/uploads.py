"""Committed checkpoints on their way to a URL that outlives the machines, beside training and beside saving."""

import time
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint import retention, store
from trainer.checkpoint.chunk_file import file_name
from trainer.checkpoint.manifest import Manifest, Unreadable
from trainer.checkpoint.object_store import RemoteFailed
from trainer.checkpoint.remote import Remote
from trainer.checkpoint.service import Machine, Record
from trainer.config import CheckpointConfig, UserError

_FIRST_RETRY_SECONDS = 2.0
_LONGEST_RETRY_SECONDS = 300.0


class Uploader:
    """Sends the files of one machine's ranks; machine 0 commits when all machines have sent theirs."""

    def __init__(
        self,
        remote: Remote,
        checkpoints: Path,
        policy: CheckpointConfig,
        ranks: range,
        record: Record,
        machine: Machine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote, self._checkpoints, self._policy, self._ranks = remote, checkpoints, policy, ranks
        self._record, self._machine, self._clock = record, machine, clock
        self._done: set[int] = set()
        """Steps of which nothing is left to do here."""
        self._heldout: dict[int, retention.Present] = {}
        """What is there, as far as it was looked at."""
        self._retry_at, self._retry_seconds = 0.0, _FIRST_RETRY_SECONDS
        self._failure: str | None = None

    def work(self) -> bool:
        """Send one checkpoint that is not there yet, the newest first; returns whether anything was done."""
        step = self._next_step()
        if step is None or self._clock() < self._retry_at:
            return False
        try:
            is_done = self._send(step)
        except (RemoteFailed, Unreadable) as error:
            self._fail(step, str(error))
            self._put_off()
            return False
        except UserError as error:  # it was pruned meanwhile, or is damaged: another is sent instead
            self._done.add(step)
            self._fail(step, str(error))
            return True
        if is_done:
            self._done.add(step)
            self._failure, self._retry_seconds = None, _FIRST_RETRY_SECONDS
        else:
            self._retry_at = self._clock() + _FIRST_RETRY_SECONDS  # other machines are still at it
        return is_done

    def is_idle(self) -> bool:
        """Whether everything has been sent."""
        return self._next_step() is None

    def retry_now(self) -> None:
        """Let the next call try again what has failed."""
        self._retry_at = 0.0

    def _next_step(self) -> int | None:
        """The newest that was not sent; older ones only if they are kept for ever: the newer one is worth more."""
        steps = store.steps(self._checkpoints)
        every = self._policy.keep_every_steps
        wanted = [step for step in steps if step in steps[-1:] or (every and step % every == 0)]
        return next((step for step in reversed(wanted) if step not in self._done), None)

    def _send(self, step: int) -> bool:
        """Whether the checkpoint is there as a whole, or this machine has no more to do for it.

        Raises:
            Unreadable: the system does not hand the checkpoint out just now.
            UserError: it is gone or damaged.
            RemoteFailed: the store does not do what it should.
        """
        started, folder = self._clock(), self._checkpoints / store.folder_name(step)
        manifest = store.read(folder)
        mine = [name for name in map(file_name, self._ranks) if name in manifest.files]
        self._remote.upload(folder, mine)
        if self._machine.node > 0:
            return True
        if self._machine.num_nodes > 1 and self._remote.lacks(manifest):
            return False
        self._remote.commit(manifest)
        self._record(
            "checkpoint_uploaded",
            step=step,
            url=self._remote.url,
            bytes=manifest.num_bytes,
            seconds=round(self._clock() - started, 6),
        )
        self._prune(manifest)
        return True

    def _prune(self, newest: Manifest) -> None:
        """Remove there what the policy does not keep."""
        there = self._remote.steps()
        for step in set(there) - self._heldout.keys():
            self._heldout[step] = retention.Present(step, self._remote.read_manifest(step).heldout_loss)
        present = [self._heldout[step] for step in there]
        keep = retention.reasons_to_keep(self._policy, present, newest.step)
        self._remote.prune(step for step in there if step < newest.step and step not in keep)

    def _put_off(self) -> None:
        self._retry_at = self._clock() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)

    def _fail(self, step: int, why: str) -> None:
        if why != self._failure:
            self._record("checkpoint_upload_failed", step=step, reason=why)
        self._failure = why
