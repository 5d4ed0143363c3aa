"""Makes the tasks that are shipped: `make tasks`. The same seed gives the same files, on every machine."""

from launcher.evaluation.making.arithmetic import arithmetic
from launcher.evaluation.making.copying import copying
from launcher.evaluation.making.files import MadeTask, contents
from launcher.evaluation.making.korean import korean
from launcher.evaluation.making.scrambling import scrambling


def made_tasks() -> list[MadeTask]:
    """Every one whose records are made here."""
    return [*arithmetic(), *scrambling(), *copying(), *korean()]


__all__ = ["contents", "made_tasks"]
