"""`immucore reboot` in a booted system: what systemd has of it, and that it reboots when it is time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import expect
import pytest
from disk import Disk, Partition
from machine import Machine

LATER, LATER_STILL = "window=2199-01-01 00:00 UTC/2h", "window=2199-02-03 04:00 UTC/2h"
NOBODY = "etcd: {endpoints: [http://127.0.0.1:1]}"
SETTINGS = f"mkdir -p /etc/immucore && echo '{NOBODY}' > /etc/immucore/upgrade.yaml"
CLIENTS, PEERS = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
ETCD = (
    "mkdir -p /run/etcd /etc/immucore && mount LABEL=ETCD /run/etcd && chmod 755 /run/etcd/etcd"
    f" && echo 'etcd: {{endpoints: [{CLIENTS}]}}' > /etc/immucore/upgrade.yaml"
    " && systemd-run --unit=etcd --service-type=notify /run/etcd/etcd --data-dir /run/etcd/data"
    f" --listen-client-urls {CLIENTS} --advertise-client-urls {CLIENTS} --listen-peer-urls {PEERS}"
    f" --initial-advertise-peer-urls {PEERS} --initial-cluster default={PEERS}"
)
# A verdict gives the slot back where etcd is set up: no test does that before the boot's own.
JUDGED = "timeout 60 sh -c 'while systemctl is-active --quiet immucore-health; do sleep 0.2; done'"
JUDGE = "systemctl start immucore-health"
OPEN = """echo 'window: "*-*-* *:00/5h"' >> /etc/immucore/upgrade.yaml"""
UNIT = "systemctl show --property=ActiveState,NextElapseUSecRealtime --value immucore-reboot"


@pytest.mark.parametrize("on", ["disk", "trixie_disk"])
def test_what_is_pending_can_be_replaced_and_given_up(
    request: pytest.FixtureRequest, machine: Callable[..., Machine], on: str
) -> None:
    # A command is known by its text, so that no two may have the same.
    replaced, locked, windowed, off = (f": {number}; " for number in range(4))
    commands = (
        f"{JUDGED}; immucore reboot '{LATER}'",
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


def test_a_slot_is_taken_for_a_reboot_and_given_back_by_the_next_verdict(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    etcd = Partition(
        name="etcd", label="ETCD", size_mib=192, files={"etcd": Path("/usr/bin/etcd")}, fstype="ext4"
    )
    kept = machine(cos_disk(extra=(etcd,)), expect.ACTIVE, keep_writes=True)
    first = kept.boot(limit_s=120, commands=(f"{ETCD} && immucore reboot etcd-lock; sleep 120",))
    taken = "immucore reboot-lock status"
    free = f"{JUDGE} && timeout 60 sh -c 'until {taken} | grep 0.of.1; do sleep 1; done'"
    second = kept.boot(limit_s=120, commands=(JUDGED, ETCD, taken, free))

    assert (first.ended, first.stage) == ("guest-reset", "none")
    expect.healthy(second, "active", "/cOS/active.img")
    assert "immucore/reboot-lock/default: 1 of 1 slots taken" in second.output(taken)
    assert "0123456789abcdef0123456789abcdef  2" in second.output(taken)
    assert second.output(free) == "immucore/reboot-lock/default: 0 of 1 slots taken"
    assert "the slot of the reboot lock is given back" in second.messages("immucore-reboot-release.service")
