"""What became of this boot and of the last one that went wrong, for somebody who has to put it right.

Reads /run/immucore and what evidence.py has left on the disks. All of that can be old, cut off, or
somebody else's: it is read bounded, and never believed to be of any shape.
"""

from __future__ import annotations

import json
import os
import re
import stat
import textwrap
from typing import TYPE_CHECKING, Any

from immucore import cmdline, evidence, layouts, observe, report, syscalls
from immucore.boot import INITRD_RELEASE
from immucore.errors import CmdlineError
from immucore.plan import SYSROOT
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH = 80
INDENT = " " * 10
# Where the booted system and the initramfs see the partitions that evidence.py writes to.
SEEN_AT = ("/oem", "/usr/local", "/run/initramfs/cos-state", "/sysroot/oem", "/sysroot/usr/local")
MAX_FILE_BYTES = 1 << 18
MAX_RECORDS = 20
MAX_WORDS = 4096  # characters of one text
MAX_DEVICES = 64
LINES = 8  # of a log
FILES = ("result.json", "steps.json", "devices.json", "immucore.log", "dmesg", "evidence")


class Found(Record):
    """A record of a boot: where it is, when it was written, and its files as they were found."""

    where: str
    files: dict[str, str]
    written: float = 0.0  # by the clock of the machine, which may have had none

    @property
    def result(self) -> dict[str, Any]:
        """result.json, {} when it is not there or nothing of that kind."""
        return as_object(self.files.get("result.json", ""))

    @property
    def outcome(self) -> str:
        """How the boot ended: ok, degraded, fallback, failed; empty when nobody knows."""
        outcome = text(self.result.get("outcome"))
        asked, booted = text(self.result.get("mode_asked")), text(self.result.get("mode_booted"))
        return "fallback" if booted and asked != booted else outcome


def as_object(content: str) -> dict[str, Any]:
    """Read JSON that ought to be an object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def text(value: object) -> str:
    """Give a text as a terminal may show it: no control characters, and not without an end."""
    if not isinstance(value, str):
        return ""
    shown = "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1]
        for character in value[:MAX_WORDS]
    )
    return shown if len(value) <= MAX_WORDS else f"{shown} ..."


def items(value: object) -> list[dict[str, Any]]:
    """Give the objects in what ought to be a list of objects."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def seconds(value: object) -> str:
    """Give microseconds as seconds."""
    return f"{value / 1e6:.1f} s" if isinstance(value, int) and 0 <= value < 1 << 60 else "?"


# Reading


def read(directory: int, names: tuple[str, ...] = FILES) -> dict[str, str]:
    """Read the files of a record: regular ones, no links, bounded."""
    files = {}
    for name in names:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, dir_fd=directory)
        except OSError:
            continue
        try:
            with open(descriptor, "rb") as file:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    files[name] = file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
        except OSError:
            continue  # a disk that cannot be read, in the place where faults are looked for
    return files


def record(directory: int, where: str) -> Found:
    """Read the record in an open directory."""
    try:
        written = os.stat("result.json", dir_fd=directory, follow_symlinks=False).st_mtime
    except OSError:
        written = 0.0
    return Found(where=where, files=read(directory), written=written)


def records(top: int, where: str) -> list[Found]:
    """Read the records below a directory that is open, the newest first; `where` goes before their names."""
    found: list[Found] = []
    try:
        directory = evidence.open_records(top)
    except OSError:
        return []
    try:
        for name in reversed(evidence.records(directory)[-MAX_RECORDS:]):
            try:
                inner = os.open(
                    name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
                )
            except OSError:
                continue
            try:
                found.append(record(inner, f"{where}{evidence.DIRECTORY}/{name}"))
            finally:
                os.close(inner)
    except OSError:
        pass  # what was found so far is better than nothing
    finally:
        os.close(directory)
    return found


def records_at(path: str) -> list[Found]:
    """Read the records on what is mounted at `path`, if anything is."""
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return records(top, f"{path.rstrip('/')}/")
    finally:
        os.close(top)


def records_of_unmounted() -> list[Found]:
    """Read the records on what the initramfs has not mounted, through mounts that change nothing."""
    found: list[Found] = []
    try:
        with open("/proc/cmdline", "rb") as file:
            asked = cmdline.parse(file.read())
        mounted = {mount.device for mount in observe.mounts()}
        for place in layouts.select(asked).evidence_places(asked, observe.devices(asked.boot_disk)):
            number = os.stat(place.device.path).st_rdev
            if f"{os.major(number)}:{os.minor(number)}" in mounted:
                continue
            fstype = place.device.fstype
            options = ("noload",) if fstype.startswith("ext") else ()  # no replay of the journal
            try:
                tree = syscalls.detached_mount(place.device.path, fstype, read_only=True, options=options)
            except OSError:
                continue
            try:
                found += records(tree, f"{place.device.path} (not mounted) ")
            finally:
                os.close(tree)
    except OSError:
        pass  # best effort: neither devices nor mounts may be there to look at
    return found


def given(directory: str) -> list[Found]:
    """Read what somebody names: a record, a directory of records, or what holds that. Raises OSError."""
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        alone = record(top, directory)
        if alone.files:
            return [alone]
        found = records(top, f"{directory.rstrip('/')}/")
        if not found and os.path.basename(os.path.abspath(directory)) == evidence.DIRECTORY:
            found = records_at(os.path.dirname(os.path.abspath(directory)))
    finally:
        os.close(top)
    if not found:
        raise CmdlineError(
            f"cannot find a record of immucore in '{directory}'",
            hint="name a directory like /oem/immucore, or none: immucore doctor",
        )
    return found


def search() -> tuple[Found, list[Found]]:
    """Look at this boot, and at what earlier ones have left; of these the newest come first."""
    try:
        directory = os.open(report.DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        current = Found(where=report.DIRECTORY, files={})
    else:
        try:
            current = record(directory, report.DIRECTORY)
        finally:
            os.close(directory)
    places = [found for path in SEEN_AT if (found := records_at(path))]
    if os.path.exists(INITRD_RELEASE):
        places.append(records_of_unmounted())
    places.sort(key=lambda found: max((each.written for each in found), default=0.0), reverse=True)
    unique: dict[tuple[str, str], Found] = {}
    for each in (each for found in places for each in found):  # one partition may be seen at two places
        unique.setdefault((each.where.rpartition("/")[2], each.files.get("result.json", "")), each)
    return current, [*unique.values()]


# Saying


def failing_step(found: Found) -> dict[str, Any]:
    """Find the step that decided how the boot ended."""
    steps = items(as_object(found.files.get("steps.json", "")).get("steps"))
    for outcome in ("failed", "degraded"):
        for step in steps:
            if step.get("outcome") == outcome:
                return step
    return {}


STAGES = {"2": "reading the command line and the layout", "3": "looking for the devices"}


def kept(noted: str) -> str:
    """Say where the record of this boot is on a disk; in the initramfs that is below /sysroot."""
    noted = text(noted.strip())
    path = noted.partition(" ")[0]
    if path and os.path.isdir(SYSROOT + path):
        return SYSROOT + noted
    return noted if not path or os.path.isdir(path) else f"{noted}, not mounted now"


def summary(found: Found) -> dict[str, Any]:
    """Say of a record what somebody has to know; texts can be shown as they are."""
    result, step = found.result, failing_step(found)
    error = result.get("error") if isinstance(result.get("error"), dict) else {}
    operation = step.get("operation") if isinstance(step.get("operation"), dict) else {}
    degraded = result.get("degraded")
    reasons = [text(each) for each in degraded] if isinstance(degraded, list) else []
    message = text((error or {}).get("message"))
    kernel = [line[3:] for line in found.files.get("dmesg", "").splitlines() if re.match("<[0-3]>", line)]
    warned = [line for line in found.files.get("immucore.log", "").splitlines() if "] <4> " in line]
    return {
        "where": text(found.where),
        "kept": kept(found.files.get("evidence", "")),
        "outcome": found.outcome or "unknown",
        "asked": text(result.get("mode_asked")),
        "booted": text(result.get("mode_booted")),
        "what": [message] if message else [each for each in reasons if each],
        "tried": [
            f"{text(each.get('mode'))}: {text(each.get('message'))}"
            for each in items(result.get("failures"))
        ],
        "hint": text((error or {}).get("hint")) or text(step.get("hint")),
        "step": text((operation or {}).get("text")) or STAGES.get(str(result.get("exit_status")), ""),
        "why": text((operation or {}).get("why")),
        "waits": [
            {
                "specs": [text(each) for each in wait.get("specs") or [] if text(each)],
                "missing": [text(each) for each in wait.get("missing") or [] if text(each)],
                "took": seconds(wait.get("took_usec")),
            }
            for wait in items(result.get("waits"))
            if isinstance(wait.get("specs") or [], list) and isinstance(wait.get("missing") or [], list)
        ],
        "started": seconds(result.get("started_usec")),
        "took": seconds(result.get("took_usec")),
        "version": text(result.get("version")),
        "devices": [
            {
                **{
                    name: text(each.get(name)) for name in ("path", "fstype", "label", "use", "uuid", "disk")
                },
                "size_bytes": each.get("size_bytes") if isinstance(each.get("size_bytes"), int) else 0,
            }
            for each in items(as_object(found.files.get("devices.json", "")).get("devices"))[:MAX_DEVICES]
        ],
        "warnings": [text(line.partition("] <4> ")[2]) for line in warned[-LINES:]],
        "kernel": [text(line) for line in kernel[-LINES:]],
    }


def paragraph(title: str, content: str) -> Iterator[str]:
    """Wrap a text beside its title; a line that is indented, such as one of a table, stays a line."""
    first = True
    for line in content.split("\n"):
        lead = " " * (len(line) - len(line.lstrip()))
        head = f"{title:<{len(INDENT)}}" if first else INDENT
        first = False
        yield from textwrap.wrap(
            line.strip(),
            WIDTH - 1,
            initial_indent=head + lead[:4],
            subsequent_indent=INDENT + lead[:4],
            break_on_hyphens=False,
        ) or [head.rstrip()]


def size(number: int) -> str:
    """Give a size as people say it."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if number >= 1 << power:
            return f"{number / (1 << power):.4g} {unit}"
    return f"{max(0, number) >> 10} KiB"


def devices(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Show the devices as a table."""
    shown = [(row["path"], size(row["size_bytes"]), row["fstype"], row["label"], row["use"]) for row in rows]
    limits = (16, 10, 12, 16)
    widths = (
        [min(limit, max(len(row[column]) for row in shown)) for column, limit in enumerate(limits)]
        if shown
        else []
    )
    for row in shown:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        yield from textwrap.wrap(
            f"{'  '.join(cells)}  {row[4]}",
            WIDTH - 1,
            initial_indent="  ",
            subsequent_indent=" " * 22,
            drop_whitespace=True,
            break_on_hyphens=False,
        )


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """Say what became of a boot that went wrong."""
    for number, what in enumerate(facts["what"] or ["nothing is recorded of the reason"]):
        yield from paragraph("" if number else "What", what)
    for number, slot in enumerate(facts["tried"] if len(facts["tried"]) > 1 else ()):
        yield from paragraph("" if number else "Tried", slot)
    if facts["hint"]:
        yield from paragraph("To do", facts["hint"])
    if facts["step"]:
        why = f"\nasked for by: {facts['why']}" if facts["why"] else ""
        yield from paragraph("Step", facts["step"] + why)
    for wait in facts["waits"]:
        missing = f"; never seen: {', '.join(wait['missing'])}" if wait["missing"] else ""
        yield from paragraph("Waited", f"{wait['took']} for {', '.join(wait['specs'])}{missing}")
    mode = f"asked for {facts['asked'] or 'no known mode'}, booted {facts['booted'] or 'nothing'}"
    began = f"began {facts['started']} after the kernel, took {facts['took']}"
    yield from paragraph("Boot", f"{mode}; {began}; immucore {facts['version'] or '?'}")
    for number, warning in enumerate(facts["warnings"]):
        yield from paragraph("" if number else "Warnings", warning)
    for number, line in enumerate(facts["kernel"]):
        yield from paragraph("" if number else "Kernel", line)
    if facts["devices"]:
        yield "Devices that were seen:"
        yield from devices(facts["devices"])
    yield from paragraph("Evidence", facts["kept"] or facts["where"])


STATES = {
    "ok": "This boot went well: {booted}.",
    "degraded": "This boot is degraded: {booted}, but not all of it.",
    "fallback": "This boot is a fallback: {booted} instead of {asked}.",
    "failed": "This boot failed.",
    "unknown": "This boot has no record: the agent did not run, or was cut off. See: journalctl -u immucore",
}


def diagnosis(current: Found | None, older: list[Found]) -> dict[str, Any]:
    """Put together what `doctor` says, as --json shows it."""
    now = summary(current) if current else None
    if now and now["outcome"] not in STATES:
        now["outcome"] = "unknown"
    wrong = now if now and now["outcome"] in ("failed", "degraded", "fallback") else None
    kept_as = evidence.NAME.search(wrong["kept"]) if wrong else None
    earlier = [each for each in older if not kept_as or each.where.rpartition("/")[2] != kept_as[0]]
    last = None if wrong or not earlier else summary(earlier.pop(0))
    return {
        "schema": report.SCHEMA,
        "this_boot": now,
        "last_failure": wrong or last,
        "earlier": [
            {"where": facts["where"], "outcome": facts["outcome"], "what": facts["what"]}
            for facts in map(summary, earlier)
        ],
    }


def report_of(found: dict[str, Any]) -> Iterator[str]:
    """Write a diagnosis for people, in 80 columns."""
    now, failure = found["this_boot"], found["last_failure"]
    if now:
        yield from textwrap.wrap(STATES[now["outcome"]].format(**now), WIDTH - 1)
    if failure is None:
        yield "No boot that went wrong is on record."
    else:
        if failure is not now:
            yield f"The last boot that went wrong ({failure['outcome']}):"
        yield ""
        yield from lines(failure)
    if found["earlier"]:
        yield ""
        yield "Earlier boots that went wrong, the newest first:"
        for each in found["earlier"]:
            yield f"  {each['where']}"
            for what in each["what"][:1]:
                yield from textwrap.wrap(
                    what.replace("\n", " "), WIDTH - 1, initial_indent="    ", subsequent_indent="    "
                )


def examine(directory: str = "") -> dict[str, Any]:
    """Find out what is to be said. Raises CmdlineError and OSError for a directory that was named."""
    return diagnosis(None, given(directory)) if directory else diagnosis(*search())
