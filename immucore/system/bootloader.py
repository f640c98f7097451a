"""GRUB, put onto a disk without grub-install: its image with the whole menu inside, for EFI and for BIOS.

grub-install needs the firmware that it installs for, mounted file systems and root. An image of
grub-mkimage needs none of that: for EFI it is one file on the ESP, for BIOS it lies in a partition of its
own, and the first sector of the disk knows where. The menu is in a memdisk in it: no file system that is
lost or full takes it away.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
from importlib import resources
from typing import TYPE_CHECKING

from immucore.system.errors import ImageError
from immucore.system.programs import run

if TYPE_CHECKING:
    from immucore.system.disks import Disk
    from immucore.system.partitions import Partition

DIRECTORY = "/usr/lib/grub"
PLATFORMS = {"efi": ("x86_64-efi",), "bios": ("i386-pc",), "both": ("x86_64-efi", "i386-pc")}
PACKAGES = {"x86_64-efi": "grub-efi-amd64-bin", "i386-pc": "grub-pc-bin"}  # Debian's
EFI_FILE = "EFI/BOOT/BOOTX64.EFI"  # what any firmware starts from a disk that it knows nothing of
MENU = "boot/grub/grub.cfg"
# What grub.cfg uses, and then what is for grubcustom and for who types at GRUB's prompt. Nothing is loaded
# later: no file system has the rest.
MODULES = (
    *("boot", "configfile", "echo", "eval", "ext2", "fat", "gzio", "halt", "linux", "loadenv", "loopback"),
    *("memdisk", "minicmd", "multiboot", "normal", "part_gpt", "reboot", "regexp", "search", "search_label"),
    *("serial", "sleep", "squash4", "tar", "terminal", "test"),
    *("chain", "ls", "part_msdos", "probe", "search_fs_file", "search_fs_uuid", "true"),
)
PLATFORM_MODULES = {"x86_64-efi": ["all_video"], "i386-pc": ["biosdisk"]}
SECTOR_BYTES = 512
# GRUB 2.06: include/grub/i386/pc/boot.h, include/grub/offsets.h; what util/setup.c writes there.
BOOT_CODE_BYTES = 440  # of the first sector; the disk's signature and the protective table come behind
CORE_SECTOR_AT = 0x5C  # boot.img: where the core image begins
DRIVE_CHECK_AT = 0x66  # boot.img: a jump over a workaround for BIOSes that name the disk wrongly
NEXT_SECTOR_AT = 0x1F4  # the core image's own first sector: where it goes on


def require(firmware: str) -> None:
    """See to it, before anything is written, that GRUB's modules are installed. Raises ImageError."""
    missing = [
        each for each in PLATFORMS[firmware] if not os.path.exists(f"{DIRECTORY}/{each}/{MODULES[0]}.mod")
    ]
    if missing:
        raise ImageError(
            f"cannot make the boot loader: there is no {DIRECTORY}/{missing[0]}",
            hint=f"install {' '.join(PACKAGES[each] for each in missing)}",
        )


def menu() -> bytes:
    """Return the grub.cfg that is part of this program."""
    return resources.files("immucore.system").joinpath("grub.cfg").read_bytes()


def make(platform: str, config: bytes, target: str) -> None:
    """Make GRUB's image for a platform in the file `target`; `config` is its menu. Raises ImageError."""
    memdisk = f"{target}.memdisk"
    with tarfile.open(memdisk, "w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(MENU)
        member.size = len(config)
        archive.addfile(member, io.BytesIO(config))
    argv = ["grub-mkimage", "-O", platform, "-d", f"{DIRECTORY}/{platform}", "-o", target]
    argv += ["--memdisk", memdisk, "--prefix", f"(memdisk)/{os.path.dirname(MENU)}"]
    run([*argv, *MODULES, *PLATFORM_MODULES[platform]], "cannot make the boot loader")
    os.unlink(memdisk)


def efi_tree(config: bytes, directory: str) -> None:
    """Make in `directory` what the ESP holds. Raises ImageError."""
    target = os.path.join(directory, EFI_FILE)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    make("x86_64-efi", config, target)


def write_bios(disk: Disk, partition: Partition, config: bytes, work: str) -> None:
    """Write GRUB's core image to its partition, and to the first sector the code that starts it.

    No BIOS starts that code as long as there is no table behind it. Raises ImageError and OSError.
    """
    target = os.path.join(work, "core.img")
    make("i386-pc", config, target)
    with open(target, "rb") as core, open(f"{DIRECTORY}/i386-pc/boot.img", "rb") as boot:
        code, image = patched(boot.read(), core.read(), partition.offset_bytes // SECTOR_BYTES)
    disk.write(partition.offset_bytes, image)  # grub-mkimage makes none that has more than 480 KiB
    disk.write(0, code)


def patched(boot: bytes, core: bytes, first_sector: int) -> tuple[bytes, bytes]:
    """Tell GRUB's boot code and its core image where the latter lies: from `first_sector` of the disk on."""
    code, rest = bytearray(boot[:BOOT_CODE_BYTES]), bytearray(core)
    struct.pack_into("<Q", code, CORE_SECTOR_AT, first_sector)
    code[DRIVE_CHECK_AT : DRIVE_CHECK_AT + 2] = b"\x90\x90"  # nop: do the workaround
    struct.pack_into("<Q", rest, NEXT_SECTOR_AT, first_sector + 1)
    return bytes(code), bytes(rest)
