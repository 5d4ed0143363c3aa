"""Watching a run on a cluster until it has ended, and showing what it says.

The state is asked for again and again, rather than watched over one long answer: runs last for weeks, and a laptop that
sleeps loses every connection.
"""

import threading
from collections.abc import Iterator

from launcher.submit.kubernetes.cluster import Cluster, Unreachable
from launcher.submit.kubernetes.pace import Pace, Say
from launcher.submit.kubernetes.state import JobState
from trainer.config import UserError
from trainer.stop import Preempted

_SILENCE_SECONDS = 600.0
"""For which a cluster may not answer before it is given up on; the run there goes on."""


class RunFailed(RuntimeError):
    """The run has ended on the cluster without reaching its goal."""


def follow(cluster: Cluster, begun: JobState, say: Say, pace: Pace) -> None:
    """Say every change of a RayJob's state, and the driver's log where pods can be looked at, until it has ended.

    Args:
        begun: as it was just applied; another of the same name is not the same run's.

    Raises:
        Preempted: it was stopped or deleted; submitting the run again goes on.
        RunFailed: it has failed.
        Unreachable: the cluster has not answered for ten minutes.
    """
    log = _Log(cluster, begun.name, say, pace)
    last = begun
    for state in states(cluster, begun, pace):
        log.look()
        if state.describe() != last.describe():
            say(f"{state.name}: {state.describe()}")
        last = state
        if state.is_over:
            break
    log.finish()
    if last.has_succeeded:
        return
    if last.was_stopped or not last.is_over:
        how = "was stopped" if last.was_stopped else "was deleted"
        raise Preempted(f"the run {begun.run_name} {how} on the cluster; submitting it again goes on")
    raise RunFailed(f"{last.name} is {last.describe()}; submitting it again goes on from its newest checkpoint")


def states(cluster: Cluster, begun: JobState, pace: Pace) -> Iterator[JobState]:
    """The state of a RayJob, asked for again and again; ends when it is gone.

    Raises:
        Unreachable: the cluster has not answered for too long.
    """
    answered = pace.clock()
    while True:
        try:
            state = cluster.find(begun.name)
        except Unreachable as error:
            if pace.clock() - answered > _SILENCE_SECONDS:
                raise Unreachable(f"{error}; the run goes on there, whether it is followed or not") from error
        else:
            answered = pace.clock()
            if state is None or state.uid != begun.uid:
                return
            yield state
        pace.sleep(pace.seconds)


class _Log:
    """The driver's log, said line by line by a thread, pod after pod: each retry of the RayJob has a pod of its own."""

    _LAST_LINES_SECONDS = 10.0  # for what is on its way when the run has ended

    def __init__(self, cluster: Cluster, name: str, say: Say, pace: Pace) -> None:
        self._cluster, self._name, self._say, self._pace = cluster, name, say, pace
        self._seen: set[str] = set()
        self._reader: threading.Thread | None = None
        self._is_there = True

    def look(self) -> None:
        """Begin with the next pod, if there is one."""
        if not self._is_there or (self._reader and self._reader.is_alive()):
            return
        try:
            new = [pod for pod in self._cluster.submitter_pods(self._name) if pod not in self._seen]
        except Unreachable:
            return
        except UserError as error:
            self._is_there = False
            self._say(f"no log to show, only the state: {error}")
            return
        if new:
            self._reader = threading.Thread(target=self._read, args=(new[0],), daemon=True)
            self._reader.start()

    def finish(self) -> None:
        self.look()
        if self._reader:
            self._reader.join(self._LAST_LINES_SECONDS)

    def _read(self, pod: str) -> None:
        """To its end. A log that breaks off is gone on with, where a line may be said twice rather than lost."""
        last: float | None = None
        while True:
            try:
                for line in self._cluster.log(pod, None if last is None else int(self._pace.clock() - last) + 1):
                    last = self._pace.clock()
                    self._seen.add(pod)
                    self._say(line)
                return
            except UserError:  # the pod is gone
                return
            except Unreachable:
                if last is None:
                    return  # it has not started: there will be another look
                self._pace.sleep(self._pace.seconds)
