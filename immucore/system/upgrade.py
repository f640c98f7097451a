"""`immucore upgrade`: a new image beside those that are there, checked, and put in place in one step.

Until that step nothing has changed for the next boot, and whatever goes wrong is taken back.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from immucore.bootcount import ACTIVE, BAD, PASSIVE, RECOVERY
from immucore.errors import ImmucoreError
from immucore.system import boot_state, booted, hooks, images, slots, sources, state_file, steps, stopping
from immucore.system.environment import Environment
from immucore.system.errors import ImageError, UnreadableError, told
from immucore.system.making import Making, fstype_of
from immucore.system.oci import Options
from immucore.system.state_file import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from immucore.system.booted import Booted
    from immucore.system.console import Console
    from immucore.system.image_commands import Wishes
    from immucore.system.programs import Advance
    from immucore.system.steps import Step


class Upgrade:
    """One upgrade of a machine."""

    def __init__(self, console: Console, here: Booted, wishes: Wishes) -> None:
        self._console, self._here, self._wishes = console, here, wishes
        registry = Options(authfile=wishes.authfile, cert_dir=wishes.cert_dir, tls_verify=wishes.tls_verify)
        self._source = sources.parse(wishes.source, registry)
        if wishes.fstype:
            images.check_fstype(wishes.fstype)
        self._environment = Environment(here.environment)
        self._slot = RECOVERY if wishes.recovery else ACTIVE
        self._running = here.running(booted.MODES[self._slot])
        self._steps: tuple[Step, ...] = (
            ("looking at what is there", self._look),
            ("removing what earlier work has left", self._clean),
            ("looking at the source, and for room", self._measure),
            (f"hooks of {hooks.BEFORE}", self._hooks_before),
            (f"unpacking {wishes.source}", self._unpack),
            (f"hooks of {hooks.CHROOT}", self._hooks_in_tree),
            ("building the image", self._build),
            ("verifying the image", self._verify),
            (f"hooks of {hooks.AFTER}", self._hooks_after),
            ("arming the boot counting", self._arm),
            (f"putting the image in its place: {self._slot}", self._commit),
            (f"writing {state_file.NAME}", self._record),
        )
        self._armed = self._committed = False
        self._outcome: tuple[str, dict[str, Any]] = "", {}

    def run(self) -> bool:
        """Do it; False where there was nothing to be done. Raises ImmucoreError."""
        device = self._here.partition(booted.MODES[self._slot])
        try:
            with booted.writable(device, "images") as self._top:
                self._place = os.path.join(self._top, slots.DIRECTORY, slots.FILES[self._slot])
                self._making = Making(
                    os.path.dirname(self._place), self._source, fstype_of(self._place, self._wishes.fstype)
                )
                with self._taken_back():
                    steps.run(self._console, self._steps)
        except OSError as error:
            if not self._committed:
                raise ImageError(f"cannot upgrade: {told(error)}; nothing was changed") from None
            self._console.say(f"warning: {told(error)}")
        except ImmucoreError as error:
            if not self._committed:
                raise
            self._console.say(f"warning: {error.message}")
        text, fields = self._outcome
        self._console.result(text, **fields)
        return self._committed

    @contextlib.contextmanager
    def _taken_back(self) -> Iterator[None]:
        """Leave nothing of the work behind, and nothing at all of one that has not come to its end."""
        try:
            yield
        finally:
            stopping.hold()
            steps.attempt(self._console, lambda: slots.clean(self._making.directory, self._running))
            if self._armed and not self._committed:
                steps.attempt(self._console, lambda: slots.disarm(self._environment, self._making.image_id))

    def _look(self, _: Advance) -> bool:
        self._known = state_file.read(self._top if self._slot == ACTIVE else booted.HOLDER)
        bad = slots.judged_bad(self._environment.read())
        self._failed = tuple(dict.fromkeys((*self._known.failed, *sorted(bad))))  # the oldest first
        self._there = None
        with contextlib.suppress(UnreadableError):  # all the more it has to be replaced
            self._there = images.identity(self._place) if slots.whole(self._place) else None
        if self._slot == ACTIVE and slots.after_fallback(self._survey(), boot_state.read())[ACTIVE].given_up:
            self._there = None  # it is what its identity says, and is not in order
        if self._slot == RECOVERY and not self._wishes.force:
            self._keep_a_way_out()
        return True

    def _keep_a_way_out(self) -> None:
        """Refuse to replace the one system that is known to work."""
        with booted.readable(self._here.partition(booted.STATE), "state") as top:
            found = slots.survey(f"{top}/{slots.DIRECTORY}", self._environment.read(), 0)
        found = slots.after_fallback(found, boot_state.read())
        if not any(slot.whole and slot.state != BAD for slot in found.values()):
            raise ImageError(
                "cannot upgrade recovery: it is all there is, neither active nor passive can be booted",
                hint="first: immucore upgrade SOURCE; or give --force",
            )

    def _clean(self, _: Advance) -> bool:
        os.makedirs(self._making.directory, exist_ok=True)
        slots.clean(self._making.directory, self._running)
        return True

    def _measure(self, _: Advance) -> bool:
        self._making.measure()
        known = self._known.of_digest(self._source.digest)
        return not known or self._is_wanted(slots.digest_of(known.image_id))

    def _is_wanted(self, content: str) -> bool:
        """Tell whether this is to be installed: False where it is there. Raises ImageError."""
        if self._wishes.force:
            return True
        if content == slots.digest_of(self._there) and content not in self._failed:
            text = f"nothing to be done: {self._slot} ({self._there}) holds what {self._source.text} does"
            self._outcome = text, {"upgraded": False, "slot": self._slot, "image_id": self._there}
            return False
        if content in self._failed:
            raise ImageError(
                f"cannot install {self._source.text}: this machine has judged it bad ({content})",
                hint="name another source; to try it once more: --force",
            )
        return True

    def _hooks_before(self, _: Advance) -> bool:
        hooks.run(hooks.BEFORE, self._here.root, self._told_to_hooks())
        return True

    def _unpack(self, advance: Advance) -> bool:
        self._making.unpack(advance)
        return self._is_wanted(self._making.content)

    def _hooks_in_tree(self, _: Advance) -> bool:
        hooks.run_in(self._making.tree, hooks.CHROOT, self._here.root, self._told_to_hooks())
        return True

    def _build(self, advance: Advance) -> bool:
        self._making.build(slots.LABELS[self._slot], advance)
        return True

    def _verify(self, advance: Advance) -> bool:
        self._making.verify(advance)
        return True

    def _hooks_after(self, _: Advance) -> bool:
        hooks.run(
            hooks.AFTER, self._here.root, {**self._told_to_hooks(), "IMMUCORE_IMAGE": self._making.image}
        )
        return True

    def _told_to_hooks(self) -> dict[str, str]:
        return {"IMMUCORE_SLOT": self._slot, "IMMUCORE_SOURCE": self._source.text}

    def _arm(self, _: Advance) -> bool:
        """Store the tries of the new image first: a power cut between the two leaves one that nobody has."""
        stopping.point()
        stopping.hold()
        if self._slot == ACTIVE:
            found = slots.after_fallback(self._survey(), boot_state.read())
            self._kept = found[slots.kept(found[ACTIVE], found[PASSIVE])]
            self._found = found
            self._armed = True
            slots.arm(self._environment, self._making.image_id)
        return True

    def _commit(self, _: Advance) -> bool:
        if self._slot == RECOVERY:
            slots.replace(self._making.directory, RECOVERY)
        else:
            known, moves = self._environment.read(), [(self._kept, PASSIVE)]
            with slots.moving(self._environment, self._found.values()):
                slots.carry(self._environment, moves if self._kept.name == ACTIVE else [], known)
                slots.commit(self._making.directory, self._kept.name)
        self._committed = True
        steps.attempt(self._console, lambda: slots.settle(self._making.directory))
        return True

    def _survey(self) -> dict[str, slots.Slot]:
        return slots.survey(self._making.directory, self._environment.read(), self._running)

    def _record(self, _: Advance) -> bool:
        """Write down what was done; whatever comes of that, it is done."""
        making = self._making
        made = Entry(
            image_id=making.image_id,
            source=self._source.text,
            digest=self._source.digest,
            label=slots.LABELS[self._slot],
            fs=making.fstype,
            date=state_file.now(),
            action="upgrade",
        )
        if self._slot == ACTIVE:
            self._known.record(PASSIVE, self._known.entry_of(self._kept.image_id))
        self._known.record(self._slot, made)
        self._known.failed = [each for each in self._failed if each != making.content]
        booted.record(self._console, self._here, self._top, booted.MODES[self._slot], self._known)
        if self._slot == ACTIVE:
            steps.attempt(self._console, lambda: slots.forget(self._environment, self._survey().values()))
        text = f"{self._slot} is {making.image_id} now, made of {self._source.text}"
        fields = {"upgraded": True, "slot": self._slot, **dict(made.items())}
        if self._slot == ACTIVE:
            new = slots.Slot(name=ACTIVE, whole=True, image_id=making.image_id)
            fields["next"], told_next = slots.next_boot(self._environment.read(), new, self._kept)
            text = f"{text}; {told_next}"
        self._outcome = text, fields
        return True
