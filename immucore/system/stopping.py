"""Long work that is stopped by a signal: asked for at any moment, obeyed where nothing is lost by it.

An exception out of a signal's handler can come between opening a file and knowing that it is open. So the
handler only takes note, and what takes long calls point() every now and then.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from immucore.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_asked: list[str] = []  # what is told of each signal that has come


@contextlib.contextmanager
def stoppable(so: str) -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP stop the work at its next point(); `so` is what comes of that."""

    def stop(number: int, _frame: FrameType | None) -> None:
        _asked.append(f"stopped by signal {number}: {so}")

    before = [(number, signal.signal(number, stop)) for number in _STOPPING]
    try:
        yield
    finally:
        hold()
        for number, handler in before:
            signal.signal(number, handler)


def point() -> None:
    """Stop here, if somebody wants that. Raises Interrupted."""
    if _asked:
        raise Interrupted(_asked[0])


def hold() -> None:
    """Go on whatever signal comes: what is done now is not left half done, and is done in a moment."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    _asked.clear()
