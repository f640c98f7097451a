"""Growing the last partition of a disk, and the file system on it, as a step of a stage asks for it.

With sfdisk, which has to be in the initramfs; nothing is started where there is nothing to gain.
"""

from __future__ import annotations

import os

from immucore import growth, observe, superblock, syscalls
from immucore.stage_tools import StepError, command

SECTOR_BYTES = 512  # sysfs counts in these, whatever the disk's own are
MIB = 1 << 20
TABLE_BYTES = 2 * MIB  # what the start of the disk, the backup of its table and alignment may take


def expand(asked: tuple[str, str, int]) -> None:
    """Grow a partition, named by (label or path, value, MiB or 0 for all there is). Raises StepError."""
    kind, value, size_mib = asked
    source = _labelled(value) if kind == "label" else os.path.realpath(value)
    name = os.path.basename(source)
    place = os.path.realpath(f"/sys/class/block/{name}")
    if not os.path.exists(f"{place}/partition"):
        raise StepError(f"{source} is no partition")
    disk = os.path.dirname(place)
    number, has = _number(f"{place}/partition"), _number(f"{place}/size") * SECTOR_BYTES
    end = _number(f"{place}/start") * SECTOR_BYTES + has
    free = _number(f"{disk}/size") * SECTOR_BYTES - end
    wanted = size_mib * MIB if size_mib else has + free
    if free > TABLE_BYTES and wanted > has:
        _refuse_all_but_the_last(disk, name, end)
        # --no-reread: other partitions of the disk are in use; partx tells the kernel of this one.
        size = f"{size_mib}MiB" if size_mib else "+"
        options = ("--no-reread", "--no-tell-kernel", "--force", "--quiet")
        device = f"/dev/{os.path.basename(disk)}"
        command("sfdisk", *options, "-N", str(number), device, typed=f",{size}\n")
        command("partx", "--update", "--nr", str(number), device)
    _grow_file_system(source)


def _labelled(label: str) -> str:
    """Find the partition with a label, as a boot would; nothing is guessed of several."""
    found = observe.devices().candidates(f"LABEL={label}")
    if len(found) != 1:
        raise StepError(f"{len(found) or 'no'} file systems are labelled {label}")
    return os.path.realpath(found[0].path)


def _number(path: str) -> int:
    return int(observe.text(path, missing="0"))


def _refuse_all_but_the_last(disk: str, name: str, end: int) -> None:
    with os.scandir(disk) as entries:
        others = [each.path for each in entries if each.name != name]
    for other in others:
        if os.path.exists(f"{other}/partition") and _number(f"{other}/start") * SECTOR_BYTES >= end:
            raise StepError(f"{os.path.basename(other)} lies behind {name}: it cannot grow")


def _grow_file_system(source: str) -> None:
    """Let a file system fill its partition, by a mount of it that nobody sees."""
    fstype = superblock.identify(source).fstype
    if not fstype:
        raise StepError(f"no file system is known on {source}")
    tree = syscalls.detached_mount(source, fstype, read_only=False)
    try:
        growth.grow(source, f"/proc/self/fd/{tree}")
    finally:
        os.close(tree)
