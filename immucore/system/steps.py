"""Long work as numbered steps, and stopping it: by a signal where nothing has taken effect yet, else not."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

from immucore.errors import ImmucoreError, Interrupted
from immucore.system.errors import told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from immucore.system.console import Console
    from immucore.system.programs import Advance

    Step = tuple[str, Callable[[Advance], bool]]  # what it does; False: that was the last, nothing is left

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(console: Console, steps: Sequence[Step]) -> bool:
    """Do one after the other, and announce each with its number; False where one was the last."""
    for number, (what, do) in enumerate(steps, 1):
        with console.step(f"step {number} of {len(steps)}: {what}") as advance:
            going_on = do(advance)
        if not going_on:
            return False
    return True


@contextlib.contextmanager
def stoppable(so: str) -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP raise Interrupted, until hold() is called; `so` is what came of it."""

    def stop(number: int, _frame: FrameType | None) -> None:
        hold()  # what is done about it is not stopped
        raise Interrupted(f"stopped by signal {number}: {so}")

    before = [(number, signal.signal(number, stop)) for number in _STOPPING]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def hold() -> None:
    """Go on whatever signal comes: what is done now is not left half done, and is done in a moment."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def attempt(console: Console, do: Callable[[], None]) -> None:
    """Do what matters less than what has happened before: a failure is a warning."""
    try:
        do()
    except ImmucoreError as error:
        console.say(f"warning: {error.message}")
    except OSError as error:
        console.say(f"warning: {told(error)}")
