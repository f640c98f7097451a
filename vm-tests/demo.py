"""The demo machine: boots a slot and shows a person what the agent made of it. `make demo` calls this."""

from __future__ import annotations

import argparse
import json
import sys

import derivative
import disk as disks
import story
from machine import Machine
from report import Mounted, Report
from rich.console import Console
from rich.table import Table

LAYOUT = """\
PERSISTENT_STATE_PATHS="/etc/ssh /home /var/log"
PERSISTENT_STATE_BIND="true"
"""
SLOTS = {
    "active": "root=LABEL=COS_STATE cos-img/filename=/cOS/active.img",
    "passive": "root=LABEL=COS_STATE cos-img/filename=/cOS/passive.img",
    "recovery": "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.squashfs",
}
KERNEL = ("/dev", "/proc", "/sys")  # what is mounted there shows the kernel, and nothing that is kept


def role(mount: Mounted) -> str:
    """Tell what becomes of a change below a mount."""
    if not mount.writable:
        return "read-only"
    if "upperdir=/run/" in ",".join(mount.options) or mount.fstype == "tmpfs":
        return "ephemeral"
    return "persistent"


def backing(mount: Mounted, report: Report) -> str:
    """Tell where the content of a mount is kept."""
    if mount.source in report.backing_files:
        return report.backing_files[mount.source]
    upper = next((option[9:] for option in mount.options if option.startswith("upperdir=")), "")
    if upper:
        return f"the image, changes in {upper}"
    return f"{mount.source}{mount.root if mount.root != '/' else ''}"


def show_mounts(console: Console, report: Report) -> None:
    """Print the mount table by role."""
    table = Table(title="What is mounted", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("role", "path", "type", "kept in"):
        table.add_column(column, overflow="fold")
    style = {"read-only": "cyan", "ephemeral": "yellow", "persistent": "green"}
    mounts = [mount for mount in report.mountinfo if not mount.target.startswith(KERNEL)]
    for name, colour in style.items():
        for mount in sorted((m for m in mounts if role(m) == name), key=lambda m: m.target.split("/")):
            if not mount.target.startswith("/run/") or mount.target in (
                "/run/overlay",
                "/run/initramfs/cos-state",
            ):
                table.add_row(f"[{colour}]{name}[/]", mount.target, mount.fstype, backing(mount, report))
    console.print(table, "")


def show_steps(console: Console, report: Report) -> None:
    """Print the timeline of the agent's steps."""
    table = Table(title="What the agent did", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("at, ms", justify="right")
    table.add_column("took, ms", justify="right")
    table.add_column("outcome")
    table.add_column("step", overflow="fold")
    table.add_column("because", overflow="fold", style="dim")
    for step in json.loads(report.file("/run/immucore/steps.json"))["steps"]:
        at = (step["started_usec"] - report.result["started_usec"]) / 1000
        operation = step["operation"]
        row = (
            f"{at:.1f}",
            f"{step['took_usec'] / 1000:.1f}",
            step["outcome"],
            operation["text"],
            operation["why"],
        )
        table.add_row(*row)
    console.print(table, "")


def show_time(console: Console, report: Report) -> None:
    """Print where the time of the boot went.

    An emulated machine is some ten times slower than a real one.
    """
    manager = {
        name: int(value) for name, value in report.manager.items() if name.endswith("TimestampMonotonic")
    }
    starting, finished = report.unit_usec("immucore.service")
    initramfs, userspace = manager["InitRDTimestampMonotonic"], manager["UserspaceTimestampMonotonic"]
    began, took = report.result["started_usec"], report.result["took_usec"]
    parts = (
        ("kernel", initramfs),
        ("initramfs, before the agent", starting - initramfs),
        ("the agent's interpreter starts", began - starting),
        ("the agent mounts the system", took),
        ("initramfs, after the agent", userspace - began - took),
        ("system, until it was up", manager["FinishTimestampMonotonic"] - userspace),
    )
    table = Table(
        title="Where the time went (emulated)", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("")
    whole = sum(usec for _, usec in parts)
    for name, usec in parts:
        table.add_row(name, f"{usec / 1e6:.2f}", "█" * round(50 * usec / whole))
    console.print(table, f"Agent's unit: {(finished - starting) / 1e6:.2f} s of {whole / 1e6:.2f} s.")


def main() -> int:
    """Boot the machine; exit status 0 when it came up as it should."""
    parser = argparse.ArgumentParser(prog="make demo", description="Boot the demo machine.")
    parser.add_argument("--slot", choices=SLOTS, default="active")
    parser.add_argument("--shell", action="store_true", help="take its console instead of a report")
    parser.add_argument("--scenario", choices=["bad-upgrade"], help="a story of several boots instead")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    derivative.require_tools()
    if arguments.scenario:
        return story.tell(console)
    disk = disks.cos_disk(oem={"cos-layout.env": LAYOUT})
    machine = Machine(disk, SLOTS[arguments.slot] + ("" if arguments.shell else " quiet"))
    if arguments.shell:
        console.print(
            "The console of the machine follows. Ctrl-A X switches it off; `immucore explain` tells why.\n"
        )
        return machine.interactive()
    with console.status(f"booting {arguments.slot} in QEMU, without KVM"):
        report = machine.boot(limit_s=180, poweroff="fast")
    if report.stage != "system":
        console.print(report.console[-4000:], markup=False)
        console.print(f"[red]The machine did not come up[/]: {report.ended}, {report.result.get('error')}")
        return 1
    console.print(f"[bold]{report.slot} is {report.state}[/], {report.seconds:.0f} s after QEMU's start.\n")
    show_mounts(console, report)
    show_steps(console, report)
    show_time(console, report)
    return 0 if report.state == "running" else 1


if __name__ == "__main__":
    sys.exit(main())
