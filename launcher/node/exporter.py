"""A machine's metrics: what its ranks have said last, in common. See `trainer.metrics.NODE`."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from launcher.exposition import Values, expose
from launcher.http_server import HttpServer, Request, Response
from trainer import metrics
from trainer.heartbeat import STEP_PHASES, Beat
from trainer.metrics import STATISTICS

METRICS_PATH = "/metrics"


def serve(host: str, port: int, beats: Callable[[], Mapping[int, Beat]]) -> HttpServer:
    """Raises:
    OSError: it cannot listen there.
    """

    def answer(request: Request) -> Response:
        body, content_type = expose(node_values(beats()), request.headers.get("accept", ""))
        return Response(body, content_type)

    return HttpServer(host, port, {METRICS_PATH: answer})


def node_values(beats: Mapping[int, Beat]) -> Values:
    """Of local ranks, by number; what is said of steps, only once all have done one."""
    memories = [beat.memory for beat in beats.values()]
    values: dict[metrics.Metric, dict[tuple[str, ...], float]] = {
        metrics.NODE_RANKS: {(): len(beats)},
        metrics.NODE_ALLOCATED: _statistics([memory.allocated for memory in memories]),
        metrics.NODE_RESERVED: {(): max((memory.reserved for memory in memories), default=0)},
        metrics.NODE_RESIDENT: {(): sum(memory.resident for memory in memories)},
    }
    if not beats or not all(beat.num_steps for beat in beats.values()):
        return values
    own_seconds = {rank: beat.last_step.own_seconds for rank, beat in beats.items()}
    return {
        **values,
        metrics.NODE_STEP: _statistics(list(own_seconds.values())),
        metrics.NODE_SLOWEST_RANK: {(): max(own_seconds, key=lambda rank: own_seconds[rank])},
        metrics.NODE_PHASE: {
            (phase.replace(" ", "_"),): fmean(beat.last_step.seconds[phase] for beat in beats.values())
            for phase in STEP_PHASES
        },
    }


def _statistics(values: Sequence[float]) -> dict[tuple[str, ...], float]:
    if not values:
        return {}
    found = dict(zip(STATISTICS, (min(values), fmean(values), max(values)), strict=True))
    return {(name,): value for name, value in found.items()}
