"""Say what a frozen boot has imported before it acts.

Built with the archive and the start-up of the real program, run once by freeze.py and removed: so the
program needs no hook for it.
"""

import sys

import immucore.boot  # noqa: F401

print(*sorted(sys.modules))
