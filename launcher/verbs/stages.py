"""The stages of a run, each usable alone: prepare, train, export, generate; and `run`, which is all of them.

A stage looks at the run's folder first and does only what is missing, so running again after an interruption, at
whatever moment, goes on from there.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipeline.manifest import DatasetManifest, Manifest
from data_pipeline.pipeline import TOKENIZER_FOLDER, prepare
from data_pipeline.tasks import Workers
from launcher.fitting import OnShortage, check_memory, refuse
from launcher.history.foresight import compared
from launcher.history.history import RunHistory
from launcher.job import cluster
from launcher.job.failures import JobFailed, NodeFailed, RankFailed
from launcher.job.preemption import Preemption, listening, unwrapped
from launcher.job.ranks import Ranks, ready_ranks
from launcher.job.ray_workers import WORKER_ENV, RayWorkers
from launcher.job.recovery import fetch_newer
from launcher.monitor.monitor import Monitor
from launcher.monitor.sinks import sink
from launcher.placement import check_beside
from launcher.report import data as data_report
from launcher.report import foresight
from launcher.report import training as report
from launcher.report.display import Display, StageBar
from launcher.sizing import service_config
from launcher.supervise.supervisor import Supervisor
from launcher.verbs import checks, exporting, judging
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import MANIFEST, read_manifest
from trainer.config import RunConfig
from trainer.data.blend import DatasetUse
from trainer.events import SCHEMA, Event, EventLog, EventReader, read_events
from trainer.progress import counting
from trainer.run_dir import RunDir
from trainer.schedule import Schedule
from trainer.stop import Preempted

WARNINGS = {
    "checkpoint_rejected": "{reason}",
    "step_skipped": "step {step} skipped: {reason}",
    "rolled_back": "rolled back from step {from_step} to {to_step}: {reason}",
    "checkpoint_failed": "the checkpoint of step {step} could not be written: {reason}",
    "checkpoint_upload_failed": "the checkpoint of step {step} could not be uploaded: {reason}",
    "checkpoint_service_died": "the checkpoint service died (exit code {code}) and is replaced; see {log}",
    "life_failed": "{error}",
    "machine_excluded": "machine {machine} is left out after {failures} failures",
    "hung": "the ranks hang: {verdict}",
    "straggler": "rank {rank} on node {node} is slow in {phase}: steps take {ratio:.2g} times as long",
    "evaluation_failed": "the checkpoint of step {step} could not be evaluated: {reason}",
    "sink_failed": "{sink} is told nothing more: {reason}",
    "checkpoint_skipped": "no checkpoint of step {step}: {reason}",
}
"""Kind of event that a person should see at once -> what to say of it."""


@dataclass
class ClaimedRun:
    """One command at work on one run."""

    config: RunConfig
    run_dir: RunDir
    display: Display
    log: EventLog
    preemption: Preemption
    monitor: Monitor
    on_cluster: bool = False
    """Whether Ray is connected to a cluster; else the run has a Ray of its own when ranks start."""
    resources: ExitStack = field(default_factory=ExitStack)
    _ranks: Ranks | None = None
    _has_begun: bool = False

    def begin(self) -> None:
        """Record that there is something to do."""
        if not self._has_begun:
            self._has_begun = True
            self.log.write("command_started", schema=SCHEMA, version=version("broadgauge"))

    def ranks(self) -> Ranks:
        """The run's warm agents, started when first needed and kept for the stages that follow."""
        if self._ranks is None:
            self._ranks = self.resources.enter_context(
                ready_ranks(self.config, self.run_dir, on_cluster=self.on_cluster)
            )
        return self._ranks

    @contextmanager
    def stage(self, name: str) -> Iterator[StageBar]:
        """Show and record a stage."""
        self.begin()
        self.log.write("stage_started", stage=name)
        started = time.monotonic()
        with self.display.stage(name) as bar:
            yield bar
        self.log.write("stage_finished", stage=name, seconds=round(time.monotonic() - started, 3), result=bar.result)


@contextmanager
def claim(
    config: RunConfig, run_dir: RunDir, display: Display, ray: str | None = None, on_shortage: OnShortage = refuse
) -> Iterator[ClaimedRun]:
    """Claim the run's folder for this process; what it started is stopped when it ends.

    Args:
        ray: address of the cluster on which the run's ranks are to live; without one, on this machine.
        on_shortage: hears why the run does not fit that cluster, if it does not.

    Raises:
        UserError: the folder belongs to another run, another process works in it, or the cluster is not there or too
            small.
    """
    run_dir.check(config)
    sink.check(config)
    preemption = Preemption(run_dir, config.checkpoint.grace_seconds)
    with run_dir.locked(), listening(preemption), ExitStack() as resources:
        if ray is not None:
            resources.enter_context(cluster.connected(ray, WORKER_ENV))
            check_memory(config, cluster.machines(), on_shortage)
            if config.evaluation.has_service:
                check_beside(config, service_config(config), cluster.machines())
        run_dir.create(config)
        preemption.begin()
        log = EventLog(run_dir.events_path)
        resources.callback(log.close)
        written = EventReader(run_dir.events_path)
        written.skip_to_end()
        try:
            with unwrapped():
                monitor = resources.enter_context(closing(Monitor(config, run_dir, log.write)))
                if told := monitor.problem or (monitor.url and f"page      {monitor.url}"):
                    display.line(told)
                yield ClaimedRun(config, run_dir, display, log, preemption, monitor, ray is not None, resources)
        except Preempted as end:
            if not any(event["kind"] == "preempted" for event in written.new_events()):  # by the ranks
                log.write("preempted", reason=str(end))
            raise
        except Exception as error:
            log.write("failed", error=f"{type(error).__name__}: {error}", log=_log_of(error))
            raise
        finally:
            preemption.is_over = True


def _log_of(error: Exception) -> str | None:
    """Path of what was written by what failed."""
    return str(error.log_path) if isinstance(error, RankFailed | NodeFailed) else None


# ----------------------------------------------------------------------------------------------------------- whole run


def run(config: RunConfig, run_dir: RunDir, display: Display, ray: str | None = None, *, force: bool = False) -> None:
    """Raw text to a trained, evaluated, exported, sampled model.

    Args:
        ray: as for `claim`.
        force: whether to go on where memory will not be enough.
    """
    with _checked(checks.check_run, config, run_dir, display, ray, force=force) as claimed:
        if is_finished(run_dir):
            if config.evaluation.has_service and judging.is_behind(config, run_dir) and is_trained(config, run_dir):
                started = time.monotonic()
                train(claimed)  # which only judges
                claimed.log.write("run_finished", seconds=round(time.monotonic() - started, 3))
                return
            display.line(f"{run_dir.path} has finished already; nothing to do (its model lies in {run_dir.export})")
            return
        claimed.begin()
        claimed.log.write("run_started", resumed=bool(store.steps(run_dir.checkpoints)))
        started = time.monotonic()
        prepare_data(claimed, RayWorkers() if claimed.on_cluster else None)
        checks.check_prompt(config, run_dir)
        train(claimed)
        export(claimed)
        generate_sample(claimed)
        claimed.log.write("run_finished", seconds=round(time.monotonic() - started, 3))
        display.show(report.summary(config, run_dir, RunHistory.read(run_dir.events_path)))


def train_alone(
    config: RunConfig, run_dir: RunDir, display: Display, ray: str | None = None, *, force: bool = False
) -> None:
    """Training on data that was prepared before; arguments as of `run`."""
    with _checked(checks.check_train, config, run_dir, display, ray, force=force) as claimed:
        train(claimed)


@contextmanager
def _checked(
    check: Callable[..., None], config: RunConfig, run_dir: RunDir, display: Display, ray: str | None, *, force: bool
) -> Iterator[ClaimedRun]:
    """Claim the run, once all is seen to be there that it needs."""
    on_shortage = display.warn if force else refuse
    with display.stage("check") as bar:
        heard = counting(bar.update, "check: prepared data", "bytes")
        check(config, run_dir, on_cluster=ray is not None, advance=heard, on_shortage=on_shortage)
    with claim(config, run_dir, display, ray, on_shortage) as claimed:
        yield claimed


def is_finished(run_dir: RunDir) -> bool:
    if not (run_dir.events_path.exists() and (run_dir.export / "config.json").exists() and run_dir.loss_plot.exists()):
        return False
    return any(event["kind"] == "run_finished" for event in read_events(run_dir.events_path))


def is_trained(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether the last checkpoint is there, whole, and evaluated."""
    last = Schedule(config).num_steps
    evaluated = any(
        event["kind"] == "evaluated" and event["step"] == last for event in read_events(run_dir.events_path)
    )
    newest = store.newest_valid(run_dir.checkpoints) if evaluated and run_dir.loss_plot.exists() else None
    return newest is not None and newest.name == store.folder_name(last)


# -------------------------------------------------------------------------------------------------------------- stages


def prepare_data(claimed: ClaimedRun, workers: Workers | int | None = None) -> None:
    """Text -> tokenizer and shards, unless the run uses a folder that was prepared before."""
    config, run_dir = claimed.config, claimed.run_dir
    if config.data.prepared:
        checks.check_prepared(config, run_dir)
        return
    with claimed.stage("prepare") as bar:
        manifest = prepare(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_length=config.model.seq_length,
            out=run_dir.data,
            min_train_tokens=config.tokens_per_step + 1,
            workers=workers,
            progress=bar,
        )
        bar.result = data_report.describe(manifest)
    data_report.show(manifest, claimed.display)
    claimed.log.write(
        "data_prepared",
        documents={name: portion.documents for name, portion in manifest.portions.items()},
        tokens={name: portion.tokens for name, portion in manifest.portions.items()},
        vocab_size=manifest.vocab_size,
        dropped=manifest.dropped,
        repaired=manifest.repaired,
    )


def train(claimed: ClaimedRun) -> None:
    """Train to the end of the run from its newest checkpoint, with a held-out evaluation before and after.

    Where the run has tasks, or a service, checkpoints are judged meanwhile, and the last one before this returns.
    """
    config, run_dir = claimed.config, claimed.run_dir
    trained = is_trained(config, run_dir)
    if trained:
        claimed.display.line(f"train     trained already, to step {Schedule(config).num_steps}")
    if trained and not (judging.is_wanted(config) and judging.is_behind(config, run_dir)):
        return
    claimed.begin()
    events = EventReader(run_dir.events_path)
    events.skip_to_end()
    with judging.service(config, run_dir, claimed.log.write, claimed.ranks) as service:
        if not trained:
            _train_to_the_end(claimed, events)
        if service is not None:
            with claimed.stage("evaluate") as bar:

                def update(doing: str, done: int, total: int | None, unit: str) -> None:
                    bar.update(doing, done, total, unit)
                    _warn(claimed, events.new_events())

                service.finish(update)
                _warn(claimed, events.new_events())
                bar.result = judging.summary(run_dir)


def _warn(claimed: ClaimedRun, events: Iterable[Event]) -> None:
    """Of what a person should see at once."""
    for event in events:
        if event["kind"] in WARNINGS and event.get("durable", True):
            claimed.display.warn(WARNINGS[event["kind"]].format_map(event))


def _tell_of_plan(claimed: ClaimedRun, event: Event) -> None:
    if event["kind"] == "unplanned":
        claimed.display.line(f"plan      none: {event['reason']}")
    elif event["kind"] == "plan_checked":
        claimed.display.line(f"plan      {foresight.short_line(compared(event))}")
        if event["slow"]:
            claimed.display.warn(
                f"steps take {event['step_seconds'] / event['planned_step_seconds']:.1f} times as long as planned; "
                f"`broadgauge profile {claimed.run_dir.path} --steps A:B` shows what ranks do meanwhile, `broadgauge "
                "doctor CONFIG` whether machines and network are well"
            )


def _train_to_the_end(claimed: ClaimedRun, events: EventReader) -> None:
    config, run_dir = claimed.config, claimed.run_dir
    schedule = Schedule(config)
    data = run_dir.data_for(config)
    uses = checks.planned_epochs(config, manifest := Manifest.load(data))
    data_report.show_epochs(uses, claimed.display)
    claimed.log.write("blend", datasets={use.name: _facts_of(use, manifest, data) for use in uses})
    with claimed.stage("train") as bar:

        def show_progress() -> None:
            for event in events.new_events():
                if event["kind"] == "step":
                    rate = event["num_samples"] * config.model.seq_length / event["seconds"]
                    doing = f"train: loss {event['loss']:.3f}, {rate:,.0f} tokens/s"
                    bar.update(doing, event["step"], schedule.num_steps, "steps")
                elif event["kind"] == "evaluated":
                    bar.update(f"train: held-out loss {event['loss']:.3f}", event["step"], schedule.num_steps, "steps")
                else:
                    _tell_of_plan(claimed, event)
                    _warn(claimed, [event])

        bar.update("train: starting ranks", 0, schedule.num_steps, "steps")
        _train_ranks(claimed, show_progress)
        history = RunHistory.read(run_dir.events_path)
        report.plot_losses(config, history, run_dir.loss_plot)
        bar.result = report.verdict(history.evaluated[0], history.evaluated[-1])


def _facts_of(use: DatasetUse, manifest: Manifest, data: Path) -> dict[str, Any]:
    """Of a data set, for the record."""
    portion = manifest.datasets[use.name]["train"]
    dropped = {reason: count.count for reason, count in DatasetManifest.load(data / use.name).dropped.items()}
    facts = {"documents": portion.documents, "tokens": portion.tokens, "dropped": dropped}
    return {"share": use.share, "epochs": use.epochs, **facts}


def _train_ranks(claimed: ClaimedRun, show_progress: Callable[[], None]) -> None:
    """Have ranks train to the end.

    Raises:
        Preempted: they were asked to end before.
        JobFailed: they failed for good, or the last checkpoint could not be written.
    """
    config, run_dir = claimed.config, claimed.run_dir
    fetch_newer(config, run_dir.checkpoints, claimed.log.write)
    fleet = claimed.ranks().fleet

    def look() -> None:
        claimed.monitor.found(fleet.metrics_addresses())
        show_progress()

    Supervisor(fleet, run_dir, claimed.preemption, claimed.log, look).train()
    events = read_events(run_dir.events_path)
    checkpoint = run_dir.checkpoints / store.folder_name(Schedule(config).num_steps)
    if not (checkpoint / MANIFEST).exists():
        reasons = [event["reason"] for event in events if event["kind"] == "checkpoint_failed"]
        raise JobFailed(
            f"training has ended, but its last checkpoint {checkpoint} could not be written: "
            f"{reasons[-1] if reasons else 'no reason was recorded'}; mend that and run the same command again"
        )


def export(claimed: ClaimedRun) -> None:
    """The final checkpoint as a Hugging Face folder, checked against the trained model before it appears."""
    from trainer.checkpoint.huggingface import model_card  # seconds to import: not before a stage needs it

    config, run_dir = claimed.config, claimed.run_dir
    with claimed.stage("export") as bar:
        last = Schedule(config).num_steps
        checkpoint = run_dir.checkpoints / store.folder_name(last)
        history = RunHistory.read(run_dir.events_path)
        facts = model_card.training_facts(read_manifest(checkpoint))
        facts["Held-out loss, nats per token"] = history.evaluated[-1]["loss"]
        tokenizer = run_dir.data_for(config) / TOKENIZER_FOLDER
        verified = exporting.export_checkpoint(
            config, run_dir, claimed.ranks, checkpoint, tokenizer, run_dir.export, facts, update=bar.update
        )
        difference, tokens = verified.largest_difference, verified.num_tokens
        claimed.log.write("export_verified", how=verified.how, largest_difference=difference, tokens=tokens)
        bar.result = f"{run_dir.export}: {verified.summary}"


def generate_sample(claimed: ClaimedRun) -> None:
    """Continue the run's prompt with the exported model."""
    from trainer.checkpoint.huggingface import generation

    config, run_dir = claimed.config, claimed.run_dir
    with claimed.stage("generate") as bar:
        prompt = config.generate.prompt
        text = generation.generate(run_dir.export, prompt, config.generate.max_new_tokens, config.seed)
        claimed.log.write("generated", prompt=prompt, text=text)
        bar.result = f"{prompt}|{text}".replace("\n", "\\n")
