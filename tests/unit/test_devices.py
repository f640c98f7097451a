"""Which device a spelling means."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import partition
from hypothesis import given, settings
from hypothesis import strategies as st

from immucore.devices import (
    ANYWHERE,
    BOOTDISK,
    HOME_FIRST,
    HOME_ONLY,
    LOADER,
    MEMBERS,
    Device,
    Devices,
    Wanted,
    describe,
    split,
)
from immucore.errors import AmbiguousError, DeviceError


@pytest.fixture
def disk() -> Devices:
    """Give the disk of a cOS machine."""
    labels = ("COS_GRUB", "COS_OEM", "COS_RECOVERY", "COS_STATE", "COS_PERSISTENT")
    partitions = [partition(n, label) for n, label in enumerate(labels, 1)]
    return Devices(all=(Device(path="/dev/vda", disks=("/dev/vda",)), *partitions))


def on(disk: str, number: int, label: str = "DATA", **more: Any) -> Device:
    """Give a partition of a disk; its UUID is like no other's."""
    plain = partition(number, label, disk=f"/dev/{disk}")
    device: Device = plain.replace(**{"uuid": f"{disk}-{number}", **more})
    return device


def stick(number: int = 1, label: str = "DATA", **more: Any) -> Device:
    return on("sdz", number, label, removable=True, bus="usb", **more)


STATE = on("vda", 4, "COS_STATE")


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


def refusal(devices: Devices, spec: str = "LABEL=DATA", **more: Any) -> str:
    """Return the hint for a device that is not found."""
    with pytest.raises(DeviceError) as caught:
        devices.find(spec, **more)
    assert caught.value.message == f"cannot find {describe(spec)}"
    return caught.value.hint


@pytest.mark.parametrize("fstype", MEMBERS)
def test_a_member_of_something_else_is_no_candidate(fstype: str) -> None:
    outer = Device(path="/dev/vda5", fstype=fstype, label="DATA", uuid="1")
    inner = Device(path="/dev/mapper/data", fstype="ext4", label="DATA", uuid="2")
    assert Devices(all=(outer, inner)).find("LABEL=DATA") == inner
    said = refusal(Devices(all=(outer,)))
    assert said == f"labels seen: DATA (/dev/vda5); not looked into: /dev/vda5 is {fstype}"


@pytest.mark.parametrize(
    ("obstacle", "why"),
    [
        ({"holders": ("/dev/md0", "/dev/mapper/x")}, "used by /dev/md0, /dev/mapper/x"),
        ({"multipath": True}, "a path of a multipath device"),
        ({"fstype": "crypto_LUKS"}, "holds crypto_LUKS"),
    ],
)
def test_what_something_else_uses_is_no_candidate(obstacle: dict[str, Any], why: str) -> None:
    held, data = on("vda", 5, **obstacle), on("vdb", 1)
    devices = Devices(all=(held, data))
    assert devices.find("LABEL=DATA") == data
    two = Devices(all=(held, data, on("vdc", 1)))
    with pytest.raises(DeviceError) as caught:
        two.find("LABEL=DATA")
    assert f"/dev/vda5  64 MiB  -  -  UUID=vda-5  on /dev/vda: {why}\n" in caught.value.hint
    # The partitions that a member of a mirror shows are those of the mirror.
    whole = Device(path="/dev/vda", disks=("/dev/vda",), **obstacle)
    assert Devices(all=(whole, on("vda", 5), data)).find("LABEL=DATA") == data
    assert Devices(all=(whole, on("vda", 5))).candidates("LABEL=DATA") == ()


def test_a_partition_of_an_array_is_a_candidate() -> None:
    leg = Device(path="/dev/sda", disks=("/dev/sda",), fstype="isw_raid_member", holders=("/dev/md126",))
    array = Device(path="/dev/md126", disks=("/dev/sda",))
    part = Device(path="/dev/md126p1", label="DATA", disks=("/dev/sda",), parent="/dev/md126")
    assert Devices(all=(leg, on("sda", 1), array, part)).find("LABEL=DATA") == part


def test_a_stick_is_not_taken_for_a_name() -> None:
    """Nobody's USB stick configures the machine or becomes its data, also where nothing else is."""
    devices = Devices(all=(stick(model="Stick", serial="123"), STATE))
    assert refusal(devices, near=STATE) == (
        "labels seen: DATA (/dev/sdz1), COS_STATE (/dev/vda4); "
        "name it by its UUID= if it is one of those that were not taken:\n"
        "    /dev/sdz1  64 MiB  Stick  123  UUID=sdz-1  on /dev/sdz: removable, and not the boot disk"
    )
    assert devices.find("UUID=sdz-1", near=STATE) == stick(model="Stick", serial="123")
    assert devices.candidates("PARTLABEL=data", near=STATE) == ()


@pytest.mark.parametrize("boot", ["/dev/sdz", "/dev/sdz9", "PARTUUID=00000009-1111-4111-8111-111111111111"])
def test_a_stick_that_was_booted_from_is_the_system(boot: str) -> None:
    whole = Device(path="/dev/sdz", disks=("/dev/sdz",), removable=True)
    esp, other = stick(9, "COS_GRUB"), on("vda", 1)
    devices = Devices(all=(other, esp, stick(), whole), boot=boot, boot_origin=LOADER)
    assert devices.find("LABEL=DATA") == stick()


def test_a_stick_with_the_state_is_the_system_where_nothing_else_has_one() -> None:
    state = stick(4, "COS_STATE")
    assert Devices(all=(state, stick(2, "COS_OEM"))).find("LABEL=COS_STATE") == state
    assert Devices(all=(state, stick(2, "COS_OEM"))).find(
        "LABEL=COS_OEM", near=state, home_only=True
    ).path == ("/dev/sdz2")
    assert Devices(all=(state, STATE)).find("LABEL=COS_STATE") == STATE


def test_what_configures_the_machine_is_at_home() -> None:
    other = on("vdb", 2, "COS_OEM")
    devices = Devices(all=(STATE, other))
    assert devices.find("LABEL=COS_OEM", near=STATE) == other
    said = refusal(devices, "LABEL=COS_OEM", near=STATE, home_only=True)
    assert said.endswith("on /dev/vdb: on another disk than the system")
    assert devices.find("UUID=vdb-2", near=STATE, home_only=True) == other
    named = devices.replace(boot="/dev/vdb2", boot_origin=BOOTDISK)
    assert named.find("LABEL=COS_OEM", near=STATE, home_only=True) == other


def test_a_locked_one_at_home_is_not_replaced_by_another_disks() -> None:
    locked = on("vda", 5, fstype="crypto_LUKS")
    said = refusal(Devices(all=(STATE, locked, on("vdb", 1))), near=STATE)
    assert said.endswith("on /dev/vdb: /dev/vda5, on the system's disk, has the name too")
    opened = Device(path="/dev/mapper/data", label="DATA", fstype="ext4", disks=("/dev/vda",))
    assert Devices(all=(STATE, locked, on("vdb", 1), opened)).find("LABEL=DATA", near=STATE) == opened


def test_a_damaged_one_at_home_is_not_replaced_by_another_disks() -> None:
    state, old = STATE, on("vdb", 1)
    damaged = Devices(
        all=(state, old), broken=(("LABEL=DATA", "cannot repair '/dev/vda5': too much is lost"),)
    )
    with pytest.raises(DeviceError, match="cannot repair '/dev/vda5': too much is lost"):
        damaged.find("LABEL=DATA", near=state)
    assert damaged.replace(broken=()).find("LABEL=DATA", near=state) == old


@pytest.mark.parametrize("spec", ["LABEL=DATA", "UUID=same"])
def test_of_several_the_one_on_the_disk_that_is_booted(spec: str) -> None:
    same = {"uuid": "same"}
    here, there, elsewhere = on("vda", 1, **same), on("vdb", 1, **same), on("vdc", 1, **same)
    boot = on("vdb", 9, "COS_GRUB")
    devices = Devices(all=(elsewhere, there, here, STATE, boot, stick(**same)))
    assert devices.find(spec, near=STATE) == here
    booted = devices.replace(boot=f"PARTUUID={boot.partuuid.upper()}", boot_origin=LOADER)
    assert booted.find(spec, near=STATE) == there  # the boot disk comes before that of the state
    gone = devices.replace(boot="PARTUUID=12", boot_origin=LOADER)
    assert gone.find(spec, near=STATE) == here  # firmware can name what Linux does not see


def test_a_copy_of_the_boot_disk_on_a_stick_is_not_the_boot_disk() -> None:
    esp = on("vda", 1, "COS_GRUB", partuuid="1")
    copies = [esp, STATE, stick(1, "COS_GRUB", partuuid="1"), stick(4, "COS_STATE", uuid=STATE.uuid)]
    devices = Devices(all=tuple(copies), boot="PARTUUID=1", boot_origin=LOADER)
    assert devices.boot_disks() == {"/dev/vda"}
    assert devices.find("LABEL=COS_STATE") == devices.find(f"UUID={STATE.uuid}") == STATE


def test_what_lies_on_several_disks_is_at_home_on_each() -> None:
    array = Device(path="/dev/md0", label="DATA", disks=("/dev/sda", "/dev/sdb"))
    state = on("sdb", 4, "COS_STATE")
    assert Devices(all=(on("vdc", 1), array, state)).find("LABEL=DATA", near=state) == array
    assert Devices(all=(array, on("sdb", 2, "COS_OEM"))).find(
        "LABEL=COS_OEM", near=array, home_only=True
    ).path == ("/dev/sdb2")


def test_a_single_one_on_another_disk_is_it() -> None:
    data = on("vdb", 1)
    assert Devices(all=(data, STATE)).find("LABEL=DATA", near=STATE) == data


def test_two_paths_to_one_disk_are_one() -> None:
    same = {"serial": "3600", "bus": "scsi", "uuid": "u"}
    first, second = on("sda", 1, **same), on("sdb", 1, **same)
    for order in ((first, second), (second, first)):
        assert Devices(all=order).find("LABEL=DATA") == first
        assert Devices(all=order).find("UUID=u") == first


@pytest.mark.parametrize(
    "different",
    [
        {"serial": "3601"},
        {"serial": ""},
        {"uuid": "v"},
        {"size_bytes": 1},
        {"bus": "ata"},
        {"partuuid": "p"},
    ],
)
def test_two_disks_are_two(different: dict[str, Any]) -> None:
    same: dict[str, Any] = {"serial": "3600", "bus": "scsi", "uuid": "u", "partuuid": "q"}
    first, second = on("sda", 1, **same), on("sdb", 1, **{**same, **different})
    assert len(Devices(all=(first, second)).candidates("LABEL=DATA")) == 2
    usb = [each.replace(removable=True, **same) for each in (first, second)]  # their serials are anything
    assert len(Devices(all=tuple(usb)).candidates("LABEL=DATA")) == 2


@pytest.mark.parametrize("near", [None, on("vdc", 4, "COS_STATE")])
def test_several_of_which_none_stands_out_stop_the_boot(near: Device | None) -> None:
    """The table has everything that carries the name."""
    two = (on("vda", 1, model="Disk", serial="1"), on("vdb", 2), stick(), on("vdd", 3, fstype="crypto_LUKS"))
    with pytest.raises(DeviceError) as caught:
        Devices(all=two).find("LABEL=DATA", near=near)
    assert caught.value.message == "cannot choose a filesystem labelled 'DATA': 2 devices have it"
    stick_is = "removable, and not the boot disk" if near else "removable"
    assert caught.value.hint.splitlines() == [
        "remove all but one of them, or name one by its UUID= or PARTUUID=, "
        "or its disk by rd.cos.bootdisk=:",
        "    /dev/vda1  64 MiB  Disk  1  UUID=vda-1  on /dev/vda",
        "    /dev/vdb2  64 MiB  -  -  UUID=vdb-2  on /dev/vdb",
        f"    /dev/sdz1  64 MiB  -  -  UUID=sdz-1  on /dev/sdz: {stick_is}",
        "    /dev/vdd3  64 MiB  -  -  UUID=vdd-3  on /dev/vdd: holds crypto_LUKS",
    ]


def test_the_table_of_what_is_wanted() -> None:
    wanted = Wanted(spec="LABEL=DATA", timeout_sec=1, near=NEAR)
    assert Devices(all=(stick(), STATE, on("vda", 5))).table(wanted) == [
        "/dev/sdz1  64 MiB  -  -  UUID=sdz-1  on /dev/sdz: removable, and not the boot disk",
        "/dev/vda5  64 MiB  -  -  UUID=vda-5  on /dev/vda",
    ]


def test_a_boot_disk_that_is_named_has_to_be_there() -> None:
    devices = Devices(all=(STATE,), boot="UUID=1", boot_origin=BOOTDISK)
    with pytest.raises(DeviceError) as caught:
        devices.find("LABEL=COS_STATE")
    assert caught.value.message == (
        "cannot find a filesystem with the UUID '1', which rd.cos.bootdisk says was booted from"
    )
    assert caught.value.hint == (
        "UUIDs seen: vda-4 (/dev/vda4); without rd.cos.bootdisk the agent goes by the firmware"
    )
    assert devices.answers(Wanted(spec="LABEL=COS_STATE", timeout_sec=1)) == ()


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
    assert refusal(Devices()) == "labels seen: none"
    unknown = (Device(path="/dev/sda"), Device(path="/dev/sda1"))
    assert (
        refusal(Devices(unknown=unknown)) == "labels seen: none; not known to udev yet: /dev/sda, /dev/sda1"
    )


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


def unknown(disk: str, number: int = 7, **more: Any) -> Device:
    return Device(path=f"/dev/{disk}{number}", disks=(f"/dev/{disk}",), **more)


def why_not_settled(devices: Devices, spec: str = "LABEL=DATA", home: str = ANYWHERE, near: str = "") -> str:
    return devices.unsettled(Wanted(spec=spec, timeout_sec=1, home=home, near=near))


NEAR = "LABEL=COS_STATE"
BOOT = on("vdb", 9, "COS_GRUB")
LOADED = {"boot": f"PARTUUID={BOOT.partuuid}", "boot_origin": LOADER}


@pytest.mark.parametrize(
    ("devices", "near", "home", "why"),
    [
        ([], "", ANYWHERE, "it is not there"),
        # Nobody says which disk is the system's.
        ([on("vda", 5)], "", HOME_FIRST, ""),
        ([on("vda", 5), unknown("vda")], "", HOME_FIRST, ""),
        ([on("vda", 5), unknown("vdc")], "", HOME_FIRST, "udev has not looked at /dev/vdc7 yet"),
        ([on("vda", 5), on("vdb", 5), unknown("vdc")], "", ANYWHERE, "udev has not looked at /dev/vdc7 yet"),
        ([on("vda", 5), unknown("sdz", removable=True)], "", HOME_FIRST, ""),
        ([on("vda", 5), unknown("loop")], "", HOME_FIRST, ""),
        (
            [stick()],
            "",
            HOME_FIRST,
            "/dev/sdz1 is removable, and nobody says which disk was booted from",
        ),
        # The state is there.
        ([STATE, on("vda", 5), unknown("vda"), unknown("vdc")], NEAR, HOME_FIRST, ""),
        (
            [STATE, on("vda", 5), Device(path="/dev/md0", disks=("/dev/vda", "/dev/vdc"))],
            NEAR,
            ANYWHERE,
            "udev has not looked at /dev/md0 yet",
        ),
        ([STATE, on("vdc", 5)], NEAR, HOME_FIRST, ""),
        ([STATE, on("vdc", 5), unknown("vda")], NEAR, ANYWHERE, "udev has not looked at /dev/vda7 yet"),
        ([STATE, on("vdc", 5), unknown("vdd")], NEAR, ANYWHERE, "udev has not looked at /dev/vdd7 yet"),
        ([STATE, on("vdc", 5), unknown("vdc")], NEAR, ANYWHERE, ""),
        ([STATE, on("vdc", 5)], NEAR, HOME_ONLY, "it is not there"),
        ([STATE, stick()], NEAR, HOME_FIRST, "it is not there"),
        # Something at home is not open.
        ([STATE, on("vdc", 5), on("vda", 6, "", fstype="LVM2_member")], NEAR, ANYWHERE, ""),
        (
            [STATE, on("vdc", 5), on("vda", 6, "", fstype="LVM2_member")],
            NEAR,
            HOME_FIRST,
            "what is on /dev/vda6 is not known yet",
        ),
        (
            [STATE, on("vdc", 5), Device(path="/dev/mapper/new", disks=("/dev/vda",))],
            NEAR,
            HOME_FIRST,
            "what is on /dev/mapper/new is not known yet",
        ),
        ([STATE, on("vdc", 5), on("vda", 6, "", fstype="swap")], NEAR, HOME_FIRST, ""),
    ],
)
def test_an_answer_is_settled_when_nothing_better_can_come(
    devices: list[Device], near: str, home: str, why: str
) -> None:
    look = Devices(
        all=tuple(each for each in devices if each.partuuid or "mapper" in each.path),
        unknown=tuple(each for each in devices if not (each.partuuid or "mapper" in each.path)),
    )
    assert why_not_settled(look, home=home, near=near) == why


def test_an_answer_on_the_boot_disk_is_settled() -> None:
    look = Devices(all=(on("vda", 5), STATE, BOOT), unknown=(unknown("vdb"),), **LOADED)
    assert why_not_settled(look, near=NEAR) == "udev has not looked at /dev/vdb7 yet"
    there = look.replace(all=(*look.all, on("vdb", 5)))
    assert why_not_settled(there, near=NEAR) == ""
    assert why_not_settled(there, "/dev/vda5", near=NEAR) == ""
    gone = look.replace(all=(STATE, on("vda", 5)))
    assert why_not_settled(gone, near=NEAR) == (
        f"the disk with {LOADED['boot']}, which was booted from (LoaderDevicePartUUID), is not there"
    )


LABELS = ("COS_STATE", "COS_OEM", "DATA", "")


@st.composite
def machines(draw: st.DrawFn) -> Devices:
    """Draw disks, some of them on USB, with partitions and what can be built on those."""
    devices: list[Device] = []
    for name in draw(st.lists(st.sampled_from(["sda", "sdb", "sdc", "sdd"]), unique=True)):
        usb = draw(st.booleans())
        whole = f"/dev/{name}"
        common = {
            "disks": (whole,),
            "removable": usb,
            "bus": "usb" if usb else "scsi",
            "serial": draw(st.sampled_from(["", "S1", "S2"])),
            "multipath": draw(st.sampled_from([False, False, True])),
        }
        own = draw(st.sampled_from(["", "", "isw_raid_member", "ext4"]))
        devices.append(Device(path=whole, fstype=own, label=draw(st.sampled_from(LABELS)), **common))
        for number in range(1, draw(st.integers(0, 4)) + 1):
            devices.append(
                Device(
                    path=f"{whole}{number}",
                    parent=whole,
                    fstype=draw(st.sampled_from(["ext4", "ext4", *MEMBERS[:3]])),
                    label=draw(st.sampled_from(LABELS)),
                    uuid=draw(st.sampled_from(["u1", "u2", ""])),
                    partuuid=f"p{number}",
                    **common,
                )
            )
    for number in range(draw(st.integers(0, 3)) if devices else 0):
        path = f"/dev/mapper/m{number}"
        chosen = draw(st.lists(st.sampled_from(devices), min_size=1, max_size=2, unique=True))
        below = [each.path for each in chosen]
        devices = [
            each.replace(holders=(*each.holders, path)) if each.path in below else each for each in devices
        ]
        devices.append(
            Device(
                path=path,
                fstype=draw(st.sampled_from(["ext4", "crypto_LUKS", ""])),
                label=draw(st.sampled_from(LABELS)),
                uuid=draw(st.sampled_from(["u1", "u2", ""])),
                disks=tuple(sorted({disk for each in chosen for disk in each.disks})),
                removable=any(each.removable for each in chosen),
            )
        )
    boot = draw(st.sampled_from(["", "/dev/sda", "/dev/sdb1", "PARTUUID=p1", "PARTUUID=gone"]))
    return Devices(all=tuple(devices), boot=boot, boot_origin=LOADER if boot else "")


SPECS = st.sampled_from(
    ["LABEL=COS_STATE", "LABEL=COS_OEM", "LABEL=DATA", "UUID=u1", "PARTUUID=p1", "/dev/sda1"]
)


FIELDS = {"LABEL": "label", "UUID": "uuid", "PARTUUID": "partuuid", "": "path"}


def acceptable(devices: Devices, spec: str, near: Device | None, *, home_only: bool) -> set[object]:
    """Name the different things that a spelling may mean, each path to one disk only once."""
    kind, value = split(spec)
    boot, close = devices.boot_disks(), {*(near.disks if near else ())}
    by_path = {device.path: device for device in devices.all}
    named = [device for device in devices.all if getattr(device, FIELDS[kind]) == value]
    locked = any(device.fstype in MEMBERS and device.is_on(boot | close) for device in named)

    def is_free(device: Device) -> bool:
        above = by_path.get(device.parent)
        own = not (device.multipath or device.holders or device.fstype in MEMBERS)
        return own and (above is None or is_free(above))

    def is_welcome(device: Device) -> bool:
        if kind != "LABEL" or device.is_on(boot | close) or not (boot | close or home_only):
            return True
        return not (device.removable or locked or (home_only and boot | close))

    ranks: dict[int, set[object]] = {}
    for device in named:
        if is_free(device) and is_welcome(device):
            rank = 0 if device.is_on(boot) else 1 if device.is_on(close) else 2 + device.removable
            one_disk = device.serial and not device.removable and (device.uuid or device.partuuid)
            thing = (device.serial, device.uuid, device.partuuid) if one_disk else device.path
            ranks.setdefault(rank, set()).add(thing)
    return ranks[min(ranks)] if ranks else set()


@given(devices=machines(), spec=SPECS, shuffle=st.randoms(use_true_random=False))
def test_any_machine(devices: Devices, spec: str, shuffle: Any) -> None:
    """Never a member, never one of two, never a foreign stick, in whatever order the devices are listed."""
    near = next(iter(devices.candidates("LABEL=COS_STATE")), None)
    for home_only in (False, True):
        found = devices.candidates(spec, near=near, home_only=home_only)
        home = {*devices.boot_disks(), *(near.disks if near else ())}
        byname = {device.path: device for device in devices.all}
        for device in found:
            parent = byname.get(device.parent, device)
            for each in (device, parent):
                assert each.fstype not in MEMBERS
                assert not each.holders
                assert not each.multipath
            if spec.startswith("LABEL") and home and not device.is_on(home):
                assert not device.removable
                assert not home_only
        things = acceptable(devices, spec, near, home_only=home_only)
        assert len(found) == len(things)
        if len(things) == 1:
            assert devices.find(spec, near=near, home_only=home_only) == found[0]
        elif things:
            said = f"cannot choose {describe(spec)}: {len(things)} devices have it"
            with pytest.raises(AmbiguousError, match=said):
                devices.find(spec, near=near, home_only=home_only)
        else:
            with pytest.raises(DeviceError, match=f"cannot find {describe(spec)}"):
                devices.find(spec, near=near, home_only=home_only)
        mixed = [*devices.all]
        shuffle.shuffle(mixed)
        other = devices.replace(all=tuple(mixed))
        assert other.candidates(spec, near=near, home_only=home_only) == found


@given(
    whole=machines(),
    spec=SPECS,
    home=st.sampled_from([ANYWHERE, HOME_FIRST, HOME_ONLY]),
    slow=st.sets(st.sampled_from(["/dev/sda", "/dev/sdb", "/dev/sdc", "/dev/sdd"]), max_size=2),
)
@settings(max_examples=500)
def test_a_settled_answer_stays_when_udev_looks_at_the_rest(
    whole: Devices, spec: str, home: str, slow: set[str]
) -> None:
    """Which disk was faster makes no difference: what is still to be looked at changes nothing."""
    state = Wanted(spec="LABEL=COS_STATE", timeout_sec=1, home=HOME_FIRST)
    wanted = Wanted(spec=spec, timeout_sec=1, near=state.spec, home=home)
    early = whole.replace(
        all=tuple(device for device in whole.all if not device.is_on(slow)),
        unknown=tuple(
            Device(path=device.path, disks=device.disks, removable=device.removable)
            for device in whole.all
            if device.is_on(slow)
        ),
    )
    if not (early.unsettled(state) or early.unsettled(wanted)):
        assert (early.answers(state), early.answers(wanted)) == (whole.answers(state), whole.answers(wanted))
