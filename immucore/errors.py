"""What can go wrong, by who can put it right; the classes carry the exit status (contract §9)."""

from __future__ import annotations

OTHER_SLOT = "boot another slot from the boot menu, and install this one again from there"


class ImmucoreError(Exception):
    """One sentence saying what could not be done and why; `hint` says what to type or change."""

    exit_status = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CmdlineError(ImmucoreError):
    """The operator at the boot menu can put it right."""

    exit_status = 2


class LayoutError(ImmucoreError):
    """The author of cos-layout.env can put it right."""

    exit_status = 2


class DeviceError(ImmucoreError):
    """The installer or the cabling: a disk, partition or file system is missing or ambiguous."""

    exit_status = 3


class AmbiguousError(DeviceError):
    """Several devices answer to one name, or the boot disk is gone: nothing is guessed, in no slot."""


class MountError(ImmucoreError):
    """The kernel refused; the message ends with its words."""

    exit_status = 4


class KernelMismatchError(MountError):
    """The image is whole, but of another kernel than the one that runs."""


class MakeshiftError(ImmucoreError):
    """What was asked for is there, though not in full: the boot goes on with it, degraded."""

    exit_status = 4


class Interrupted(ImmucoreError):
    """Somebody stopped the agent in the middle: half a system must not be booted."""

    exit_status = 4
