"""Results that layouts have in common, so that a search over thousands computes each of them once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Shared:
    """Of one model, batch, cluster and practice: keys tell layouts apart, by whatever the result depends on."""

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, ...], Any] = {}

    def get(self, compute: Callable[[], _T], *key: Hashable) -> _T:
        """The result for this key, computed where it is the first time."""
        try:
            known: _T = self._known[key]
        except KeyError:
            known = self._known[key] = compute()
        return known
