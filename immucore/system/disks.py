"""A disk that a system is installed on, or a file that is to become one: what is on it, and who uses it.

What is on a disk that somebody hands over can be anything; its labels are shown, and nothing else is done
with them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import stat
import struct
import time
from typing import TYPE_CHECKING, Any

from immucore import process
from immucore.errors import DeviceError
from immucore.log import printable
from immucore.system import disk_users
from immucore.system.partitions import MIB, TABLE_MIB
from immucore.system.programs import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from immucore.system.partitions import Partition

BLKSSZGET = 0x1268  # linux/fs.h: the size of a logical sector
FILE_SECTOR_BYTES = 512  # what sfdisk takes a file to have
LOCK_SEC = 10.0  # udev holds a disk for as long as it looks at it
CHUNK_BYTES = MIB
AMBIVALENT = 8  # blkid(8), as a status


class Disk:
    """A block device or a file, open and locked: udev leaves it alone, and so does a second installation."""

    def __init__(self, path: str, descriptor: int, name: str) -> None:
        self.path = path
        self.name = name  # what messages call it
        self.touched = False  # it no longer is what it was
        self.described = False  # it may have its new table
        self._descriptor = descriptor
        self._claim = -1  # a second one: as long as it is open nobody else can use the disk
        status = os.fstat(descriptor)
        self.is_device = stat.S_ISBLK(status.st_mode)
        self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        self.sector_bytes = FILE_SECTOR_BYTES
        if self.is_device:
            self.sector_bytes = struct.unpack("i", fcntl.ioctl(descriptor, BLKSSZGET, bytes(4)))[0]

    @property
    def size_mib(self) -> int:
        """How many whole MiB it has."""
        return self.size_bytes // MIB

    def users(self) -> list[str]:
        """List who uses it, in words: mounts, what lies on it, loop devices. Empty: nobody does.

        From then on the kernel lets nobody else mount a device, or a partition of it, or take it for swap or
        for a part of something.
        """
        if not self.is_device:
            return disk_users.of_file(self.path)
        try:
            if self._claim < 0:
                self._claim = os.open(self.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return disk_users.of_device(self.path) or ["another program holds it"]
        return []

    def release(self) -> None:
        """Let others use it."""
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Have it used by who wants it alone: mke2fs, mkfs.vfat. Raises DeviceError."""
        self.release()
        yield
        self._refuse_users()

    def _refuse_users(self) -> None:
        if self.is_device and (users := self.users()):
            raise DeviceError(f"it is in use: {', '.join(users)}")

    def content(self) -> list[str]:
        """List what is on it, in words: signatures, and what the partitions hold. Empty: it is blank."""
        failure = f"cannot look at what is on '{self.path}'"
        seen = run(["wipefs", "--no-act", "--json", self.path], failure)
        try:
            signatures = _json(seen)["signatures"] if "{" in seen else []
        except ValueError:
            raise DeviceError(f"{failure}: wipefs says more than can be read") from None
        kinds = {each["type"]: each.get("label") or "" for each in signatures}
        if "gpt" in kinds:
            kinds.pop("PMBR", None)  # every GPT has it
        found = [_named(kind, label) for kind, label in kinds.items()]
        found += [self._held(each) for each in self._table()]
        if not found and not self.is_device and self._has_data():
            found = ["data of a kind that is not known"]
        return found

    def _table(self) -> list[dict[str, Any]]:
        done = process.run(["sfdisk", "--json", self.path])
        try:
            listed = _json(done.output)["partitiontable"]
        except ValueError:  # there is none, or one with thousands of partitions
            return []
        unit = int(listed.get("sectorsize", FILE_SECTOR_BYTES))
        return [
            {
                "name": each.get("name", ""),
                "start": int(each["start"]) * unit,
                "size": int(each["size"]) * unit,
            }
            for each in listed.get("partitions", ())
        ]

    def _held(self, partition: dict[str, Any]) -> str:
        region = (f"--offset={partition['start']}", f"--size={partition['size']}")
        done = process.run(["blkid", "--probe", *region, "--output=export", self.path])
        facts = dict(line.split("=", 1) for line in done.output.splitlines() if "=" in line)
        kind = "several things" if done.status == AMBIVALENT else facts.get("TYPE", "")
        name = f"partition '{printable(partition['name'])}'" if partition["name"] else "a partition"
        return f"{name} ({_named(kind, facts.get('LABEL', ''))})" if kind else name

    def _has_data(self) -> bool:
        position = 0
        while position < self.size_bytes:
            try:
                position = os.lseek(self._descriptor, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole is left
                    raise
                return False
            if os.pread(self._descriptor, CHUNK_BYTES, position).strip(b"\0"):
                return True
            position += CHUNK_BYTES
        return False

    def erase(self) -> None:
        """Take away the tables at both ends, and what else may have its signature there.

        From now on the disk is blank for everybody until it has a new table. One that somebody uses is left
        alone. Raises OSError, DeviceError.
        """
        self._refuse_users()
        if self.is_device and self._has_partitions():
            run(["partx", "--delete", self.path], f"cannot take the partitions of '{self.path}' away")
        self.touched = True
        self._clear(0, self.size_bytes)
        os.fsync(self._descriptor)
        left = self.content() if self.is_device else []
        if left:
            raise DeviceError(
                f"cannot erase '{self.path}': there still is {', '.join(left)}",
                hint=f"wipefs --all --force {self.path}",
            )

    def _has_partitions(self) -> bool:
        name = os.path.basename(os.path.realpath(self.path))
        return bool(glob.glob(f"/sys/class/block/{glob.escape(name)}/*/partition"))

    def clear(self, partition: Partition) -> None:
        """Take away what an earlier use of the disk may have left: signatures at both ends of a partition.

        mke2fs and mkfs.vfat leave some of it alone, and for blkid two file systems are none.
        """
        self._clear(partition.offset_bytes, partition.size_mib * MIB)

    def _clear(self, start: int, size_bytes: int) -> None:
        length = TABLE_MIB * MIB
        for position in (start, start + max(0, size_bytes - length)):
            if os.pread(self._descriptor, length, position).strip(b"\0"):  # a hole stays one
                self.write(position, bytes(min(length, self.size_bytes - position)))

    def write(self, position: int, data: bytes) -> None:
        """Write bytes to a place. Raises OSError."""
        while data:
            written = os.pwrite(self._descriptor, data, position)
            position, data = position + written, data[written:]

    def flush(self) -> None:
        """Have everything written out. Raises OSError."""
        os.fsync(self._descriptor)

    def announce(self) -> None:
        """Have the kernel know the partitions of the new table. Raises ImageError."""
        if self.is_device:
            run(["partx", "--update", self.path], f"cannot have the kernel look at '{self.path}' again")


@contextlib.contextmanager
def opened(path: str) -> Iterator[Disk]:
    """Open a whole disk, or a file, and keep others away from it. Raises DeviceError."""
    descriptor = _open(path)
    try:
        _refuse_what_is_no_disk(path, os.fstat(descriptor))
        _lock(path, descriptor)
        disk = Disk(os.path.realpath(path), descriptor, path)
        try:
            yield disk
        finally:
            disk.release()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def created(path: str, size_mib: int, name: str) -> Iterator[Disk]:
    """Make an empty file of this size, also in the place of one that was left over; it goes with an error.

    Raises DeviceError and OSError.
    """
    descriptor = _open(path, os.O_CREAT | os.O_NOFOLLOW)
    try:
        _lock(path, descriptor)
        if not _is_at(path, descriptor):
            raise DeviceError(
                f"cannot install on '{name}': another installation has made it meanwhile",
                hint="take another name, or remove it",
            )
        try:
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, size_mib * MIB)
            yield Disk(path, descriptor, name)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise
    finally:
        os.close(descriptor)


def _is_at(path: str, descriptor: int) -> bool:
    """Tell whether a path still is that of an open file: whoever had it locked may have renamed it."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open(path: str, flags: int = 0) -> int:
    hints = {
        errno.ENOENT: "list the disks with: lsblk; for a new file: --size MIB",
        errno.EACCES: "run it as root",
        errno.EROFS: "it can only be read: is it write-protected?",
    }
    try:
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    except OSError as error:
        raise DeviceError(
            f"cannot install on '{path}': {error.strerror}",
            hint=hints.get(error.errno or 0, "list the disks with: lsblk"),
        ) from None


def _refuse_what_is_no_disk(path: str, status: os.stat_result) -> None:
    if not (stat.S_ISBLK(status.st_mode) or stat.S_ISREG(status.st_mode)):
        raise DeviceError(
            f"cannot install on '{path}': it is neither a block device nor a file",
            hint="list the disks with: lsblk",
        )
    if not stat.S_ISBLK(status.st_mode):
        return
    place = os.path.realpath(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
    if os.path.exists(f"{place}/partition"):
        disk = os.path.basename(os.path.dirname(place))
        raise DeviceError(
            f"cannot install on '{path}': it is a partition, and a system takes a whole disk",
            hint=f"--target /dev/{disk}",
        )


def _lock(path: str, descriptor: int) -> None:
    """Lock a disk as systemd asks for (Locking Block Device Access): udev does not look at it meanwhile."""
    deadline = time.monotonic() + LOCK_SEC
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise DeviceError(
                    f"cannot install on '{path}': another program has locked it",
                    hint=f"see which: lslocks, fuser -v {path}",
                ) from None
            time.sleep(0.1)
        else:
            return


def _json(said: str) -> Any:
    """Read what a program says in JSON, below what it warns of. Raises ValueError."""
    return json.loads(said[said.index("{") :])


def _named(kind: str, label: str) -> str:
    return f"{kind} '{printable(label)}'" if label else kind
