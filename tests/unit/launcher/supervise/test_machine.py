"""The state machine of a job that is kept alive: by example, and under every sequence of events that can be drawn."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.job.news import Down, Up
from launcher.supervise import machine
from launcher.supervise.budget import Failure, Kind, Memory
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
    react,
)
from trainer.config import SuperviseConfig

POLICY = SuperviseConfig(
    max_failures=4, max_preemptions=5, max_same_failures=3, max_node_failures=2, patience_seconds=100, grow_seconds=10
)


class Job:
    """A state machine with its clock; remembers what it was told to do."""

    def __init__(self, num_slots: int = 1, sizes: tuple[int, ...] = (1,), policy: SuperviseConfig = POLICY) -> None:
        self.plan = Plan(policy, sizes, num_slots)
        self.state, self.now = State(), 0.0

    def see(self, *events: Event) -> Command | None:
        """What the last of the events has it do; the others must have it do nothing."""
        commands = []
        for event in events:
            self.state, command = react(self.plan, self.state, event, self.now)
            commands.append(command)
        assert not any(commands[:-1])
        return commands[-1]

    def later(self, seconds: float) -> Command | None:
        self.now += seconds
        return self.see(Tick())

    def fail(self, error: str = "rank 0 raised ValueError", machine: str = "m0", step: int = 5) -> Command | None:
        return self.see(Failed(Failure("rank", error, machine, step)))


def up(*slots: int) -> list[Event]:
    return [Up(slot, f"m{slot}") for slot in slots]


def running(num_slots: int = 1, sizes: tuple[int, ...] = (1,), policy: SuperviseConfig = POLICY) -> Job:
    job = Job(num_slots, sizes, policy)
    assert job.see(*up(*range(num_slots))) == StartLife(tuple(range(sizes[0])), "the first life")
    job.see(Started(0))
    return job


# ---------------------------------------------------------------------------------------------------------- one machine


def test_a_failure_that_nobody_is_to_blame_for_leaves_no_machine_out() -> None:
    memory = Memory()
    for step in range(20):
        memory = memory.after_failure(Failure("hang", "the ranks hang", "", step))
    assert memory.machines == {} and memory.num_failures == 20


def test_a_run_without_trouble() -> None:
    job = running()
    assert job.see(Finished()) == End("") and job.state.phase == "finished"


def test_after_the_first_failure_ranks_start_again_at_once_and_then_later_and_later() -> None:
    job = running()
    assert job.fail(step=1) == StartLife((0,), "rank 0 raised ValueError")
    for step, seconds in ((2, 1.0), (3, 2.0), (4, 4.0)):
        assert job.fail(step=step) is None and job.state.phase == "restarting"
        assert job.later(seconds * 0.99) is None
        assert job.later(seconds * 0.02) == StartLife((0,), "rank 0 raised ValueError")


def test_delays_have_an_end() -> None:
    job = running(policy=replace_policy(max_failures=100, longest_delay_seconds=3.0))
    for step in range(1, 80):
        job.later(3.0)
        job.fail(step=step)
    assert job.state.not_before - job.now == 3.0


def test_the_budget_ends_a_run_that_gets_no_further() -> None:
    job = running()
    for step in range(1, 5):
        job.fail(step=step)
        job.later(60)
    end = job.fail("rank 1 was killed by SIGKILL", step=9)
    assert end == End(
        "rank 1 was killed by SIGKILL; 5 failures in a row without a newer checkpoint, and supervise.max_failures is 4"
    )
    assert job.state.phase == "failed"


def test_whoever_goes_on_from_a_later_step_has_the_whole_budget_again() -> None:
    job = running()
    for start in range(1, 40):
        job.fail(step=2 * start)
        job.later(60)
        job.see(Started(start))
    assert job.state.phase == "running" and job.state.memory.num_failures == 0


def test_the_same_error_at_the_same_step_is_not_met_a_fourth_time() -> None:
    """Addresses and ports may differ; a newer checkpoint in between does not help."""
    job = running()
    job.fail("rank 0 raised ValueError: port 4711 at 0x7f00", step=7)
    job.see(Started(6))
    job.fail("rank 0 raised ValueError: port 815 at 0x8a11", step=7)
    job.later(60)
    assert job.fail("rank 1 raised ValueError: port 1 at 0x1", step=7) == End(
        "rank 1 raised ValueError: port 1 at 0x1; the same after step 7 3 times in a row"
    )


def test_what_only_a_person_can_mend_and_no_budget_end_at_once() -> None:
    job = running()
    assert job.see(Failed(Failure("rank", "the corpus is empty", "", 0, is_final=True))) == End("the corpus is empty")
    assert job.state.phase == "failed"
    assert running(policy=replace_policy(max_failures=0)).fail() == End("rank 0 raised ValueError")


def test_a_run_that_is_asked_saves_and_is_preempted_whatever_happens_meanwhile() -> None:
    job = running()
    assert job.see(EndAsked("SIGTERM")) == AskRanks("SIGTERM") and job.state.phase == "draining"
    assert job.see(EndAsked("SIGTERM again")) is None
    ended = replace_job(job)
    assert ended.see(Stopped("stopped after step 3")) == End("stopped after step 3")
    assert ended.state.phase == "preempted"
    cut = replace_job(job)
    assert cut.fail("rank 0 was killed") == End("SIGTERM, then rank 0 was killed") and cut.state.phase == "preempted"
    done = replace_job(job)
    done.see(Finished())
    assert done.state.phase == "finished"
    waiting = running()
    waiting.fail(step=1), waiting.fail(step=2)
    assert waiting.see(EndAsked("SIGTERM")) == End("SIGTERM") and waiting.state.phase == "preempted"


def test_ranks_that_somebody_else_asked_to_stop_end_the_run() -> None:
    job = running()
    assert job.see(Stopped("the file stop")) == End("the file stop") and job.state.phase == "preempted"


def test_an_agent_that_died_is_waited_for() -> None:
    job = running()
    assert job.see(Down(0), Failed(Failure("agent", "node 0: the agent died", "m0", 5))) is None
    assert job.state.phase == "resizing"
    assert job.see(Up(0, "m0")) == StartLife((0,), "node 0: the agent died")


def test_a_job_whose_only_machine_is_drained_was_preempted() -> None:
    job = running()
    assert job.see(Leaving(0, "node m0 is to be drained", 30.0)) == AskRanks("node m0 is to be drained", 30.0)
    assert job.see(Stopped("saved at step 7")) == End(
        "saved at step 7; 0 of 1 machines are left, and no layout of this run fits on so few"
    )
    assert job.state.phase == "preempted"


# -------------------------------------------------------------------------------------------------------- many machines


def test_a_spare_takes_a_lost_machine_s_place_at_once() -> None:
    job = running(4, (3, 2, 1))
    assert job.see(Down(1), Failed(Failure("machine", "node 1 does not answer", "m1", 5))) == StartLife(
        (0, 3, 2), "node 1 does not answer"
    )
    assert job.state.memory.num_failures == 0


def test_without_one_the_run_waits_and_then_shrinks_and_grows_again() -> None:
    job = running(4, (4, 2, 1))
    assert job.see(Down(2), Failed(Failure("machine", "gone", "m2", 5))) is None and job.state.phase == "resizing"
    assert job.later(99) is None
    assert job.later(1) == StartLife((0, 1), "gone")
    assert job.later(1000) is None
    assert job.see(Up(2, "m9")) is None
    assert job.later(9) is None
    assert job.later(1) == AskRanks("there are machines for more than 2 nodes again") and job.state.phase == "saving"
    assert job.see(Stopped("saved")) == StartLife((0, 1, 2, 3), "saved")


def test_a_machine_that_comes_back_in_time_is_not_waited_for_longer() -> None:
    job = running(2, (2, 1))
    job.see(Down(0), Failed(Failure("machine", "gone", "m0", 5)))
    job.later(50)
    assert job.see(Up(0, "m0")) == StartLife((0, 1), "gone")


def test_one_that_flaps_does_not_make_the_run_grow_again_and_again() -> None:
    job = running(2, (2, 1))
    waits = []
    for _ in range(4):
        job.see(Down(1), Failed(Failure("machine", "gone", "m1", 5)))
        job.later(100)
        assert job.state.life == (0,)
        job.see(Up(1, "m1"))
        before = job.now
        while job.state.phase != "saving":
            job.later(1)
        waits.append(job.now - before)
        job.see(Stopped("saved"))
    assert waits == [10, 20, 40, 80]


def test_machines_that_leave_for_good_are_not_waited_for() -> None:
    job = running(3, (3, 2, 1))
    assert job.see(Leaving(1, "node m1 is to be drained")) == AskRanks("node m1 is to be drained")
    assert job.see(Stopped("saved")) == StartLife((0, 2), "saved")


def test_a_machine_that_fails_again_and_again_is_left_out_where_others_suffice() -> None:
    job = running(3, (2, 1))
    job.fail(machine="m1", step=1)
    assert job.state.life == (0, 1)
    job.fail(machine="m1", step=2)
    assert job.later(60) == StartLife((0, 2), "rank 0 raised ValueError") and job.state.excluded == {"m1"}
    alone = running()
    alone.fail(machine="m0", step=1), alone.fail(machine="m0", step=2)
    assert alone.later(60) == StartLife((0,), "rank 0 raised ValueError") and not alone.state.excluded


def test_the_first_life_waits_a_moment_for_all_agents() -> None:
    """Slots are in the order of the machines: those that come first are not those that lie best."""
    job = Job(3, (2, 1))
    assert job.see(*up(2, 1)) is None and job.later(29) is None and job.state.phase == "starting"
    assert replace_job(job).see(*up(0)) == StartLife((0, 1), "the first life")
    assert job.later(2) == StartLife((1, 2), "the first life")


def test_a_small_patience_is_none_for_agents_that_are_just_coming_up() -> None:
    job = Job(2, (2, 1), replace_policy(patience_seconds=1.0))
    assert job.see(Tick()) is None and job.later(299) is None
    nobody, one = replace_job(job), replace_job(job)
    assert nobody.later(2) == End("0 of 2 machines are left, and no layout of this run fits on so few")
    one.see(*up(1))
    assert one.later(2) == StartLife((1,), "the first life")


def test_a_life_needs_a_layout() -> None:
    job = running(4, (4, 3))
    assert job.see(Down(0), Down(1), Failed(Failure("machine", "gone", "m0", 5))) is None
    assert job.later(100) == End("gone; 2 of 4 machines are left, and no layout of this run fits on so few")
    assert job.state.phase == "failed"


def test_lost_machines_have_a_budget_of_their_own() -> None:
    job = running(3, (2, 1))
    for _ in range(5):
        assert isinstance(job.see(Failed(Failure("machine", "gone", "m1", 5))), StartLife)
    end = job.see(Failed(Failure("machine", "gone", "m1", 5)))
    assert isinstance(end, End) and "6 machines were lost in a row" in end.reason and job.state.phase == "failed"


# ------------------------------------------------------------------------------------------------------- every sequence


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_sequence_of_events_loses_or_doubles_a_job(data: st.DataObject) -> None:
    """The world may do what it can: it tells of the end of a life only while there is one."""
    nodes = data.draw(st.integers(1, 4), "nodes")
    num_slots = nodes + data.draw(st.integers(0, 2), "spares")
    smaller = data.draw(st.sets(st.integers(1, nodes - 1)) if nodes > 1 else st.just(set[int]()), "sizes")
    job = Job(num_slots, (nodes, *sorted(smaller, reverse=True)))
    agents: dict[int, bool] = dict.fromkeys(range(num_slots), False)  # slot -> whether it is up, as the world knows
    lives = num_starts = 0
    is_asked = has_finished = False
    for _ in range(data.draw(st.integers(1, 40), "length")):
        event = data.draw(_events(job, agents, bool(lives), num_slots), "event")
        job.now += data.draw(st.sampled_from((0.0, 0.1, 5.0, 200.0)), "seconds")
        before = job.state
        job.state, command = react(job.plan, job.state, event, job.now)
        if isinstance(event, Up | Down):
            agents[event.slot] = isinstance(event, Up)
        if isinstance(event, Finished | Stopped | Failed):
            lives -= 1
            is_asked, has_finished = False, has_finished or isinstance(event, Finished)
        if before.phase in machine.ENDED:
            assert (job.state, command) == (before, None)
        if isinstance(command, StartLife):
            lives, num_starts = lives + 1, num_starts + 1
            assert len(set(command.slots)) == len(command.slots) and len(command.slots) in job.plan.sizes
            for slot in command.slots:
                assert agents[slot] and job.state.machines[slot] not in job.state.excluded
                assert slot not in job.state.leaving
        if isinstance(command, AskRanks):
            assert lives == 1
            is_asked = job.state.phase == "draining" or not is_asked
            assert is_asked
        assert lives in (0, 1) and (lives == 1) == (job.state.phase in machine.LIVING)
        assert (job.state.phase == "finished") == has_finished
        assert isinstance(command, End) == (job.state.phase in machine.ENDED and before.phase not in machine.ENDED)


def _events(job: Job, agents: dict[int, bool], is_living: bool, num_slots: int) -> st.SearchStrategy[Event]:
    slots = st.integers(0, num_slots - 1)
    machines = st.sampled_from(("m0", "m1", "m2", "m3"))
    possible: list[st.SearchStrategy[Event]] = [
        st.just(Tick()),
        st.builds(lambda slot, name: Down(slot) if agents[slot] else Up(slot, name), slots, machines),
        st.builds(lambda slot: Leaving(slot, "it is to be drained"), slots),
    ]
    if is_living and job.state.phase not in machine.ENDED:
        kinds = st.sampled_from(("rank", "agent", "machine", "hang"))
        failures = st.builds(Failure, kinds, st.sampled_from("ab"), machines, st.integers(0, 3), st.just(value=False))
        possible += [
            st.builds(Failed, failures),
            st.builds(Failed, failures),
            st.builds(Started, st.integers(0, 3)),
            st.just(Stopped("asked")),
            st.just(Finished()),
        ]
    possible.append(st.just(EndAsked("SIGTERM")))
    return st.one_of(possible)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_run_that_gets_no_further_comes_to_an_end(seed: int, nodes: int) -> None:
    """However it fails: every life begins from step 0, and machines come and go as they like."""
    draw = random.Random(seed)
    job = Job(nodes + 1, tuple(range(nodes, 0, -1)))
    num_starts = 0
    for _ in range(400):
        events: list[Event] = []
        if job.state.phase in machine.LIVING:
            kind: Kind = draw.choice(("rank", "agent", "machine"))
            slot = draw.choice(job.state.life)
            failure = Failure(kind, draw.choice("abc"), job.state.machines[slot], draw.randrange(10))
            is_saved = job.state.phase == "saving" and draw.random() < 0.5
            events = [Started(0), *([Down(slot)] if kind != "rank" else [])]
            events.append(Stopped("it was asked") if is_saved else Failed(failure))
        elif draw.random() < 0.5:
            events = [Up(slot, f"m{slot}") for slot in range(nodes + 1) if slot not in job.state.up]
        job.now += draw.choice((1.0, 50.0, 500.0))
        for event in [*events, Tick()]:
            job.state, command = react(job.plan, job.state, event, job.now)
            num_starts += isinstance(command, StartLife)
    assert job.state.phase == "failed"
    assert num_starts <= 1 + POLICY.max_failures + POLICY.max_preemptions + job.state.memory.num_grown


# -------------------------------------------------------------------------------------------------------------- helpers


def replace_policy(**changes: object) -> SuperviseConfig:
    return SuperviseConfig(**{**POLICY.model_dump(), **changes})


def replace_job(job: Job) -> Job:
    copy = Job(job.plan.num_slots, job.plan.sizes, job.plan.policy)
    copy.state, copy.now = replace(job.state), job.now
    return copy


@pytest.mark.parametrize("phase", sorted(machine.ENDED))
def test_the_end_is_the_end(phase: machine.Phase) -> None:
    job = Job()
    job.state = State(phase=phase)
    for event in (Up(0, "m0"), Tick(), EndAsked("x"), Finished(), Stopped("x"), Started(3)):
        assert job.see(event) is None and job.state.phase == phase
