import os
import threading
from pathlib import Path

import pytest

from launcher.node import ownership


def test_a_claim_waits_for_the_last_process_that_holds_the_file(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    ownership.claim(lock, "old", timeout_seconds=0)
    held = ownership.hold(lock, "old")
    assert held is not None
    inherited = os.dup(held)  # what a fork does: the same open file, held until both are closed
    os.close(held)
    with pytest.raises(TimeoutError, match=r"an earlier job still hold .*lock after 0.05 s"):
        ownership.claim(lock, "new", timeout_seconds=0.05)

    claimed = threading.Thread(target=ownership.claim, args=(lock, "new", 10))
    claimed.start()
    claimed.join(0.05)
    assert claimed.is_alive()
    os.close(inherited)
    claimed.join(10)
    assert not claimed.is_alive()


def test_a_process_of_an_older_job_that_comes_late_is_turned_away(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    ownership.claim(lock, "an-older-and-longer-id", timeout_seconds=0)
    ownership.claim(lock, "new", timeout_seconds=0)
    assert ownership.hold(lock, "an-older-and-longer-id") is None
    held = ownership.hold(lock, "new")
    assert held is not None
    os.close(held)


def test_several_machines_hold_the_file_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    ownership.claim(lock, "job", timeout_seconds=0)
    first, second = ownership.hold(lock, "job"), ownership.hold(lock, "job")
    assert first is not None and second is not None
    os.close(first)
    with pytest.raises(TimeoutError):
        ownership.wait_until_free(lock, timeout_seconds=0)
    os.close(second)
    ownership.wait_until_free(lock, timeout_seconds=0)
