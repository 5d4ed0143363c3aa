"""A Ray cluster of one machine with a dashboard, as `ray start` makes it: with a token, on 127.0.0.1 only."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader

from launcher.job import session
from launcher.job.embedded_ray import isolated

_START_SECONDS = 90
_RAY = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
_LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray puts the machine's address in the place of 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}


class RayHead:
    """A running head, without this checkout on its PYTHONPATH."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(32)
        self._folder = tempfile.mkdtemp(prefix="head-", dir="/tmp")  # a path short enough for sockets
        # the one of every session: ends all that carries the mark, whatever their parents are, and removes the folder
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", session.__file__, self._folder], stdin=subprocess.PIPE, start_new_session=True
        )
        dashboard, client, agent = _free_ports(3)
        self.url = f"http://127.0.0.1:{dashboard}"
        where = [
            "--node-ip-address=127.0.0.1",
            "--port=0",
            "--dashboard-host=127.0.0.1",
            f"--temp-dir={self._folder}/r",
        ]
        ports = [
            "--port=0",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
        ]
        size = ["--num-cpus=2", f"--object-store-memory={80 * 2**20}"]
        self._log = Path(self._folder, "start.log")
        with open(self._log, "wb") as log:
            self._starter = subprocess.Popen(
                [sys.executable, "-c", _RAY, "start", "--head", "--block", *where, *ports, *size],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                cwd=self._folder,
                start_new_session=True,
            )
        self._wait()

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
        marks = {"BROADGAUGE_SESSION": self._folder, "SPT_NOENV": "1"}
        return kept | _LOOPBACK | marks | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        port = int(self.url.rpartition(":")[2])
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                if self._starter.poll() is not None or time.monotonic() > deadline:
                    said = self._log.read_text()
                    self.kill()
                    raise RuntimeError(f"the head does not start: {said}") from None
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to all of it and of its jobs, at once."""
        self._reaper.communicate()
        self._starter.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def client_with(**variables: str) -> Iterator[None]:
    """This process is a client with these RAY_* variables and no others."""
    with isolated():
        for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
            del os.environ[name]
        os.environ.update(variables)
        _read_again()
        yield


def _read_again() -> None:
    from ray._raylet import Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
