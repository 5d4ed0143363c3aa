"""Committed checkpoints on their way to a URL that outlives the machines, beside training and beside saving."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.format import retention, store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.manifest import MANIFEST, Manifest, Unreadable
from trainer.checkpoint.remote.copies import Remote
from trainer.checkpoint.remote.object_store import RemoteFailed, one_line
from trainer.checkpoint.service.saving import Machine, Record
from trainer.config import CheckpointConfig, UserError

_FIRST_RETRY_SECONDS = 2.0
_LONGEST_RETRY_SECONDS = 300.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """A checkpoint as it was written: of one step there are several, one after another, where a run went back."""

    step: int
    at: int
    """Nanoseconds."""
    inode: int


def _written(checkpoints: Path, step: int) -> _Written:
    """By the manifest's file, which is never written over; reading it every time would be too much for a big one."""
    try:
        found = (checkpoints / store.folder_name(step) / MANIFEST).stat()
    except OSError:  # whoever sends it says what is wrong
        return _Written(step, 0, 0)
    return _Written(step, found.st_mtime_ns, found.st_ino)


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
        self._done: set[_Written] = set()
        """Checkpoints of which nothing is left to do here."""
        self._there: dict[int, Manifest] = {}
        """What the store has, as far as it was looked at."""
        self._retry_at, self._retry_seconds = 0.0, _FIRST_RETRY_SECONDS
        self._failure: str | None = None

    def work(self) -> bool:
        """Send one checkpoint that is not there yet, the newest first; returns whether anything was done.

        Raises nothing: what goes wrong is recorded and tried again later.
        """
        if self._clock() < self._retry_at:
            return False
        try:
            written = self._next()
        except OSError as error:
            _log.warning("%s cannot be listed just now: %s", self._checkpoints, error)
            self._put_off()
            return False
        return written is not None and self._attempt(written)

    def _attempt(self, written: _Written) -> bool:
        step = written.step
        try:
            is_done = self._send(step)
        except (RemoteFailed, Unreadable) as error:
            self._fail(step, str(error))
            self._put_off()
            return False
        except UserError as error:  # it was pruned meanwhile, or is damaged: another is sent instead
            self._done.add(written)
            self._fail(step, str(error))
            return True
        except Exception as error:  # of which nobody thought: it must not end all uploads
            _log.exception("step %d could not be sent", step)
            self._fail(step, one_line(error))
            self._put_off()
            return False
        if is_done:
            self._done.add(written)
            self._failure, self._retry_seconds = None, _FIRST_RETRY_SECONDS
        else:
            self._retry_at = self._clock() + _FIRST_RETRY_SECONDS  # other machines are still at it
        return is_done

    def is_idle(self) -> bool:
        """Whether everything has been sent."""
        try:
            return self._next() is None
        except OSError:
            return False

    def retry_now(self) -> None:
        """Let the next call try again what has failed."""
        self._retry_at = 0.0

    def _next(self) -> _Written | None:
        """What was written last, if it was not sent, or else the newest of those that are kept for ever.

        Written last and not of the last step: a run that went back comes by the same steps again.

        Raises:
            OSError: the folder cannot be listed.
        """
        found = [_written(self._checkpoints, step) for step in store.steps(self._checkpoints)]
        every, last = self._policy.keep_every_steps, max(found, key=lambda each: (each.at, each.step), default=None)
        wanted = [each for each in found if every and each.step % every == 0 and each != last]
        wanted += [last] if last is not None else []
        return next((each for each in reversed(wanted) if each not in self._done), None)

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
        self._there[step] = manifest
        try:
            self._prune(manifest)
        except (RemoteFailed, UserError) as error:  # the next one that is sent tries again
            _log.warning("old copies stay for now: %s", error)
        return True

    def _prune(self, newest: Manifest) -> None:
        """Remove there what the policy does not keep."""
        there = self._remote.steps()
        for step in set(there) - self._there.keys():
            self._there[step] = self._remote.read_manifest(step)
        present = [
            retention.Present.of(self._there[step], self._checkpoints / store.folder_name(step), self._policy)
            for step in there
        ]
        keep = retention.reasons_to_keep(self._policy, present, newest.step)
        self._remote.prune(step for step in there if step < newest.step and step not in keep)

    def _put_off(self) -> None:
        self._retry_at = self._clock() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)

    def _fail(self, step: int, why: str) -> None:
        if why != self._failure:
            with suppress(OSError):  # the record may lie on the disk that is away
                self._record("checkpoint_upload_failed", step=step, reason=why)
        self._failure = why
