"""Uploads beside the checkpoint service, in a thread of its own: nothing that a store does holds up saving here."""

import threading
import time
from collections.abc import Callable

from trainer.checkpoint.format import store
from trainer.checkpoint.remote.copies import Remote
from trainer.checkpoint.remote.object_store import RemoteFailed
from trainer.checkpoint.service.saving import Machine
from trainer.checkpoint.service.uploads import Uploader
from trainer.config import RunConfig, UserError
from trainer.events import EventLog
from trainer.run_dir import RunDir

_PASS_SECONDS = 0.5
"""Between looks for a new checkpoint."""
_FIRST_RETRY_SECONDS = 2.0
_LONGEST_RETRY_SECONDS = 300.0
_LAST_UPLOAD_SECONDS = 600.0
"""For the last upload, when the run has ended and its checkpoint is safe on its own disk."""


class Uploads:
    """Sends committed checkpoints to `checkpoint.upload_to`; until there is one, nobody asks the store for anything."""

    def __init__(self, url: str, config: RunConfig, run_dir: RunDir, ranks: range, log: EventLog, machine: Machine):
        self._url, self._policy, self._checkpoints = url, config.checkpoint, run_dir.checkpoints
        self._ranks, self._record, self._machine = ranks, log.write, machine
        self._uploader: Uploader | None = None
        self._retry_at, self._retry_seconds = 0.0, _FIRST_RETRY_SECONDS
        self._failure: str | None = None
        self._is_last = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, may_wait: Callable[[], bool], timeout_seconds: float = _LAST_UPLOAD_SECONDS) -> bool:
        """No more checkpoints come: try at once what has failed; returns whether all that there is has been sent.

        Args:
            may_wait: is asked again and again; once it says no, the rest is left to the next life of the run.
        """
        self._is_last.set()
        deadline = time.monotonic() + timeout_seconds
        while self._thread.is_alive() and may_wait() and time.monotonic() < deadline:
            self._thread.join(_PASS_SECONDS / 10)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """Only the last upload ends it, whatever is raised before."""
        has_begun_anew = False
        while True:
            is_last = self._is_last.is_set()
            if is_last and not has_begun_anew:
                has_begun_anew, self._retry_at = True, 0.0
                if self._uploader is not None:
                    self._uploader.retry_now()
            did_something = self._attempt()
            if is_last and self._is_sent():
                return
            if not did_something and is_last:
                time.sleep(_PASS_SECONDS)
            elif not did_something:
                self._is_last.wait(_PASS_SECONDS)

    def _attempt(self) -> bool:
        if time.monotonic() < self._retry_at:
            return False
        try:
            return self._work()
        except (UserError, RemoteFailed) as error:
            self._put_off(str(error))
        except BaseException as error:  # a driver's, whose cancellations are no `Exception`
            self._put_off(" ".join(f"{type(error).__name__}: {error}".split()).rstrip(": "))
        return False

    def _work(self) -> bool:
        if self._uploader is None:
            if not store.steps(self._checkpoints):
                return False
            remote = Remote.open(self._url)
            self._uploader = Uploader(remote, self._checkpoints, self._policy, self._ranks, self._record, self._machine)
        did_something = self._uploader.work()
        self._failure, self._retry_seconds = None, _FIRST_RETRY_SECONDS
        return did_something

    def _is_sent(self) -> bool:
        try:
            return self._uploader.is_idle() if self._uploader is not None else not store.steps(self._checkpoints)
        except OSError:
            return False

    def _put_off(self, why: str) -> None:
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)
        if why == self._failure:
            return
        self._failure = why
        try:
            newest = store.steps(self._checkpoints)[-1:]
            self._record("checkpoint_upload_failed", step=newest[0] if newest else None, reason=why)
        except OSError:  # the record may lie on the disk that is full
            pass
