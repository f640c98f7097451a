"""Machines made by `immucore install`, through real GRUB: whatever happens, they come up, and say so.

A boot here ends with the report; however many starts that took is on the console.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import installed
import pytest
from installed import JUDGED, STATUS, upgrade
from report import Report

LIMIT_S = 240.0
EFI = pytest.mark.parametrize("efi", [True], ids=["efi"])
BOTH = pytest.mark.parametrize("efi", [True, False], ids=["efi", "bios"])
NOTICE = "cat /run/motd.d/* 2>/dev/null"
STARTS = r"\[ +0\.000000\] Linux version|^immucore: "


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


@BOTH
def test_installed_machine_boots(work: Path, efi: bool) -> None:
    """Its first boot, and each slot once, chosen for one boot and for good."""
    machine = installed.machine(work, efi=efi)

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


@pytest.mark.parametrize("damage", [Path.unlink, zero, truncate, corrupt])
def test_active_is_lost(work: Path, damage: Callable[[Path], None]) -> None:
    """Passive is booted, at once, and stays; people are told."""
    own = installed.changed(work, "state", lambda root: damage(root / "cOS/active.img"))
    machine = installed.machine(work, efi=True, own=own)

    report = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(report, "passive", wanted=False)
    assert report.has("/run/cos/upgrade_failure")
    assert states(report)["passive"] == "good"


def test_both_are_lost(work: Path) -> None:
    def lose(root: Path) -> None:
        for name in ("active.img", "passive.img"):
            (root / "cOS" / name).unlink()

    machine = installed.machine(work, efi=True, own=installed.changed(work, "state", lose))

    report = machine.boot(limit_s=LIMIT_S, commands=(STATUS, NOTICE, "immucore reset"))
    after = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(report, "recovery", wanted=False)
    assert report.output("immucore reset")
    came_up(after, "active")


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, zero, lambda file: file.write_bytes(b"short")],
    ids=["missing", "zeroed", "short"],
)
def test_environment_is_lost(work: Path, damage: Callable[[Path], None]) -> None:
    """Active is booted, and what GRUB cannot make is made."""
    own = installed.changed(work, "oem", lambda root: damage(root / "grubenv"))
    machine = installed.machine(work, efi=True, own=own)

    report = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(report, "active")
    assert states(report)["active"] == "good"


BAD: dict[str, dict[str, Any]] = {
    "panics": {"more": "rdinit=/none"},
    "initramfs": {"files": {"boot/initrd": "no archive"}},
    "unhealthy": {
        "files": {
            "etc/immucore/health.yaml": "deadline: 45\n",
            "etc/immucore/checks.d/never": "#!/bin/sh\necho 'the database is not there'\nexit 1\n",
        }
    },
    "hangs": {
        "files": {
            "etc/immucore/health.yaml": "deadline: 45\n",
            "etc/systemd/system/boot-complete.target.requires/stuck.service": (
                "[Unit]\nBefore=boot-complete.target\n"
                "[Service]\nType=oneshot\nExecStart=/bin/sleep infinity\n"
            ),
        }
    },
}


def test_a_bad_upgrade_is_left_and_not_taken_again(work: Path) -> None:
    """Three tries, passive, the refusal, an upgrade from passive, a good one, and the way back."""
    bad, good = installed.source("panics", **BAD["panics"]), installed.source("second")
    machine = installed.machine(work, efi=True, sources=(bad, good))

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
