"""Curves for Weights & Biases. The only place that knows it.

Offline unless WANDB_MODE says otherwise: `wandb sync RUN/wandb/offline-run-*` sends them when somebody wants to. A run
keeps its id, so that what its commands have written comes together.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WeightsAndBiases:
    remakes = False

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would call home, offline too
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=60)
        self._end = wandb.teardown
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project="broadgauge",
            name=str(config["name"]),
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, time: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, "time": time, **values})

    def void_after(self, step: int) -> None:
        """It cannot take anything back; curves over `step` show both."""

    def close(self) -> None:
        self._run.finish()
        self._end()  # the process that it works with
