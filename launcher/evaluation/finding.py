"""Tasks by their names, with their records."""

import fnmatch
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.evaluation.examples import Example, read_examples
from launcher.evaluation.heldout import heldout_examples
from launcher.evaluation.task import Task, read_task
from trainer.config import UserError
from trainer.config_file import suggest

SHIPPED = Path(__file__).with_name("tasks")
ALL = "all"


@dataclass(frozen=True)
class LoadedTask:
    """A task with its examples."""

    task: Task
    test: tuple[Example, ...]
    train: tuple[Example, ...]


def shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_tasks(names: Sequence[str], prepared: Path | None = None, seed: int = 0) -> list[LoadedTask]:
    """Tasks that are named: shipped ones, patterns over them (`arithmetic_*`), `all`, YAML files, folders of them.

    Args:
        prepared: folder of prepared data, for tasks made of held-out text.
        seed: of what is drawn from held-out text.

    Raises:
        UserError: a task is unknown or wrong, or two have the same name.
    """
    tasks: dict[str, tuple[Path, LoadedTask]] = {}
    for path in dict.fromkeys(path.resolve() for name in names for path in _files(name)):
        loaded = _load(path, prepared, seed)
        if loaded.task.name in tasks:
            other = tasks[loaded.task.name][0]
            raise UserError(f"{path} and {other} are both tasks called {loaded.task.name}; give one another name")
        tasks[loaded.task.name] = path, loaded
    return [loaded for _, loaded in tasks.values()]


def check_tasks(names: Sequence[str], best_by: str | None = None) -> None:
    """What can be seen to be wrong before there is data.

    Args:
        best_by: the score by which checkpoints are the best (`checkpoint.best_by`).

    Raises:
        UserError: a task is unknown or wrong, its records cannot be read, or none of them has that score.
    """
    tasks = []
    for path in dict.fromkeys(path.resolve() for name in names for path in _files(name)):
        tasks.append(read_task(path))
        if tasks[-1].heldout is None:
            _load(path, None, 0)
    scores = [name for task in tasks for name in task.score_names]
    if best_by is not None and scores and best_by not in scores:
        raise UserError(f"checkpoint.best_by {best_by} is no score of evaluation.tasks{suggest(best_by, scores)}")


def _files(name: str) -> Iterable[Path]:
    known = shipped_names()
    if name == ALL:
        return [SHIPPED / f"{each}.yaml" for each in known]
    if name in known:
        return [SHIPPED / f"{name}.yaml"]
    path = Path(name)
    if os.path.isdir(name):  # of a name that is too long for a path, Path would raise
        found = sorted(path.glob("*.yaml"))
        if not found:
            raise UserError(f"the folder {name} holds no task; write one into a .yaml file")
        return found
    if path.suffix in (".yaml", ".yml"):
        return [path]
    matching = fnmatch.filter(known, name)
    if not matching:
        raise UserError(
            f"there is no task {name!r}{suggest(name, [ALL, *known])} (or name a YAML file or a folder of them)"
        )
    return [SHIPPED / f"{each}.yaml" for each in matching]


def _load(path: Path, prepared: Path | None, seed: int) -> LoadedTask:
    task = read_task(path)
    if task.heldout is not None:
        if prepared is None:
            raise UserError(f"the task {task.name} is made of held-out text; name a folder of prepared data")
        test, train = heldout_examples(task, prepared, seed)
    else:
        assert task.test is not None
        test = read_examples(task, path.parent / task.test, task.max_examples)
        needs_train = max(task.shots) > 0 and task.train is not None
        train = read_examples(task, path.parent / str(task.train)) if needs_train else ()
    if max(task.shots) > len(train):
        raise UserError(
            f"shots {max(task.shots)} of the task {task.name} needs as many demonstrations, and there are {len(train)}"
            + (
                "; hold out more text, or lower shots"
                if task.heldout
                else f" in {task.train}; add some, or lower shots"
            )
        )
    return LoadedTask(task, test, train)
