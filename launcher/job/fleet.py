"""The agents of a job on all its machines: started, watched, replaced, and set to work together."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.job import cluster, replication
from launcher.job.failures import JobFailed
from launcher.job.news import Down, Up
from launcher.job.replication import SnapshotPeer
from launcher.node.agent import Agent, Job, NodeEnd, Round
from launcher.node.stacks import RankReport
from launcher.placement import Machine, Placement, in_order, place
from trainer.checkpoint.service.room import Room
from trainer.config import RunConfig
from trainer.heartbeat import Beat
from trainer.rank_spec import Task

_PLACEMENT_SECONDS = 60.0  # the cluster has what is asked for, but another job may hold it
_ANSWER_SECONDS = 1.0  # for an agent that lives to say so; one that is given up in error costs a second
_REPORT_SECONDS = 15.0  # for agents to collect the stacks of their ranks
_THREADS = 6  # of an agent: a round, its life, questions; of a peer: following, giving out

_log = logging.getLogger(__name__)

_LOST = NodeEnd((), "the agent died, and its ranks with it")


class _Slot:
    """An agent, and what is awaited from it."""

    def __init__(self, agent: Any, peer: Any | None) -> None:
        self.agent, self.peer = agent, peer
        self.machine: str | None = None
        self.metrics_address: str | None = None
        self.arrival = agent.machine.remote()
        self.address = agent.metrics_address.remote()
        self.life = agent.live.remote()  # ends with the agent


class Life:
    """One task on ranks of some machines, from its start to its end."""

    def __init__(self, agents: Sequence[Any], rounds: Sequence[Round], peers: Sequence[Any]) -> None:
        self._agents, self._peers, self._number = agents, peers, rounds[0].number
        self._ends: dict[int, NodeEnd] = {}
        self._running = {agent.run.remote(each): each.node for agent, each in zip(agents, rounds, strict=True)}

    def poll(self, timeout_seconds: float) -> dict[int, NodeEnd] | None:
        """How it ended on each machine, by its number in the life; None while it lasts.

        As soon as ranks of one machine fail, those of all others are killed: when it has ended, no rank is left.
        """
        done, _ = ray.wait(list(self._running), timeout=timeout_seconds)
        self._note(done)
        if any(end.went_wrong for end in self._ends.values()) and self._running:
            self.kill()
        if self._running:
            return None
        self._stop_peers()
        return self._ends

    def kill(self) -> None:
        """Kill all its ranks and return when they are gone, or their machines do not answer."""
        asked = {self._agents[node].kill_ranks.remote(self._number): run for run, node in self._running.items()}
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
        for ref in silent:
            self._ends[self._running.pop(asked[ref])] = _LOST
        while self._running:
            self._note(ray.wait(list(self._running))[0])

    def ask_for_beats(self) -> list[Any]:
        """Of every machine: refer to what its ranks said last, by rank."""
        return [agent.beats.remote() for agent in self._agents]

    def beats(self) -> dict[int, Beat]:
        """What all ranks said last, of machines that answer at once."""
        asked = self.ask_for_beats()
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS)
        return {rank: beat for ref in answered for rank, beat in (answer_of(ref) or {}).items()}

    def reports(self) -> list[RankReport]:
        """Where all ranks are in their code, of machines that answer in time."""
        asked = [agent.reports.remote() for agent in self._agents]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_REPORT_SECONDS)
        return [report for ref in answered if (reports := answer_of(ref)) for report in reports]

    def _note(self, done: Iterable[Any]) -> None:
        for ref in done:
            self._ends[self._running.pop(ref)] = _end_of(ref)

    def _stop_peers(self) -> None:
        asked = [peer.stop.remote() for peer in self._peers]
        ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS) if asked else None


def _end_of(ref: Any) -> NodeEnd:
    try:
        end: NodeEnd = ray.get(ref)
    except RayActorError:
        return _LOST
    return end


class Fleet:
    """Warm agents in the slots of a job: one for each of its machines, and spares."""

    def __init__(self, group: PlacementGroup, bundles: Sequence[int], job: Job, where: Placement, folder: Path) -> None:
        """`bundles` of the placement group, one for each slot."""
        self.job, self.where = job, where
        self._group, self._bundles, self._folder = group, bundles, folder
        self._num_rounds = 0
        self._served = set[int]()
        """Slots on which ranks were the last time."""
        self._slots = [self._start(slot) for slot in range(len(bundles))]

    def __len__(self) -> int:
        return len(self._slots)

    def machine_of(self, slot: int) -> str | None:
        """Ray's name of the machine of an agent that has answered."""
        return self._slots[slot].machine

    def present(self) -> list[Up]:
        """The agents that have answered so far."""
        return [Up(number, slot.machine) for number, slot in enumerate(self._slots) if slot.machine is not None]

    def metrics_addresses(self) -> list[str]:
        """HOST:PORT of the machines' metrics, of agents that have answered."""
        for slot in self._slots:
            if slot.address is not None and (done := ray.wait([slot.address], timeout=0)[0]):
                slot.metrics_address, slot.address = answer_of(done[0]), None
        return [slot.metrics_address for slot in self._slots if slot.metrics_address is not None]

    def news(self) -> list[Up | Down]:
        """What has become of agents since the last call; one that died is replaced by another, on a machine that Ray
        has or gets."""
        found: list[Up | Down] = []
        for number, slot in enumerate(self._slots):
            waiting = [slot.life] if slot.machine else [slot.arrival, slot.life]
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            if slot.life in done:
                self._replace(number)
                found.append(Down(number))
            elif slot.arrival in done and (machine := answer_of(slot.arrival)) is not None:
                slot.machine = str(machine)
                found.append(Up(number, slot.machine))
        return found

    def silent(self, slots: Iterable[int]) -> list[int]:
        """Of these, the slots whose agents do not answer; Ray may take half a minute to know that a machine is gone."""
        asked = {self._slots[slot].agent.machine.remote(): slot for slot in slots}
        ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
        return [slot for ref, slot in asked.items() if answer_of(ref) is None]

    def replace(self, slots: Iterable[int]) -> list[Down]:
        """Give up the agents of these slots and start others."""
        return [self._replace(slot) for slot in slots]

    def begin(
        self,
        task: Task,
        slots: Sequence[int] | None = None,
        config: RunConfig | None = None,
        *,
        checkpoint: Path | None = None,
        output: Path | None = None,
        requests: Path | None = None,
        stream: Path | None = None,
    ) -> Life:
        """Run a task on ranks of some of the slots, numbered in their order; of all but the spares unless told.

        Args:
            config: for that many machines; the job's own unless told.

        Raises:
            RayError: a machine is lost at this moment.
        """
        slots, config = range(self.where.nodes) if slots is None else slots, config or self.job.config
        self._wait_for({self._slots[slot].agent.rest.remote(): slot for slot in self._served - set(slots)})
        self._served = set(slots)
        where = Placement(len(slots), self.where.ranks_per_node, self.where.gpus_per_node)
        agents = [self._slots[slot].agent for slot in slots]
        peers = [peer for slot in slots if (peer := self._slots[slot].peer) is not None]
        if task != "train" or not config.checkpoint.replicates(where.nodes):
            peers = []
        for node, peer in enumerate(peers):
            room = Room(self.job.room_path(node), where.ranks_of(node), is_replicated=True)
            ray.get(peer.settle.remote(room))
        if peers:
            try:
                replication.bring_together(peers, where)
            except RayError as error:  # what cannot be had from memory is had from the disk
                _log.warning("snapshots could not be brought together: %s", " ".join(str(error).split()))
            replication.follow_neighbours(peers)
        rendezvous = self._pick_rendezvous(agents[0], where)
        number = self._num_rounds
        paths = checkpoint, output, requests, stream
        rounds = [Round(task, rendezvous, config, where, node, number, *paths) for node in range(len(slots))]
        return Life(agents, rounds, peers)

    def end(self) -> None:
        """End the agents when what their ranks have left is saved, and whatever lives with them."""
        try:
            self._wait_for({each.agent.leave.remote(): slot for slot, each in enumerate(self._slots) if each.machine})
        finally:
            self.kill()

    def kill(self) -> None:
        """End the agents, whatever they are doing."""
        for slot in self._slots:
            _kill(slot)

    def _wait_for(self, asked: Mapping[Any, int]) -> None:
        """Until all have done what they were asked for, or do not live; those who were asked, by the answer's ref."""
        waiting = dict(asked)
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_ANSWER_SECONDS)
            silent = self.silent(number for ref, number in waiting.items() if ref not in done)
            waiting = {ref: number for ref, number in waiting.items() if ref not in done and number not in silent}

    def _pick_rendezvous(self, first: Any, where: Placement) -> str:
        self._num_rounds += 1
        if where.nodes == 1:  # a file, so that nothing listens
            return f"file://{self._folder}/rendezvous-{self._num_rounds}"
        address: str = ray.get(first.pick_rendezvous.remote())
        return address

    def _replace(self, number: int) -> Down:
        _kill(self._slots[number])
        self._served.discard(number)
        self._slots[number] = self._start(number)
        return Down(number)

    def _start(self, number: int) -> _Slot:
        config = self.job.config
        options = {
            "max_concurrency": _THREADS,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._bundles[number]
            ),
            **({"runtime_env": {"env_vars": config.launch.env}} if config.launch.env else {}),
        }
        agent = ray.remote(Agent).options(num_cpus=1, num_gpus=self.where.gpus_per_node, **options)
        peer = None
        if config.checkpoint.replicates(self.where.nodes):
            peer = ray.remote(SnapshotPeer).options(num_cpus=0, **options).remote()
        return _Slot(agent.remote(self.job, number), peer)


def _kill(slot: _Slot) -> None:
    for actor in (slot.agent, slot.peer):
        if actor is not None:
            ray.kill(actor)


def answer_of(ref: Any) -> Any | None:
    """Of an agent that was asked something: None if it has not answered, or is dead."""
    done, _ = ray.wait([ref], timeout=0)
    try:
        return ray.get(ref) if done else None
    except RayError:
        return None


@contextmanager
def fleet_of(job: Job, folder: Path) -> Iterator[Fleet]:
    """The agents of a job, one per machine, on the Ray to which this process is connected.

    Args:
        folder: of the session.

    Raises:
        UserError: the cluster is too small.
        JobFailed: others hold it.
    """
    config, machines = job.config, cluster.machines()
    where, num_slots = place(config, machines), config.launch.nodes + config.launch.spares
    labels = [config.launch.labels] * num_slots if config.launch.labels else None
    group = placement_group([where.bundle] * num_slots, strategy="STRICT_SPREAD", bundle_label_selector=labels)
    try:
        if not group.wait(_PLACEMENT_SECONDS):
            raise JobFailed(f"{num_slots} x {where.bundle} did not become free; other jobs hold the cluster")
        fleet = Fleet(group, _in_order(group, config, machines), job, where, folder)
        try:
            yield fleet
        except KeyboardInterrupt:  # of somebody who does not want to wait
            fleet.kill()
            raise
        finally:
            fleet.end()
    finally:
        remove_placement_group(group)


def _in_order(group: PlacementGroup, config: RunConfig, machines: Sequence[Machine]) -> list[int]:
    """The bundles of a group that has been placed, by `launcher.placement.in_order` of their machines."""
    found = {machine.id: machine for machine in machines}
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return in_order(config, [found.get(nodes[bundle], Machine({}, id=nodes[bundle])) for bundle in sorted(nodes)])
