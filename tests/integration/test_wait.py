"""Waiting for devices: real uevents of a real loop device, and a udev database that is filled late."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from native import ACTIVE, PARTITIONS, Machine, command, wait_until_listening

FIRST_MOUNT = "/run/initramfs/cos-state"


def trigger(device: str) -> None:
    """Let the kernel send an event about a device, as one that appears does."""
    Path(f"/sys/class/block/{device[5:]}/uevent").write_text("change")


def take_away(machine: Machine, name: str) -> Callable[..., None]:
    """Hide a partition; return what brings it back, as udev would."""
    record = machine.record(machine.part(name))
    text = record.read_text()
    record.unlink()

    def bring_back(*, event: bool = True) -> None:
        record.with_suffix(".new").write_text(text)
        record.with_suffix(".new").rename(record)
        if event:
            trigger(machine.part(name))

    return bring_back


def test_finds_what_appears_by_its_event(machine: Machine, agent: Sequence[str]) -> None:
    """It does not wait for the look that is made every second without an event."""
    bring_back = take_away(machine, "state")
    process = machine.start(ACTIVE, agent)
    wait_until_listening(machine, process)
    listening = time.monotonic()
    time.sleep(1.1)  # one look has been made; the next is 0.9 s away
    appeared = time.monotonic()
    bring_back()

    boot = machine.finish(process)

    assert (boot.status, boot.result["outcome"]) == (0, "ok")
    assert boot.steps[0]["operation"]["target"] == FIRST_MOUNT
    assert 0 < boot.steps[0]["started_usec"] / 1e6 - appeared < 0.8
    [wait] = boot.result["waits"]
    assert wait["specs"] == ["LABEL=COS_STATE"]
    assert wait["missing"] == []
    assert wait["took_usec"] / 1e6 >= appeared - listening


def test_finds_what_appears_without_an_event(machine: Machine, source: Sequence[str]) -> None:
    """An event can be lost; then the next look finds it, a second later at the most."""
    bring_back = take_away(machine, "state")
    process = machine.start(ACTIVE, source)
    wait_until_listening(machine, process)
    appeared = time.monotonic()
    bring_back(event=False)

    boot = machine.finish(process)

    assert boot.status == 0
    assert boot.steps[0]["started_usec"] / 1e6 - appeared < 5


def test_waits_for_volumes_as_for_the_root(machine: Machine, source: Sequence[str]) -> None:
    """Both waits of a boot are in the record: of what root needs, and of what the layout asks for."""
    back = [take_away(machine, name) for name in ("oem", "persistent")]
    process = machine.start(ACTIVE, source)
    for bring_back in back:
        wait_until_listening(machine, process)
        time.sleep(0.2)
        bring_back()

    boot = machine.finish(process)

    assert (boot.status, boot.result["outcome"]) == (0, "ok")
    assert [wait["specs"] for wait in boot.result["waits"]] == [
        ["LABEL=COS_OEM"],
        ["LABEL=COS_PERSISTENT"],
    ]
    assert [wait["missing"] for wait in boot.result["waits"]] == [[], []]


def test_one_of_two_never_comes(machine: Machine, source: Sequence[str]) -> None:
    """What is optional has its own deadline, and does not use up that of what is required."""
    bring_back = take_away(machine, "state")
    take_away(machine, "oem")
    process = machine.start(f"{ACTIVE} rd.cos.oemtimeout=1", source)
    threading.Timer(1.8, bring_back).start()

    boot = machine.finish(process)

    assert (boot.status, boot.result["outcome"]) == (0, "degraded")
    [wait] = boot.result["waits"]
    assert (wait["specs"], wait["missing"]) == (["LABEL=COS_STATE", "LABEL=COS_OEM"], ["LABEL=COS_OEM"])


def test_the_time_counts_from_the_start_of_the_initramfs(machine: Machine, source: Sequence[str]) -> None:
    """Seconds that other services took are not waited for once more."""
    take_away(machine, "state")
    machine.path("/machine/kmsg").write_text(
        f"6,1,{int((time.monotonic() - 58) * 1e6)},-;Run /init as init process\n"
    )

    boot = machine.boot(f"{ACTIVE} rd.cos.timeout=60 rd.cos.fallback=off", source)

    assert boot.status == 3
    assert 2.9e6 < boot.result["waits"][0]["took_usec"] < 14e6  # three seconds at least, for udev; not 60


@pytest.fixture
def other(tmp_path: Path) -> Iterator[str]:
    """Attach a second disk, which udev knows nothing of; its path."""
    image = tmp_path / "other.img"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    path = command("losetup", "--find", "--show", image).strip()
    yield path
    command("losetup", "--detach", path)


def spoof(machine: Machine, disk: str, label: str) -> None:
    """Write down what udev would say of a disk with a file system that has this label."""
    machine.record(disk).write_text(
        f"E:ID_FS_TYPE=ext4\nE:ID_FS_LABEL_ENC={label}\nE:ID_FS_UUID_ENC=not-ours\n"
    )


def test_another_disks_state_is_not_taken_before_udev_has_seen_all(
    machine: Machine, source: Sequence[str], other: str
) -> None:
    """The disk that is faster is not the right one by that."""
    spoof(machine, other, "COS_STATE")
    bring_back = take_away(machine, "state")
    process = machine.start(f"{ACTIVE} rd.cos.bootdisk={machine.device}p1", source)
    wait_until_listening(machine, process)
    time.sleep(1.5)
    assert process.poll() is None
    bring_back()

    boot = machine.finish(process)

    assert (boot.status, boot.result["outcome"]) == (0, "ok")
    assert (
        f"because udev has not looked at {machine.part('state')} yet); seen: " in boot.stderr.splitlines()[0]
    )
    assert boot.plan["operations"][0]["source"] == machine.part("state") != other


def test_another_disks_oem_never_configures_the_machine(
    machine: Machine, source: Sequence[str], other: str
) -> None:
    spoof(machine, other, "COS_OEM")
    take_away(machine, "oem")

    boot = machine.boot(f"{ACTIVE} rd.cos.oemtimeout=1 rd.cos.debug", source)

    assert (boot.status, boot.result["outcome"]) == (0, "degraded")
    assert f"LABEL=COS_OEM: {other}  " in boot.stderr
    assert "/sysroot/oem" not in [mount.target for mount in boot.mounts]
    [missing] = [each for each in boot.plan["operations"] if each["kind"] == "missing"]
    assert missing["hint"].endswith(f"UUID=not-ours  on {other}: on another disk than the system")


def test_a_boot_disk_that_is_not_there_is_waited_for(machine: Machine, source: Sequence[str]) -> None:
    boot = machine.boot(f"{ACTIVE} rd.cos.bootdisk=UUID=none rd.cos.timeout=1 rd.cos.oemtimeout=1", source)

    assert boot.status == 3
    assert boot.result["error"]["message"] == (
        "cannot find a filesystem with the UUID 'none', which rd.cos.bootdisk says was booted from"
    )
    assert boot.result["waits"][0]["missing"] == ["LABEL=COS_STATE", "LABEL=COS_OEM"]


def test_an_answer_that_may_change_is_taken_in_the_end(
    machine: Machine, source: Sequence[str], other: str
) -> None:
    """A disk that udev never gets done with does not stop a machine, but for ten seconds."""
    spoof(machine, other, "COS_PERSISTENT")
    take_away(machine, "persistent")
    machine.path("/machine/kmsg").write_text(
        f"6,1,{int((time.monotonic() - 8) * 1e6)},-;Run /init as init process\n"
    )

    boot = machine.boot(ACTIVE, source)

    [wait] = boot.result["waits"]
    assert wait["missing"] == []
    assert 2.9e6 < wait["took_usec"] < 9e6  # not ten from here
    [mount] = [each for each in boot.plan["operations"] if each["target"] == "/sysroot/usr/local"][-1:]
    assert mount["source"] == other
    assert mount["why"].endswith(f", on another disk than {machine.part('state')}")


def without_udev(machine: Machine) -> None:
    machine.path("/machine/udev/control").unlink()
    for record in machine.path("/machine/udev/data").iterdir():
        record.unlink()


def test_without_udev_the_superblocks_are_looked_at(machine: Machine, agent: Sequence[str]) -> None:
    kept = {name: machine.record(machine.part(name)).read_text() for name in PARTITIONS}
    without_udev(machine)

    boot = machine.boot(f"{ACTIVE} rd.cos.debug rd.cos.bootdisk={machine.device}", agent)

    assert (boot.status, boot.result["outcome"]) == (0, "ok")
    assert boot.result["waits"] == []
    for name, record in kept.items():
        properties = dict(line[2:].split("=", 1) for line in record.splitlines())
        [said] = [line for line in boot.stderr.splitlines() if f"Device(path='{machine.part(name)}'" in line]
        for field, key in (
            ("label", "ID_FS_LABEL"),
            ("uuid", "ID_FS_UUID"),
            ("partlabel", "ID_PART_ENTRY_NAME"),
            ("partuuid", "ID_PART_ENTRY_UUID"),
            ("fstype", "ID_FS_TYPE"),
        ):
            assert f"{field}='{properties[key]}'" in said


@pytest.mark.parametrize(
    ("blkid", "why"),
    [
        (None, "there is no blkid"),
        ("#!/bin/sh\necho 'BusyBox v1.35.0 multi-call binary.'\nexit 1\n", "BusyBox"),
    ],
)
def test_without_udev_and_blkid(
    machine: Machine, source: Sequence[str], blkid: str | None, why: str
) -> None:
    without_udev(machine)
    machine.run("mount", "-t", "tmpfs", "none", "/usr/sbin")
    if blkid:
        machine.path("/usr/sbin/blkid").write_text(blkid)
        machine.path("/usr/sbin/blkid").chmod(0o755)

    boot = machine.boot(ACTIVE, source)

    assert boot.status == 3
    message = boot.result["error"]["message"]
    assert message.startswith("cannot look at the disks: udev does not run here, and ")
    assert why in message
    assert boot.result["error"]["hint"] == "put udev or util-linux's blkid into the initramfs"


def test_says_what_it_waits_for_every_ten_seconds(machine: Machine, source: Sequence[str]) -> None:
    """Slow, because ten seconds are what it is about."""
    bring_back = take_away(machine, "state")
    process = machine.start(f"{ACTIVE} rd.cos.timeout=0", source)
    wait_until_listening(machine, process)
    threading.Timer(12, bring_back).start()

    boot = machine.finish(process)

    assert boot.status == 0
    lines = [line for line in boot.stderr.splitlines() if "waiting" in line]
    assert len(lines) == 2  # at once, and after ten seconds
    for line in lines:
        assert line.startswith("<6>waiting for a filesystem labelled 'COS_STATE' (for ever); seen: ")
        assert f"{machine.part('oem')} COS_OEM" in line
    assert boot.result["waits"][0]["took_usec"] > 10.5e6


def test_a_storm_of_events(machine: Machine, agent: Sequence[str]) -> None:
    """More events than the socket holds while the agent is stopped: ENOBUFS is no error."""
    bring_back = take_away(machine, "state")
    process = machine.start(ACTIVE, agent)
    wait_until_listening(machine, process)
    pid = machine.agent_pid()
    os.kill(pid, signal.SIGSTOP)
    with Path(f"/sys/class/block/{machine.device[5:]}/uevent").open("wb", buffering=0) as uevent:
        for number in range(200_000):
            uevent.write(b"change")
            if number % 2000 == 0 and dropped(pid):
                break
    drops = dropped(pid)
    bring_back()
    os.kill(pid, signal.SIGCONT)
    process.send_signal(signal.SIGCONT)  # nsenter stops with what it runs

    boot = machine.finish(process)

    assert drops > 0, "the storm was too small to lose anything"
    assert (boot.status, boot.result["outcome"]) == (0, "ok")
    assert boot.result["waits"][0]["missing"] == []


def dropped(pid: int) -> int:
    """Count the events that a process's uevent sockets have lost (the last but one field of the table)."""
    inodes = {
        os.readlink(link)[8:-1]
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if "socket" in os.readlink(link)
    }
    lines = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
    return sum(int(fields[8]) for fields in lines if fields[9] in inodes)
