"""The checkpoint service as a process: one per machine, kept alive by the machine's agent, outliving the ranks.

It ends when its standard input does, by the agent's will or with the agent, but only after it has saved what the ranks
have left in the room. It imports no torch: it is there in a third of a second, and again after it was killed.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import ownership
from trainer.checkpoint.remote import Remote
from trainer.checkpoint.room import Room
from trainer.checkpoint.service import CheckpointService, Machine
from trainer.checkpoint.uploads import Uploader
from trainer.config import RunConfig
from trainer.config_file import from_tree, parse_yaml
from trainer.events import EventLog
from trainer.run_dir import RunDir

_PASS_SECONDS = 0.02
"""Between looks into the room while nothing is to be done."""
_UPLOAD_PASS_SECONDS = 0.5
_LAST_UPLOAD_SECONDS = 600.0
"""For the last upload, when the run has ended and its checkpoint is safe on its own disk."""
_RESTART_SECONDS = 0.2
"""Before a service that died is replaced, so that one that cannot live does not keep a core busy."""
_MOST_DEATHS = 20
"""Of a service that is to finish its work, before it is given up: what it left stays in the room."""


@dataclass(frozen=True)
class ServiceOptions:
    """What a service is told."""

    room: str
    run_dir: str
    config_yaml: str
    first_rank: int
    """Of this machine."""
    num_ranks: int
    """Of this machine."""
    node: int
    num_nodes: int
    lock: str
    """See `launcher.ownership`."""
    job_id: str


def serve() -> None:
    """The whole life of the process."""
    options = ServiceOptions(**json.loads(sys.argv[1]))
    if ownership.hold(Path(options.lock), options.job_id) is None:
        return
    config, run_dir = from_tree(parse_yaml(options.config_yaml)), RunDir(Path(options.run_dir))
    log = EventLog(run_dir.events_path)
    ranks = range(options.first_rank, options.first_rank + options.num_ranks)
    machine = Machine(options.node, options.num_nodes)
    service = CheckpointService(
        Room(Path(options.room), ranks, is_replicated=config.checkpoint.replicates(options.num_nodes)),
        run_dir.checkpoints,
        config.checkpoint,
        log.write,
        machine,
        sync_records=log.sync,
    )
    with _uploading(config, run_dir, ranks, log, machine):
        while _may_go_on():
            if not service.work():
                select.select([sys.stdin], [], [], _PASS_SECONDS)
        service.finish()


@contextmanager
def _uploading(config: RunConfig, run_dir: RunDir, ranks: range, log: EventLog, machine: Machine) -> Iterator[None]:
    """Meanwhile committed checkpoints are sent to `checkpoint.upload_to`; at the end the last one is waited for."""
    if not config.checkpoint.upload_to:
        yield
        return
    remote = Remote.open(config.checkpoint.upload_to)
    uploader = Uploader(remote, run_dir.checkpoints, config.checkpoint, ranks, log.write, machine)
    is_over = threading.Event()

    def upload() -> None:
        while not is_over.is_set():
            if not uploader.work():
                is_over.wait(_UPLOAD_PASS_SECONDS)

    thread = threading.Thread(target=upload, name="uploads", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    uploader.retry_now()
    deadline = time.monotonic() + _LAST_UPLOAD_SECONDS
    while not uploader.is_idle() and time.monotonic() < deadline:
        if not uploader.work():
            time.sleep(_UPLOAD_PASS_SECONDS)


def _may_go_on() -> bool:
    """Whether standard input is still open; nothing is ever written to it."""
    readable, _, _ = select.select([sys.stdin], [], [], 0)
    return not readable


class ServiceKeeper:
    """Keeps the service of this machine alive from `start` to `drain`; of the agent."""

    def __init__(self, options: ServiceOptions, log: Path, cwd: str) -> None:
        self._options, self._log, self._cwd = options, log, cwd
        self._is_draining = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._is_draining.clear()
        self._thread = threading.Thread(target=self._keep, name="checkpoint-service-keeper", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Return when the service has saved what there is to save, and has ended."""
        if self._thread is None:
            return
        self._is_draining.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._thread.join()
        self._thread = None

    def _keep(self) -> None:
        """One that is killed is replaced, also while it drains: the next one finishes the work."""
        num_deaths = 0
        while num_deaths < _MOST_DEATHS:
            self._process = self._spawn()
            if self._is_draining.is_set() and self._process.stdin is not None:
                self._process.stdin.close()
            code = self._process.wait()
            if self._is_draining.is_set():
                if code == 0:
                    return
                num_deaths += 1
            time.sleep(_RESTART_SECONDS)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", "from launcher.checkpoint_process import serve; serve()"),
                    json.dumps(asdict(self._options)),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._cwd,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the driver alone
            )
