"""A Ray of our own on this machine, for the time of a job: apart from every other Ray, and reachable from here only."""

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

_OBJECT_STORE_BYTES = 80 * 2**20  # the least Ray accepts; nothing but commands passes through it


@contextmanager
def embedded_ray(folder: Path) -> Iterator[None]:
    """Start Ray with its files in `folder`, and stop it at the end.

    The environment's RAY_* variables speak of somebody else's cluster and are hidden from it.
    """
    assert not ray.is_initialized(), "this process is connected to another Ray"
    with _environment(), _loopback_only(), _sigterm_restored():
        try:
            with _interrupts_held():
                ray.init(
                    address="local",
                    num_cpus=1,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder / "ray"),
                )
            _exit_on_sigterm()
            yield
        finally:
            with _interrupts_held():
                ray.shutdown(wait_for_processes=True)


@contextmanager
def _environment() -> Iterator[None]:
    """Ray with a token of its own, in memory only, in place of the user's cluster settings."""
    theirs = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_memory_monitor_refresh_ms": "0",  # short of memory, Ray would kill the agent; the kernel picks better
    }
    for name in theirs:
        del os.environ[name]
    os.environ.update(ours)
    _forget_environment()
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(theirs)
        _forget_environment()


def _forget_environment() -> None:
    """Have Ray's native code, which keeps what it once read, read the variables again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let Ray's processes bind to 127.0.0.1; on Linux it otherwise puts the machine's address in its place."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _sigterm_restored() -> Iterator[None]:
    """Undo what `ray.init` does to the handling of SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if _in_main_thread():
            signal.signal(signal.SIGTERM, before)


def _exit_on_sigterm() -> None:
    """Take SIGTERM as a request to clean up and leave, where Ray would print a stack of its own."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if _in_main_thread():
        signal.signal(signal.SIGTERM, leave)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Deliver a Ctrl-C that arrives meanwhile at the end: a half-started Ray could not be stopped."""
    if not _in_main_thread():
        yield
        return
    held: list[FrameType | None] = []
    before = signal.signal(signal.SIGINT, lambda _, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(signal.SIGINT, held[-1])


def _in_main_thread() -> bool:
    """Where alone Python lets signal handlers be set."""
    return threading.current_thread() is threading.main_thread()
