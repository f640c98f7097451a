"""What a boot that failed leaves on the disk, and `immucore doctor` after the next one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable

import derivative
import expect
from disk import Disk, Partition
from machine import Machine
from report import Report

PLANTED = "geheim-im-token"
PASSIVE = expect.ACTIVE.replace("active.img", "passive.img")
RECOVERY = "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.squashfs quiet"


def fill(disk: Disk, name: str) -> None:
    """Leave not one free block on an ext4 partition."""
    offset = disk.offsets[name]
    for size in (1 << 20, 1 << 16, 1 << 12):
        with tempfile.NamedTemporaryFile() as filler:  # no zeros: debugfs makes holes of them
            filler.write(b"x" * size)
            filler.flush()
            commands = [f"write {filler.name} filler.{size}.{number}" for number in range(16)]
            derivative.debugfs(disk.path, *commands, offset=offset)
    assert "Free blocks:              0" in derivative.debugfs(disk.path, "stats", offset=offset)


def in_80_columns(said: str) -> None:
    assert said
    assert max(map(len, said.splitlines())) < 80
    assert "Traceback" not in said


def left_behind(report: Report) -> str:
    return report.console + "".join(report.files.values())


def test_missing_persistent_is_told_after_the_next_boot(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    """OEM is vfat here, as it is where the firmware shares it; and a secret is on the command line."""
    oem = Partition("oem", "COS_OEM", 16, fstype="vfat")
    disk = cos_disk(without=("oem", "persistent"), extra=(oem,))
    it = machine(disk, f"{expect.ACTIVE} rd.cos.timeout=8 k3s_token={PLANTED}", keep_writes=True)

    failed = it.boot(limit_s=60, commands=("immucore doctor",))

    expect.stopped(failed, 3, "cannot find a filesystem labelled 'COS_PERSISTENT'", "More: immucore doctor")
    at_once = failed.output("immucore doctor")
    assert at_once.startswith("This boot failed.\n")
    assert "What      cannot find a filesystem labelled 'COS_PERSISTENT'\n" in at_once
    assert "Evidence  /sysroot/oem/immucore/boot-000001-" in at_once
    in_80_columns(at_once)
    it.cmdline = RECOVERY

    good = it.boot(
        limit_s=90, commands=("immucore doctor", "immucore doctor --json"), files=("/oem/immucore",)
    )

    assert (good.stage, good.slot, good.result["outcome"]) == ("system", "recovery", "ok")
    said = good.output("immucore doctor")
    assert said.startswith("This boot went well: recovery.\nThe last boot that went wrong (failed):\n")
    assert "What      cannot find a filesystem labelled 'COS_PERSISTENT'\n" in said
    assert "never seen: LABEL=COS_PERSISTENT" in said
    assert f"/dev/vda{disk.number('state')}" in said
    assert "asked for active, booted nothing" in said
    assert "Evidence  /oem/immucore/boot-000001-" in said
    in_80_columns(said)
    assert json.loads(good.output("immucore doctor --json"))["last_failure"]["outcome"] == "failed"
    kept = {path.rpartition("/")[2]: text for path, text in good.files.items() if "/boot-000001-" in path}
    assert json.loads(kept["result.json"]) == failed.result
    assert "Run /init as init process" in kept["dmesg"]
    assert "k3s_token=…" in kept["cmdline"]
    assert "k3s_token=…" in kept["dmesg"]
    assert PLANTED not in left_behind(good).replace(good.text("cmdline"), "")
    assert PLANTED not in "".join(text for path, text in failed.files.items() if path.startswith("/run/"))


def test_broken_image_with_oem_full_is_told_after_the_next_boot(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    disk = cos_disk(state={"cOS/active.img": b"garbage" * 100000})
    fill(disk, "oem")
    it = machine(disk, f"{expect.ACTIVE} rd.cos.fallback=off", keep_writes=True)

    failed = it.boot(limit_s=60, commands=("immucore doctor",))

    expect.stopped(failed, 4, "cannot mount '/run/initramfs/cos-state/cOS/active.img'")
    assert "Step      loop /run/initramfs/cos-state/cOS/active.img" in failed.output("immucore doctor")
    evidence = failed.file("/run/immucore/evidence")
    assert evidence.startswith("/usr/local/immucore/boot-000001-")
    assert not [
        mount for mount in failed.mountinfo if mount.source == f"/dev/vda{disk.number('persistent')}"
    ]
    it.cmdline = PASSIVE

    good = it.boot(limit_s=90, commands=("immucore doctor",))

    assert (good.stage, good.slot, good.result["outcome"]) == ("system", "passive", "ok")
    said = good.output("immucore doctor")
    assert said.startswith("This boot went well: passive.\nThe last boot that went wrong (failed):\n")
    assert "cannot mount '/run/initramfs/cos-state/cOS/active.img'" in " ".join(said.split())
    assert evidence.partition(" ")[0] in said
    in_80_columns(said)
