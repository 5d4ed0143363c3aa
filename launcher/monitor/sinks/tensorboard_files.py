"""Curves as TensorBoard reads them: `tensorboard --logdir RUN/tensorboard`. The only place that knows it."""

import shutil
from collections.abc import Mapping
from pathlib import Path


class TensorBoardFiles:
    """Made anew from the record by every command: no step is there twice, and none is missing."""

    remakes = True

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events, self._summaries = event_pb2, summary_pb2
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = EventFileWriter(str(folder))

    def add(self, step: int, time: float, values: Mapping[str, float]) -> None:
        scalars = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summaries.Summary(value=scalars)
        self._writer.add_event(self._events.Event(wall_time=time, step=step, summary=summary))

    def void_after(self, step: int) -> None:
        """As a session that begins there: TensorBoard forgets what it has read of later steps."""
        session = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.add_event(self._events.Event(step=step + 1, session_log=session))

    def close(self) -> None:
        self._writer.close()
