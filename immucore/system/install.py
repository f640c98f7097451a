"""`immucore install`: a disk, or a file that is one, with all that a machine boots from."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING

from immucore import files
from immucore.errors import DeviceError
from immucore.system import (
    bootloader,
    deployment,
    disks,
    fakeroot,
    images,
    partitions,
    programs,
    sources,
    stopping,
)
from immucore.system.errors import ImageError, told
from immucore.system.oci import Options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from immucore.system.console import Console
    from immucore.system.disks import Disk
    from immucore.system.install_command import Request
    from immucore.system.partitions import Partition
    from immucore.system.sources import Source

PROGRAMS = ("blkid", "e2fsck", "grub-mkimage", "mcopy", "mke2fs", "mkfs.vfat", "partx", "sfdisk", "wipefs")


def install(request: Request, console: Console) -> int:
    """Install. Raises ImmucoreError."""
    registry = Options(authfile=request.authfile, cert_dir=request.cert_dir, tls_verify=request.tls_verify)
    source = sources.parse(request.source, registry)
    images.check_fstype(request.fstype)
    programs.require((*PROGRAMS, *images.BUILDERS[request.fstype]), request.failure)
    bootloader.require(request.firmware)
    fakeroot.enter(request.failure)
    try:
        with stopping.stoppable(f"nothing was installed on '{request.target}'"), _target(request) as disk:
            _install(request, source, disk, console)
    except OSError as error:
        raise ImageError(f"{request.failure}: {told(error)}") from None
    return 0


def _install(request: Request, source: Source, disk: Disk, console: Console) -> None:
    layout = partitions.layout(request.firmware, request.sizes, disk.size_mib, request.target)
    _refuse(disk, request, layout)
    os.umask(0o022)  # for what becomes part of the disk; the file itself has the caller's
    with tempfile.TemporaryDirectory(prefix="immucore.", dir=request.scratch) as work:
        made = deployment.make(source, request.fstype, work, console)
        deployment.stage(made, request.oem, layout, work)
        for note in deployment.check_room(layout, made, work):
            console.say(f"note: {note}")
        _refuse(disk, request, layout)  # once more: making images has taken minutes
        deployment.write(disk, layout, work, console)
    sizes = ", ".join(f"{each.name} {each.size_mib}" for each in layout)
    console.result(
        f"installed on '{request.target}' for firmware {request.firmware}; MiB: {sizes}",
        target=request.target,
        firmware=request.firmware,
        partitions=[dict(each.items()) for each in layout],
        images={slot: entry.image_id for slot, entry in made.entries.items()},
    )


@contextlib.contextmanager
def _target(request: Request) -> Iterator[Disk]:
    """Open the disk, or make the file, which gets its name when it is complete. Raises DeviceError."""
    if not request.size_mib:
        with disks.opened(request.target) as disk:
            yield disk
        return
    partial = f"{request.target}.partial"
    with disks.created(partial, request.size_mib, name=request.target) as disk:
        if os.path.lexists(request.target):  # nobody else makes it as long as `partial` is locked
            raise DeviceError(
                f"{request.failure}: it is there already, and --size makes a new file",
                hint="leave --size out to install into it, or remove it",
            )
        yield disk
        os.rename(partial, request.target)
    files.fsync(os.path.dirname(os.path.abspath(request.target)))


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
