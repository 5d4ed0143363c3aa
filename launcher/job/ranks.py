"""Running tasks on all ranks of a run: start Ray and the agents, watch, say what went wrong, leave nothing behind."""

import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.job import cluster, replication
from launcher.job.embedded_ray import embedded_ray
from launcher.job.replication import SnapshotPeer
from launcher.job.session import session
from launcher.node import fork_server, ownership
from launcher.node.agent import Agent, Job, NodeEnd, Round
from launcher.node.forked_rank import RankEnd
from launcher.placement import Placement, place
from trainer.checkpoint.format import store
from trainer.checkpoint.service.room import Room
from trainer.config import RunConfig, UserError
from trainer.rank_spec import Task
from trainer.run_dir import RunDir

RANK_TARGET = "trainer.rank:main"

_POLL_SECONDS = 0.1
_LATE_NEWS_SECONDS = 0.5  # how much longer other machines may take to report what made the first rank fail
_PLACEMENT_SECONDS = 60.0  # the cluster has what is asked for, but another job may hold it
_LEAVING_SECONDS = 30.0  # for killed processes to be gone; it takes them less than one

_log = logging.getLogger(__name__)


class JobFailed(RuntimeError):
    """The ranks did not reach the end of their task; the text is one line for a person."""


class RankFailed(JobFailed):
    """A rank raised, was killed by a signal or left early."""

    def __init__(self, rank: int, error: str, log_path: Path) -> None:
        super().__init__(f"rank {rank} {error}; see {log_path}")
        self.rank = rank
        self.error = error
        self.log_path = log_path


class NodeFailed(JobFailed):
    """The agent or the fork server of a machine died, or cannot import what ranks run."""

    def __init__(self, node: int, error: str, log_path: Path) -> None:
        super().__init__(f"node {node}: {error}; see {log_path}")
        self.node = node
        self.error = error
        self.log_path = log_path


def run_ranks(
    config: RunConfig,
    run_dir: RunDir,
    task: Task,
    on_poll: Callable[[], None],
    *,
    checkpoint: Path | None = None,
    output: Path | None = None,
    target: str = RANK_TARGET,
) -> None:
    """Run one task on all ranks, with a Ray and agents for it alone; see `Ranks.run`."""
    with ready_ranks(config, run_dir, target) as ranks:
        ranks.run(task, on_poll, checkpoint=checkpoint, output=output)


class Ranks:
    """Warm agents that run one task after another; made by `ready_ranks`.

    After a failure, ranks on other machines than the failed one live until `ready_ranks` ends.
    """

    def __init__(
        self,
        agents: Sequence[Any],
        where: Placement,
        run_dir: RunDir,
        folder: Path,
        peers: Sequence[Any] = (),
        node_ids: Collection[str] = (),
    ) -> None:
        """`node_ids` are Ray's names of the machines (hex); `peers` are the actors of `launcher.job.replication`, one
        per machine, if snapshots are replicated.
        """
        self._agents, self._where, self._run_dir, self._folder = agents, where, run_dir, folder
        self._peers = peers
        self.node_ids = node_ids
        self._num_rounds = 0

    def run(
        self,
        task: Task,
        on_poll: Callable[[], None],
        *,
        checkpoint: Path | None = None,
        output: Path | None = None,
    ) -> None:
        """Run a task on all ranks to its end, calling `on_poll` about ten times a second and once at the end.

        Raises:
            UserError: a rank raised one.
            RankFailed: a rank failed.
            NodeFailed: an agent or a fork server did.
        """
        if self._peers and task == "train":
            replication.bring_together(self._peers, self._where)
            replication.follow_neighbours(self._peers)
        try:
            self._run(Round(task, self._pick_rendezvous(), checkpoint, output), on_poll)
        finally:
            ray.get([peer.stop.remote() for peer in self._peers])

    def _run(self, this_round: Round, on_poll: Callable[[], None]) -> None:
        pending = {agent.run.remote(this_round): node for node, agent in enumerate(self._agents)}
        while pending:
            done, _ = ray.wait(list(pending), timeout=_POLL_SECONDS)
            on_poll()
            ends = {pending.pop(ref): _end_of(ref) for ref in done}
            if any(end.went_wrong for end in ends.values()):
                late, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_LATE_NEWS_SECONDS)
                raise self._failure(ends | {pending[ref]: _end_of(ref) for ref in late})

    def _pick_rendezvous(self) -> str:
        self._num_rounds += 1
        if self._where.nodes == 1:  # a file, so that nothing listens
            return f"file://{self._folder}/rendezvous-{self._num_rounds}"
        address: str = ray.get(self._agents[0].pick_rendezvous.remote())
        return address

    def _failure(self, ends: Mapping[int, NodeEnd]) -> Exception:
        for node, end in ends.items():
            if end.problem:
                return NodeFailed(node, end.problem, self._run_dir.logs / f"node-{node}.log")
        first = first_failure([rank for end in ends.values() for rank in end.failed])
        if first.user_error is not None:
            return UserError(first.user_error)
        return RankFailed(first.rank, str(first.error), self._run_dir.logs / f"rank-{first.rank}.log")


def first_failure(failed: Sequence[RankEnd]) -> RankEnd:
    """The failure that explains the others.

    A rank that dies of a signal says nothing, while its peers raise errors about lost connections, maybe before its
    death is seen. Otherwise the first to raise is the cause.
    """
    return min(failed, key=lambda end: (not end.by_signal, end.time))


def _end_of(ref: Any) -> NodeEnd:
    try:
        end: NodeEnd = ray.get(ref)
    except RayActorError:
        return NodeEnd((), "the agent died, and its ranks with it")
    return end


# ---------------------------------------------------------------------------------------------- starting and ending


def check_embedded(config: RunConfig) -> None:
    """Refuse a run that wants more than this machine.

    Raises:
        UserError: it does.
    """
    if config.launch.nodes > 1:
        raise UserError(f"launch.nodes is {config.launch.nodes}, and a run without a cluster has 1; set it to 1")
    if config.launch.device == "cuda":
        from trainer.device import num_gpus  # imports torch, which only those who have asked for GPUs wait for

        if num_gpus() < config.parallel.num_ranks:
            raise UserError(
                f"launch.device is cuda and needs one GPU a rank, {config.parallel.num_ranks} in all; this machine has "
                f"{num_gpus()}; change the layout, or set launch.device to cpu"
            )


@contextmanager
def ready_ranks(
    config: RunConfig, run_dir: RunDir, target: str = RANK_TARGET, *, on_cluster: bool = False
) -> Iterator[Ranks]:
    """Agents on this machine, in a Ray of their own; they, their ranks and Ray are gone when this ends.

    Args:
        run_dir: has been created.
        target: what ranks run, `module:function`.
        on_cluster: use the cluster to which this process is connected instead; its machines share the run's folder.

    Raises:
        UserError: the machine is too small for the run, or processes of a killed job refuse to end.
    """
    if not on_cluster:
        check_embedded(config)
    job = _new_job(config, run_dir, target)
    with session() as folder, _owned(job):
        store.clear_leftovers(run_dir.checkpoints)
        if on_cluster:
            with ranks_on_cluster(job, folder) as ranks:
                yield ranks
            return
        socket_path = folder / "fork.sock"
        # Before Ray, so that the imports of the ranks (4 s) overlap with Ray's start (3 s).
        server = fork_server.spawn(job.server_options(0), socket_path, job.server_env, job.cwd)
        try:
            with embedded_ray(folder), ranks_on_cluster(job, folder, socket_path) as ranks:
                yield ranks
        finally:
            server.kill()
            server.wait()


@contextmanager
def ranks_on_cluster(job: Job, folder: Path, socket_path: Path | None = None) -> Iterator[Ranks]:
    """Warm agents, one per machine, on the Ray to which this process is connected.

    Args:
        folder: of the session.
        socket_path: where the fork server of this machine listens, if it has been spawned already.
    """
    where = place(job.config, cluster.machines())
    group = placement_group([where.bundle] * where.nodes, strategy="STRICT_SPREAD")
    try:
        if not group.wait(_PLACEMENT_SECONDS):
            raise JobFailed(f"{where.nodes} x {where.bundle} did not become free; other jobs hold the cluster")
        agents = [_agent_on(group, job, node, where, socket_path) for node in range(where.nodes)]
        replicated = job.config.checkpoint.replicates(where.nodes)
        peers = [_peer_on(group, job, node, where) for node in range(where.nodes)] if replicated else []
        try:
            node_ids = set(placement_group_table(group)["bundles_to_node_id"].values())
            yield Ranks(agents, where, RunDir(job.run_dir), folder, peers, node_ids)
        finally:
            for actor in [*agents, *peers]:
                ray.kill(actor)
    finally:
        remove_placement_group(group)


def _agent_on(group: PlacementGroup, job: Job, node: int, where: Placement, socket_path: Path | None) -> Any:
    return (
        ray.remote(Agent)
        .options(
            num_cpus=1,
            num_gpus=where.gpus_per_node,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node),
        )
        .remote(job, node, where, socket_path)
    )


def _peer_on(group: PlacementGroup, job: Job, node: int, where: Placement) -> Any:
    room = Room(job.room_path(node), where.ranks_of(node), is_replicated=True)
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
    # threads: one follows the neighbour, others give out meanwhile
    return ray.remote(SnapshotPeer).options(num_cpus=0, max_concurrency=4, scheduling_strategy=place).remote(room)


def _new_job(config: RunConfig, run_dir: RunDir, target: str) -> Job:
    absolute = RunDir(run_dir.path.resolve())
    return Job(
        id=secrets.token_hex(8),
        config=config,
        run_dir=absolute.path,
        logs=absolute.logs,
        lock=absolute.path / ownership.LOCK_NAME,
        target=target,
        cwd=os.getcwd(),
    )


@contextmanager
def _owned(job: Job) -> Iterator[None]:
    """Let no other job's processes into the run folder, and leave none of ours in it."""
    try:
        ownership.claim(job.lock, job.id, _LEAVING_SECONDS)
    except TimeoutError as error:
        raise UserError(str(error)) from error
    try:
        yield
    finally:
        try:
            ownership.wait_until_free(job.lock, _LEAVING_SECONDS)
        except TimeoutError as error:
            _log.warning("%s", error)
