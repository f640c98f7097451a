"""Running other programs: fsck, a shell, what assembles devices, stages. A healthy boot never imports this.

Every child of the agent starts here: PyInstaller puts the folder of its own libraries into LD_LIBRARY_PATH,
and a child would load ours instead of the system's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import termios
import time

from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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
    typed: bytes = b"",
    meanwhile: Callable[[float], None] | None = None,
    every_sec: float = SAY_SEC,
) -> Finished:
    """Run a program to its end, with `typed` on its standard input, and return what it said.

    One that takes longer than `timeout_sec` is killed, and so is one that a signal to the agent interrupts.
    `meanwhile` is called every `every_sec` with the seconds that it has taken so far. Raises OSError when it
    cannot be started.
    """
    started = time.monotonic()
    limit_sec = float("inf") if timeout_sec is None else timeout_sec
    with (
        _given(typed) as given,
        subprocess.Popen(
            argv,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **(environment or {})},
        ) as child,
    ):
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


@contextlib.contextmanager
def _given(typed: bytes) -> Iterator[int]:
    """Give what a program is to read as its standard input: in memory, because a pipe may fill."""
    if not typed:
        yield subprocess.DEVNULL
        return
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC)
    try:
        os.pwrite(descriptor, typed, 0)
        yield descriptor
    finally:
        os.close(descriptor)


class Child:
    """A program that runs beside the agent, with nothing on its standard input."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Start it. Raises OSError."""
        self._output = os.memfd_create(
            argv[0], os.MFD_CLOEXEC
        )  # a pipe that nobody reads would fill and stop it
        try:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
            )
        except BaseException:
            os.close(self._output)
            raise

    def finished(self) -> Finished | None:
        """Return how it ended, once; None while it runs."""
        if self._child.poll() is None:
            return None
        return self._result(self._child.returncode)

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


class _Tail:
    """The end of what comes out of a pipe. Closed, it ends what still writes to it."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self._kept = b""

    def take(self) -> bool:
        """Take what is there, up to what a pipe holds; False at its end."""
        try:
            block = os.read(self.read, MAX_OUTPUT_BYTES)
        except BlockingIOError:
            return True
        self._kept = (self._kept + block)[-MAX_OUTPUT_BYTES:]
        return bool(block)

    def close(self) -> str:
        """Return the end of it."""
        self.take()
        os.close(self.read)
        return self._kept.decode("utf-8", "replace")


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

    It is in a session of its own: when its time is over, all that it has started is killed. Raises OSError
    when it cannot be started.
    """
    started = time.monotonic()
    tail = _Tail()
    try:
        child = _start_apart(argv, tail, environment, typed)
    except BaseException:
        tail.close()
        raise
    try:
        ended = _ended(child, tail, started + timeout_sec, _every(started, every_sec, meanwhile))
    except BaseException:
        _kill(child)
        tail.close()
        raise
    if not ended:
        _kill(child)
        return Finished(status=TIMED_OUT, output=f"{tail.close()}\nit took longer than {timeout_sec:g} s")
    status = child.wait()
    return Finished(status=status if status >= 0 else 128 - status, output=tail.close())


def _start_apart(
    argv: Sequence[str], tail: _Tail, environment: Mapping[str, str] | None, typed: bytes
) -> subprocess.Popen[bytes]:
    try:
        with _given(typed) as given:
            return subprocess.Popen(
                argv,
                stdin=given,
                stdout=tail.write,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **(environment or {})},
                start_new_session=True,
            )
    finally:
        os.close(tail.write)


def _every(
    started: float, every_sec: float, meanwhile: Callable[[float], None] | None
) -> Callable[[], float]:
    """Return what calls `meanwhile` when it is time, and says how long it is until then."""
    told = started

    def tell() -> float:
        nonlocal told
        now = time.monotonic()
        if now - told >= every_sec:
            told = now
            if meanwhile is not None:
                meanwhile(now - started)
        return told + every_sec - now

    return tell


def _ended(child: subprocess.Popen[bytes], tail: _Tail, deadline: float, tell: Callable[[], float]) -> bool:
    """Wait for a program, and take what it prints; False where there is no time any more."""
    end = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.register(tail.read, select.POLLIN)
        while (left_sec := deadline - time.monotonic()) > 0:
            ready = {descriptor for descriptor, _ in poll.poll(max(0.0, min(left_sec, tell())) * 1000 + 1)}
            if tail.read in ready and not tail.take():
                poll.unregister(tail.read)
            if end in ready:
                return True
        return False
    finally:
        os.close(end)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a program that is apart at once, with all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # its own process is not reaped yet: no other has it
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


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
