"""`immucore boot status`, `good`, `bad`, `next`, `default`, `verdict`: the boots of this machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from immucore import bootcount
from immucore.bootcount import COUNTED, ENTRIES
from immucore.errors import CmdlineError
from immucore.system import boot_state, boot_status, booted

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from immucore.bootcount import Count
    from immucore.cli import Commands
    from immucore.system.boot_state import BootState

_ID = re.compile(r"[0-9a-f]{16}_[0-9a-f]{8}")
_ENTRY = "active, passive or recovery; '' or auto: none"


def add_parser(commands: Commands) -> None:
    """Add what can be said after `immucore boot`."""
    boot = commands.choices["boot"]
    boot.description = "Without a word: what the initramfs runs. With one:"
    actions = boot.add_subparsers(metavar="ACTION", required=True)
    command = actions.add_parser(
        "status", help="tell what is booted, what is in the slots, and how many boots each has left"
    )
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=boot_status.show)
    command = actions.add_parser("good", help="judge the image that runs good: all its tries are given back")
    command.set_defaults(run=_good)
    command = actions.add_parser("bad", help="judge an image bad: it is not booted again")
    command.add_argument(
        "which", nargs="?", metavar="SLOT|ID", help="active, passive or an image id; by default what runs"
    )
    command.set_defaults(run=_bad)
    for name, variable, text in (
        ("next", "next_entry", "choose what the next boot boots, once and without counting"),
        ("default", "saved_entry", "choose what is booted for good, as long as that is not bad"),
    ):
        command = actions.add_parser(name, help=text)
        command.add_argument("entry", metavar="ENTRY", help=_ENTRY)
        command.set_defaults(run=_choose, variable=variable)
    command = actions.add_parser(
        "verdict", help="wait for the health of this boot, and judge it: the service"
    )
    command.set_defaults(run=_verdict)


def _good(_: argparse.Namespace) -> int:
    state = boot_state.read()
    count = _judge(state, _running(state, "good"), bootcount.verdict)
    print(f"{count.image_id} is good")
    return 0


def _bad(arguments: argparse.Namespace) -> int:
    state = boot_state.read()
    which = arguments.which
    image_id = _running(state, "bad") if which is None else _named(state, which)
    count = _judge(state, image_id, bootcount.condemned)
    print(f"{count.image_id} is bad: it is not booted again")
    return 0


def _running(state: BootState, verdict: str) -> str:
    if state.counted_as:
        return state.counted_as
    why = "it is no boot of active or passive, and is not counted"
    if state.mode in COUNTED:
        why = "its image has no identity, and images were moved since"
    raise CmdlineError(
        f"cannot judge this boot {verdict}: {why}",
        hint="immucore boot status lists the images; immucore boot bad SLOT judges one of them",
    )


def _named(state: BootState, which: str) -> str:
    """Give the id of the image in a slot, or what is one."""
    if _ID.fullmatch(which):
        return which
    slot = ENTRIES.get(which)
    if slot not in COUNTED:
        raise CmdlineError(
            f"cannot judge '{which}' bad: that is neither active nor passive, nor an image id",
            hint="immucore boot status lists them",
        )
    values = state.environment.read()
    found = boot_status.survey(booted.look("judge an image"), values)
    image = next(each for each in found.images if each.slot == slot)
    if image.count is None:
        reason = image.problem or "; ".join(found.problems) or "there is no image in it"
        raise CmdlineError(f"cannot judge {slot} bad: {reason}")
    return image.count.image_id


def _judge(state: BootState, image_id: str, judge: Callable[[Count], Count]) -> Count:
    count = judge(bootcount.armed(image_id))
    state.environment.update(lambda values: bootcount.written(values, count))
    return count


def _choose(arguments: argparse.Namespace) -> int:
    variable, entry = arguments.variable, arguments.entry
    if entry not in ("", "auto", *ENTRIES):
        raise CmdlineError(
            f"cannot boot '{entry}': there is no such entry",
            hint=f"use {', '.join(ENTRIES)}, or auto for none",
        )
    slot = ENTRIES.get(entry, "")

    def change(values: dict[str, str]) -> dict[str, str]:
        others = {name: value for name, value in values.items() if name != variable}
        return {**others, variable: slot} if slot else others

    boot_state.read().environment.update(change)
    once = variable == "next_entry"
    if slot:
        print(f"the next boot boots {slot}" if once else f"{slot} is booted as long as it can be")
    elif once:
        print("no entry is chosen for the next boot alone")
    else:
        print("active is booted as long as it can be, then passive, then recovery")
    return 0


def _verdict(_: argparse.Namespace) -> int:
    from immucore.system import health

    return health.main()
