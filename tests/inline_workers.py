"""Workers of the data pipeline without processes: fast, and as good for whatever is not about processes."""

from collections.abc import Sequence

from data_pipeline.tasks import Advance, Done, Outcome, Report, Task, describe_failure
from trainer.config import UserError


class InlineWorkers:
    def run(self, tasks: Sequence[Task], on_advance: Report) -> list[Outcome]:
        outcomes: list[Outcome] = []
        finished = Advance()
        for task in tasks:
            latest = Advance()

            def hear(advance: Advance, before: Advance = finished) -> None:
                nonlocal latest
                latest = advance
                on_advance(before + advance)

            try:
                outcomes.append(Done(task.run(hear), latest))
                finished += latest
            except Exception as error:
                failure = describe_failure(error, "")
                if failure.is_final:
                    raise UserError(failure.reason) from error
                outcomes.append(failure)
        return outcomes
