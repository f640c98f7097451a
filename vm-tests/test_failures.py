"""A boot that cannot go on stops at once, says why where people see it, and never switches its root."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import derivative
import disk as disks
import expect
import pytest
from disk import Disk, Partition, make_disk
from machine import Guest, Machine
from units import KILL, unit

SHELL = r"sh-5|:/root#|:/#"  # the prompt of an emergency shell
ALONE = f"{expect.ACTIVE} rd.cos.fallback=off"
# What initrd-cleanup does once, at the end of an initramfs, is done again and again: from before the agent,
# which is held until then, to after its end; the switch is held that long.
STORM = """\
[Unit]
DefaultDependencies=no
IgnoreOnIsolate=yes
After=systemd-udev-trigger.service
Before=initrd-cleanup.service initrd-switch-root.target initrd-switch-root.service
[Service]
Type=oneshot
ExecStart=/bin/sh /storm
"""
HOLD = """\
[Service]
ExecStartPre=/bin/sh -c 'until [ -e /run/isolated ]; do sleep 0.1; done'
"""
ISOLATE = """\
isolate() {
    systemctl --no-block isolate initrd-switch-root.target
    systemctl show -P SubState immucore.service >> /run/isolated
    systemctl daemon-reload
}
until [ "$(systemctl show -P SubState immucore.service)" = start-pre ]; do :; done
until [ "$(systemctl show -P SubState immucore.service)" = exited ]; do isolate; done
isolate
isolate
"""


def test_no_state_partition(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    disk = cos_disk(without=("state",))

    report = machine(disk, f"{ALONE} rd.cos.timeout=8").boot(limit_s=60)

    expect.stopped(
        report, 3, "cannot find a filesystem labelled 'COS_STATE'", "hint: labels seen: COS_GRUB (/dev/vda1)"
    )
    assert report.result["waits"][0]["missing"] == ["LABEL=COS_STATE"]


def test_image_missing(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    disk = cos_disk(state={"cOS/active.img": None})

    report = machine(disk, ALONE).boot(limit_s=45)

    expect.stopped(report, 4, "cannot find the image '/run/initramfs/cos-state/cOS/active.img'", "hint: ")


def test_image_garbage(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    disk = cos_disk(state={"cOS/active.img": b"garbage" * 100000})

    report = machine(disk, ALONE).boot(limit_s=45)

    expect.stopped(report, 4, "cannot mount '/run/initramfs/cos-state/cOS/active.img': no superblock")


def test_unknown_mode(machine: Callable[..., Machine], disk: Disk) -> None:
    report = machine(disk, "elemental.mode=aktiv elemental.image=/cOS/active.img quiet").boot(limit_s=45)

    expect.stopped(report, 2, "cannot boot the unknown mode 'aktiv'", "hint: write elemental.mode=active")


def test_layout_with_a_syntax_error(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    disk = cos_disk(oem={"cos-layout.env": "OVERLAY=tmpfs:10%\nRW_PATHS '/etc'\n"})

    report = machine(disk, ALONE).boot(limit_s=45)

    expect.stopped(
        report, 2, "cannot read line 2 of /oem/cos-layout.env: 'RW_PATHS '/etc'' is not an assignment"
    )


def test_recovery_goes_on_without_a_broken_layout(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    disk = cos_disk(oem={"cos-layout.env": "RW_PATHS '/etc'\n"})
    cmdline = "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.squashfs quiet"

    report = machine(disk, cmdline).boot(limit_s=90)

    assert (report.stage, report.slot, report.state) == ("system", "recovery", "running")
    warnings = "\n".join(report.messages("immucore.service", priority=4))
    assert "cannot read line 1 of /oem/cos-layout.env" in warnings
    assert "this boot goes on without it" in warnings
    expect.overlaid(report, *expect.RW_PATHS)


def test_oem_absent(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    """OEM is important and not required: the boot goes on, degraded, and says so."""
    disk = cos_disk(without=("oem",))

    report = machine(disk, f"{expect.ACTIVE} rd.cos.oemtimeout=5").boot(limit_s=90)

    assert (report.stage, report.slot, report.state) == ("system", "active", "running")
    assert (report.result["outcome"], report.result["exit_status"]) == ("degraded", 0)
    assert report.file("/run/cos/degraded") == "/oem: cannot find a filesystem labelled 'COS_OEM'\n"
    assert "this boot is degraded: /oem: cannot find a filesystem labelled 'COS_OEM'" in report.console
    assert "/oem" not in report.fstab
    expect.volume(report, "/usr/local", disk.number("persistent"))


def test_persistent_absent(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    """A node that boots without its data would start anew over it."""
    disk = cos_disk(without=("persistent",), oem={"cos-layout.env": "RW_PATHS='/etc /var /added'\n"})
    explain = "immucore explain /added"

    report = machine(disk, f"{expect.ACTIVE} rd.cos.timeout=8").boot(limit_s=60, commands=(explain,))

    expect.stopped(report, 3, "cannot find a filesystem labelled 'COS_PERSISTENT'")
    assert "RW_PATHS in /oem/cos-layout.env has /added" in report.output(explain)


def test_late_disk_is_waited_for(machine: Callable[..., Machine], disk: Disk) -> None:
    late = machine(disk, f"{expect.ACTIVE} {expect.TOLD}", with_disk=False)

    report = late.boot(limit_s=120, when=[(expect.waiting(3), lambda guest: guest.plug(disk.path, "late"))])

    assert (report.stage, report.slot, report.state) == ("system", "active", "running")
    assert report.result["outcome"] == "ok"
    wait = report.result["waits"][0]
    assert "LABEL=COS_STATE" in wait["specs"]
    assert wait["missing"] == []
    assert wait["took_usec"] > 20e6
    told = [line for line in report.messages("immucore.service") if line.startswith("waiting for")]
    assert 3 <= len(told) <= 1 + wait["took_usec"] / 10e6 + 1
    for line in told:
        assert "a filesystem labelled 'COS_STATE'" in line
        assert "seen: " in line


def test_two_disks_with_the_same_label(
    machine: Callable[..., Machine], disk: Disk, cos_disk: Callable[..., Disk]
) -> None:
    """Neither is the right one by chance."""
    other = cos_disk()

    report = machine(disk, expect.ACTIVE, extra_disks=(other.path,)).boot(limit_s=60)

    expect.stopped(
        report, 3, "cannot choose a filesystem labelled 'COS_STATE': 2 devices have it", "/dev/vdb4"
    )


def test_sigterm_is_a_failed_boot(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    disk = cos_disk(without=("persistent",))  # so that the agent waits, in the middle of its work

    report = machine(disk, expect.ACTIVE, initramfs_files=unit("kill", KILL)).boot(limit_s=60)

    expect.stopped(report, 4, "stopped by signal 15 in the middle of the boot")
    assert report.mount("/sysroot").source.startswith("/dev/loop")


def test_isolate_storm_loses_no_mount(machine: Callable[..., Machine], disk: Disk) -> None:
    hold = {"etc/systemd/system/immucore.service.d/90-hold.conf": HOLD}
    storm = machine(disk, expect.ACTIVE, initramfs_files=unit("storm", STORM) | {"storm": ISOLATE} | hold)

    report = storm.boot(limit_s=120, files=("run/isolated",))

    expect.healthy(report, "active", "/cOS/active.img")
    assert any(message.startswith("Reloading") for message in report.messages())
    isolated = report.file("/run/isolated").split()
    assert isolated[0] in ("start-pre", "start")
    assert isolated[-2:] == ["exited"] * 2
    steps = json.loads(report.file("/run/immucore/steps.json"))["steps"]
    planned = [step["operation"] for step in steps]
    mounted = {mount.target for mount in report.mountinfo}
    kinds = ("mount", "loop", "overlay", "bind")
    targets = [each["target"] for each in planned if each["kind"] in kinds]
    assert len(targets) > 8
    for target in targets:
        assert (target.removeprefix("/sysroot") or "/") in mounted


# Before the agent starts: what udev has loaded (immucore-cmdline.sh).
LOADED = """\
[Unit]
DefaultDependencies=no
Before=immucore.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c '{}'
"""
WAIT_FOR_BOTH = "until [ -e /sys/module/loop ] && [ -e /sys/module/overlay ]; do sleep 0.1; done"
SLOW_NULL = 'SUBSYSTEM=="mem", KERNEL=="null", PROGRAM="/bin/sleep 60"\n'


def test_udev_loads_loop_and_overlay(machine: Callable[..., Machine], disk: Disk) -> None:
    files = unit("loaded", LOADED.format(WAIT_FOR_BOTH))

    report = machine(disk, expect.ACTIVE, initramfs_files=files).boot(limit_s=45, until="initramfs")

    assert report.result["outcome"] == "ok"


def test_agent_is_faster_than_udev(machine: Callable[..., Machine], disk: Disk) -> None:
    """Then the kernel loads what is asked for."""
    files = unit("loaded", LOADED.format("ls /sys/module > /run/loaded"))
    files |= {"etc/udev/rules.d/01-slow.rules": SLOW_NULL}

    report = machine(disk, expect.ACTIVE, initramfs_files=files).boot(
        limit_s=45, until="initramfs", files=("run/loaded",)
    )

    assert report.result["outcome"] == "ok"
    assert not {"loop", "overlay"} & {*report.file("/run/loaded").split()}


# When the root is mounted from it, udev says of the loop device what was true before: nothing is attached.
STALE_RULE = """\
SUBSYSTEM=="block", KERNEL=="loop*", ACTION=="add", ENV{SYSTEMD_READY}="1"
SUBSYSTEM=="block", KERNEL=="loop*", ACTION=="change", \\
    PROGRAM="/bin/sh -c 'sleep 0.2; : > /run/said-late'", ENV{SYSTEMD_READY}="0"
"""
SAID_LATE = """\
[Unit]
DefaultDependencies=no
After=immucore.service
Before=initrd-root-fs.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'until [ -e /run/said-late ]; do sleep 0.1; done; udevadm settle'
"""


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_what_udev_says_late_of_a_loop_device_costs_no_mount(
    machine: Callable[..., Machine], suite: str
) -> None:
    derivative.reporting_initramfs(suite, "systemd")
    stale = {"etc/udev/rules.d/99-t-stale.rules": STALE_RULE} | unit("said-late", SAID_LATE)

    report = machine(disks.cos_disk(suite=suite), expect.ACTIVE, initramfs_files=stale).boot(limit_s=90)

    expect.healthy(report, "active", "/cOS/active.img")
    assert "Failed unmounting" not in report.console


UNMOUNT = """\
[Unit]
DefaultDependencies=no
After=immucore.service
Before=initrd-root-fs.target
[Service]
Type=oneshot
ExecStart=/bin/umount /sysroot/usr/local
"""
GONE = "/sysroot/usr/local, which immucore mounted, is no longer mounted"
NO_AGENT = {"usr/lib/immucore/_internal/libpython3.11.so.1.0": "not a library"}


def test_guard_stops_a_boot_without_a_result(machine: Callable[..., Machine], disk: Disk) -> None:
    """Somebody unmounts what the agent mounted: the root is not switched."""
    report = machine(disk, expect.ACTIVE, initramfs_files=unit("unmount", UNMOUNT)).boot(limit_s=60)

    assert report.stage == "initramfs"
    told = f"immucore-guard: {GONE}"
    assert report.file("/run/immucore/summary").startswith(told)
    assert report.console.count(told) == 2  # at once, and above the prompt
    assert "Switching root" not in report.console


def test_agent_that_cannot_start_is_a_failed_boot(machine: Callable[..., Machine], disk: Disk) -> None:
    report = machine(disk, expect.ACTIVE, initramfs_files=NO_AGENT).boot(limit_s=45)

    assert report.stage == "initramfs"
    assert "immucore: the agent ended without a word (exit-code)" in report.console
    assert "hint: type journalctl -u immucore.service" in report.console
    assert "Switching root" not in report.console


@pytest.mark.parametrize(
    ("files", "told"),
    [(NO_AGENT, "the agent ended without a word"), (unit("unmount", UNMOUNT), GONE)],
    ids=["agent", "guard"],
)
def test_onfail_reboot_needs_no_agent(
    machine: Callable[..., Machine], disk: Disk, files: dict[str, str], told: str
) -> None:
    """It could not start, or its mounts are gone when it has ended: systemd restarts the machine."""
    report = machine(disk, f"{expect.ACTIVE} rd.cos.onfail=reboot", initramfs_files=files).boot(limit_s=60)

    assert (report.ended, report.stage) == ("guest-reset", "none")
    assert told in report.console
    assert "Switching root" not in report.console
    assert "Kernel panic" not in report.console


def test_debug_tells_everything(machine: Callable[..., Machine], disk: Disk) -> None:
    report = machine(disk, f"{expect.ACTIVE} rd.cos.debug").boot(limit_s=90)

    expect.healthy(report, "active", "/cOS/active.img")
    journal = "\n".join(report.messages("immucore.service"))
    for text in (
        "command line: ",
        "parsed: Cmdline(",
        "device: Device(path='/dev/vda4'",
        "plan: loop ",
        "done in ",
    ):
        assert text in journal
    assert "mountinfo:" in journal
    assert journal.count("\n") > 40


def test_debugrw_makes_root_and_state_writable(machine: Callable[..., Machine], disk: Disk) -> None:
    touch = "touch /usr/bin/debugged /run/initramfs/cos-state/debugged"

    report = machine(disk, f"{expect.ACTIVE} rd.cos.debugrw rd.cos.wrong=1").boot(
        limit_s=90, commands=(touch,)
    )

    assert (report.stage, report.slot, report.state) == ("system", "active", "running")
    assert report.output(touch) == ""
    assert report.mount("/").writable
    warnings = "\n".join(report.messages("immucore.service", priority=4))
    assert "'rd.cos.wrong=1' on the kernel command line is not a key of immucore" in warnings


def test_boot_goes_on_after_a_repair(work: Path, cos_disk: Callable[..., Disk]) -> None:
    """The emergency shell of an ordinary initramfs: what was missing is plugged in, and `exit` is typed."""
    disk = cos_disk(without=("persistent",))
    volume = Partition("persistent", "COS_PERSISTENT", 16)
    missing = make_disk(work / "missing.raw", disk.suite, (volume,))
    broken = Machine(disk, f"{expect.ACTIVE} rd.cos.timeout=8", work=work)
    kernel = broken.kernel(derivative.initramfs(disk.suite), broken.cmdline)
    arguments = [*broken.arguments(), *kernel, "-accel", "tcg"]
    arguments += ["-device", "pcie-root-port,id=port0,chassis=1"]
    answer = r"mode=1 /dev/\w+\s"
    ask = "echo root=$(stat -f -c %T /) mode=$(cat /run/cos/active_mode) $(findmnt -no SOURCE /usr/local)\n"

    with Guest(work / "console.1", arguments) as guest:
        guest.run(
            120,
            [
                ("The boot stops here", lambda it: it.plug(missing.path, "missing")),
                ("Control-D to continue", lambda it: it.type_until("\n", SHELL)),
                (SHELL, lambda it: it.type_until("exit\n", "login: root")),
                ("login: root", lambda it: it.type_until(ask, answer)),
                (answer, lambda it: it.cut_power()),
            ],
        )

    assert "cannot find a filesystem labelled 'COS_PERSISTENT'" in guest.console
    assert "root=ext2/ext3 mode=1 /dev/vdb1" in guest.console


def test_disabled_agent_that_fails_stops_nobody(machine: Callable[..., Machine], plain_disk: Disk) -> None:
    cmdline = "root=PARTLABEL=root rw quiet cos-img/filename=/x.img rd.cos.disable"

    report = machine(plain_disk, cmdline, initramfs_files=NO_AGENT).boot(limit_s=90)

    assert (report.stage, report.state) == ("system", "running")


@pytest.mark.parametrize(
    ("suite", "variant"), [("bookworm", "systemd"), ("bookworm", "shell"), ("trixie", "systemd")]
)
def test_self_test_passes_in_the_initramfs(suite: str, variant: str) -> None:
    """Every module imports and every library opens, with nothing but what dracut put there."""
    unpacked = derivative.unpacked(suite, variant)
    for argument in ("self-test", "--version"):
        derivative.run("chroot", unpacked, "/usr/lib/immucore/immucore", argument)
