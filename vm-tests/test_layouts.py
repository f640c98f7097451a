"""What the layout file and the command line ask for is what the booted system has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import derivative
import expect
import pytest
from disk import Disk, Partition
from machine import Machine

PERSISTENT = 'PERSISTENT_STATE_PATHS="/etc/ssh /home /var/lib/kept"\nPERSISTENT_STATE_BIND={bind}\n'


@pytest.mark.parametrize("bind", ["true", "false"], ids=["bind", "overlay"])
def test_state_survives_a_reboot(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], bind: str
) -> None:
    disk = cos_disk(oem={"cos-layout.env": PERSISTENT.format(bind=bind)})
    kept = machine(disk, expect.ACTIVE, keep_writes=True)
    stat = "stat -c '%a %u %g' /root /root/owned /srv"
    attributes = "getfattr --absolute-names -m - -d /root /root/owned"
    write = "echo mine | tee /usr/local/volume /etc/ssh/state /home/state /var/lib/kept/state /etc/gone"
    look = "cat /usr/local/volume /etc/ssh/state /home/state /var/lib/kept/state; ls /etc/gone || true"

    first = kept.boot(limit_s=90, commands=(stat, attributes, write))
    second = kept.boot(limit_s=90, commands=(stat, attributes, look))

    expect.healthy(first, "active", "/cOS/active.img")
    assert first.output(write) == "mine"
    expect.healthy(second, "active", "/cOS/active.img")
    assert second.output(look).splitlines()[:4] == ["mine"] * 4
    assert "No such file" in second.output(look)
    fstype = "ext4" if bind == "true" else "overlay"
    assert [second.mount(path).fstype for path in ("/etc/ssh", "/home", "/var/lib/kept")] == [fstype] * 3
    expect.overlaid(second, "/etc", "/root", "/opt", "/srv", "/var")
    for report in (first, second):  # what the image's own files have
        assert report.output(stat).splitlines() == ["700 0 0", "640 1000 1000", "755 1001 0"]
        assert 'trusted.immucore="of the directory"' in report.output(attributes)
        assert 'user.immucore="of the file"' in report.output(attributes)


def test_overlay_on_a_block_device(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    disk = cos_disk(extra=(Partition("scratch", "SCRATCH", 32),))

    report = machine(disk, f"{expect.ACTIVE} rd.cos.overlay=LABEL=SCRATCH").boot(limit_s=90)

    expect.healthy(report, "active", "/cOS/active.img")
    expect.volume(report, "/run/overlay", disk.number("scratch"))
    expect.overlaid(report, *(path for path in expect.RW_PATHS if path != "/usr/local"))


def test_volumes_of_the_command_line(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    """One beside the others and one nested below another, given in the wrong order."""
    disk = cos_disk(extra=(Partition("data", "DATA", 16, {"hello": "data"}), Partition("deep", "DEEP", 16)))
    mounts = "rd.cos.mount=PARTLABEL=deep:/usr/local/deep:noatime rd.cos.mount=LABEL=DATA:/srv/data"
    cmdline = f"{expect.ACTIVE} {mounts}"

    report = machine(disk, cmdline).boot(limit_s=90, commands=("cat /srv/data/hello",))

    expect.healthy(report, "active", "/cOS/active.img")
    expect.volume(report, "/srv/data", disk.number("data"))
    expect.volume(report, "/usr/local", disk.number("persistent"))
    expect.volume(report, "/usr/local/deep", disk.number("deep"))
    assert "noatime" in report.mount("/usr/local/deep").options
    assert report.output("cat /srv/data/hello") == "data"


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "no-merge"])
def test_volumes_of_the_layout(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], merge: bool
) -> None:
    layout = 'VOLUMES="LABEL=COS_OEM:/oem LABEL=COS_PERSISTENT:/usr/local LABEL=DATA:/srv/data:ro"\n'
    disk = cos_disk(
        oem={"cos-layout.env": layout + ("" if merge else "MERGE=false\n")},
        extra=(Partition("data", "DATA", 16), Partition("more", "MORE", 16)),
    )

    report = machine(disk, f"{expect.ACTIVE} rd.cos.mount=LABEL=MORE:/opt/more").boot(limit_s=90)

    expect.healthy(report, "active", "/cOS/active.img")
    assert report.mount("/srv/data").source == f"/dev/vda{disk.number('data')}"
    assert not report.mount("/srv/data").writable
    assert any(mount.target == "/opt/more" for mount in report.mountinfo) is merge


def test_no_writable_paths(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    """RW_PATHS set but empty means none: also /etc is read-only, and fstab is right all the same."""
    disk = cos_disk(oem={"cos-layout.env": "RW_PATHS=\n"})

    report = machine(disk, expect.ACTIVE).boot(limit_s=90, commands=("touch /etc/x /var/x || true",))

    expect.overlaid(report)
    assert report.stage == "system"
    assert report.result["outcome"] == "ok"
    assert report.output("touch /etc/x /var/x || true").count("Read-only file system") == 2
    expect.volume(report, "/usr/local", disk.number("persistent"))
    assert report.findmnt_verify.status == 0, report.findmnt_verify.output
    assert "/usr/local ext4" in report.fstab


@pytest.mark.parametrize("where", ["image", "oem", "both"])
def test_layout_file(machine: Callable[..., Machine], cos_disk: Callable[..., Disk], where: str) -> None:
    """OEM's settings go before the image's, one by one."""
    images = derivative.images("bookworm")
    active: Path = images["active.img"]
    files: dict[str, str] = {}
    if where in ("image", "both"):
        active = derivative.edited(
            active, {"etc/cos/cos-layout.env": 'RW_PATHS="/etc /var /srv"\nOVERLAY=tmpfs:11m\n'}
        )
    if where in ("oem", "both"):
        files["cos-layout.env"] = "OVERLAY=tmpfs:13m\n"
    disk = cos_disk(oem=files, state={"cOS/active.img": active})

    report = machine(disk, expect.ACTIVE).boot(limit_s=90)

    expect.healthy(report, "active", "/cOS/active.img")
    size_kib = {"image": 11, "oem": 13, "both": 13}[where] * 1024
    assert f"size={size_kib}k" in report.mount("/run/overlay").options
    everywhere = [path for path in expect.RW_PATHS if path != "/usr/local"]
    expect.overlaid(report, *(everywhere if where == "oem" else ("/etc", "/var", "/srv")))
