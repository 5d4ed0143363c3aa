import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.job.session import session

STUBBORN_GRANDCHILD = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()) + " ")
    time.sleep(600)
"""


def test_a_session_ends_whatever_was_started_in_it(tmp_path: Path) -> None:
    """Even what has left its family and does not want to go; what was started before and after stays."""
    before = subprocess.Popen(["sleep", "600"])
    with session() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        assert len(str(folder)) < 50
        note = tmp_path / "pid"
        subprocess.run([sys.executable, "-S", "-c", STUBBORN_GRANDCHILD, str(note)], check=True)
        while not note.exists() or not note.read_text().endswith(" "):
            time.sleep(0.005)
        pid = int(note.read_text())
        assert psutil.pid_exists(pid)
    after = subprocess.Popen(["sleep", "600"])
    try:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert not folder.exists()
        assert before.poll() is None and after.poll() is None
        assert "BROADGAUGE_SESSION" not in os.environ
    finally:
        for process in (before, after):
            process.kill()
            process.wait()


def test_a_long_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of Ray's sockets would not fit into the kernel's 107 characters."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 10)))
    with session() as folder:
        assert folder.parent == Path("/tmp")
