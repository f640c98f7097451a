"""Whether a tree is a system that the boot loader can start: what is to be in every image."""

from __future__ import annotations

import os
import re
import stat
import struct

from immucore import observe, syscalls
from immucore.errors import MountError
from immucore.system.errors import ImageError

BOOTARGS = "etc/cos/bootargs.cfg"  # GRUB sources it: `set kernel=`, `set initramfs=`, `set kernelcmd=`
_ASSIGNMENT = re.compile(r"""^\s*set\s+(\w+)=["']?([^"'\s]*)["']?""", re.MULTILINE)
_MAX_BYTES = 1 << 16
_X86_MAGIC, _X86_VERSION = 0x202, 0x20E  # linux/Documentation/x86/boot.rst


def check(tree: str) -> None:
    """Look for os-release, an init, the kernel and initramfs of BOOTARGS, and that kernel's modules.

    Raises ImageError.
    """
    top = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        observe.check_bootable(top, tree, "", "")
        for kernel in _named(top):
            release = _release(top, kernel)
            if not any(_exists(top, f"{lib}/modules/{release}") for lib in ("usr/lib", "lib")):
                raise _lacks(f"no lib/modules/{release}, for its kernel {kernel}")
    except MountError as error:
        lacks = error.message.rpartition(": there is no ")[2].removesuffix(" in it")
        raise _lacks(f"no {lacks.removeprefix('an ')}") from None
    finally:
        os.close(top)


def _lacks(what: str) -> ImageError:
    return ImageError(
        f"cannot make an image that boots: there is {what} in it", hint="correct the source of the image"
    )


def _named(top: int) -> list[str]:
    """Give the kernels that BOOTARGS names, which are there, and so are the initramfs images."""
    values = _ASSIGNMENT.findall(_read(top, BOOTARGS))
    for name in ("kernel", "initramfs"):
        named = [value for key, value in values if key == name]
        if not named:
            raise _lacks(f"no 'set {name}=' in /{BOOTARGS}")
        for path in named:
            if "$" not in path and not _is_file(top, path):
                raise _lacks(f"no {path}, which /{BOOTARGS} has for {name},")
    return [value for key, value in values if key == "kernel" and "$" not in value]


def _read(top: int, path: str) -> str:
    if not _is_file(top, path):
        raise _lacks(f"no /{path}, from which the boot loader has the kernel,")
    descriptor = syscalls.openat2(top, path, os.O_RDONLY)
    try:
        return os.read(descriptor, _MAX_BYTES).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


def _exists(top: int, path: str) -> bool:
    try:
        os.close(syscalls.openat2(top, path, os.O_PATH))
    except OSError:
        return False
    return True


def _is_file(top: int, path: str) -> bool:
    try:
        descriptor = syscalls.openat2(top, path, os.O_PATH)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _release(top: int, kernel: str) -> str:
    """Tell the release of a kernel: from the header of an x86 one, else from the name of its file."""
    descriptor = syscalls.openat2(top, kernel, os.O_RDONLY)
    try:
        head = os.pread(descriptor, _MAX_BYTES, 0)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)
    if head[_X86_MAGIC : _X86_MAGIC + 4] == b"HdrS" and len(head) >= _X86_VERSION + 2:
        (offset,) = struct.unpack_from("<H", head, _X86_VERSION)
        words = head[0x200 + offset :].partition(b"\0")[0].split()
        if words:
            return words[0].decode("ascii", "replace")
    return name.partition("-")[2]
