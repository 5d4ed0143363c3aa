"""The checkpoint service as a process: one per machine, kept alive by the machine's agent, from life to life of ranks.

It ends when its standard input does, by the agent's will or with the agent, but only after it has saved what the ranks
have left in the room. It imports no torch: it is there in a third of a second, and again after it was killed.

Its standard input: a line with the options, which are too long for a command line, and not for everybody to read; then
nothing while training; then an `Ending`; then its end.
"""

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from io import RawIOBase
from pathlib import Path

from launcher.node import ownership
from launcher.node.uploading import Uploads
from trainer.checkpoint.service.presence import Presence
from trainer.checkpoint.service.room import Room
from trainer.checkpoint.service.saving import CheckpointService, Machine
from trainer.config_file import from_tree, parse_yaml
from trainer.events import EventLog
from trainer.run_dir import RunDir

_PASS_SECONDS = 0.02
"""Between looks into the room while nothing is to be done."""
_FIRST_RESTART_SECONDS, _LONGEST_RESTART_SECONDS = 0.2, 30.0
"""Before a service that died is replaced; longer and longer for one that cannot live."""
_HEALTHY_SECONDS = 10.0
"""A service that lived longer did not die of how it was started."""
_MOST_DEATHS = 20
"""Of a service that is to finish its work, before it is given up: what it left stays in the room."""

_log = logging.getLogger(__name__)


class Ending(Enum):
    """What is left to do for a service that is to end."""

    WELL = "the ranks have done what they were to do: save and upload what they have left"
    FAILED = "save what they have left; the next command sends it"
    ELSEWHERE = "the same, but wait for no other machine: ranks begin anew as other machines' neighbours"


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
    """See `launcher.node.ownership`."""
    job_id: str


def serve() -> None:
    """The whole life of the process."""
    code = 1
    try:
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as agent:
            _serve(agent)
        code = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # an upload that was left to the next life may hang in a thread


def _serve(agent: RawIOBase) -> None:
    told = agent.readline()
    options = ServiceOptions(**json.loads(told)) if told else None
    if options is None or ownership.hold(Path(options.lock), options.job_id) is None:
        return
    config, run_dir = from_tree(parse_yaml(options.config_yaml)), RunDir(Path(options.run_dir))
    log = EventLog(run_dir.events_path)
    ranks = range(options.first_rank, options.first_rank + options.num_ranks)
    machine = Machine(options.node, options.num_nodes)
    room = Room(Path(options.room), ranks, is_replicated=config.checkpoint.replicates(options.num_nodes))
    service = CheckpointService(room, run_dir.checkpoints, config.checkpoint, log.write, machine, sync_records=log.sync)
    url = config.checkpoint.upload_to
    uploads = Uploads(url, config, run_dir, ranks, log, machine) if url else None
    if uploads is not None:
        uploads.start()
    room.sign(run_dir.path)
    presence = Presence(room)
    while not _has_spoken(agent):
        if not (presence.show() and service.work()):
            _has_spoken(agent, _PASS_SECONDS)
    ending = Ending[agent.readline().decode().strip() or "FAILED"]
    while not presence.show():
        time.sleep(_PASS_SECONDS)
    service.finish(may_wait=ending is not Ending.ELSEWHERE)
    presence.end()
    if uploads is not None and ending is Ending.WELL:
        uploads.finish(may_wait=lambda: not _has_spoken(agent))
    log.close()


def _has_spoken(agent: RawIOBase, seconds: float = 0.0) -> bool:
    """Whether there is something to read, or nothing will come any more; waits for it for so long."""
    readable, _, _ = select.select([agent], [], [], seconds)
    return bool(readable)


def restart_delay(num_early_deaths: int) -> float:
    """Seconds until a service is replaced that died so many times in a row before it had lived long."""
    num_doublings = min(max(num_early_deaths - 1, 0), 10)  # so that no number is too large
    return min(_FIRST_RESTART_SECONDS * 2**num_doublings, _LONGEST_RESTART_SECONDS)


class ServiceKeeper:
    """Keeps the service of this machine alive from `start` to `drain`; of the agent."""

    def __init__(self, options: ServiceOptions, log: Path, cwd: str) -> None:
        self.options = options
        self._log, self._cwd = log, cwd
        self._is_draining = threading.Event()
        self._ending = Ending.FAILED
        self._lock = threading.Lock()
        """Around the process and what it is told."""
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._is_draining.clear()
        self._thread = threading.Thread(target=self._keep, name="checkpoint-service-keeper", daemon=True)
        self._thread.start()

    def drain(self, ending: Ending) -> None:
        """Return when the service has done what there is to do, and has ended."""
        if self._thread is None:
            return
        with self._lock:
            self._ending = ending
            self._is_draining.set()
            self._tell_to_end()
        self._thread.join()
        self._thread = None

    def hurry(self) -> None:
        """Wait for no upload any more; of one that is draining."""
        with self._lock:
            if self._is_draining.is_set() and self._ending is Ending.WELL:
                self._ending = Ending.FAILED
                self._tell_to_end()

    def _keep(self) -> None:
        """One that dies is replaced, also while it drains: the next one finishes the work."""
        num_deaths = num_early_deaths = 0
        while num_deaths < _MOST_DEATHS:
            started, code = time.monotonic(), None
            try:
                code = self._live()
            except Exception:  # no process to be had, or no file: there may be later
                _log.exception("the checkpoint service does not start")
            if self._is_draining.is_set():
                if code == 0:
                    return
                num_deaths += 1
            self._record_death(code)
            num_early_deaths = 0 if time.monotonic() - started > _HEALTHY_SECONDS else num_early_deaths + 1
            if self._is_draining.wait(restart_delay(num_early_deaths)):
                time.sleep(_FIRST_RESTART_SECONDS)

    def _live(self) -> int:
        """Start a service and see it to its end; returns its exit code, negative for a signal."""
        process = self._spawn()
        with self._lock:
            self._process = process
            self._say(json.dumps(asdict(self.options)).encode() + b"\n")
            if self._is_draining.is_set():
                self._tell_to_end()
        try:
            return process.wait()
        finally:
            with self._lock:
                self._process = None
                if process.stdin is not None:
                    with suppress(OSError):  # what it did not read
                        process.stdin.close()

    def _tell_to_end(self) -> None:
        self._say(f"{self._ending.name}\n".encode())
        if self._ending is not Ending.WELL and self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _say(self, words: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError, ValueError):  # it died, and the next one is told
                self._process.stdin.write(words)
                self._process.stdin.flush()

    def _record_death(self, code: int | None) -> None:
        try:
            log = EventLog(RunDir(Path(self.options.run_dir)).events_path)
            log.write("checkpoint_service_died", code=code, log=str(self._log))
            log.close()
        except OSError as error:  # the record may lie on a disk that is full
            _log.warning("the checkpoint service died with code %s, which cannot be recorded: %s", code, error)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", "from launcher.node.checkpoint_process import serve; serve()"),
                    self.options.run_dir,  # for whoever looks at the processes of the machine
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._cwd,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the driver alone
            )
