"""Running tasks on all ranks of a run: start Ray and the agents, watch, say what went wrong, leave nothing behind."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._common.utils import get_system_memory

from launcher.job.embedded_ray import embedded_ray
from launcher.job.failures import JobFailed, explain
from launcher.job.fleet import Fleet, fleet_of
from launcher.job.session import memory_folder, session
from launcher.node import fork_server, ownership
from launcher.node.agent import Job
from launcher.placement import ACCELERATOR, Machine, check_beside, place
from launcher.sizing import service_config, sizes
from trainer.checkpoint.format import store
from trainer.config import RunConfig, UserError
from trainer.rank_spec import Task
from trainer.run_dir import RunDir

RANK_TARGET = "trainer.rank:main"

_POLL_SECONDS = 0.1
_ARRIVAL_SECONDS = 60.0  # for machines that were lost to be replaced, before a task begins on fewer
_LEAVING_SECONDS = 30.0  # for killed processes to be gone; it takes them less than one

_log = logging.getLogger(__name__)


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
    """Warm agents that run one task after another; made by `ready_ranks`."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def run(
        self,
        task: Task,
        on_poll: Callable[[], None],
        *,
        checkpoint: Path | None = None,
        output: Path | None = None,
        requests: Path | None = None,
        stream: Path | None = None,
    ) -> None:
        """Run a task on all ranks to its end, calling `on_poll` about ten times a second and once at the end.

        Raises:
            UserError: a rank raised one.
            RankFailed: a rank failed.
            NodeFailed: an agent or a fork server did.
            JobFailed: too few machines are left.
        """
        slots, config = self._gather()
        life = self.fleet.begin(
            task, slots, config, checkpoint=checkpoint, output=output, requests=requests, stream=stream
        )
        while (ends := life.poll(_POLL_SECONDS)) is None:
            on_poll()
        on_poll()
        if any(end.went_wrong for end in ends.values()):
            raise explain(ends, self.fleet.job.logs)

    def _gather(self) -> tuple[list[int], RunConfig]:
        """The slots on which to run, and the config for as many: some machines may have been lost before."""
        configs, deadline = sizes(self.fleet.job.config), time.monotonic() + _ARRIVAL_SECONDS
        while True:
            self.fleet.news()
            slots = [agent.slot for agent in self.fleet.present()]
            size = next((size for size in configs if size <= len(slots)), None)
            if size is not None and (size == max(configs) or time.monotonic() > deadline):
                return slots[:size], configs[size]
            if time.monotonic() > deadline:
                raise JobFailed(f"{len(slots)} of {max(configs)} machines are left, and no layout fits on so few")
            time.sleep(_POLL_SECONDS)


# ---------------------------------------------------------------------------------------------- starting and ending


def check_embedded(config: RunConfig) -> None:
    """Refuse a run that wants more than this machine.

    Raises:
        UserError: it does.
    """
    if config.launch.nodes > 1:
        raise UserError(f"launch.nodes is {config.launch.nodes}, and a run without a cluster has 1; set it to 1")
    place(config, machines := [this_machine(config)])
    if config.evaluation.has_service:
        check_beside(config, service_config(config), machines)


def this_machine(config: RunConfig) -> Machine:
    """As a Ray of its own would see it, for what the run asks of it."""
    gpus = 0
    if config.launch.device == "auto":
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    elif config.launch.device == "cuda":
        from trainer.device import num_gpus  # imports torch, which only those who have asked for GPUs wait for

        gpus = num_gpus()
    resources = {"CPU": float(_num_jobs(config)), "GPU": float(gpus), "memory": float(get_system_memory())}
    return Machine(resources, {**_labels_of_gpus(), **config.launch.labels})


def _labels_of_gpus() -> dict[str, str]:
    """Their model, as the driver calls it, if all are alike."""
    models = set()
    for path in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        with suppress(OSError):
            told = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            models.add(told.get("Model", "").strip())
    return {ACCELERATOR: models.pop()} if len(models) == 1 else {}


def _num_jobs(config: RunConfig) -> int:
    """That have an agent on this machine."""
    return 2 if config.evaluation.has_service else 1


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
    with session() as folder, _owned(job := _new_job(config, run_dir, folder, target)):
        store.clear_leftovers(run_dir.checkpoints)
        if on_cluster:
            with fleet_of(job, folder) as fleet:
                yield Ranks(fleet)
            return
        # Before Ray, so that the imports of the ranks (4 s) overlap with Ray's start (3 s).
        server = fork_server.spawn(job.server_options(0), job.server_env, job.cwd, keeper=os.getpid())
        try:
            with embedded_ray(folder, config.launch.labels, _num_jobs(config)), fleet_of(job, folder) as fleet:
                yield Ranks(fleet)
        finally:
            server.kill()
            server.wait()


def _new_job(config: RunConfig, run_dir: RunDir, folder: Path, target: str) -> Job:
    """A job of a session, by its folder, in a run's."""
    absolute, id = RunDir(run_dir.path.resolve()), secrets.token_hex(8)
    return Job(
        id=id,
        config=config,
        run_dir=absolute.path,
        logs=absolute.logs,
        lock=absolute.path / ownership.LOCK_NAME,
        target=target,
        cwd=os.getcwd(),
        folder=memory_folder(folder, id),
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
