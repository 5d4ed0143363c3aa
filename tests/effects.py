"""Something happens just before the n-th effect that code has on the file system: its death, or another's deed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EFFECTS = (
    *("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open"),
    *("pwrite", "ftruncate", "posix_fallocate"),
)
"""Of `os`, through which `pathlib` and `shutil` go too. `open` counts whether it is to read or to write."""


class Killed(BaseException):
    """What a process that is killed would have done next does not happen; nobody catches this by mistake."""


class Effects:
    """How many there were."""

    num = 0


@contextmanager
def before_effect(number: int, happens: Callable[[], Any]) -> Iterator[Effects]:
    """Call `happens` before the effect of this number, counted from 0; its own effects do not count."""
    seen, real = Effects(), {name: getattr(os, name) for name in EFFECTS}

    def restore() -> None:
        for name, function in real.items():
            setattr(os, name, function)

    def patch() -> None:
        for name in EFFECTS:
            setattr(os, name, counted(name))

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.num += 1
            if seen.num == number + 1:
                restore()
                happens()
                patch()
            return real[name](*args, **kwargs)

        return call

    patch()
    try:
        yield seen
    finally:
        restore()


def killed_at(number: int, action: Callable[[], Any]) -> bool:
    """Run `action` in a process of its own, gone before the effect of this number; False if it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            with before_effect(number, lambda: os._exit(9)):
                action()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), f"it failed by itself before effect {number}"
    return code == 9


def killed_here(number: int, action: Callable[[], Any]) -> bool:
    """The same without a process of its own, for where hundreds would take long."""

    def die() -> None:
        raise Killed

    try:
        with before_effect(number, die):
            action()
    except Killed:
        return True
    return False
