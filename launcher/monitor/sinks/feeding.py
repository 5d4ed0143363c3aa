"""Telling sinks what happens, from a thread of its own: training never waits for them."""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from launcher.history.history import RunHistory
from launcher.history.values import Facts
from launcher.monitor.sinks.sink import Sink, values_of
from launcher.monitor.sinks.tensorboard_files import TensorBoardFiles
from launcher.monitor.sinks.weights_and_biases import WeightsAndBiases
from trainer.config import RunConfig
from trainer.events import Event, EventReader
from trainer.run_dir import RunDir

_LOOK_SECONDS = 1.0
_CLOSING_SECONDS = 30.0  # for what is left to be written

Record = Callable[..., None]


class Feeder:
    """From the moment it is made until `close`. A sink that fails is left alone from then on, and an event says so."""

    def __init__(self, config: RunConfig, run_dir: RunDir, record: Record) -> None:
        self._record, self._facts = record, Facts.of(config)
        self._events, self._history = EventReader(run_dir.events_path), RunHistory()
        makers: dict[str, Callable[[], Sink]] = {
            "tensorboard": lambda: TensorBoardFiles(run_dir.path / "tensorboard"),
            "wandb": lambda: WeightsAndBiases(run_dir.path, run_dir.id, config.model_dump(mode="json")),
        }
        self._makers: Mapping[str, Callable[[], Sink]] = {name: makers[name] for name in config.monitoring.sinks}
        self._sinks: dict[str, Sink] = {}
        self._is_over = threading.Event()
        before = list(self._events.new_events())
        self._thread = threading.Thread(target=self._work, args=(before,), name="sinks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """When all that was recorded is told, or it takes too long."""
        self._is_over.set()
        self._thread.join(_CLOSING_SECONDS)

    def _work(self, before: list[Event]) -> None:
        for name, make in self._makers.items():
            self._trying(name, lambda name=name, make=make: self._sinks.update({name: make()}))  # type: ignore[misc]
        self._tell(before, only_remade=True)
        while not self._is_over.wait(_LOOK_SECONDS):
            self._tell(self._events.new_events())
        self._tell(self._events.new_events())
        for sink in self._sinks.values():
            with suppress(Exception):  # nobody is left who could be told
                sink.close()

    def _tell(self, events: Iterable[Event], *, only_remade: bool = False) -> None:
        for event in events:
            self._history.add(event)
            void = {"training_started": "step", "rolled_back": "to_step"}.get(event["kind"])
            for name, sink in list(self._sinks.items()):
                if only_remade and not sink.remakes:
                    continue
                if void is not None:
                    self._trying(name, lambda sink=sink, step=event[void]: sink.void_after(step))  # type: ignore[misc]
                self._trying(name, lambda sink=sink, event=event: self._add(sink, event))  # type: ignore[misc]

    def _add(self, sink: Sink, event: Event) -> None:
        if values := values_of(event, self._history, self._facts):
            sink.add(event["step"], event["time"], values)

    def _trying(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # whatever it is, training goes on
            self._sinks.pop(name, None)
            with suppress(OSError):
                self._record("sink_failed", sink=name, reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
