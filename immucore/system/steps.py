"""Long work as numbered steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from immucore.errors import ImmucoreError
from immucore.system import stopping
from immucore.system.errors import told

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from immucore.system.console import Console
    from immucore.system.programs import Advance

    Step = tuple[str, Callable[[Advance], bool]]  # what it does; False: that was the last, nothing is left


def run(console: Console, steps: Sequence[Step]) -> bool:
    """Do one after the other, and announce each with its number; False where one was the last."""
    for number, (what, do) in enumerate(steps, 1):
        stopping.point()
        with console.step(f"step {number} of {len(steps)}: {what}") as advance:
            going_on = do(advance)
        if not going_on:
            return False
    return True


def attempt(console: Console, do: Callable[[], None]) -> None:
    """Do what matters less than what has happened before: a failure is a warning."""
    try:
        do()
    except ImmucoreError as error:
        console.say(f"warning: {error.message}")
    except OSError as error:
        console.say(f"warning: {told(error)}")
