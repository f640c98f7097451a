"""Every slot boots, in every dialect of the field's command lines."""

from __future__ import annotations

from collections.abc import Callable

import expect
import pytest
from disk import Disk
from machine import Machine

SLOTS = {
    "active.img": ("active", "root=LABEL=COS_STATE"),
    "passive.img": ("passive", "root=LABEL=COS_STATE"),
    "recovery.squashfs": ("recovery", "root=LABEL=COS_RECOVERY"),
    "recovery.img": ("recovery", "root=LABEL=COS_RECOVERY"),
}


@pytest.mark.parametrize("image", SLOTS)
def test_slot_boots(machine: Callable[..., Machine], disk: Disk, image: str) -> None:
    slot, root = SLOTS[image]

    report = machine(disk, f"{root} cos-img/filename=/cOS/{image} quiet").boot(limit_s=90)

    expect.healthy(report, slot, f"/cOS/{image}")
    told = [
        line
        for line in report.messages("immucore.service")
        if not line.startswith(("Starting ", "Finished "))
    ]
    assert len(told) == 1
    assert told[0].startswith(f"{slot} booted from /cOS/{image} in ")
    assert "immucore" not in report.console
    assert not report.mount("/").writable
    assert report.mount("/").fstype == ("squashfs" if image.endswith("squashfs") else "ext4")
    expect.volume(report, "/oem", disk.number("oem"))
    partition = disk.number("recovery" if slot == "recovery" else "state")
    assert report.mount("/run/initramfs/cos-state").source == f"/dev/vda{partition}"
    if slot == "recovery":
        expect.overlaid(report, *expect.RW_PATHS)
    else:
        expect.overlaid(report, *(path for path in expect.RW_PATHS if path != "/usr/local"))
        expect.volume(report, "/usr/local", disk.number("persistent"))


@pytest.mark.parametrize(
    "cmdline",
    [
        "root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img",
        "elemental.mode=active elemental.image=/cOS/active.img",
        "root=PARTLABEL=state elemental.mode=active elemental.image=/cOS/active.img",
    ],
    ids=["cos-toolkit", "elemental-2", "elemental-2-partlabel"],
)
def test_dialect_boots(machine: Callable[..., Machine], disk: Disk, cmdline: str) -> None:
    report = machine(disk, f"{cmdline} quiet").boot(limit_s=90)

    expect.healthy(report, "active", "/cOS/active.img")
    assert [mount.source for mount in report.mountinfo if mount.target == "/"][-1].startswith("/dev/loop")
    expect.volume(report, "/usr/local", disk.number("persistent"))


def test_recovery_boots_by_the_label_of_its_image(machine: Callable[..., Machine], disk: Disk) -> None:
    report = machine(disk, "root=LABEL=COS_SYSTEM cos-img/filename=/cOS/recovery.img quiet").boot(limit_s=90)

    expect.healthy(report, "recovery", "/cOS/recovery.img")


def test_partition_is_never_mounted_beneath_the_root(machine: Callable[..., Machine], disk: Disk) -> None:
    """systemd makes sysroot.mount from root=, which names the partition and not the image."""
    report = machine(disk, expect.ACTIVE).boot(until="initramfs", limit_s=60)

    assert [m.fstype for m in report.mountinfo if m.target == "/sysroot"] == ["ext4"]
    assert report.mount("/sysroot").source.startswith("/dev/loop")
    assert [m.target for m in report.mountinfo if m.source == f"/dev/vda{disk.number('state')}"] == [
        "/run/initramfs/cos-state"
    ]


def test_boot_without_an_image_is_left_alone(machine: Callable[..., Machine], plain_disk: Disk) -> None:
    report = machine(plain_disk, "root=PARTLABEL=root rw quiet").boot(limit_s=90)

    assert (report.stage, report.state, report.failed_units) == ("system", "running", [])
    assert not any(path.startswith(("/run/immucore", "/run/cos")) for path in report.files)
    assert report.messages("immucore.service") == []


def test_disabled_agent_writes_its_sentinel_only(machine: Callable[..., Machine], plain_disk: Disk) -> None:
    cmdline = "root=PARTLABEL=root rw quiet cos-img/filename=/cOS/active.img rd.cos.disable"

    report = machine(plain_disk, cmdline).boot(limit_s=90)

    assert (report.stage, report.state, report.failed_units) == ("system", "running", [])
    assert report.files["/run/cos/active_mode"] == "1"
    assert report.mount("/").source == "/dev/vda1"
    assert not any(mount.fstype == "overlay" for mount in report.mountinfo)


@pytest.mark.parametrize("image", ["active.img", "recovery.squashfs"])
def test_debian_13_boots(machine: Callable[..., Machine], trixie_disk: Disk, image: str) -> None:
    """Its dracut, systemd 257 and kernel 6.12 take the bundle that was frozen on Debian 12."""
    slot, root = SLOTS[image]

    report = machine(trixie_disk, f"{root} cos-img/filename=/cOS/{image} quiet").boot(limit_s=120)

    expect.healthy(report, slot, f"/cOS/{image}")
    expect.volume(report, "/oem", trixie_disk.number("oem"))


@pytest.mark.parametrize("image", ["active.img", "recovery.squashfs"])
def test_initramfs_without_systemd_boots(machine: Callable[..., Machine], disk: Disk, image: str) -> None:
    slot, root = SLOTS[image]

    report = machine(disk, f"{root} cos-img/filename=/cOS/{image} quiet", initramfs="shell").boot(limit_s=90)

    expect.healthy(report, slot, f"/cOS/{image}")


def test_little_memory_suffices(machine: Callable[..., Machine], disk: Disk) -> None:
    report = machine(disk, expect.ACTIVE, memory_mib=256).boot(limit_s=120)

    expect.healthy(report, "active", "/cOS/active.img")
