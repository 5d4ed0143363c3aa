"""Recording what chosen ranks do in some steps of a run, while it goes on: a trace of torch's profiler for each.

The request is a file in the run's folder, which rank 0 looks for after every step; the ranks agree that they have heard
of it. It is taken away when it is done, or can no longer be.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import orjson
import torch
from torch.profiler import ProfilerActivity, profile

from trainer.run_dir import RunDir

Record = Callable[..., None]


@dataclass(frozen=True)
class ProfileRequest:
    first_step: int
    last_step: int
    ranks: tuple[int, ...]

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(orjson.dumps(asdict(self)))
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> "ProfileRequest | None":
        """None if there is none, or none that can be understood."""
        try:
            said = orjson.loads(path.read_bytes())
            return cls(int(said["first_step"]), int(said["last_step"]), tuple(map(int, said["ranks"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def folder(self, run_dir: RunDir) -> Path:
        """Of its traces, one a rank."""
        return run_dir.profiles / f"steps-{self.first_step}-{self.last_step}"

    def trace(self, run_dir: RunDir, rank: int) -> Path:
        return self.folder(run_dir) / f"rank-{rank}.json.gz"


class StepProfiler:
    """One rank's part."""

    def __init__(self, run_dir: RunDir, rank: int, device: torch.device, record: Record) -> None:
        self._run_dir, self._rank, self._record = run_dir, rank, record
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._request: ProfileRequest | None = None
        self._profile: profile | None = None

    def is_asked(self) -> bool:
        """Whether rank 0 sees a request that the ranks have not heard of."""
        return self._rank == 0 and self._request is None and self._run_dir.profile_request_path.exists()

    def hear(self, step: int) -> None:
        """All ranks, after a step: there is a request."""
        request = ProfileRequest.read(self._run_dir.profile_request_path)
        if request is None or request.last_step <= step:
            self._end("it cannot be read" if request is None else f"step {step} is done already")
            return
        self._request = request

    def before(self, step: int) -> None:
        request = self._request
        if request is None or self._profile is not None or not request.first_step <= step <= request.last_step:
            return
        if self._rank in request.ranks:
            self._profile = profile(activities=self._activities)
            self._profile.start()

    def after(self, step: int) -> None:
        """The step is done, or is to be rolled back."""
        request = self._request
        if request is not None and step >= request.last_step:
            problem = self._write(request)
            self._request = None
            self._end(problem, **_facts(request, self._run_dir))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Training has come to an end; what was recorded until now is written, unless it has failed."""
        if self._request is not None and error[0] is None:
            self.after(self._request.last_step)

    def _write(self, request: ProfileRequest) -> str | None:
        """What was recorded; returns what went wrong on this rank."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return None
        recorded.stop()
        path = request.trace(self._run_dir, self._rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}")  # its end says to the profiler that it is to be compressed
            recorded.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            return f"rank {self._rank} could not write its trace: {error}"
        return None

    def _end(self, problem: str | None, **fields: Any) -> None:
        """The request is dealt with, whatever came of it."""
        if self._rank == 0:
            self._run_dir.profile_request_path.unlink(missing_ok=True)
            self._record("profiled", problem=problem, **fields)


def _facts(request: ProfileRequest, run_dir: RunDir) -> dict[str, Any]:
    return {**asdict(request), "folder": str(request.folder(run_dir))}
