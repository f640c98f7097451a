"""What a booted, or a failed, machine told about itself: the tar of guest/report.sh, parsed on demand."""

from __future__ import annotations

import functools
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mounted:
    """One line of mountinfo."""

    target: str
    source: str
    fstype: str
    root: str  # the directory of the file system that is mounted: not "/" for a bind
    options: tuple[str, ...]  # of the mount and of the file system
    device: str  # major:minor

    @property
    def writable(self) -> bool:
        """Tell whether both the mount and the file system can be written to."""
        return "ro" not in self.options


@dataclass(frozen=True)
class CommandResult:
    """What a test's command printed (both streams) and returned inside the machine."""

    status: int
    output: str


@dataclass(frozen=True)
class Report:
    """The end of a boot, from outside (console, ended, seconds) and, if it got that far, from inside."""

    console: str
    ended: str  # guest-shutdown, guest-reset, guest-panic, host-qmp-quit, limit
    seconds: float
    commands_asked: tuple[str, ...]
    answer: Mapping[str, bytes]  # the files of the tar, by their paths; empty when nothing was written

    @property
    def stage(self) -> str:
        """Who wrote the report: "system" after the switch, "initramfs" before it, "none" if nobody did."""
        return self.answer["stage"].decode().strip() if "stage" in self.answer else "none"

    def text(self, name: str) -> str:
        """Return a part of the report, or "" when the machine has not got it."""
        return self.answer.get(name, b"").decode(errors="replace")

    def has(self, path: str) -> bool:
        """Tell whether a file of the machine is in the report: /run/cos, /run/immucore or one asked for."""
        return path.strip("/") in self.answer

    def file(self, path: str) -> str:
        """Return a file of the machine: of /run/cos, /run/elemental, /run/immucore or one asked for."""
        return self.answer[path.strip("/")].decode(errors="replace")

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """The files of the machine by their absolute paths."""
        return {
            f"/{name}": data.decode(errors="replace") for name, data in self.answer.items() if "/" in name
        }

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """/run/immucore/result.json, or {} when the agent left none."""
        return dict(json.loads(self.text("run/immucore/result.json") or "{}"))

    @property
    def screen(self) -> str:
        """What was on tty1: 80 columns."""
        cells = self.text("screen")
        return "\n".join(cells[start : start + 80].rstrip() for start in range(0, len(cells), 80)).rstrip()

    @property
    def slot(self) -> str:
        """Which image the root comes from."""
        return self.text("slot").strip()

    @property
    def state(self) -> str:
        """`systemctl is-system-running`: running, degraded, ..."""
        return self.text("is-system-running").strip()

    @property
    def fstab(self) -> str:
        """/etc/fstab of the new root."""
        return self.text("fstab")

    @functools.cached_property
    def findmnt(self) -> list[dict[str, Any]]:
        """`findmnt --json --list`: every mount, in the order of mounting."""
        return list(json.loads(self.text("findmnt.json") or '{"filesystems": []}')["filesystems"])

    @property
    def findmnt_verify(self) -> CommandResult:
        """`findmnt --verify` of the fstab."""
        return CommandResult(int(self.text("findmnt-verify.status") or -1), self.text("findmnt-verify"))

    @functools.cached_property
    def mountinfo(self) -> list[Mounted]:
        """The mount table."""
        return [parse_mount(line) for line in self.text("mountinfo").splitlines()]

    def mount(self, target: str) -> Mounted:
        """Return what is mounted on a path, the uppermost if there are several; KeyError if nothing is."""
        found = [mount for mount in self.mountinfo if mount.target == target]
        if not found:
            raise KeyError(f"nothing is mounted on {target}")
        return found[-1]

    @functools.cached_property
    def losetup(self) -> list[dict[str, Any]]:
        """`losetup --list --json`."""
        return list(json.loads(self.text("losetup.json") or '{"loopdevices": []}')["loopdevices"])

    @functools.cached_property
    def backing_files(self) -> dict[str, str]:
        """The image behind each loop device (/dev/loop0), as the kernel says."""
        lines = (line.split(" ", 1) for line in self.text("backing_files").splitlines())
        return {f"/dev/{sysfs.split('/')[3]}": image for sysfs, image in lines}

    @functools.cached_property
    def journal(self) -> list[dict[str, Any]]:
        """The journal of the boot, that of the initramfs included; MESSAGE is always text."""
        entries = [json.loads(line) for line in self.text("journal").splitlines()]
        for entry in entries:
            if isinstance(entry.get("MESSAGE"), list):  # journalctl's form of what is not UTF-8
                entry["MESSAGE"] = bytes(entry["MESSAGE"]).decode(errors="replace")
        return entries

    def messages(self, unit: str = "", priority: int = 7) -> list[str]:
        """Return the journal's lines of a unit, or of all, at this syslog priority or a more urgent one."""
        return [
            str(entry.get("MESSAGE", ""))
            for entry in self.journal
            if (
                not unit
                or unit in (entry.get("_SYSTEMD_UNIT"), entry.get("UNIT"), entry.get("SYSLOG_IDENTIFIER"))
            )
            and int(entry.get("PRIORITY", 6)) <= priority
        ]

    @functools.cached_property
    def manager(self) -> dict[str, str]:
        """`systemctl show`: the properties of PID 1, its timestamps among them."""
        return dict(line.split("=", 1) for line in self.text("manager").splitlines() if "=" in line)

    @functools.cached_property
    def units(self) -> dict[str, str]:
        """The state of every unit by its name: active, inactive, failed, ..."""
        lines = (line.split(maxsplit=3) for line in self.text("units").splitlines())
        return {name: state for name, _, state, _ in lines}

    @property
    def failed_units(self) -> list[str]:
        """Units that failed and are still so."""
        return [name for name, state in self.units.items() if state == "failed"]

    @property
    def initramfs_usec(self) -> int:
        """How long the initramfs took, from systemd's start in it to the one in the new root."""
        return int(self.manager["UserspaceTimestampMonotonic"]) - int(
            self.manager["InitRDTimestampMonotonic"]
        )

    def unit_usec(self, unit: str) -> tuple[int, int]:
        """Return when a unit, also of the initramfs, began to start and had: µs of CLOCK_MONOTONIC."""
        texts = {"Starting": 0, "Finished": 0, "Started": 0}
        for entry in self.journal:
            first = str(entry.get("MESSAGE", "")).split(" ", 1)[0]
            if entry.get("UNIT") == unit and first in texts and not texts[first]:
                texts[first] = int(
                    entry.get("_SOURCE_MONOTONIC_TIMESTAMP") or entry["__MONOTONIC_TIMESTAMP"]
                )
        return texts["Starting"], texts["Finished"] or texts["Started"]

    @functools.cached_property
    def commands(self) -> dict[str, CommandResult]:
        """What the test's commands printed and returned."""
        return {
            command: CommandResult(
                int(self.text(f"commands/{number:03}.status") or -1),
                self.text(f"commands/{number:03}.output"),
            )
            for number, command in enumerate(self.commands_asked)
        }

    def output(self, command: str) -> str:
        """Return what a command printed; it must have succeeded."""
        result = self.commands[command]
        if result.status:
            raise AssertionError(f"{command!r} in the machine: status {result.status}\n{result.output}")
        return result.output.strip()


def parse_mount(line: str) -> Mounted:
    """Parse a line of mountinfo, see proc(5)."""
    left, right = line.split(" - ", 1)
    _, _, device, root, target, options, *_ = left.split()
    fstype, source, super_options = [*right.split(" "), ""][:3]
    decode = functools.partial(re.sub, r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)))
    return Mounted(
        target=decode(target),
        source=decode(source),
        fstype=fstype,
        root=decode(root),
        options=(*options.split(","), *super_options.split(",")),
        device=device,
    )


def read_answer(disk: Path) -> dict[str, bytes]:
    """Read the tar on a report disk; {} if the guest did not write one, or not to its end."""
    answer = {}
    try:
        with tarfile.open(disk, "r:") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream:
                    answer[member.name.removeprefix("./")] = stream.read()
    except tarfile.TarError:
        return {}
    return answer if "stage" in answer else {}
