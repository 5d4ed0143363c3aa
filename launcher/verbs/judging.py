"""Judging the checkpoints of a run while it trains: what is needed for it, started and ended."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.evaluation.judge import judge_of
from launcher.evaluation.own_ranks import OwnRanksService
from launcher.evaluation.service import EvaluationService
from launcher.evaluation.training_ranks import TrainingRanksService
from launcher.history.history import RunHistory
from launcher.job.ranks import Ranks, ready_ranks
from launcher.sizing import service_config
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.format.results import read_results
from trainer.config import RunConfig, UserError
from trainer.run_dir import RunDir
from trainer.schedule import Schedule

_MOST_SCORES = 4  # of a line


def is_wanted(config: RunConfig) -> bool:
    return bool(config.evaluation.tasks) or config.evaluation.has_service


def is_behind(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether the last checkpoint has not been judged, and can still be."""
    last = run_dir.checkpoints / store.folder_name(Schedule(config).num_steps)
    try:
        is_judged = read_results(last, read_manifest(last)) is not None
    except UserError:
        return False
    return not is_judged


@contextmanager
def service(
    config: RunConfig, run_dir: RunDir, record: Callable[..., None], ranks: Callable[[], Ranks]
) -> Iterator[EvaluationService | None]:
    """None where the run wants none; `ranks` are those that train.

    Raises:
        UserError: its tasks cannot be asked.
    """
    if not is_wanted(config):
        yield None
        return
    judge = judge_of(config, run_dir.data_for(config))
    if not config.evaluation.has_service:
        with TrainingRanksService(run_dir, judge, record) as found:
            yield found
        return
    ranks()  # Ray is there now, and they have their places
    own, prepared = RunDir(run_dir.evaluation), str(run_dir.data_for(config).resolve())
    own.logs.mkdir(parents=True, exist_ok=True)
    laid_out = service_config(config)
    laid_out = laid_out.model_copy(update={"data": laid_out.data.model_copy(update={"prepared": prepared})})
    with (
        ready_ranks(laid_out, own, on_cluster=True) as its_own,
        OwnRanksService(run_dir, judge, record, its_own.fleet, config.evaluation.when_behind) as found,
    ):
        yield found


def summary(run_dir: RunDir) -> str:
    """One line on the last checkpoint that was judged."""
    history = RunHistory.read(run_dir.events_path)
    if not history.judged:
        return "no checkpoint was judged"
    last = history.judged[-1]
    scores = [f"{name} {value:.3g}" for name, value in last["scores"].items()]
    told = [*([f"held-out loss {last['heldout_loss']:.4f}"] if last["heldout_loss"] is not None else []), *scores]
    more = f" and {len(told) - _MOST_SCORES} more" if len(told) > _MOST_SCORES else ""
    return f"step {last['step']}: {', '.join(told[:_MOST_SCORES])}{more}"
