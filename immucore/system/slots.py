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
from immucore.bootcount import ACTIVE, BAD, COUNTED, GOOD, PASSIVE, RECOVERY, TRYING
from immucore.system import images
from immucore.system.programs import run
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from immucore.system.environment import Environment

DIRECTORY = "cOS"
FILES = {ACTIVE: "active.img", PASSIVE: "passive.img", RECOVERY: "recovery.img"}
LABELS = {ACTIVE: "COS_ACTIVE", PASSIVE: "COS_PASSIVE", RECOVERY: "COS_SYSTEM"}
EARLIER_RECOVERY = "recovery.squashfs"  # as cos-toolkit has called it; its grub.cfg prefers it
TRANSITION, PREVIOUS = "transition.img", "previous.img"  # work: whatever has these names can be removed
WORK = "work."  # what the names of work directories begin with
SAVED_ENTRY, TRIES_PREFIX = "saved_entry", "tries_"
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
    found = {name: _slot(name, os.path.join(directory, FILES[name]), values) for name in COUNTED}
    if running:
        names = [name for name, slot in found.items() if slot.image_id == running]
    else:
        names = [name for name, slot in found.items() if slot.whole and not slot.image_id]
        names = [booted] if booted in names else names if booted in COUNTED else []
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


def commit_recovery(directory: str) -> None:
    """Make `transition.img` the recovery image of the `cOS` of COS_RECOVERY. Raises OSError."""
    os.rename(os.path.join(directory, TRANSITION), os.path.join(directory, FILES[RECOVERY]))
    files.fsync(directory)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, EARLIER_RECOVERY))


def clean(directory: str) -> None:
    """Remove what work has left in a `cOS` directory. Raises OSError and ImageError."""
    for name in (TRANSITION, PREVIOUS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    left = [os.path.join(directory, name) for name in files.names(directory) if name.startswith(WORK)]
    if left:  # never into what a hook has mounted there
        failure = f"cannot remove what earlier work has left in '{directory}'"
        run(["rm", "--recursive", "--force", "--one-file-system", "--", *left], failure)


def arm(environment: Environment, image_id: str) -> None:
    """Give an image that is about to be put in place all its tries; they are on the disk then."""
    environment.write(bootcount.written(environment.read(), bootcount.armed(image_id)))


def disarm(environment: Environment, image_id: str) -> None:
    """Take that back."""
    values = environment.read()
    environment.write({name: value for name, value in values.items() if not name.endswith(f"_{image_id}")})


def forget(environment: Environment, found: Iterable[Slot]) -> None:
    """Keep nothing of images that are in no slot, and let active be the slot that is wanted."""
    values = environment.read()
    kept_values = bootcount.forgotten(values, [slot.image_id for slot in found if slot.image_id])
    if bootcount.wanted(kept_values.get(SAVED_ENTRY, "")) != ACTIVE:
        del kept_values[SAVED_ENTRY]
    if kept_values != values:
        environment.write(kept_values)


def judged_bad(values: Mapping[str, str]) -> set[str]:
    """Give the digests of the images that GRUB's environment block knows to be bad."""
    ids = [name.removeprefix(TRIES_PREFIX) for name in values if name.startswith(TRIES_PREFIX)]
    return {digest_of(each) for each in ids if bootcount.read(values, each).state == BAD}


def digest_of(image_id: str | None) -> str:
    """Give the part of an identity that says what is in the image; empty where there is none."""
    return (image_id or "").partition("_")[0]
