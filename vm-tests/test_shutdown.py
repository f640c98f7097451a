"""The end of a machine: everything is unmounted without a complaint, and what is on the disk is whole."""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path

import derivative
import expect
import pytest
from disk import MIB, Disk, Partition, size_mib
from machine import Machine
from report import Report

ACTIVE = expect.ACTIVE.removesuffix(" quiet")  # so that systemd tells what it does
PASSIVE = ACTIVE.replace("active", "passive")
RECOVERY = "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.squashfs"
STATE = (
    'PERSISTENT_STATE_PATHS="/etc/ssh /home /var/lib/kept /srv/data/kept"\nPERSISTENT_STATE_BIND={bind}\n'
)
NESTED = "rd.cos.mount=LABEL=DEEP:/home/deep rd.cos.mount=LABEL=DATA:/srv/data"
# What a container does whose service is stopped with KillMode=process: it has files open to the very end.
HOLDER = """\
cat > /run/systemd/system/holder.service <<END
[Service]
KillMode=process
ExecStart=/bin/sh -c 'sleep infinity & exec sleep infinity'
END
for directory in /etc /var /home /root /etc/ssh /var/lib/kept /usr/local/.state /srv/data/kept; do
    [ ! -d $directory ] || {
        date > $directory/held
        sed -i "s,-c ',-c 'exec {fd}>>$directory/held; ," /run/systemd/system/holder.service
    }
done
sed -i s,/bin/sh,/bin/bash, /run/systemd/system/holder.service
systemctl daemon-reload && systemctl start holder && ls -l /proc/$(systemctl show -P MainPID holder)/fd
"""
COMPLAINT = re.compile(
    r".*(?:\bFAILED\b|Failed (?:unmounting|to (?:un|re)?mount)|busy|error|corrupt).*", re.I
)
HARMLESS = re.compile(r"errors=|Failed to finalize (?:file systems, )?loop devices, ignoring")
# There the state is read-only only when systemd-shutdown has given it up (dracut-module/immucore.shutdown).
DEBUGRW = re.compile(r"Failed to remount '/run/initramfs/cos-state' read-only: Device or resource busy")


def end(report: Report) -> str:
    """Return the console from the moment at which the machine was told to power off."""
    _, *after = re.split(r"Stopped target .*multi-user\.target", report.console)
    assert len(after) == 1, report.console[-3000:]
    assert report.ended == "guest-shutdown", report.console[-3000:]
    return after[0]


def complaints(report: Report, harmless: re.Pattern[str] = HARMLESS) -> list[str]:
    """Return what was said at the end that nobody should have to read."""
    lines = [match[0] for match in COMPLAINT.finditer(end(report))]
    return [line for line in lines if not HARMLESS.search(line) and not harmless.search(line)]


def check(where: str | Path) -> str:
    """Return what is wrong with an ext4 file system: its journal, its state, what e2fsck finds."""
    header = derivative.run("dumpe2fs", "-h", where)
    if "needs_recovery" in header or not re.search(r"^Filesystem state: +clean$", header, re.MULTILINE):
        return header
    done = subprocess.run(["e2fsck", "-fn", str(where)], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode else ""


def assert_clean(disk: Disk, raw: Path) -> None:
    """Every file system of the disk was unmounted, or never written to."""
    for partition in disk.partitions:
        if partition.fstype == "ext4":
            assert check(f"{raw}?offset={disk.offsets[partition.name]}") == "", partition.name


def table(report: Report) -> list[tuple[str, ...]]:
    """Return the mount table but for what services have of their own.

    Linux shows uuid=on for an overlay only in the boot that made its upper directory (uuid=auto, since 6.6).
    """
    return sorted(
        (
            mount.target,
            mount.fstype,
            mount.source,
            mount.root,
            *(each for each in mount.options if each != "uuid=on"),
        )
        for mount in report.mountinfo
        if not mount.target.startswith("/run/credentials/")
    )


def cycles(machine: Machine, boots: int, slot: str, image: str, commands: tuple[str, ...] = ()) -> None:
    """Switch a machine on and off; it is the same every time and never complains."""
    first: list[tuple[str, ...]] = []
    for number in range(boots):
        report = machine.boot(limit_s=180, commands=(HOLDER, *commands))
        assert report.stage == "system", report.console[-3000:]
        expect.healthy(report, slot, image)
        assert "held" in report.output(HOLDER)
        assert complaints(report) == [], number
        first = first or table(report)
        assert table(report) == first, number
        assert_clean(machine.disk, machine.raw())


@pytest.mark.soak
@pytest.mark.parametrize("bind", ["true", "false"], ids=["bind", "overlay"])
def test_power_cycles(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], boots: int, bind: str
) -> None:
    disk = cos_disk(
        oem={"cos-layout.env": STATE.format(bind=bind)},
        extra=(Partition("data", "DATA", 16), Partition("deep", "DEEP", 16)),
    )

    cycles(machine(disk, f"{ACTIVE} {NESTED}", keep_writes=True), boots, "active", "/cOS/active.img")


@pytest.mark.soak
def test_power_cycles_of_debian_13(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], trixie_disk: Disk, boots: int
) -> None:
    disk = cos_disk(
        suite=trixie_disk.suite,
        oem={"cos-layout.env": STATE.format(bind="true").replace("/srv/data/kept", "/srv")},
        extra=(Partition("scratch", "SCRATCH", 32),),
    )
    kept = machine(disk, f"{PASSIVE} rd.cos.overlay=LABEL=SCRATCH", keep_writes=True)

    cycles(kept, boots, "passive", "/cOS/passive.img")


@pytest.mark.soak
def test_power_cycles_of_overlays_on_a_partition_of_their_own(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], boots: int
) -> None:
    disk = cos_disk(extra=(Partition("scratch", "SCRATCH", 32),))
    kept = machine(disk, f"{ACTIVE} rd.cos.overlay=LABEL=SCRATCH", keep_writes=True)

    cycles(kept, boots, "active", "/cOS/active.img")


def test_recovery_ends_without_a_complaint(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    kept = machine(cos_disk(), RECOVERY, keep_writes=True)

    cycles(kept, 1, "recovery", "/cOS/recovery.squashfs")


def test_debugrw_ends_clean(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], work: Path
) -> None:
    """The image and the partition that it is on were both written to."""
    disk = cos_disk()
    kept = machine(disk, f"{ACTIVE} rd.cos.debugrw", keep_writes=True)
    touch = (
        "date > /usr/bin/debugged; date > /run/initramfs/cos-state/debugged; sync; date >> /usr/bin/debugged"
    )

    report = kept.boot(limit_s=180, commands=(touch,))

    assert report.output(touch) == ""
    assert complaints(report, DEBUGRW) == []
    raw = kept.raw()
    assert_clean(disk, raw)
    image = work / "active.img"
    derivative.debugfs(raw, f"dump /cOS/active.img {image}", offset=disk.offsets["state"])
    assert check(image) == ""
    assert "debugged" in derivative.debugfs(image, "ls /usr/bin")


@pytest.mark.soak
def test_power_cuts(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], work: Path, boots: int
) -> None:
    """In the middle of writing; the journals are enough for the next boot, and nobody is asked anything."""
    disk = cos_disk(oem={"cos-layout.env": STATE.format(bind="true").replace("/srv/data/kept", "")})
    cut = machine(disk, ACTIVE, keep_writes=True)
    write = """\
number=0
while :; do
    number=$((number + 1))
    for directory in /usr/local /home /oem; do
        head -c 100000 /dev/urandom > $directory/written.$((number % 7))
        rm -f $directory/written.$(((number + 3) % 7))
    done
    [ $((number % 3)) != 0 ] || sync
    echo "written $number" > /dev/console
done
"""
    first: list[tuple[str, ...]] = []
    for number in range(boots):
        moment = secrets.randbelow(30) + 1
        report = cut.boot(
            limit_s=180, commands=(write,), when=[(rf"^written {moment}\b", lambda it: it.cut_power())]
        )
        assert f"written {moment}" in report.console, report.console[-3000:]
        assert report.ended == "unknown"

        # As the kernel does when it mounts them: only the journal is replayed, nothing is repaired.
        raw = cut.raw()
        for partition in disk.partitions:
            if partition.fstype == "ext4":
                where = work / "partition"
                place = (f"skip={disk.offsets[partition.name] // MIB}", f"count={size_mib(partition)}")
                derivative.run(
                    "dd", f"if={raw}", f"of={where}", "bs=1M", *place, "conv=sparse", "status=none"
                )
                derivative.run("e2fsck", "-p", "-E", "journal_only", where)
                assert check(where) == "", (number, moment, partition.name)
                where.unlink()

        after = cut.boot(limit_s=180)
        expect.healthy(after, "active", "/cOS/active.img")
        assert complaints(after) == []
        first = first or table(after)
        assert table(after) == first
