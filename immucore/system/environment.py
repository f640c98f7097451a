"""GRUB's environment block as a file of the booted system, for reading, repairing and durable changes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from immucore import grubenv
from immucore.errors import CmdlineError, MountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Environment:
    """The environment block in the file `path`; where that is missing or damaged, it has no variables.

    It is changed in place. GRUB replays no journal, and writes into the blocks where it finds the file: if a
    new one took its place, and that was still in the journal after a power cut, these would be the blocks of
    somebody else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> dict[str, str]:
        """Read the variables; a block that is not there or is damaged has none, as for GRUB."""
        try:
            return grubenv.parse(self._block())
        except OSError:
            return {}

    @property
    def problem(self) -> str:
        """Say why GRUB cannot use this file to count; "" where it can."""
        try:
            block = self._block()
        except FileNotFoundError:
            return "it is missing"
        except OSError as error:
            return str(error.strerror)
        if len(block) != grubenv.SIZE_BYTES:
            return f"it has not the size of {grubenv.SIZE_BYTES} bytes"
        if not block.startswith(grubenv.SIGNATURE):
            return "it does not begin as an environment block"
        # GRUB looks for room in the '#' at the end, and finds none behind anything else
        if block[block.rindex(b"\n") + 1 :].strip(b"#") or b"\0" in block:
            return "it does not end as an environment block"
        return ""

    @property
    def intact(self) -> bool:
        """Tell whether GRUB can read and write it."""
        return not self.problem

    def update(self, change: Callable[[dict[str, str]], Mapping[str, str]]) -> None:
        """Store what `change` makes of the variables, with nobody else's change in between.

        A block that is missing or damaged is made anew; one that would stay as it is, is not written. Raises
        CmdlineError and MountError.
        """
        try:
            lock = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._refused(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.read()
            after = change(dict(before))
            if after != before or not self.intact:
                self.write(after)
        finally:
            os.close(lock)

    def _block(self) -> bytes:
        with open(self.path, "rb", opener=_regular) as file:
            return file.read(grubenv.SIZE_BYTES + 1)

    def write(self, values: Mapping[str, str]) -> None:
        """Store these variables and no others; they are on the disk when this returns.

        Creates the file, and gives it its size, where it has not. Raises CmdlineError where they do not fit,
        MountError where the kernel refuses.
        """
        try:
            block = grubenv.render(dict(values))
        except ValueError as error:
            raise CmdlineError(
                f"cannot write '{self.path}': {error}",
                hint=f"see what is in it: grub-editenv {self.path} list; unset what is not needed: "
                f"grub-editenv {self.path} unset NAME",
            ) from None
        try:
            self._store(block)
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> MountError:
        hint = f"COS_OEM has to be mounted there, read-write: findmnt {self.path.parent}"
        if error.errno == errno.EACCES:
            hint = "that is for root alone"
        return MountError(f"cannot write '{self.path}': {error.strerror}", hint=hint)

    def _store(self, block: bytes) -> None:
        known = self.path.exists()
        descriptor = _regular(str(self.path), os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(descriptor, block, 0)
            if os.fstat(descriptor).st_size != len(block):
                os.ftruncate(descriptor, len(block))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not known:
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _regular(path: str, flags: int) -> int:
    """Open a file that is no symlink, and wait for nobody: a pipe in its place must not stop a boot."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
