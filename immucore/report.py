"""What a boot leaves behind in /run/immucore (contract §8), and the last words of one that failed."""

from __future__ import annotations

import os

# The json module imports re, which would cost a boot 7 ms; this is what json itself encodes with.
from _json import encode_basestring_ascii, make_encoder

from immucore import __version__
from immucore.errors import KernelMismatchError
from immucore.execute import SUCCEEDED
from immucore.fstab import escape
from immucore.log import printable
from immucore.observe import text
from immucore.plan import OPTIONAL, Bind, Loop, Mount, Overlay, as_booted
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from immucore.errors import ImmucoreError
    from immucore.execute import Step
    from immucore.observe import MountPoint
    from immucore.plan import Operation, Plan

DIRECTORY = "/run/immucore"
SCHEMA = 1
MAX_CONSOLE_CHARACTERS = 8000  # 115200 baud are 11520 a second
HASH = "\\043"  # mountinfo escapes it, fstab does not


class Wait(Record):
    """What was waited for, and how long."""

    specs: tuple[str, ...]
    missing: tuple[str, ...]  # of them, what never came
    took_usec: int


class Failure(Record):
    """A slot that could not be booted."""

    mode: str
    error: ImmucoreError


def stage_marker(stage: str) -> str:
    """Name the file that says that a cloud-init stage was done, for what, and what became of it."""
    return f"{DIRECTORY}/stage-{stage}.json"


def why_not(failures: list[Failure]) -> str:
    """Say why other slots than the one that is booted were not."""
    return "; ".join(dict.fromkeys(f"{each.mode}: {each.error.message}" for each in failures))


def together(failures: list[Failure]) -> ImmucoreError:
    """Make one error of those of all slots: that of the one that was asked for, and why no other helped."""
    first, *others = failures
    if not others:
        return first.error
    message = f"{first.error.message}; and instead of {first.mode}: {why_not(others)}"
    return type(first.error)(message, hint=first.error.hint)


def json(value: object) -> str:
    """Write a value of dicts, lists, strings, numbers, booleans, None and records as JSON (RFC 8259)."""
    return "".join(_encode(value, 0))


def _fields(value: object) -> dict[str, object]:
    if isinstance(value, Record):
        return dict(value.items())
    raise TypeError(f"no JSON for {type(value).__name__}")


# What json.JSONEncoder makes of these: check_circular, default, ensure_ascii, indent, separators, sort_keys,
# skipkeys, allow_nan. The arguments have no names.
_encode = make_encoder(None, _fields, encode_basestring_ascii, None, ":", ",", False, False, False)


def operation(each: Operation) -> dict[str, object]:
    """Give an operation as plan.json and steps.json show it."""
    return {"kind": each.kind, "text": str(each), **{k: v for k, v in each.items() if k != "content"}}


def plan(value: Plan) -> dict[str, object]:
    """Give a plan as plan.json shows it."""
    return {
        "schema": SCHEMA,
        "operations": [operation(each) for each in value],
        "notes": value.notes,
        "warnings": value.warnings,
    }


def steps(record: list[Step]) -> dict[str, object]:
    """Give what was done as steps.json shows it."""
    return {
        "schema": SCHEMA,
        "steps": [{**dict(step.items()), "operation": operation(step.operation)} for step in record],
    }


def degraded(record: list[Step]) -> list[str]:
    """List the reasons why a boot is not the one that was asked for."""
    return [
        f"{as_booted(step.operation.target)}: {step.reason}"
        for step in record
        if step.outcome in ("degraded", "makeshift")
        or (step.outcome == "skipped" and step.operation.criticality != OPTIONAL)
    ]


def result(
    *,
    outcome: str,
    exit_status: int,
    mode: str,
    booted: str,
    failures: list[Failure],
    next_entry: str,
    degraded: list[str],
    conflicts: list[str],
    error: ImmucoreError | None,
    record: list[Step],
    waits: list[Wait],
    started_usec: int,
    ended_usec: int,
) -> dict[str, object]:
    """Give the outcome as result.json shows it.

    `outcome` stands at its beginning, where the guard looks for it.
    """
    root = next(
        (step for step in record if isinstance(step.operation, Loop) and step.outcome in SUCCEEDED), None
    )
    status = os.stat(root.operation.target) if root else None
    return {
        "schema": SCHEMA,
        "outcome": outcome,
        "exit_status": exit_status,
        "mode_asked": mode,
        "mode_booted": booted if outcome in ("ok", "degraded") else "",
        "error": {"message": error.message, "hint": error.hint} if error else None,
        "failures": [
            {
                "mode": each.mode,
                "message": each.error.message,
                # Its own kernel may well boot it.
                "other_kernel": isinstance(each.error, KernelMismatchError),
            }
            for each in failures
        ],
        "next_entry": next_entry,
        "degraded": degraded,
        "conflicts": conflicts,  # what the image has another version of, and stayed as somebody has made it
        "root": {"dev": f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}", "ino": status.st_ino}
        if status
        else None,
        "waits": waits,
        "started_usec": started_usec,
        "took_usec": ended_usec - started_usec,
        "version": __version__,
    }


def mount_points(record: list[Step], place: Callable[[str], str], table: tuple[MountPoint, ...]) -> str:
    """List what has to be mounted still at the switch to the new root, for the guard: `major:minor path`.

    `place` says where an operation on a target has mounted, as in the fifth field of mountinfo.
    """
    devices = {mount.target: mount.device for mount in table}
    lines = set()
    for step in record:
        if isinstance(step.operation, Mount | Loop | Bind | Overlay) and step.outcome in SUCCEEDED:
            target = place(step.operation.target)
            lines.add(f"{devices.get(target, 'gone')} {escape(target).replace('#', HASH)}\n")
    return "".join(sorted(lines))


def summary(error: ImmucoreError, step: Step | None, end: str = "The boot stops here.") -> str:
    """Say what a person at the console has to know: what, why, what to type, and what happens now."""
    doing = f"\n  while: {step.operation} ({step.operation.why})" if step else ""
    hint = f"\n  hint: {error.hint}" if error.hint else ""
    return f"immucore: {error.message}{doing}{hint}\n  {end} More: immucore doctor"


def for_terminal(message: str) -> str:
    """Give what a terminal shows of a message: no commands to it, and no more than it writes in a second."""
    shown = printable(message)
    if len(shown) <= MAX_CONSOLE_CHARACTERS:
        return shown
    half = MAX_CONSOLE_CHARACTERS // 2
    return f"{shown[:half]}\n  ... (all of it is in {DIRECTORY}/immucore.log)\n  ...{shown[-half:]}"


def for_console(message: str) -> bytes:
    """Give the bytes that show a message on a console, which nobody has set to any mode."""
    return f"\n{for_terminal(message)}\n".replace("\n", "\r\n").encode()


def to_consoles(message: str) -> None:
    """Write to every console= device; /dev/console would be only the last of them."""
    content = for_console(message)
    for name in text("/sys/class/tty/console/active").split() or ["console"]:
        try:
            console = os.open(f"/dev/{name}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(console, content)
            finally:
                os.close(console)
        except OSError:
            continue  # a console without a device behind it; the others have the message, and the log
