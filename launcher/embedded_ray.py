"""A Ray of our own on this machine, for the time of a job: apart from every other Ray, and reachable from here only."""

import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

_OBJECT_STORE_BYTES = 80 * 2**20  # the least Ray accepts; nothing but commands passes through it


@contextmanager
def embedded_ray(folder: Path) -> Iterator[None]:
    """Start Ray with its files in `folder`, and stop it at the end; meanwhile SIGTERM is taken as Ctrl-C.

    The environment's RAY_* variables speak of somebody else's cluster and are hidden from it.
    """
    assert threading.current_thread() is threading.main_thread(), "the kernel ends Ray with the thread that starts it"
    assert not ray.is_initialized(), "this process is connected to another Ray"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with _environment(), _loopback_only():
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
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's would print a stack
            yield
        finally:
            with _interrupts_held():
                ray.shutdown(wait_for_processes=True)
            signal.signal(signal.SIGTERM, on_sigterm)


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
def _interrupts_held() -> Iterator[None]:
    """Deliver a Ctrl-C that arrives meanwhile at the end: a half-started Ray could not be stopped."""
    held: list[FrameType | None] = []
    handler = signal.signal(signal.SIGINT, lambda _, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held and callable(handler):
            handler(signal.SIGINT, held[-1])
