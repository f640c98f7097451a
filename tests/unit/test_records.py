"""What is kept of a boot that went wrong, as far as no file system is needed for it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import cmdline, evidence, layouts
from immucore.devices import Device, Devices, Place
from immucore.plan import Mount, Plan

STATE = Device(path="/dev/a4", fstype="ext4", label="COS_STATE", disks=("/dev/a",))
OEM = Device(path="/dev/a2", fstype="ext4", label="COS_OEM", disks=("/dev/a",))
PERSISTENT = Device(path="/dev/a5", fstype="ext4", label="COS_PERSISTENT", disks=("/dev/a",))
STICK: Device = OEM.replace(path="/dev/b1", disks=("/dev/b",))
ASKED = cmdline.parse(b"root=LABEL=COS_STATE cos-img/filename=/cOS/active.img")


# Where it goes


def places(*devices: Device, line: bytes = b"", boot: str = "") -> list[tuple[str, str, bool, bool]]:
    asked = cmdline.parse(line) if line else ASKED
    found = layouts.select(asked).evidence_places(asked, Devices(all=devices, boot=boot))
    return [
        (place.device.path, place.path, place.own_disk, place.remount) for place in evidence.known(found)
    ]


def test_places_in_their_order() -> None:
    assert places(PERSISTENT, OEM, STATE) == [
        ("/dev/a2", "/oem", True, False),
        ("/dev/a5", "/usr/local", True, False),
        ("/dev/a4", "/run/initramfs/cos-state", True, True),
    ]


def test_a_foreign_disk_is_no_place_beside_the_own() -> None:
    assert [each[0] for each in places(STICK, OEM, STATE)] == ["/dev/a2", "/dev/a4"]


def test_without_state_the_own_disk_is_the_one_that_was_booted_from() -> None:
    other = PERSISTENT.replace(path="/dev/b5", disks=("/dev/b",))
    assert places(OEM, boot="/dev/a2") == [("/dev/a2", "/oem", True, False)]
    assert places(OEM, STICK, boot="/dev/a2") == [("/dev/a2", "/oem", True, False)]
    assert places(OEM, other, boot="/dev/a2") == [
        ("/dev/a2", "/oem", True, False),
        ("/dev/b5", "/usr/local", False, False),
    ]
    assert places(other, STATE.replace(label=""), boot="/dev/a4") == []


def test_where_nobody_knows_the_own_disk_no_other_is_written_to() -> None:
    assert places(OEM, PERSISTENT) == []
    assert places(STICK, boot="/dev/a2") == []


def test_places_of_a_command_line_that_cannot_be_read() -> None:
    line = b"elemental.mode=aktiv cos-img/filename=/x rd.cos.oemlabel=CONFIG"
    found = places(OEM.replace(label="CONFIG"), STATE, line=line, boot="/dev/a4")
    assert found == [("/dev/a2", "/oem", True, False)]


def test_members_are_no_places() -> None:
    assert places(OEM.replace(fstype="crypto_LUKS")) == []


# What is kept


def test_long_files_keep_their_beginning_and_logs_their_end() -> None:
    contents = {"result.json": "r" * 40000 + "end", "immucore.log": "l" * 100000 + "end", "other": "x"}
    kept = evidence.bounded(contents, evidence.LIMITS)
    assert list(kept) == ["result.json", "immucore.log"]
    assert {name: len(content) for name, content in kept.items()} == {
        "result.json": evidence.LIMITS["result.json"],
        "immucore.log": evidence.LIMITS["immucore.log"],
    }
    assert kept["result.json"].endswith(b"r[... 7235 bytes left out ...]\n")
    assert kept["immucore.log"].startswith(b"[... 1699 bytes left out ...]\nl")
    assert kept["immucore.log"].endswith(b"lend")


def test_all_together_is_bounded() -> None:
    assert sum(evidence.LIMITS.values()) <= 512 << 10


def test_table_of_devices_says_why() -> None:
    devices = Devices(
        all=(
            STATE,
            STICK.replace(label="COS_STATE"),
            OEM.replace(fstype="crypto_LUKS"),
            Device(path="/dev/c"),
            PERSISTENT,
        )
    )
    plan = Plan(
        operations=(
            Mount(source="/dev/a4", target="/run/initramfs/cos-state", fstype="ext4", why="x"),
            Mount(source="/dev/a4", target="/also", fstype="ext4", why="x"),
        )
    )
    table = evidence.device_table(devices, plan)
    assert [each["use"] for each in table] == [
        "taken for /run/initramfs/cos-state, /also",
        "not taken: /dev/a4 has the same label",
        "not looked into: crypto_LUKS",
        "no file system",
        "nothing asked for it",
    ]
    assert (table[0]["path"], table[0]["label"]) == ("/dev/a4", "COS_STATE")


# No secrets


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("ro quiet console=ttyS0,115200 root=LABEL=COS_ACTIVE", None),
        ("cos-img/filename=/cOS/active.img rd.cos.mount=LABEL=A:/b:noatime rd.immucore.debug=1", None),
        ("rd.luks.uuid=abc systemd.unit=rescue.target rd.break=mount", None),
        ("key=value", "key=…"),
        ("rd.iscsi.password=a rd.iscsi.in.username=b", "rd.iscsi.password=… rd.iscsi.in.username=…"),
        ("systemd.set_credential=a:b systemd.setenv=A=b", "systemd.set_credential=… systemd.setenv=…"),
        ("systemd.run=a", "systemd.run=…"),
        ("root=live:http://me:pw@host/x", "root=…"),
        ('"a=b c" d="e f"', "a=… d=…"),
        ('dyndbg="a b" rd.x="c d"', 'dyndbg=… "rd.x=c d"'),
        ("quiet -- secret=1 word", "quiet"),
        ("a=", "a=…"),
    ],
)
def test_command_line_without_secrets(line: str, shown: str | None) -> None:
    assert cmdline.redacted(line.encode() + b"\n") == (line if shown is None else shown)


@given(
    key=st.text("abcxyz_.", min_size=1, max_size=12).filter(lambda key: not cmdline.harmless(key, "")),
    value=st.text(st.characters(codec="ascii", exclude_characters='"'), min_size=8, max_size=20),
)
def test_value_of_an_unknown_key_is_never_shown(key: str, value: str) -> None:
    secret = f"{value}geheim"
    assert secret not in cmdline.redacted(f'quiet {key}="{secret}" ro'.encode())


def test_kernel_log_without_secrets() -> None:
    line = b'quiet token="geheim und mehr" pin=12 pass=einlangesgeheimnis path=/dev/disk/x\n'
    log = (
        '<6>[0.0] Command line: quiet token="geheim und mehr" pin=12 pass=einlangesgeheimnis\n'
        "<5>[0.1] Kernel command line: quiet pin=12\n"
        '<5>[0.2] Unknown kernel command line parameters "token=geheim und mehr pin=12", will be passed\n'
        "<30>[1.0] dracut-cmdline[99]: Using kernel command line parameters:  root=LABEL=A pin=12\n"
        "<30>[1.1] someone: einlangesgeheimnis on /dev/disk/x, 12 times\n"
    )
    assert evidence.without_secrets(log, line) == (
        "<6>[0.0] Command line: quiet token=… pin=… pass=…\n"
        "<5>[0.1] Kernel command line: quiet pin=…\n"
        '<5>[0.2] Unknown kernel command line parameters "token=… pin=…", will be passed\n'
        "<30>[1.0] dracut-cmdline[99]: Using kernel command line parameters:  root=LABEL=A pin=…\n"
        "<30>[1.1] someone: … on /dev/disk/x, 12 times\n"
    )


# Records in a directory


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    top = os.open(tmp_path, os.O_RDONLY)
    directory = evidence.open_records(top, make=True)
    yield directory
    os.close(directory)
    os.close(top)


def names(directory: int) -> list[str]:
    return sorted(os.listdir(directory))


def test_records_are_counted_and_the_last_five_kept(directory: int) -> None:
    written = [evidence.write_record(directory, {"a": b"x"}, f"{n:08x}") for n in range(7)]
    assert written[0] == "boot-000001-00000000"
    assert names(directory) == written[2:] == evidence.records(directory)


def test_another_record_of_the_same_boot_is_replaced(directory: int) -> None:
    evidence.write_record(directory, {"a": b"x"}, "0" * 8)
    first = evidence.write_record(directory, {"a": b"x"}, "1" * 8)
    second = evidence.write_record(directory, {"a": b"y"}, "1" * 8)
    assert first != second
    assert names(directory) == ["boot-000001-00000000", second]


def test_what_a_boot_that_was_cut_off_left_is_removed_and_the_rest_stays(
    directory: int, tmp_path: Path
) -> None:
    base = tmp_path / "immucore"
    (base / "boot-000009-01234567.new").mkdir()
    (base / "boot-000008-01234567.new").write_text("a file")
    (base / "boot-000003-01234567").symlink_to(tmp_path)
    (base / "mine.new").mkdir()
    (base / "notes").write_text("by a person")
    written = evidence.write_record(directory, {"a": b"x"}, "0" * 8)
    assert names(directory) == ["boot-000003-01234567", written, "mine.new", "notes"]
    assert written == "boot-000004-00000000"


def test_old_records_that_are_links_are_removed_without_following(directory: int, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    for number in range(6):
        (tmp_path / f"immucore/boot-{number:06}-01234567").symlink_to(tmp_path / "precious")
    evidence.write_record(directory, {"a": b"x"}, "0" * 8)
    assert len(names(directory)) == evidence.KEPT
    assert (tmp_path / "precious/file").exists()


def test_the_counter_does_not_run_over(directory: int, tmp_path: Path) -> None:
    (tmp_path / "immucore/boot-999999999-00000000").mkdir()
    name = evidence.write_record(directory, {"a": b"x"}, "0" * 8)
    assert names(directory) == [name] == ["boot-999999999-00000000"]
    assert (tmp_path / "immucore" / name / "a").read_text() == "x"


@pytest.mark.parametrize("target", ["/", "elsewhere", "../elsewhere"])
def test_link_in_the_place_of_the_directory(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "immucore").symlink_to(target)
    top = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        evidence.open_records(top, make=True)
    os.close(top)


def test_disk_that_does_not_answer_is_left_behind(tmp_path: Path) -> None:
    """A FIFO that nobody writes to: whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "disk")
    device = Device(path=str(tmp_path / "disk"), fstype="ext4", disks=("/dev/none",))
    started = time.monotonic()

    answer = evidence.save({"a": b"x"}, (Place(device=device, path="/oem", own_disk=True),), 0.2)

    assert answer == ("", ["the disk took longer than 0.2 s"])
    assert time.monotonic() - started < 2


def test_no_place_at_all() -> None:
    assert evidence.save({"a": b"x"}, ()) == ("", [])


def test_device_that_is_gone() -> None:
    gone = Place(
        device=Device(path="/dev/gone", fstype="ext4", disks=("/dev/gone",)), path="/oem", own_disk=True
    )
    assert evidence.save({"a": b"x"}, (gone,)) == ("", ["/dev/gone: No such file or directory"])
