"""Tasks for tests of worker processes; each notes its process in a folder when it starts."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.tasks import Advance, Report
from trainer.config import UserError


@dataclass(frozen=True)
class Told:
    """Does what `behaviour` says, on its first `times` tries; then it succeeds."""

    folder: Path
    number: int
    behaviour: str = "succeed"
    times: int = 10**9

    @property
    def name(self) -> str:
        return f"task {self.number}"

    def run(self, report: Report) -> str:
        tries = len(list(self.folder.glob(f"{self.number}-*"))) + 1
        (self.folder / f"{self.number}-{tries}").write_text(str(os.getpid()))
        report(Advance(1, 1, 1))
        if tries <= self.times:
            getattr(self, self.behaviour)()
        report(Advance(10, 2, 3))
        return f"result {self.number}"

    def succeed(self) -> None:
        pass

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self) -> None:
        os._exit(7)

    def block(self) -> None:
        signal.pause()

    def wait_for_go(self) -> None:
        while not (self.folder / "go").exists():
            time.sleep(0.005)

    def complain(self) -> None:
        raise ValueError("two\nlines")

    def panic(self) -> None:
        raise BaseException("as Rust does")

    def refuse(self) -> None:
        raise UserError("mend it")

    def let_go_and_refuse(self) -> None:
        (self.folder / "go").touch()
        self.refuse()

    def fill_disk(self) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    def be_denied(self) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/part")
