"""A reboot that has to wait, as a unit of systemd's: immucore-reboot, with a timer or without.

The unit, and the file that says what is pending, are in /run: a machine that reboots for another reason has
started the new image then, and nothing is pending any more.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from immucore import process
from immucore.errors import ImmucoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "/usr/bin/immucore"
PENDING = "/run/immucore/reboot.json"
NAME = "immucore-reboot"
RELEASE = "immucore-reboot-release"
_HINT = "what was installed is in its place: systemctl reboot starts it"


class RebootError(ImmucoreError):
    """systemd does not reboot this machine, or cannot be told to do so later."""

    exit_status = 4


def restart() -> None:
    """Reboot this machine. Raises RebootError."""
    _systemd(["systemctl", "reboot"])


def pending() -> str | None:
    """Return the strategy by which this machine is to reboot; None where it is not to."""
    try:
        with open(PENDING, encoding="utf-8") as file:
            return str(json.load(file)["strategy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def arrange(strategy: str, calendar: str) -> None:
    """Have `immucore reboot --pending` run, at once or at each of some times, in place of what was pending.

    Raises RebootError.
    """
    cancel()
    try:
        os.makedirs(os.path.dirname(PENDING), exist_ok=True)
        with open(f"{PENDING}.new", "w", encoding="utf-8") as file:
            json.dump({"strategy": strategy}, file)
        os.rename(f"{PENDING}.new", PENDING)
    except OSError as error:
        raise RebootError(f"cannot write '{PENDING}': {error.strerror}", hint=_HINT) from None
    try:
        _systemd(service(NAME, ["reboot", "--pending"], "Reboot into a new image", calendar))
    except RebootError:
        os.unlink(PENDING)
        raise


def start() -> None:
    """Start the service now that the timer would start later. Raises RebootError."""
    _systemd(["systemctl", "start", "--no-block", f"{NAME}.service"])


def cancel() -> str | None:
    """Give up what is pending, and return it."""
    text = pending()
    with contextlib.suppress(OSError):
        os.unlink(PENDING)
    _stop(f"{NAME}.timer", f"{NAME}.service")
    return text


def start_release() -> None:
    """Have `immucore reboot-lock release --after-boot` run. Raises RebootError."""
    _stop(f"{RELEASE}.service")
    words = ["reboot-lock", "release", "--after-boot"]
    _systemd(service(RELEASE, words, "Give the slot of the reboot lock back"))


def is_stopping() -> bool:
    """Tell whether the machine is on its way down already."""
    try:
        return process.run(["systemctl", "is-system-running"]).output.strip() == "stopping"
    except OSError:
        return False


def service(name: str, words: Sequence[str], description: str, calendar: str = "") -> list[str]:
    """Return the command that has systemd run the agent in the background, once or at each of some times."""
    timer = [f"--on-calendar={calendar}", "--timer-property=AccuracySec=1s"] if calendar else []
    again = ["--property=Restart=on-failure", "--property=RestartSec=60"]
    unit = [f"--unit={name}", f"--description={description}", "--collect", "--service-type=exec", *again]
    return ["systemd-run", "--quiet", "--no-ask-password", *unit, *timer, PROGRAM, *words]


def _systemd(argv: Sequence[str]) -> None:
    try:
        done = process.run(argv)
        if done.status == 0:
            return
        lines = done.output.strip().splitlines()
    except OSError as error:
        lines = [str(error.strerror)]
    reason = lines[-1] if lines else "it does not say why"
    raise RebootError(f"cannot reboot this machine: {argv[0]}: {reason}", hint=_HINT)


def _stop(*units: str) -> None:
    with contextlib.suppress(RebootError):  # they are not there: the usual case
        _systemd(["systemctl", "stop", "--quiet", *units])
