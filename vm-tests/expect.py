"""What every healthy boot has to look like, whatever it was asked for (issue: what it must show)."""

from __future__ import annotations

from report import Report

RW_PATHS = ("/etc", "/root", "/home", "/opt", "/srv", "/usr/local", "/var")
ACTIVE = "root=LABEL=COS_STATE cos-img/filename=/cOS/active.img quiet"
TOLD = "systemd.journald.forward_to_console=1"  # what the agent says while it waits, see `waiting`
UPTIME = "cat /proc/uptime"
MAX_FAILURE_S = 60.0  # of the agent, however slow this host is, with its waits
MAX_UPTIME_S = 30.0  # of the machine's own time: no failure keeps anybody waiting for longer


def waiting(times: int) -> str:
    """Return what matches the console when the agent has said so often, every ten seconds, that it waits."""
    return rf"(?s)(?:immucore\[\d+\]: waiting for .+?){{{times}}}"


def healthy(report: Report, slot: str, image: str) -> None:
    """The right image is booted read-only, nothing failed, and nobody had to warn of anything."""
    assert report.stage == "system", report.console[-3000:]
    assert report.slot == slot
    assert report.state == "running", report.failed_units
    assert report.failed_units == []
    root = report.mount("/")
    # systemd 257 binds /run anew at the switch: the kernel then names the file by its place in the partition
    # alone.
    assert report.backing_files[root.source] in (f"/run/initramfs/cos-state{image}", image)
    assert not report.mount("/run/initramfs/cos-state").writable
    assert report.findmnt_verify.status == 0, report.findmnt_verify.output
    assert "/sysroot" not in report.fstab
    assert report.messages("immucore", priority=4) == []
    assert report.messages("immucore.service", priority=4) == []
    assert report.messages("initrd-switch-root.service", priority=4) == []
    assert not any("ordering cycle" in message for message in report.messages())
    assert report.result["outcome"] == "ok"
    assert report.result["mode_booted"] == slot
    for field in ("cos", "elemental"):
        written = [
            path for path in report.files if path.startswith(f"/run/{field}/") and path.endswith("_mode")
        ]
        assert written == [f"/run/{field}/{slot}_mode"]
        assert report.files[f"/run/{field}/{slot}_mode"] == "1"


def overlaid(report: Report, *paths: str) -> None:
    """Each of the paths, and no other, is an overlay, whose changes are kept below /run/overlay."""
    overlays = {mount.target: mount for mount in report.mountinfo if mount.fstype == "overlay"}
    ephemeral = {
        path for path, mount in overlays.items() if "upperdir=/run/overlay/" in ",".join(mount.options)
    }
    assert ephemeral == {*paths}
    assert all(overlays[path].writable for path in paths)


def volume(report: Report, mountpoint: str, partition: int) -> None:
    """A partition of the first disk is mounted rw."""
    mount = report.mount(mountpoint)
    assert (mount.source, mount.writable) == (f"/dev/vda{partition}", True)


def stopped(report: Report, status: int, *texts: str) -> None:
    """The boot failed with an exit status and never switched its root; the reason stands on the console."""
    assert report.stage == "initramfs", report.console[-3000:]
    assert report.result["outcome"] == "failed"
    assert report.result["exit_status"] == status
    assert report.result["took_usec"] < MAX_FAILURE_S * 1e6
    for text in texts:
        assert text in report.console
    assert "Traceback" not in report.console
    assert not any("_mode" in path for path in report.files)
    assert "Switching root" not in report.console


def soon(report: Report) -> None:
    """It took less than a person has patience for; only with icount_shift is that the same everywhere."""
    assert float(report.output(UPTIME).split()[0]) < MAX_UPTIME_S
