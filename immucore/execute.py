"""Plan → Kernel, in order, with a Step for each operation."""

from __future__ import annotations

import errno
import os
import time

from immucore.errors import DeviceError, ImmucoreError, Interrupted, MakeshiftError, MountError
from immucore.plan import (
    IMPORTANT,
    REQUIRED,
    Bind,
    Check,
    Extensions,
    Grow,
    Loop,
    MachineId,
    MakeDirectory,
    Missing,
    Mount,
    Operation,
    Overlay,
    Plan,
    Seed,
    TellBootLoader,
    WriteFile,
    as_booted,
    is_below,
)
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Kernel(Protocol):
        """What linux.Kernel does, and the tests' stand-in for it."""

        def check(self, device: str, fstype: str, mode: str, repair: str) -> str:
            """Check a file system that is not mounted yet."""

        def grow(self, source: str, target: str) -> str:
            """Let a mounted file system fill its device."""

        def mount(self, source: str, target: str, fstype: str, options: tuple[str, ...]) -> str:
            """Mount a block device or a file system without one."""

        def mount_loop(self, image: str, target: str, options: tuple[str, ...], init: str) -> str:
            """Mount an image file through a loop device."""

        def bind(self, source: str, target: str) -> str:
            """Make a directory or file visible at another place too."""

        def overlay(self, target: str, backing: str) -> str:
            """Stack a writable directory on another."""

        def seed(self, source: str, target: str, image: str) -> str:
            """Copy a directory that is not there yet, or have it follow an image that is new."""

        def make_directory(self, target: str, mode: int) -> str:
            """Make a directory that is not there yet."""

        def machine_id(self, target: str, source: str) -> str:
            """Give the machine the id that it had."""

        def extensions(
            self, target: str, source: str, sets: tuple[str, ...], spared: tuple[str, ...]
        ) -> str:
            """Link images to where systemd looks for extensions."""

        def write_file(self, target: str, content: str) -> str:
            """Write a small file."""

        def tell_boot_loader(self, target: str, entry: str) -> str:
            """Set what the boot loader boots next time."""


SUCCEEDED = ("done", "present", "makeshift")


class Step(Record):
    """What became of an operation.

    Done, present (it was so already), makeshift (there, but not in full), degraded, ignored, failed,
    skipped; undone, where a slot was given up.
    """

    operation: Operation
    outcome: str
    started_usec: int  # CLOCK_MONOTONIC
    took_usec: int
    reason: str = ""
    hint: str = ""


def execute(
    plan: Plan, kernel: Kernel, record: list[Step], pause: Callable[[Operation], None] | None = None
) -> None:
    """Carry out a plan. What lies below a path that was lost is skipped, never tried.

    Each operation adds its Step to `record`, also the one that fails. What does not depend on it is done
    nevertheless: a failed boot is looked into by somebody, and goes on after the repair. Raises, at the end,
    the error of the first required operation that failed; Interrupted at once, whatever it interrupts.
    `pause` is called before each operation that is tried.
    """
    first: ImmucoreError | None = None
    lost = [path for step in record if step.outcome not in SUCCEEDED for path in step.operation.loses]
    for operation in plan:
        started_usec = time.monotonic_ns() // 1000
        failure: ImmucoreError | None = None
        below = next((path for path in lost for need in operation.needs if is_below(need, path)), None)
        if below is not None:
            why = "has failed its check" if below.startswith("/dev/") else "is not there"
            failure = MountError(f"cannot {operation}: {as_booted(below)} {why}", hint=BELOW)
        else:
            try:
                if pause is not None:
                    pause(operation)
                outcome = _call(operation, kernel)
            except OSError as error:
                failure = _explained(operation, error)
            except ImmucoreError as error:
                failure = error
        if failure is not None:
            outcome = _outcome(operation, failure, skipped=below is not None)
        step = Step(
            operation=operation,
            outcome=outcome,
            started_usec=started_usec,
            took_usec=time.monotonic_ns() // 1000 - started_usec,
            reason=failure.message if failure else "",
            hint=failure.hint if failure else "",
        )
        record.append(step)
        if failure is not None and outcome not in SUCCEEDED:
            lost += operation.loses
            if isinstance(failure, Interrupted):
                raise failure
            if outcome == "failed" and first is None:
                first = failure
    if first is not None:
        raise first


def _outcome(operation: Operation, failure: ImmucoreError, *, skipped: bool) -> str:
    if isinstance(failure, MakeshiftError):
        return "makeshift"
    if operation.criticality == REQUIRED or isinstance(failure, Interrupted):
        return "failed"
    if skipped:
        return "skipped"
    return "degraded" if operation.criticality == IMPORTANT else "ignored"


def _call(operation: Operation, kernel: Kernel) -> str:  # noqa: PLR0911, PLR0912  one for each kind
    match operation:
        case Check(target=target, fstype=fstype, mode=mode, repair=repair):
            return kernel.check(target, fstype, mode, repair)
        case Grow(source=source, target=target):
            return kernel.grow(source, target)
        case Mount(source=source, target=target, fstype=fstype, options=options):
            return kernel.mount(source, target, fstype, options)
        case Loop(source=source, target=target, options=options, init=init):
            return kernel.mount_loop(source, target, options, init)
        case Overlay(target=target, backing=backing):
            return kernel.overlay(target, backing)
        case Seed(source=source, target=target, image=image):
            return kernel.seed(source, target, image)
        case Bind(source=source, target=target):
            return kernel.bind(source, target)
        case MakeDirectory(target=target, mode=mode):
            return kernel.make_directory(target, mode)
        case MachineId(target=target, source=source):
            return kernel.machine_id(target, source)
        case Extensions(target=target, source=source, sets=sets, spared=spared):
            return kernel.extensions(target, source, sets, spared)
        case WriteFile(target=target, content=content):
            return kernel.write_file(target, content)
        case TellBootLoader(target=target, entry=entry):
            return kernel.tell_boot_loader(target, entry)
        case Missing(reason=reason, hint=hint):
            raise DeviceError(reason, hint=hint)
    raise TypeError(f"no kernel call for {type(operation).__name__}")


def _explained(operation: Operation, error: OSError) -> MountError:
    """Say what could not be done in the kernel's words, and what to do about the errors that people meet."""
    number = error.errno or 0
    hint = HINTS.get(number, "look at what the kernel says: dmesg | tail")
    return MountError(
        f"cannot {operation}: {os.strerror(number)}", hint=hint.format(target=as_booted(operation.target))
    )


BELOW = "see the step before it that failed"
HINTS = {
    errno.EROFS: "create {target} in the image, or list its parent in RW_PATHS",
    errno.ENOSPC: "free space on the file system that holds it",
    errno.ENODEV: "the kernel or the initramfs lacks this file system: compare /proc/filesystems",
    errno.EUCLEAN: "the file system is damaged: check it with fsck",
    errno.EBADMSG: "the file system is damaged: check it with fsck",
}
