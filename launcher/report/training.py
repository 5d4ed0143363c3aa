"""What a finished run looks like: the loss picture and the summary."""

import math
from collections import Counter
from pathlib import Path

from rich.table import Table

from launcher.history import foresight as planned_and_measured
from launcher.history.history import RunHistory
from launcher.report import foresight
from trainer.config import RunConfig
from trainer.events import Event
from trainer.plan import model_flops_per_token, num_parameters
from trainer.run_dir import RunDir
from trainer.schedule import Schedule


def trained(config: RunConfig, history: RunHistory) -> str:
    """One line: how far, to which loss, and what was left out."""
    schedule = Schedule(config)
    done = f"{schedule.consumed_tokens(schedule.num_steps):,} tokens in {schedule.num_steps} steps"
    done += f"; last loss {history.loss:.4f}" if history.loss is not None else ""
    reasons = Counter(event["reason"] for event in history.skipped.values())
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    skipped = f"; {len(history.skipped)} steps skipped ({counted})" if reasons else ""
    rolled_back = f"; rolled back {len(history.rollbacks)} times" if history.rollbacks else ""
    return f"{done}{skipped}{rolled_back}"


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


def plot_losses(config: RunConfig, history: RunHistory, path: Path) -> None:
    """Training and held-out loss over tokens, with the two baselines."""
    import matplotlib  # half a second, and only this function needs it

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(history.steps["tokens"], history.steps["loss"], lw=1, label="training")
    schedule, evaluated = Schedule(config), history.evaluated
    tokens = [schedule.consumed_tokens(event["step"]) for event in evaluated]
    axes.plot(tokens, [event["loss"] for event in evaluated], "o-", ms=4, label="held-out")
    for name, style in (("uniform", ":"), ("unigram", "--")):
        axes.axhline(evaluated[-1][f"{name}_loss"], ls=style, color="gray", lw=1, label=f"{name} baseline")
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
    before, after = history.evaluated[0], history.evaluated[-1]
    rate = history.tokens_per_second(config.model.seq_length)
    rows = {
        "model": f"{num_parameters(config.model):,} parameters, {config.model.num_layers} layers of "
        f"{config.model.hidden_size}, context {config.model.seq_length}",
        "layout": f"{config.parallel.num_ranks} ranks: {config.parallel.describe()}, {config.train.precision}",
        "trained": trained(config, history),
        "held-out loss": f"{before['loss']:.4f} -> {after['loss']:.4f} (uniform {after['uniform_loss']:.4f}, unigram "
        f"{after['unigram_loss']:.4f})",
        "perplexity": f"{perplexity(before['loss'])} -> {perplexity(after['loss'])} (uniform "
        f"{perplexity(after['uniform_loss'])}, unigram {perplexity(after['unigram_loss'])})",
        **_heldout_rows(before, after),
        "speed": f"{rate:,.0f} tokens/s, {rate * model_flops_per_token(config.model) / 1e9:,.1f} model GFLOP/s",
        **({"plan": foresight.line(found)} if (found := planned_and_measured.of(history)) else {}),
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


def _heldout_rows(before: Event, after: Event) -> dict[str, str]:
    """What records of earlier versions do not have; of sources where there are several."""
    rows, sources = {}, after.get("datasets") or {}
    if before.get("bits_per_byte") and after.get("bits_per_byte"):
        rows["bits per byte"] = f"{before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f}"
    if len(sources) > 1:
        rows["loss by source"] = ", ".join(f"{name} {scores['loss']:.4f}" for name, scores in sources.items())
    return rows
