"""`immucore upgrade`, `rollback`, `reset`: their options, and what upgrade.yaml says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from immucore.errors import CmdlineError
from immucore.system import settings
from immucore.values import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from immucore.cli import Commands
    from immucore.system.console import Console

_UPGRADE = "make an image of a source, and boot it from the next boot on"
_ROLLBACK = "make passive active, and boot it from the next boot on"
_RESET = "make active and passive anew of recovery, from which this machine has to be booted"
_SOURCE = (
    "dir:/path, tar:/path, file:/path/image or oci:registry/image:tag; by default `source` of upgrade.yaml"
)


class Wishes(Record):
    """What an upgrade is to do."""

    source: str
    recovery: bool = False  # that image, instead of active
    force: bool = False  # what was judged bad, or is there already, too
    fstype: str = ""  # of the image; empty: as the one that it replaces
    authfile: str = ""  # oci.Options
    cert_dir: str = ""
    tls_verify: bool = True


def add_parser(commands: Commands) -> None:
    """Add the commands."""
    command = _parser(commands, "upgrade", _UPGRADE, _upgrade)
    command.add_argument("--recovery", action="store_true", help="the recovery image, and nothing else")
    command.add_argument(
        "--force", action="store_true", help="also what was judged bad, or is there already"
    )
    command.add_argument("source", nargs="?", metavar="SOURCE", help=_SOURCE)
    command = _parser(commands, "rollback", _ROLLBACK, _rollback)
    command.add_argument("--force", action="store_true", help="also to an image that was judged bad")
    command = _parser(commands, "reset", _RESET, _reset)
    command.add_argument(
        "--persistent", action="store_true", help="remove all that is on COS_PERSISTENT, too"
    )
    command.add_argument("--oem", action="store_true", help="remove all that is on COS_OEM, but for grubenv")


def _parser(
    commands: Commands, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
    command.add_argument("--json", action="store_true", help="for programs: a line of JSON for each step")
    command.add_argument("--reboot", metavar="STRATEGY", help="then: off, now, window, window=…, etcd-lock")
    command.set_defaults(run=run)
    return command


def _upgrade(arguments: argparse.Namespace) -> int:
    from immucore.system import booted, stopping, upgrade

    configured = settings.read()
    wishes = wished(arguments, configured)
    when = arguments.reboot
    if when is None and not arguments.recovery:  # it runs only when it is needed: nothing waits for a reboot
        when = configured.get("reboot")
    console, restart = _begin(arguments, when, configured)
    with stopping.stoppable("nothing was changed"), booted.at_work("upgrade") as here:
        done = upgrade.Upgrade(console, here, wishes).run()
    if done:
        restart()
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from immucore.system import booted, rollback, stopping

    console, restart = _begin(arguments, arguments.reboot, settings.read())
    with stopping.stoppable("nothing was changed"), booted.at_work("rollback") as here:
        rollback.rollback(console, here, force=arguments.force)
    restart()
    return 0


def _reset(arguments: argparse.Namespace) -> int:
    from immucore.system import booted, reset, stopping

    configured = settings.read()
    check(configured)
    console, restart = _begin(arguments, arguments.reboot, configured)
    with stopping.stoppable("recovery is as it was, do it again"), booted.at_work("reset") as here:
        fstype = configured.get("filesystem", "")
        reset.Reset(console, here, fstype=fstype, persistent=arguments.persistent, oem=arguments.oem).run()
    restart()
    return 0


def _begin(
    arguments: argparse.Namespace, when: object, configured: dict[str, Any]
) -> tuple[Console, Callable[[], None]]:
    """Give the console, and what is to be called at the end: whether it can be is found out now."""
    from immucore.system.console import Console

    console = Console(as_json=arguments.json)
    if when is None:
        return console, lambda: None
    from immucore.system import reboot

    strategy = reboot.parse(when, configured)
    return console, lambda: strategy.reboot(console)


_KEYS: dict[str, type] = {
    **dict.fromkeys(("source", "recovery-source", "filesystem", "authfile", "cert-dir"), str),
    "tls-verify": bool,
}
_OF_REBOOTS = ("reboot", "window", "etcd")


def check(configured: dict[str, Any]) -> None:
    """Look whether what upgrade.yaml says can be so, as far as that is of images. Raises CmdlineError."""
    known = (*_KEYS, *_OF_REBOOTS)
    for key in configured:
        if key not in known:
            raise CmdlineError(
                f"cannot read {settings.PATH}: '{key}' is not known", hint=f"there are {', '.join(known)}"
            )
    for key, kind in _KEYS.items():
        if key in configured and not isinstance(configured[key], kind):
            what = "true or false" if kind is bool else "a text"
            raise CmdlineError(f"cannot read '{key}' in {settings.PATH}: it has to be {what}")


def wished(arguments: argparse.Namespace, configured: dict[str, Any]) -> Wishes:
    """Put together what was typed and what upgrade.yaml says. Raises CmdlineError."""
    check(configured)
    key = "recovery-source" if arguments.recovery else "source"
    source = arguments.source
    if source is None:
        source = configured.get(key) or configured.get("source")
    if not source:
        raise CmdlineError(
            "cannot upgrade: there is no source", hint=f"name one, or write `{key}: …` in {settings.PATH}"
        )
    return Wishes(
        source=source,
        recovery=arguments.recovery,
        force=arguments.force,
        fstype=configured.get("filesystem", ""),
        authfile=configured.get("authfile", ""),
        cert_dir=configured.get("cert-dir", ""),
        tls_verify=configured.get("tls-verify", True),
    )
