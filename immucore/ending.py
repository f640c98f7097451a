"""How a boot ends: its record, what is told to whom, and what is kept of one that went wrong."""

from __future__ import annotations

import time

from immucore import fstab, log, observe, report
from immucore.execute import SUCCEEDED

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.boot import Boot
    from immucore.errors import ImmucoreError

BUG = 70
DEGRADED = "/run/cos/degraded"
SUMMARY = f"{report.DIRECTORY}/summary"  # told once more above the emergency shell's prompt


def finish(boot: Boot, error: ImmucoreError | None) -> int:
    """Write the record, tell the outcome, and return the exit status."""
    reasons = report.degraded(boot.record)
    if boot.slot.instead_of:
        reasons.insert(
            0, f"{boot.slot.mode} is booted instead of {boot.mode}: {report.why_not(boot.failures)}"
        )
    status = error.exit_status if error else 0
    _tell(boot, error, reasons)
    summary = ""
    if error:
        from immucore import onfail

        summary = report.summary(error, None, onfail.sentence(boot))
    files: dict[str, str] = {}
    try:
        result = report.result(
            outcome="failed" if error else "degraded" if reasons else "ok",
            exit_status=status,
            mode=boot.mode,
            booted=boot.slot.mode or boot.mode,
            failures=boot.failures,
            next_entry=boot.next_entry,
            degraded=reasons,
            conflicts=boot.kernel.conflicts,
            error=error,
            record=boot.record,
            waits=boot.waits,
            started_usec=boot.started_usec,
            ended_usec=time.monotonic_ns() // 1000,
        )
        table = observe.mounts()
        files = _record(boot, result, table)
        if not error:
            done = [step.operation for step in boot.record if step.outcome in SUCCEEDED]
            noted = fstab.utab(done, table, boot.kernel.place, observe.text(fstab.UTAB))
            boot.kernel.write_file(fstab.UTAB, noted)
        _write(boot, files, reasons, summary)
    except OSError as failure:
        boot.log.error(f"cannot write the record to {report.DIRECTORY}: {failure.strerror}")
        status = status or BUG
    if (error or reasons) and boot.cmdline.engaged:  # a boot that is not ours leaves the disks alone
        from immucore import evidence

        evidence.keep(boot, files)
    if summary:
        report.to_consoles(summary)
    elif reasons:
        report.to_consoles("immucore: this boot is degraded: " + "; ".join(reasons))
    return status


def _tell(boot: Boot, error: ImmucoreError | None, reasons: list[str]) -> None:
    """Log the outcome, and after a failure, or for debugging, what it was met with."""
    if error:
        failing = next((step for step in [*boot.earlier, *boot.record] if step.outcome == "failed"), None)
        boot.log.error(report.summary(error, failing))
        for device in boot.devices.all:
            boot.log.debug(f"device: {device}")
    elif boot.cmdline.engaged:
        took_ms = (time.monotonic_ns() // 1000 - boot.started_usec) // 1000
        mounted = f"{boot.slot.mode or boot.mode} booted from {boot.slot.image} in {took_ms} ms"
        boot.log.write(
            log.WARNING if reasons else log.INFO,
            f"{mounted}, degraded: {'; '.join(reasons)}" if reasons else mounted,
        )
    if error or boot.cmdline.debug:
        from immucore import evidence

        boot.log.debug("mountinfo:\n" + evidence.mountinfo())


def _record(boot: Boot, result: dict[str, object], table: tuple[observe.MountPoint, ...]) -> dict[str, str]:
    """Give the files of the record."""
    return {
        "plan.json": report.json(report.plan(boot.plan)) + "\n",
        "layout.json": report.json({"schema": report.SCHEMA, **dict(boot.plan.layout)}) + "\n",
        "steps.json": report.json(report.steps([*boot.earlier, *boot.record])) + "\n",
        "mounts": report.mount_points(boot.record, boot.kernel.place, table),
        "immucore.log": "".join(f"{line}\n" for line in boot.log.lines),
        "result.json": report.json(result) + "\n",
    }


def _write(boot: Boot, files: dict[str, str], reasons: list[str], summary: str) -> None:
    """Write the record; its last file says that the others are complete. Raises OSError."""
    _mark(boot, SUMMARY, [summary] if summary else [])
    for name, content in files.items():
        boot.kernel.write_file(f"{report.DIRECTORY}/{name}", content)
    _mark(boot, DEGRADED, reasons)


def _mark(boot: Boot, path: str, lines: list[str]) -> None:
    """Write a file that is there only if it has something to say."""
    if lines:
        # Shown as it is on terminals, by immucore-last-words and by people.
        boot.kernel.write_file(path, "".join(f"{report.for_terminal(line)}\n" for line in lines))
    else:
        boot.kernel.remove_file(path)
