"""Results that layouts have in common, so that a search over thousands computes each of them once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Shared:
    """Keys tell layouts apart, by whatever the result depends on, and nothing else: all else must be the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, ...], Any] = {}
        self._owners: tuple[object, ...] | None = None

    def claim(self, *owners: object) -> None:
        """Results are of these very objects, of which keys say nothing: whoever has others has no part in them."""
        if self._owners is None:
            self._owners = owners
        same = all(before is now for before, now in zip(self._owners, owners, strict=True))
        assert same, "results of another model, cluster, practice or constants; begin with a new Shared"

    def get(self, compute: Callable[[], _T], *key: Hashable) -> _T:
        """The result for this key, computed where it is the first time."""
        try:
            known: _T = self._known[key]
        except KeyError:
            known = self._known[key] = compute()
        return known
