"""Make an image of a tree and put it in place, as an upgrade does; print microseconds of each part, KiB.

Run as a program of its own, so that the memory is that of this: see images.py.
"""

from __future__ import annotations

import resource
import sys
import time

repository, tree, directory, fstype = sys.argv[1:]
sys.path.insert(0, repository)

from immucore.bootcount import PASSIVE
from immucore.system import slots, sources
from immucore.system.making import Making
from immucore.system.programs import silent

making = Making(directory, sources.parse(f"dir:{tree}"), fstype)
parts = (
    making.measure,
    lambda: making.unpack(silent),
    lambda: making.build("COS_ACTIVE", silent),
    lambda: making.verify(silent),
    lambda: (slots.commit(directory, PASSIVE), slots.settle(directory)),
)
took_usec = []
for part in parts:
    before = time.monotonic_ns()
    part()
    took_usec.append((time.monotonic_ns() - before) // 1000)
slots.clean(directory, 0)
print(*took_usec, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
