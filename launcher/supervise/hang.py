"""What holds a run up that has fallen silent, as far as the state of its ranks tells.

In synchronous training one rank that does not come holds all others up, and they wait for it in a collective: the odd
one out is the suspect. Where all wait it is not a rank but what lies between them.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from launcher.node.stacks import RankReport
from trainer.heartbeat import Phase

_DOING: Mapping[Phase, str] = {
    "starting": "starting",
    "loading data": "in data loading",
    "computing": "computing",
    "reducing gradients": "reducing gradients",
    "updating": "updating the weights",
    "agreeing": "agreeing on the step",
    "evaluating": "evaluating",
    "saving": "saving",
    "restoring": "restoring",
    "ending": "ending",
}
"""To follow "is"."""


@dataclass(frozen=True)
class Verdict:
    line: str
    """For a person."""
    suspects: tuple[int, ...] = ()
    """The ranks that hold the others up; none where that is not clear."""


def silence_limit(median_step_seconds: float | None, factor: float, least_seconds: float) -> float:
    """For how many seconds a rank in the middle of a step may say nothing before the run counts as hung.

    Args:
        median_step_seconds: of the steps so far; None before the first.
    """
    return least_seconds if median_step_seconds is None else max(least_seconds, factor * median_step_seconds)


def verdict(reports: Sequence[RankReport], node_names: Mapping[int, str], now: float | None = None) -> Verdict:
    """What holds these ranks up.

    Args:
        node_names: the name of each rank's node, by rank.
        now: Unix seconds; a time on another day is told with its date.
    """
    now = time.time() if now is None else now
    known = sorted((report for report in reports if report.beat is not None), key=lambda report: report.rank)
    if not known:
        return Verdict("no rank has given a sign of life")
    silent = tuple(sorted(report.rank for report in reports if report.beat is None))
    odd = _odd_ones(known)
    suspects = (*(report.rank for report in odd), *silent)
    others = [report for report in known if report not in odd]
    says = _Sentence(node_names, len(reports), len({_step(report) for report in known}) > 1, now)
    if not suspects:
        return Verdict(says.of_all(others))
    return Verdict(says.of_some(odd, silent, others), tuple(sorted(suspects)))


def transcript(found: Verdict, reports: Sequence[RankReport]) -> str:
    """The verdict and what every rank told, for whoever looks closer."""
    parts = [found.line]
    for report in sorted(reports, key=lambda report: report.rank):
        beat = report.beat
        doing = f"after step {beat.step}, {_DOING[beat.phase]}" if beat else "silent"
        parts.append(f"rank {report.rank}: {doing}, process {report.process}; {report.problem or 'innermost first:'}")
        parts += [f"  {frame.file}:{frame.line} {frame.function}" for frame in report.stack or ()]
    return "\n".join(parts) + "\n"


def _odd_ones(reports: Sequence[RankReport]) -> list[RankReport]:
    """Those that keep the others waiting; none where that cannot be told."""
    waiting = [report for report in reports if report.collective and not _cannot_go_on(report)]
    if waiting and len(waiting) < len(reports):
        return [report for report in reports if report not in waiting]
    unable = [report for report in reports if _cannot_go_on(report)]
    if unable:
        return unable
    return _minority(reports, {report.rank: _step(report) for report in reports}) or (
        [] if waiting else _minority(reports, {report.rank: _phase(report) for report in reports})
    )


def _minority(reports: Sequence[RankReport], keys: Mapping[int, object]) -> list[RankReport]:
    """The ranks that differ from what more than half of them have in common."""
    (common, count), *_ = Counter(keys.values()).most_common(1)
    return [report for report in reports if keys[report.rank] != common] if 2 * count > len(reports) else []


def _cannot_go_on(report: RankReport) -> bool:
    return report.process != "running" or report.stack is None


def _step(report: RankReport) -> int:
    assert report.beat is not None
    return report.beat.step


def _phase(report: RankReport) -> Phase:
    assert report.beat is not None
    return report.beat.phase


class _Sentence:
    """How what the ranks do is put into words."""

    def __init__(self, node_names: Mapping[int, str], num_ranks: int, steps_differ: bool, now: float) -> None:
        self._node_names, self._num_ranks, self._steps_differ, self._now = node_names, num_ranks, steps_differ, now

    def of_all(self, reports: Sequence[RankReport]) -> str:
        """Where no rank is to blame."""
        deeds = self._by_deed(reports)
        if len(deeds) == 1:
            (deed,) = deeds
            count = f"all {self._num_ranks} ranks" if self._num_ranks > 1 else "the only rank"
            return f"{count} {_inflect(deed, self._num_ranks)} since {self._since(reports)}"
        parts = [f"{self._named(ranks)} {_inflect(deed, len(ranks))}" for deed, ranks in deeds.items()]
        return f"{'; '.join(parts)}; since {self._since(reports)}"

    def of_some(self, odd: Sequence[RankReport], silent: Sequence[int], others: Sequence[RankReport]) -> str:
        parts = [f"{self._named(ranks)} {_inflect(deed, len(ranks))}" for deed, ranks in self._by_deed(odd).items()]
        if silent:
            parts.append(f"{self._named(silent)} {'has' if len(silent) == 1 else 'have'} given no sign of life")
        if others:
            deeds = self._by_deed(others)
            number = len(others)
            (deed,) = deeds if len(deeds) == 1 else (_summary(deeds),)
            rest = f"the other {number}" if number > 1 else "the other"
            parts.append(f"{rest} {_inflect(deed, number)} since {self._since(others)}")
        return "; ".join(parts)

    def _by_deed(self, reports: Sequence[RankReport]) -> dict[str, list[int]]:
        """Ranks by what they do; where they are at different steps, by that too."""
        deeds: dict[str, list[int]] = defaultdict(list)
        for report in reports:
            after = f" after step {_step(report)}" if self._steps_differ else ""
            deeds[f"{_deed(report)}{after}"].append(report.rank)
        return deeds

    def _named(self, ranks: Collection[int]) -> str:
        """ "rank 5 on node b", "ranks 2 and 3 on node a and 5 on node b"."""
        by_node: dict[str | None, list[int]] = defaultdict(list)
        for rank in ranks:
            by_node[self._node_names.get(rank)].append(rank)
        parts = [_numbers(each) + (f" on node {node}" if node is not None else "") for node, each in by_node.items()]
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {_enumeration(parts)}"

    def _since(self, reports: Sequence[RankReport]) -> str:
        """When the last of them began what it is in, local time: from then on nothing has moved."""
        began = max(report.beat.began for report in reports if report.beat is not None)
        then, today = time.localtime(began), time.localtime(self._now)
        return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M:%S", then)


def _deed(report: RankReport) -> str:
    """What the rank does, to follow several ranks; see `_inflect`."""
    if report.process == "stopped":
        return "are stopped (SIGSTOP)"
    if report.process in ("gone", "zombie"):
        return "are dead"
    if report.collective:
        return f"wait in {report.collective}"
    doing = f"are {_DOING[_phase(report)]}"
    return doing if report.stack is not None else f"{doing} and {_plural(report.problem or 'has no stack')}"


def _summary(deeds: Mapping[str, Sequence[int]]) -> str:
    """Of several deeds, the most frequent first."""
    (first, ranks), *rest = sorted(deeds.items(), key=lambda item: -len(item[1]))
    verb = f"{first.split(' ')[0]} in " if all(deed.startswith("wait in ") for deed in deeds) else ""
    return _enumeration([f"{first} ({len(ranks)})", *(f"{deed.removeprefix(verb)} ({len(r)})" for deed, r in rest)])


_SINGULAR = {"are": "is", "wait": "waits", "do": "does", "have": "has"}
_PLURAL = {one: many for many, one in _SINGULAR.items()}


def _inflect(deed: str, number: int) -> str:
    """The deed of so many ranks."""
    return " ".join(_SINGULAR.get(word, word) for word in deed.split(" ")) if number == 1 else deed


def _plural(problem: str) -> str:
    return " ".join(_PLURAL.get(word, word) for word in problem.split(" "))


def _numbers(ranks: Sequence[int]) -> str:
    """ "5", "2 and 5", "0, 2 and 5", "4-11": runs of three and more are ranges."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [part for run in runs for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return _enumeration(parts)


def _enumeration(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
