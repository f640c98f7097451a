"""What the steps of a stage are done with: programs of the system at `/`, and its files."""

from __future__ import annotations

import os
import re
import stat

from immucore import envfile, observe, process
from immucore.errors import ImmucoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeVar

    Value = TypeVar("Value")

COMMAND_SEC = 300.0  # for one program


class StepError(ImmucoreError):
    """A part of a step that could not be done."""


def command(name: str, *arguments: str, typed: str = "") -> str:
    """Run a program of the system; return what it printed. Raises StepError."""
    path = process.find(name)
    if path is None:
        raise StepError(f"there is no {name} here")
    finished = process.run_apart((path, *arguments), timeout_sec=COMMAND_SEC, typed=typed.encode())
    if finished.status:
        said = finished.output.strip().rpartition("\n")[2]
        raise StepError(f"{name} ended with status {finished.status}: {said}")
    return finished.output


def together(do: Callable[[Value], None], values: Iterable[Value]) -> None:
    """Do each, also after one that fails; raise what failed as one StepError."""
    failures = []
    for value in values:
        try:
            do(value)
        except (ImmucoreError, OSError, ValueError) as error:
            failures.append(told(error))
    if failures:
        raise StepError("; ".join(failures))


def told(error: Exception) -> str:
    """Say an error in one sentence."""
    if isinstance(error, OSError):
        return f"{error.filename or 'it'}: {error.strerror}"
    return str(error)


def write(path: str, content: bytes, mode: int = -1, owner: tuple[int, int] = (-1, -1)) -> None:
    """Write a file in one step; what is no regular file, such as a setting of /proc, as it is.

    Without a mode what was there keeps its own.
    """
    real = os.path.realpath(path)
    os.makedirs(os.path.dirname(real), exist_ok=True)
    try:
        status = os.stat(real)
    except FileNotFoundError:
        there = None
    else:
        there = status
    if there and not stat.S_ISREG(there.st_mode):
        in_place(real, content)
        return
    new = f"{os.path.dirname(real)}/.{os.path.basename(real)[:200]}.new"
    if mode < 0:
        mode = stat.S_IMODE(there.st_mode) if there else 0o644
    if owner == (-1, -1) and there:
        owner = there.st_uid, there.st_gid
    try:
        _new_file(new, content, mode, owner)
        os.rename(new, real)
    except OSError as error:
        _forget(new)
        if not there:
            error.filename, error.filename2 = path, None
            raise
        in_place(real, content)  # something is mounted on it, or its directory cannot be written


def _new_file(path: str, content: bytes, mode: int, owner: tuple[int, int]) -> None:
    _forget(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)


def _forget(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # there is none, or what comes next meets it


def in_place(path: str, content: bytes) -> None:
    """Write to what is there already, as it is."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def write_environment(path: str, values: Mapping[str, str]) -> None:
    """Set variables in a file of NAME="value" lines, and keep the others. Raises LayoutError."""
    for name in values:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise StepError(f"'{name[:80]}' is no name of a variable")
    whole = {**envfile.parse(observe.whole(path), path), **values}
    write(path, "".join(f"{name}={_quoted(value)}\n" for name, value in whole.items()).encode())


def _quoted(value: str) -> str:
    return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'
