"""The tools on the booted machine: what they say is what was done."""

from __future__ import annotations

import json
from collections.abc import Callable

import expect
from disk import Disk
from machine import Machine

LAYOUT = 'PERSISTENT_STATE_PATHS="/home /var/log"\nPERSISTENT_STATE_BIND=true\n'


def test_plan_and_explain_on_the_running_machine(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    disk = cos_disk(oem={"cos-layout.env": LAYOUT})
    plan, explain, again = "immucore plan --json", "immucore explain /home/somebody", "immucore boot"

    report = machine(disk, expect.ACTIVE).boot(limit_s=90, commands=(plan, explain, again))

    expect.healthy(report, "active", "/cOS/active.img")
    executed = json.loads(report.file("/run/immucore/plan.json"))["operations"]
    planned = json.loads(report.output(plan))["operations"]
    assert planned == executed
    assert report.output(explain).splitlines() == [
        "loop /run/initramfs/cos-state/cOS/active.img on /sysroot (ro)",
        "    because cos-img/filename=/cOS/active.img; required",
        "bind /sysroot/usr/local/.state/home.bind on /sysroot/home",
        "    because PERSISTENT_STATE_PATHS in /oem/cos-layout.env has /home; important",
    ]
    assert report.commands[again].status == 2
    assert "cannot boot a system that is running" in report.commands[again].output
