"""Images that are squashfs start by themselves: firmware, GRUB, its menu, the kernel inside of the image.

Those that are ext4 do so in test_never_brick.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import derivative
import expect
import pytest
from derivative import PROJECT, cached, digest, run
from disk import Disk, Partition
from machine import Machine

MENU = "The highlighted entry will be executed"
DOWN = "\x1b[B"
SLOTS = ("active", "passive", "recovery")  # as the menu has them
SIZES = {"efi": 16, "oem": 16, "recovery": 256, "state": 480}
SIZE_MIB = 1024
CMDLINE = "cat /proc/cmdline"


def installed() -> Disk:
    """Return a disk for BIOS and UEFI that was installed on; no boot changes it."""
    tree = derivative.bootable_tree("bookworm")
    words = [f"--partition={name}={size}" for name, size in SIZES.items()]
    words += ["--json", f"--size={SIZE_MIB}", "--filesystem=squashfs", f"dir:{tree}"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}

    def make(target: Path) -> None:
        target.mkdir()
        command = (sys.executable, "-m", "immucore.system", "install", "--target", target / "disk.img")
        said = run(*command, *words, env=environment)
        (target / "result.json").write_text(said.splitlines()[-1])

    code = sorted(path for kind in ("py", "cfg") for path in (PROJECT / "immucore").rglob(f"*.{kind}"))
    key = digest(tree.name, *code, *words)
    made = cached("bookworm-installed-squashfs", key, make)
    result = json.loads((made / "result.json").read_text())["partitions"]
    partitions = tuple(Partition(each["name"], each["label"], each["size_mib"]) for each in result)
    offsets = {each["name"]: each["start_mib"] << 20 for each in result}
    return Disk(made / "disk.img", "bookworm", partitions, offsets)


@pytest.mark.parametrize(
    ("firmware", "slot"),
    [
        ("efi", "active"),
        ("bios", "recovery"),
    ],
)
def test_installed_disk_boots(machine: Callable[..., Machine], firmware: str, slot: str) -> None:
    disk = installed()
    choice = DOWN * SLOTS.index(slot) + "\r"

    report = machine(disk, "", boot_loader=True, efi=firmware == "efi").boot(
        limit_s=150, when=[(MENU, lambda guest: guest.type(choice))], commands=[CMDLINE]
    )

    assert report.stage == "system", report.console[-3000:]
    assert (report.state, report.failed_units) == ("running", [])
    assert (report.result["outcome"], report.result["mode_booted"]) == ("ok", slot)
    image = report.backing_files[report.mount("/").source]
    assert report.mount("/").fstype == "squashfs"
    assert image == f"/run/initramfs/cos-state/cOS/{slot}.img"
    expect.volume(report, "/oem", disk.number("oem"))
    if slot != "recovery":
        expect.volume(report, "/usr/local", disk.number("persistent"))
    counting = "panic=10 rd.cos.onfail=reboot:10"
    assert (counting in report.output(CMDLINE)) is (slot != "recovery")
