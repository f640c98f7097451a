"""What the machine looks like, as values: the devices, the mounts, what the image says. Reads only."""

from __future__ import annotations

import errno
import os
import stat

from immucore import envfile, superblock, syscalls
from immucore.devices import BOOTDISK, LOADER, Device, Devices
from immucore.errors import OTHER_SLOT, KernelMismatchError, LayoutError, MountError
from immucore.fstab import lines_of, of_image, unescape
from immucore.image import Image, Setting
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SYSFS = "/sys/class/block"
UDEV = "/run/udev/data"
EFIVARS = "/sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
SELINUX = "/sys/fs/selinux"  # there if the kernel has it switched on
RUN = "/run/cos"
MAX_FILE_BYTES = 1 << 20  # nobody's layout is larger, and a disk is not to fill the memory
BLOCK_BYTES = 1 << 14  # most files are one; open().read() would take a dozen system calls instead of three


def text(path: str, *, missing: str = "") -> str:
    """Read a small file; `missing` if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return missing
    try:
        content = _all(descriptor)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)
    return content.decode("utf-8", "surrogateescape")


def whole(path: str) -> str:
    """Read a file that is about to be written back; "" if there is none.

    Raises OSError (EFBIG) for one of more than MAX_FILE_BYTES: its end would be lost.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        return whole_of(descriptor).decode("utf-8", "surrogateescape")
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def whole_of(descriptor: int) -> bytes:
    """Read an open file likewise."""
    content = _all(descriptor, MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return content


def _all(descriptor: int, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    content = b""
    while block := os.read(descriptor, min(BLOCK_BYTES, limit_bytes - len(content))):
        content += block
    return content


class Node:
    """A block device as sysfs has it, and what is known of what is on it."""

    def __init__(self, directory: str, record: str, names: set[str]) -> None:
        place = os.readlink(directory)  # ../../devices/pci0000:00/…/block/vda/vda1
        above, self.name = place.split("/")[-2:]
        self.parent = above if above in names else ""  # the disk that a partition is a part of
        virtual = "/virtual/" in place
        stacked = virtual and not self.parent and not self.name.startswith("loop")
        self.slaves = sorted(os.listdir(f"{directory}/slaves")) if stacked else []  # what it is made of
        self.size_bytes = int(text(f"{directory}/size") or 0) * 512
        self.removable = "/usb" in place or (
            not (virtual or self.parent) and text(f"{directory}/removable").strip() == "1"
        )
        lines = record.split("\n")  # a label may have what str.splitlines() takes for the end of a line
        self.known = bool(record)  # udev has looked at it
        self.links = tuple([f"/dev/{line[2:]}" for line in lines if line.startswith("S:")])
        self.properties = dict(
            [line[2:].split("=", 1) for line in lines if line.startswith("E:") and "=" in line]
        )
        mapped = self.properties.get("DM_NAME", "")
        self.path = f"/dev/mapper/{mapped}" if mapped else _path(self.name)


def _path(name: str) -> str:
    return "/dev/" + name.replace("!", "/")


def devices(boot: str = "auto", *, sysfs: str = SYSFS, udev: str = UDEV, efivars: str = EFIVARS) -> Devices:
    """List every block device with what udev has found on it, or where udev does not run, blkid.

    The udev database, not the links in /dev/disk: those show whoever came last (contract §6). `boot` spells
    the boot disk; auto: the boot loader says it. Raises DeviceError where there is neither udev nor blkid.
    """
    record_of: Callable[[str, str], str] = _udev_record
    if not os.path.exists(f"{os.path.dirname(udev)}/control"):
        from immucore import probe  # runs a program for each device

        record_of = probe.record
    nodes: dict[str, Node] = {}
    names = {*os.listdir(sysfs)}
    for name in sorted(names):
        try:
            directory = f"{sysfs}/{name}"
            is_loop = name.startswith("loop") and name[4:].isdecimal()
            if is_loop and not os.path.exists(f"{directory}/loop"):
                continue  # attached to nothing; a system has many of these
            number = text(f"{directory}/dev").strip()
            if number:  # the paths below the kernel's own NVMe multipath have none
                record = record_of(f"{udev}/b{number}", directory)
                if record or not is_loop:
                    nodes[name] = Node(directory, record, names)
        except OSError as error:
            if error.errno not in _GONE:
                raise
    origin = LOADER if boot == "auto" else BOOTDISK
    return _related(nodes, _loader_partition(efivars) if boot == "auto" else boot, origin)


_GONE = (errno.ENOENT, errno.ENODEV, errno.ENXIO)  # what sysfs says of a device that leaves while we look


def _udev_record(path: str, _directory: str) -> str:
    return text(path)


def _related(nodes: dict[str, Node], boot: str, origin: str) -> Devices:
    """Say of each device which disks are beneath it and what is made of it."""
    holders: dict[str, list[str]] = {}
    for node in nodes.values():
        for name in node.slaves:
            holders.setdefault(name, []).append(node.path)
    known: list[Device] = []
    unknown: list[Device] = []
    for node in nodes.values():
        if node.known or node.size_bytes:  # a drive without a medium has nothing to be known
            device = _device(node, _disks(node.name, nodes), holders.get(node.name, []), nodes)
            (known if node.known else unknown).append(device)
    return Devices(all=tuple(known), unknown=tuple(unknown), boot=boot, boot_origin=origin if boot else "")


def _disks(name: str, nodes: dict[str, Node]) -> list[str]:
    """Name the whole disks that a device lies on; itself if it lies on none."""
    if name not in nodes:  # a loop device that udev knows nothing of
        return [name]
    node = nodes[name]
    if node.parent:
        return _disks(node.parent, nodes)
    return sorted({disk for each in node.slaves for disk in _disks(each, nodes)}) or [name]


def _device(node: Node, disks: list[str], holders: list[str], nodes: dict[str, Node]) -> Device:
    own = node.properties
    wholes = [nodes[disk] for disk in disks if disk in nodes]
    whole = wholes[0].properties if len(wholes) == 1 and "ID_SERIAL" not in own else own
    return Device(
        path=node.path,
        links=node.links,
        fstype=own.get("ID_FS_TYPE", ""),
        label=decode(own.get("ID_FS_LABEL_ENC", "")),
        uuid=decode(own.get("ID_FS_UUID_ENC", "")),
        partlabel=decode(own.get("ID_PART_ENTRY_NAME", "")),
        partuuid=own.get("ID_PART_ENTRY_UUID", ""),
        disks=tuple([nodes[disk].path if disk in nodes else _path(disk) for disk in disks]),
        parent=_path(node.parent) if node.parent else "",
        holders=tuple(holders),
        size_bytes=node.size_bytes,
        model=whole.get("ID_MODEL", ""),
        serial=whole.get("ID_SERIAL", ""),
        bus=whole.get("ID_BUS", ""),
        removable=any(disk.removable for disk in wholes),
        multipath=own.get("DM_MULTIPATH_DEVICE_PATH", "") == "1",
    )


def _loader_partition(path: str) -> str:
    """Spell the partition that the boot loader came from; empty where no loader said it.

    An EFI variable (https://systemd.io/BOOT_LOADER_INTERFACE): efivarfs shows four bytes of attributes, then
    the PARTUUID in UTF-16.
    """
    try:
        value = text(path).encode("utf-8", "surrogateescape")[4::2].decode("latin-1").rstrip("\0").lower()
    except OSError:  # firmware that fails is no reason not to boot
        return ""
    return f"PARTUUID={value}" if value and not value.strip("0123456789abcdef-") else ""


def decode(encoded: str) -> str:
    r"""Undo udev's \xNN (systemd: src/shared/udev-util.c, encode_devnode_name())."""
    if "\\" not in encoded:
        return encoded
    head, *parts = encoded.split("\\x")
    raw = [head.encode("utf-8", "surrogateescape")]
    for part in parts:
        code = part[:2]
        if len(code) == 2 and all(digit in HEXADECIMAL for digit in code):
            raw.append(bytes((int(code, 16),)) + part[2:].encode("utf-8", "surrogateescape"))
        else:  # what is on a disk can be anything
            raw.append(b"\\x" + part.encode("utf-8", "surrogateescape"))
    return b"".join(raw).decode("utf-8", "surrogateescape")


HEXADECIMAL = "0123456789abcdefABCDEF"


class MountPoint(Record):
    """A line of /proc/self/mountinfo (proc(5))."""

    target: str
    root: str  # the directory within the file system that is mounted
    device: str  # major:minor
    options: str
    fstype: str
    source: str
    superblock_options: str


def mounts(mountinfo: str = "/proc/self/mountinfo") -> tuple[MountPoint, ...]:
    """List what is mounted, in the order of mounting."""
    return tuple(_mount_points(text(mountinfo)))


def _mount_points(table: str) -> Iterator[MountPoint]:
    for line in lines_of(table):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) > 5 and len(rest) > 2:
            yield MountPoint(
                target=unescape(fields[4]),
                root=unescape(fields[3]),
                device=fields[2],
                options=fields[5],
                fstype=rest[0],
                source=unescape(rest[1]),
                superblock_options=rest[2],
            )


INITS = ("sbin/init", "usr/lib/systemd/systemd", "lib/systemd/systemd", "etc/init", "bin/init")


def check_bootable(root: int, image: str, init: str, modules: str) -> None:
    """Look for an operating system below the directory `root`, open from the image at path `image`.

    `init` is what the command line wants run in it, or empty; `modules` the initramfs' own directory for the
    kernel that runs. Raises MountError, or KernelMismatchError where all but the modules is there.
    """
    lacks = ""
    if not any(_exists(root, path, links=True) for path in ("etc/os-release", "usr/lib/os-release")):
        lacks = "etc/os-release and usr/lib/os-release"
    elif not any(_exists(root, path, links=True) for path in ([init] if init else INITS)):
        lacks = f"init={init}" if init else "an init (/sbin/init)"
    if lacks:
        raise MountError(f"cannot boot '{image}': there is no {lacks} in it", hint=OTHER_SLOT)
    release = modules.rpartition("/")[2]
    # What the initramfs itself has tells whether this kernel has modules at all.
    if os.path.isdir(modules) and not any(
        _exists(root, f"{lib}/modules/{release}", links=True) for lib in ("usr/lib", "lib")
    ):
        raise KernelMismatchError(
            f"cannot boot '{image}': it has no modules for the running kernel {release}",
            hint="choose in the boot menu the entry that loads this image's own kernel",
        )


def image(root: str, run: str = RUN, *, lenient: bool = False) -> Image:
    """Read the layout of the system at `root` and what OEM and earlier boot stages add (contract §4).

    Raises LayoutError for a file that is none and MountError for one that cannot be read, unless `lenient`:
    recovery leaves such a file out.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    settings: list[Setting] = []
    warnings: list[str] = []

    def read(name: str, *, adds: bool = False) -> bool:
        try:
            content = _run_file(run, name) if name.startswith(RUN) else _root_file(directory, name)
            values = envfile.parse(content or "", name)
        except (LayoutError, MountError) as error:
            if not lenient:
                raise
            warnings.append(f"{error.message}; this boot goes on without it")
            return True
        for key, value in values.items():
            settings.append(Setting(name=key, value=value, origin=name, adds=adds))
        return content is not None

    try:
        if not read(f"{RUN}/cos-layout.env"):
            read("/etc/cos/cos-layout.env")
        read("/oem/cos-layout.env")
        read(f"{RUN}/extra-layout.env", adds=True)
        read(f"{RUN}/custom-layout.env", adds=True)
        return Image(
            settings=tuple(settings),
            fstab=image_fstab(root),
            mounts_tmp=any(_exists(directory, path) for path in TMP_MOUNT),
            warnings=tuple(warnings),
            selinux=os.path.isdir(SELINUX),
        )
    finally:
        os.close(directory)


def identity(root: str, path: str) -> str:
    """Tell an image from every other by its superblock, size and time, without reading its files.

    `path` is that of its file on what is mounted at `root`. A copy is another image, the same file under
    another name is not. Empty if it cannot be read.
    """
    from _blake2 import blake2b  # the hashlib module would bring OpenSSL

    try:
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            descriptor = syscalls.openat2(directory, path.lstrip("/"), os.O_RDONLY)
        finally:
            os.close(directory)
    except OSError:
        return ""
    try:
        status = os.fstat(descriptor)
        head = os.pread(descriptor, superblock.HEAD_BYTES, 0)
        deeper = os.pread(descriptor, superblock.HEAD_BYTES, superblock.BTRFS_OFFSET)
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    known = head + deeper + f"{status.st_size} {status.st_mtime_ns}".encode()
    return blake2b(known, digest_size=16).hexdigest()


def image_fstab(root: str) -> str:
    """Read the lines of the fstab at `root` that are not ours: the image's, and what the user has added."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return of_image(_root_file(directory, "/etc/fstab") or "")
    finally:
        os.close(directory)


def stage_files(root: str, directories: Iterable[str]) -> list[str]:
    """List the cloud-init files of the system at `root`, directory by directory, each in the names' order.

    Raises OSError for a directory that is there and cannot be read.
    """
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return [path for directory in directories for path in _stage_files(top, directory, MAX_STAGE_DEPTH)]
    finally:
        os.close(top)


def _stage_files(top: int, directory: str, depth: int) -> Iterator[str]:
    try:
        descriptor = syscalls.openat2(top, directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in _ABSENT:
            return
        error.filename = directory
        raise
    try:
        with os.scandir(descriptor) as entries:
            found = sorted([(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries])
    finally:
        os.close(descriptor)
    for name, is_directory in found:
        if is_directory:
            if depth and name not in NO_STAGES:
                yield from _stage_files(top, f"{directory}/{name}", depth - 1)
        elif name.endswith((".yaml", ".yml")):
            yield f"{directory}/{name}"


def stage_text(root: str, path: str) -> str | None:
    """Read a cloud-init file of the system at `root`; None if it is gone. Raises MountError."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _root_file(directory, path)
    finally:
        os.close(directory)


# The directories of cloud-init files, by the stage that looks there; nothing is on /usr/local in the first.
STAGES = {"rootfs": ("/system/oem", "/oem"), "initramfs": ("/system/oem", "/oem", "/usr/local/cloud-config")}
RUN_LAYOUTS = tuple(f"{RUN}/{name}-layout.env" for name in ("cos", "extra", "custom"))
MAX_STAGE_DEPTH = 4  # of directories below each other
NO_STAGES = ("immucore", "lost+found")  # the evidence of earlier boots; what fsck has found


def links(root: str, paths: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Find those of `paths` that lead elsewhere in the system at `root`: (path, without symlinks)."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        real = [(path, _real(directory, path)) for path in paths]
    finally:
        os.close(directory)
    return tuple((path, where) for path, where in real if path != where)


def _real(directory: int, path: str) -> str:
    """Take the symlinks out of a path, what it names need not be there: a volume may bring it."""
    here, links_left = "", MAX_LINKS
    pending = path.split("/")[::-1]
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = here.rpartition("/")[0]
            continue
        below = f"{here}/{name}"
        try:
            descriptor = syscalls.openat2(directory, below, os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in (*_ABSENT, errno.ENAMETOOLONG):  # this one its mount will meet by itself
                raise
            here = below
            continue
        try:
            target = os.readlink("", dir_fd=descriptor) if stat.S_ISLNK(os.fstat(descriptor).st_mode) else ""
        finally:
            os.close(descriptor)
        if not target:
            here = below
            continue
        if not links_left:
            return path  # its mount will fail with ELOOP, and no other
        links_left -= 1
        here = "" if target.startswith("/") else here
        pending += target.split("/")[::-1]
    return here or "/"


MAX_LINKS = 40  # as many as the kernel follows: path_resolution(7)
TMP_MOUNT = tuple(
    f"{base}/systemd/system/local-fs.target.wants/tmp.mount" for base in ("etc", "usr/lib", "lib")
)
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def _run_file(run: str, name: str) -> str | None:
    path = run + name.removeprefix(RUN)
    return text(path) if os.path.exists(path) else None


def _root_file(directory: int, path: str) -> str | None:
    """Read a file of the new root: its symlinks stay inside, and only a regular file is read."""
    try:
        descriptor = syscalls.openat2(directory, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            content = _all(descriptor, MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)  # or a slot that cannot be booted could not be unmounted
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise MountError(
            f"cannot read '{path}': {os.strerror(error.errno or 0)}",
            hint=f"correct or remove {path}, or boot another slot",
        ) from None
    if len(content) > MAX_FILE_BYTES:  # half of a layout is another layout
        raise MountError(
            f"cannot read '{path}': it is larger than {MAX_FILE_BYTES >> 10} KiB",
            hint=f"correct or remove {path}, or boot another slot",
        )
    return content.decode("utf-8", "surrogateescape")


def _exists(directory: int, path: str, *, links: bool = False) -> bool:
    """Tell whether there is something in this root; without `links` a link to nowhere is something too."""
    try:
        os.close(syscalls.openat2(directory, path, os.O_PATH | (0 if links else os.O_NOFOLLOW)))
    except OSError:
        return False
    return True
