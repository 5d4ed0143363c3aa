"""What tasks have found of checkpoints: tables, and curves over steps."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launcher.evaluation.intervals import Measure
from launcher.evaluation.results import EvaluationResults, TaskResult, check_comparable
from trainer.config import UserError


def results_table(results: EvaluationResults) -> Group:
    """One checkpoint: a row for each task, number of shots and metric, and below what must be known of them."""
    table = Table(title=f"tasks on {results.checkpoint}", title_justify="left")
    table.add_column("task", overflow="fold")
    for heading in ("shots", "metric", "value (95 %)", "of"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    told = []
    for result in results.tasks:
        for metric, measure in result.metrics.items():
            table.add_row(result.task, str(result.shots), metric, _with_interval(measure), str(result.num_examples))
            if found := notes(result, metric):
                told.append(f"{result.task}, {result.shots} shots, {metric}: {'; '.join(found)}")
    return Group(table, *(Text(line) for line in told))


def notes(result: TaskResult, metric: str) -> list[str]:
    """What a reader must know of a value: what was left out, and what was in the training text."""
    found = [f"chance {result.chance:.3f}"] if metric == "accuracy" and result.chance is not None else []
    found += [f"{count} skipped: {reason}" for reason, count in result.skipped.items()]
    if result.num_truncated:
        found.append(f"{result.num_truncated} prompts cut at the left")
    if result.mean_demonstrations < result.shots and result.num_examples:
        found.append(f"{result.mean_demonstrations:.1f} demonstrations fit, {result.min_demonstrations} at least")
    seen = result.contamination
    if seen is not None:
        share = "none can be found" if seen.dirty_share is None else f"{seen.dirty_share:.0%} dirty"
        found.append(
            f"{share} ({seen.ngram} words): {_shown(seen.clean[metric])} on {seen.num_clean} clean, "
            f"{_shown(seen.dirty[metric])} on {seen.num_dirty} dirty"
        )
        if seen.num_short:
            found.append(f"{seen.num_short} too short to be found")
    return found


def comparison_table(results: Sequence[EvaluationResults]) -> Table:
    """Several checkpoints beside each other, with what each gained on the first.

    Raises:
        UserError: they were asked different things.
    """
    check_comparable(results)
    table = Table(title="tasks", title_justify="left")
    table.add_column("task", no_wrap=True)
    for one in results:
        table.add_column(_name(one), justify="right")
    values = [one.scores for one in results]
    for name in dict.fromkeys(name for scores in values for name in scores):
        first = values[0].get(name)
        cells = [_compared(scores.get(name), None if scores is values[0] else first) for scores in values]
        table.add_row(name, *cells)
    return table


def plot_results(results: Sequence[EvaluationResults], path: Path) -> None:
    """Every metric over training steps, a panel for each metric, with its interval.

    Raises:
        UserError: they were asked different things, or nothing of them has a step.
    """
    check_comparable(results)
    by_step = [(one.step, one) for one in results if one.step is not None and one.scores]
    if not by_step:
        raise UserError("none of these results is of a training step, so there is no curve; compare them in a table")
    import matplotlib  # half a second, and only this function needs it

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves = _curves(sorted(by_step, key=lambda pair: pair[0]))
    figure, panels = pyplot.subplots(
        len(curves), figsize=(9, 3.5 * len(curves)), dpi=120, squeeze=False, sharex=True, layout="constrained"
    )
    for (metric, lines), axes in zip(curves.items(), panels[:, 0], strict=True):
        for label, points in lines.items():
            steps = [step for step, _ in points]
            (line,) = axes.plot(steps, [measure.value for _, measure in points], "o-", ms=3, lw=1, label=label)
            low, high = [measure.low for _, measure in points], [measure.high for _, measure in points]
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, lw=0)
        axes.set_ylabel(metric.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1, 0].set_xlabel("steps")
    figure.savefig(path)
    pyplot.close(figure)


def _curves(results: Sequence[tuple[int, EvaluationResults]]) -> dict[str, dict[str, list[tuple[int, Measure]]]]:
    """Metric -> task and shots -> (step, measure), in order of steps."""
    curves: dict[str, dict[str, list[tuple[int, Measure]]]] = {}
    for step, one in results:
        for result in one.tasks:
            for metric, measure in result.metrics.items():
                if measure is not None:
                    lines = curves.setdefault(metric, {})
                    lines.setdefault(f"{result.task}, {result.shots}-shot", []).append((step, measure))
    return curves


def _shown(measure: Measure | None) -> str:
    return "-" if measure is None else f"{measure.value:.3f}"


def _with_interval(measure: Measure | None) -> str:
    return "-" if measure is None else f"{measure.value:.3f} ({measure.low:.2f} to {measure.high:.2f})"


def _compared(value: float | None, first: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if first is None else f" ({value - first:+.3f})")


def _name(one: EvaluationResults) -> str:
    return one.checkpoint if one.step is None else f"step {one.step}"
