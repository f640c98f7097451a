"""Where the program of the booted system starts: all that the initramfs has, and what is here."""

from __future__ import annotations

import sys

from immucore.system import commands


def main() -> int:
    """Run the subcommand that sys.argv names; the exit status is the one of contract §9."""
    return commands.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
