"""What a long command shows while it works: bars on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINE_SEC = 5.0  # how often a plain line says how far a step is


class Console:
    """Where a command tells its steps: people on stderr, programs one JSON object a line on stdout."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._terminal = Terminal(file=sys.stderr)

    def say(self, message: str, **fields: Any) -> None:
        """Tell one line; `fields` are what a program wants to know of it."""
        if self.as_json:
            print(json.dumps({"message": message, **fields}), flush=True)
        else:
            self._terminal.print(message, markup=False, highlight=False, soft_wrap=True)

    def result(self, message: str, **fields: Any) -> None:
        """Tell what a command has come to: the last line."""
        self.say(message, **({"result": True} if self.as_json else {}), **fields)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show a step for as long as it takes; yields what is told how much is done of how much."""
        started = time.monotonic()
        if self._terminal.is_terminal and not self.as_json:
            with self._bar() as progress:
                task = progress.add_task(what, total=None)
                yield lambda done, total: _update(progress, task, done, total)
                progress.update(task, total=1, completed=1)
            return
        self.say(f"{what} ...", step=what, state="started")
        told = started

        def advance(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told >= LINE_SEC and total:
                told = time.monotonic()
                self.say(f"{what}: {done * 100 // total} %", step=what, done=done, total=total)

        yield advance
        took_sec = time.monotonic() - started
        self.say(f"{what}: done in {took_sec:.1f} s", step=what, state="done", seconds=round(took_sec, 1))

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self._terminal)


def _update(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)
