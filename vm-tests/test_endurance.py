"""What a machine has to bear: storms of events while it waits, failures that everyone has to see."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import derivative
import expect
import pytest
from disk import Disk
from machine import Machine
from report import Report
from units import KILL, unit

STORM_UNIT = """\
[Unit]
DefaultDependencies=no
IgnoreOnIsolate=yes
After=systemd-udev-trigger.service
[Service]
ExecStart=-/bin/sh /storm
"""
# Begins when the agent has subscribed to uevents (protocol 15; the port has the process in its low bits),
# ends with it, and writes how much memory it has taken by then. The disk comes after the first trigger, when
# that has been written once: how long one takes, and what of it the agent lives to see, depends on the host.
STORM = """\
until agent=$(systemctl show -P MainPID immucore.service) && [ "$agent" != 0 ]; do :; done
subscribed() {
    while read -r _ protocol port _; do
        [ "$protocol" != 15 ] || [ $((port & 4194303)) != "$agent" ] || return 0
    done < /proc/net/netlink
    return 1
}
until subscribed; do sleep 0.1; done
number=0
while [ $number -lt 2000 ]; do
    echo change > /sys/class/mem/null/uevent
    number=$((number + 1))
done
while [ -e /proc/$agent/status ]; do
    udevadm trigger --action=change
    while read -r key value _; do
        [ "$key" != VmHWM: ] || echo "$value" > /run/storm
    done < /proc/$agent/status
    [ "$number" -eq 0 ] || echo "$number events" > /dev/console
    number=0
done
"""
MAX_MEMORY_KIB = 64 * 1024

KERNEL_LINE = re.compile(r"^\[ *\d+\.\d+\] .*$", re.MULTILINE)
MAX_EMERGENCY_USEC = 5e6
FAILED = "systemctl show immucore.service --value --property=InactiveEnterTimestampMonotonic"
REACHED = "systemctl show emergency.service --value --property=ActiveEnterTimestampMonotonic"


def squeezed(text: str) -> str:
    """Return a text as it is compared across screens of different width."""
    return re.sub(r"\s+", "", text)


def said_last(report: Report) -> None:
    """On both consoles the summary is the last thing: where a person gets a prompt, the report was made."""
    summary = squeezed(report.file("/run/immucore/summary"))
    serial = squeezed(KERNEL_LINE.sub("", report.console))
    assert serial.endswith(summary), report.console[-2000:]
    assert squeezed(report.screen).endswith(summary), report.screen


NO_IMAGE: Mapping[str, Any] = {"state": {"cOS/active.img": None}}
NO_DATA: Mapping[str, Any] = {"without": ("persistent",)}
FAILURES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str], str, int, str]] = {
    "image": (NO_IMAGE, {}, "", 4, "cannot find the image"),
    "persistent": (NO_DATA, {}, "rd.cos.timeout=8", 3, "cannot find a filesystem labelled 'COS_PERSISTENT'"),
    "sigterm": (NO_DATA, unit("kill", KILL), "", 4, "stopped by signal 15 in the middle of the boot"),
}


@pytest.mark.parametrize(
    ("failure", "suite", "initramfs"),
    [
        *((failure, "bookworm", "systemd") for failure in FAILURES),
        ("image", "trixie", "systemd"),
        ("image", "bookworm", "shell"),
    ],
)
def test_both_consoles_end_with_the_summary(
    machine: Callable[..., Machine],
    cos_disk: Callable[..., Disk],
    failure: str,
    suite: str,
    initramfs: str,
) -> None:
    made, files, cmdline, status, text = FAILURES[failure]
    derivative.reporting_initramfs(suite, initramfs)
    disk = cos_disk(suite=suite, **made)
    broken = machine(
        disk,
        f"console=tty1 {expect.ACTIVE} rd.cos.fallback=off {cmdline}",
        initramfs=initramfs,
        initramfs_files=files,
        screen=True,
    )

    # Counted in instructions: how long a failure takes must not depend on what else this host does.
    report = broken.boot(limit_s=240, commands=(expect.UPTIME, FAILED, REACHED), icount_shift=1)

    expect.stopped(report, status, text)
    said_last(report)
    expect.soon(report)
    if initramfs == "systemd":
        failed, reached = int(report.output(FAILED)), int(report.output(REACHED))
        assert 0 < reached - failed < MAX_EMERGENCY_USEC


def test_uevent_storm_during_a_wait(machine: Callable[..., Machine], disk: Disk) -> None:
    """2000 events and then udevadm trigger in a loop, while the disk comes."""
    late = machine(
        disk,
        f"{expect.ACTIVE} rd.cos.timeout=150",
        initramfs_files=unit("storm", STORM_UNIT) | {"storm": STORM},
        with_disk=False,
    )

    report = late.boot(
        limit_s=240, files=("run/storm",), when=[(r"2000 events", lambda guest: guest.plug(disk.path))]
    )

    assert (report.stage, report.slot, report.state) == ("system", "active", "running")
    assert report.result["outcome"] == "ok"
    assert all(wait["missing"] == [] for wait in report.result["waits"])
    assert report.result["waits"][0]["took_usec"] > 1e6
    assert int(report.file("/run/storm")) < MAX_MEMORY_KIB
    assert len([line for line in report.messages("immucore.service") if line.startswith("waiting")]) < 20
