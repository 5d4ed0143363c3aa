"""A Ray of our own on this machine, for the time of a job: apart from every other Ray, and reachable from here only."""

import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from launcher.job.cluster import on_loopback

_OBJECT_STORE_BYTES = 80 * 2**20  # the least Ray accepts; nothing but commands passes through it


@contextmanager
def embedded_ray(folder: Path, labels: Mapping[str, str] | None = None, num_jobs: int = 1) -> Iterator[None]:
    """Start Ray with its files in `folder`, and stop it at the end; meanwhile SIGTERM without a handler is Ctrl-C.

    Within a `launcher.job.session`, which ends what an interrupt leaves half-started.

    Args:
        num_jobs: that are to have an agent here at the same time.
    """
    assert threading.current_thread() is threading.main_thread(), "the kernel ends Ray with the thread that starts it"
    assert not ray.is_initialized(), "this process is connected to another Ray"
    before = signal.getsignal(signal.SIGTERM)
    on_sigterm = before if callable(before) else signal.default_int_handler
    with isolated():
        try:
            _init(folder, labels or {}, num_jobs, on_sigterm)
            _end_autoscaler()
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's would print a stack
            yield
        finally:
            ray.shutdown(wait_for_processes=True)
            signal.signal(signal.SIGTERM, before)


def _init(
    folder: Path, labels: Mapping[str, str], num_jobs: int, on_sigterm: Callable[[int, FrameType | None], object]
) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=num_jobs,
            labels=dict(labels),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "ray"),
        )
    except SystemExit:  # how Ray answers SIGTERM while it starts
        on_sigterm(signal.SIGTERM, None)
        raise


def _end_autoscaler() -> None:
    """It has no machines to add, and at the end Ray would give it a second, as SIGTERM does not end it."""
    node = ray._private.worker._global_node
    node.kill_monitor(check_alive=False)


@contextmanager
def isolated() -> Iterator[None]:
    """A Ray started from this process has a token of its own, binds to 127.0.0.1 only and knows of no other Ray.

    The environment's RAY_* variables speak of somebody else's cluster and are hidden from it.
    """
    theirs = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_memory_monitor_refresh_ms": "0",  # short of memory, Ray would kill the agent; the kernel picks better
    }
    _replace_environment(theirs, ours)
    try:
        with on_loopback():
            yield
    finally:
        _replace_environment([name for name in os.environ if name.startswith("RAY_")], theirs)


def _replace_environment(old: Iterable[str], new: Mapping[str, str]) -> None:
    for name in old:
        del os.environ[name]
    os.environ.update(new)
    Config.initialize("")  # Ray's native code keeps what it once read
    AuthenticationTokenLoader.instance().reset_cache()
