"""Of several devices that could be meant the right one is mounted; what it is inside of is assembled.

The racy ones boot `--boots` times (`make soak`: 30), each with the disks in another order or one of them
held up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import disk as disks
import expect
import pytest
import stacks
from disk import Disk, Partition, make_disk
from machine import Extra, Guest, Machine
from report import Report
from units import unit

OWN = "disk0"  # the serial of the machine's own disk
PLACES = {"/run/initramfs/cos-state": "state", "/sysroot/oem": "oem", "/sysroot/usr/local": "persistent"}
# udev has forgotten everything by the end of the initramfs.
IDENTIFY = """
while read -r _ _ number _ target _; do
    serial=-
    for file in /sys/dev/block/$number/serial /sys/dev/block/$number/../serial; do
        [ ! -e $file ] || read -r serial < $file
    done
    case $number in
        0:*) ;;
        *) echo "$target $(blkid -p -s UUID -o value $(readlink -f /dev/block/$number)) $serial" ;;
    esac
done < /proc/self/mountinfo
"""
MDSTAT = "cat /proc/mdstat"
STICK = """
until [ -e /sys/class/block/sda1 ]; do sleep 0.1; done
udevadm settle
for partition in /dev/sda[0-9]; do blkid -p -s LABEL -o value $partition; done
"""
# Says on the console what happens, for somebody outside who plugs what comes next.
WATCH = """\
[Unit]
DefaultDependencies=no
IgnoreOnIsolate=yes
{order}
[Service]
Type=oneshot
ExecStart=/bin/sh /watch
"""
DISK_COMES_LAST = """\
until [ "$(systemctl show -P SubState immucore.service)" = start ]; do sleep 0.2; done
echo the agent waits > /dev/console
until [ -e /sys/class/block/sda1 ]; do sleep 0.1; done
sleep {seconds}
echo the stick is there > /dev/console
"""
STICK_COMES_LAST = """\
until [ -e /sys/class/block/vda5 ] || [ -e /sys/class/block/vdb5 ]; do sleep 0.1; done
echo the disk is there > /dev/console
{hold}
"""
# Before the agent, and in one write(2), as efivarfs wants it; the four bytes are the variable's attributes.
LOADER = """\
[Unit]
DefaultDependencies=no
Before=immucore.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'cat /loader > \
/sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f'
"""
VARIABLES = "ls /sys/firmware/efi/efivars"
HELD_UP = "run/held-up"
SLOW = (
    'ACTION=="add", SUBSYSTEM=="block", {match}, '
    f"PROGRAM=\"/bin/sh -c ': > /{HELD_UP}; exec sleep {{seconds}}'\"\n"
)
SLOW_RULES = "etc/udev/rules.d/01-slow.rules"


def held_up(match: str, boot: int) -> dict[str, str]:
    """Return the files of an initramfs in which udev is slow with some disks, each boot differently."""
    rule = SLOW.format(match=match, seconds=0.2 + boot % 5 * 0.4)
    return {SLOW_RULES: rule}


def shuffled(boot: int, other: str) -> tuple[bool, dict[str, str]]:
    """Say whether the other disk comes first on the bus, and make udev slow with one of the two, or none."""
    slow = (OWN, other, None)[boot % 3]
    return boot % 2 == 1, held_up(f'ATTRS{{serial}}=="{slow}"', boot) if slow else {}


def foreign(work: Path, name: str, *labels: str) -> Disk:
    """Make a disk with partitions that have the names of the machine's own."""
    partitions = [Partition(f"{name}-{label}", label, 16) for label in labels]
    return make_disk(work / f"{name}.raw", "bookworm", partitions)


def booted(machine: Machine, *commands: str, **options: Any) -> Report:
    """Boot to the end of the initramfs, which must be a good one."""
    report = machine.boot(
        limit_s=120, until="initramfs", commands=(IDENTIFY, *commands), files=(HELD_UP,), **options
    )
    assert report.stage == "initramfs", report.console[-3000:]
    assert report.result.get("outcome") == "ok", report.console[-3000:]
    assert report.has(HELD_UP) == (SLOW_RULES in machine.initramfs_files)
    return report


def mounted(report: Report, target: str) -> tuple[str, str]:
    """Return the UUID of what is mounted on a path, and the serial of its disk; - for a mapping."""
    lines = [line.split(" ") for line in report.output(IDENTIFY).splitlines()]
    found = [(uuid, serial) for where, uuid, serial in lines if where == target]
    return found[-1]


def is_own(report: Report, disk: Disk, *places: str) -> None:
    """Everything is mounted from the machine's own disk, and from the right partition of it."""
    for target in places or PLACES:
        assert mounted(report, target) == (disk.partition(PLACES[target]).uuid, OWN), target


def inside(report: Report, number: int | str, serial: str = "-") -> None:
    """Persistent is what is inside of a stack, never the stack."""
    assert mounted(report, "/sysroot/usr/local") == (stacks.INNER_UUID.format(number), serial)
    assert report.mount("/sysroot/usr/local").writable


@pytest.fixture(scope="session")
def images() -> Mapping[str, Path]:
    """Return the stacks, made when the first test wants them."""
    return stacks.images()


@pytest.fixture(scope="session")
def usb_disk() -> Disk:
    """Return the ordinary disk of the derivative whose kernel knows USB."""
    return disks.cos_disk(suite=stacks.SUITE)


def stacked_disk(image: Path | None, name: str = "persistent") -> Disk:
    """Return a cOS disk in which a stack takes the place of the persistent partition; none with no image."""
    extra = (Partition(name, "", image=image),) if image else ()
    return disks.cos_disk(suite=stacks.SUITE, without=("persistent",), extra=extra)


# The same label on a second disk, and on a USB stick


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_labels_on_a_second_disk_and_on_a_usb_stick(
    machine: Callable[..., Machine], usb_disk: Disk, work: Path, moment: str, boot: int
) -> None:
    """The stick is there before the boot, comes in it before the machine's own disk, or comes after that."""
    labels = ("COS_OEM", "COS_PERSISTENT", "COS_STATE")
    stick = foreign(work, "stick", *labels).path
    slow = "stick" if moment == "before" and boot % 2 else "foreign"
    first, files = shuffled(boot, slow)
    others = [Extra(foreign(work, "foreign", "COS_OEM", "COS_PERSISTENT").path, "foreign", first=first)]

    def plug_stick(guest: Guest) -> None:
        guest.plug(stick, "stick", bus="usb")

    def plug_disk(guest: Guest) -> None:
        guest.plug(usb_disk.path, OWN)

    if moment == "before":
        others.append(Extra(stick, "stick", bus="usb"))
        stuck = machine(usb_disk, expect.ACTIVE, extra_disks=others, initramfs_files=files)
        report = booted(stuck, STICK)
    elif moment == "during":
        script = DISK_COMES_LAST.format(seconds=boot % 3 * 0.7)
        files |= {**unit("watch", WATCH.format(order="")), "watch": script}
        without = machine(
            usb_disk, expect.ACTIVE, extra_disks=others, with_disk=False, initramfs_files=files
        )
        report = booted(
            without, STICK, when=[("the agent waits", plug_stick), ("the stick is there", plug_disk)]
        )
    else:  # with the agent at work, or right before it begins
        held = boot % 2 == 1
        hold = "until [ -e /sys/class/block/sda1 ]; do sleep 0.1; done" if held else ""
        files = held_up(f'ATTRS{{serial}}=="{OWN}"', boot)
        files |= unit("watch", WATCH.format(order="Before=immucore.service" if held else ""))
        files["watch"] = STICK_COMES_LAST.format(hold=hold)
        own = machine(usb_disk, expect.ACTIVE, extra_disks=others, initramfs_files=files)
        report = booted(own, STICK, when=[("the disk is there", plug_stick)])

    is_own(report, usb_disk)
    assert report.output(STICK).split() == [*labels]


def test_state_label_on_a_second_disk_is_refused(
    machine: Callable[..., Machine], disk: Disk, work: Path, boot: int
) -> None:
    """Nobody says which disk was booted from: no choice by chance."""
    first, files = shuffled(boot, "foreign")
    extra = Extra(foreign(work, "foreign", "COS_STATE").path, "foreign", first=first)

    report = machine(disk, expect.ACTIVE, extra_disks=[extra], initramfs_files=files).boot(limit_s=120)

    expect.stopped(report, 3, "cannot choose a filesystem labelled 'COS_STATE': 2 devices have it")
    for words in (OWN, "foreign", disk.partition("state").uuid):
        assert words in report.console


@pytest.mark.parametrize("spelling", [f"/dev/disk/by-id/virtio-{OWN}", "PARTUUID={}"])
def test_boot_disk_decides_among_state_labels(
    machine: Callable[..., Machine], disk: Disk, work: Path, spelling: str, boot: int
) -> None:
    first, files = shuffled(boot, "foreign")
    extra = Extra(foreign(work, "foreign", "COS_STATE").path, "foreign", first=first)
    bootdisk = f"rd.cos.bootdisk={spelling.format(disk.partition('efi').partuuid)}"

    report = booted(machine(disk, f"{expect.ACTIVE} {bootdisk}", extra_disks=[extra], initramfs_files=files))

    is_own(report, disk)


def test_boot_loader_decides_among_state_labels(
    machine: Callable[..., Machine], disk: Disk, work: Path
) -> None:
    """It leaves in an EFI variable where it was loaded from (systemd.io, BOOT_LOADER_INTERFACE)."""
    extra = Extra(foreign(work, "foreign", "COS_STATE").path, "foreign", first=True)
    variable = b"\7\0\0\0" + f"{disk.partition('efi').partuuid}\0".encode("utf-16-le")
    files = {**unit("loader", LOADER), "loader": variable}

    report = booted(
        machine(disk, expect.ACTIVE, efi=True, extra_disks=[extra], initramfs_files=files), VARIABLES
    )

    is_own(report, disk)
    assert "LoaderDevicePartUUID" in report.output(VARIABLES)


def test_whole_disk_copied(machine: Callable[..., Machine], disk: Disk, boot: int) -> None:
    """Every UUID is there twice; only the disk that was booted from can tell."""
    first, files = shuffled(boot, "copy")
    extra = Extra(disk.path, "copy", first=first)
    cmdline = f"{expect.ACTIVE} rd.cos.bootdisk=/dev/disk/by-id/virtio-{OWN}"

    report = booted(machine(disk, cmdline, extra_disks=[extra], initramfs_files=files))

    is_own(report, disk)


def test_two_paths_to_one_disk(machine: Callable[..., Machine], disk: Disk, boot: int) -> None:
    """One serial, two devices: one thing, and one path to all of it."""
    files = held_up(f'KERNEL=="vd{"ab"[boot % 2]}*"', boot)

    report = booted(machine(disk, expect.ACTIVE, disk_paths=2, initramfs_files=files))

    is_own(report, disk)
    assert len({report.mount(target).source[: len("/dev/vda")] for target in PLACES}) == 1


def test_usb_stick_does_not_configure_a_machine_without_oem(
    machine: Callable[..., Machine], work: Path, boot: int
) -> None:
    own = disks.cos_disk(suite=stacks.SUITE, without=("oem",))
    stick = make_disk(
        work / "stick.raw",
        own.suite,
        (Partition("oem", "COS_OEM", 16, {"cos-layout.env": "RW_PATHS=/srv\n"}),),
    )
    first, files = shuffled(boot, "stick")
    extra = Extra(stick.path, "stick", bus="usb", first=first)

    report = machine(own, expect.ACTIVE, extra_disks=[extra], initramfs_files=files).boot(
        limit_s=120, until="initramfs", commands=(IDENTIFY, STICK)
    )

    assert report.result["outcome"] == "degraded"
    assert report.output(STICK) == "COS_OEM"
    is_own(report, own, "/run/initramfs/cos-state", "/sysroot/usr/local")
    assert report.mount("/sysroot/etc").fstype == "overlay"
    with pytest.raises(KeyError, match="/sysroot/oem"):
        report.mount("/sysroot/oem")


# LUKS


def key_file(number: int) -> dict[str, str]:
    """Return the files of an initramfs that has the key to a container."""
    return {f"etc/cryptsetup-keys.d/luks-{stacks.LUKS_UUID.format(number)}.key": stacks.PASSPHRASE}


def is_unlocked(report: Report, number: int) -> None:
    """Persistent is inside of a container, and the booted system will find it there."""
    inside(report, number)
    mapping = f"/dev/mapper/luks-{stacks.LUKS_UUID.format(number)}"
    assert report.mount("/sysroot/usr/local").source == mapping
    assert f"{mapping} /usr/local " in " ".join(report.fstab.split())
    is_own(report, disks.cos_disk(suite=stacks.SUITE), "/run/initramfs/cos-state", "/sysroot/oem")


@pytest.mark.parametrize(("name", "number"), [("luks", 1), ("luks-suffixed", 2), ("luks-silent", 3)])
def test_luks_with_a_key_file(
    machine: Callable[..., Machine], images: Mapping[str, Path], name: str, number: int, boot: int
) -> None:
    """The container has the label of what is inside, or its own, or none: it is never mounted itself."""
    files = {**key_file(number), **held_up('KERNEL=="dm-*|vda5"', boot)}

    report = booted(machine(stacked_disk(images[name]), expect.ACTIVE, initramfs_files=files))

    is_unlocked(report, number)
    assert "assphrase" not in report.console


def test_luks_with_a_passphrase(machine: Callable[..., Machine], images: Mapping[str, Path]) -> None:
    typed = [("enter passphrase", lambda guest: guest.type(f"{stacks.PASSPHRASE}\n"))]

    report = booted(machine(stacked_disk(images["luks"]), expect.ACTIVE), when=typed)

    is_unlocked(report, 1)
    assert any("with a passphrase" in line for line in report.messages("immucore.service"))


def test_luks_with_a_wrong_passphrase(machine: Callable[..., Machine], images: Mapping[str, Path]) -> None:
    typed = [("enter passphrase", lambda guest: guest.type_until("wrong\n", "cannot find a filesystem"))]

    report = machine(
        stacked_disk(images["luks"]), f"{expect.ACTIVE} rd.cos.timeout=45 rd.cos.fallback=off"
    ).boot(limit_s=180, when=typed)

    expect.stopped(report, 3, "cannot find a filesystem labelled 'COS_PERSISTENT'", "crypto_LUKS")
    warnings = "\n".join(report.messages("immucore.service", priority=4))
    assert "cannot unlock '/dev/vda5' with a passphrase" in warnings


def test_luks_with_a_tpm(machine: Callable[..., Machine], images: Mapping[str, Path]) -> None:
    own = stacked_disk(images["luks-tpm"])

    report = booted(machine(own, expect.ACTIVE, tpm=images["tpm"]))

    is_unlocked(report, 5)
    assert "assphrase" not in report.console
    assert any("with the TPM" in line for line in report.messages("immucore.service"))


def test_luks_that_nobody_wants_stays_locked(
    machine: Callable[..., Machine], images: Mapping[str, Path]
) -> None:
    """OEM is missing; somebody's data is in a container with a name of its own."""
    data = Partition("data", "", image=images["luks-other"])
    own = disks.cos_disk(suite=stacks.SUITE, without=("oem",), extra=(data,))

    report = machine(own, expect.ACTIVE, initramfs_files=key_file(4)).boot(limit_s=120, until="initramfs")

    assert report.result["outcome"] == "degraded"
    assert not any("unlock" in line for line in report.messages("immucore.service"))
    assert "assphrase" not in report.console


# md, LVM, whole disks


@pytest.mark.parametrize("number", [6, 7], ids=["metadata 1.0", "metadata 1.2"])
def test_md_array_and_not_its_leg(
    machine: Callable[..., Machine], images: Mapping[str, Path], number: int, boot: int
) -> None:
    """With metadata 1.0 the file system begins where the leg does."""
    own = stacked_disk(images[f"md{number}-a"])
    first, files = shuffled(boot, "leg")
    leg = Extra(images[f"md{number}-b"], "leg", first=first)

    report = booted(machine(own, expect.ACTIVE, extra_disks=[leg], initramfs_files=files), MDSTAT)

    inside(report, number)
    assert report.mount("/sysroot/usr/local").source.startswith("/dev/md")
    assert "[UU]" in report.output(MDSTAT)


def test_md_degraded(machine: Callable[..., Machine], images: Mapping[str, Path]) -> None:
    own = machine(stacked_disk(images["md6-a"]), f"{expect.ACTIVE} rd.cos.timeout=60")

    report = booted(own, MDSTAT)

    inside(report, 6)
    assert report.mount("/sysroot/usr/local").source.startswith("/dev/md")
    assert "[U_]" in report.output(MDSTAT)
    lines = report.messages("immucore.service")
    assert any(line.endswith("without the members that it lacks, degraded") for line in lines)


def test_lvm(machine: Callable[..., Machine], images: Mapping[str, Path], boot: int) -> None:
    files = held_up('KERNEL=="dm-*"', boot)

    report = booted(machine(stacked_disk(images["pv"]), expect.ACTIVE, initramfs_files=files))

    inside(report, 8)
    assert report.mount("/sysroot/usr/local").source == "/dev/mapper/cos-persistent"


def test_lvm_degraded(machine: Callable[..., Machine], images: Mapping[str, Path]) -> None:
    """Half of a mirror is enough; it is taken when the other half has not come."""
    own = machine(stacked_disk(images["mirror-a"]), f"{expect.ACTIVE} rd.cos.timeout=60")

    report = booted(own)

    inside(report, "a")
    assert report.mount("/sysroot/usr/local").source == "/dev/mapper/mirror-persistent"
    assert any(line.endswith(", degraded") for line in report.messages("immucore.service"))


def test_whole_disk_without_a_partition_table(
    machine: Callable[..., Machine], images: Mapping[str, Path], boot: int
) -> None:
    first, files = shuffled(boot, "whole")
    whole = Extra(images["whole"], "whole", first=first)

    report = booted(machine(stacked_disk(None), expect.ACTIVE, extra_disks=[whole], initramfs_files=files))

    inside(report, 9, "whole")
