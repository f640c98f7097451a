"""Running other programs: fsck, a shell, what assembles devices, stages. A healthy boot never imports this.

Every child of the agent starts here: PyInstaller puts the folder of its own libraries into LD_LIBRARY_PATH,
and a child would load ours instead of the system's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import termios
import time

from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TERM": "linux"}
TIMED_OUT = 124  # as timeout(1) says it
MAX_OUTPUT_BYTES = 1 << 16  # the end of it is what tells
SAY_SEC = 10.0


class Finished(Record):
    """How a program ended: its exit status, or 128 + the signal that ended it, and all that it printed."""

    status: int
    output: str


def find(name: str) -> str | None:
    """Return the path of a program; None where the initramfs has none of this name."""
    return shutil.which(name, path=ENVIRONMENT["PATH"])


def run(
    argv: Sequence[str],
    *,
    timeout_sec: float | None = None,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[float], None] | None = None,
    every_sec: float = SAY_SEC,
) -> Finished:
    """Run a program to its end, with nothing on its standard input, and return what it said.

    One that takes longer than `timeout_sec` is killed, and so is one that a signal to the agent interrupts.
    `meanwhile` is called every `every_sec` with the seconds that it has taken so far. Raises OSError when it
    cannot be started.
    """
    started = time.monotonic()
    limit_sec = float("inf") if timeout_sec is None else timeout_sec
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**ENVIRONMENT, **(environment or {})},
    ) as child:
        try:
            while True:
                left_sec = limit_sec - (time.monotonic() - started)
                try:
                    output, _ = child.communicate(timeout=max(0.0, min(left_sec, every_sec)))
                    break
                except subprocess.TimeoutExpired:
                    taken_sec = time.monotonic() - started
                    if taken_sec >= limit_sec:
                        child.kill()
                        return Finished(
                            status=TIMED_OUT, output=f"{argv[0]} took longer than {limit_sec:g} s"
                        )
                if meanwhile is not None:
                    meanwhile(taken_sec)
        except BaseException:
            child.kill()
            raise
    status = child.returncode if child.returncode >= 0 else 128 - child.returncode
    return Finished(status=status, output=output[-MAX_OUTPUT_BYTES:].decode("utf-8", "replace"))


class Child:
    """A program that runs beside the agent, with `typed` on its standard input, or nothing.

    One that is `apart` is in a session of its own, with all that it starts.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        apart: bool = False,
        typed: bytes = b"",
    ) -> None:
        """Start it. Raises OSError."""
        self._apart = apart
        self._output = os.memfd_create(
            argv[0], os.MFD_CLOEXEC
        )  # a pipe that nobody reads would fill and stop it
        given = -1
        try:
            if typed:
                given = os.memfd_create("input", os.MFD_CLOEXEC)
                os.pwrite(given, typed, 0)
            self._child = subprocess.Popen(
                argv,
                stdin=given if typed else subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **(environment or {})},
                start_new_session=apart,
            )
        except BaseException:
            os.close(self._output)
            raise
        finally:
            if given >= 0:
                os.close(given)

    def finished(self) -> Finished | None:
        """Return how it ended, once; None while it runs."""
        if self._child.poll() is None:
            return None
        return self._result(self._child.returncode)

    def wait(self, timeout_sec: float) -> Finished | None:
        """Return how it ended, once; None where it has not until then."""
        try:
            return self._result(self._child.wait(timeout_sec))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> Finished:
        """End it at once, and where it is apart, all that it has started."""
        if self._apart:
            with contextlib.suppress(
                ProcessLookupError
            ):  # its own process is not reaped yet: no other has it
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.kill()
        return self._result(self._child.wait())

    def _result(self, status: int) -> Finished:
        size = os.fstat(self._output).st_size
        output = os.pread(self._output, MAX_OUTPUT_BYTES, max(0, size - MAX_OUTPUT_BYTES))
        os.close(self._output)
        return Finished(
            status=status if status >= 0 else 128 - status, output=output.decode("utf-8", "replace")
        )

    def end(self, timeout_sec: float = 2.0) -> Finished:
        """Ask it to end, kill it where it does not, and return how it ended."""
        self._child.terminate()
        try:
            self._child.wait(timeout_sec)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        return self._result(self._child.returncode)


def run_apart(
    argv: Sequence[str],
    *,
    timeout_sec: float,
    environment: Mapping[str, str] | None = None,
    typed: bytes = b"",
    meanwhile: Callable[[float], None] | None = None,
    every_sec: float = SAY_SEC,
) -> Finished:
    """Run somebody's command to its end, as run() does; what it leaves in the background is not waited for.

    When its time is over, all that it has started is killed. Raises OSError when it cannot be started.
    """
    started = time.monotonic()
    child = Child(argv, environment=environment, apart=True, typed=typed)
    try:
        while True:
            taken_sec = time.monotonic() - started
            finished = child.wait(max(0.0, min(timeout_sec - taken_sec, every_sec)))
            if finished is not None:
                return finished
            if time.monotonic() - started >= timeout_sec:
                said = child.kill().output
                return Finished(status=TIMED_OUT, output=f"{said}\nit took longer than {timeout_sec:g} s")
            if meanwhile is not None:
                meanwhile(time.monotonic() - started)
    except BaseException:
        with contextlib.suppress(OSError):
            child.kill()
        raise


def shell(consoles: str = "/sys/class/tty/console/active") -> None:
    """Run an interactive shell on the console until it is left. Raises OSError.

    On the device that /dev/console is, the last of console=: only that can be a controlling terminal, which
    job control and Ctrl-C need.
    """
    with open(consoles, encoding="ascii") as file:
        name = (file.read().split() or ["console"])[-1]
    terminal = os.open(f"/dev/{name}", os.O_RDWR | os.O_NOCTTY)

    def take_terminal() -> None:
        with contextlib.suppress(OSError):  # somebody else's: the shell does without
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    try:
        subprocess.run(
            ["/bin/sh", "-i"],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**ENVIRONMENT, "HOME": "/root"},
            start_new_session=True,
            preexec_fn=take_terminal,
            check=False,
        )
    finally:
        os.close(terminal)
