"""Where the program starts: `boot` goes straight to the boot, anything else to the command line tools."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the subcommand that sys.argv names; the exit status is the one of contract §9."""
    if sys.argv[1:] == ["boot"]:
        from immucore import boot

        return boot.main()
    from immucore import cli  # argparse costs 7 ms, more than a third of a boot

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
