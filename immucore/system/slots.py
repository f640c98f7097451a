"""The images of COS_STATE as the two slots: which of them an upgrade keeps, and putting a new one in place.

An upgrade makes three images out of two, and one has to go. It is never the better one of the two, and what
stays is in a slot at every instant:

    active  passive  transition  spare
    A       P        N                  prepared and checked
    A       A        N           P      where A is kept: a second name of one file (link(2)), exchanged
    N       A or P   A           P      one renameat2(2), RENAME_EXCHANGE: the commit

What is in neither slot then is removed. Only the image that runs stays, as `previous.img`, until another
runs: a file system with a file that is open and has no name cannot be made read-only again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import struct
from typing import TYPE_CHECKING

from immucore import bootcount, files, superblock, syscalls
from immucore.bootcount import ACTIVE, BAD, COUNTED, GOOD, PASSIVE, RECOVERY, TRYING
from immucore.errors import ImmucoreError
from immucore.system import boot_state, images
from immucore.system.errors import UnreadableError
from immucore.system.programs import run
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from immucore.bootcount import Count
    from immucore.system.boot_state import BootState
    from immucore.system.environment import Environment

DIRECTORY = "cOS"
FILES = {ACTIVE: "active.img", PASSIVE: "passive.img", RECOVERY: "recovery.img"}
LABELS = {ACTIVE: "COS_ACTIVE", PASSIVE: "COS_PASSIVE", RECOVERY: "COS_SYSTEM"}
EARLIER_RECOVERY = "recovery.squashfs"  # as cos-toolkit has called it; its grub.cfg prefers it
TRANSITION, SPARE = "transition.img", "spare.img"  # work: whatever has these names can be removed
PREVIOUS = "previous.img"  # and this, once it does not run any more
WORK = "work."  # what the names of work directories begin with
SAVED_ENTRY, TRIES_PREFIX = "saved_entry", "tries_"
_EXT4_IOC_CHECKPOINT = 0x4004662B  # linux/Documentation/admin-guide/ext4.rst
_RANKS = (BAD, TRYING, GOOD)


class Slot(Record):
    """An image in its place."""

    name: str
    whole: bool = False  # it is there, and as long as its file system says
    image_id: str | None = None  # None also for images of others, which have none
    state: str = TRYING
    running: bool = False  # the system that runs is this image
    problem: str = ""  # why nobody can tell which one it is; it is bad then, and its count is left alone
    given_up: bool = False  # this boot could not boot it: it is bad, whatever its count says

    @property
    def counted_as(self) -> str:
        """What its boots are counted by: one without an identity by its slot, as grub.cfg has it."""
        return self.image_id or self.name


def survey(directory: str, values: Mapping[str, str], running: int = 0) -> dict[str, Slot]:
    """Look at both slots in `directory`, which is the `cOS` of COS_STATE.

    `values` are the variables of GRUB's environment block, `running` is the inode of the image that runs, 0
    if that is on another partition.
    """
    return {name: _slot(name, os.path.join(directory, FILES[name]), values, running) for name in COUNTED}


def _slot(name: str, path: str, values: Mapping[str, str], running: int) -> Slot:
    if not whole(path):
        return Slot(name=name)
    runs = running != 0 and os.stat(path).st_ino == running
    try:
        image_id = images.identity(path)
    except UnreadableError as error:
        return Slot(name=name, whole=True, state=BAD, running=runs, problem=error.message)
    state = bootcount.read(values, image_id or name).state
    return Slot(name=name, whole=True, image_id=image_id, state=state, running=runs)


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


def after_fallback(found: Mapping[str, Slot], boot: BootState) -> dict[str, Slot]:
    """Take the images that this boot could not boot for bad, whatever their counts say.

    One that cannot be loaded is passed over, and nobody has judged it. The next boot may be able to: that
    is stored only where images are moved, by moving().
    """
    failed = () if boot.moved else boot.given_up
    return {
        name: slot.replace(state=BAD, given_up=True) if name in failed else slot
        for name, slot in found.items()
    }


@contextlib.contextmanager
def moving(environment: Environment, found: Iterable[Slot], mark: str = boot_state.MOVED) -> Iterator[None]:
    """Move images: first what after_fallback() has found is stored, which until then goes by the slot.

    If that fails, nothing was moved, and what was stored is taken back. Raises CmdlineError, MountError and
    OSError.
    """
    found = [slot for slot in found if slot.whole and not slot.problem]
    others = [slot.counted_as for slot in found if not slot.given_up]  # one image can be in both slots
    bad = [slot.counted_as for slot in found if slot.given_up and slot.counted_as not in others]
    before = [bootcount.read(environment.read(), image_id) for image_id in bad]

    def store(counts: Iterable[Count]) -> None:
        environment.update(lambda values: functools.reduce(bootcount.written, counts, values))

    store(bootcount.condemned(bootcount.armed(image_id)) for image_id in bad)
    try:
        marked = os.path.exists(mark)
        with open(mark, "wb"):
            pass
        yield
    except (ImmucoreError, OSError):
        with contextlib.suppress(ImmucoreError, OSError):
            if not marked:
                os.unlink(mark)
            store(before)
        raise


def commit(directory: str, keep: str) -> None:
    """Make `transition.img` active, and of what was there before keep `keep` as passive.

    What is left over is for clean(), after settle(). Raises OSError, and has changed nothing then.
    """
    active, passive, spare = (
        os.path.join(directory, name) for name in (FILES[ACTIVE], FILES[PASSIVE], SPARE)
    )
    if keep == ACTIVE:
        os.link(active, spare)
        _place(spare, passive)
    try:
        if keep == ACTIVE:
            settle(directory)
        _place(os.path.join(directory, TRANSITION), active)
    except OSError:
        if keep == ACTIVE:
            if os.path.lexists(spare):
                syscalls.exchange(spare, passive)
            os.unlink(spare if os.path.lexists(spare) else passive)
        raise


def settle(directory: str) -> None:
    """Have the disk as it is now: GRUB replays no journal, and would boot what was there before.

    It belongs behind every change of a slot. Until then no block may be used anew that GRUB would still read
    (clean()). Raises OSError.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        with contextlib.suppress(OSError):  # no ext4, or a kernel before 5.14: being made read-only does it
            fcntl.ioctl(descriptor, _EXT4_IOC_CHECKPOINT, struct.pack("=I", 0))
    finally:
        os.close(descriptor)


def _place(new: str, place: str) -> None:
    """Put an image in its place; what was there has the name of the new one then."""
    if os.path.lexists(place):
        syscalls.exchange(new, place)
    else:
        os.rename(new, place)


def swap(directory: str) -> None:
    """Make passive active, and active passive; without an active it is both. Raises OSError.

    It has changed nothing then; settle() is to follow.
    """
    active, passive = (os.path.join(directory, FILES[name]) for name in (ACTIVE, PASSIVE))
    if os.path.lexists(active):
        syscalls.exchange(active, passive)
    else:
        os.link(passive, active)


def replace(directory: str, slot: str) -> None:
    """Put `transition.img` in the place of the image of a slot; settle() is to follow. Raises OSError."""
    _place(os.path.join(directory, TRANSITION), os.path.join(directory, FILES[slot]))
    if slot == RECOVERY:
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(directory, EARLIER_RECOVERY), os.path.join(directory, SPARE))


def clean(directory: str, running: int) -> None:
    """Remove what work has left in a `cOS` directory; `running` as of survey().

    Raises OSError and ImageError.
    """
    previous = os.path.join(directory, PREVIOUS)
    for path in [os.path.join(directory, name) for name in (TRANSITION, SPARE, PREVIOUS)]:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            if status.st_ino != running or status.st_nlink > 1:
                os.unlink(path)
            elif path != previous:
                os.rename(path, previous)
    left = [os.path.join(directory, name) for name in files.names(directory) if name.startswith(WORK)]
    if left:  # never into what a hook has mounted there
        failure = f"cannot remove what earlier work has left in '{directory}'"
        run(["rm", "--recursive", "--force", "--one-file-system", "--", *left], failure)


def arm(environment: Environment, image_id: str) -> None:
    """Give an image that is about to be put in place all its tries; they are on the disk then."""
    environment.update(lambda values: bootcount.written(values, bootcount.armed(image_id)))


def disarm(environment: Environment, image_id: str) -> None:
    """Take that back."""

    def without(values: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in values.items() if not name.endswith(f"_{image_id}")}

    environment.update(without)


def carry(
    environment: Environment,
    moves: Iterable[tuple[Slot, str]],
    known: Mapping[str, str],
    *,
    either: bool = False,
) -> None:
    """Have what is known of images go with them to another slot, where that is not by their identity.

    `known` are the variables before anything was moved. With `either` a slot has the better count of what is
    in it and of what comes: for as long as a power cut leaves one or the other.
    """

    def carried(values: dict[str, str]) -> dict[str, str]:
        for slot, name in moves:
            count = bootcount.read(known, slot.name).replace(image_id=name)
            if either:
                there = bootcount.read(known, name)
                count = count.replace(left=max(count.left, there.left), good=count.good or there.good)
            values = bootcount.written(values, count)
        return values

    moves = [(slot, name) for slot, name in moves if slot.whole and not slot.image_id and not slot.problem]
    environment.update(carried)


def forget(environment: Environment, found: Iterable[Slot]) -> None:
    """Keep nothing of images that are in no slot, and let active be the slot that is wanted."""
    found = [*found]
    unknown = any(slot.problem for slot in found)  # it may be any of those that are counted
    kept_ids = [slot.counted_as for slot in found if slot.whole]

    def without(values: dict[str, str]) -> dict[str, str]:
        left = dict(values) if unknown else bootcount.forgotten(values, kept_ids)
        if bootcount.wanted(left.get(SAVED_ENTRY, "")) != ACTIVE:
            del left[SAVED_ENTRY]
        return left

    environment.update(without)


def next_boot(values: Mapping[str, str], active: Slot, passive: Slot) -> tuple[str, str]:
    """Tell which entry the next boot boots with these images in the slots: its name, and in words."""
    found = {ACTIVE: active, PASSIVE: passive}
    broken = [name for name, slot in found.items() if slot.problem]
    ids = {n: slot.replace(name=n).counted_as if slot.whole else None for n, slot in found.items()}
    entry = bootcount.upcoming(values, ids[ACTIVE], ids[PASSIVE], broken)
    chosen = values.get("next_entry", "")
    once = ", once (immucore boot next auto takes that back)" if chosen and entry != ACTIVE else ""
    return entry, f"the next boot boots {entry}{once}"


def judged_bad(values: Mapping[str, str]) -> set[str]:
    """Give the digests of the images that GRUB's environment block knows to be bad."""
    ids = [name.removeprefix(TRIES_PREFIX) for name in values if name.startswith(TRIES_PREFIX)]
    return {digest_of(each) for each in ids if "_" in each and bootcount.read(values, each).state == BAD}


def digest_of(image_id: str | None) -> str:
    """Give the part of an identity that says what is in the image; empty where there is none."""
    return (image_id or "").partition("_")[0]
