"""`immucore rollback`: passive becomes active, and active passive, in one step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from immucore.bootcount import ACTIVE, BAD, PASSIVE
from immucore.system import boot_state, booted, slots, state_file, steps, stopping
from immucore.system.environment import Environment
from immucore.system.errors import ImageError, told

if TYPE_CHECKING:
    from immucore.system.booted import Booted
    from immucore.system.console import Console


def rollback(console: Console, here: Booted, *, force: bool) -> None:
    """Have the next boot boot passive, as active. `force`: also where that was judged bad.

    Raises ImmucoreError.
    """
    environment = Environment(here.environment)
    try:
        with booted.writable(here.partition(booted.STATE), "images") as top:
            directory = os.path.join(top, slots.DIRECTORY)
            found = slots.survey(directory, environment.read(), here.running(booted.STATE))
            found = slots.after_fallback(found, boot_state.read())
            _refuse(found[PASSIVE], force=force)
            stopping.point()
            stopping.hold()
            image_id = found[PASSIVE].image_id
            with slots.moving(environment, found.values()):
                if found[PASSIVE].state == BAD:
                    slots.arm(environment, found[PASSIVE].counted_as)
                moves, known = ((found[ACTIVE], PASSIVE), (found[PASSIVE], ACTIVE)), environment.read()
                slots.carry(environment, moves, known, either=True)
                slots.swap(directory)
            steps.attempt(console, lambda: slots.carry(environment, moves, known))
            steps.attempt(console, lambda: slots.settle(directory))
            state = state_file.read(top)
            entries = {slot: state.entry_of(found[slot].image_id) for slot in (ACTIVE, PASSIVE)}
            state.record(ACTIVE, entries[PASSIVE])
            state.record(PASSIVE, entries[ACTIVE])
            booted.record(console, here, top, booted.STATE, state)
            steps.attempt(console, lambda: slots.forget(environment, slots.survey(directory, {}).values()))
            now = slots.survey(directory, environment.read())
    except OSError as error:
        raise ImageError(f"cannot roll back: {told(error)}") from None
    upcoming, told_next = slots.next_boot(environment.read(), now[ACTIVE], now[PASSIVE])
    text = f"active is {image_id} now, which was passive; {told_next}"
    console.result(text, image_id=image_id, next=upcoming)


def _refuse(passive: slots.Slot, *, force: bool) -> None:
    if not passive.whole:
        raise ImageError("cannot roll back: there is no whole passive.img", hint="immucore upgrade SOURCE")
    if passive.problem:
        raise ImageError(f"cannot roll back: {passive.problem}", hint="immucore upgrade SOURCE")
    if passive.state == BAD and not force:
        why = "could not be booted" if passive.given_up else "was judged bad"
        raise ImageError(
            f"cannot roll back: passive ({passive.image_id}) {why}",
            hint="immucore upgrade SOURCE; to boot it once more: --force",
        )
