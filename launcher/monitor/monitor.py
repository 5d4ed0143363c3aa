"""The page and the metrics of a run, served by the command that works on it.

All that is told comes from the record, from its first event on: it is the same after the command was started anew.
"""

import math
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import orjson

from launcher.exposition import expose
from launcher.history.history import RunHistory
from launcher.history.values import Facts, run_values
from launcher.history.view import view_of
from launcher.http_server import HttpServer, Request, Response
from launcher.monitor import page
from launcher.monitor.access import Access, token_of
from launcher.monitor.logs import tail_of
from launcher.monitor.sinks.feeding import Feeder, Record
from launcher.monitor.targets import Targets
from trainer.config import RunConfig
from trainer.events import EventReader
from trainer.run_dir import RunDir

_VIEW_SECONDS = 0.5
_KEEP_UP_SECONDS = 5.0
_LOOPBACK, _ANYWHERE = "127.0.0.1", "0.0.0.0"


class Watched:
    """A run's history, brought up to date whenever somebody looks, and now and then; threads may share it."""

    def __init__(self, config: RunConfig, run_dir: RunDir) -> None:
        self.facts, self._run_dir = Facts.of(config), run_dir
        self._history, self._events = RunHistory(), EventReader(run_dir.events_path)
        self._lock = threading.Lock()
        self._view, self._viewed = b"", -math.inf
        self._is_over = threading.Event()
        threading.Thread(target=self._keep_up, name="history", daemon=True).start()

    def close(self) -> None:
        self._is_over.set()

    def _keep_up(self) -> None:
        """So that whoever looks first need not wait for a hundred thousand steps to be read."""
        while True:
            with self._lock:
                self._up_to_date()
            if self._is_over.wait(_KEEP_UP_SECONDS):
                return

    def metrics(self, accept: str) -> tuple[bytes, str]:
        free_bytes = shutil.disk_usage(self._run_dir.path).free
        with self._lock:
            values = run_values(self._up_to_date(), self.facts, time.time(), free_bytes)
        return expose(values, accept)

    def view(self) -> bytes:
        """What the page shows, as JSON; made once a second at most, however many look."""
        with self._lock:
            now = time.monotonic()
            if now - self._viewed > _VIEW_SECONDS:
                view = view_of(self._up_to_date(), self.facts, time.time()) | {"log": tail_of(self._run_dir.logs)}
                self._view, self._viewed = orjson.dumps(view, option=orjson.OPT_SERIALIZE_NUMPY), now
            return self._view

    def _up_to_date(self) -> RunHistory:
        for event in self._events.new_events():
            self._history.add(event)
        return self._history


class Monitor:
    """Serves from the moment it is made until `close`, unless it cannot, and then says why."""

    def __init__(self, config: RunConfig, run_dir: RunDir, record: Record) -> None:
        self._monitoring = config.monitoring
        self._feeder = Feeder(config, run_dir, record) if config.monitoring.sinks else None
        self._targets = Targets(run_dir.targets_path, config.name)
        self._url_path = run_dir.page_url_path
        self._server: HttpServer | None = None
        self._watched: Watched | None = None
        self.url: str | None = None
        """Of the page, token included."""
        self.problem: str | None = None
        if self._monitoring.listen == "nowhere":
            return
        try:
            self._watched = Watched(config, run_dir)
            self._serve(self._watched, run_dir.page_token_path)
        except OSError as error:
            self.problem = f"there is no page of this run: {error}"

    def found(self, node_addresses: Sequence[str]) -> None:
        """The machines' endpoints, as they are now."""
        if self._server is not None:
            own = f"{self._host_name}:{self._server.port}"
            with suppress(OSError):  # of a full disk others will tell
                self._targets.write([own, *node_addresses])

    def close(self) -> None:
        if self._feeder is not None:
            self._feeder.close()
        if self._watched is not None:
            self._watched.close()
        if self._server is not None:
            self._server.close()
            self._targets.remove()
            self._url_path.unlink(missing_ok=True)

    def _serve(self, watched: Watched, token_path: Path) -> None:
        """Raises:
        OSError: it cannot listen, or the run's folder cannot be written.
        """
        is_local = self._monitoring.listen == "loopback"
        access = Access(None if is_local else token_of(token_path))

        def metrics(request: Request) -> Response:
            return Response(*watched.metrics(request.headers.get("accept", "")))

        def run(request: Request) -> Response:
            return Response(watched.view(), "application/json")

        routes = {**page.routes(), "/metrics": metrics, "/api/run": access.guarded(run)}
        host = _LOOPBACK if is_local else _ANYWHERE
        self._server = HttpServer(host, self._monitoring.page_port, routes)
        self.url = f"http://{self._host_name}:{self._server.port}/" + (f"#{access.token}" if access.token else "")
        self._url_path.touch(mode=0o600)
        self._url_path.write_text(self.url, encoding="utf-8")
        self.found([])

    @property
    def _host_name(self) -> str:
        return _LOOPBACK if self._monitoring.listen == "loopback" else _own_address()


def _own_address() -> str:
    """Of this machine, as others reach it: that from which it would send; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
