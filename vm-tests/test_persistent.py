"""COS_PERSISTENT, OEM and the overlays' device in every state that a disk can be in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expect
import pytest
from derivative import debugfs, run
from disk import MIB, Disk, Partition, make_disk
from machine import Guest, Machine
from report import Report

FAILURE_SEC = 30  # from the kernel's start to the summary, by the guest's clock
ICOUNT = 1  # the guest's clock counts instructions: what else the host does is no matter


def filesystem(path: Path, size_mib: int, label: str, *options: str) -> Path:
    """Make an ext4 file system with a file in it; small blocks, or a backup would lie behind 128 MiB."""
    (path.parent / "tree").mkdir(exist_ok=True)
    (path.parent / "tree/precious").write_text("data\n")
    features = ("-t", "ext4", "-b", "1024", "-m", "0", "-E", "lazy_itable_init=0,root_owner=0:0")
    tree = ("-d", path.parent / "tree")
    run("mke2fs", "-q", "-F", *features, "-L", label, *options, *tree, path, f"{size_mib}M")
    return path


def write(path: Path, offset: int, data: bytes) -> None:
    """Damage a file system."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def persistent(work: Path) -> Path:
    """Give a COS_PERSISTENT to damage."""
    return filesystem(work / "persistent.img", 32, "COS_PERSISTENT")


@pytest.fixture
def cos(work: Path, cos_disk: Callable[..., Disk]) -> Callable[..., Disk]:
    """Return what makes a disk with some file systems of the test's own."""

    def make(**images: Path | Partition) -> Disk:
        extra = [
            item if isinstance(item, Partition) else Partition(name, f"COS_{name.upper()}", image=item)
            for name, item in images.items()
        ]
        return cos_disk(without=tuple(images), extra=tuple(extra))

    return make


def in_time(report: Report) -> None:
    """The summary came soon, and is the last word of the agent."""
    assert report.result["started_usec"] + report.result["took_usec"] < FAILURE_SEC * 1e6
    assert "The boot stops here." in report.console


def warnings(report: Report) -> str:
    return "\n".join(report.messages("immucore.service", priority=4))


def steps(report: Report) -> list[dict[str, Any]]:
    return list(json.loads(report.file("/run/immucore/steps.json"))["steps"])


def checked(report: Report, device: str, *texts: str) -> None:
    """One check was made, of this device, and it helped."""
    told = warnings(report)
    assert told.count("checking it with") == 1
    for text in (f"{device} ", f"{device}: repaired", *texts):
        assert text in told
    assert report.result["outcome"] == "ok", report.result


# What is repaired


def test_errors_are_repaired_and_the_data_is_there(
    machine: Callable[..., Machine], cos: Callable[..., Disk], persistent: Path
) -> None:
    debugfs(persistent, "set_super_value state 2")
    again = machine(cos(persistent=persistent), expect.ACTIVE, keep_writes=True)

    first = again.boot(limit_s=90, commands=("cat /usr/local/precious",))
    second = again.boot(limit_s=90, until="initramfs")

    assert first.stage == "system"
    assert first.output("cat /usr/local/precious") == "data"
    checked(first, "/dev/vda5", "contains a file system with errors")
    assert second.result["outcome"] == "ok"
    assert warnings(second) == ""


@pytest.mark.parametrize("damage", ["zeroed", "checksum"])
def test_a_lost_superblock_is_restored(
    damage: str, machine: Callable[..., Machine], cos: Callable[..., Disk], persistent: Path
) -> None:
    if damage == "zeroed":  # udev sees no file system: it is missing
        write(persistent, 1024, bytes(1024))
    else:  # udev sees it, and the kernel does not mount it
        write(persistent, 1024 + 1020, b"\x12\x34\x56\x78")

    report = machine(cos(persistent=persistent), expect.ACTIVE).boot(
        limit_s=90, commands=("cat /usr/local/precious",)
    )

    assert report.output("cat /usr/local/precious") == "data"
    checked(report, "/dev/vda5", "broken superblock")
    assert report.mount("/usr/local").writable
    took_sec = sum(wait["took_usec"] for wait in report.result["waits"]) / 1e6
    assert took_sec < 10


def test_oem_is_repaired_too(machine: Callable[..., Machine], cos: Callable[..., Disk], work: Path) -> None:
    oem = filesystem(work / "oem.img", 16, "COS_OEM")
    write(oem, 1024, bytes(1024))

    report = machine(cos(oem=oem), expect.ACTIVE).boot(limit_s=60, until="initramfs")

    assert report.mount("/sysroot/oem").source == "/dev/vda5"
    checked(report, "/dev/vda5", "broken superblock")


def test_an_overlay_device_is_checked(
    machine: Callable[..., Machine], cos: Callable[..., Disk], work: Path
) -> None:
    overlay = filesystem(work / "overlay.img", 16, "SCRATCH")
    debugfs(overlay, "set_super_value state 2")
    disk = cos(scratch=Partition("scratch", "SCRATCH", image=overlay))

    report = machine(disk, f"{expect.ACTIVE} rd.cos.overlay=LABEL=SCRATCH").boot(limit_s=90)

    assert report.mount("/run/overlay").source == "/dev/vda6"
    expect.overlaid(report, *(path for path in expect.RW_PATHS if path != "/usr/local"))
    checked(report, "/dev/vda6", "contains a file system with errors")


def test_a_fat_volume_is_checked(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], work: Path
) -> None:
    """There is no fsck.vfat in this initramfs: it is said, and the volume is mounted."""
    image = work / "fat.img"
    image.touch()
    os.truncate(image, 16 * MIB)
    run("mkfs.vfat", "-F", "16", "-n", "FAT", image)
    write(image, 37, b"\1")
    disk = cos_disk(extra=(Partition("fat", "FAT", image=image),))

    report = machine(disk, f"{expect.ACTIVE} rd.cos.mount=LABEL=FAT:/srv/fat").boot(
        limit_s=60, until="initramfs"
    )

    assert report.mount("/sysroot/srv/fat").writable
    assert "/dev/vda6 was not cleanly unmounted, and there is no fsck.vfat in the initramfs" in warnings(
        report
    )


# What is not


def test_beyond_repair(machine: Callable[..., Machine], cos: Callable[..., Disk], persistent: Path) -> None:
    """Nothing tells what was on it: the boot does not wait three minutes for what cannot come."""
    write(persistent, 0, bytes(MIB))

    report = machine(cos(persistent=persistent), expect.ACTIVE).boot(limit_s=120, icount_shift=ICOUNT)

    expect.stopped(
        report,
        3,
        "cannot find a filesystem labelled 'COS_PERSISTENT': no file system is known on /dev/vda5,"
        " the partition 'persistent', and no backup of its superblock is there",
        "hint: boot recovery and repair it; labels seen: ",
    )
    in_time(report)


def test_what_needs_a_person_stops_the_boot(
    machine: Callable[..., Machine], cos: Callable[..., Disk], persistent: Path
) -> None:
    debugfs(persistent, "set_super_value state 2", "clri <2>")

    report = machine(cos(persistent=persistent), expect.ACTIVE).boot(limit_s=120, icount_shift=ICOUNT)

    expect.stopped(
        report,
        4,
        "cannot repair '/dev/vda5': ",
        "ended with status 4: ",
        "UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY.",
        "hint: type e2fsck -f /dev/vda5 and answer its questions",
    )
    in_time(report)


def test_the_operator_may_say_yes(
    machine: Callable[..., Machine], cos: Callable[..., Disk], persistent: Path
) -> None:
    debugfs(persistent, "set_super_value state 2", "clri <2>")

    report = machine(cos(persistent=persistent), f"{expect.ACTIVE} fsck.repair=yes").boot(
        limit_s=60, until="initramfs"
    )

    checked(report, "/dev/vda5", "e2fsck -f -y")


def test_oem_beyond_repair_is_a_degraded_boot(
    machine: Callable[..., Machine], cos: Callable[..., Disk], work: Path
) -> None:
    oem = filesystem(work / "oem.img", 16, "COS_OEM")
    write(oem, 0, bytes(16 * MIB))

    report = machine(cos(oem=oem), f"{expect.ACTIVE} rd.cos.oemtimeout=5").boot(
        limit_s=60, until="initramfs"
    )

    assert report.result["outcome"] == "degraded"
    assert "/oem: cannot find a filesystem labelled 'COS_OEM'" in report.file("/run/cos/degraded")


# What is missing, or late


def test_persistent_is_missing(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    disk = cos_disk(without=("persistent",))

    report = machine(disk, f"{expect.ACTIVE} rd.cos.timeout=15").boot(limit_s=120, icount_shift=ICOUNT)

    expect.stopped(report, 3, "cannot find a filesystem labelled 'COS_PERSISTENT'", "hint: labels seen: ")
    in_time(report)


def plug_in(path: Path, name: str) -> Callable[[Guest], None]:
    return lambda guest: guest.plug(path, name)


def test_persistent_comes_a_minute_late(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], work: Path, persistent: Path
) -> None:
    disk = cos_disk(without=("persistent",))
    late = make_disk(
        work / "late.raw", disk.suite, (Partition("persistent", "COS_PERSISTENT", image=persistent),)
    )

    report = machine(disk, f"{expect.ACTIVE} {expect.TOLD}").boot(
        limit_s=240, until="initramfs", when=[(expect.waiting(7), plug_in(late.path, "late"))]
    )

    assert report.result["outcome"] == "ok"
    assert report.mount("/sysroot/usr/local").source == "/dev/vdc1"  # behind the report's disk
    assert report.result["waits"][-1]["took_usec"] > 60e6
    assert report.result["waits"][-1]["missing"] == []


def test_an_oem_that_comes_late_on_another_disk_is_not_ours(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], work: Path
) -> None:
    """A stick that is plugged in during the boot must not configure the machine."""
    disk = cos_disk(without=("oem",))
    oem = Partition("oem", "COS_OEM", 16, {"cos-layout.env": "RW_PATHS=/etc\n"})
    late = make_disk(work / "late.raw", disk.suite, (oem,))
    look = "blkid -p -s LABEL -o value /dev/vdc1"

    report = machine(disk, f"{expect.ACTIVE} rd.cos.oemtimeout=40 {expect.TOLD}").boot(
        limit_s=120,
        until="initramfs",
        when=[(expect.waiting(1), plug_in(late.path, "late"))],
        commands=(look,),
    )

    assert report.output(look) == "COS_OEM"
    assert any("/dev/vdc1 COS_OEM" in line for line in report.messages("immucore.service"))  # in good time
    assert report.result["outcome"] == "degraded"
    assert report.file("/run/cos/degraded").startswith("/oem: cannot find a filesystem labelled 'COS_OEM'")
    assert "/dev/vdc1" not in [mount.source for mount in report.mountinfo]


# What is full

FILL = {
    "bytes": 'dd if=/dev/zero of="$1/zeros" bs=64k 2>&1 || :; dd if=/dev/zero of="$1/more" bs=1k 2>&1 || :',
    "inodes": 'i=0; while : > "$1/file$i"; do i=$((i+1)); done 2>&1 || :',
}
STATE = {"cos-layout.env": "PERSISTENT_STATE_PATHS='/etc /var /root'\nPERSISTENT_STATE_BIND=%s\n"}


@pytest.mark.parametrize("bind", ["true", "false"])
@pytest.mark.parametrize("full", ["bytes", "inodes"])
def test_full(
    full: str, bind: str, machine: Callable[..., Machine], cos: Callable[..., Disk], work: Path
) -> None:
    """A machine that has run out of space boots, so that somebody can make some."""
    options = ("-N", "4000") if full == "inodes" else ()
    image = filesystem(work / "persistent.img", 64, "COS_PERSISTENT", *options)
    oem = Partition("oem", "COS_OEM", 16, {"cos-layout.env": STATE["cos-layout.env"] % bind})
    used = machine(cos(oem=oem, persistent=image), expect.ACTIVE, keep_writes=True)
    fill = f"set -- /usr/local; {FILL[full]}; sync; df -P /usr/local; df -iP /usr/local; true"

    assert used.boot(limit_s=120, commands=(fill,)).result["outcome"] == "ok"
    report = used.boot(limit_s=120, commands=("cat /usr/local/precious", "echo x > /root/new"))

    assert report.stage == "system", report.console[-3000:]
    assert report.output("cat /usr/local/precious") == "data"
    assert report.result["outcome"] in ("ok", "degraded")


# What is to grow


def test_grows_to_its_partition(
    machine: Callable[..., Machine], cos: Callable[..., Disk], work: Path, persistent: Path
) -> None:
    files = {}
    for fstype, size_mib in (("xfs", 300), ("btrfs", 128)):
        files[fstype] = work / f"{fstype}.img"
        files[fstype].touch()
        os.truncate(files[fstype], size_mib * MIB)
        run(f"mkfs.{fstype}", "-q", "-L", fstype.upper(), files[fstype])
    disk = cos(
        persistent=Partition("persistent", "COS_PERSISTENT", 96, image=persistent),
        xfs=Partition("xfs", "XFS", 450, image=files["xfs"]),
        btrfs=Partition("btrfs", "BTRFS", 300, image=files["btrfs"]),
    )
    # Linux resizes a btrfs to 256 MiB or more only.
    cmdline = f"{expect.ACTIVE} rd.cos.mount=LABEL=COS_PERSISTENT:/usr/local:x-systemd.growfs"
    for fstype in files:
        cmdline += f" rd.cos.mount=LABEL={fstype.upper()}:/srv/{fstype}:x-systemd.growfs"
    size = "stat -f -c '%b %S' /usr/local /srv/xfs /srv/btrfs"
    again = machine(disk, cmdline, keep_writes=True)

    report = again.boot(limit_s=120, commands=(size,))
    second = again.boot(limit_s=120, until="initramfs")

    sizes = [
        int(blocks) * int(unit) // MIB for blocks, unit in map(str.split, report.output(size).splitlines())
    ]
    assert [
        low < size <= high for size, low, high in zip(sizes, (80, 360, 280), (96, 450, 300), strict=True)
    ] == [True] * 3, sizes
    assert report.result["outcome"] == "ok"
    assert warnings(report) == ""
    assert report.fstab.count("x-systemd.growfs") == 3
    assert report.findmnt_verify.status == 0, report.findmnt_verify.output
    outcomes = {
        step["operation"]["target"]: step["outcome"]
        for step in steps(second)
        if step["operation"]["kind"] == "grow"
    }
    assert outcomes == {
        "/sysroot/usr/local": "present",
        "/sysroot/srv/xfs": "present",
        "/sysroot/srv/btrfs": "present",
    }


def test_a_file_system_that_cannot_grow_is_a_warning(machine: Callable[..., Machine], disk: Disk) -> None:
    """The EFI partition has no ioctl for it."""
    cmdline = f"{expect.ACTIVE} rd.cos.mount=LABEL=COS_GRUB:/srv/efi:x-systemd.growfs"

    report = machine(disk, cmdline).boot(limit_s=60, until="initramfs")

    assert report.result["outcome"] == "ok"
    assert report.mount("/sysroot/srv/efi").fstype == "vfat"
    assert "cannot grow '/sysroot/srv/efi': its file system is none of ext4, xfs and btrfs" in warnings(
        report
    )
