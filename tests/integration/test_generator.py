"""The generator of the initramfs, run by each shell it may meet, our command line over /proc/cmdline."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from immucore import cmdline

GENERATOR = Path(__file__).parents[2] / "dracut-module/50immucore/immucore-generator"
Generate = Callable[[str], dict[str, str]]
IMAGE = "cos-img/filename=/cOS/active.img"
WANTED = "initrd-root-fs.target.d/50-immucore.conf"
DEVICES = "immucore.service.d/50-devices.conf"

ON_FAILURE = "immucore.service.d/50-onfail.conf"
START_CLEANUP = "systemctl --no-block start initrd-cleanup.service"


def label(name: str) -> str:
    return rf"dev-disk-by\x2dlabel-{name}.device"


STATE = label("COS_STATE")
OEM = label("COS_OEM")
PERSISTENT = label("COS_PERSISTENT")
RECOVERY = label("COS_RECOVERY")


@pytest.fixture(params=["dash", "bash"])
def generate(request: pytest.FixtureRequest, tmp_path: Path) -> Generate:
    """Run the generator with a command line; return what it wrote as {path: text}."""

    def run(line: str) -> dict[str, str]:
        (tmp_path / "cmdline").write_text(line + "\n", newline="")
        for name in ("normal", "early", "late"):
            (tmp_path / name).mkdir(exist_ok=True)
        script = 'mount --bind "$1" /proc/cmdline && exec "$2" "$3" normal early late'
        arguments = [str(tmp_path / "cmdline"), request.param, str(GENERATOR)]
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("", "")
        assert not [*(tmp_path / "normal").iterdir(), *(tmp_path / "late").iterdir()]
        early = tmp_path / "early"
        files = [file for file in early.rglob("*") if file.is_file()]
        return {str(file.relative_to(early)): file.read_text() for file in files}

    return run


@pytest.mark.parametrize(
    "line",
    [
        "",
        "root=LABEL=COS_STATE ro quiet",
        "root=/dev/sda1 x-cos-img/filename=/cOS/active.img",
        "xcos-img/filename=/a cos-img/filenamex=/a",
        'cmd="x cos-img/filename=/cOS/active.img"',
        "root=/dev/sda1 -- cos-img/filename=/cOS/active.img",
        "rd.cos.disable",
        "rd.cos.disable=0",
        "rd.cos.disable=maybe",
        "rd.cos.disable rd.immucore.disable=off",
    ],
)
def test_leaves_a_boot_alone_that_names_no_image(generate: Generate, line: str) -> None:
    assert generate(line) == {}
    assert not cmdline.parse(line.encode()).engaged


@pytest.mark.parametrize(
    "line",
    [
        IMAGE,
        f"root=LABEL=COS_ACTIVE {IMAGE}",
        "cos_img/filename=/a",
        'cos-img/filename="/a b.img"',
        '"cos-img/filename=/a b.img"',
        "\troot=LABEL=COS_STATE\t\tcos-img/filename=/a\r",
        "elemental.mode=active elemental.image=/cOS/active.img",
        f"{IMAGE} rd.cos.disable=0",
        f"{IMAGE} rd.cos.disable=maybe",
        f"{IMAGE} rd.cos.disable elemental.disable=FALSE",
        f"root=live:CDLABEL=COS_LIVE root=LABEL=COS_STATE {IMAGE}",
        f'foo="unclosed {IMAGE}" {IMAGE}',
    ],
)
def test_takes_part_when_an_image_is_named(generate: Generate, line: str) -> None:
    files = generate(line)

    both = "immucore.service sysroot.mount"
    assert files[WANTED] == f"[Unit]\nRequires={both}\nAfter={both}\n"
    guard = files["initrd-switch-root.service.d/50-immucore.conf"].splitlines()
    assert guard[:2] == ["[Service]", "ExecStartPre=/usr/lib/immucore/immucore-guard"]
    assert "Requires=immucore.service\nAfter=immucore.service\n" in files["sysroot.mount"]
    assert "What=immucore\nWhere=/sysroot\nType=immucore\n" in files["sysroot.mount"]
    parse_etc = files["initrd-parse-etc.service.d/50-immucore.conf"]
    assert parse_etc.splitlines()[1:] == ["ExecStart=", f"ExecStart={START_CLEANUP}"]
    assert files["initrd-root-device.target.d/50-root-device.conf"] == ""
    assert cmdline.parse(line.encode()).engaged


@pytest.mark.parametrize("line", ["cos-img/filename", "cos-img/filename=", "elemental.image=no/path"])
def test_takes_part_when_the_image_cannot_be_read(generate: Generate, line: str) -> None:
    """The agent then stops the boot with a reason; without it the partition would be mounted as the root."""
    assert WANTED in generate(line)


@pytest.mark.parametrize(
    "line",
    [
        f"{IMAGE} rd.cos.disable",
        f"{IMAGE} rd.immucore.disable=1",
        f"{IMAGE} elemental.disable=Yes root=LABEL=COS_STATE",
        f"root=live:CDLABEL=COS_LIVE {IMAGE}",
        "root=live:CDLABEL=COS_LIVE",
        f"rd.cos.disable=0 rd.cos.disable {IMAGE}",
    ],
)
def test_is_only_wanted_when_switched_off_or_live(generate: Generate, line: str) -> None:
    tolerant = "[Service]\nExecStart=\nExecStart=-/usr/lib/immucore/immucore boot\nExecStopPost=\n"
    assert generate(line) == {
        WANTED: "[Unit]\nWants=immucore.service\n",
        "immucore.service.d/50-bystander.conf": tolerant,
    }
    assert not cmdline.parse(line.encode()).engaged


@pytest.mark.parametrize(
    ("line", "devices"),
    [
        (IMAGE, [OEM, PERSISTENT]),
        (f"root=LABEL=COS_ACTIVE {IMAGE}", [STATE, OEM, PERSISTENT]),
        (f"root=LABEL=COS_PASSIVE {IMAGE}", [STATE, OEM, PERSISTENT]),
        (f"root=LABEL=COS_STATE {IMAGE}", [STATE, OEM, PERSISTENT]),
        ("root=LABEL=COS_SYSTEM cos-img/filename=/cOS/recovery.squashfs", [RECOVERY, OEM]),
        ("root=LABEL=COS_RECOVERY cos-img/filename=/cOS/other.img", [RECOVERY, OEM]),
        (f"elemental.mode=passive {IMAGE}", [STATE, OEM, PERSISTENT]),
        ("elemental.mode=recovery elemental.image=/cOS/recovery.img", [RECOVERY, OEM]),
        (f"root=LABEL=COS_STATE rd.cos.oemlabel=MY_OEM {IMAGE}", [STATE, label("MY_OEM"), PERSISTENT]),
        (f"root=UUID=ab-cd {IMAGE}", [r"dev-disk-by\x2duuid-ab\x2dcd.device", OEM, PERSISTENT]),
        (f"root=PARTUUID=ab-1 {IMAGE}", [r"dev-disk-by\x2dpartuuid-ab\x2d1.device", OEM, PERSISTENT]),
        (f"root=PARTLABEL=state {IMAGE}", [r"dev-disk-by\x2dpartlabel-state.device", OEM, PERSISTENT]),
        (f"root=/dev/mapper/a-b {IMAGE}", [r"dev-mapper-a\x2db.device", OEM, PERSISTENT]),
        (
            f"root=LABEL=COS_STATE {IMAGE} rd.cos.mount=LABEL=D+:/d:ro rd.immucore.mount=/dev/vdb1:/e",
            [STATE, OEM, PERSISTENT, label(r"D\x2b"), "dev-vdb1.device"],
        ),
        (f"root=LABEL=a/b {IMAGE} rd.cos.mount=/dev//x:/y", [OEM, PERSISTENT]),
        (f'"root=LABEL=a b" {IMAGE} rd.cos.mount=LABEL=ü:/y', [OEM, PERSISTENT]),
        (f"root=LABEL=* {IMAGE} rd.cos.mount=LABEL=COS_OEM:/again", [OEM, PERSISTENT]),
        (f"root=LABEL=COS_STATE {IMAGE} rd.cos.nopersist", [STATE, OEM]),
        (
            f"root=LABEL=COS_STATE {IMAGE} rd.immucore.nopersist=yes rd.cos.nopersist=0",
            [STATE, OEM, PERSISTENT],
        ),
        (f"root=LABEL=COS_STATE {IMAGE} rd.cos.safe=1 rd.cos.mount=LABEL=D:/d", [STATE]),
        (f"root=LABEL=COS_STATE {IMAGE} rd.cos.safe=no", [STATE, OEM, PERSISTENT]),
    ],
)
def test_hints_at_the_devices_that_the_command_line_names(
    generate: Generate, line: str, devices: list[str]
) -> None:
    files = generate(line)

    listed = " ".join(["", *devices])
    assert files[DEVICES] == f"[Unit]\nWants={listed}\nAfter={listed}\n"
    limited = {path for path, text in files.items() if "JobRunningTimeoutSec=5\n" in text}
    assert limited == {f"{device}.d/timeout.conf" for device in devices}


@pytest.mark.parametrize(
    ("root", "unit"),
    [
        ("LABEL=COS_ACTIVE", label("COS_ACTIVE")),
        ("/dev/vda2", "dev-vda2.device"),
        ("UUID=1-2", r"dev-disk-by\x2duuid-1\x2d2.device"),
    ],
)
def test_masks_the_wait_for_the_device_of_root(generate: Generate, root: str, unit: str) -> None:
    assert generate(f"root={root} {IMAGE}")[f"initrd.target.wants/{unit}"] == ""


def test_escapes_as_systemd_does(generate: Generate) -> None:
    for device in ("/dev/disk/by-id/virtio-a+b=c@d#e:f_g.h", "/dev/mapper/x--y"):
        command = ["systemd-escape", "--path", "--suffix=device", device]
        expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert expected in generate(f"root={device} {IMAGE}")[DEVICES].split()


@pytest.mark.parametrize(
    ("words", "restarts"),
    [
        ("rd.cos.onfail=reboot", True),
        ("rd.immucore.onfail=reboot:3", True),
        ("rd.cos.onfail=shell rd.cos.onfail=reboot:0", True),
        ("rd.cos.onfail=reboot rd.cos.onfail=shell", False),
        ("rd.cos.onfail=reboot rd.cos.onfail=reboot:", False),
        ("rd.cos.onfail=reboot:3s", False),
        ("rd.cos.onfail=reboot:00010", True),
        ("rd.cos.onfail=reboot:86400", True),
        ("rd.cos.onfail=reboot:86401", False),
        ("rd.cos.onfail=reboot:99999", False),
        ("rd.cos.onfail=reboot:000010", False),
        ("rd.cos.onfail=reboot:100000", False),
        ("rd.cos.onfail=reboot:-1", False),
        ("rd.cos.onfail=reboot rd.cos.onfail=reboot:99999", False),
        ("rd.cos.onfail=rebooting", False),
        ("rd.cos.onfail=halt", False),
        ("", False),
    ],
)
def test_restarts_after_a_failure_when_that_is_asked_for(
    generate: Generate, words: str, restarts: bool
) -> None:
    files = generate(f"{IMAGE} {words}")
    for name in (ON_FAILURE, ON_FAILURE.replace("immucore", "initrd-switch-root")):
        assert (files.get(name) == "[Unit]\nFailureAction=reboot-force\n") == restarts
        assert (name in files) == restarts
    assert cmdline.parse(f"{IMAGE} {words}".encode()).onfail.startswith("reboot") == restarts
