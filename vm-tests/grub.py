"""Boots real GRUB in QEMU without any Linux: the images hold a kernel that tells what it was given.

A boot takes two to three seconds. The disk is made anew for each, from values; what is kept is the
environment block.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from derivative import EXT4, run
from machine import FIRMWARE, VARIABLES, Action, Guest, drive

from immucore.system import bootloader

KERNEL = Path(__file__).with_name("guest") / "kernel.s"
MIB = 2**20
QEMU = "qemu-system-x86_64 -nodefaults -no-user-config -machine q35 -display none -no-reboot -m 256"
SIZES_MIB = {"efi": 16, "oem": 4, "recovery": 8, "state": 16}
LIMIT_S = 60.0
BLOCK_BYTES = 1024

Block = bytes | None  # None: there is no such file


@dataclass(frozen=True)
class Image:
    """An image: its id, and what else is not as it should be. Its kernel calls itself by its `name`."""

    name: str
    image_id: str = ""
    fstype: str = "ext4"
    kernelcmd: str = "quiet"
    without: tuple[str, ...] = ()
    zeroed: bool = False


@dataclass
class Computer:
    """A disk with a boot loader and images, as values. A boot changes the environment block, and nothing."""

    work: Path
    active: Image | None = None
    passive: Image | None = None
    recovery: Image | None = None
    block: Block = None
    platform: str = "i386-pc"
    oem: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # partitions
    recovery_name: str = "recovery.img"
    stick: Mapping[str, str] | None = None  # another disk, labelled COS_OEM: what it holds
    console: str = ""
    _oem: int = 0  # where the partition begins

    def boot(self, keys: str = "", limit_s: float = LIMIT_S) -> Started | None:
        """Switch it on; returns what was started, None where GRUB waits for somebody.

        `keys` are typed when the menu is there.
        """
        disk = self._disk()
        arguments = [*QEMU.split(), "-accel", "tcg,tb-size=64", *self._stick()]
        arguments += drive(disk, "disk0", "raw")
        if self.stick is None or self.platform != "x86_64-efi":  # whose firmware shows no other disk then
            arguments[-1] += ",bootindex=0"
        if self.platform == "x86_64-efi":
            variables = shutil.copy(VARIABLES, self.work / "variables")
            arguments += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}"]
            arguments += ["-drive", f"if=pflash,unit=1,format=raw,file={variables}"]
        when: list[tuple[float | str, Action]] = [
            (f"(?s)(Press any key.*){{{number}}}", lambda guest: guest.type(" ")) for number in range(1, 9)
        ]
        if keys:
            when.append(("will be executed automatically", lambda guest: guest.type(keys)))
        with Guest(self.work / "console", arguments) as guest:
            guest.run(limit_s, when)
            self.console = guest.console
        self.block = self._environment(disk)
        return started(self.console)

    def _stick(self) -> list[str]:
        """Make the other disk, where there is one, and return QEMU's arguments for it."""
        if self.stick is None:
            return []
        tree, target = self.work / "stick.d", self.work / "stick"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir()
        for path, text in self.stick.items():
            (tree / path).write_text(text)
        target.unlink(missing_ok=True)
        ext4(target, tree, "COS_OEM", SIZES_MIB["oem"])
        return drive(target, "stick", "raw")

    def _disk(self) -> Path:
        """Make the disk."""
        disk = self.work / "disk"
        names = [name for name in ("bios", *SIZES_MIB) if name not in self.without]
        sizes = {"bios": 1, **SIZES_MIB}
        offsets, end = {}, MIB
        for name in names:
            offsets[name] = end
            end += sizes[name] * MIB
        disk.unlink(missing_ok=True)
        with disk.open("wb") as stream:
            stream.truncate(end + MIB)
        types = {"bios": "21686148-6449-6E6F-744E-656564454649", "efi": "uefi"}
        table = "label: gpt\nunit: sectors\n" + "".join(
            f"start={offsets[name] // 512}, size={sizes[name] * 2048}, name={name}, "
            f"type={types.get(name, 'linux')}\n"
            for name in names
        )
        run("sfdisk", "--quiet", disk, input=table)
        for name in names:
            if tree := self._tree(name):
                ext4(disk, tree, f"COS_{name.upper()}", sizes[name], offsets[name])
        self._install(disk, offsets)
        self._oem = offsets.get("oem", 0)
        self._write_environment(disk)
        return disk

    def _tree(self, name: str) -> Path | None:
        """Make the tree of what a partition holds."""
        if name not in ("oem", "recovery", "state"):
            return None
        top = self.work / name
        shutil.rmtree(top, ignore_errors=True)
        (top / "cOS").mkdir(parents=True)
        if name == "oem":
            if self.block is not None:
                (top / "grubenv").write_bytes(b"#" * len(self.block))
            for path, text in self.oem.items():
                (top / path).write_text(text)
        elif name == "recovery":
            self._image(top / "cOS" / self.recovery_name, self.recovery)
        else:
            self._image(top / "cOS/active.img", self.active)
            self._image(top / "cOS/passive.img", self.passive)
        return top

    def _image(self, path: Path, image: Image | None) -> None:
        """Make the file of an image; each is made once, and copied."""
        if image is None:
            return
        if image.zeroed:
            path.write_bytes(bytes(MIB))
            return
        made = self.work / f"image-{image!r:.200}".replace("/", "_")
        if not made.exists():
            tree = self.work / "tree"
            shutil.rmtree(tree, ignore_errors=True)
            arguments = (
                f'set kernel=/boot/vmlinuz\nset initramfs=/boot/initrd\nset kernelcmd="{image.kernelcmd}"\n'
            )
            files = {
                "boot/vmlinuz": kernel(self.work),
                "boot/initrd": f"initramfs of {image.name}".encode(),
                "etc/cos/bootargs.cfg": arguments.encode(),
                "usr/lib/cos/image.cfg": f"set image_id={image.image_id}\n".encode(),
            }
            for name, content in files.items():
                if name not in image.without:
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    (tree / name).write_bytes(content)
            if image.fstype == "ext4":
                ext4(made, tree, "COS_ACTIVE", 1)
            else:
                run("mksquashfs", tree, made, "-quiet", "-no-progress", "-comp", "gzip")
        shutil.copy(made, path)

    def _install(self, disk: Path, offsets: Mapping[str, int]) -> None:
        """Put the boot loader on the disk: GRUB's image with the menu in it."""
        loader = boot_loader(self.work, self.platform)
        if self.platform == "x86_64-efi":
            start = offsets["efi"]
            blocks = SIZES_MIB["efi"] * 1024
            run("mkfs.vfat", "-F", "16", f"--offset={start // 512}", disk, str(blocks))
            run("mmd", "-i", f"{disk}@@{start}", "::/EFI", "::/EFI/BOOT")
            run("mcopy", "-i", f"{disk}@@{start}", loader, f"::/{bootloader.EFI_FILE}")
            return
        boot = Path(f"{bootloader.DIRECTORY}/i386-pc/boot.img").read_bytes()
        code, core = bootloader.patched(boot, loader.read_bytes(), offsets["bios"] // 512)
        with disk.open("r+b") as stream:
            stream.write(code)
            stream.seek(offsets["bios"])
            stream.write(core)

    def _place(self, disk: Path) -> int:
        """Find the environment block on the disk; 0 where there is none."""
        blocks = (
            run("debugfs", "-R", "blocks /grubenv", f"{disk}?offset={self._oem}").splitlines()[-1].split()
        )
        return self._oem + int(blocks[0]) * BLOCK_BYTES if blocks and blocks[0].isdigit() else 0

    def _write_environment(self, disk: Path) -> None:
        """Put the environment block into its place, where mke2fs would leave a hole for zeros."""
        if self.block and self._oem:
            with disk.open("r+b") as stream:
                stream.seek(self._place(disk))
                stream.write(self.block)

    def _environment(self, disk: Path) -> Block:
        """Read what GRUB has left in the environment block."""
        if not (self.block and self._oem):
            return self.block
        with disk.open("rb") as stream:
            stream.seek(self._place(disk))
            return stream.read(len(self.block))


@dataclass(frozen=True)
class Started:
    """What a kernel was given."""

    cmdline: str
    initramfs: str


def started(console: str) -> Started | None:
    """Find what the kernel has said on a console."""
    found = re.search(r"\nkernel: (.*)\ninitramfs: (.*)\nreset\n", console.replace("\r", ""))
    return Started(cmdline=found[1], initramfs=found[2]) if found else None


def ext4(target: Path, tree: Path, label: str, size_mib: int, offset: int = 0) -> None:
    """Make a small file system."""
    journal = () if size_mib >= 4 else ("-O", "^has_journal")
    words = ("-E", f"root_owner=0:0,offset={offset}", "-L", label, "-d", tree, target, f"{size_mib}M")
    run("mke2fs", "-q", "-F", *EXT4, *journal, "-b", str(BLOCK_BYTES), "-m", "0", *words)


@functools.cache
def kernel(work: Path) -> bytes:
    """Assemble the kernel."""
    run("as", "--32", "-o", work / "kernel.o", KERNEL)
    run("objcopy", "-O", "binary", "-j", ".text", work / "kernel.o", work / "kernel")
    return (work / "kernel").read_bytes()


@functools.cache
def boot_loader(work: Path, platform: str) -> Path:
    """Make GRUB's image, as an installation does."""
    target = work / f"grub.{platform}"
    bootloader.make(platform, bootloader.menu(), str(target))
    return target
