"""Makes disks in sparse files, the way `immucore install` does, without mounting anything.

A test says what differs from an ordinary cOS disk, and gets a disk of its own in tenths of a second:

    cos_disk(where)                                                  as an installer leaves it
    cos_disk(where, without=("oem",))                                one partition missing
    cos_disk(where, state={"cOS/active.img": None})                  one file missing
    cos_disk(where, state={"cOS/active.img": b"garbage"}, oem={"cos-layout.env": "RW_PATHS="})
    cos_disk(where, extra=(Partition("data", "DATA", 32, {"hello": "there"}),))
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import derivative
from derivative import CACHE, cached, digest

from immucore import grubenv
from immucore.system import filesystems, images
from immucore.system import partitions as table
from immucore.system.partitions import MIB

Content = Path | str | bytes


@dataclass(frozen=True)
class Partition:
    """A partition to be made: its PARTLABEL, and what the file system in it is to be."""

    name: str
    label: str
    size_mib: int = 0  # 0: what its files need
    files: Mapping[str, Content] = field(default_factory=dict)
    fstype: str = "ext4"  # or vfat, or none: zeros
    image: Path | None = None  # a file system that exists already

    @property
    def uuid(self) -> str:
        """The UUID of an ext4 file system, the same in every run."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"filesystem.{self.name}.immucore"))

    @property
    def partuuid(self) -> str:
        """The PARTUUID, the same in every run."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"partition.{self.name}.immucore"))


@dataclass(frozen=True)
class Disk:
    """A raw disk that was made: where each partition is, and whose kernel boots it."""

    path: Path
    suite: str
    partitions: tuple[Partition, ...]
    offsets: Mapping[str, int]

    def partition(self, name: str) -> Partition:
        """Return the partition with a PARTLABEL."""
        return next(partition for partition in self.partitions if partition.name == name)

    def number(self, name: str) -> int:
        """Return the number that the kernel appends to the disk's name for a partition."""
        return [partition.name for partition in self.partitions].index(name) + 1


def cos_disk(
    path: Path | None = None,
    *,
    suite: str = "bookworm",
    without: Collection[str] = (),
    oem: Mapping[str, Content | None] | None = None,
    recovery: Mapping[str, Content | None] | None = None,
    state: Mapping[str, Content | None] | None = None,
    persistent: Mapping[str, Content | None] | None = None,
    extra: Collection[Partition] = (),
) -> Disk:
    """Make a cOS disk at `path`; without a path an ordinary one that all tests share, so only read.

    `oem`, `recovery`, `state` and `persistent` add files to these partitions; a content of None takes one
    away.
    """
    images = derivative.images(suite)
    changes = {"oem": oem, "recovery": recovery, "state": state, "persistent": persistent}
    ordinary: dict[str, dict[str, Content]] = {
        "oem": {"grubenv": grubenv.render({})},
        "recovery": {f"cOS/{name}": images[name] for name in ("recovery.squashfs", "recovery.img")},
        "state": {f"cOS/{name}": images[name] for name in ("active.img", "passive.img")},
    }
    sizes = {"efi": 16, "oem": 16, "persistent": 64}
    labels = {"efi": "COS_GRUB"}
    partitions = []
    for name in ("efi", "oem", "recovery", "state", "persistent"):
        files = {**ordinary.get(name, {}), **(changes.get(name) or {})}
        partition = Partition(
            name=name,
            label=labels.get(name, f"COS_{name.upper()}"),
            size_mib=sizes.get(name, 0),
            files={path: content for path, content in files.items() if content is not None},
            fstype="vfat" if name == "efi" else "ext4",
        )
        if name not in without:
            partitions.append(partition)
    return make_disk(path, suite, (*partitions, *extra))


def plain_disk(suite: str = "bookworm") -> Disk:
    """Return a disk with the images' tree on one ext4 partition: what a boot costs without any agent."""
    images = derivative.images(suite)
    return make_disk(None, suite, (Partition("root", "COS_ACTIVE", image=images["active.img"]),))


def make_disk(path: Path | None, suite: str, partitions: Collection[Partition]) -> Disk:
    """Make a disk with these partitions at `path`, or in the cache."""
    partitions = tuple(partitions)
    layout = table.placed(entry(partition) for partition in partitions)

    def make(target: Path) -> None:
        with target.open("wb") as stream:
            stream.truncate((table.end_mib(layout) + table.TABLE_MIB) * MIB)
        for partition, place in zip(partitions, layout, strict=True):
            write_partition(target, partition, place.offset_bytes)
        table.write(str(target), layout)

    if path is None:
        key = digest(
            table.table(layout), *(content_key(partition) for partition in partitions), derivative.CODE, CODE
        )
        path = cached(f"{suite}-disk{len(partitions)}", key, make)
    else:
        make(path)
    return Disk(path, suite, partitions, {place.name: place.offset_bytes for place in layout})


CODE = digest(Path(__file__), Path(table.__file__), Path(filesystems.__file__), Path(images.__file__))


def entry(partition: Partition) -> table.Partition:
    """Return a partition as the table has it."""
    kind = table.EFI if partition.fstype == "vfat" else table.LINUX
    return table.Partition(
        name=partition.name, size_mib=size_mib(partition), type=kind, uuid=partition.partuuid
    )


def size_mib(partition: Partition) -> int:
    """Return a partition's size: as asked for, or what its image or files and ext4 itself need."""
    if partition.size_mib:
        return partition.size_mib
    if partition.image:
        return -(-partition.image.stat().st_size // MIB)
    files = sum(
        item.stat().st_size if isinstance(item, Path) else len(item) for item in partition.files.values()
    )
    return files * 21 // 20 // MIB + 32


def content_key(partition: Partition) -> str:
    """Return a text that changes with a partition's content."""
    files = (
        f"{path} {content.stat().st_mtime_ns if isinstance(content, Path) else ''} {content!r}"
        for path, content in sorted(partition.files.items())
    )
    return "\n".join((partition.label, partition.fstype, str(partition.image), *files))


def write_partition(disk: Path, partition: Partition, offset: int) -> None:
    """Make the file system of a partition at its place in the disk."""
    if partition.image:
        copy_sparse(partition.image, disk, offset)
    elif shared(partition):
        # Hundreds of MiB of images: made once, and copied for every disk that has the same.
        key = digest(content_key(partition), str(size_mib(partition)), derivative.CODE, CODE)
        copy_sparse(
            cached(f"filesystem-{partition.name}", key, lambda target: mke2fs(target, partition)),
            disk,
            offset,
        )
    elif partition.fstype == "ext4":
        mke2fs(disk, partition, offset)
    elif partition.fstype == "vfat":
        with staged(partition.files) as directory:
            where = {"size_mib": size_mib(partition), "offset_bytes": offset, "directory": directory}
            filesystems.vfat(str(disk), label=partition.label, **where)


def shared(partition: Partition) -> bool:
    """Tell whether a partition holds images that other disks have too: a test's own lie below run/."""
    images = [content for content in partition.files.values() if isinstance(content, Path)]
    return bool(images) and not any(image.is_relative_to(CACHE / "run") for image in images)


def mke2fs(target: Path, partition: Partition, offset: int = 0) -> None:
    """Make an ext4 file system with a partition's files."""
    with staged(partition.files) as directory:
        where = {"size_mib": size_mib(partition), "offset_bytes": offset, "directory": directory}
        filesystems.ext4(str(target), label=partition.label, uuid=partition.uuid, **where)


def staged(files: Mapping[str, Content]) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary tree with files, as mke2fs and mcopy want them; big ones are linked, not copied."""
    directory = tempfile.TemporaryDirectory(dir=CACHE, prefix="stage.")
    top = Path(directory.name)
    top.chmod(0o755)
    for name, content in files.items():
        path = top / name.strip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        elif content.stat().st_dev == top.stat().st_dev:
            os.link(content, path)
        else:
            shutil.copy(content, path)
    return directory


def copy_sparse(source: Path, target: Path, offset: int) -> None:
    """Copy a file's data, without its holes, to a place inside another file."""
    with source.open("rb") as reader, target.open("r+b") as writer:
        size = source.stat().st_size
        end = 0
        while end < size:
            try:
                start = os.lseek(reader.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole to the end
                return
            end = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            while start < end:
                start += os.copy_file_range(
                    reader.fileno(), writer.fileno(), end - start, start, offset + start
                )
