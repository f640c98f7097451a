"""The images of COS_STATE as the two slots: which of them an upgrade keeps, and putting a new one in place.

An upgrade makes three images out of two, and one has to go. It is never the better one of the two, and what
stays is in a slot at every instant:

    active  passive  transition
    A       P        N            prepared and checked
    A       A        N            where A is kept: a second name of the same file (link(2), rename(2))
    N       A or P                one rename(2), the commit
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from immucore import bootcount, files, superblock, syscalls
from immucore.bootcount import ACTIVE, BAD, GOOD, PASSIVE, TRYING
from immucore.system import images
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

DIRECTORY = "cOS"
FILES = {ACTIVE: "active.img", PASSIVE: "passive.img"}
TRANSITION, PREVIOUS = "transition.img", "previous.img"  # work: whatever has these names can be removed
LABELS = {ACTIVE: "COS_ACTIVE", PASSIVE: "COS_PASSIVE"}
_RANKS = (BAD, TRYING, GOOD)


class Slot(Record):
    """An image in its place."""

    name: str
    whole: bool = False  # it is there, and as long as its file system says
    image_id: str | None = None  # None also for images of others, which have none
    state: str = TRYING
    running: bool = False  # the system that runs is this image


def survey(directory: str, values: Mapping[str, str], booted: str, running: str | None) -> dict[str, Slot]:
    """Look at both slots in `directory`, which is the `cOS` of COS_STATE.

    `values` are the variables of GRUB's environment block, `booted` is the mode, `running` the identity of
    the image that runs. One without is told by the slot that was booted, or, where that has been exchanged
    since, by having none.
    """
    found = {name: _slot(name, os.path.join(directory, file), values) for name, file in FILES.items()}
    if running:
        names = [name for name, slot in found.items() if slot.image_id == running]
    else:
        names = [name for name, slot in found.items() if slot.whole and not slot.image_id]
        names = [booted] if booted in names else names if booted in FILES else []
    return {name: slot.replace(running=name in names) for name, slot in found.items()}


def _slot(name: str, path: str, values: Mapping[str, str]) -> Slot:
    if not whole(path):
        return Slot(name=name)
    image_id = images.identity(path)
    state = bootcount.read(values, image_id).state if image_id else TRYING
    return Slot(name=name, whole=True, image_id=image_id, state=state)


def whole(path: str) -> bool:
    """Tell whether an image is there, of a known file system, and not cut short."""
    try:
        claimed = superblock.claimed_bytes(path)
        return 0 < claimed <= os.stat(path).st_size
    except OSError:
        return False


def kept(active: Slot, passive: Slot) -> str:
    """Say which of two images is still there after an upgrade, as passive.

    One that was judged good before one that was not, then the one that runs, then passive: so an active that
    works becomes passive, and what somebody has fallen back to stays.
    """

    def rank(slot: Slot) -> tuple[bool, int, bool, bool]:
        return slot.whole, _RANKS.index(slot.state), slot.running, slot.name == PASSIVE

    return max(active, passive, key=rank).name


def commit(directory: str, keep: str) -> None:
    """Make `transition.img` active, and of what was there before keep `keep` as passive.

    Raises OSError, and has changed nothing then.
    """
    active, passive = (os.path.join(directory, FILES[name]) for name in (ACTIVE, PASSIVE))
    new, previous = (os.path.join(directory, name) for name in (TRANSITION, PREVIOUS))
    pushed = keep == ACTIVE
    if pushed:
        os.link(active, previous)
        if os.path.lexists(passive):
            syscalls.exchange(previous, passive)
        else:
            os.rename(previous, passive)
        files.fsync(directory)
    try:
        os.rename(new, active)
    except OSError:
        if pushed:
            _take_back(previous, passive)
        raise
    files.fsync(directory)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(previous)


def _take_back(previous: str, passive: str) -> None:
    if os.path.lexists(previous):
        syscalls.exchange(previous, passive)
        os.unlink(previous)
    else:
        os.unlink(passive)


def clean(directory: str) -> None:
    """Remove what work has left in a `cOS` directory. Raises OSError and ImageError."""
    for name in (TRANSITION, PREVIOUS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
