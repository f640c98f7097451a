"""The layout of a disk, its table, and how much fits into a partition (immucore/system/partitions.py)."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore.errors import CmdlineError, DeviceError
from immucore.system import bootloader, filesystems, partitions
from immucore.system.partitions import MIB, Partition

GIB = 1024


def described(layout: tuple[Partition, ...]) -> list[tuple[str, str, str, int, int]]:
    return [(each.name, each.label, each.fstype, each.start_mib, each.size_mib) for each in layout]


def test_defaults() -> None:
    assert described(partitions.layout("efi", {}, 32 * GIB, "disk")) == [
        ("efi", "COS_GRUB", "vfat", 1, 64),
        ("oem", "COS_OEM", "ext4", 65, 64),
        ("recovery", "COS_RECOVERY", "ext4", 129, 4096),
        ("state", "COS_STATE", "ext4", 4225, 8192),
        ("persistent", "COS_PERSISTENT", "ext4", 12417, 32 * GIB - 12417 - 1),
    ]
    assert described(partitions.layout("bios", {}, 32 * GIB, "disk"))[:2] == [
        ("bios", "", "", 1, 1),
        ("oem", "COS_OEM", "ext4", 2, 64),
    ]
    both = partitions.layout("both", {}, 32 * GIB, "disk")
    assert [each.name for each in both][:3] == ["bios", "efi", "oem"]
    assert [each.type for each in both] == [partitions.BIOS, partitions.EFI, *4 * [partitions.LINUX]]


SIZES = st.dictionaries(st.sampled_from(partitions.SYSTEM), st.integers(16, 9000))


@given(st.sampled_from(sorted(partitions.FIRMWARE)), SIZES, st.integers(1, 100_000))
def test_a_layout_fits_and_overlaps_nowhere_or_is_refused(
    firmware: str, sizes: dict[str, int], disk_mib: int
) -> None:
    try:
        layout = partitions.layout(firmware, sizes, disk_mib, "disk")
    except DeviceError as error:
        needed = re.search(r"they need (\d+) MiB", error.message)
        assert needed
        assert int(needed[1]) > disk_mib
        assert partitions.layout(firmware, sizes, int(needed[1]), "disk")
        return
    end = partitions.TABLE_MIB
    for each in layout:
        assert each.start_mib == end
        assert each.size_mib >= partitions.LEAST_MIB[each.name]
        assert each.size_mib == sizes.get(each.name, each.size_mib)
        end += each.size_mib
    assert end + partitions.TABLE_MIB <= disk_mib
    assert "persistent" in sizes or end + partitions.TABLE_MIB == disk_mib, "persistent takes the rest"


def test_what_does_not_fit_is_told_in_numbers() -> None:
    with pytest.raises(DeviceError) as refused:
        partitions.layout("efi", {"state": 2048}, 6000, "/dev/sdb")
    assert refused.value.message == (
        "cannot put the partitions on '/dev/sdb' of 6000 MiB: they need 6290 MiB, which are efi 64, oem 64,"
        " recovery 4096, state 2048, persistent 16, and the table 2"
    )
    assert "--partition state=" in refused.value.hint


@pytest.mark.parametrize(
    ("sizes", "message", "hint"),
    [
        (
            {"bios": 1},
            "cannot give partition 'bios' a size: there is none of that name",
            "those for firmware efi are efi, oem, recovery, state, persistent",
        ),
        ({"state": 15}, "cannot make partition 'state' of 15 MiB", "it has to have 16 at least"),
        ({"persistent": 0}, "cannot make partition 'persistent' of 0 MiB", "it has to have 16 at least"),
    ],
)
def test_sizes_that_no_partition_can_have(sizes: dict[str, int], message: str, hint: str) -> None:
    with pytest.raises(CmdlineError) as refused:
        partitions.layout("efi", sizes, 32 * GIB, "disk")
    assert (refused.value.message, refused.value.hint) == (message, hint)


def test_table() -> None:
    layout = partitions.placed(
        [Partition(name="one", size_mib=2, uuid="u-u"), Partition(name="two", size_mib=3, type="T")]
    )
    assert partitions.table(layout) == (
        "label: gpt\nunit: sectors\n"
        f"start=2048, size=4096, type={partitions.LINUX}, uuid=u-u, name=one\n"
        "start=6144, size=6144, type=T, name=two\n"
    )
    assert "start=256, size=512," in partitions.table(layout, sector_bytes=4096)


@given(st.integers(1, 64 * GIB * MIB))
def test_the_least_size_has_room_and_the_next_smaller_one_has_not(needed: int) -> None:
    least = filesystems.least_mib(needed)
    assert filesystems.room_bytes(least) >= needed > filesystems.room_bytes(least - 1)


def test_grub_is_told_where_its_core_image_lies() -> None:
    code, core = bootloader.patched(bytes(512), b"c" * 1024, 2048)
    assert len(code) == 440
    assert code[0x5C:0x64] == (2048).to_bytes(8, "little")
    assert code[0x66:0x68] == b"\x90\x90"
    assert not code.strip(b"\0\x90\x08"), "nothing else"
    assert core[0x1F4:0x1FC] == (2049).to_bytes(8, "little")
    assert core[:0x1F4] + core[0x1FC:] == b"c" * (1024 - 8)
