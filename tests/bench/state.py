"""Have a directory of the state follow an image; print microseconds and the peak of memory in KiB.

Run as a program of its own for each step, so that the memory is that of one: see bench.py.
"""

from __future__ import annotations

import sys
import time

repository, root, source, target, image = sys.argv[1:]
sys.path.insert(0, repository)

from immucore.linux import Kernel

kernel = Kernel(root=root)
before = time.monotonic_ns()
outcome = kernel.seed(source, target, image)
took_usec = (time.monotonic_ns() - before) // 1000
with open(
    "/proc/self/status", encoding="ascii"
) as file:  # getrusage(2) has the peak of who started this, too
    (peak,) = [line.split()[1] for line in file if line.startswith("VmHWM:")]
print(outcome, took_usec, peak)
