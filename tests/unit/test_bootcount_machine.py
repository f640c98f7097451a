"""Boot counting as a machine: whatever happens to it, it ends in a system that runs, and keeps a good image.

Power fails at every instant, also between the steps of an upgrade; images are broken from the start, or are
damaged later. The boot loader does what bootcount.boot() says; vm-tests/test_grub.py compares it with GRUB.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from immucore import bootcount, grubenv
from immucore.bootcount import ACTIVE, BAD, COUNTED, GOOD, PASSIVE, RECOVERY
from immucore.system import slots

HEALTHY, FAILING, UNLOADABLE = "healthy", "failing", "unloadable"  # what an image really is
BOOTS = 12  # of a machine that is left alone until it runs
ENTRIES = st.sampled_from(["", "active", "cos", "passive", "fallback", "recovery"])
ARMED, DOUBLED, COMMITTED, DONE = range(
    1, 5
)  # the steps of an upgrade, after each of which the power may fail


class Disk:
    """What outlasts a power failure: the environment block, the images in the slots, a recovery system."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.lost = False  # the environment block: GRUB cannot read or write it
        self.slots: dict[str, str | None] = {ACTIVE: None, PASSIVE: None}
        self.images: dict[str, str] = {}
        self.recovery = True

    def copy(self) -> Disk:
        copied = Disk()
        copied.values, copied.lost, copied.recovery = dict(self.values), self.lost, self.recovery
        copied.slots, copied.images = dict(self.slots), dict(self.images)
        return copied

    def count(self, slot: str) -> bootcount.Count:
        image_id = self.slots[slot]
        assert image_id
        return bootcount.read(self.values, image_id)

    def is_healthy(self, slot: str | None) -> bool:
        return self.recovery if slot == RECOVERY else bool(slot) and self.images[self.slots[slot]] == HEALTHY

    def is_whole(self) -> bool:
        """There is something that this machine could run."""
        return self.recovery or any(self.is_healthy(slot) for slot in COUNTED if self.slots[slot])

    def proven(self) -> set[str]:
        """Those images that are healthy, were judged good, and can be booted."""
        there = [slot for slot in COUNTED if self.slots[slot]]
        found = [slot for slot in there if self.count(slot).state == GOOD and self.is_healthy(slot)]
        return {image_id for slot in found if (image_id := self.slots[slot])}

    def start(self) -> str | None:
        """Switch the machine on: the boot loader starts a slot, which takes a try."""
        broken = [slot for slot in COUNTED if self.images.get(self.slots[slot] or "") == UNLOADABLE]
        broken += [] if self.recovery else [RECOVERY]
        values = {} if self.lost else self.values
        slot, after = bootcount.boot(values, self.slots[ACTIVE], self.slots[PASSIVE], broken)
        if not self.lost:
            self.values = after
        return slot

    def write(self, values: dict[str, str]) -> None:
        """Store variables as the booted system does: what is lost is made anew."""
        self.values, self.lost = values, False

    def came_up(self, slot: str, *, verdict: bool) -> None:
        """Do what the booted system does: repair the block, forget old images, judge the one that runs."""
        self.write(bootcount.forgotten(self.values, [each for each in self.slots.values() if each]))
        if verdict and slot != RECOVERY:
            self.write(bootcount.written(self.values, bootcount.verdict(self.count(slot))))

    def left_alone(self) -> str | None:
        """Boot until the machine runs: the slot, or None where that does not come to an end."""
        for _ in range(BOOTS):
            slot = self.start()
            if self.is_healthy(slot):
                return slot
        return None


class Machine(RuleBasedStateMachine):
    """A machine that is switched on and off, upgraded and damaged."""

    @initialize(active=st.sampled_from([HEALTHY, FAILING]))
    def install(self, active: str) -> None:
        self.disk = Disk()
        self.running: str | None = None  # the slot that was booted
        self.image: str | None = None  # and its image, which an upgrade puts into the other slot
        self.number = 0
        for slot in COUNTED:
            self.disk.slots[slot] = self.make(active)

    def make(self, nature: str) -> str:
        self.number += 1
        image_id = f"{self.number:016x}_00000000"
        self.disk.images[image_id] = nature
        return image_id

    @rule(verdict=st.booleans())
    def power_on(self, verdict: bool) -> None:
        slot = self.disk.start()
        self.running = slot if self.disk.is_healthy(slot) else None
        self.image = self.disk.slots.get(self.running or "")
        if self.running:
            self.disk.came_up(self.running, verdict=verdict)

    @rule()
    def power_fails_while_it_boots(self) -> None:
        self.disk.start()
        self.running = None

    @precondition(lambda self: self.running)
    @rule()
    def health_is_bad(self) -> None:
        """Whoever condemns images needs recovery, or another one that runs."""
        if not (self.image and (self.disk.recovery or self.disk.proven() - {self.image})):
            return
        condemned = bootcount.condemned(bootcount.read(self.disk.values, self.image))
        self.disk.write(bootcount.written(self.disk.values, condemned))
        self.running = None

    @precondition(lambda self: self.running)
    @rule(entry=ENTRIES, variable=st.sampled_from(["next_entry", "saved_entry"]))
    def choose_an_entry(self, entry: str, variable: str) -> None:
        self.disk.write({**self.disk.values, variable: entry})

    @precondition(lambda self: self.running)
    @rule(nature=st.sampled_from([HEALTHY, FAILING, UNLOADABLE]), until=st.sampled_from(range(1, 5)))
    def upgrade(self, nature: str, until: int) -> None:
        """Install a new image, and let the power fail after some step.

        A system that is bad and runs all the same, because not even recovery does, waits for its verdict.
        """
        disk, proven = self.disk, self.disk.proven()
        if not disk.recovery and self.image and bootcount.read(disk.values, self.image).state == BAD:
            return
        new = self.make(nature)
        disk.write(bootcount.written(disk.values, bootcount.armed(new)))
        if until >= DOUBLED and self.kept() == ACTIVE:
            disk.slots[PASSIVE] = disk.slots[ACTIVE]
        if until >= COMMITTED:
            disk.slots[ACTIVE] = new
        if until >= DONE:
            disk.write(bootcount.forgotten(disk.values, [each for each in disk.slots.values() if each]))
        else:
            self.running = None
        assert proven & disk.proven() or not proven

    def kept(self) -> str:
        """Say which image an upgrade keeps."""

        def slot(name: str) -> slots.Slot:
            image_id = self.disk.slots[name]
            if not image_id:
                return slots.Slot(name=name)
            state = self.disk.count(name).state
            running = image_id == self.image
            return slots.Slot(name=name, whole=True, image_id=image_id, state=state, running=running)

        return slots.kept(slot(ACTIVE), slot(PASSIVE))

    @rule(slot=st.sampled_from([*COUNTED, RECOVERY]), how=st.sampled_from([FAILING, UNLOADABLE, ""]))
    def something_breaks(self, slot: str, how: str) -> None:
        """An image is damaged or removed; one thing that runs is left, or nobody could help."""
        damaged = self.disk.copy()
        if slot == RECOVERY:
            damaged.recovery = False
        elif how and (image_id := damaged.slots[slot]):
            damaged.images[image_id] = how
        else:
            damaged.slots[slot] = None
        if damaged.is_whole() and not damaged.lost:
            self.disk, self.running = damaged, None

    @rule()
    def environment_is_lost(self) -> None:
        """Nothing can be counted then: what comes first without counts has to be sound."""
        lost = self.disk.copy()
        lost.lost, lost.values = True, {}
        if lost.copy().left_alone():
            self.disk = lost

    @invariant()
    def it_ends_in_a_system_that_runs(self) -> None:
        assert self.disk.copy().left_alone()

    @invariant()
    def the_environment_has_room(self) -> None:
        grubenv.render({**self.disk.values, "extra_cmdline": "x" * 700})


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
