"""Image files: which one it is, making one of a tree, and looking whether it holds what it is to hold.

Of an image everything is checked before it takes another one's place. GRUB 2.06 reads it too, so its file
system is ext4 without what GRUB does not know, or squashfs compressed with gzip.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from typing import TYPE_CHECKING

from immucore import files, process, superblock, syscalls
from immucore.errors import CmdlineError
from immucore.log import printable
from immucore.system import bootable, content
from immucore.system.content import BLOCK_BYTES, IDENTITY
from immucore.system.errors import ImageError, UnreadableError
from immucore.system.programs import FAKEROOT, run, silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from immucore.system.programs import Advance

EXT4, SQUASHFS = "ext4", "squashfs"
FSTYPES = (EXT4, SQUASHFS)
BUILDERS = {EXT4: ("mke2fs",), SQUASHFS: ("mksquashfs",)}  # the programs that make one
# All that GRUB 2.06 reads, by name: what /etc/mke2fs.conf adds one day it may not. No journal: an image is
# only read.
EXT4_FEATURES = (
    "none,64bit,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,"
    "metadata_csum,sparse_super"
)
_LINE = re.compile(r"^set image_id=([0-9a-f]{16}_[0-9a-f]{8})\s*$", re.MULTILINE)
_IDENTITY_SEC = 60.0
_SAID_LINES = 2  # of a reader, the last ones
_SIGNALLED = 128  # and the number of the signal that has ended a program: its status
_NO_SUCH_FILE = ("File not found", "is not a directory", "is a directory")  # debugfs
_GROUP_BLOCKS, _INODES_IN_BLOCK = 8 * BLOCK_BYTES, BLOCK_BYTES // 256
_SLACK_BLOCKS = 1024  # 4 MiB, for what is rounded up
# linux/fiemap.h: start, length, flags, mapped, count; start, length, flags of each; ioctl() takes 1024 bytes
_FIEMAP, _EXTENT, _EXTENTS = struct.Struct("=QQIII4x"), struct.Struct("=Q8xQ16xI12x"), 17
_FS_IOC_FIEMAP, _FIEMAP_SYNC, _UNWRITTEN = 0xC020660B, 1, 0x800
_ZEROS = bytes(1 << 20)
_FULL = "free space on the file system that is to hold it"


def running(root: str = "/") -> str | None:
    """Give the identity of the image that the system at `root` runs from; None where it has none."""
    try:
        with open(os.path.join(root, IDENTITY), encoding="utf-8", errors="replace") as file:
            return parse_identity(file.read(4096))
    except OSError:
        return None


def parse_identity(text: str) -> str | None:
    """Find the identity in the text of an IDENTITY file."""
    found = _LINE.search(text)
    return found[1] if found else None


def identity(image: str) -> str | None:
    """Give the identity of an image file, which is not mounted for that; None where it has none.

    Raises UnreadableError where its file system is damaged, and ImageError where nobody can tell.
    """
    try:
        fstype = superblock.identify(image).fstype
    except OSError:
        return None
    readers = {
        EXT4: ["debugfs", "-R", f"cat /{IDENTITY}", image],
        SQUASHFS: ["unsquashfs", "-cat", image, IDENTITY],
    }
    if fstype not in readers:
        return None
    try:
        done = process.run(readers[fstype], timeout_sec=_IDENTITY_SEC)
    except OSError as error:
        raise ImageError(
            f"cannot read '{image}': there is no {readers[fstype][0]}", hint=str(error)
        ) from None
    found = parse_identity(done.output)
    said = printable("; ".join(done.output.strip().splitlines()[-_SAID_LINES:]))
    failure = f"cannot read which image '{image}' is"
    if done.status == process.TIMED_OUT or done.status > _SIGNALLED:
        raise ImageError(
            f"{failure}: {said or f'{readers[fstype][0]} ended with status {done.status}'}",
            hint="look at what the kernel says of the disk: dmesg | tail",
        )
    if not found and not _is_readable(fstype, done, image):
        raise UnreadableError(f"{failure}: {said}", hint="put another one in its place: immucore upgrade")
    return found


def _is_readable(fstype: str, done: process.Finished, image: str) -> bool:
    """Tell by what a reader said whether it has come as far as looking for the file.

    debugfs ends well whatever happens; unsquashfs ends with 1 where a file system is damaged, and with 2
    where there is no such file.
    """
    if fstype == SQUASHFS:
        return done.status != 1
    complained = tuple(f"{what}: " for what in ("cat", f"/{IDENTITY}", image))
    said = any(line.startswith(complained) for line in done.output.splitlines())
    return not said or any(known in done.output for known in _NO_SUCH_FILE)


def new_identity(digest: str) -> str:
    """Name an image file that is about to be made of a tree with this digest (content.digest())."""
    return f"{digest}_{os.urandom(4).hex()}"


def check_fstype(fstype: str) -> None:
    """Raise CmdlineError for a file system that images cannot have."""
    if fstype in FSTYPES:
        return
    why = "GRUB 2.06 cannot read it" if fstype == "erofs" else "no image has it"
    raise CmdlineError(f"cannot make an image of type '{fstype}': {why}", hint="use ext4 or squashfs")


def build(
    tree: str, target: str, *, fstype: str, label: str, image_id: str, advance: Advance = silent
) -> None:
    """Make the image file `target`, which is not there yet, of a tree, and write it out to its disk.

    The tree is given the identity `image_id` first. `label` is for ext4. Raises ImageError, OSError, and
    CmdlineError for a type of file system that is none.
    """
    check_fstype(fstype)
    _identify(tree, image_id)
    room = content.room(tree)
    try:
        if fstype == EXT4:
            _build_ext4(tree, target, label, room, advance)
        else:
            _build_squashfs(tree, target, room, advance)
        files.fsync(target)
        files.fsync(os.path.dirname(target) or ".")
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        raise


def _identify(tree: str, image_id: str) -> None:
    """Write the identity into a tree, whose symlinks lead nowhere else."""
    *parts, name = IDENTITY.split("/")
    with contextlib.ExitStack() as opened:
        top = held = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, top)
        for number, part in enumerate(parts, 1):
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=held)
            held = syscalls.openat2(top, "/".join(parts[:number]), os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, held)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=held)
        written = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=held)
        opened.callback(os.close, written)
        os.write(written, f"set image_id={image_id}\n".encode())
        os.fchmod(written, 0o644)


def ext4_bytes(room: content.Room) -> int:
    """Tell how large an ext4 has to be for a tree, to a mebibyte: the tree, its own tables, and a little."""
    inodes = room.inodes + 11 + room.inodes // 64  # those that it reserves
    blocks = room.blocks + -(-inodes // _INODES_IN_BLOCK) + _SLACK_BLOCKS
    blocks += blocks // 256
    groups = -(-blocks // _GROUP_BLOCKS)
    blocks += groups * (2 + _INODES_IN_BLOCK)  # bitmaps; each group's part of the inode table is rounded up
    blocks += 8 * -(-groups * 64 // BLOCK_BYTES)  # the descriptors, of which there are backups
    return -(-blocks * BLOCK_BYTES >> 20 << 20)


def _build_ext4(tree: str, target: str, label: str, room: content.Room, advance: Advance) -> None:
    size_bytes = ext4_bytes(room)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # In full: in a sparse file on a full partition, what cannot be written is lost and nobody is told.
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        raise ImageError(
            f"cannot make '{target}' of {size_bytes >> 20} MiB: {error.strerror}", hint=_FULL
        ) from None
    finally:
        os.close(descriptor)
    inodes = room.inodes + 11 + room.inodes // 64
    argv = ["mke2fs", "-q", "-F", "-t", EXT4, "-O", EXT4_FEATURES, "-b", str(BLOCK_BYTES), "-I", "256"]
    argv += ["-m", "0", "-N", str(inodes), "-L", label, "-E", "nodiscard,lazy_itable_init=0", "-d", tree]
    failure = f"cannot make a file system of '{tree}' in '{target}'"
    run([*argv, target], failure, advance=advance, total_bytes=room.bytes)
    _fill(target)


def _fill(target: str) -> None:
    """Write zeros where nothing was written: GRUB 2.06 takes allocated blocks for what is on the disk."""
    descriptor = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, end in _unwritten(descriptor):
            for place in range(start, end, len(_ZEROS)):
                os.pwrite(descriptor, _ZEROS[: end - place], place)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):  # a tmpfs, which GRUB does not read
            raise
    finally:
        os.close(descriptor)


def _unwritten(descriptor: int) -> list[tuple[int, int]]:
    """List what of a file is allocated and was never written (fiemap.rst); lseek(2) would ask the cache."""
    found, position, size_bytes = [], 0, os.fstat(descriptor).st_size
    while position < size_bytes:
        asked = _FIEMAP.pack(position, size_bytes - position, _FIEMAP_SYNC, 0, _EXTENTS)
        answer = fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, asked + bytes(_EXTENT.size * _EXTENTS))
        mapped = _FIEMAP.unpack_from(answer)[3]
        if not mapped:
            break
        for number in range(mapped):
            start, length, flags = _EXTENT.unpack_from(answer, _FIEMAP.size + number * _EXTENT.size)
            position = start + length
            if flags & _UNWRITTEN:
                found.append((start, min(position, size_bytes)))
    return found


def _build_squashfs(tree: str, target: str, room: content.Room, advance: Advance) -> None:
    for path, entry in content.walk(tree):
        if any(name.startswith("system.") for name, _ in entry.xattrs):
            raise ImageError(
                f"cannot make a squashfs of '{tree}': '/{path}' has an ACL, and squashfs has none",
                hint="use ext4, or remove it from the source: setfacl --remove-all --remove-default",
            )
    argv = ["mksquashfs", tree, target, "-comp", "gzip", "-noappend", "-no-progress", "-quiet"]
    failure = f"cannot make a file system of '{tree}' in '{target}'"
    run(argv, failure, hint=_FULL, advance=advance, total_bytes=room.bytes)


def verify(image: str, tree: str, advance: Advance = silent) -> None:
    """Look whether an image holds what the tree does, and what booting it takes.

    By the reader of its file system, then file by file. Raises ImageError and OSError. Who is not root sees
    neither owners nor extended attributes.
    """
    fstype = superblock.identify(image).fstype
    if fstype == EXT4:
        run(["e2fsck", "-f", "-n", image], f"cannot use '{image}': its file system is damaged")
    with _opened(image, fstype) as (there, exact):
        bootable.check(there)
        total = content.room(tree).bytes
        found = content.difference(tree, there, exact=exact, advance=advance, total_bytes=total)
    if found:
        raise ImageError(
            f"cannot use '{image}': it does not hold what was put into it: {found}",
            hint="look at what the kernel says of the disk: dmesg | tail",
        )


@contextlib.contextmanager
def _opened(image: str, fstype: str) -> Iterator[tuple[str, bool]]:
    """Give the files of an image, and whether they are all that they are: only root can mount it."""
    if is_root():
        with mounted(image, fstype) as there:
            yield there, True
        return
    import tempfile  # and with it all of random, which no boot needs that is judged

    with tempfile.TemporaryDirectory(prefix=f"{image}.") as work:
        unpack(image, fstype, f"{work}/tree")
        yield f"{work}/tree", False


def is_root() -> bool:
    """Tell whether this is root for the kernel too, and not only for the C library."""
    return os.geteuid() == 0 and FAKEROOT not in os.environ


@contextlib.contextmanager
def mounted(image: str, fstype: str) -> Iterator[str]:
    """Mount an image read-only for as long as it is looked at. Raises ImageError."""
    import tempfile

    there = tempfile.mkdtemp(prefix="immucore.", dir="/run")
    try:
        options = "ro,loop,nosuid,nodev,noexec"
        run(["mount", "-t", fstype, "-o", options, image, there], f"cannot mount '{image}'")
        yield there
    finally:
        with contextlib.suppress(OSError):  # it is not mounted
            syscalls.umount(there, syscalls.MNT_DETACH)
        os.rmdir(there)


def unpack(image: str, fstype: str, target: str) -> None:
    """Read the files of an image into the new directory `target` without mounting it. Raises ImageError."""
    failure = f"cannot read '{image}'"
    if fstype == SQUASHFS:
        run(["unsquashfs", "-no-progress", "-quiet", "-dest", target, image], failure, hint=_FULL)
        return
    os.mkdir(target)
    said = run(["debugfs", "-R", f'rdump / "{target}"', image], failure)
    if "No space left" in said:  # debugfs ends well all the same
        raise ImageError(f"{failure}: No space left on device", hint=_FULL)
