"""What an installation puts on a disk, and in which order.

First everything is made and checked beside the disk, then it is written, and the table of partitions last.
So until the first byte is written the disk is as it was, and from then to the end it is blank for every
firmware and every kernel: an installation that was interrupted is none.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from immucore import bootcount, grubenv
from immucore.errors import DeviceError, ImmucoreError, Interrupted
from immucore.system import (
    bootable,
    bootloader,
    content,
    filesystems,
    images,
    partitions,
    slots,
    state_file,
    stopping,
)
from immucore.system.errors import told
from immucore.system.partitions import MIB
from immucore.system.state_file import Entry, State
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from immucore.system.console import Console
    from immucore.system.disks import Disk
    from immucore.system.partitions import Partition
    from immucore.system.sources import Source

ENVIRONMENT = "grubenv"  # on OEM


class Made(Record):
    """What was made of a source: what state.yaml says of each slot, and what another image would take."""

    entries: dict[str, Entry]
    upgrade_bytes: int


def make(source: Source, fstype: str, work: str, console: Console) -> Made:
    """Unpack a source, and make an image of it for each slot, in the directory `work`.

    Raises ImmucoreError and OSError.
    """
    tree = os.path.join(work, "tree")
    with console.step(f"reading {source.text}"):
        source.look()
    _check_scratch(source, fstype, work)
    with console.step(f"unpacking {source.text}") as advance:
        digest = source.unpack(tree, advance)
    bootable.check(tree)
    made, date = {}, state_file.now()
    for slot, partition in state_file.PARTITIONS.items():
        directory = os.path.join(work, partition, slots.DIRECTORY)
        os.makedirs(directory, exist_ok=True)
        path, image_id = os.path.join(directory, f"{slot}.img"), images.new_identity(digest)
        with console.step(f"making {slot}.img, {fstype}") as advance:
            images.build(
                tree, path, fstype=fstype, label=slots.LABELS[slot], image_id=image_id, advance=advance
            )
        with console.step(f"checking {slot}.img") as advance:
            images.verify(path, tree, advance)
        known = {"source": source.text, "digest": source.digest, "date": date, "action": "install"}
        made[slot] = Entry(image_id=image_id, label=slots.LABELS[slot], fs=fstype, **known)
    upgrade_bytes = content.room(tree).bytes + os.path.getsize(path)
    shutil.rmtree(tree)
    return Made(entries=made, upgrade_bytes=upgrade_bytes)


def _check_scratch(source: Source, fstype: str, work: str) -> None:
    """Raise DeviceError where there is no room for the tree and, as far as that is known, its images."""
    needed = source.needs_bytes * (1 + len(slots.LABELS) if fstype == images.EXT4 else 1)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise DeviceError(
            f"cannot make images in '{os.path.dirname(work)}': it takes {-(-needed // MIB)} MiB,"
            f" and {free // MIB} are free",
            hint="take a directory with more room: --scratch DIR",
        )


def stage(made: Made, oem: Sequence[str], layout: Sequence[Partition], work: str) -> None:
    """Put what partitions hold besides images into `work` too: a directory for each that has any files.

    Raises ImmucoreError and OSError.
    """
    values: dict[str, str] = {}
    for slot in bootcount.COUNTED:
        values = bootcount.written(values, bootcount.armed(made.entries[slot].image_id))
    state = State()
    for slot, entry in made.entries.items():
        state.record(slot, entry)
    for partition in ("state", "recovery"):
        state_file.write(os.path.join(work, partition), state)
    directory = os.path.join(work, "oem")
    os.mkdir(directory)
    with open(os.path.join(directory, ENVIRONMENT), "wb") as file:
        file.write(grubenv.render(values))
    for path in oem:
        copy = shutil.copyfile(path, os.path.join(directory, os.path.basename(path)))
        os.chmod(copy, 0o600)  # cloud-init files have passwords and keys in them
    if any(each.name == "efi" for each in layout):
        bootloader.efi_tree(bootloader.menu(), os.path.join(work, "efi"))


def check_room(layout: Sequence[Partition], made: Made, work: str) -> list[str]:
    """Raise DeviceError where a partition has no room for what was made for it.

    Returns where there is none for what an upgrade puts beside it.
    """
    notes = []
    for each in layout:
        needed, room = _bytes(os.path.join(work, each.name)), filesystems.room_bytes(each.size_mib)
        if each.fstype and needed > room:
            raise DeviceError(
                f"cannot put {-(-needed // MIB)} MiB on partition '{each.name}':"
                f" of its {each.size_mib} MiB it has room for {room // MIB}",
                hint=f"--partition {each.name}={filesystems.least_mib(needed)}",
            )
        upgraded = needed + made.upgrade_bytes
        if each.name in state_file.PARTITIONS.values() and upgraded > room:
            least = filesystems.least_mib(upgraded)
            notes.append(f"no room for an upgrade of this size: that takes --partition {each.name}={least}")
    return notes


def _bytes(directory: str) -> int:
    return sum(
        os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(directory) for name in names
    )


def write(disk: Disk, layout: Sequence[Partition], work: str, console: Console) -> None:
    """Write it all: what is on the disk is lost from here on. Raises DeviceError."""
    try:
        _write(disk, layout, work, console)
        stopping.hold()
    except (ImmucoreError, OSError) as error:
        stopping.hold()
        so = "is as it was"
        if disk.touched:
            so = "is blank now"
            try:
                disk.erase()
            except (ImmucoreError, OSError) as again:
                if disk.described or isinstance(again, ImmucoreError):  # else without a table it is blank
                    so = "no longer is what it was"
        if isinstance(error, Interrupted):
            raise Interrupted(f"stopped: '{disk.name}' {so}") from None
        reason = error.message if isinstance(error, ImmucoreError) else told(error)
        raise DeviceError(
            f"cannot write '{disk.name}', which {so}: {reason}",
            hint="see what the kernel says of it: dmesg | tail",
        ) from None
    try:
        disk.announce()
    except ImmucoreError as error:  # all is written
        console.say(f"warning: {error.message}; restart, or: partprobe {disk.path}")


def _write(disk: Disk, layout: Sequence[Partition], work: str, console: Console) -> None:
    disk.erase()
    with console.step("writing the partitions") as advance:
        for each in layout:
            advance(each.start_mib, disk.size_mib)
            disk.clear(each)
            _fill(disk, each, work)
        disk.flush()
    with console.step("writing the table of partitions"):
        disk.described = True
        partitions.write(disk.path, layout, disk.sector_bytes)
        disk.flush()


def _fill(disk: Disk, partition: Partition, work: str) -> None:
    """Make what one partition holds."""
    directory = os.path.join(work, partition.name)
    if partition.name == "bios":
        bootloader.write_bios(disk, partition, bootloader.menu(), work)
        return
    with disk.lent():
        filesystems.make(
            disk.path,
            partition,
            directory if os.path.isdir(directory) else "",
            sector_bytes=disk.sector_bytes,
            lazy=disk.is_device,
        )
