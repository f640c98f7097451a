"""`immucore install`: its options."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from immucore.errors import CmdlineError
from immucore.system import image_commands, settings
from immucore.values import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from immucore.cli import Commands

EFI = "/sys/firmware/efi"  # it is there if this machine was started by one
MOST_MIB = 1 << 40  # what a file can have
SCRATCH = "/var/tmp"  # noqa: S108  a large tree has room there; in it is a directory of our own


class Request(Record):
    """What somebody has asked for; `size_mib` is 0 where the target is there already."""

    source: str
    target: str
    size_mib: int
    firmware: str
    sizes: dict[str, int]
    fstype: str
    oem: tuple[str, ...]
    wipe: bool
    scratch: str  # a directory
    authfile: str  # oci.Options, of upgrade.yaml
    cert_dir: str
    tls_verify: bool

    @property
    def failure(self) -> str:
        """How messages begin."""
        return f"cannot install on '{self.target}'"


def add_parser(commands: Commands) -> None:
    """Add the command."""
    from immucore.system.partitions import DEFAULT_MIB, FIRMWARE

    text = "put a system with all its partitions on a disk, or make a file that is such a disk"
    command = commands.add_parser("install", help=text, description=f"{text.capitalize()}.")
    command.set_defaults(run=_run)
    add = command.add_argument
    add("--target", required=True, metavar="DISK", help="a whole disk, /dev/X, or a file")
    add("--size", type=int, default=0, metavar="MIB", help="the target is a new file of this size")
    text = "what starts it; default: of a disk this machine's, of a file both"
    add("--firmware", choices=sorted(FIRMWARE), help=text)
    text = f"the size of a partition: {', '.join(DEFAULT_MIB)}; repeatable"
    add("--partition", action="append", default=[], metavar="NAME=MIB", help=text)
    add("--filesystem", default="ext4", metavar="TYPE", help="of the images: ext4, the default, or squashfs")
    text = "a file to put on OEM, such as a cloud-init file; repeatable"
    add("--oem", action="append", default=[], metavar="FILE", help=text)
    add("--wipe", action="store_true", help="erase what is on the target")
    text = f"where images are made; default: beside a file, {SCRATCH} for a disk"
    add("--scratch", default="", metavar="DIR", help=text)
    add("--json", action="store_true", help="for programs: a JSON object a line")
    text = "dir:/path, tar:/path, file:/path/image or oci:registry/image:tag"
    command.add_argument("source", metavar="SOURCE", help=text)


def _run(arguments: argparse.Namespace) -> int:
    from immucore.system import install
    from immucore.system.console import Console

    configured = settings.read()
    image_commands.check(configured)
    return install.install(request(arguments, configured), Console(as_json=arguments.json))


def request(arguments: argparse.Namespace, configured: dict[str, Any]) -> Request:
    """Read what was asked for. Raises CmdlineError."""
    target = arguments.target
    is_device = _is_block_device(target)
    if arguments.size and (is_device or _names_a_device(target) or not 0 < arguments.size <= MOST_MIB):
        raise CmdlineError(f"cannot give '{target}' a size", hint="--size is for a new file, in MiB")
    native = "efi" if os.path.exists(EFI) else "bios"
    scratch = arguments.scratch or (SCRATCH if is_device else os.path.dirname(os.path.abspath(target)))
    if not os.path.isdir(scratch) or not os.access(scratch, os.W_OK):
        raise CmdlineError(
            f"cannot make images in '{scratch}': it is no directory that can be written to",
            hint="--scratch DIR",
        )
    return Request(
        source=arguments.source,
        target=target,
        size_mib=arguments.size,
        firmware=arguments.firmware or (native if is_device else "both"),
        sizes=dict(_size(word) for word in arguments.partition),
        fstype=arguments.filesystem,
        oem=_oem(arguments.oem),
        wipe=arguments.wipe,
        scratch=scratch,
        authfile=configured.get("authfile", ""),
        cert_dir=configured.get("cert-dir", ""),
        tls_verify=configured.get("tls-verify", True),
    )


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _names_a_device(path: str) -> bool:
    """Tell a disk that is not there from a file that is to be made: in devtmpfs there are no files."""
    directory = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    return f"{directory}/".startswith("/dev/") and not f"{directory}/".startswith("/dev/shm/")  # noqa: S108


def _size(word: str) -> tuple[str, int]:
    name, separator, size = word.partition("=")
    if not (separator and size.isascii() and size.isdigit()):
        raise CmdlineError(
            f"cannot read '{word}': it has to be the name of a partition and its size in MiB",
            hint="--partition state=2048",
        )
    return name, int(size)


def _oem(paths: Sequence[str]) -> tuple[str, ...]:
    names = ["grubenv"]
    for path in paths:
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise CmdlineError(f"cannot read '{path}': it is no file that can be read", hint="--oem FILE")
        names.append(os.path.basename(path))
        if names.count(names[-1]) > 1:
            raise CmdlineError(
                f"cannot put '{path}' on OEM: there already is a {names[-1]}", hint="give it another name"
            )
    return tuple(paths)
