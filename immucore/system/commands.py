"""The command line of the booted system: that of the initramfs (cli.py), and what only this can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from immucore import cli
from immucore.system import boot_commands, image_commands, install_command, reboot_commands

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of the booted system, each by the module that does it."""
    install_command.add_parser(commands)
    image_commands.add_parser(commands)
    boot_commands.add_parser(commands)
    reboot_commands.add_parser(commands)


def main(arguments: Sequence[str]) -> int:
    """Run a command; the exit status is that of contract §9."""
    if list(arguments) == ["boot"]:  # what an initramfs runs, whichever of the two programs is there
        from immucore import boot

        return boot.main()
    return cli.main(arguments, add)
