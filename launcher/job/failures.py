"""How ranks and machines fail, as one line for a person."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.node.agent import NodeEnd
from launcher.node.forked_rank import RankEnd
from trainer.config import UserError


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


def explain(ends: Mapping[int, NodeEnd], logs: Path) -> UserError | RankFailed | NodeFailed:
    """The failure that explains how a round ended on its machines, of which one at least went wrong."""
    for node, end in ends.items():
        if end.problem:
            return NodeFailed(node, end.problem, logs / f"node-{node}.log")
    first = first_failure([rank for end in ends.values() for rank in end.failed])
    if first.user_error is not None:
        return UserError(first.user_error)
    return RankFailed(first.rank, str(first.error), logs / f"rank-{first.rank}.log")


def first_failure(failed: Sequence[RankEnd]) -> RankEnd:
    """The failure that explains the others.

    A rank that dies of a signal says nothing, while its peers raise errors about lost connections, maybe before its
    death is seen. Otherwise the first to raise is the cause.
    """
    return min(failed, key=lambda end: (not end.by_signal, end.time))
