"""The folder of a run: what lies where, who may write to it, and which config it belongs to."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer import config_file
from trainer.config import RunConfig, UserError
from trainer.events import read_events

_BEFORE_CONFIG = {".lock", "config.yaml.tmp"}  # what a run that was killed at once leaves
_MAY_CHANGE = ("monitoring.", "evaluation.", "launch.cluster")  # have no part in what is computed
_OWN_CONFIG = "the run wrote it when it began, and its checkpoints have it too"


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; nothing is created until `create`."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def id(self) -> str:
        """Tells the run from any other that has been or will be in a folder of this name."""
        return self._id_path.read_text(encoding="utf-8")

    @property
    def _id_path(self) -> Path:
        return self.path / "run-id"

    @property
    def events_path(self) -> Path:
        """The append-only record of the run; see `trainer.events`."""
        return self.path / "events.jsonl"

    @property
    def data(self) -> Path:
        """What `data_pipeline` wrote: manifest.json, tokenizer/, and a folder of shards for every data set."""
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """What checkpoints are asked, and the logs of those that ask."""
        return self.path / "evaluation"

    @property
    def requests_path(self) -> Path:
        """What tasks ask of every checkpoint; see `trainer.inference.requests`."""
        return self.evaluation / "requests.jsonl"

    def answers_path(self, step: int, asked: str) -> Path:
        """What the training ranks have answered to requests of this fingerprint."""
        return self.evaluation / f"step-{step:08d}.{asked}.answers.jsonl"

    @property
    def stop_path(self) -> Path:
        """Its presence asks the ranks to save and end."""
        return self.path / "stop"

    @property
    def profile_request_path(self) -> Path:
        """See `trainer.profiling`."""
        return self.path / "profile.json"

    @property
    def profiles(self) -> Path:
        return self.path / "profiles"

    @property
    def lock_path(self) -> Path:
        """Held by the command that works on the run."""
        return self.path / ".lock"

    @property
    def export(self) -> Path:
        """The Hugging Face folder."""
        return self.path / "export"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def targets_path(self) -> Path:
        """Where Prometheus finds the endpoints of the command that works on the run.

        Beside the folder: it takes a pattern in a file's name, `runs/*.prometheus.json`, but none in a folder's.
        """
        path = self.path.resolve()
        return path.with_name(f"{path.name}.prometheus.json")

    @property
    def page_url_path(self) -> Path:
        """The address of that command's page, with the token if one is needed."""
        return self.path / "page-url"

    @property
    def page_token_path(self) -> Path:
        return self.path / "page-token"

    def config(self) -> RunConfig:
        """The run's own, in which every value is written out.

        Raises:
            UserError: it cannot be read, or is not one.
        """
        try:
            config = config_file.load(self.config_path)
            is_empty = not self.config_path.read_text(encoding="utf-8").strip()
        except UserError as error:
            named = "" if str(self.config_path) in str(error) else f"{self.config_path}: "
            raise UserError(f"{named}{error}; {_OWN_CONFIG}") from error
        if is_empty:
            raise UserError(f"{self.config_path} is empty; {_OWN_CONFIG}")
        return config

    def data_for(self, config: RunConfig) -> Path:
        """The prepared data this run trains on: its own, or the folder that `data.prepared` names."""
        return Path(config.data.prepared) if config.data.prepared else self.data

    def check(self, config: RunConfig) -> None:
        """Refuse a folder that belongs to a run with another config, or that is no run's.

        A run that has not begun to train may still change its config: nothing of the old one would be mixed in.

        Raises:
            UserError: names the fields that differ.
        """
        if not self.config_path.exists():
            if self.path.exists() and any(item.name not in _BEFORE_CONFIG for item in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and holds no config.yaml of a run; use another --run-dir")
            return
        found = config_file.differences(self.config(), config)
        changed = [each for each in found if not each.key.startswith(_MAY_CHANGE)]
        if changed and self.has_trained():
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(map(str, changed[:4]))}"
                f"{'; ...' if len(changed) > 4 else ''}); use the same settings, or another --run-dir"
            )

    def has_trained(self) -> bool:
        return any(event["kind"] == "training_started" for event in read_events(self.events_path))

    def create(self, config: RunConfig) -> None:
        """Make the folder and write the resolved config, unless an equal one is there.

        Raises:
            UserError: see `check`.
        """
        self.check(config)
        with _usable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.config_path.exists() or self.config() != config:
                _write(self.config_path, config_file.dump(config))
            if not self._id_path.exists():
                _write(self._id_path, secrets.token_hex(8))
            for folder in (self.checkpoints, self.logs):
                folder.mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the kernel lets go when the process ends, however it ends.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        with _usable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.lock_path, "a", encoding="utf-8")  # noqa: SIM115 - closed below
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.path} is in use by another process; wait for it or stop it") from error
            yield


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Raises:
    UserError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be the folder of a run ({error.strerror}); use another --run-dir") from error


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
