"""The harness itself: a boot without the agent, and what the builders and the parsers promise."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import derivative
import pytest
from disk import Disk, Partition
from machine import PATIENCE, Guest, Machine
from report import parse_mount


def test_plain_boot_reports(machine: Callable[..., Machine], plain_disk: Disk) -> None:
    plain = machine(plain_disk, "root=PARTLABEL=root rw quiet", initramfs="plain")

    report = plain.boot(commands=("id -u", "exit 3"), files=("/etc/os-rel*",))

    assert (report.ended, report.stage, report.state) == ("guest-shutdown", "system", "running")
    assert report.failed_units == []
    assert report.slot == "active"
    assert report.output("id -u") == "0"
    assert report.commands["exit 3"].status == 3
    assert "immucore-test" in report.file("/etc/os-release")
    assert report.findmnt_verify.status == 0
    assert report.mount("/").fstype == "ext4"
    assert report.mount("/").writable
    assert [mount["target"] for mount in report.findmnt].count("/") == 1
    assert report.units["multi-user.target"] == "active"
    assert any("Linux version" in message for message in report.messages())
    assert 0 < report.initramfs_usec < 60e6


def test_writes_are_kept_only_when_asked(machine: Callable[..., Machine], plain_disk: Disk) -> None:
    kept = machine(plain_disk, "root=PARTLABEL=root rw quiet", initramfs="plain", keep_writes=True)

    kept.boot(commands=("touch /srv/kept",))
    report = kept.boot(commands=("ls /srv",))

    assert report.output("ls /srv") == "kept"
    raw = f"{kept.raw()}?offset={plain_disk.offsets['root']}"
    assert subprocess.run(["e2fsck", "-fn", raw], check=False, capture_output=True).returncode == 0


def test_a_failed_unit_is_reported(machine: Callable[..., Machine], plain_disk: Disk) -> None:
    broken = machine(plain_disk, "root=PARTLABEL=root rw quiet", initramfs="plain")

    failed = "systemd-run --unit=broken false; until systemctl is-failed broken; do sleep 0.1; done"
    report = broken.boot(commands=(failed,))

    assert report.failed_units == ["broken.service"]


def test_limit_ends_a_machine_that_hangs(machine: Callable[..., Machine], plain_disk: Disk) -> None:
    seen: list[Guest] = []

    report = machine(plain_disk, "rdinit=/bin/sh", initramfs="plain").boot(
        limit_s=6,
        when=[("^# $|sh-", lambda guest: (seen.append(guest), guest.type("echo $((6 * 7))\n"))[0])],
    )

    assert (report.ended, report.stage) == ("limit", "none")
    assert report.seconds < 6 * PATIENCE + 2
    assert seen[0].process.poll() is not None
    assert "42" in report.console


def test_disk_variants(cos_disk: Callable[..., Disk], work: Path) -> None:
    made = cos_disk(
        without=("oem",),
        state={"cOS/active.img": b"garbage", "cOS/passive.img": None},
        extra=(Partition("data", "DATA", 32, {"etc/hello": "there"}),),
    )

    assert [partition.name for partition in made.partitions] == [
        "efi",
        "recovery",
        "state",
        "persistent",
        "data",
    ]
    assert read(made, "state", "cOS/active.img") == "garbage"
    assert read(made, "data", "etc/hello") == "there"
    assert "passive.img" not in derivative.debugfs(made.path, "ls /cOS", offset=made.offsets["state"])
    for name in ("recovery", "state", "persistent", "data"):
        assert label(made, name) == made.partition(name).label
        check = ["e2fsck", "-fn", f"{made.path}?offset={made.offsets[name]}"]
        assert subprocess.run(check, check=False, capture_output=True).returncode == 0
    assert label(made, "efi") == "COS_GRUB"


@pytest.mark.parametrize(
    ("name", "slot"), [("active.img", "active"), ("passive.img", "passive"), ("recovery.img", "recovery")]
)
def test_images_tell_their_slot(name: str, slot: str) -> None:
    image = derivative.images("bookworm")[name]

    assert derivative.debugfs(image, "cat /etc/immucore-slot").count(slot) == 1
    assert subprocess.run(["e2fsck", "-fn", str(image)], check=False, capture_output=True).returncode == 0


def test_edited_image_has_the_file() -> None:
    image = derivative.edited(
        derivative.images("bookworm")["active.img"], {"etc/cos/cos-layout.env": "RW_PATHS=/etc\n"}
    )

    assert "RW_PATHS=/etc" in derivative.debugfs(image, "cat /etc/cos/cos-layout.env")
    assert subprocess.run(["e2fsck", "-fn", str(image)], check=False, capture_output=True).returncode == 0


def test_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "packages.txt").write_text("no-such-package: no-such-tool\n")
    monkeypatch.setattr(derivative, "HERE", tmp_path)

    with pytest.raises(derivative.ToolMissingError, match="apt-get install no-such-package"):
        derivative.require_tools()


def test_mountinfo_line_with_blanks() -> None:
    mount = parse_mount(
        r"36 35 98:0 /a\040b /mnt/c\040d rw,noatime shared:1 - ext4 /dev/root ro,errors=continue"
    )

    assert (mount.root, mount.target, mount.source, mount.device) == (
        "/a b",
        "/mnt/c d",
        "/dev/root",
        "98:0",
    )
    assert not mount.writable


def read(made: Disk, partition: str, path: str) -> str:
    """Return a file of an ext4 partition."""
    return (
        derivative.debugfs(made.path, f"cat /{path}", offset=made.offsets[partition])
        .split("\n", 1)[1]
        .strip("\n")
        .removesuffix("debugfs: ")
        .strip()
    )


def label(made: Disk, partition: str) -> str:
    """Return the label of a partition's file system, as blkid sees it."""
    command = [
        "blkid",
        "-p",
        "-O",
        str(made.offsets[partition]),
        "-s",
        "LABEL",
        "-o",
        "value",
        str(made.path),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
