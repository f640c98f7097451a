"""`immucore install`: a disk, or a file that is one, with all that a machine boots from."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from typing import TYPE_CHECKING

from immucore.errors import CmdlineError, DeviceError, Interrupted
from immucore.system import (
    bootloader,
    disks,
    fakeroot,
    images,
    installation,
    partitions,
    programs,
    sources,
)
from immucore.system.console import Console
from immucore.values import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from immucore.cli import Commands
    from immucore.system.disks import Disk
    from immucore.system.installation import Made
    from immucore.system.partitions import Partition

PROGRAMS = ("blkid", "e2fsck", "grub-mkimage", "mcopy", "mke2fs", "mkfs.vfat", "partx", "sfdisk", "wipefs")
EFI = "/sys/firmware/efi"  # it is there if this machine was started by one
SCRATCH = "/var/tmp"  # noqa: S108  a large tree has room there; in it is a directory of our own


class Request(Record):
    """What somebody has asked for; `size_mib` is 0 where the target is there already."""

    target: str
    size_mib: int
    firmware: str
    sizes: dict[str, int]
    fstype: str
    oem: tuple[str, ...]
    wipe: bool
    scratch: str  # a directory

    @property
    def failure(self) -> str:
        """How messages begin."""
        return f"cannot install on '{self.target}'"


def add_parser(commands: Commands) -> None:
    """Add the command."""
    text = "put a system with all its partitions on a disk, or make a file that is such a disk"
    command = commands.add_parser("install", help=text, description=f"{text.capitalize()}.")
    command.set_defaults(run=install)
    add = command.add_argument
    add("--target", required=True, metavar="DISK", help="a whole disk, /dev/X, or a file")
    add("--size", type=int, default=0, metavar="MIB", help="the target is a new file of this size")
    text = "what starts it; default: of a disk this machine's, of a file both"
    add("--firmware", choices=sorted(partitions.FIRMWARE), help=text)
    text = f"the size of a partition: {', '.join(partitions.DEFAULT_MIB)}; repeatable"
    add("--partition", action="append", default=[], metavar="NAME=MIB", help=text)
    text = f"of the images: {' or '.join(images.FSTYPES)}; default: {images.EXT4}"
    add("--filesystem", default=images.EXT4, metavar="TYPE", help=text)
    text = "a file to put on OEM, such as a cloud-init file; repeatable"
    add("--oem", action="append", default=[], metavar="FILE", help=text)
    add("--wipe", action="store_true", help="erase what is on the target")
    text = f"where images are made; default: beside a file, {SCRATCH} for a disk"
    add("--scratch", default="", metavar="DIR", help=text)
    add("--json", action="store_true", help="for programs: a JSON object a line")
    text = "dir:/path, tar:/path, file:/path/image or oci:registry/image:tag"
    command.add_argument("source", metavar="SOURCE", help=text)


def install(arguments: argparse.Namespace) -> int:
    """Install. Raises ImmucoreError."""
    request = _request(arguments)
    source = sources.parse(arguments.source)
    images.check_fstype(request.fstype)
    programs.require(PROGRAMS, request.failure)
    bootloader.require(request.firmware)
    fakeroot.enter(request.failure)
    console = Console(as_json=arguments.json)
    with _stoppable(request), _target(request) as disk:
        layout = partitions.layout(request.firmware, request.sizes, disk.size_mib, request.target)
        _refuse(disk, request, layout)
        os.umask(0o022)  # for what becomes part of the disk; the file itself has the caller's
        with tempfile.TemporaryDirectory(prefix="immucore.", dir=request.scratch) as work:
            made = installation.make(source, request.fstype, work, console)
            installation.stage(made, request.oem, layout, work)
            for note in installation.check_room(layout, made, work):
                console.say(f"note: {note}")
            installation.write(disk, layout, work, console)
    _tell(console, request, layout, made)
    return 0


def _request(arguments: argparse.Namespace) -> Request:
    """Read what was asked for. Raises CmdlineError."""
    target = arguments.target
    is_device = target.startswith("/dev/")
    native = "efi" if os.path.exists(EFI) else "bios"
    scratch = arguments.scratch or (SCRATCH if is_device else os.path.dirname(os.path.abspath(target)))
    if not os.path.isdir(scratch) or not os.access(scratch, os.W_OK):
        raise CmdlineError(
            f"cannot make images in '{scratch}': it is no directory that can be written to",
            hint="--scratch DIR",
        )
    if arguments.size < 0 or (arguments.size and is_device):
        raise CmdlineError(f"cannot give '{target}' a size", hint="--size is for a new file, in MiB")
    return Request(
        target=target,
        size_mib=arguments.size,
        firmware=arguments.firmware or (native if is_device else "both"),
        sizes=dict(_size(word) for word in arguments.partition),
        fstype=arguments.filesystem,
        oem=_oem(arguments.oem),
        wipe=arguments.wipe,
        scratch=scratch,
    )


def _size(word: str) -> tuple[str, int]:
    name, separator, size = word.partition("=")
    if not (separator and size.isascii() and size.isdigit()):
        raise CmdlineError(
            f"cannot read '{word}': it has to be the name of a partition and its size in MiB",
            hint="--partition state=2048",
        )
    return name, int(size)


def _oem(paths: Sequence[str]) -> tuple[str, ...]:
    names = [installation.ENVIRONMENT]
    for path in paths:
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise CmdlineError(f"cannot read '{path}': it is no file that can be read", hint="--oem FILE")
        names.append(os.path.basename(path))
        if names.count(names[-1]) > 1:
            raise CmdlineError(
                f"cannot put '{path}' on OEM: there already is a {names[-1]}", hint="give it another name"
            )
    return tuple(paths)


@contextlib.contextmanager
def _stoppable(request: Request) -> Iterator[None]:
    """Clean up after SIGTERM and SIGHUP too, as after Ctrl-C."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    kept = [(number, signal.signal(number, signal.default_int_handler)) for number in signals]
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped: nothing is installed on '{request.target}'") from None
    finally:
        for number, handler in kept:
            signal.signal(number, handler)


@contextlib.contextmanager
def _target(request: Request) -> Iterator[Disk]:
    """Open the disk, or make the file, which gets its name when it is complete. Raises DeviceError."""
    if not request.size_mib:
        with disks.opened(request.target) as disk:
            yield disk
        return
    if os.path.lexists(request.target):
        raise DeviceError(
            f"{request.failure}: it is there already, and --size makes a new file",
            hint="leave --size out to install into it, or remove it",
        )
    partial = f"{request.target}.partial"
    with disks.created(partial, request.size_mib) as disk:
        try:
            yield disk
            os.rename(partial, request.target)
        except BaseException:
            os.unlink(partial)
            raise


def _refuse(disk: Disk, request: Request, layout: Sequence[Partition]) -> None:
    """Raise DeviceError for a disk that is in use, that holds something, or that no BIOS starts from."""
    if users := disk.users():
        raise DeviceError(
            f"{request.failure}: it is in use: {', '.join(users)}",
            hint="end that first: umount, swapoff, losetup --detach, vgchange -an; or take another disk",
        )
    content = disk.content()
    if content and not request.wipe:
        raise DeviceError(
            f"{request.failure}: it is not empty: {', '.join(content)}",
            hint="if all of that may go: --wipe",
        )
    if disk.sector_bytes != bootloader.SECTOR_BYTES and any(each.name == "bios" for each in layout):
        raise DeviceError(
            f"{request.failure}: a BIOS starts from no disk with sectors of {disk.sector_bytes} bytes",
            hint="--firmware efi",
        )


def _tell(
    console: Console, request: Request, layout: Sequence[Partition], made: Made
) -> None:
    sizes = ", ".join(f"{each.name} {each.size_mib}" for each in layout)
    console.result(
        f"installed on '{request.target}' for firmware {request.firmware}; MiB: {sizes}",
        target=request.target,
        firmware=request.firmware,
        partitions=[dict(each.items()) for each in layout],
        images={slot: entry.image_id for slot, entry in made.entries.items()},
    )
