"""Where the frozen program starts: the agent's own main, and then the shortest way out.

The interpreter takes 2 ms to take itself apart at the end, and the machine waits for it. Of that, this
program needs that the two streams are flushed. An exception, such as argparse's SystemExit, goes the
interpreter's own way.
"""

import os
import sys

from immucore.__main__ import main

status = main()
try:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is None when the program was started without its descriptor
            stream.flush()
except BrokenPipeError:
    pass  # `immucore plan | head`: nobody reads on
except OSError:
    sys.exit(status)  # a full disk: the interpreter tries again, says so, and exits with 120
os._exit(status)
