"""The job's presence on one machine: a Ray actor that has the machine's ranks forked and watches them."""

import os
import shutil
import socket
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray

from launcher import placement
from launcher.http_server import HttpServer
from launcher.node import exporter, fork_server
from launcher.node.checkpoint_process import Ending, ServiceKeeper, ServiceOptions
from launcher.node.fork_server import Channel, Goodbye, Kill, Ready, ServerOptions, Start
from launcher.node.forked_rank import RankEnd
from launcher.node.stacks import RankReport, collect
from launcher.placement import Placement
from trainer import config_file
from trainer.checkpoint.service.room import room_path
from trainer.config import RunConfig
from trainer.heartbeat import Beat, beat_path, read
from trainer.rank_spec import RankSpec, Task
from trainer.run_dir import RunDir

_GOODBYE_SECONDS = 5.0  # for a fork server to end
_STACK_SECONDS = 5.0  # for ranks to tell where they are; one that can takes milliseconds


@dataclass(frozen=True)
class Job:
    """What every agent of a job knows."""

    id: str
    """Told apart from every other job by this."""
    config: RunConfig
    run_dir: Path
    logs: Path
    lock: Path
    """See `launcher.node.ownership`."""
    target: str
    """What a rank runs, `module:function`."""
    cwd: str
    """Where relative paths in the config start."""
    folder: Path
    """In the memory of every machine, for one folder a slot: signs of life of its ranks, its fork server's socket."""

    def server_options(self, slot: int) -> ServerOptions:
        return ServerOptions(self.target, self.logs, slot, self.lock, self.id, self.folder / f"slot-{slot}")

    def room_path(self, node: int) -> Path:
        """See `trainer.checkpoint.service.room`."""
        return room_path(Path(self.config.checkpoint.snapshots_in), self.run_dir, RunDir(self.run_dir).id, node)

    @property
    def server_env(self) -> dict[str, str]:
        """What must be set before torch is imported."""
        threads = str(placement.threads_per_rank(self.config, num_cores()))
        cpu_only = {"CUDA_VISIBLE_DEVICES": ""} if self.config.launch.device == "cpu" else {}
        return {
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": "1",  # NumPy's BLAS would start its threads on import, and so before the fork
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for CUDA must not initialise it before the fork
            **cpu_only,
            **self.config.launch.env,
        }


@dataclass(frozen=True)
class Round:
    """One task for all ranks, as one machine is told of it."""

    task: Task
    rendezvous: str
    config: RunConfig
    """That of the job, or one for fewer machines."""
    where: Placement
    node: int
    """The machine's number in the round: which ranks are its own."""
    number: int
    """Of the round among those of the fleet: what is to be killed is named by it."""
    checkpoint: Path | None = None
    output: Path | None = None
    requests: Path | None = None
    stream: Path | None = None

    @property
    def ranks(self) -> range:
        return self.where.ranks_of(self.node)


@dataclass(frozen=True)
class NodeEnd:
    """How a machine's part of a round ended; all its ranks have."""

    failed: tuple[RankEnd, ...]
    """Ranks that failed by themselves, not those killed because of them."""
    problem: str | None = None
    """What befell the fork server or the agent, to follow "node 3: "."""

    @property
    def went_wrong(self) -> bool:
        return bool(self.failed or self.problem)


class Agent:
    """One per machine. Ranks end with their fork server, which outlives the agent if the machine does.

    Its methods may be called from several threads; one round runs at a time.
    """

    def __init__(self, job: Job, slot: int) -> None:
        """Connect to the fork server of the slot on this machine, or start one; when this returns, it has imported.

        Args:
            slot: number of the agent among those of the job, spares included.
        """
        self._job, self._slot = job, slot
        self._server: Channel | None = None
        self._sending = threading.Lock()
        self._keeper: ServiceKeeper | None = None
        self._beats = job.server_options(slot).folder / "beats"
        self._ranks = range(0)
        self._killed = 0
        """The last round that was to be ended."""
        self._exporter = self._serve_metrics()
        self._problem = "the fork server died, and its ranks with it"
        try:
            self._server = self._connect(job.server_options(slot))
        except (EOFError, ConnectionResetError):
            pass  # it is the problem already
        except OSError as error:
            self._problem = f"the fork server does not start: {error}"

    def _serve_metrics(self) -> HttpServer | None:
        """For as long as the agent lives, whatever becomes of ranks."""
        monitoring = self._job.config.monitoring
        if monitoring.listen == "nowhere":
            return None
        host = ray.util.get_node_ip_address() if monitoring.listen == "network" else "127.0.0.1"
        try:
            return exporter.serve(host, monitoring.node_port, self.beats)
        except OSError as error:
            print(f"no metrics are served: {error}", file=sys.stderr, flush=True)
            return None

    def _connect(self, options: ServerOptions) -> "Channel | None":
        """To a fork server that has imported what ranks need; None, and a problem, if it could not."""
        with suppress(OSError, EOFError):  # none listens, or it was just about to end
            return self._greeted(fork_server.connect(options))
        _spawn_for_good(options, self._job.server_env, self._job.cwd, keeper=os.getppid())  # Ray's own process here
        return self._greeted(fork_server.connect(options))

    def _greeted(self, server: Channel) -> "Channel | None":
        """Raises:
        EOFError, OSError: the server has ended.
        """
        ready: Ready = server.recv()
        self._problem = ready.problem or self._problem
        return None if ready.problem else server

    def machine(self) -> str:
        """Ray's name of the machine (hex): an answer to whoever wants to know whether the agent lives."""
        name: str = ray.get_runtime_context().get_node_id()
        return name

    def metrics_address(self) -> str | None:
        """HOST:PORT of the machine's metrics."""
        return f"{self._exporter.host}:{self._exporter.port}" if self._exporter is not None else None

    def live(self) -> None:
        """Never returns: whoever waits for it learns of the agent's death."""
        threading.Event().wait()

    def pick_rendezvous(self) -> str:
        """An address on this machine at which rank 0 can meet the others."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def run(self, this_round: Round) -> NodeEnd:
        """Fork this machine's ranks and return when all have ended; when one fails, the others are killed at once.

        What ranks that have ended well have left to be saved is saved and uploaded then. Those that failed are begun
        anew, and the checkpoint service lives on.
        """
        if self._server is None:
            return NodeEnd((), self._problem)
        try:
            end = self._run_ranks(self._server, this_round)
        except (EOFError, OSError):
            end = NodeEnd((), self._problem)
        if not end.went_wrong:
            self._end_service(Ending.WELL)
        return end

    def beats(self) -> dict[int, Beat]:
        """What the ranks said last, as far as they have said anything."""
        found = {rank: read(beat_path(self._beats, rank)) for rank in self._ranks}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def reports(self) -> list[RankReport]:
        """Where the ranks are in their code; for ranks that are to be killed, as asking for all threads is not safe."""
        return collect(self._beats, self._ranks, _STACK_SECONDS, all_threads=True)

    def kill_ranks(self, number: int) -> None:
        """End a round, also one whose ranks are only about to be forked: `run` returns, as soon as what ranks have left
        is saved."""
        self._killed = max(self._killed, number)
        if self._server is not None:
            with suppress(OSError):  # they died with it
                self._send(self._server, Kill())
        if (keeper := self._keeper) is not None:
            keeper.hurry()

    def rest(self) -> None:
        """Save what ranks have left here: they begin anew on other machines."""
        self._end_service(Ending.ELSEWHERE)

    def leave(self) -> None:
        """Have ranks, fork server and checkpoint service end; the agent is of no use afterwards."""
        if self._server is not None:
            with suppress(OSError, EOFError):  # it has ended, and tidied up
                self._send(self._server, Goodbye())
                while self._server.poll(_GOODBYE_SECONDS):
                    self._server.recv()
        self._end_service(Ending.FAILED)
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None

    def _run_ranks(self, server: Channel, this_round: Round) -> NodeEnd:
        """Raises:
        EOFError, OSError: the fork server died.
        """
        self._keep_service(this_round)
        try:
            shutil.rmtree(self._beats, ignore_errors=True)
            self._beats.mkdir(mode=0o700, parents=True)
        except OSError as error:
            return NodeEnd((), f"there is no place for signs of life: {error}")
        self._ranks = this_round.ranks
        start = Start(self._specs(this_round), self._rank_env(this_round.where))
        with self._sending:  # a kill comes either before, and is seen here, or after, and ends what was started
            if this_round.number <= self._killed:
                return NodeEnd(())
            server.send(start)
        try:
            return NodeEnd(self._watch(server, len(this_round.ranks)))
        finally:
            self._ranks = range(0)  # of which nothing more is to be told

    def _send(self, server: Channel, message: Start | Kill | Goodbye) -> None:
        with self._sending:
            server.send(message)

    def _keep_service(self, this_round: Round) -> None:
        """The one of the round before, if it does for this one too."""
        saves = this_round.task == "train" and this_round.config.checkpoint.needs_service
        options = self._service_options(this_round) if saves else None
        if self._keeper is not None and self._keeper.options != options:
            self._end_service(Ending.ELSEWHERE)
        if self._keeper is None and options is not None:
            log = self._job.logs / f"checkpoints-{this_round.node}.log"
            self._keeper = ServiceKeeper(options, log, self._job.cwd)
            self._keeper.start()

    def _end_service(self, ending: Ending) -> None:
        if self._keeper is not None:
            self._keeper.drain(ending)
            self._keeper = None

    def _service_options(self, this_round: Round) -> ServiceOptions:
        ranks = this_round.ranks
        return ServiceOptions(
            room=str(self._job.room_path(this_round.node)),
            run_dir=str(self._job.run_dir),
            config_yaml=config_file.dump(this_round.config),
            first_rank=ranks.start,
            num_ranks=len(ranks),
            node=this_round.node,
            num_nodes=this_round.where.nodes,
            lock=str(self._job.lock),
            job_id=self._job.id,
        )

    def _watch(self, server: Channel, num_ranks: int) -> tuple[RankEnd, ...]:
        failed: list[RankEnd] = []
        for _ in range(num_ranks):
            end: RankEnd = server.recv()
            if end.error is None or end.killed:
                continue
            if not failed:
                self._send(server, Kill())
            failed.append(end)
        return tuple(failed)

    def _specs(self, this_round: Round) -> list[RankSpec]:
        ranks, config = this_round.ranks, this_round.config
        has_room = this_round.task == "train" and config.checkpoint.asynchronous
        return [
            RankSpec(
                rank=rank,
                world_size=this_round.where.num_ranks,
                local_rank=rank - ranks.start,
                local_world_size=len(ranks),
                rendezvous=this_round.rendezvous,
                config_yaml=config_file.dump(config),
                run_dir=self._job.run_dir,
                task=this_round.task,
                threads=placement.threads_per_rank(config, num_cores()),
                checkpoint=this_round.checkpoint,
                output=this_round.output,
                requests=this_round.requests,
                stream=this_round.stream,
                room=self._job.room_path(this_round.node) if has_room else None,
                heartbeats=self._beats,
            )
            for rank in ranks
        ]

    def _rank_env(self, where: Placement) -> Mapping[str, str]:
        """What is known only now that Ray has placed the agent."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "") if where.gpus_per_node else ""
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if where.nodes == 1 else {}
        return {"CUDA_VISIBLE_DEVICES": gpus, **loopback, **self._job.config.launch.env}


def _spawn_for_good(options: ServerOptions, env: Mapping[str, str], cwd: str, keeper: int) -> None:
    """Start a fork server from a thread that stays: at first the kernel ends the server with it.

    Raises:
        OSError: it does not start.
    """
    spawned: Future[object] = Future()

    def be_parent() -> None:
        try:
            spawned.set_result(fork_server.spawn(options, env, cwd, keeper))
        except OSError as error:
            spawned.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=be_parent, name="parent of the fork server", daemon=True).start()
    spawned.result()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
