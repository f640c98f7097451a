"""Checking, repairing and growing real file systems on real block devices, as root."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import native
import pytest
from native import command, isolated

from immucore import fsck, observe, process, superblock
from immucore.devices import Device, Devices, Wanted
from immucore.errors import MountError
from immucore.linux import DONE, PRESENT, Kernel
from immucore.log import Log

MIB = 1 << 20
WITH_SPARES = ("-b", "1024")  # 8 MiB to the backup, not 128


@pytest.fixture
def log() -> Log:
    """Give a log whose lines can be read."""
    return Log(journal=True)


@pytest.fixture(autouse=True)
def _boot() -> None:
    """Begin another boot: what is checked is checked once in each."""
    fsck.checked.clear()
    fsck.rescued.clear()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Give what makes a file system on a loop device."""
    native.require_root()
    devices: list[str] = []

    def make(fstype: str = "ext4", *options: str, size_mib: int = 32, label: str = "DATA") -> str:
        image = tmp_path / f"{len(devices)}.img"
        image.touch()
        os.truncate(image, size_mib * MIB)
        if fstype == "vfat":
            command("mkfs.vfat", "-n", label, *options, image)
        elif fstype.startswith("ext"):
            command("mke2fs", "-q", "-F", "-t", fstype, "-L", label, *options, image)
        else:
            command(f"mkfs.{fstype}", "-q", "-L", label, *options, image)
        devices.append(command("losetup", "--find", "--show", image).strip())
        return devices[-1]

    yield make
    for device in devices:
        command("losetup", "--detach", device)


def write(device: str, offset: int, data: bytes) -> None:
    """Damage a device."""
    with open(device, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file)


def debugfs(device: str, *requests: str) -> None:
    for request in requests:
        command("debugfs", "-w", "-R", request, device)
    command("blockdev", "--flushbufs", device)


def text(log: Log) -> str:
    return "\n".join(log.lines)


def test_a_clean_file_system_starts_no_program(loop: Callable[..., str], log: Log) -> None:
    device = loop()
    assert Kernel(log=log).check(device, "ext4", "auto", "preen") == PRESENT
    assert log.lines == []


@pytest.mark.parametrize("repair", ["preen", "yes"])
def test_errors_are_repaired_once(loop: Callable[..., str], log: Log, repair: str) -> None:
    device = loop()
    debugfs(device, "set_super_value state 2")
    kernel = Kernel(log=log)

    assert kernel.check(device, "ext4", "auto", repair) == DONE
    assert kernel.check(device, "ext4", "force", repair) == PRESENT

    option = {"preen": "-p", "yes": "-y"}[repair]
    assert f"{device} contains a file system with errors: checking it with" in text(log)
    assert f"e2fsck -f {option}" in text(log)
    assert text(log).count("checking it with") == 1
    assert f"{device}: repaired" in text(log)
    assert superblock.damage(device, "ext4", 0) == ""


def test_force_checks_what_is_clean(loop: Callable[..., str], log: Log) -> None:
    device = loop()
    assert Kernel(log=log).check(device, "ext4", "force", "preen") == DONE
    assert f"{device} has to be checked (fsck.mode=force)" in text(log)
    assert f"{device}: nothing had to be repaired" in text(log)


def test_fsck_repair_no_changes_nothing(loop: Callable[..., str], log: Log) -> None:
    device = loop()
    debugfs(device, "set_super_value state 2", "clri <11>")
    before = Path(device).read_bytes()

    with pytest.raises(MountError) as caught:
        Kernel(log=log).check(device, "ext4", "auto", "no")

    assert f"cannot repair '{device}': " in caught.value.message
    assert "e2fsck -f -n ended with status 4: " in caught.value.message
    assert Path(device).read_bytes() == before


def test_what_preen_leaves_alone_is_told_with_what_to_type(loop: Callable[..., str], log: Log) -> None:
    device = loop()
    debugfs(device, "set_super_value state 2", "clri <2>")

    with pytest.raises(MountError) as caught:
        Kernel(log=log).check(device, "ext4", "auto", "preen")

    assert "e2fsck -f -p ended with status 4: " in caught.value.message
    assert "UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY." in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint == (
        f"type e2fsck -f {device} and answer its questions,"
        " or boot once with fsck.repair=yes, which says yes to all of them"
    )
    with pytest.raises(MountError, match="ended with status 4"):
        Kernel(log=log).check(device, "ext4", "auto", "preen")
    assert text(log).count("checking it with") == 1


def test_yes_repairs_what_preen_leaves_alone(loop: Callable[..., str], log: Log) -> None:
    device = loop()
    debugfs(device, "set_super_value state 2", "clri <2>")
    assert Kernel(log=log).check(device, "ext4", "auto", "yes") == DONE
    command("e2fsck", "-fn", device)


def test_the_dirty_bit_of_fat_is_cleared(loop: Callable[..., str], log: Log) -> None:
    device = loop("vfat", "-F", "16")
    write(device, 37, b"\1")
    assert Kernel(log=log).check(device, "vfat", "auto", "preen") == DONE
    assert superblock.damage(device, "vfat", 0) == ""


def test_what_is_mounted_is_left_alone(loop: Callable[..., str], log: Log, tmp_path: Path) -> None:
    device = loop("ext4", "-O", "^has_journal")
    mounted_and_checked(device, log, tmp_path)


@isolated(user=False)
def mounted_and_checked(device: str, log: Log, tmp_path: Path) -> None:
    command("mount", device, tmp_path)
    assert superblock.damage(device, "ext4", 0) == "was not cleanly unmounted"  # it is mounted rw
    assert Kernel(log=log).check(device, "ext4", "auto", "preen") == PRESENT
    assert Kernel(log=log).check(device, "ext4", "force", "preen") == PRESENT
    assert log.lines == []


def test_without_a_program_it_is_mounted_as_it_is(
    loop: Callable[..., str], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = loop()
    debugfs(device, "set_super_value state 2")
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", "/nowhere")

    assert Kernel(log=log).check(device, "ext4", "auto", "preen") == PRESENT

    assert f"{device} contains a file system with errors, and there is no e2fsck in the initramfs" in text(
        log
    )


@pytest.fixture
def own_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder in which the agent looks for programs first."""
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(folder: Path, script: str) -> None:
    """Put an e2fsck of ours where the agent looks for it."""
    (folder / "e2fsck").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "e2fsck").chmod(0o755)


@pytest.mark.parametrize(
    ("statuses", "fine"), [((2, 0), True), ((3, 1), True), ((2, 2), False), ((2, 4), False), ((12,), False)]
)
def test_a_reboot_is_another_look(
    statuses: Sequence[int], fine: bool, loop: Callable[..., str], log: Log, own_programs: Path
) -> None:
    """Nothing is mounted from it, so there is nothing in memory that only a reboot would clear."""
    device, tmp_path = loop(), own_programs
    debugfs(device, "set_super_value state 2")
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    program(
        tmp_path,
        f"cd {tmp_path}; read -r status <statuses; sed -i 1d statuses; echo last words; exit $status",
    )

    if fine:
        assert Kernel(log=log).check(device, "ext4", "auto", "preen") == DONE
    else:
        with pytest.raises(MountError, match=f"ended with status {statuses[-1]}: last words$"):
            Kernel(log=log).check(device, "ext4", "auto", "preen")
    assert (tmp_path / "statuses").read_text() == ""


# A superblock that is broken


def test_the_checksum_is_that_of_the_kernel() -> None:
    assert fsck.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # RFC 3720, B.4


@pytest.mark.parametrize("block_bytes", [1024, 2048, 4096])
def test_the_backup_is_found(block_bytes: int, loop: Callable[..., str]) -> None:
    device = loop("ext4", "-b", str(block_bytes), size_mib=block_bytes * block_bytes * 9 // MIB)
    write(device, 1024, bytes(1024))
    (spare,) = fsck.spares(device)
    assert (spare.block_bytes, spare.label) == (block_bytes, "DATA")
    assert spare.block == {1024: 8193, 2048: 16384, 4096: 32768}[block_bytes]


def test_a_backup_of_an_earlier_file_system_is_none(loop: Callable[..., str]) -> None:
    """Where mkfs has left what lay further in; e2fsck would put it over what is there now."""
    device = loop("ext4", *WITH_SPARES, label="OLD")
    copy = Path(device).read_bytes()[8193 * 1024 : 8194 * 1024]
    command("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", "nodiscard", "-L", "NEW", device)
    write(device, 8193 * 1024, copy)
    write(device, 1024, bytes(1024))
    assert fsck.spares(device) == []


@pytest.mark.parametrize(
    "damage", ["magic", "checksum", "label", "group", "size", "per group", "meta_bg", "short"]
)
def test_a_backup_that_is_damaged_is_none(damage: str, loop: Callable[..., str]) -> None:
    device = loop("ext4", *WITH_SPARES)
    at = 8193 * 1024
    changes = {
        "magic": (56, b"\0\0"),
        "checksum": (1020, b"\0\0\0\0"),
        "label": (120, b"X"),
        "group": (90, b"\2\0"),
        "size": (4, b"\xff\xff\xff\x7f"),
        "per group": (32, struct.pack("<I", 4096)),
        "meta_bg": (96, bytes([Path(device).read_bytes()[at + 96] | 0x10])),
        "short": (0, b""),
    }
    offset, data = changes[damage]
    write(device, at + offset, data)
    if damage not in ("checksum", "label"):  # a right checksum over what is wrong
        block = Path(device).read_bytes()[at : at + 1020]
        write(device, at + 1020, struct.pack("<I", fsck.crc32c(block)))
    if damage == "short":
        os.truncate(command("losetup", "-nO", "BACK-FILE", device).strip(), 4 * MIB)
        command("losetup", "--set-capacity", device)
    assert fsck.spares(device) == []


def test_a_wrong_checksum_is_repaired_when_mounting_fails(
    loop: Callable[..., str], log: Log, tmp_path: Path
) -> None:
    device = loop("ext4", *WITH_SPARES)
    write(device, 1024 + 1020, b"\x12\x34\x56\x78")
    mount_repaired(device, log, tmp_path)
    assert "cannot be mounted (Bad message): checking it with" in text_of(tmp_path)
    assert f"{device} has a broken superblock: using the backup in block 8193" in text_of(tmp_path)


def test_a_broken_group_descriptor_is_told(loop: Callable[..., str], log: Log, tmp_path: Path) -> None:
    """It does not say that it is damaged: the kernel finds out. Preen leaves it to a person."""
    device = loop("ext4", *WITH_SPARES)
    write(device, 2048, b"\xff" * 64)
    cannot_mount(device, log, tmp_path)


def text_of(folder: Path) -> str:
    return (folder / "log").read_text()


@isolated(user=False)
def mount_repaired(device: str, log: Log, tmp_path: Path) -> None:
    kernel = Kernel(str(tmp_path), log=log)
    assert kernel.check(device, "ext4", "auto", "preen") == PRESENT
    assert kernel.mount(device, f"{tmp_path}/m", "ext4", ("rw",)) == DONE
    (tmp_path / "log").write_text(text(log))


@isolated(user=False)
def cannot_mount(device: str, log: Log, tmp_path: Path) -> None:
    kernel = Kernel(str(tmp_path), log=log)
    assert kernel.check(device, "ext4", "auto", "preen") == PRESENT
    with pytest.raises(MountError, match=r"ended with status 4: .* RUN fsck MANUALLY") as caught:
        kernel.mount(device, f"{tmp_path}/m", "ext4", ("rw",))
    assert f"type e2fsck -f {device} and answer its questions" in caught.value.hint


HOME_ONE = Device(path="/dev/c", label="COS_PERSISTENT", fstype="ext4", disks=("/dev/a",))


def look(device: str, **known: Any) -> Devices:
    """Give a disk whose state partition is known, and a partition of which udev knows nothing more."""
    state = Device(path="/dev/null", fstype="ext4", label="COS_STATE", disks=("/dev/a",))
    return Devices(
        all=(state, Device(path=device, partlabel="persistent", disks=("/dev/a",)).replace(**known))
    )


PERSISTENT = Wanted(
    spec="LABEL=COS_PERSISTENT", timeout_sec=1, partlabel="persistent", near="LABEL=COS_STATE"
)


def test_rescue(loop: Callable[..., str], log: Log) -> None:
    device = loop("ext4", *WITH_SPARES, label="COS_PERSISTENT")
    write(device, 1024, bytes(1024))

    assert fsck.rescue([PERSISTENT], look(device), "preen", log) == {"LABEL=COS_PERSISTENT": ""}

    assert 'label="COS_PERSISTENT"' in command("blkid", "-p", device).replace("LABEL", "label")
    command("e2fsck", "-fn", device)
    assert fsck.rescue([PERSISTENT], look(device), "preen", log) == {}


@pytest.mark.parametrize(
    ("label", "repair", "reason"),
    [
        ("OTHER", "preen", "and no backup of its superblock is there"),
        ("COS_PERSISTENT", "no", "and fsck.repair=no forbids to repair it"),
    ],
)
def test_rescue_refuses(label: str, repair: str, reason: str, loop: Callable[..., str], log: Log) -> None:
    device = loop("ext4", *WITH_SPARES, label=label)
    write(device, 1024, bytes(1024))
    before = Path(device).read_bytes()

    told = fsck.rescue([PERSISTENT], look(device), repair, log)

    message = (
        f"cannot find a filesystem labelled 'COS_PERSISTENT': no file system is known on {device},"
        f" the partition 'persistent', {reason}"
    )
    assert told == {"LABEL=COS_PERSISTENT": message}
    assert message in text(log)
    assert Path(device).read_bytes() == before
    assert fsck.rescue([PERSISTENT], look(device), repair, log) == {}


@pytest.mark.parametrize(
    "devices",
    [
        look("/dev/zero", fstype="xfs"),
        look("/dev/zero", disks=("/dev/b",)),
        look("/dev/zero", partlabel="other"),
        Devices(all=look("/dev/zero").all[1:]),
        Devices(all=(*look("/dev/zero").all, HOME_ONE)),
    ],
)
def test_rescue_touches_nobody_elses(devices: Devices, log: Log) -> None:
    assert fsck.rescue([PERSISTENT], devices, "yes", log) == {}
    assert log.lines == []


def test_rescue_gives_up_what_cannot_be_read(tmp_path: Path, log: Log) -> None:
    """Once: the wait looks again at once after each attempt."""
    native.require_root()
    dead = str(tmp_path / "dead")
    os.mknod(dead, 0o600 | stat.S_IFBLK, os.makedev(240, 77))  # no driver has it

    told = fsck.rescue([PERSISTENT], look(dead), "preen", log)

    assert list(told) == [PERSISTENT.spec]
    assert told[PERSISTENT.spec].startswith(f"cannot read '{dead}': ")
    assert fsck.rescue([PERSISTENT], look(dead), "preen", log) == {}
    assert len(log.lines) == 1


def test_rescue_lets_go_what_has_left(tmp_path: Path, log: Log) -> None:
    assert fsck.rescue([PERSISTENT], look(f"{tmp_path}/gone"), "preen", log) == {}


# Growing; ext4, which wants CAP_SYS_RESOURCE, is grown in a VM


@pytest.mark.parametrize(("fstype", "size_mib"), [("xfs", 300), ("btrfs", 128)])
def test_grows(fstype: str, size_mib: int, loop: Callable[..., str], tmp_path: Path) -> None:
    device = loop(fstype, size_mib=size_mib)
    os.truncate(command("losetup", "-nO", "BACK-FILE", device).strip(), 2 * size_mib * MIB)
    command("losetup", "--set-capacity", device)
    grown(device, fstype, size_mib, tmp_path)


@isolated(user=False)
def grown(device: str, fstype: str, size_mib: int, tmp_path: Path) -> None:
    kernel = Kernel(str(tmp_path))
    target = f"{tmp_path}/m"
    assert kernel.mount(device, target, fstype, ("rw", "x-systemd.growfs")) == DONE
    before = os.statvfs(target)
    assert kernel.grow(device, target) == DONE
    after = os.statvfs(target)
    assert after.f_blocks * after.f_frsize > before.f_blocks * before.f_frsize + 0.8 * size_mib * MIB
    assert observe.mounts()[-1].target == target
    command("sync", "--file-system", target)
    assert kernel.grow(device, target) == PRESENT


def test_does_not_grow_what_cannot(loop: Callable[..., str], tmp_path: Path) -> None:
    device = loop("vfat")
    with pytest.raises(MountError) as caught:
        Kernel(str(tmp_path)).grow(device, str(tmp_path))
    assert (
        caught.value.message == f"cannot grow '{tmp_path}': its file system is none of ext4, xfs and btrfs"
    )
    assert caught.value.hint == "remove x-systemd.growfs from its options"


def test_subprocess_is_only_used_through_process() -> None:
    found = subprocess.run(
        ["grep", "-lr", "--include=*.py", "subprocess", native.ROOT / "immucore"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [f"{native.ROOT}/immucore/process.py"]
