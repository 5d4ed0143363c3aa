"""Has ranks train until the last step, life after life: lets happen what `launcher.supervise.machine` decides."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from ray.exceptions import RayError

from launcher.job.failures import JobFailed, NodeFailed, RankFailed, explain
from launcher.job.fleet import Fleet, Life, answer_of
from launcher.job.news import Down
from launcher.job.preemption import Preemption, late, stopped
from launcher.node.agent import NodeEnd
from launcher.sizing import sizes
from launcher.supervise import hang, machine, rank_times
from launcher.supervise.budget import Failure
from launcher.supervise.foresight import Foresight
from launcher.supervise.looks import Looks
from launcher.supervise.machine import (
    AskRanks,
    Command,
    End,
    EndAsked,
    Event,
    Failed,
    Finished,
    Leaving,
    Plan,
    Started,
    StartLife,
    State,
    Stopped,
    Tick,
)
from launcher.supervise.watch import Watch
from trainer.config import UserError
from trainer.events import EventLog, EventReader, read_events
from trainer.heartbeat import Beat
from trainer.run_dir import RunDir
from trainer.stop import Interrupted, Preempted

_POLL_SECONDS = 0.05


class Supervisor:
    """Of one command; after an end, another may begin."""

    def __init__(
        self, fleet: Fleet, run_dir: RunDir, preemption: Preemption, log: EventLog, on_poll: Callable[[], None]
    ) -> None:
        """`on_poll` is called about twenty times a second."""
        self._fleet, self._run_dir, self._preemption, self._log, self._on_poll = (
            fleet,
            run_dir,
            preemption,
            log,
            on_poll,
        )
        config = fleet.job.config
        self._configs = sizes(config)
        self._plan = Plan(config.supervise, tuple(self._configs), len(fleet))
        self._state = State()
        self._life: Life | None = None
        self._unbegun: RayError | None = None
        """Why the life that was just to be started was not."""
        self._num_lives = 0
        self._step = 0
        self._was_asked = False
        self._watch = Watch(config.supervise, time.monotonic())
        self._looks: Looks | None = None
        """At the ranks of the life."""
        self._told: tuple[float, Mapping[int, Beat]] = (0.0, {})
        """When it was last recorded how long ranks work, and what they had said then."""
        self._cause: Exception | None = None
        """What ended the last life that failed."""
        self._foresight = Foresight(log.write, read_events(run_dir.events_path), on_gpus=fleet.where.gpus_per_node > 0)
        self._events = EventReader(run_dir.events_path)
        self._events.skip_to_end()

    def train(self) -> None:
        """Return when the last step is done.

        Raises:
            Preempted: the run was asked to end, or lost its machines in order, and another job may go on with it.
            UserError: a person must mend something.
            JobFailed: it is not worth another try, or the tries are used up.
        """
        with self._preemption.of_training():
            try:
                for agent in self._fleet.present():  # from a task before
                    self._take(agent)
                while self._state.phase not in machine.ENDED:
                    for event in self._look():
                        self._take(event)
            finally:
                if self._life is not None:
                    self._life.kill()
        self._on_poll()
        self._conclude()

    def _take(self, event: Event) -> None:
        before = self._state.excluded
        self._state, command = machine.react(self._plan, self._state, event, time.monotonic())
        for name in self._state.excluded - before:
            self._log.write("machine_excluded", machine=name, failures=self._state.memory.machines[name])
        if command is not None:
            self._do(command)

    def _do(self, command: Command) -> None:
        match command:
            case StartLife(slots, why):
                self._start(slots, why)
            case AskRanks(reason, seconds):
                self._preemption.ask_ranks(reason, seconds)
            case End():
                pass  # the loop sees it

    def _start(self, slots: tuple[int, ...], why: str) -> None:
        config = self._configs[len(slots)]
        self._preemption.forget()
        self._num_lives += 1
        self._log.write("life_started", number=self._num_lives, nodes=len(slots), data=config.parallel.data, why=why)
        try:
            self._life = self._fleet.begin("train", slots, config)
        except RayError as error:  # a machine is lost at this very moment
            self._unbegun = error
        self._watch = Watch(config.supervise, time.monotonic())
        self._looks = Looks(self._life.ask_for_beats, answer_of) if self._life is not None else None

    # ----------------------------------------------------------------------------------------------- what has happened

    def _look(self) -> Iterator[Event]:
        self._on_poll()
        if self._unbegun is not None:
            yield from self._not_begun(self._unbegun)
        ends = None
        if self._life is not None:
            ends = self._life.poll(_POLL_SECONDS)
        else:
            time.sleep(_POLL_SECONDS)
        yield from self._recorded()
        if ends is not None:
            yield from self._ended(ends)
        yield from self._fleet.news()
        yield from self._notices()
        if self._preemption.is_late() and self._life is not None:
            yield from self._too_late(self._life)
        if self._life is not None:
            self._check_plan(self._life)
            yield from self._watched(self._life)
        yield Tick()

    def _not_begun(self, error: RayError) -> Iterator[Event]:
        self._unbegun = None
        slots = self._state.life
        silent = self._fleet.silent(slots)
        machines = {slot: self._state.machines.get(slot, "") for slot in slots}
        yield from self._fleet.replace(silent)
        reason = f"the ranks could not be started: {' '.join(str(error).split())}"
        self._cause = JobFailed(reason)
        yield self._recorded_failure(
            Failure("machine" if silent else "agent", reason, machines[silent[0]] if silent else "", self._step)
        )

    def _recorded(self) -> Iterator[Event]:
        for event in self._events.new_events():
            if event["kind"] == "training_started":
                self._step = event["step"]
                self._foresight.began(self._configs[len(self._state.life)], event.get("device") or "")
                yield Started(event["step"])
            elif event["kind"] in ("step", "step_skipped"):
                self._step = event["step"]
                if event["kind"] == "step":
                    self._foresight.step_done(event)
                    self._watch.step_took(event["seconds"], time.monotonic())

    def _notices(self) -> Iterator[Event]:
        self._preemption.look_for_file()
        if self._preemption.reason is not None and not self._was_asked:
            self._was_asked = True
            yield EndAsked(self._preemption.reason)
        for name, seconds in self._preemption.leaving_nodes().items():
            for slot in range(len(self._fleet)):
                if self._fleet.machine_of(slot) == name and slot not in self._state.leaving:
                    yield Leaving(slot, f"node {name[:8]} is to be drained", seconds)

    def _too_late(self, life: Life) -> Iterator[Event]:
        """Kill ranks that were asked to save and end, and did not."""
        life.kill()
        self._life = None
        self._preemption.forget()
        grace_seconds = self._fleet.job.config.checkpoint.grace_seconds
        text = late(read_events(self._run_dir.events_path), self._run_dir.checkpoints, grace_seconds)
        if self._state.phase == "draining":
            yield Stopped(f"{self._state.why}: {text}")
        else:
            yield Failed(Failure("machine", f"{self._state.why}: {text}", "", self._step))

    def _check_plan(self, life: Life) -> None:
        if self._foresight.is_due:
            self._foresight.saw(life.beats())
            self._foresight.check()

    # ---------------------------------------------------------------------------------------------------- signs of life

    def _watched(self, life: Life) -> Iterator[Event]:
        """Look at what ranks said last, now and then; kill those that will say nothing more."""
        now = time.monotonic()
        assert self._looks is not None
        if (beats := self._looks.look(now)) is None:
            return
        self._tell_times(beats, now)
        self._foresight.saw(beats)
        for slow in self._watch.saw(beats, now):
            node = self._node_of(slow.rank)
            self._log.write("straggler", rank=slow.rank, node=node, phase=slow.phase, ratio=round(slow.ratio, 3))
        if self._watch.is_hung(now):
            yield from self._hung(life)

    def _tell_times(self, beats: Mapping[int, Beat], now: float) -> None:
        """Record how long each rank works in a step, now and then."""
        when, before = self._told
        if now - when < self._fleet.job.config.monitoring.ranks_every_seconds:
            return
        if (times := rank_times.between(before, beats)) is not None:
            self._log.write("ranks", step=self._step, **times.fields())
        self._told = now, beats

    def _hung(self, life: Life) -> Iterator[Event]:
        reports = life.reports()
        names = {report.rank: str(self._node_of(report.rank)) for report in reports}
        found = hang.verdict(reports, names)
        stacks = self._run_dir.logs / f"hang-after-step-{self._step}.txt"
        with suppress(OSError):  # of a disk that takes nothing, which may be why they hang
            stacks.write_text(hang.transcript(found, reports), encoding="utf-8")
        self._log.write("hung", verdict=found.line, suspects=found.suspects, stacks=str(stacks))
        life.kill()
        self._life = None
        self._preemption.forget()
        is_clear = 2 * len(found.suspects) <= len(reports)  # else it is what they have in common, such as a dead disk
        node = self._node_of(found.suspects[0]) if found.suspects and is_clear else None
        blamed = self._state.machines[self._state.life[node]] if node is not None else ""
        self._cause = JobFailed(f"the ranks hang: {found.line}; see {stacks}")
        yield self._recorded_failure(Failure("hang", str(self._cause), blamed, self._step, log=str(stacks)))

    def _node_of(self, rank: int) -> int:
        """Its machine's number in the life."""
        return rank // self._fleet.where.ranks_per_node

    def _ended(self, ends: Mapping[int, NodeEnd]) -> Iterator[Event]:
        self._life = None
        self._preemption.forget()
        if any(end.went_wrong for end in ends.values()):
            yield from self._failed(ends)
            return
        self._foresight.check()
        events = read_events(self._run_dir.events_path)
        last = next(event for event in reversed(events) if event["kind"] in ("training_started", "preempted"))
        if last["kind"] == "training_started":
            yield Finished()
            return
        reason = self._state.why if self._state.phase == "draining" else last["reason"]
        yield Stopped(f"{reason}: {stopped(last, self._run_dir.checkpoints)}")

    # -------------------------------------------------------------------------------------------------------- failures

    def _failed(self, ends: Mapping[int, NodeEnd]) -> Iterator[Event]:
        """Agents that are gone are replaced, and so are those whose fork server is; then it is said what happened."""
        slots = self._state.life
        down: set[int] = set()
        for news in self._fleet.news():
            yield news
            down |= {news.slot} if isinstance(news, Down) else set()
        broken = {slots[node] for node, end in ends.items() if end.problem} - down
        machines = {slot: self._state.machines.get(slot, "") for slot in slots}
        silent = self._fleet.silent(set(slots) - down - broken) if len(slots) > 1 else []
        yield from self._fleet.replace([*broken, *silent])
        self._cause = explain(ends, self._fleet.job.logs)
        failure = self._failure(self._cause, slots, machines)
        if silent:
            node = slots.index(silent[0])
            error = f"node {node} does not answer any more"
            failure = Failure("machine", error, machines[silent[0]], self._step)
        yield self._recorded_failure(failure)

    def _recorded_failure(self, failure: Failure) -> Failed:
        self._log.write(
            "life_failed",
            what=failure.kind,
            error=failure.error,
            machine=failure.machine,
            step=failure.step,
            log=failure.log,
        )
        return Failed(failure)

    def _failure(self, error: Exception, slots: tuple[int, ...], machines: Mapping[int, str]) -> Failure:
        match error:
            case RankFailed():
                machine, log = machines[slots[self._node_of(error.rank)]], str(error.log_path)
                return Failure("rank", str(error), machine, self._step, log=log)
            case NodeFailed():
                log = str(error.log_path)
                return Failure("agent", str(error), machines[slots[error.node]], self._step, log=log)
        return Failure("rank", str(error), "", self._step, is_final=True)

    # --------------------------------------------------------------------------------------------------------- the end

    def _conclude(self) -> None:
        reason = self._preemption.reason
        preempted = Interrupted if self._preemption.is_interrupted else Preempted
        match self._state.phase:
            case "finished" if reason is not None:
                raise preempted(f"{reason}: training had come to its end; the same command goes on from there")
            case "preempted":
                raise preempted(self._state.why) from self._cause
            case "failed":
                if isinstance(self._cause, UserError):
                    raise self._cause
                raise JobFailed(self._state.why) from self._cause
