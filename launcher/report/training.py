"""What a finished run looks like, drawn from its events: the loss picture and the summary."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from launcher.verbs.save_counts import SaveCounts
from trainer.config import RunConfig
from trainer.events import Event, read_events, surviving_steps
from trainer.plan import model_flops_per_token, num_parameters
from trainer.run_dir import RunDir
from trainer.schedule import Schedule


@dataclass(frozen=True)
class RunHistory:
    """The events of a run, sorted by what they say."""

    schedule: Schedule
    steps: list[Event]
    skipped: list[Event]
    """Steps that the weights have not learned from."""
    rollbacks: list[Event]
    evaluations: list[Event]
    """By step; the last one where a step was evaluated again."""
    stage_seconds: dict[str, float]
    """Including what was done before an interruption."""
    saves: SaveCounts
    export: Event | None

    @classmethod
    def read(cls, config: RunConfig, path: Path) -> "RunHistory":
        events = read_events(path)
        evaluated = {event["step"]: event for event in events if event["kind"] == "evaluated"}
        return cls(
            schedule=Schedule(config),
            steps=surviving_steps(events),
            skipped=surviving_steps(events, "step_skipped"),
            rollbacks=[event for event in events if event["kind"] == "rolled_back"],
            evaluations=sorted(evaluated.values(), key=lambda event: event["step"]),
            stage_seconds=_stage_seconds(events),
            saves=SaveCounts.of(events),
            export=_last(events, "export_verified"),
        )

    @property
    def tokens_per_second(self) -> float:
        """Of the median step, so that start-up and disturbances do not count."""
        rates = [step_tokens(self.schedule, event) / event["seconds"] for event in self.steps]
        return median(rates) if rates else 0.0  # a short run may have skipped every step

    @property
    def trained(self) -> str:
        """One line: how far, to which loss, and what was left out."""
        num_steps = self.schedule.num_steps
        done = f"{self.schedule.consumed_tokens(num_steps):,} tokens in {num_steps} steps"
        done += f"; last loss {self.steps[-1]['loss']:.4f}" if self.steps else ""
        reasons = Counter(event["reason"] for event in self.skipped)
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        skipped = f"; {len(self.skipped)} steps skipped ({counted})" if reasons else ""
        rolled_back = f"; rolled back {len(self.rollbacks)} times" if self.rollbacks else ""
        return f"{done}{skipped}{rolled_back}"


def step_tokens(schedule: Schedule, event: Event) -> int:
    """Tokens in the batch of the step that a `step` event tells of."""
    return event["tokens"] - schedule.consumed_tokens(event["step"] - 1)


def _stage_seconds(events: list[Event]) -> dict[str, float]:
    """Time spent in each stage; one that was cut off counts up to the last thing it recorded."""
    seconds: dict[str, float] = {}
    stage, started, latest = "", 0.0, 0.0
    for event in events:
        if stage and event["kind"] in ("run_started", "stage_started", "stage_finished"):
            end = event["time"] if event["kind"] == "stage_finished" else latest
            seconds[stage] = seconds.get(stage, 0.0) + end - started
            stage = ""
        if event["kind"] == "stage_started":
            stage, started = event["stage"], event["time"]
        latest = event["time"]
    return seconds


def _last(events: list[Event], kind: str) -> Event | None:
    return next((event for event in reversed(events) if event["kind"] == kind), None)


def verdict(before: Event, after: Event) -> str:
    """One line: did the model learn?"""
    gain = after["unigram_loss"] - after["loss"]
    facts = (
        f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f} (perplexity {perplexity(before['loss'])} -> "
        f"{perplexity(after['loss'])}; uniform {after['uniform_loss']:.3f}, unigram {after['unigram_loss']:.3f})"
    )
    if gain > 0 and after["loss"] < before["loss"]:
        return f"the model learned: {facts}, {gain:.2f} nats per token better than word frequencies alone"
    if after["loss"] < before["loss"]:
        return f"the model learned little: {facts}, still {-gain:.2f} nats per token worse than word frequencies alone"
    return f"the model did NOT learn: {facts}"


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 50 else "inf"


def plot_losses(history: RunHistory, path: Path) -> None:
    """Training and held-out loss over tokens, with the two baselines."""
    import matplotlib  # half a second, and only this function needs it

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot([e["tokens"] for e in history.steps], [e["loss"] for e in history.steps], lw=1, label="training")
    tokens = [history.schedule.consumed_tokens(event["step"]) for event in history.evaluations]
    axes.plot(tokens, [event["loss"] for event in history.evaluations], "o-", ms=4, label="held-out")
    for name, style in (("uniform", ":"), ("unigram", "--")):
        axes.axhline(history.evaluations[-1][f"{name}_loss"], ls=style, color="gray", lw=1, label=f"{name} baseline")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def summary(config: RunConfig, run_dir: RunDir, history: RunHistory) -> Table:
    """The table at the end of a run."""
    table = Table(title=f"run {config.name}", show_header=False, title_justify="left")
    before, after = history.evaluations[0], history.evaluations[-1]
    rate = history.tokens_per_second
    rows = {
        "model": f"{num_parameters(config.model):,} parameters, {config.model.num_layers} layers of "
        f"{config.model.hidden_size}, context {config.model.seq_length}",
        "layout": f"{config.parallel.num_ranks} ranks: {config.parallel.describe()}, {config.train.precision}",
        "trained": history.trained,
        "held-out loss": f"{before['loss']:.4f} -> {after['loss']:.4f} (uniform {after['uniform_loss']:.4f}, unigram "
        f"{after['unigram_loss']:.4f})",
        "perplexity": f"{perplexity(before['loss'])} -> {perplexity(after['loss'])} (uniform "
        f"{perplexity(after['uniform_loss'])}, unigram {perplexity(after['unigram_loss'])})",
        "speed": f"{rate:,.0f} tokens/s, {rate * model_flops_per_token(config.model) / 1e9:,.1f} model GFLOP/s",
        "saves": str(history.saves),
        "time": ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in history.stage_seconds.items()),
    }
    if history.export is not None:
        rows["export"] = f"largest logit difference {history.export['largest_difference']:.2g}"
    rows |= {
        "events": str(run_dir.events_path),
        "data": str(run_dir.data_for(config)),
        "logs": str(run_dir.logs),
        "checkpoints": str(run_dir.checkpoints),
        "loss picture": str(run_dir.loss_plot),
        "Hugging Face": str(run_dir.export),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
