"""What the unit tests share: partitions, an image, and a kernel that breaks where it is told to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from immucore.devices import Device
from immucore.image import Image, Setting

if TYPE_CHECKING:
    from collections.abc import Mapping


def partition(number: int, label: str, fstype: str = "ext4", disk: str = "/dev/vda") -> Device:
    """Give a partition of a disk as it is after the installation."""
    return Device(
        path=f"{disk}{number}",
        fstype=fstype,
        label=label,
        uuid=f"{number:08x}-0000-4000-8000-000000000000",
        partlabel=label.removeprefix("COS_").lower(),
        partuuid=f"{number:08x}-1111-4111-8111-111111111111",
        disks=(disk,),
        parent=disk,
        size_bytes=64 << 20,
    )


def image_of(layout: Mapping[str, str], fstab: str = "") -> Image:
    """Give an image whose /etc/cos/cos-layout.env has these values."""
    origin = "/etc/cos/cos-layout.env"
    return Image(
        settings=tuple(Setting(name=n, value=v, origin=origin) for n, v in layout.items()), fstab=fstab
    )


class FakeKernel:
    """Write down what it is asked for; break where and how `broken` says, by the target's path."""

    def __init__(
        self, broken: Mapping[str, int | Exception] | None = None, present: tuple[str, ...] = ()
    ) -> None:
        self.calls: list[str] = []
        self._broken = broken or {}
        self._present = present

    def _call(self, target: str, *words: str) -> str:
        self.calls.append(" ".join(words))
        wrong = self._broken.get(target)
        if isinstance(wrong, Exception):
            raise wrong
        if wrong:
            raise OSError(wrong, os.strerror(wrong), target)
        return "present" if target in self._present else "done"

    def check(self, device: str, fstype: str, mode: str, repair: str) -> str:
        return self._call(device, "check", device, fstype, mode, repair)

    def grow(self, source: str, target: str) -> str:
        return self._call(f"grow {target}", "grow", source, target)

    def mount(self, source: str, target: str, fstype: str, options: tuple[str, ...]) -> str:
        return self._call(target, "mount", source, target, fstype, ",".join(options))

    def mount_loop(self, image: str, target: str, options: tuple[str, ...], init: str) -> str:
        return self._call(target, "loop", image, target, ",".join(options), init)

    def tell_boot_loader(self, target: str, entry: str) -> str:
        return self._call(target, "tell_boot_loader", target, entry)

    def bind(self, source: str, target: str) -> str:
        return self._call(target, "bind", source, target)

    def overlay(self, target: str, backing: str) -> str:
        return self._call(target, "overlay", target, backing)

    def seed(self, source: str, target: str, image: str) -> str:
        return self._call(target, "seed", source, target, *([image] if image else []))

    def make_directory(self, target: str, mode: int) -> str:
        return self._call(target, "make", target, f"{mode:o}")

    def machine_id(self, target: str, source: str) -> str:
        return self._call(target, "machine_id", target, source)

    def extensions(self, target: str, source: str, sets: tuple[str, ...], spared: tuple[str, ...]) -> str:
        return self._call(target, "extensions", target, source, ",".join(sets), ",".join(spared))

    def write_file(self, target: str, content: str) -> str:
        return self._call(target, "write", target, content)
