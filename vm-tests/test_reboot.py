"""`immucore reboot` in a booted system: what systemd has of it, and that it reboots when it is time."""

from __future__ import annotations

import json
from collections.abc import Callable

import expect
import pytest
from disk import Disk
from machine import Machine

LATER, LATER_STILL = "window=2199-01-01 00:00 UTC/2h", "window=2199-02-03 04:00 UTC/2h"
NOBODY = "etcd: {endpoints: [http://127.0.0.1:1]}"
SETTINGS = f"mkdir -p /etc/immucore && echo '{NOBODY}' > /etc/immucore/upgrade.yaml"
OPEN = """echo 'window: "*-*-* *:00/5h"' >> /etc/immucore/upgrade.yaml"""
UNIT = "systemctl show --property=ActiveState,NextElapseUSecRealtime --value immucore-reboot"


@pytest.mark.parametrize("on", ["disk", "trixie_disk"])
def test_what_is_pending_can_be_replaced_and_given_up(
    request: pytest.FixtureRequest, machine: Callable[..., Machine], on: str
) -> None:
    # A command is known by its text, so that no two may have the same.
    replaced, locked, windowed, off = (f": {number}; " for number in range(4))
    commands = (
        f"immucore reboot '{LATER}'",
        f"immucore reboot '{LATER_STILL}'",
        f"{replaced}{UNIT}.timer",
        f"{replaced}cat /run/immucore/reboot.json",
        f"{SETTINGS} && immucore reboot etcd-lock && sleep 10",
        f"{locked}{UNIT}.service",
        f"{locked}{UNIT}.timer",
        "journalctl --output=cat --unit immucore-reboot",
        f"{OPEN} && immucore reboot etcd-lock && sleep 5",
        f"{windowed}{UNIT}.service",
        f"{windowed}{UNIT}.timer",
        "immucore reboot off",
        f"{off}systemctl list-units --all --plain --no-legend 'immucore-reboot*'",
        f"{off}ls /run/immucore/reboot.json",
        "immucore reboot-lock status",
    )
    report = machine(request.getfixturevalue(on), expect.ACTIVE).boot(limit_s=120, commands=commands)

    expect.healthy(report, "active", "/cOS/active.img")
    assert "this machine reboots at Tue 2199-01-01 00:00 UTC" in report.output(commands[0])
    assert "this machine reboots at Sun 2199-02-03 04:00 UTC" in report.output(commands[1])
    assert sorted(report.output(commands[2]).split("\n")) == ["Sun 2199-02-03 04:00:00 UTC", "active"]
    assert json.loads(report.output(commands[3])) == {"strategy": LATER_STILL}
    assert report.output(commands[5]).split() == ["active"]
    assert report.output(commands[6]).split() == ["inactive"]
    assert "waiting: cannot use etcd at http://127.0.0.1:1: Connection refused" in report.output(commands[7])
    assert report.output(commands[9]).split() == ["active"]
    assert report.output(commands[10]).split()[-1] == "active"
    assert "the reboot that was pending (etcd-lock) is given up" in report.output(commands[11])
    assert report.output(commands[12]) == ""
    assert report.commands[commands[13]].status != 0
    status = report.commands[commands[14]]
    assert status.status == 4
    assert "cannot use etcd" in status.output


def test_a_timer_reboots_when_the_window_opens(machine: Callable[..., Machine], disk: Disk) -> None:
    soon = 'window=$(date -u -d "+20 seconds" "+%F %T") UTC/5min'
    command = f'immucore reboot "{soon}" > /dev/ttyS0 2>&1; sleep 120'
    report = machine(disk, expect.ACTIVE).boot(limit_s=120, commands=(command,))

    assert "this machine reboots at " in report.console
    assert (report.ended, report.stage) == ("guest-reset", "none")


def test_in_an_open_window_it_reboots_at_once(machine: Callable[..., Machine], disk: Disk) -> None:
    command = "immucore reboot 'window=*-*-* *:*:00/1h' > /dev/ttyS0 2>&1; sleep 120"
    report = machine(disk, expect.ACTIVE).boot(limit_s=120, commands=(command,))

    assert "rebooting: the window is open" in report.console
    assert (report.ended, report.stage) == ("guest-reset", "none")
