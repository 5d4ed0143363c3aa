"""A process that has imported all that a rank needs and forks the ranks of one machine from itself.

Importing torch, megatron-core and DeepSpeed takes seconds, forking takes milliseconds, so a job starts its ranks from
here. The process has one thread and no CUDA state, because a fork can copy neither; whoever spawns it may have both.

It is not the fork server of `multiprocessing`, whose children import the `__main__` of the process that asked for
them (in a Ray worker that is Ray, 1.4 s for four ranks on two cores) and which passes over a failed preload in
silence.

It outlives an agent that dies, whose ranks it kills, and waits a while for the next one, which need not import
anything. It ends with its keeper, a process that lives as long as the machine is the job's, and while it imports with
whoever has spawned it. The kernel kills the ranks with the fork server.
"""

import errno
import faulthandler
import gc
import importlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

from launcher.node import ownership
from launcher.node.forked_rank import Entry, ForkedRank, die_with, fork_rank, live_on, one_line
from trainer.rank_spec import RankSpec

Channel: TypeAlias = "Connection[Any, Any]"

_LINGER_SECONDS = 20.0
"""For the next agent to come, after one that has not said goodbye."""
_DYING_SECONDS = 5.0
"""For ranks to be gone that were killed."""


@dataclass(frozen=True)
class ServerOptions:
    """What a fork server is told when it is spawned."""

    target: str
    """What a rank runs, `module:function`; the function takes the RankSpec."""
    logs: Path
    """Folder of rank-<rank>.log and node-<node>.log."""
    node: int
    """Index of the machine within the job."""
    lock: Path
    """The file of `launcher.node.ownership` that the server and its ranks hold."""
    job_id: str
    folder: Path
    """Of the slot on this machine; goes with the server."""

    @property
    def socket_path(self) -> Path:
        """Where it listens; only those who may look into its folder can connect."""
        return self.folder / "fork.sock"


@dataclass(frozen=True)
class Ready:
    """The first thing it says to an agent: the target is imported, or cannot be."""

    problem: str | None


@dataclass(frozen=True)
class Start:
    """Tells it to fork a rank per spec; it answers with a RankEnd per rank, in the order of their ends."""

    specs: Sequence[RankSpec]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Kill:
    """Tells it to kill the ranks that are alive."""


@dataclass(frozen=True)
class Goodbye:
    """Tells it to kill the ranks that are alive, and to end."""


def spawn(options: ServerOptions, env: Mapping[str, str], cwd: str, keeper: int) -> subprocess.Popen[bytes]:
    """Start a fork server, which begins to import, and accepts connections on its socket from now on, one at a time.

    While it imports the kernel kills it with the calling thread, which must therefore be one that lasts.

    Args:
        keeper: process with which it is to end.
    """
    path = options.socket_path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of one that died
    with socket.socket(socket.AF_UNIX) as listener, open(options.logs / f"node-{options.node}.log", "ab") as log:
        listener.bind(str(path))
        listener.listen(1)
        told = json.dumps(vars(options), default=str)
        program = ["-P", "-c", "from launcher.node.fork_server import serve; serve()"]
        return subprocess.Popen(
            [sys.executable, *program, told, str(os.getpid()), str(keeper), str(listener.fileno())],
            pass_fds=(listener.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **env},
            cwd=cwd,
            start_new_session=True,  # Ctrl-C is for the driver alone
        )


def connect(options: ServerOptions) -> Channel:
    """The channel for `Start`, `Kill` and `Goodbye`, on which come `Ready` and `RankEnd`s.

    Raises:
        OSError: no fork server listens.
    """
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(str(options.socket_path))
    except OSError:
        peer.close()
        raise
    return _trusted(peer)


def serve() -> None:
    """The whole life of the fork server process."""
    told, (spawner, keeper, listener_fd) = json.loads(sys.argv[1]), map(int, sys.argv[2:])
    die_with(spawner)
    options = ServerOptions(**{**told, **{name: Path(told[name]) for name in ("logs", "lock", "folder")}})
    faulthandler.enable()
    own = _inode(options.socket_path)
    hold = ExitStack()  # not closed: whoever waits for the run to be free waits for the end of this process
    with suppress(ProcessLookupError):  # the keeper has ended already
        _serve(options, hold, socket.socket(fileno=listener_fd), os.pidfd_open(keeper))
    if _inode(options.socket_path) == own:  # else the next one is here already
        shutil.rmtree(options.folder, ignore_errors=True)
        with suppress(OSError):  # other slots are in it
            options.folder.parent.rmdir()
    sys.stdout.flush()
    os._exit(0)  # taking all that was imported down takes longer than all else it does at its end


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _serve(options: ServerOptions, hold: ExitStack, listener: socket.socket, keeper: int) -> None:
    """One agent after the other, while the run is its job's: in between another job may claim it.

    `hold` has the run, and the channel to an agent: at the end as well, so that the agent learns of the end last.
    """
    if not hold.enter_context(ownership.held(options.lock, options.job_id)):
        return
    entry, problem = _preload(options.target)
    live_on()
    gc.freeze()  # a collection in a rank would write to, and so copy, every page shared with the others
    seconds = None
    while (agent := _next_agent(listener, keeper, seconds)) is not None:
        hold.enter_context(agent)
        if not hold.enter_context(ownership.held(options.lock, options.job_id)):
            return
        with suppress(OSError):  # it has died, which is seen below
            agent.send(Ready(problem))
        if problem or not _obey(agent, entry, options.logs, keeper):
            return
        hold.close()
        seconds = _LINGER_SECONDS


def _next_agent(listener: socket.socket, keeper: int, seconds: float | None) -> "Channel | None":
    if wait([listener, keeper], seconds) != [listener]:
        listener.close()
        return None
    accepted, _ = listener.accept()
    return _trusted(accepted)


def _trusted(peer: socket.socket) -> "Channel":
    """The channel to a process of this user: what comes through it is unpickled.

    Raises:
        PermissionError: it is somebody else's.
    """
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid != os.getuid():
        peer.close()
        raise PermissionError(errno.EACCES, f"user {uid} is at the other end")
    return Connection(peer.detach())


def _preload(target: str) -> tuple[Entry, str | None]:
    """The target, and why it cannot be used."""

    def missing(spec: RankSpec) -> None:
        raise AssertionError(f"{target} was not imported")

    module, _, function = target.partition(":")
    started = time.monotonic()
    try:
        entry = getattr(importlib.import_module(module), function)
        print(f"imported {module} in {time.monotonic() - started:.1f} s", flush=True)
    except BaseException as error:  # an import may do anything, SystemExit included
        traceback.print_exc()
        return missing, f"importing {target} failed with {one_line(error)}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return missing, f"importing {module} initialises CUDA, which no forked rank could use; leave that to the rank"
    if len(os.listdir("/proc/self/task")) > 1:
        print(f"warning: importing {module} starts threads; forked ranks are without them", file=sys.stderr, flush=True)
    return entry, None


def _obey(agent: Channel, entry: Entry, logs: Path, keeper: int) -> bool:
    """Fork, reap and kill ranks as told; returns whether another agent may come after this one."""
    running: dict[int, ForkedRank] = {}
    message: Start | Kill | Goodbye | None = Kill()
    is_kept = True
    while is_kept and isinstance(message, Start | Kill):
        for ready in wait([agent, keeper, *running]):
            if ready is agent:
                message = _heard(agent)
                if isinstance(message, Start):
                    for spec in message.specs:
                        rank = fork_rank(spec, entry, message.env, logs)
                        running[rank.fileno()] = rank
                else:
                    _kill(running)
            elif ready == keeper:
                is_kept = False
            elif isinstance(ready, int):
                end = running.pop(ready).reap()
                with suppress(OSError):  # the agent has died, and this is seen next
                    agent.send(end)
    _kill(running)
    return is_kept and message is None and _are_gone(running)


def _heard(agent: Channel) -> Start | Kill | Goodbye | None:
    """What it says next; None if it has died."""
    try:
        said: Start | Kill | Goodbye = agent.recv()
    except (EOFError, OSError):
        return None
    return said


def _kill(ranks: Mapping[int, ForkedRank]) -> None:
    for rank in ranks.values():
        rank.kill()


def _are_gone(ranks: dict[int, ForkedRank]) -> bool:
    """Reap ranks that have been killed; returns whether all could be, in time: a device may hold one up for ever."""
    deadline = time.monotonic() + _DYING_SECONDS
    while ranks and (ended := wait(list(ranks), max(0.0, deadline - time.monotonic()))):
        for descriptor in set(ranks).intersection(ended):
            ranks.pop(descriptor).reap()
    return not ranks
