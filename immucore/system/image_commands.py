"""`immucore upgrade`, `rollback`, `reset`: their options, and what upgrade.yaml says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from immucore.errors import CmdlineError
from immucore.system import settings
from immucore.values import Record

if TYPE_CHECKING:
    import argparse

    from immucore.cli import Commands

_UPGRADE = "make an image of a source, and boot it from the next boot on"
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
    """Add the command."""
    command = commands.add_parser("upgrade", help=_UPGRADE, description=f"{_UPGRADE.capitalize()}.")
    command.add_argument("--recovery", action="store_true", help="the recovery image, and nothing else")
    command.add_argument(
        "--force", action="store_true", help="also an image that was bad, or is there already"
    )
    command.add_argument("--reboot", metavar="STRATEGY", help="then: off, now, window, window=…, etcd-lock")
    command.add_argument("--json", action="store_true", help="for programs: a line of JSON for each step")
    command.add_argument("source", nargs="?", metavar="SOURCE", help=_SOURCE)
    command.set_defaults(run=_upgrade)


def _upgrade(arguments: argparse.Namespace) -> int:
    from immucore.system import booted, steps, upgrade
    from immucore.system.console import Console

    configured = settings.read()
    wishes = wished(arguments, configured)
    when = arguments.reboot or configured.get("reboot")
    strategy = None
    if when is not None:
        from immucore.system import reboot

        strategy = reboot.parse(when, configured)
    console = Console(as_json=arguments.json)
    with booted.at_work("upgrade") as here, steps.stoppable():
        done = upgrade.Upgrade(console, here, wishes).run()
    if done and strategy:
        strategy.reboot(console)
    return 0


_KEYS: dict[str, type] = {
    **dict.fromkeys(("source", "recovery-source", "filesystem", "authfile", "cert-dir"), str),
    "tls-verify": bool,
}


def wished(arguments: argparse.Namespace, configured: dict[str, Any]) -> Wishes:
    """Put together what was typed and what upgrade.yaml says. Raises CmdlineError."""
    for key, kind in _KEYS.items():
        if key in configured and not isinstance(configured[key], kind):
            what = "true or false" if kind is bool else "a text"
            raise CmdlineError(f"cannot read '{key}' in {settings.PATH}: it has to be {what}")
    key = "recovery-source" if arguments.recovery else "source"
    source = arguments.source or configured.get(key) or configured.get("source")
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
