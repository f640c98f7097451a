"""The partitions of a disk, as values, and how they get into its table (contract §1). Pure but for `write`.

Sizes are whole MiB, so that every partition is aligned for any disk, and the table is the same for a block
device and for a file. The defaults are those of Elemental; persistent takes the rest, and is the last one,
so that it can grow with the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from immucore.errors import CmdlineError, DeviceError
from immucore.system.programs import run
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MIB = 1 << 20
TABLE_MIB = 1  # in front of the first partition, and behind the last one: the table, and its copy
DEFAULT_MIB = {
    "bios": 1,
    "efi": 64,
    "oem": 64,
    "recovery": 4096,
    "state": 8192,
    "persistent": 0,
}  # 0: the rest
LEAST_MIB = {"bios": 1, "efi": 8, "oem": 16, "recovery": 16, "state": 16, "persistent": 16}
FIRMWARE = {"efi": ("efi",), "bios": ("bios",), "both": ("bios", "efi")}
SYSTEM = ("oem", "recovery", "state", "persistent")
LABELS = {"efi": "COS_GRUB"} | {name: f"COS_{name.upper()}" for name in SYSTEM}
# Of the types of the UAPI group's Discoverable Partitions only the ESP fits. /usr/local has none, and a
# partition with the type of /var or /home would be mounted by systemd-gpt-auto-generator, beside the agent.
EFI = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS = "21686148-6449-6E6F-744E-656564454649"  # GRUB's, where its core image lies
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


class Partition(Record):
    """A partition; `name` is its PARTLABEL, `label` that of its file system."""

    name: str
    size_mib: int
    label: str = ""
    fstype: str = "ext4"  # or vfat, or "": none
    type: str = LINUX  # a GUID
    uuid: str = ""  # PARTUUID; "": a new one
    start_mib: int = TABLE_MIB

    @property
    def offset_bytes(self) -> int:
        """Where it begins on its disk."""
        start: int = self.start_mib
        return start * MIB


def named(name: str, size_mib: int) -> Partition:
    """Return one of the partitions that contract §1 knows."""
    kind = {"efi": ("vfat", EFI), "bios": ("", BIOS)}
    fstype, guid = kind.get(name, ("ext4", LINUX))
    return Partition(name=name, size_mib=size_mib, label=LABELS.get(name, ""), fstype=fstype, type=guid)


def placed(partitions: Iterable[Partition]) -> tuple[Partition, ...]:
    """Put partitions one behind the other."""
    found: list[Partition] = []
    for each in partitions:
        found.append(each.replace(start_mib=end_mib(found)))
    return tuple(found)


def end_mib(partitions: Sequence[Partition]) -> int:
    """Return where the last partition ends; the copy of the table needs TABLE_MIB more."""
    return partitions[-1].start_mib + partitions[-1].size_mib if partitions else TABLE_MIB


def layout(firmware: str, sizes: Mapping[str, int], disk_mib: int, disk: str) -> tuple[Partition, ...]:
    """Lay out a disk of so many MiB for a firmware: efi, bios or both; `disk` is what messages call it.

    `sizes` are MiB by name, for those that are not to have the default. Raises DeviceError where they do not
    fit, CmdlineError for a size that no partition can have.
    """
    names = (*FIRMWARE[firmware], *SYSTEM)
    _check_sizes(firmware, names, sizes)
    wanted = {name: sizes.get(name, DEFAULT_MIB[name]) for name in names}
    least = {name: size_mib or LEAST_MIB[name] for name, size_mib in wanted.items()}
    needed_mib = sum(least.values()) + 2 * TABLE_MIB
    if needed_mib > disk_mib:
        parts = ", ".join(f"{name} {size_mib}" for name, size_mib in least.items())
        raise DeviceError(
            f"cannot put the partitions on '{disk}' of {disk_mib} MiB: they need {needed_mib} MiB, which are"
            f" {parts}, and the table {2 * TABLE_MIB}",
            hint="make some of them smaller: --partition state=2048 --partition recovery=1024",
        )
    rest_mib = disk_mib - needed_mib
    return placed(named(name, size_mib or least[name] + rest_mib) for name, size_mib in wanted.items())


def _check_sizes(firmware: str, names: Sequence[str], sizes: Mapping[str, int]) -> None:
    for name, size_mib in sizes.items():
        if name not in names:
            raise CmdlineError(
                f"cannot give partition '{name}' a size: there is none of that name",
                hint=f"those for firmware {firmware} are {', '.join(names)}",
            )
        if size_mib < LEAST_MIB[name]:
            raise CmdlineError(
                f"cannot make partition '{name}' of {size_mib} MiB",
                hint=f"it has to have {LEAST_MIB[name]} at least",
            )


def table(partitions: Iterable[Partition], sector_bytes: int = 512) -> str:
    """Write the table as a script for sfdisk(8), in the sectors of the disk."""
    lines = ["label: gpt", "unit: sectors"]
    for each in partitions:
        start, size = (mib * MIB // sector_bytes for mib in (each.start_mib, each.size_mib))
        uuid = f", uuid={each.uuid}" if each.uuid else ""
        lines.append(f"start={start}, size={size}, type={each.type}{uuid}, name={each.name}")
    return "\n".join(lines) + "\n"


def write(disk: str, partitions: Iterable[Partition], sector_bytes: int = 512) -> None:
    """Write the table to a block device or a file, beside what is in the partitions already.

    The kernel is not told. Raises ImageError.
    """
    options = ("--quiet", "--wipe=never", "--wipe-partitions=never", "--no-tell-kernel", "--no-reread")
    failure = f"cannot write the partition table of '{disk}'"
    run(["sfdisk", *options, disk], failure, typed=table(partitions, sector_bytes))
