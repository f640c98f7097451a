"""An image that cannot be booted: the next that can is booted at once, and everyone sees which and why."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import derivative
import expect
import pytest
from disk import Disk
from machine import Guest, Machine
from report import Report

RECOVERY = "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.squashfs quiet"


def cut(percent: int) -> Callable[[Path], object]:
    """Leave the first part of an image, as a copy that was interrupted does."""
    return lambda image: os.truncate(image, image.stat().st_size * percent // 100)


def zero_superblock(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(1024)
        file.write(bytes(1024))


def without(*paths: str) -> Callable[[Path], object]:
    return lambda image: derivative.debugfs(image, *(f"rm {path}" for path in paths))


def with_other_modules(image: Path) -> None:
    """Have the modules of another kernel and none of the running one's."""
    found = derivative.debugfs(image, "ls -p /usr/lib/modules").splitlines()
    version = next(
        line.split("/")[5] for line in found if line.startswith("/") and line.split("/")[5][:1].isdigit()
    )
    old, new = f"/usr/lib/modules/{version}", "/usr/lib/modules/2.6.32-nobody"
    derivative.debugfs(image, f"ln {old} {new}", f"unlink {old}")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (cut(0), "the file is empty"),
    "cut at 10 %": (cut(10), "bytes of it are missing"),
    "cut at 99 %": (cut(99), "bytes of it are missing"),
    "zero superblock": (zero_superblock, "no superblock of ext2/3/4, squashfs, erofs, xfs or btrfs in it"),
    "no os-release": (without("/etc/os-release", "/usr/lib/os-release"), "there is no etc/os-release"),
    "no init": (
        without("/usr/sbin/init", "/usr/lib/systemd/systemd", "/usr/bin/init"),
        "there is no an init (/sbin/init)",
    ),
    "other modules": (with_other_modules, "it has no modules for the running kernel"),
}


@pytest.fixture
def broken_disk(work: Path, cos_disk: Callable[..., Disk]) -> Callable[..., Disk]:
    """Return what makes a disk some of whose images are damaged: file name → what is done to it."""

    def make(damage: Mapping[str, Callable[[Path], object]], suite: str = "bookworm") -> Disk:
        partitions: dict[str, dict[str, Path]] = {"state": {}, "recovery": {}}
        for name, spoil in damage.items():
            image = work / name
            derivative.run("cp", "--sparse=always", "--reflink=auto", derivative.images(suite)[name], image)
            spoil(image)
            partitions["recovery" if name.startswith("recovery") else "state"][f"cOS/{name}"] = image
        return cos_disk(suite=suite, **partitions)

    return make


def fell_back(report: Report, slot: str, *reasons: str) -> None:
    """Another slot is booted; what each of those before it lacks stands where a person looks for it."""
    failures = {failure["mode"]: failure["message"] for failure in report.result["failures"]}
    assert report.result["outcome"] == "degraded"
    assert report.result["exit_status"] == 0
    assert (report.result["mode_asked"], report.result["mode_booted"]) == ("active", slot)
    assert [*failures] == ["active", "passive"][: len(reasons)]
    why = report.file("/run/cos/upgrade_failure")
    assert why.startswith("active: ")
    for reason, message in zip(reasons, failures.values(), strict=True):
        assert reason in message
        assert message in why
    told = f"{slot} is booted instead of active: {why.strip()}"
    assert told in report.console
    assert told in report.file("/run/cos/degraded")
    sentinels = [path for path in report.files if path.endswith("_mode")]
    assert sorted(sentinels) == [f"/run/{field}/{slot}_mode" for field in ("cos", "elemental")]
    assert "Traceback" not in report.console
    assert "The boot stops here" not in report.console


@pytest.mark.parametrize(
    "damages",
    [
        ("empty",),
        ("other modules", "zero superblock"),
        ("cut at 99 %", "no os-release"),
        ("no init", "cut at 10 %"),
    ],
    ids=" and ".join,
)
def test_the_next_slot_is_booted_at_once(
    machine: Callable[..., Machine], broken_disk: Callable[..., Disk], damages: tuple[str, ...]
) -> None:
    """Active is damaged, or active and passive, each in another way."""
    spoils, reasons = zip(*(DAMAGE[damage] for damage in damages), strict=True)
    disk = broken_disk(dict(zip(("active.img", "passive.img"), spoils, strict=False)))
    slot, image = ("passive", "passive.img") if len(damages) == 1 else ("recovery", "recovery.squashfs")

    report = machine(disk, expect.ACTIVE).boot(limit_s=60, until="initramfs")

    assert (report.stage, report.slot) == ("initramfs", slot), report.console[-3000:]
    fell_back(report, slot, *reasons)
    root = report.mount("/sysroot")
    assert report.backing_files[root.source].endswith(f"/cOS/{image}")
    assert [mount.target for mount in report.mountinfo].count("/sysroot") == 1
    assert len(report.backing_files) == 1


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_passive_is_booted_to_its_login(
    machine: Callable[..., Machine], broken_disk: Callable[..., Disk], suite: str
) -> None:
    """The first image was attached, opened and let go: nothing of it stands in the way of the second."""
    disk = broken_disk({"active.img": DAMAGE["no init"][0]}, suite)

    report = machine(disk, expect.ACTIVE).boot(limit_s=120)

    assert (report.stage, report.slot, report.state) == ("system", "passive", "running")
    assert report.failed_units == []
    assert "Failed unmounting" not in report.console
    fell_back(report, "passive", DAMAGE["no init"][1])


def test_recovery_is_booted_when_both_are_broken(
    machine: Callable[..., Machine], broken_disk: Callable[..., Disk]
) -> None:
    """To its login: nothing of what failed before stands in its way."""
    disk = broken_disk({"active.img": cut(10), "passive.img": zero_superblock})
    explain = "immucore explain /"

    report = machine(disk, expect.ACTIVE).boot(limit_s=120, commands=(explain,))

    assert (report.stage, report.slot, report.state) == ("system", "recovery", "running")
    assert report.failed_units == []
    assert report.output(explain).startswith(
        "loop /run/initramfs/cos-state/cOS/recovery.squashfs on /sysroot (ro)\n"
        "    because active could not be booted"
    )
    fell_back(report, "recovery", "bytes of it are missing", "no superblock of")
    assert report.mount("/run/initramfs/cos-state").source == f"/dev/vda{disk.number('recovery')}"


def test_recovery_is_booted_without_a_state_partition(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    disk = cos_disk(without=("state",))

    report = machine(disk, f"{expect.ACTIVE} rd.cos.timeout=8").boot(limit_s=90, until="initramfs")

    assert (report.stage, report.slot) == ("initramfs", "recovery"), report.console[-3000:]
    assert report.result["mode_booted"] == "recovery"
    assert "cannot find a filesystem labelled 'COS_STATE'" in report.file("/run/cos/upgrade_failure")


ALL = {name: cut(0) for name in ("active.img", "passive.img", "recovery.img", "recovery.squashfs")}


@pytest.mark.parametrize("initramfs", ["systemd", "shell"])
def test_nothing_can_be_booted(
    machine: Callable[..., Machine], broken_disk: Callable[..., Disk], initramfs: str
) -> None:
    disk = broken_disk(ALL)
    broken = machine(disk, expect.ACTIVE, initramfs=initramfs, keep_writes=True)

    report = broken.boot(limit_s=240, commands=(expect.UPTIME,), icount_shift=1)

    expect.stopped(report, 4, "active.img': the file is empty", "recovery.squashfs': the file is empty")
    assert [failure["mode"] for failure in report.result["failures"]][:3] == [
        "active",
        "passive",
        "recovery",
    ]
    # When it happens, and once more right above the prompt.
    assert len(re.findall("^  The boot stops here", report.console, re.MULTILINE)) == 2
    expect.soon(report)
    assert not report.has("/run/cos/upgrade_failure")
    assert "device: " in report.file("/run/immucore/immucore.log")
    assert "boot-000001-" in derivative.debugfs(broken.raw(), "ls /immucore", offset=disk.offsets["oem"])


def test_no_fallback_is_wanted(machine: Callable[..., Machine], broken_disk: Callable[..., Disk]) -> None:
    disk = broken_disk({"active.img": cut(99)})

    report = machine(disk, f"{expect.ACTIVE} rd.cos.fallback=off").boot(
        limit_s=240, commands=(expect.UPTIME,), icount_shift=1
    )

    expect.stopped(report, 4, "bytes of it are missing", "hint: boot another slot")
    assert [failure["mode"] for failure in report.result["failures"]] == ["active"]
    expect.soon(report)


@pytest.mark.parametrize("initramfs", ["systemd", "shell"])
def test_the_boot_loader_is_told(
    machine: Callable[..., Machine], broken_disk: Callable[..., Disk], initramfs: str
) -> None:
    """The machine resets, and GRUB finds on OEM what it is to boot, once."""
    disk = broken_disk({"active.img": cut(99)})
    cmdline = f"{expect.ACTIVE} rd.cos.fallback=reboot"
    resetting = machine(disk, cmdline, initramfs=initramfs, keep_writes=True)

    report = resetting.boot(limit_s=60)

    assert report.ended == "guest-reset"
    assert "the boot loader is to boot its entry 'fallback'" in report.console
    assert "Switching root" not in report.console
    block = derivative.debugfs(resetting.raw(), "cat /grubenv", offset=disk.offsets["oem"])
    assert "next_entry=fallback\n" in block
    checked = derivative.debugfs(resetting.raw(), "show_super_stats -h", offset=disk.offsets["oem"])
    assert "needs_recovery" not in checked


@pytest.mark.parametrize("initramfs", ["systemd", "shell"])
@pytest.mark.parametrize("action", ["reboot:3", "halt"])
def test_what_is_done_about_a_failure(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], initramfs: str, action: str
) -> None:
    disk = cos_disk(without=("persistent",))
    cmdline = f"{expect.ACTIVE.removesuffix(' quiet')} rd.cos.timeout=5 rd.cos.onfail={action}"
    halted: list[float] = []

    def note(guest: Guest) -> None:
        halted.append(1.0)
        guest.cut_power()

    report = machine(disk, cmdline, initramfs=initramfs).boot(
        limit_s=90, when=[("reboot: System halted", note)]
    )

    assert "cannot find a filesystem labelled 'COS_PERSISTENT'" in report.console
    assert "(rd.cos.onfail)" in report.console
    assert report.stage == "none"  # no shell came up
    if action == "halt":
        assert halted
    else:
        assert report.ended == "guest-reset"
        assert "The machine restarts in 3 s" in report.console
