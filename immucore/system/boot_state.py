"""What was booted, what was to be booted, and why that is not the same."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from immucore import cmdline, report
from immucore.boot import INITRD_RELEASE
from immucore.bootcount import BAD, COUNTED
from immucore.plan import SYSROOT
from immucore.system import images
from immucore.system.environment import Environment
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

MISSING = "missing"  # the state of a slot without an image
MODES = ("active", "passive", "recovery", "live")
FAILURE = "upgrade_failure"  # what grub.cfg puts on the kernel command line after a fallback, with the slot
GIVEN_UP = "the boot loader did not start it"
_CMDLINE = "/proc/cmdline"
_SENTINELS = "/run/cos"
_RESULT = f"{report.DIRECTORY}/result.json"
MOVED = f"{report.DIRECTORY}/slots-moved"  # it is there once images were moved since this boot


class BootState(Record):
    """A boot, and how it came about."""

    mode: str  # active, passive, recovery or live; empty where that was no boot of an image
    image_id: str | None  # of the image that runs; None where it has none
    wanted: str  # what was to be booted
    reason: str  # why that is not what was booted; empty where it is
    given_up: tuple[str, ...]  # that, and what else was tried before what was booted
    restarts: bool  # a boot that fails restarts the machine (rd.cos.onfail): it is counted, or was asked for
    planned: bool  # the agent has mounted the system
    root: str  # where the booted system is: / or, in an initramfs, /sysroot
    moved: bool = False  # the slots may hold other images by now than this boot has found in them

    @property
    def counted_as(self) -> str | None:
        """What the tries of the booted image are counted by; None where they are not.

        Without an identity that is its slot, as long as nothing was moved.
        """
        name = None if self.moved else self.mode
        return (self.image_id or name) if self.mode in COUNTED else None

    @property
    def environment(self) -> Environment:
        """GRUB's environment block."""
        return Environment(os.path.join(self.root, "oem/grubenv"))


def reason(state: BootState, states: Mapping[str, str]) -> str:
    """Say why the wanted slot was not booted; `states` are those of the slots, as far as they are known."""
    if state.reason != GIVEN_UP:
        return state.reason
    return {
        BAD: "it is bad: no boot of it came up in good health, or it was judged so",
        MISSING: "there is no whole image in it",
    }.get(states.get(state.wanted, ""), state.reason)


def read() -> BootState:
    """Find out about this boot."""
    root = SYSROOT if os.path.exists(INITRD_RELEASE) else "/"
    with open(_CMDLINE, "rb") as file:
        line = file.read()
    try:
        with open(_RESULT, encoding="utf-8") as file:
            result = json.load(file)
    except (OSError, ValueError):
        result = {}
    mode = next((mode for mode in MODES if os.path.exists(f"{_SENTINELS}/{mode}_mode")), "")
    found = of(line, result if isinstance(result, dict) else {}, mode, images.running(root), root)
    state: BootState = found.replace(moved=os.path.exists(MOVED))
    return state


def of(
    line: bytes, result: Mapping[str, Any], mode: str, image_id: str | None, root: str = "/"
) -> BootState:
    """Put together what the boot loader says on the kernel command line, and the agent in result.json."""
    wanted, reason = mode, ""
    given_up = dict(cmdline.words(line)).get(FAILURE) or ""
    asked = str(result.get("mode_asked") or "")
    if given_up in MODES and given_up != mode:
        wanted, reason = given_up, GIVEN_UP
    elif asked in MODES and asked != mode:
        wanted, reason = asked, _why_not(result)
    failed = [each["mode"] for each in _failures(result) if not each.get("other_kernel")]
    parsed = cmdline.parse(line)
    return BootState(
        mode=mode,
        image_id=image_id,
        wanted=wanted,
        reason=reason,
        given_up=tuple(each for each in dict.fromkeys((wanted, *failed)) if each != mode),
        restarts=mode in COUNTED and parsed.onfail.startswith("reboot"),
        planned=parsed.engaged,
        root=root,
    )


def _failures(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the slots that the agent has tried in vain."""
    failures = result.get("failures")
    listed = failures if isinstance(failures, list) else []
    return [each for each in listed if isinstance(each, dict) and each.get("mode") in MODES]


def _why_not(result: Mapping[str, Any]) -> str:
    told = [f"{each['mode']}: {each.get('message')}" for each in _failures(result)]
    return "; ".join(dict.fromkeys(told)) or "the agent could not boot it"
