"""`immucore reboot` and `immucore reboot-lock`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from immucore.errors import Interrupted
from immucore.system import settings
from immucore.system.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from immucore.cli import Commands

_REBOOT = "reboot this machine as its fleet allows it"
_STRATEGY = "now; off: not, also what is pending; window[=CALENDAR[/DURATION]]; etcd-lock"
_LOCK = "show and change which machines may reboot at once"


def add_parser(commands: Commands) -> None:
    """Add both commands."""
    command = commands.add_parser("reboot", help=_REBOOT, description=f"{_REBOOT.capitalize()}.")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("strategy", nargs="?", metavar="STRATEGY", help=_STRATEGY)
    what.add_argument("--pending", action="store_true", help=argparse.SUPPRESS)  # what the unit runs
    command.set_defaults(run=_stoppable(_reboot))
    lock = commands.add_parser("reboot-lock", help=_LOCK, description=f"{_LOCK.capitalize()}.")
    actions = lock.add_subparsers(metavar="ACTION", required=True)
    command = actions.add_parser("status", help="list the machines that have taken a slot")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=_stoppable(_status))
    command = actions.add_parser("release", help="give the slot of a machine back, of this one by default")
    what = command.add_mutually_exclusive_group()
    what.add_argument("machine", nargs="?", metavar="MACHINE", help="its machine-id, as `status` has it")
    what.add_argument("--after-boot", action="store_true", help=argparse.SUPPRESS)  # what the unit runs
    command.set_defaults(run=_stoppable(_release))
    command = actions.add_parser("set-max", help="set the number of slots; 0 stops the reboots of the fleet")
    command.add_argument("slots", type=int, metavar="N")
    command.set_defaults(run=_stoppable(_set_max))


def _stoppable(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def stoppable(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped: etcd may have been told already", hint="immucore reboot-lock status says it"
            ) from None

    return stoppable


def _reboot(arguments: argparse.Namespace) -> int:
    from immucore.system import reboot
    from immucore.system.console import Console

    console = Console()
    if arguments.pending:
        reboot.resume(console)
    else:
        reboot.parse(arguments.strategy, settings.read()).reboot(console)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from immucore.system import reboot_lock

    lock = reboot_lock.open_lock()
    found = lock.look()
    if arguments.json:
        holders = [dict(each.items()) for each in found.holders]
        print(json.dumps({"key": lock.key, "max": found.max, "holders": holders}, indent=2))
        return 0
    print(f"{lock.key}: {len(found.holders)} of {found.max} slots taken")
    for each in found.holders:
        print(f"{each.machine}  {each.since or 'since when is not known'}  {each.host}".rstrip())
    return 0


def _release(arguments: argparse.Namespace) -> int:
    from immucore.system import reboot_lock

    if arguments.after_boot:
        from immucore.system import reboot
        from immucore.system.console import Console

        reboot.release_after_boot(Console())
        return 0
    machine = arguments.machine
    if machine is None:
        machine = reboot_lock.this_machine().machine
    if not reboot_lock.open_lock().release(machine):
        raise SettingsError(
            f"cannot give the slot of machine '{machine}' back: it has taken none",
            hint="immucore reboot-lock status lists those that have",
        )
    print(f"the slot of machine {machine} is given back")
    return 0


def _set_max(arguments: argparse.Namespace) -> int:
    from immucore.system import reboot_lock

    if not 0 <= arguments.slots <= reboot_lock.MAX_SLOTS:
        raise SettingsError(
            f"cannot set the number of slots to {arguments.slots}: it is less than none, or too many",
            hint="immucore reboot-lock set-max 1",
        )
    print(f"slots: {arguments.slots}, before {reboot_lock.open_lock().resize(arguments.slots)}")
    return 0
