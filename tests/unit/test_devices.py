"""Which device a spelling means."""

from __future__ import annotations

import pytest
from fakes import partition
from hypothesis import given
from hypothesis import strategies as st

from immucore.devices import MEMBERS, Device, Devices, describe, split
from immucore.errors import DeviceError


@pytest.fixture
def disk() -> Devices:
    """Give the disk of a cOS machine."""
    labels = ("COS_GRUB", "COS_OEM", "COS_RECOVERY", "COS_STATE", "COS_PERSISTENT")
    partitions = [partition(n, label) for n, label in enumerate(labels, 1)]
    return Devices(all=(Device(path="/dev/vda", disk="/dev/vda"), *partitions))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("LABEL=x", ("LABEL", "x")),
        ("UUID=x=y", ("UUID", "x=y")),
        ("PARTLABEL=", ("PARTLABEL", "")),
        ("PARTUUID=1", ("PARTUUID", "1")),
        ("/dev/sda", ("", "/dev/sda")),
        ("/dev/x=y", ("", "/dev/x=y")),
        ("ID=x", ("", "ID=x")),
        ("=x", ("", "=x")),
    ],
)
def test_split(spec: str, expected: tuple[str, str]) -> None:
    assert split(spec) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "LABEL=COS_STATE",
        "UUID=00000004-0000-4000-8000-000000000000",
        "PARTLABEL=state",
        "PARTUUID=00000004-1111-4111-8111-111111111111",
        "/dev/vda4",
    ],
)
def test_every_spelling_finds_it(disk: Devices, spec: str) -> None:
    assert disk.find(spec).path == "/dev/vda4"


def test_uuids_in_either_case_and_labels_as_they_are() -> None:
    device = Device(path="/dev/a", label="Data", uuid="aB-1", partuuid="cD-2")
    devices = Devices(all=(device,))
    assert devices.candidates("UUID=Ab-1") == devices.candidates("PARTUUID=Cd-2") == (device,)
    assert devices.candidates("LABEL=data") == ()


@pytest.mark.parametrize("fstype", MEMBERS)
def test_a_member_of_something_else_is_no_candidate(fstype: str) -> None:
    outer = Device(path="/dev/vda5", fstype=fstype, label="DATA", uuid="1")
    inner = Device(path="/dev/mapper/data", fstype="ext4", label="DATA", uuid="2")
    assert Devices(all=(outer, inner)).find("LABEL=DATA") == inner
    with pytest.raises(DeviceError) as caught:
        Devices(all=(outer,)).find("LABEL=DATA")
    assert caught.value.hint == f"labels seen: DATA (/dev/vda5); not looked into: /dev/vda5 is {fstype}"


def test_of_several_the_one_on_the_disk_that_is_booted() -> None:
    state, oem, stick = (
        partition(4, "COS_STATE"),
        partition(2, "COS_OEM"),
        partition(1, "COS_OEM", disk="/dev/sda"),
    )
    assert Devices(all=(stick, oem, state)).find("LABEL=COS_OEM", near=state) == oem


def test_a_single_one_elsewhere_is_it() -> None:
    state, data = partition(4, "COS_STATE"), partition(1, "DATA", disk="/dev/vdb")
    assert Devices(all=(data, state)).find("LABEL=DATA", near=state) == data


@pytest.mark.parametrize("near", [None, partition(4, "COS_STATE", disk="/dev/vdc")])
def test_several_of_which_none_stands_out_stop_the_boot(near: Device | None) -> None:
    two = (partition(1, "DATA", disk="/dev/vda"), partition(2, "DATA", disk="/dev/vdb"))
    with pytest.raises(DeviceError) as caught:
        Devices(all=two).find("LABEL=DATA", near=near)
    assert caught.value.message == "cannot choose a filesystem labelled 'DATA': 2 devices have it"
    assert caught.value.hint == (
        "remove all but one of them, or name one by its UUID=:\n"
        "    /dev/vda1  64 MiB  UUID=00000001-0000-4000-8000-000000000000  on /dev/vda\n"
        "    /dev/vdb2  64 MiB  UUID=00000002-0000-4000-8000-000000000000  on /dev/vdb"
    )


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("LABEL=X", "cannot find a filesystem labelled 'X'", "labels seen: A (/dev/a)"),
        ("UUID=X", "cannot find a filesystem with the UUID 'X'", "UUIDs seen: 1 (/dev/a)"),
        ("PARTLABEL=X", "cannot find a partition named 'X'", "partition names seen: p (/dev/a)"),
        ("PARTUUID=X", "cannot find a partition with the PARTUUID 'X'", "PARTUUIDs seen: 2 (/dev/a)"),
        ("/dev/x", "cannot find the device '/dev/x'", "devices seen: /dev/b, /dev/a"),
    ],
)
def test_not_found_says_what_was_seen(spec: str, message: str, hint: str) -> None:
    devices = Devices(
        all=(Device(path="/dev/b"), Device(path="/dev/a", label="A", uuid="1", partlabel="p", partuuid="2"))
    )
    with pytest.raises(DeviceError) as caught:
        devices.find(spec)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert message == f"cannot find {describe(spec)}"


def test_nothing_seen() -> None:
    with pytest.raises(DeviceError) as caught:
        Devices().find("LABEL=X")
    assert caught.value.hint == "labels seen: none"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (Device(path="/dev/vda1", uuid="1", partuuid="2"), "UUID=1"),
        (Device(path="/dev/vda1", partuuid="2"), "PARTUUID=2"),
        (Device(path="/dev/vda1"), "/dev/vda1"),
        (Device(path="/dev/mapper/a", uuid="1"), "/dev/mapper/a"),
    ],
)
def test_the_name_for_fstab(device: Device, name: str) -> None:
    assert device.fstab_name == name


@given(
    labels=st.lists(st.sampled_from(["A", "B", ""]), max_size=6),
    disks=st.lists(st.sampled_from(["/dev/vda", "/dev/vdb"]), min_size=6, max_size=6),
)
def test_finds_one_or_says_why_not(labels: list[str], disks: list[str]) -> None:
    devices = Devices(
        all=tuple(
            partition(n, label, disk=disk)
            for n, (label, disk) in enumerate(zip(labels, disks, strict=False))
        )
    )
    near = Device(path="/dev/vda9", disk="/dev/vda")
    there = devices.candidates("LABEL=A")
    try:
        found = devices.find("LABEL=A", near=near)
    except DeviceError:
        close = [device for device in there if device.disk == near.disk]
        assert len(there) == 0 or len(close) > 1 or (len(there) > 1 and not close)
    else:
        assert found in there
