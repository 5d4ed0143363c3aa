"""Whether a machine's checkpoint service lives, as its ranks see it."""

import os
import signal
import stat
from pathlib import Path

from trainer.checkpoint.service.presence import Presence, is_served
from trainer.checkpoint.service.room import Room


def test_a_service_is_seen_from_its_first_pass_to_its_end(tmp_path: Path) -> None:
    room = Room(tmp_path / "memory" / "node-0", range(2))
    assert not is_served(room) and not room.path.exists()
    presence, successor = Presence(room), Presence(room)
    assert presence.show() and presence.show()
    assert is_served(room) and is_served(room) and stat.S_IMODE(room.path.stat().st_mode) == 0o700
    assert not successor.show()  # the one before is still ending
    presence.end()
    assert not is_served(room)
    assert successor.show() and is_served(room)
    successor.end()


def test_a_room_that_was_removed_is_held_anew(tmp_path: Path) -> None:
    room = Room(tmp_path / "memory" / "node-0", range(2))
    presence = Presence(room)
    presence.show()
    room.remove()
    assert not is_served(room)
    presence.show()
    assert is_served(room)
    presence.end()


def test_a_service_that_is_stopped_lives_and_one_that_is_killed_does_not(tmp_path: Path) -> None:
    room = Room(tmp_path, range(2))
    ears, mouth = os.pipe()
    pid = os.fork()
    if pid == 0:
        Presence(room).show()
        os.write(mouth, b"!")
        signal.pause()
        os._exit(1)
    assert os.read(ears, 1) and is_served(room)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert is_served(room)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not is_served(room)


def test_where_there_can_be_no_room_a_service_lives_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    room = Room(tmp_path / "file" / "node-0", range(2))
    assert Presence(room).show()
    assert not is_served(room)
