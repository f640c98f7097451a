"""Machines made by `immucore install`, through real GRUB: whatever happens, they come up, and say so.

A boot here ends with the report; however many starts that took is on the console.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import derivative
import installed
import pytest
from derivative import run
from installed import JUDGED, STATUS, upgrade
from machine import Guest
from report import Report

LIMIT_S = 240.0
STEPS = 12  # of an upgrade
HOLDER = "/run/initramfs/cos-state"
NOTICE = "cat /run/motd.d/* 2>/dev/null"


def status(report: Report) -> dict[str, Any]:
    """Return what `immucore boot status` said; its exit status is in report.commands."""
    return dict(json.loads(report.commands[STATUS].output))


def states(report: Report) -> dict[str, str]:
    """Return the state of the slots that are counted."""
    return {slot: each["state"] for slot, each in status(report)["slots"].items() if slot != "recovery"}


def came_up(report: Report, slot: str, image: str = "first", *, wanted: bool = True) -> None:
    """The right image is in the right slot, nothing failed, and the status tells whether it was wanted."""
    assert report.stage == "system", report.console[-3000:]
    assert (report.slot, report.result["mode_booted"]) == (image, slot), report.console[-3000:]
    assert report.failed_units == []
    if STATUS in report.commands:
        assert status(report)["booted"] == slot
        assert report.commands[STATUS].status == (0 if wanted else 5), report.commands[STATUS].output
        assert (report.commands[NOTICE].output == "") == wanted if NOTICE in report.commands else True


def test_installed_machine_boots(work: Path) -> None:
    """Its first boot, and each slot once, chosen for one boot and for good."""
    machine = installed.machine(work, efi=True)

    first = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE, "immucore boot next passive"))
    second = machine.boot(limit_s=LIMIT_S, commands=(STATUS, "immucore boot next recovery"))
    third = machine.boot(limit_s=LIMIT_S, commands=(STATUS, "immucore boot default passive"))
    fourth = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(first, "active")
    assert states(first) == {"active": "good", "passive": "trying"}
    came_up(second, "passive")
    came_up(third, "recovery")
    came_up(fourth, "passive")


def truncate(image: Path) -> None:
    os.truncate(image, image.stat().st_size // 2)


def zero(image: Path) -> None:
    size = image.stat().st_size
    image.write_bytes(b"")
    os.truncate(image, size)


def corrupt(image: Path) -> None:
    """Break the checksum of the superblock: GRUB reads on, the kernel refuses."""
    with image.open("r+b") as file:
        file.seek(1024 + 0x3FC)
        file.write(b"\\xff\\xff\\xff\\xff")


@pytest.mark.parametrize("damage", [Path.unlink, truncate, corrupt])
def test_active_is_lost(work: Path, damage: Callable[[Path], None]) -> None:
    """Passive is booted, at once, and stays; people are told."""
    own = installed.changed(work, "state", lambda root: damage(root / "cOS/active.img"))
    machine = installed.machine(work, efi=True, own=own)

    report = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(report, "passive", wanted=False)
    assert report.has("/run/cos/upgrade_failure")
    assert states(report)["passive"] == "good"


def test_both_are_lost(work: Path) -> None:
    """Recovery is booted, makes both anew of its own image, and upgrades active."""

    def lose(root: Path) -> None:
        for name in ("active.img", "passive.img"):
            (root / "cOS" / name).unlink()

    own, source = installed.changed(work, "state", lose), installed.source("second")
    machine = installed.machine(work, efi=True, own=own, sources=(source,))

    report = machine.boot(
        limit_s=2 * LIMIT_S, commands=(STATUS, NOTICE, "immucore reset", upgrade("second"))
    )
    after = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE, "immucore boot next passive"))
    other = machine.boot(limit_s=LIMIT_S, commands=(STATUS,))

    came_up(report, "recovery", wanted=False)
    assert report.output("immucore reset")
    report.output(upgrade("second"))
    came_up(after, "active", "second")
    assert states(after) == {"active": "good", "passive": "trying"}
    came_up(other, "passive", "first")


@pytest.mark.parametrize("damage", [Path.unlink, zero])
def test_environment_is_lost(work: Path, damage: Callable[[Path], None]) -> None:
    """Active is booted, and what GRUB cannot make is made."""
    own = installed.changed(work, "oem", lambda root: damage(root / "grubenv"))
    machine = installed.machine(work, efi=True, own=own)

    report = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(report, "active")
    assert states(report)["active"] == "good"


@pytest.mark.parametrize(
    ("fault", "starts", "told"),
    [("unhealthy", 1, "the database is not there"), ("stuck", 1, "boot-complete.target")],
)
def test_no_verdict(work: Path, fault: str, starts: int, told: str) -> None:
    """A boot that comes to no good end is one try; here it is the last one."""
    faulty = {"extra_active_cmdline": f"{installed.FAULT}={fault}"}
    own = installed.changed(
        work, "oem", lambda root: installed.set_environment(root, tries=starts, **faulty)
    )
    machine = installed.machine(work, efi=False, own=own)

    report = machine.boot(limit_s=2 * LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(report, "passive", wanted=False)
    assert states(report) == {"active": "bad", "passive": "good"}
    assert told in report.console


def test_what_is_frozen_is_started_anew_by_the_hardware(work: Path) -> None:
    """PID 1 has crashed, and nobody but the watchdog restarts the machine: one try, here the last."""
    frozen = {"extra_active_cmdline": installed.FROZEN}
    own = installed.changed(
        work, "oem", lambda root: installed.set_environment(root, tries=1, **frozen), suite=installed.WATCHED
    )
    machine = installed.machine(work, efi=True, own=own, hardware=("-device", "i6300esb"))

    report = machine.boot(limit_s=2 * LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(report, "passive", wanted=False)
    assert states(report) == {"active": "bad", "passive": "good"}
    assert "watchdog did not stop" in report.console  # systemd has closed it, frozen
    for other in ("Kernel panic", "The machine restarts"):
        assert other not in report.console


def test_a_broken_initramfs(work: Path) -> None:
    """The kernel panics, three times, and a fallback is no reason to try it once more."""

    def damage(root: Path) -> None:
        derivative.write_file(root / "cOS/active.img", "boot/initrd", "no archive")

    machine = installed.machine(work, efi=True, own=installed.changed(work, "state", damage))

    report = machine.boot(limit_s=2 * LIMIT_S, commands=(JUDGED, STATUS, NOTICE))
    again = machine.boot(limit_s=LIMIT_S, commands=(STATUS, NOTICE))

    came_up(report, "passive", wanted=False)
    assert report.console.count("Kernel panic") == 3
    came_up(again, "passive", wanted=False)
    assert "Kernel panic" not in again.console


FULL = f"""\
mount -o remount,rw {HOLDER} && cd {HOLDER}
fallocate -l $(($(stat -f -c '%a*%S' .) - (50 << 20))) filler && ls -l cOS
{upgrade("second")}
"""
EMPTY = f"cd {HOLDER} && rm filler && ls cOS && cd / && mount -o remount,ro {HOLDER}"
EMPTIED = "echo the filler has gone >/dev/console"


@pytest.mark.soak
def test_power_cut_at_every_step_of_an_upgrade(work: Path, boots: int) -> None:
    """Wherever the power goes, both slots hold a whole image, and the old one or the new one boots.

    Before that the partition is full: nothing is changed by an upgrade that has no room. Without --boots the
    last steps are booted, and of the others only the disk is looked at.
    """
    source = installed.source("second")
    upgraded = installed.machine(work, efi=True, sources=(source,))
    cuts: dict[int, Path] = {}

    def cut(number: int) -> Callable[[Guest], None]:
        return lambda guest: cuts.update({number: guest.copy(upgraded.work / "disk0.qcow2", number)})

    report = upgraded.boot(
        limit_s=2 * LIMIT_S,
        commands=(JUDGED, FULL, EMPTY, EMPTIED, upgrade("second")),
        when=[
            (rf"(?s)the filler has gone.*step {number} of {STEPS}", cut(number))
            for number in range(1, STEPS + 1)
        ],
    )
    came_up(report, "active")
    assert report.commands[FULL].status != 0
    assert "MiB" in report.commands[FULL].output
    assert report.output(EMPTY).splitlines() == ["active.img", "passive.img"]
    report.output(upgrade("second"))
    assert sorted(cuts) == [*range(1, STEPS + 1)]

    for number, copy in cuts.items():
        machine = installed.machine(work, efi=True, sources=(source,))
        copy.rename(machine.work / "disk0.qcow2")
        with installed.mounted(installed.left(machine), "state") as root:
            for slot in ("active", "passive"):
                run("e2fsck", "-fn", root / f"cOS/{slot}.img")
        (machine.work / "disk0.raw").unlink()
        if number > STEPS - boots:
            after = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))
            came_up(after, "active", "second" if number == STEPS else "first")
            assert states(after) == {"active": "good", "passive": "good" if number == STEPS else "trying"}
        derivative.remove(machine.work)


def test_a_bad_upgrade_is_left_and_not_taken_again(work: Path) -> None:
    """Three tries, passive, the refusal, an upgrade from passive, a good one, and the way back.

    The first image is of Debian 13, whose tools make the others, of Debian 12.
    """
    bad, good = installed.source("panics", more="rdinit=/none"), installed.source("second")
    machine = installed.machine(work, efi=True, own=installed.disk("trixie"), sources=(bad, good))

    first = machine.boot(limit_s=2 * LIMIT_S, commands=(JUDGED, STATUS, upgrade("panics")))
    fallback = machine.boot(
        limit_s=3 * LIMIT_S,
        commands=(JUDGED, STATUS, NOTICE, upgrade("panics"), upgrade("second")),
    )
    second = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE, "immucore rollback"))
    back = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(first, "active")
    first.output(upgrade("panics"))
    came_up(fallback, "passive", wanted=False)
    assert fallback.console.count("Kernel panic") == 3
    assert states(fallback) == {"active": "bad", "passive": "good"}
    assert fallback.commands[upgrade("panics")].status != 0
    assert "judged it bad" in fallback.commands[upgrade("panics")].output
    fallback.output(upgrade("second"))
    came_up(second, "active", "second")
    assert states(second) == {"active": "good", "passive": "good"}
    second.output("immucore rollback")
    came_up(back, "active", "first")
