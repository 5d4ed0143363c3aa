"""Whether the checkpoint service of a machine lives: it holds a lock on the room, which the kernel takes from the dead.

A service that is stopped, or waits for a disk, lives; no clock is involved.
"""

import fcntl
import os
from contextlib import suppress

from trainer.checkpoint.service.room import Room


class Presence:
    """A service's hold on its room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._descriptor: int | None = None

    def show(self) -> bool:
        """Hold the room, which is made if it is not there (any more); to be called again and again.

        Returns whether the service may work: not while the one before it has not ended. Where a room is impossible the
        ranks cannot use it either, and it is nobody's.
        """
        if self._descriptor is not None and self._is_of_this_room(self._descriptor):
            return True
        self.end()
        with suppress(OSError):
            self._room.make()
            descriptor = os.open(self._room.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # the service before this one is still ending, or a rank is just looking
                os.close(descriptor)
                return False
            self._descriptor = descriptor
        return True

    def _is_of_this_room(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._room.path))
        except OSError:
            return False

    def end(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_served(room: Room) -> bool:
    """Whether a service holds the room."""
    try:
        descriptor = os.open(room.path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: ranks that look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
