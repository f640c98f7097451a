"""The log of a boot.

To systemd's journal as `<N>` lines on stderr, to /dev/kmsg before it, and kept for the record.

Levels are syslog's (syslog(3)): 3 error, 4 warning, 6 info, 7 debug; debug reaches the journal only with
rd.cos.debug.
"""

from __future__ import annotations

import os
import time

DEBUG, INFO, WARNING, ERROR = 7, 6, 4, 3


class Log:
    """Where the lines of one boot go; all of them are kept in `lines`."""

    def __init__(self, *, journal: bool) -> None:
        self.debug_wanted = False
        self.lines: list[str] = []
        self._journal = journal

    def write(self, level: int, message: str) -> None:
        """Keep a message and tell it, one line of the journal for each of its lines."""
        now = time.monotonic()
        for line in printable(message).split("\n"):
            self.lines.append(f"[{now:12.6f}] <{level}> {line}")
            if level < DEBUG or self.debug_wanted:
                self._tell(level, line)

    def debug(self, message: str) -> None:
        """Say what only somebody who looks for a fault wants to know."""
        self.write(DEBUG, message)

    def info(self, message: str) -> None:
        """Say what belongs to an ordinary boot; one line of it is enough."""
        self.write(INFO, message)

    def warning(self, message: str) -> None:
        """Say what somebody should look into."""
        self.write(WARNING, message)

    def error(self, message: str) -> None:
        """Say what stopped the boot."""
        self.write(ERROR, message)

    def _tell(self, level: int, line: str) -> None:
        try:
            if self._journal:
                os.write(2, f"<{level}>{line}\n".encode("utf-8", "backslashreplace"))
            else:
                kmsg = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
                os.write(kmsg, f"<{level}>immucore: {line}".encode("utf-8", "backslashreplace")[:900])
                os.close(kmsg)
        except OSError:
            return  # a log that cannot be written must not stop a boot; `lines` has it


def printable(message: str) -> str:
    r"""Show control characters as \uNNNN, but for newlines: a disk's label is not to command a terminal."""
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in message)


def start() -> Log:
    """Open the log of this process.

    Systemd sets JOURNAL_STREAM where stderr is the journal (systemd.exec(5)).
    """
    return Log(journal="JOURNAL_STREAM" in os.environ)
