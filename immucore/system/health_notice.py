"""Who is told of the health of a boot: whoever logs in, whoever sits at a console, and programs."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from immucore import report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from immucore.system.boot_state import BootState

MOTD = "/run/motd.d/50-immucore"  # pam_motd(8) shows what is there, on Debian too
HEALTH = f"{report.DIRECTORY}/health.json"
FELL_BACK = "/run/cos/upgrade_failure"
WAITING, GOOD, NONE, UNKNOWN = "waiting", "good", "none", "unknown"
_MORE = "More: immucore boot status"


def read() -> dict[str, Any]:
    """Give what is known of the health of this boot: its `verdict`, and the `reasons` for that."""
    try:
        with open(HEALTH, encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError):
        told = None
    return told if isinstance(told, dict) else {"verdict": UNKNOWN, "reasons": []}


def write(verdict: str, reasons: Sequence[str] = ()) -> None:
    """Tell programs. Raises OSError."""
    _put(HEALTH, json.dumps({"schema": report.SCHEMA, "verdict": verdict, "reasons": [*reasons]}) + "\n")


def fell_back(state: BootState, reason: str) -> str:
    """Say that something else was booted than what was to be; empty where it was that."""
    return f"{state.mode} is booted instead of {state.wanted}: {reason}" if state.reason else ""


def mark_fallback(state: BootState, reason: str) -> None:
    """Leave the mark of a fallback, as the agent does where it was the one who fell back. Raises OSError."""
    if state.reason and not os.path.exists(FELL_BACK):
        _put(FELL_BACK, f"{state.wanted}: {reason}\n")


def greet(lines: Sequence[str]) -> None:
    """Have everyone who logs in read this; nothing is nothing. Raises OSError."""
    if lines:
        _put(MOTD, "".join(f"{report.for_terminal(f'immucore: {line}')}\n" for line in (*lines, _MORE)))
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(MOTD)


def to_consoles(line: str) -> None:
    """Tell who sits at a console."""
    report.to_consoles(f"immucore: {line}")


def _put(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.new", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.rename(f"{path}.new", path)
