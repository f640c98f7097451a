"""A machine whose images can be upgraded: natively, on a real disk, booted by the real agent (native.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import native
import yaml

from immucore import bootcount, grubenv
from immucore.system import content, images

SIZES_MIB = {"oem": 8, "state": 96, "recovery": 48, "persistent": 16}
PROGRAM = (*native.SOURCE[:-2], "immucore.system")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
KERNEL = "6.1.0-test"
COMMANDS = {
    "active": "root=LABEL=COS_STATE cos-img/filename=/cOS/active.img",
    "passive": "root=LABEL=COS_STATE cos-img/filename=/cOS/passive.img",
    "recovery": "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.img",
}
LABELS = {"active": "COS_ACTIVE", "passive": "COS_PASSIVE", "recovery": "COS_SYSTEM"}
HOLDERS = {"active": "state", "passive": "state", "recovery": "recovery"}


Boot = Callable[[str], "Upgradable"]  # switches the machine off, and on again in a slot


def make_tree(root: Path, version: str) -> Path:
    """Make a tree that can be an image: every kind of file, and what the boot loader asks for."""
    native.make_tree(root, version)
    (root / "boot").mkdir()
    (root / f"boot/vmlinuz-{KERNEL}").write_bytes(b"a kernel")
    (root / "boot/vmlinuz").symlink_to(f"vmlinuz-{KERNEL}")
    (root / "boot/initrd").write_bytes(b"an initramfs")
    (root / f"usr/lib/modules/{KERNEL}").mkdir(parents=True)
    (root / "etc/cos/bootargs.cfg").write_text(
        'set kernel=/boot/vmlinuz\nset initramfs=/boot/initrd\nset kernelcmd="quiet"\n'
    )
    (root / "etc/version").write_text(version)
    for path, kind in (("etc/version", "etc_t"), ("boot", "boot_t"), ("boot/vmlinuz", "link_t")):
        label = f"system_u:object_r:{kind}:s0\0".encode()  # as libselinux writes it
        os.setxattr(root / path, "security.selinux", label, follow_symlinks=False)
    return root


def build(tree: Path, image: Path, slot: str, fstype: str = "ext4") -> str:
    """Make an image of a tree, and give its identity."""
    image_id = images.new_identity(content.digest(str(tree)))
    images.build(str(tree), str(image), fstype=fstype, label=LABELS[slot], image_id=image_id)
    return image_id


def make_disk(disk: Path, work: Path, versions: Mapping[str, str]) -> None:
    """Make a disk with an image in each of the slots of `versions`."""
    table = "label: gpt\n" + "".join(f"size={size}MiB, name={name}\n" for name, size in SIZES_MIB.items())
    with disk.open("wb") as file:
        file.truncate((sum(SIZES_MIB.values()) + 2) << 20)
    native.command("sfdisk", "--quiet", disk, stdin=table)
    parts = {name: work / "partitions" / name for name in SIZES_MIB}
    for part in parts.values():
        part.mkdir(parents=True)
    for name in ("state", "recovery"):
        (parts[name] / "cOS").mkdir()
    (parts["oem"] / "grubenv").write_bytes(grubenv.render({}))
    document: dict[str, Any] = {"state": {}, "recovery": {}}
    for slot, version in versions.items():
        tree = make_tree(work / slot, version)
        image_id = build(tree, parts[HOLDERS[slot]] / f"cOS/{slot}.img", slot)
        entry = {
            "image_id": image_id,
            "source": f"dir:/{version}",
            "digest": image_id[:16],
            "action": "install",
        }
        document[HOLDERS[slot]][slot] = entry
    for name in ("state", "recovery"):
        (parts[name] / "state.yaml").write_text(yaml.safe_dump(document))
    start_mib = 1
    for name, size in SIZES_MIB.items():
        label = native.PARTITIONS[name][0]
        native._make_ext(disk, size, label, parts[name], "-E", f"offset={start_mib << 20}", "-m", "0")
        start_mib += size
    shutil.rmtree(work)


class Ran:
    """What a command said."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of --json."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def result(self) -> dict[str, Any]:
        """The last of them."""
        assert self.lines[-1]["result"] is True, self.stdout + self.stderr
        return self.lines[-1]


class Upgradable:
    """A machine that is booted from one of its images; /sysroot is its root."""

    def __init__(self, machine: native.Machine, slot: str, program: Sequence[str]) -> None:
        self.machine, self.slot, self._program = machine, slot, program
        booted = machine.boot(COMMANDS[slot])
        assert booted.status == 0, booted.stderr
        assert booted.result["mode_booted"] == slot

    def start(self, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command of the booted system."""
        argv = self.machine.inside(*self._program, *words)
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
        )

    def run(self, *words: str | Path) -> Ran:
        """Run a command of the booted system to its end."""
        process = self.start(*words)
        stdout, stderr = process.communicate(timeout=120)
        return Ran(process.returncode, stdout, stderr)

    def values(self) -> dict[str, str]:
        """Read GRUB's environment block."""
        return grubenv.parse(self.machine.path("/sysroot/oem/grubenv").read_bytes())

    def set(self, *counts: bootcount.Count, **values: str) -> None:
        """Set what GRUB's environment block says of images, and other variables."""
        found = self.values()
        for count in counts:
            found = bootcount.written(found, count)
        self.machine.path("/sysroot/oem/grubenv").write_bytes(grubenv.render(found | values))

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """Look at what a partition holds, whoever has it mounted."""
        target = f"/machine/look-{name}"
        self.machine.path(target).mkdir(exist_ok=True)
        try:
            self.machine.run("mount", "-o", "ro", self.machine.part(name), target)
        except RuntimeError:  # somebody who was killed has left it writable
            self.machine.run("mount", self.machine.part(name), target)
        try:
            yield self.machine.path(target)
        finally:
            self.machine.run("umount", target)

    def images(self) -> dict[str, str | None]:
        """Give the identity of each image; None for one that is not whole, or is not there."""
        found: dict[str, str | None] = {}
        for slot, name in HOLDERS.items():
            with self.part(name) as path:
                found[slot] = whole(path / f"cOS/{slot}.img")
        return found

    def files(self, name: str) -> list[str]:
        """List what is in the cOS directory of a partition."""
        with self.part(name) as path:
            return sorted(os.listdir(path / "cOS"))

    def state(self, name: str = "state") -> dict[str, Any]:
        """Read the state.yaml of a partition."""
        with self.part(name) as path:
            document = yaml.safe_load((path / "state.yaml").read_text())
            assert isinstance(document, dict)
            return document


def damage(image: Path) -> None:
    """Have nobody know any more which image this is: its group descriptors are lost."""
    with image.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def whole(image: Path) -> str | None:
    """Give the identity of an image if its file system is sound."""
    if not image.exists():
        return None
    done = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, check=False)
    return images.identity(str(image)) if done.returncode == 0 else None
