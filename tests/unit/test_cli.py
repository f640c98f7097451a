"""The command line tools, in this process and as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import partition

from immucore import __main__, __version__, cli, cmdline, report
from immucore.devices import Device, Devices
from immucore.errors import CmdlineError

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests/golden"
ACTIVE, NO_STATE = GOLDEN / "cos-active", GOLDEN / "cos-no-state"


def arguments(command: str, machine: Path, root: Path, *more: str) -> list[str]:
    return [
        command,
        "--cmdline",
        str(machine / "cmdline"),
        "--devices",
        str(machine / "devices"),
        "--root",
        str(root),
        *more,
    ]


def program(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "immucore", *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )


def test_plan_lists_the_operations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments("plan", ACTIVE, tmp_path)) == 0
    explained = (ACTIVE / "plan").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == [
        each for each in explained if not each.startswith("    because")
    ]


@pytest.mark.parametrize(
    ("steps", "image"),
    [
        (None, "/cOS/active.img"),  # the agent has not run here
        ([("/cOS/active.img", "done")], "/cOS/active.img"),
        ([("/cOS/active.img", "undone"), ("/cOS/passive.img", "done")], "/cOS/passive.img"),
        ([("/cOS/active.img", "failed"), ("/cOS/passive.img", "undone")], "/cOS/active.img"),
        ([("/cOS/passive.img", "undone"), ("/cOS/recovery.img", "present")], "/cOS/recovery.img"),
    ],
)
def test_the_slot_that_was_booted_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, str]] | None, image: str
) -> None:
    monkeypatch.setattr(report, "DIRECTORY", str(tmp_path))
    asked = cmdline.parse(b"root=LABEL=COS_STATE cos-img/filename=/cOS/active.img")
    if steps is not None:
        loops = [
            {"operation": {"kind": "loop", "source": f"/run/initramfs/cos-state{name}"}, "outcome": outcome}
            for name, outcome in steps
        ]
        other = {"operation": {"kind": "mount", "source": "/cOS/passive.img"}, "outcome": "done"}
        (tmp_path / "steps.json").write_text(json.dumps({"steps": [other, *loops]}))

    assert cli._booted(asked).image == image


def test_plan_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments("plan", ACTIVE, tmp_path, "--json")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["schema"] == 1
    assert shown["operations"][0]["text"] == "mount /dev/vda4 on /run/initramfs/cos-state (ext4, ro)"
    assert shown["operations"][0]["why"] == "root=LABEL=COS_ACTIVE"
    assert shown["notes"] == ["/usr/local: a volume, although RW_PATHS (the default) has /usr/local"]
    assert shown["warnings"] == []


@pytest.mark.parametrize(
    ("path", "operations"),
    [
        ("/etc/hosts", ["overlay on /sysroot/etc"]),
        ("/usr/local/", ["mount /dev/vda5 on /sysroot/usr/local"]),
        ("/usr/../var/log", ["overlay on /sysroot/var"]),
    ],
)
def test_explain_a_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, operations: list[str]
) -> None:
    assert cli.main(arguments("explain", ACTIVE, tmp_path, path)) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [each for each in lines if not each.startswith("    because ")]
    assert [each.partition(" (")[0] for each in shown][-len(operations) :] == operations
    assert len(lines) == 2 * len(shown)


def test_explain_a_path_that_nothing_is_done_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = GOLDEN / "cos-not-ours"
    assert cli.main(arguments("explain", machine, tmp_path, "/etc")) == 0
    assert capsys.readouterr().out == "nothing is done for /etc: it is what the image has, read-only\n"


def test_explain_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = GOLDEN / "cos-unknown-keys"
    assert cli.main(arguments("explain", unknown, tmp_path, "--json")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["operations"]) == 19
    assert len(shown["warnings"]) == 3


def test_a_refusal_is_two_lines_and_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments("plan", NO_STATE, tmp_path)) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (NO_STATE / "error").read_text().partition("\n")[2]


@pytest.mark.parametrize("missing", ["--cmdline", "--devices", "--root"])
def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    words = arguments("plan", ACTIVE, tmp_path)
    words[words.index(missing) + 1] = "/nowhere"
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "immucore: cannot read '/nowhere': No such file or directory\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("LABEL=x", "'PATH'"),
        ('PATH="/dev/a" SIZE="big"', "invalid literal for int() with base 10: 'big'"),
        ('PATH="/dev/a', "No closing quotation"),
        ("nonsense", 'it has to be KEY="value" pairs'),
    ],
)
def test_devices_that_cannot_be_read(line: str, reason: str) -> None:
    with pytest.raises(CmdlineError) as caught:
        cli.devices_from(f"\n{line}\n", "file")
    assert caught.value.message == f"cannot read line 2 of 'file': {reason}"
    assert caught.value.hint == f"make the file with: {cli.LSBLK}"


def test_devices_from_lsblk() -> None:
    text = (
        "# a comment\n"
        'PATH="/dev/vda" FSTYPE="" LABEL="" UUID="" PARTLABEL="" PARTUUID="" PKNAME="" SIZE="8589934592"\n'
        'PATH="/dev/vda4" FSTYPE="ext4" LABEL="COS_STATE" UUID="00000004-0000-4000-8000-000000000000"'
        ' PARTLABEL="state" PARTUUID="00000004-1111-4111-8111-111111111111" PKNAME="vda" SIZE="67108864"\n'
        'PATH="/dev/sr0" LABEL="A B"\n'
    )
    assert cli.devices_from(text, "file").all == (
        Device(path="/dev/vda", disks=("/dev/vda",), size_bytes=8 << 30),
        partition(4, "COS_STATE"),
        Device(path="/dev/sr0", label="A B", disks=("/dev/sr0",)),
    )


def test_a_stack_from_lsblk() -> None:
    """It has a line for each of the devices that another lies on."""
    text = (
        'PATH="/dev/sda" KNAME="sda" PKNAME="" TYPE="disk" MODEL="Disk " SERIAL="S1" TRAN="sata" RM="0"\n'
        'PATH="/dev/sda1" KNAME="sda1" PKNAME="sda" TYPE="part" FSTYPE="linux_raid_member"\n'
        'PATH="/dev/md0" KNAME="md0" PKNAME="sda1" TYPE="raid1" FSTYPE="crypto_LUKS"\n'
        'PATH="/dev/mapper/open" KNAME="dm-0" PKNAME="md0" TYPE="crypt" LABEL="DATA"\n'
        'PATH="/dev/sdb" KNAME="sdb" PKNAME="" TYPE="disk" MODEL="Stick" SERIAL="S2" TRAN="usb" RM="0"\n'
        'PATH="/dev/sdb1" KNAME="sdb1" PKNAME="sdb" TYPE="part" FSTYPE="linux_raid_member"\n'
        'PATH="/dev/md0" KNAME="md0" PKNAME="sdb1" TYPE="raid1" FSTYPE="crypto_LUKS"\n'
    )
    both = ("/dev/sda", "/dev/sdb")
    leg = {"fstype": "linux_raid_member", "holders": ("/dev/md0",)}
    sda = {"disks": ("/dev/sda",), "model": "Disk", "serial": "S1", "bus": "sata"}
    sdb = {"disks": ("/dev/sdb",), "model": "Stick", "serial": "S2", "bus": "usb", "removable": True}
    found = cli.devices_from(text, "file", "/dev/sda")
    assert found == Devices(
        all=(
            Device(path="/dev/sda", **sda),
            Device(path="/dev/sda1", parent="/dev/sda", **leg, **sda),
            Device(
                path="/dev/md0",
                fstype="crypto_LUKS",
                holders=("/dev/mapper/open",),
                disks=both,
                removable=True,
            ),
            Device(path="/dev/mapper/open", label="DATA", disks=both, removable=True),
            Device(path="/dev/sdb", **sdb),
            Device(path="/dev/sdb1", parent="/dev/sdb", **leg, **sdb),
        ),
        boot="/dev/sda",
        boot_origin="rd.cos.bootdisk",
    )


def test_devices_that_lie_on_each_other() -> None:
    text = 'PATH="/dev/a" PKNAME="b"\nPATH="/dev/b" PKNAME="a"\n'
    assert [device.path for device in cli.devices_from(text, "file").all] == ["/dev/a", "/dev/b"]


def test_devices_of_this_machine_as_lsblk_prints_them() -> None:
    said = subprocess.run(cli.LSBLK.split(), capture_output=True, text=True, check=True).stdout
    devices = cli.devices_from(said, "lsblk").all
    assert len(devices) == len(said.splitlines())
    assert all(device.path.startswith("/dev/") for device in devices)


def test_what_lsblk_escapes() -> None:
    """It writes \\xNN for what a shell could take amiss (lsblk(8), --pairs)."""
    (device,) = cli.devices_from(r'PATH="/dev/a" LABEL="a\x22b\x24c\x5cd"', "file").all
    assert device.label == 'a"b$c\\d'


def test_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["self-test"]) == 0
    assert capsys.readouterr().out == "self-test: every module and library loads\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"immucore {__version__}\n"


@pytest.mark.parametrize("words", [[], ["nonsense"], ["plan", "--nonsense"]])
def test_what_nobody_asks_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: immucore" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert {"boot", "plan", "explain", "self-test"} <= {*capsys.readouterr().out.split()}


def test_the_program_goes_to_its_tools(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["immucore", "self-test"])
    assert __main__.main() == 0
    assert capsys.readouterr().out.startswith("self-test: ")


def test_as_a_program(tmp_path: Path) -> None:
    said = program(*arguments("explain", ACTIVE, tmp_path))
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == (ACTIVE / "plan").read_text()


def test_a_program_that_refuses(tmp_path: Path) -> None:
    said = program(*arguments("explain", NO_STATE, tmp_path))
    assert said.returncode == 3
    assert f"exit status 3\n{said.stderr}" == (NO_STATE / "error").read_text()


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "self_test", interrupted)
    assert cli.main(["self-test"]) == 4
    assert capsys.readouterr().err == "immucore: stopped\n"


def test_nobody_reads_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        said = subprocess.run(
            [sys.executable, "-m", "immucore", *arguments("plan", ACTIVE, tmp_path)],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )
    assert (said.returncode, said.stderr) == (0, "")


def test_output_that_finds_no_room(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        said = subprocess.run(
            [sys.executable, "-m", "immucore", *arguments("plan", ACTIVE, tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )
    assert (said.returncode, said.stderr) == (2, "immucore: cannot go on: No space left on device\n")
