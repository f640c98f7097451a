"""The boot menu in real GRUB: which slot it boots, with which command line, and what it counts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from grub import Computer, Image

from immucore import bootcount, grubenv
from immucore.bootcount import ACTIVE, PASSIVE, RECOVERY
from immucore.system import bootloader

A = Image("A", "0123456789abcdef_00000001")
B = Image("B", "0123456789abcdef_00000002")
R = Image("R")
ZEROS = bytes(grubenv.SIZE_BYTES)
AT_ONCE = {"grubcustom": "set timeout=0\n"}
PLACES = {
    ACTIVE: "root=LABEL=COS_STATE cos-img/filename=/cOS/active.img",
    PASSIVE: "root=LABEL=COS_STATE cos-img/filename=/cOS/passive.img",
    RECOVERY: "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.img",
}
COUNTING = "panic=10 rd.cos.onfail=reboot:10"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where boot loader and images are made, once for all tests."""
    return tmp_path_factory.mktemp("grub")


@pytest.fixture
def computer(directory: Path) -> Callable[..., Computer]:
    """Return what makes a computer with three good images and an empty environment block."""

    def make(values: Mapping[str, str] | None = None, **changes: Any) -> Computer:
        whole = {"active": A, "passive": B, "recovery": R, "oem": AT_ONCE}
        return Computer(directory, **{**whole, "block": grubenv.render(dict(values or {})), **changes})

    return make


def booted(computer: Computer, keys: str = "") -> tuple[str, str]:
    """Boot; return the slot and the rest of the command line."""
    started = computer.boot(keys)
    assert started is not None, computer.console
    words = started.cmdline.removeprefix("BOOT_IMAGE=(loop0)/boot/vmlinuz quiet ")
    slot = next(slot for slot, place in PLACES.items() if words.startswith(place))
    image = {ACTIVE: computer.active, PASSIVE: computer.passive, RECOVERY: computer.recovery}[slot]
    assert image is not None
    assert started.initramfs == f"initramfs of {image.name}"
    return slot, words.removeprefix(PLACES[slot]).strip()


def values(computer: Computer) -> dict[str, str]:
    return grubenv.parse(computer.block or b"")


def tries(*left: tuple[Image, int]) -> dict[str, str]:
    return {f"tries_{image.image_id}": str(number) for image, number in left}


class Model:
    """What bootcount says of the same machine: predicts a boot, and does what the booted system would do."""

    def __init__(self, computer: Computer) -> None:
        self.computer = computer
        self.booted = ACTIVE
        self.made = 2

    def count(self, slot: str) -> bootcount.Count | None:
        """Return what is known of the image of a slot; None where it has none, or it is recovery's."""
        image = {ACTIVE: self.computer.active, PASSIVE: self.computer.passive}.get(slot)
        return bootcount.read(values(self.computer), image.image_id) if image else None

    def predict(self) -> tuple[str | None, str, dict[str, str]]:
        """Return the slot, what is added to its command line, and the environment after that."""
        before = values(self.computer)
        images = [
            image.image_id if image else None for image in (self.computer.active, self.computer.passive)
        ]
        broken = [] if self.computer.recovery else [RECOVERY]
        slot, after = bootcount.boot(before, *images, broken)
        if once := bootcount.ENTRIES.get(before.get("next_entry", "")):
            assert slot == once
            return slot, "", after
        if self.computer.block == ZEROS:
            after = {}
        wanted = bootcount.wanted(before.get("saved_entry", ""))
        words = [COUNTING] if after and slot in bootcount.COUNTED else []
        return slot, " ".join([*words, *([f"upgrade_failure={wanted}"] if slot != wanted else [])]), after

    def do(self, event: str) -> None:
        """Let something happen; a boot is compared with what was predicted."""
        what, _, argument = event.partition(" ")
        if what == "boot":
            slot, words, after = self.predict()
            assert booted(self.computer) == (slot, words)
            assert values(self.computer) == after
            self.booted = slot
        elif what == "zero":
            self.computer.block = ZEROS
        elif what == "lose":
            setattr(self.computer, argument, None)
        elif what == "upgrade":
            self.upgrade()
        else:
            self.store(what, argument)

    def store(self, what: str, argument: str) -> None:
        """Write what the booted system writes; it repairs the block."""
        after = values(self.computer)
        if what in ("good", "bad"):
            if (count := self.count(self.booted)) is not None:
                change = bootcount.verdict if what == "good" else bootcount.condemned
                after = bootcount.written(after, change(count))
        else:
            after[{"next": "next_entry", "save": "saved_entry"}[what]] = argument
        self.computer.block = grubenv.render(after)

    def upgrade(self) -> None:
        """Install a new image in active; what was there is passive, if it was that which has booted."""
        self.made += 1
        new = Image("N", f"0123456789abcdef_{self.made:08}")
        if self.booted == ACTIVE:
            self.computer.passive = self.computer.active
        self.computer.active = new
        kept = [each.image_id for each in (self.computer.active, self.computer.passive) if each]
        after = bootcount.written(values(self.computer), bootcount.armed(new.image_id))
        self.computer.block = grubenv.render(bootcount.forgotten(after, kept))


SEQUENCES = {
    "every slot fails": ["boot"] * 8,
    "a good image fails too": ["boot", "good", "boot", "boot", "boot", "boot", "good", "boot"],
    "an upgrade that fails": [
        "boot",
        "good",
        "upgrade",
        "boot",
        "boot",
        "boot",
        "boot",
        "good",
        "boot",
        "boot",
    ],
    "the upgrade after that": ["bad", "boot", "good", "upgrade", "boot", "good", "boot"],
    "a verdict that it is bad": ["boot", "bad", "boot", "bad", "boot"],
    "once": ["boot", "good", "next recovery", "boot", "boot", "next fallback", "boot", "boot"],
    "once a bad one": ["boot", "bad", "next cos", "boot", "boot", "next active", "boot", "good", "boot"],
    "for good": [
        "save fallback",
        "boot",
        "boot",
        "boot",
        "boot",
        "save recovery",
        "boot",
        "save cos",
        "boot",
    ],
    "an empty entry": ["save ", "next ", "boot"],
    "a block of zeros": ["boot", "zero", "boot", "good", "boot", "zero", "boot", "boot"],
    "no active": ["lose active", "boot", "good", "boot", "boot", "boot", "boot"],
    "no recovery": ["lose recovery", *["boot"] * 9, "good", "boot"],
    "no slot": ["lose active", "lose passive", "boot", "save passive", "boot"],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_menu_does_what_bootcount_says(computer: Callable[..., Computer], name: str) -> None:
    model = Model(computer())
    for event in SEQUENCES[name]:
        model.do(event)


@pytest.mark.parametrize("seed", range(2))
def test_the_menu_does_so_whatever_happens(computer: Callable[..., Computer], seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test that can be repeated
    model = Model(computer())
    for event in events(chance):
        model.do(event)


def events(chance: random.Random) -> Iterator[str]:
    others = ["good", "bad", "upgrade", "zero", "save active", "save fallback", "save recovery", "save "]
    for _ in range(8):
        yield "boot"
        if chance.random() < 0.6:
            yield chance.choice([*others, "next cos", "next passive", "next recovery"])


@pytest.mark.parametrize(
    "broken",
    [
        {"without": ("boot/vmlinuz",)},
        {"without": ("boot/initrd",)},
        {"without": ("etc/cos/bootargs.cfg",)},
        {"zeroed": True},
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_passed_over(
    computer: Callable[..., Computer], broken: dict[str, Any]
) -> None:
    machine = computer(active=dataclasses.replace(A, **broken))
    assert booted(machine) == (PASSIVE, f"{COUNTING} upgrade_failure=active")
    machine.passive = dataclasses.replace(B, **broken)
    assert booted(machine) == (RECOVERY, "upgrade_failure=active")


def test_a_slot_that_cannot_be_loaded_has_lost_a_try(computer: Callable[..., Computer]) -> None:
    machine = computer(active=dataclasses.replace(A, without=("boot/vmlinuz",)))
    booted(machine)
    assert values(machine) == tries((A, 2), (B, 2))


def test_a_bad_slot_is_not_what_is_fallen_back_to(computer: Callable[..., Computer]) -> None:
    machine = computer(tries((B, 0)), active=dataclasses.replace(A, without=("boot/vmlinuz",)))
    assert booted(machine) == (RECOVERY, "upgrade_failure=active")


@pytest.mark.parametrize("recovery", [None, dataclasses.replace(R, zeroed=True)], ids=["none", "zeroed"])
def test_a_bad_slot_is_booted_when_nothing_else_is_left(
    computer: Callable[..., Computer], recovery: Image | None
) -> None:
    machine = computer(tries((A, 0), (B, 0)), recovery=recovery)
    assert booted(machine) == (ACTIVE, COUNTING)
    assert values(machine) == {**tries((A, 0), (B, 0)), "last_resort": "active"}
    assert booted(machine) == (PASSIVE, f"{COUNTING} upgrade_failure=active")
    assert values(machine) == {**tries((A, 0), (B, 0)), "last_resort": "passive"}


def test_without_any_image_the_menu_stays(computer: Callable[..., Computer]) -> None:
    machine = computer(active=None, passive=None, recovery=None)
    assert machine.boot(limit_s=30) is None
    assert "Linux (no image)" in machine.console


@pytest.mark.parametrize("without", [(), ("oem",)], ids=["missing", "no-oem"])
def test_without_an_environment_block_nothing_is_counted(
    computer: Callable[..., Computer], without: tuple[str, ...]
) -> None:
    machine = computer(block=None, without=without)
    assert booted(machine) == (ACTIVE, "")
    machine.active = None
    assert booted(machine) == (PASSIVE, "upgrade_failure=active")
    machine.passive = None
    assert booted(machine) == (RECOVERY, "upgrade_failure=active")


def test_an_entry_that_is_chosen_once_and_cannot_be_loaded(computer: Callable[..., Computer]) -> None:
    machine = computer({"next_entry": "passive"}, passive=dataclasses.replace(B, without=("boot/initrd",)))
    assert booted(machine) == (ACTIVE, f"{COUNTING} upgrade_failure=passive")
    assert values(machine) == tries((A, 2))


def test_by_hand_a_bad_slot_can_be_booted(computer: Callable[..., Computer]) -> None:
    machine = computer(tries((A, 0)), oem={})
    assert booted(machine, keys="\x1b[A\r") == (ACTIVE, COUNTING)  # the cursor is on passive: up, enter
    assert "*Linux fallback" in machine.console
    assert " Linux (bad)" in machine.console


def test_arguments_of_image_and_environment(computer: Callable[..., Computer]) -> None:
    machine = computer({"extra_cmdline": "a b=c", "extra_active_cmdline": "d", "extra_passive_cmdline": "e"})
    assert booted(machine) == (ACTIVE, f"{COUNTING} a b=c d")
    machine.active = None
    assert booted(machine) == (PASSIVE, f"{COUNTING} upgrade_failure=active a b=c e")


COS_TOOLKIT = (
    "root=LABEL=$label cos-img/filename=$img state=$state_label oem=$oem_label recovery=$recovery_label"
    " persistent=$persistent_label live=$recoverylabel loop=$loopdev mode=$mode own=$of_the_derivative"
)


def test_an_image_that_says_its_root_itself(computer: Callable[..., Computer]) -> None:
    machine = computer(
        {"of_the_derivative": "yes"}, active=dataclasses.replace(A, kernelcmd=f"quiet {COS_TOOLKIT}")
    )
    common = "oem=COS_OEM recovery=COS_RECOVERY persistent=COS_PERSISTENT"
    assert booted(machine) == (
        ACTIVE,
        f"state=COS_STATE {common} live= loop=loop0 mode=active own=yes {COUNTING}",
    )


def test_recovery_as_the_oldest_derivatives_have_it(computer: Callable[..., Computer]) -> None:
    image = Image("R", fstype="squashfs", kernelcmd="root=live:LABEL=$recoverylabel rd.live.squashimg=$img")
    machine = computer({"saved_entry": "recovery"}, recovery=image, recovery_name="recovery.squashfs")
    started = machine.boot()
    assert started is not None
    assert started.cmdline.endswith("root=live:LABEL=COS_RECOVERY rd.live.squashimg=/cOS/recovery.squashfs")


def test_squashfs_in_every_slot(computer: Callable[..., Computer]) -> None:
    slots = {ACTIVE: A, PASSIVE: B, RECOVERY: R}
    machine = computer(
        **{slot: dataclasses.replace(image, fstype="squashfs") for slot, image in slots.items()}
    )
    for _ in range(3):
        assert booted(machine) == (ACTIVE, COUNTING)
    assert booted(machine) == (PASSIVE, f"{COUNTING} upgrade_failure=active")
    machine.passive = None
    assert booted(machine) == (RECOVERY, "upgrade_failure=active")


@pytest.mark.parametrize("image_id", ["", '$(x)"; halt', "active"])
def test_an_image_without_an_id_is_counted_by_its_slot(
    computer: Callable[..., Computer], image_id: str
) -> None:
    machine = computer(active=dataclasses.replace(A, image_id=image_id))
    for left in (2, 1, 0):
        assert booted(machine) == (ACTIVE, COUNTING)
        assert values(machine) == {"tries_active": str(left)}
    assert booted(machine)[0] == PASSIVE


@pytest.mark.parametrize(("said", "shown"), [("2", "2s"), ("", "5s"), ("-1", "5s"), ("99999999999", "5s")])
def test_how_long_the_menu_waits(computer: Callable[..., Computer], said: str, shown: str) -> None:
    machine = computer({"timeout": said} if said else None, oem={})
    assert booted(machine) == (ACTIVE, COUNTING)
    assert f"automatically in {shown}" in machine.console


def test_labels_of_the_environment_override(computer: Callable[..., Computer]) -> None:
    machine = computer({"state_label": "COS_RECOVERY", "default_menu_entry": "Our system"}, oem={})
    started = machine.boot()
    assert started is not None
    assert started.initramfs == "initramfs of R"  # there is no slot in that partition
    assert "*Our system recovery" in machine.console


def test_lines_of_the_derivative_come_last(computer: Callable[..., Computer]) -> None:
    entry = 'menuentry own --id own { start passive "$state" X /cOS/passive.img }'
    machine = computer(oem={"grubcustom": f"set timeout=0\nset default=own\n{entry}\n"})
    started = machine.boot()
    assert started is not None
    assert f"root=LABEL=X cos-img/filename=/cOS/passive.img {COUNTING}" in started.cmdline


@pytest.mark.parametrize("platform", bootloader.PACKAGES)
@pytest.mark.parametrize("without", [(), ("oem",)], ids=["own", "no-own"])
def test_another_disk_configures_nothing(
    computer: Callable[..., Computer], platform: str, without: tuple[str, ...]
) -> None:
    settings = grubenv.render({"saved_entry": "recovery", "extra_cmdline": "init=/bin/sh"}).decode()
    stick = {"grubenv": settings, "grubcustom": "set timeout=0\nset default=passive\n"}
    machine = computer(stick=stick, platform=platform, without=without)
    assert booted(machine) == (ACTIVE, "" if without else COUNTING)


def test_slots_with_efi(computer: Callable[..., Computer]) -> None:
    machine = computer(tries((A, 1)), platform="x86_64-efi")
    assert booted(machine) == (ACTIVE, COUNTING)
    assert booted(machine) == (PASSIVE, f"{COUNTING} upgrade_failure=active")
    assert values(machine) == tries((A, 0), (B, 2))


def test_no_initramfs_with_efi(computer: Callable[..., Computer]) -> None:
    broken = dataclasses.replace(A, without=("boot/initrd",))
    machine = computer(active=broken, platform="x86_64-efi")
    assert booted(machine) == (PASSIVE, f"{COUNTING} upgrade_failure=active")
