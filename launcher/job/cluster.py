"""A Ray cluster that is there already: connecting to it, and what it has."""

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import ray
from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import RayError

from launcher.placement import Machine
from trainer.config import UserError

_ANSWER_SECONDS = 10.0  # that a cluster may take to accept a connection


@contextmanager
def connected(address: str, env: Mapping[str, str]) -> Iterator[None]:
    """Be a driver of the cluster at an address; `auto` means the one that runs on this machine.

    Args:
        env: environment of every process that the cluster starts for this one.

    Raises:
        UserError: there is none to connect to.
    """
    assert not ray.is_initialized()
    with ExitStack() as resources:
        try:
            found = _listening(address)
            if _is_loopback(found):
                resources.enter_context(on_loopback())
            with _sigterm_kept():
                ray.init(
                    address=found,
                    log_to_driver=False,
                    configure_logging=False,
                    runtime_env={"env_vars": {**env, **_path_of_this_code()}},
                )
        except (OSError, RayError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--ray {address}: no Ray cluster to connect to ({reason}); start one, or leave --ray out"
            ) from error
        resources.callback(ray.shutdown)
        yield


@contextmanager
def on_loopback() -> Iterator[None]:
    """Meanwhile Ray does not put the machine's own address in the place of 127.0.0.1."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """SIGTERM is answered as before, and not as Ray would: by a stack, and the end."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # how Ray answers it while it connects
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def machines() -> list[Machine]:
    """The living machines of the cluster, with what each has in all, whoever uses it."""
    return [
        Machine(node["Resources"], node["Labels"], node["NodeManagerAddress"], node["NodeID"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def _listening(address: str) -> str:
    """The cluster's host:port, where something answers: Ray itself would try for minutes.

    Raises:
        OSError: nothing does, or there is no cluster to find.
    """
    found = canonicalize_bootstrap_address_or_die(address)  # for a loopback address, the machine's own
    try:
        _connect(found)
    except OSError as error:
        if _is_loopback(address) and not _is_loopback(found):
            with suppress(OSError):
                _connect(address)
                return address
        raise ConnectionError(f"nothing answers at {found}: {error.strerror or error}") from error
    return found


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()


def _is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")


def _path_of_this_code() -> dict[str, str]:
    """Where a driver found its packages by PYTHONPATH, so do its workers, whatever folder they run in."""
    paths = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))} if paths else {}
