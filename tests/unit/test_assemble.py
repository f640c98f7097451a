"""What is started to bring a wanted device, and what is left alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from fakes import partition

from immucore import process
from immucore.assemble import LUKS, LVM, MD, Assembler, Machine, tokens
from immucore.devices import BOOTDISK, HOME_ONLY, Device, Devices, Wanted
from immucore.log import Log

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STATE = partition(4, "COS_STATE")
PERSISTENT = Wanted(spec="LABEL=COS_PERSISTENT", timeout_sec=180)
UUID = "00000005-0000-4000-8000-000000000000"


class FakeChild(process.Child):
    """A program that ends when a test says so."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = tuple(argv)
        self.result: process.Finished | None = None
        self.ended = False

    def finished(self) -> process.Finished | None:
        return self.result

    def end(self, timeout_sec: float = 2.0) -> process.Finished:
        self.ended = True
        return process.Finished(status=143, output="TPM2 does not answer.\nStopped.\n")


class Stage:
    """A machine in a directory, and what is started on it."""

    def __init__(self, top: Path, line: str = "", *, tools: bool = True) -> None:
        self.top = top
        top.mkdir(exist_ok=True)
        self.started: list[FakeChild] = []
        (top / "cmdline").write_text(line + "\n")
        (top / "sysfs").mkdir()
        (top / "keys").mkdir()
        (top / "units").mkdir()
        self.log = Log(journal=True)
        self.assembler = Assembler(
            self.log,
            Machine(
                sysfs=f"{top}/sysfs",
                keys=(f"{top}/keys",),
                units=(f"{top}/nowhere", f"{top}/units"),
                cmdline=f"{top}/cmdline",
                find=lambda name: f"/bin/{name.rpartition('/')[2]}" if tools else None,
                start=self.start,
            ),
        )

    def start(self, argv: Sequence[str]) -> FakeChild:
        self.started.append(FakeChild(argv))
        return self.started[-1]

    def look(self, *devices: Device, wanted: Wanted = PERSISTENT, now: float = 10.0) -> list[str]:
        """Look once; return what has been started by now."""
        for device in devices:
            (self.top / "sysfs" / device.path.removeprefix("/dev/") / "holders").mkdir(
                parents=True, exist_ok=True
            )
        self.assembler.look(Devices(all=devices), (wanted,), now)
        return [" ".join(child.argv) for child in self.started]

    def hold(self, device: Device) -> None:
        (self.top / "sysfs" / device.path.removeprefix("/dev/") / "holders" / "dm-0").mkdir(parents=True)

    @property
    def lines(self) -> list[str]:
        return [line.partition("] ")[2] for line in self.log.lines if "<7>" not in line]


def container(label: str = "COS_PERSISTENT", *, partlabel: str = "", disk: str = "/dev/vda") -> Device:
    return partition(5, label, LUKS, disk).replace(partlabel=partlabel)


def unlocking(device: Device) -> str:
    return f"/bin/systemd-cryptsetup attach luks-{UUID} {device.path} - luks"


@pytest.mark.parametrize(
    "locked",
    [
        container("COS_PERSISTENT"),
        container("COS_PERSISTENT_LUKS"),
        container("", partlabel="persistent"),
        container("other", partlabel="COS_PERSISTENT"),
        container(""),
    ],
)
def test_a_container_of_a_wanted_label_is_unlocked_once(tmp_path: Path, locked: Device) -> None:
    stage = Stage(tmp_path)

    stage.look(STATE, locked)
    started = stage.look(STATE, locked, now=11)

    assert started == [unlocking(locked)]
    assert stage.lines == [
        "<6> unlock '/dev/vda5' with a passphrase: it may hold a filesystem labelled 'COS_PERSISTENT'"
    ]


@pytest.mark.parametrize(
    "locked",
    [
        container("DATA"),
        container("COS_OEM"),
        container("", partlabel="data"),
        container("", disk="/dev/vdb"),
        partition(5, "COS_PERSISTENT", "ext4"),
    ],
)
def test_a_container_that_nobody_wants_stays_locked(tmp_path: Path, locked: Device) -> None:
    assert Stage(tmp_path).look(STATE, locked) == []


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (f"UUID={UUID.upper()}", True),
        ("PARTLABEL=persistent", True),
        ("PARTUUID=00000005-1111-4111-8111-111111111111", True),
        (f"/dev/mapper/luks-{UUID}", True),
        ("/dev/vda5", True),
        ("/dev/vda6", False),
        ("UUID=0", False),
        ("LABEL=DATA", False),
    ],
)
def test_a_container_can_be_named_by_every_spelling(tmp_path: Path, spec: str, named: bool) -> None:
    locked = container(partlabel="persistent")
    wanted = Wanted(spec=spec, timeout_sec=0)

    assert bool(Stage(tmp_path).look(STATE, locked, wanted=wanted)) is named


def test_the_disk_of_the_system_goes_before_a_foreign_one(tmp_path: Path) -> None:
    foreign = container(disk="/dev/vdb")

    assert Stage(tmp_path).look(STATE, container(), foreign) == [unlocking(container())]


def test_a_foreign_disk_is_asked_where_the_own_has_none(tmp_path: Path) -> None:
    foreign = container(disk="/dev/vdb")

    assert Stage(tmp_path).look(STATE, foreign) == [unlocking(foreign)]


def test_a_held_container_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.hold(container())

    assert stage.look(STATE, container()) == []


def test_a_container_that_has_left_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    stage.assembler.look(Devices(all=(STATE, container())), (PERSISTENT,), 1.0)

    assert stage.started == []


def test_a_container_with_a_unit_is_left_to_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    locked = container().replace(links=(f"/dev/disk/by-uuid/{UUID}",))
    (tmp_path / "units/systemd-cryptsetup@other.service").write_text("ExecStart=x attach 'o' '/dev/vda1' ''")
    unit = "systemd-cryptsetup@data.service"
    (tmp_path / "units" / unit).write_text(f"ExecStart=x attach 'data' '/dev/disk/by-uuid/{UUID}' '' ''\n")

    stage.look(STATE, locked)

    assert stage.look(STATE, locked) == []
    assert stage.lines == [f"<6> '/dev/vda5' is left to {unit}"]


@pytest.mark.parametrize("name", [f"luks-{UUID}.key", "COS_PERSISTENT.key"])
def test_a_key_file_is_used(tmp_path: Path, name: str) -> None:
    stage = Stage(tmp_path)
    (tmp_path / "keys" / name).write_text("secret")

    (started,) = stage.look(STATE, container())

    assert started == f"/bin/systemd-cryptsetup attach luks-{UUID} /dev/vda5 {tmp_path}/keys/{name} luks"


def test_a_label_is_no_path(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (tmp_path / "spoof.key").write_text("secret")
    wanted = Wanted(spec="LABEL=../spoof", timeout_sec=0)

    assert stage.look(STATE, container("../spoof"), wanted=wanted) == [unlocking(container())]


def header(tokens_: object, *, version: int = 2, size: int = 16384) -> bytes:
    text = json.dumps({"tokens": tokens_}).encode()
    return (
        (b"LUKS\xba\xbe" + version.to_bytes(2, "big") + size.to_bytes(8, "big")).ljust(4096, b"\0") + text
    ).ljust(size, b"\0")


def test_the_tpm_is_asked_where_the_header_says_so(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(header({"0": {"type": "systemd-tpm2"}}))
    stage = Stage(tmp_path)
    locked = container().replace(path=str(path))
    (tmp_path / "sysfs" / str(path).replace("/", "!") / "holders").mkdir(parents=True)

    stage.assembler.look(Devices(all=(STATE, locked)), (PERSISTENT,), 1.0)

    assert stage.started[0].argv[-2:] == ("-", "luks,tpm2-device=auto")
    assert "with the TPM" in stage.lines[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (header({"0": {"type": "systemd-tpm2"}, "1": {"type": "other"}}), ("systemd-tpm2", "other")),
        (header({}), ()),
        (header({"0": {"type": "systemd-tpm2"}}, version=1), ()),
        (header([]), ()),
        (header({"0": 7}), ()),
        (header({"0": {"type": "systemd-tpm2"}}, size=5 << 20), ()),
        (header({"0": {}})[:5000], ()),
        (b"LUKS\xba\xbe\x00\x02" + b"\xff" * 8 + b"[" * 100000, ()),
        (b"LUKS\xba\xbe\x00\x02" + (1 << 20).to_bytes(8, "big") + b"\0" * 4080 + b"[" * 900000, ()),
        (b"", ()),
    ],
)
def test_tokens_of_a_header(tmp_path: Path, content: bytes, expected: tuple[str, ...]) -> None:
    (tmp_path / "disk").write_bytes(content)

    assert tokens(f"{tmp_path}/disk") == expected
    assert tokens(f"{tmp_path}/nowhere") == ()


def test_one_question_at_a_time(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    other = container().replace(path="/dev/vda6", uuid="6")

    assert len(stage.look(STATE, container(), other)) == 1
    stage.started[0].result = process.Finished(status=0, output="")
    assert len(stage.look(STATE, container(), other)) == 2


def test_a_failure_is_a_warning_with_the_words_of_the_program(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.look(STATE, container())
    stage.started[0].result = process.Finished(status=1, output="Trying.\nToo many attempts; giving up.\n")

    stage.look(STATE, container())

    assert stage.lines[1:] == [
        "<4> cannot unlock '/dev/vda5' with a passphrase: it may hold a filesystem labelled"
        " 'COS_PERSISTENT': Too many attempts; giving up.",
        f"<4>   hint: boot again to try again, or type /bin/systemd-cryptsetup attach luks-{UUID} /dev/vda5",
    ]


def test_a_program_that_cannot_be_started_is_a_warning(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    def start(argv: Sequence[str]) -> process.Child:
        return process.Child([f"{tmp_path}/{argv[0]}", *argv[1:]])

    stage.assembler = Assembler(
        stage.log,
        stage.assembler._machine.replace(start=start),
    )

    stage.look(STATE, partition(5, "x", LVM))

    assert stage.lines[0].endswith("No such file or directory")
    assert stage.lines[1] == "<4>   hint: look at them: lvm vgs; lvm pvs"


def test_the_end_of_the_wait_ends_the_question(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.look(STATE, container(), partition(6, "x", MD))

    stage.assembler.close()

    assert [child.ended for child in stage.started] == [True, False]
    assert stage.lines[-1].startswith("<6> gave up to unlock '/dev/vda5'")
    assert stage.lines[-1].endswith(": Stopped.")


def test_what_has_its_answer_is_not_ended(tmp_path: Path) -> None:
    """The mapping is there a moment before systemd-cryptsetup has ended."""
    stage = Stage(tmp_path)
    stage.look(STATE, container())
    stage.hold(container())

    stage.assembler.close()

    assert not stage.started[0].ended


def test_a_stick_asks_for_no_passphrase(tmp_path: Path) -> None:
    stick = container(disk="/dev/sdb").replace(removable=True)

    assert Stage(tmp_path).look(STATE, stick) == []
    wanted = Wanted(spec=f"UUID={UUID}", timeout_sec=0)
    stage = Stage(tmp_path / "named")
    assert stage.look(STATE, stick, wanted=wanted) == [unlocking(stick)]


def test_what_configures_the_machine_is_on_its_own_disk(tmp_path: Path) -> None:
    oem = Wanted(spec="LABEL=COS_OEM", timeout_sec=10, near="LABEL=COS_STATE", home=HOME_ONLY)
    locked = container("COS_OEM", disk="/dev/vdb")

    assert Stage(tmp_path).look(STATE, locked, container(""), wanted=oem) == []


def test_the_boot_disk_is_home(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    foreign = container(disk="/dev/vdb")
    devices = (container(), foreign, STATE)
    stage.look(*devices, wanted=Wanted(spec="LABEL=none", timeout_sec=0))

    stage.assembler.look(Devices(all=devices, boot="/dev/vdb5", boot_origin=BOOTDISK), (PERSISTENT,), 11.0)

    assert [child.argv[-3] for child in stage.started] == ["/dev/vdb5"]


def test_without_the_programs_a_line_says_so_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, tools=False)
    devices = (STATE, container(), partition(6, "a", MD), partition(7, "b", LVM))

    stage.look(*devices)

    assert stage.look(*devices) == []
    assert stage.lines == [
        "<4> '/dev/vda5' (crypto_LUKS) is not looked into: this initramfs has no systemd-cryptsetup",
        "<4> '/dev/vda6' (linux_raid_member) is not looked into: this initramfs has no mdadm",
        "<4> '/dev/vda7' (LVM2_member) is not looked into: this initramfs has no lvm",
    ]


def test_the_command_line_can_switch_each_off(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "rd.luks=0 rd.lvm=no rd.md=off rd.cos.x")

    assert stage.look(STATE, container(), partition(6, "a", MD), partition(7, "b", LVM)) == []
    assert stage.lines[0] == (
        "<4> '/dev/vda5' (crypto_LUKS) is not looked into: rd.luks=0 is on the kernel command line"
    )


def test_a_switch_that_cannot_be_read_switches_nothing_off(tmp_path: Path) -> None:
    assert Stage(tmp_path, "rd.luks=perhaps rd.md").look(STATE, container()) == [unlocking(container())]


def leg(disk: str = "/dev/vdb", array: str = "a", *, removable: bool = False) -> Device:
    return partition(1, "array", MD, disk).replace(uuid=array, removable=removable)


def array(stage: Stage, *legs: Device, name: str = "md127", state: str = "inactive") -> None:
    """Make an array of members, as mdadm --incremental does."""
    (stage.top / "sysfs" / name / "md").mkdir(parents=True, exist_ok=True)
    (stage.top / "sysfs" / name / "md/array_state").write_text(f"{state}\n")
    for each in legs:
        (stage.top / "sysfs" / name / "slaves" / each.path[5:]).mkdir(parents=True)
        stage.hold(each)


def volume(disk: str = "/dev/vdb", uuid: str = "pv-b", *, removable: bool = False) -> Device:
    return partition(1, "", LVM, disk).replace(uuid=uuid, removable=removable)


def vgchange(mode: str, *names: str) -> str:
    accepted = "".join(f'"a|^/dev/{name}$|",' for name in names)
    return (
        f"/bin/lvm vgchange -aay --sysinit --activationmode {mode}"
        f' --config devices {{ use_devicesfile=0 filter=[{accepted}"r|.*|"] }}'
    )


OEM = Wanted(spec="LABEL=COS_OEM", timeout_sec=10, near="LABEL=COS_STATE", home=HOME_ONLY)
RUN = "/bin/mdadm --run /dev/md127"


@pytest.mark.parametrize("seconds", [0, 10, 40, 180])
def test_md_members_are_added_and_later_started_degraded(tmp_path: Path, seconds: int) -> None:
    stage = Stage(tmp_path)
    wanted = PERSISTENT.replace(timeout_sec=seconds)

    assert stage.look(STATE, leg(), wanted=wanted, now=10) == ["/bin/mdadm --incremental /dev/vdb1"]
    array(stage, leg())
    assert len(stage.look(STATE, leg(), wanted=wanted, now=39)) == 1
    assert stage.look(STATE, leg(), wanted=wanted, now=41)[1:] == [RUN]
    assert len(stage.look(STATE, leg(), wanted=wanted, now=100)) == 2


@pytest.mark.parametrize("fstype", [MD, LVM])
def test_what_is_removable_is_left_alone(tmp_path: Path, fstype: str) -> None:
    stage = Stage(tmp_path)
    stick = partition(1, "array", fstype, "/dev/sdb").replace(removable=True)
    array(stage, stick)  # others have made it
    (tmp_path / "sysfs/sdb1/holders/dm-0").rmdir()

    assert stage.look(STATE, stick, now=10) == []
    assert stage.look(STATE, stick, now=41) == []
    assert stage.lines == [f"<6> '/dev/sdb1' ({fstype}) is left alone: it is removable"]


def test_a_system_on_a_removable_disk_has_its_array_there(tmp_path: Path) -> None:
    stage, state = Stage(tmp_path), partition(4, "COS_STATE", disk="/dev/sdb").replace(removable=True)
    stick = leg("/dev/sdb", removable=True)
    near = PERSISTENT.replace(near="LABEL=COS_STATE")

    assert stage.look(state, stick, wanted=near) == ["/bin/mdadm --incremental /dev/sdb1"]


@pytest.mark.parametrize("member", [leg(), volume()])
def test_what_is_only_at_home_needs_nothing_foreign(tmp_path: Path, member: Device) -> None:
    stage = Stage(tmp_path)

    assert stage.look(STATE, member, wanted=OEM, now=10) == []
    array(stage, *([member] if member.fstype == MD else []))
    assert stage.look(STATE, member, wanted=OEM, now=41) == []
    assert stage.lines[0].endswith("is left alone: it is on another disk than the system")


def test_the_other_leg_of_an_array_at_home_is_no_stranger(tmp_path: Path) -> None:
    started = Stage(tmp_path).look(STATE, leg("/dev/vda"), leg("/dev/vdb"), wanted=OEM)

    assert [argv.split()[-1] for argv in started] == ["/dev/vda1", "/dev/vdb1"]


def test_an_array_is_not_started_without_a_leg_that_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    legs = leg("/dev/vda"), leg("/dev/sdb", removable=True)

    assert stage.look(STATE, *legs, now=10) == ["/bin/mdadm --incremental /dev/vda1"]
    array(stage, legs[0])
    assert len(stage.look(STATE, *legs, now=41)) == 1


def test_what_has_an_answer_needs_nothing_degraded(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    array(stage, leg())
    other = partition(5, "COS_PERSISTENT")

    stage.look(STATE, other, leg(), now=10)
    assert stage.look(STATE, other, leg(), now=41) == []


def test_nothing_foreign_is_started_degraded_while_somebody_types(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    array(stage, leg())

    stage.look(STATE, container(), leg(), now=10)
    assert stage.look(STATE, container(), leg(), now=100) == [unlocking(container())]


def test_an_array_of_somebody_else_is_not_run(tmp_path: Path) -> None:
    """Members that are no members for udev, or are not known to it at all."""
    stage = Stage(tmp_path)
    array(stage, leg(), leg("/dev/vdx"))

    stage.look(STATE, leg(), now=10)
    assert stage.look(STATE, leg(), now=41) == []


def test_an_array_at_home_is_started_before_a_foreign_one(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    own, foreign = leg("/dev/vda", "home"), leg("/dev/vdb", "foreign")
    array(stage, own)
    array(stage, foreign, name="md1")

    stage.look(STATE, own, foreign, now=10)
    assert stage.look(STATE, own, foreign, now=41) == [RUN]
    array(stage, name="md127", state="active")
    assert len(stage.look(STATE, own, foreign, now=70)) == 1
    assert stage.look(STATE, own, foreign, now=72)[1:] == ["/bin/mdadm --run /dev/md1"]


def test_of_several_foreign_arrays_none_is_started_degraded(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    strangers = leg("/dev/vdb", "b"), leg("/dev/vdc", "c")
    array(stage, strangers[0])
    array(stage, strangers[1], name="md1")

    stage.look(STATE, *strangers, now=10)
    assert stage.look(STATE, *strangers, now=41) == []
    assert stage.look(STATE, *strangers, now=42) == []
    assert stage.lines == [
        "<4> nothing is started degraded: each of these may hold what is missing: /dev/vdb1; /dev/vdc1",
        "<4>   hint: name the disk of the system by rd.cos.bootdisk=, or start the right one:"
        " mdadm --run /dev/md…; lvm vgchange -ay --activationmode degraded",
    ]


def test_the_arrays_of_one_disk_are_of_one_machine(tmp_path: Path) -> None:
    """Its other disk is dead, and nobody says which one it was booted from."""
    stage = Stage(tmp_path)
    legs = leg("/dev/vda", "state"), leg("/dev/vda", "data").replace(path="/dev/vda2")
    array(stage, legs[0])
    array(stage, legs[1], name="md1")
    state = Wanted(spec="LABEL=COS_STATE", timeout_sec=180)

    stage.look(*legs, wanted=state, now=10)
    assert sorted(stage.look(*legs, wanted=state, now=41)) == ["/bin/mdadm --run /dev/md1", RUN]


def test_an_array_that_runs_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    array(stage, leg(), state="active")

    assert stage.look(STATE, leg(), now=10) == []
    assert stage.look(STATE, leg(), now=100) == []


def test_an_array_that_leaves_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.hold(leg())
    (tmp_path / "sysfs/md127").mkdir()

    stage.look(STATE, leg(), now=10)
    assert stage.look(STATE, leg(), now=41) == []


def test_a_new_member_starts_the_patience_anew(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    legs = leg(), leg("/dev/vdc")
    array(stage, legs[0])

    stage.look(STATE, legs[0], now=10)
    assert stage.look(STATE, *legs, now=39) == ["/bin/mdadm --incremental /dev/vdc1"]
    assert len(stage.look(STATE, *legs, now=68)) == 1


def test_volume_groups_are_activated_complete_and_later_degraded(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    assert stage.look(STATE, volume(), now=10) == [vgchange("complete", "vdb1")]
    assert len(stage.look(STATE, volume(), now=41)) == 1  # the first still runs
    stage.started[0].result = process.Finished(status=0, output="")
    assert stage.look(STATE, volume(), now=42)[1:] == [vgchange("degraded", "vdb1")]
    stage.started[1].result = process.Finished(status=0, output="")
    assert len(stage.look(STATE, volume(), now=100)) == 2


def test_lvm_sees_nothing_that_is_left_alone(tmp_path: Path) -> None:
    strange = volume().replace(path='/dev/mapper/a"|b')
    stage = Stage(tmp_path)
    (stage.top / 'sysfs/mapper!a"|b/holders').mkdir(parents=True)

    assert stage.look(STATE, volume("/dev/sdb", "usb", removable=True), strange) == [
        vgchange("complete", "mapper/a..b")
    ]


def test_a_volume_group_is_not_activated_without_a_member_that_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (tmp_path / "vda1").write_bytes(b"LABELONE".ljust(8192, b"\0") + b'pv1 { id = "usb-1" }')
    own = volume().replace(path=f"{tmp_path}/vda1", disks=("/dev/vda",))
    (tmp_path / "sysfs" / own.path.replace("/", "!") / "holders").mkdir(parents=True)
    other = volume("/dev/sdb", "usb-1", removable=True)
    (tmp_path / "sysfs/sdb1/holders").mkdir(parents=True)
    devices = Devices(all=(STATE, own, other))

    stage.assembler.look(devices, (PERSISTENT,), 10.0)
    stage.started[0].result = process.Finished(status=0, output="")
    stage.assembler.look(devices, (PERSISTENT,), 41.0)

    assert [child.argv[5] for child in stage.started] == ["complete"]
