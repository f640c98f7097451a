"""Say what a frozen boot has imported before it acts, what the archive holds, and what the self-test finds.

Built with the archive and the start-up of the real program, run once by freeze.py and removed: so the
program needs no hook for it.
"""

import sys

import immucore.boot  # noqa: F401

imported = sorted(sys.modules)

import pyimod02_importers  # noqa: E402 - PyInstaller's own

from immucore.self_test import self_test  # noqa: E402

print("imported", *imported)
print("bundled", *sorted(pyimod02_importers.pyz_archive.toc))
for problem in self_test():
    print("problem", problem)
