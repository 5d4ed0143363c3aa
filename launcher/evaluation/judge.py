"""What a run asks of each of its checkpoints, and what the answers are worth."""

from collections.abc import Sequence
from typing import Any

from trainer.inference.requests import Answer, Request


class NoTasks:
    requests: Sequence[Request] = ()

    def results(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {"scores": {}}
