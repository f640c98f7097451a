"""`immucore boot status`: what is in the slots, what becomes of it, and what this boot is."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from immucore import bootcount, process, report, syscalls
from immucore.bootcount import ACTIVE, BAD, COUNTED, PASSIVE, RECOVERY
from immucore.errors import ImmucoreError
from immucore.log import printable
from immucore.system import boot_state, booted, health_notice, images, slots, state_file
from immucore.system.boot_state import MISSING
from immucore.system.errors import ImageError, UnreadableError, told
from immucore.values import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from immucore.bootcount import Count
    from immucore.system.boot_state import BootState
    from immucore.system.booted import Booted
    from immucore.system.state_file import Entry

FELL_BACK = 5  # the exit status: this is not what was to be booted, or a slot is bad
_BLKID = ("blkid", "--probe", "--output", "value", "--match-tag", "LABEL")
_BLKID_SEC = 30.0


class Image(Record):
    """What a slot holds."""

    slot: str
    path: str = ""  # of the file in its partition; empty: there is none, or it is not whole
    image_id: str | None = None
    label: str = ""
    count: Count | None = None  # None in recovery, which is not counted, and where there is no image
    running: bool = False
    entry: Entry | None = None  # where it has come from
    problem: str = ""  # why nobody can tell which image it is

    @property
    def state(self) -> str:
        """Good, trying, bad, missing, or empty where nobody counts."""
        if not self.path:
            return MISSING
        if self.problem:
            return BAD
        return self.count.state if self.count else ""


class Survey(Record):
    """What was found in the slots, and why partitions could not be looked at: their slots are missing."""

    images: tuple[Image, ...]
    problems: tuple[str, ...] = ()


def survey(here: Booted, values: Mapping[str, str]) -> Survey:
    """Look at the images of all slots; the mounts of this process are its own then. Raises ImageError."""
    try:
        syscalls.leave_mounts()
    except OSError as error:
        raise ImageError(f"cannot look at the images of this machine: {told(error)}") from None
    found: list[Image] = []
    problems = []
    for label in (booted.STATE, booted.RECOVERY):
        try:
            found += _partition(label, here, values)
            continue
        except ImmucoreError as error:
            problems.append(error.message)
        except OSError as error:
            problems.append(f"cannot look at the images on {label}: {told(error)}")
        found += [Image(slot=slot) for slot, holder in booted.MODES.items() if holder == label]
    return Survey(images=tuple(found), problems=tuple(problems))


def _partition(label: str, here: Booted, values: Mapping[str, str]) -> list[Image]:
    if label == booted.MODES[here.mode]:
        return list(_images(booted.HOLDER, label, here, values))
    with booted.readable(here.partition(label), "status") as top:
        return list(_images(top, label, here, values))


def _images(top: str, label: str, here: Booted, values: Mapping[str, str]) -> Iterator[Image]:
    directory = os.path.join(top, slots.DIRECTORY)
    state = state_file.read(top)
    if label == booted.RECOVERY:
        names = (slots.FILES[RECOVERY], slots.EARLIER_RECOVERY)
        name = next((name for name in names if slots.whole(os.path.join(directory, name))), "")
        yield _image(RECOVERY, directory, name, state, values).replace(running=here.mode == RECOVERY)
        return
    running = slots.survey(directory, values, here.running(label))
    for slot in COUNTED:
        name = slots.FILES[slot] if running[slot].whole else ""
        yield _image(slot, directory, name, state, values).replace(running=running[slot].running)


def _image(
    slot: str, directory: str, name: str, state: state_file.State, values: Mapping[str, str]
) -> Image:
    if not name:
        return Image(slot=slot)
    path = os.path.join(directory, name)
    place = f"/{slots.DIRECTORY}/{name}"
    try:
        image_id = images.identity(path)
    except UnreadableError as error:
        return Image(slot=slot, path=place, problem=error.message)
    entry = state.entry(slot)
    label = process.run([*_BLKID, path], timeout_sec=_BLKID_SEC)
    return Image(
        slot=slot,
        path=place,
        image_id=image_id,
        label=label.output.strip() if label.status == 0 else "",
        count=bootcount.read(values, image_id or slot) if slot in COUNTED else None,
        entry=entry if entry and entry.image_id == (image_id or "") else None,
    )


def show(arguments: argparse.Namespace) -> int:
    """Tell all of it; the exit status is FELL_BACK where somebody should look into it."""
    what = "tell what is booted"
    if os.geteuid():
        raise ImageError(f"cannot {what}: that is for root alone", hint="sudo immucore boot status")
    here, state = booted.look(what), boot_state.read()
    values = state.environment.read()
    found = survey(here, values)
    facts = _facts(state, found, values)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        for line in lines(facts):
            print(printable(line))
    bad = any(image.state == BAD for image in found.images)
    return FELL_BACK if state.reason or bad or found.problems else 0


def _facts(state: BootState, found: Survey, values: Mapping[str, str]) -> dict[str, Any]:
    ids = {image.slot: (image.image_id or image.slot) if image.path else None for image in found.images}
    broken = [image.slot for image in found.images if image.problem or not image.path]
    return {
        "schema": report.SCHEMA,
        "booted": state.mode,
        "wanted": state.wanted,
        "reason": boot_state.reason(state, {image.slot: image.state for image in found.images}),
        "image_id": state.image_id,
        "health": health_notice.read(),
        "next": bootcount.upcoming(values, ids[ACTIVE], ids[PASSIVE], broken) or None,
        "next_entry": values.get("next_entry", ""),
        "saved_entry": values.get("saved_entry", ""),
        "environment": {"path": str(state.environment.path), "problem": state.environment.problem},
        "problems": list(found.problems),
        "slots": {image.slot: _of_slot(image) for image in found.images},
    }


def _of_slot(image: Image) -> dict[str, Any]:
    return {
        "image": image.path,
        "image_id": image.image_id,
        "label": image.label,
        "state": image.state,
        "left": image.count.left if image.count else None,
        "running": image.running,
        "problem": image.problem,
        **{name: getattr(image.entry, name, "") for name in ("source", "digest", "fs", "date", "action")},
    }


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Say it to people."""
    for slot, image in facts["slots"].items():
        left = image["left"]
        tries = f", {left} {'boot' if left == 1 else 'boots'} left" if image["state"] == "trying" else ""
        what = image["state"] + tries or "not counted"
        yield f"{'*' if image['running'] else ' '} {slot:9} {what:20} {image['image_id'] or '-'}"
        if image["problem"]:
            yield f"            {image['problem']}"
        origin = [image["label"], image["source"], image["date"]]
        if any(origin):
            yield f"            {'  '.join(filter(None, origin))}"
    yield from facts["problems"]
    yield f"booted: {facts['booted']}"
    if facts["reason"]:
        yield f"    instead of {facts['wanted']}: {facts['reason']}"
    told = facts["health"]
    yield f"health: {told.get('verdict')}"
    for reason in told.get("reasons") or ():
        yield f"    {reason}"
    once = " (this once)" if facts["next_entry"] else ""
    yield f"next boot: {facts['next'] or 'nothing can be booted'}{once}"
    if facts["saved_entry"]:
        yield f"default: {facts['saved_entry']}"
    if problem := facts["environment"]["problem"]:
        yield f"boots are not counted: {facts['environment']['path']}: {problem}"
