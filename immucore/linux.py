"""The kernel as the executor sees it.

Mount(2), loop ioctls, directories. At boot nothing else changes the machine, but for what this calls:
statedir.py and extensions.py in the state, and the processes of fsck.py and the cloud-init stages.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from immucore import files, observe, superblock, syscalls
from immucore.errors import OTHER_SLOT, MakeshiftError, MountError
from immucore.fstab import overlay_paths, unescape
from immucore.image import manifest_head
from immucore.plan import SYSROOT, as_booted, is_below

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from contextlib import ExitStack

    from immucore.log import Log
    from immucore.observe import MountPoint

MAKESHIFT = "/run/immucore/makeshift"  # what cannot be kept goes here
DONE, PRESENT = "done", "present"  # what a call did: it changed the machine, or found it so already

RANDOM_UUID = "/proc/sys/kernel/random/uuid"  # random(4)
LOOP_CTL_GET_FREE = 0x4C82  # linux/loop.h
LOOP_CONFIGURE = 0x4C0A  # since Linux 5.8
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
LOOP_ATTEMPTS = 1000  # another process may take the free device first (EBUSY): it got on, so will we
_FSTAB_ONLY = (
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "_netdev",
    "nofail",
)  # mount(8)
# Only undo what is not set anyway.
_NO_FLAGS = (
    *("defaults", "rw", "suid", "dev", "exec", "async", "loud", "symfollow", "noiversion", "nolazytime"),
    *("atime", "diratime", "norelatime", "nostrictatime", "nomand"),
)


class Kernel:
    """Does what operations say, and says what the kernel answered.

    Every method returns DONE or PRESENT and raises OSError or MountError. Paths below `root`, and below what
    is mounted elsewhere, are looked up as if that were `/`: what is on a disk cannot lead out of it. A
    directory that is not there is made where its parent is writable.
    """

    def __init__(
        self,
        root: str = SYSROOT,
        *,
        log: Log | None = None,
        modules: str = "/lib/modules",
        makeshift: str = MAKESHIFT,
    ) -> None:
        self._roots = [root]
        self._makeshift = makeshift
        self._log = log  # for what takes long; None: this process' own
        self._checks: dict[str, tuple[str, str]] = {}
        self._places: dict[str, str] = {}
        self.merged: dict[str, str] = {}  # what was done with directories of the state, by target
        self.conflicts: list[str] = []  # what the image has another version of, and stayed as it was
        self._modules = f"{modules}/{os.uname().release}"  # the initramfs' own, for the kernel that runs
        # What an earlier run has mounted, by its path; looked up once, so that the cost stays linear.
        self._found = {mount.target: mount for mount in observe.mounts()}

    def check(self, device: str, fstype: str, mode: str, repair: str) -> str:
        """Check the file system on `device` where its superblock, or `mode` force, asks for it.

        Remembers it: mounting what is damaged and does not say so is tried once more after a check.
        """
        self._checks[device] = fstype, repair
        reason = "has to be checked (fsck.mode=force)"
        if mode != "force":
            reason = superblock.damage(device, fstype, time.time())
        return DONE if reason and self._fsck(device, reason) else PRESENT

    def _fsck(self, device: str, reason: str) -> bool:
        from immucore import fsck, log  # a healthy boot does not need it

        fstype, repair = self._checks[device]
        return fsck.check(device, fstype, reason, repair, self._log or log.start())

    def grow(self, source: str, target: str) -> str:
        """Let the file system of `source`, mounted at `target`, fill its device."""
        from immucore import growth  # hardly ever asked for

        return DONE if growth.grow(source, self.path(target)) else PRESENT

    def mount(self, source: str, target: str, fstype: str, options: tuple[str, ...]) -> str:
        """Mount `source` on `target`; what is mounted there from it already stays."""
        where = self._mount_point(target)
        there = self._found.get(where)
        self._confine(target)
        if there and there.fstype == fstype and _same_source(there, source):
            return PRESENT
        if not fstype:
            raise MountError(
                f"cannot mount '{source}' on '{target}': no file system is known on it",
                hint=f"see what it holds: blkid -p {source}",
            )
        flags, data = split_options(options)
        try:
            syscalls.mount(source, where, fstype, flags, data)
        except OSError as error:
            damaged = error.errno in (errno.EUCLEAN, errno.EBADMSG) and source in self._checks
            if not damaged or not self._fsck(source, f"cannot be mounted ({error.strerror})"):
                raise
            syscalls.mount(source, where, fstype, flags, data)
        return DONE

    def mount_loop(self, image: str, target: str, options: tuple[str, ...], init: str = "") -> str:
        """Attach `image` to a free loop device and mount that, if it is whole; the last umount detaches it.

        What it holds is looked at before it is mounted anywhere (contract §7); `init` is what the command
        line wants run in it, or empty. The device stays open until the kernel has the file system: with
        LO_FLAGS_AUTOCLEAR its last close detaches the image.
        """
        where = self._mount_point(target)
        there = self._found.get(where)
        try:
            image = self.path(image)
        except FileNotFoundError:
            raise MountError(f"cannot find the image '{image}'", hint=OTHER_SLOT) from None
        if there and _backing_file(there) == image:
            return PRESENT
        fstype = _whole(image)  # first, to tell what is wrong with this one and not that another is there
        if there and target == self._roots[0]:
            raise MountError(
                f"cannot mount '{image}' on '{target}': {there.source} is mounted there already",
                hint="look which unit did it: systemctl status sysroot.mount",
            )
        read_only = "ro" in options
        device, descriptor = _attach(image, read_only=read_only)
        try:
            tree = syscalls.detached_mount(device, fstype, read_only=read_only)
        except OSError as error:
            raise MountError(f"cannot mount '{image}': {error.strerror}", hint=OTHER_SLOT) from None
        finally:
            os.close(descriptor)
        try:
            observe.check_bootable(tree, image, init, self._modules)
            syscalls.attach_mount(tree, where)
        finally:
            os.close(tree)
        return DONE

    def bind(self, source: str, target: str) -> str:
        """Make `source` visible at `target`."""
        real = self.path(source)
        where = self._mount_point(target, is_file=stat.S_ISREG(os.stat(real).st_mode))
        if os.path.samestat(os.stat(real), os.stat(where)):
            return PRESENT
        syscalls.mount(real, where, "none", syscalls.MS_BIND, "")
        return DONE

    def overlay(self, target: str, backing: str) -> str:
        """Stack `backing`/upper on `target`.

        A new upper gets mode, owner and extended attributes of the lower. Where the file system of `backing`
        is full, what it keeps is shown all the same, and changes go to memory until the next boot: a machine
        that has run out of space has to boot, so that somebody can make some. Raises MakeshiftError then.
        """
        where = self._mount_point(target)
        there = self._found.get(where)
        makeshift = f"{self._makeshift}/{backing.strip('/').replace('/', '-')}"
        upper = _upper(there) if there and there.fstype == "overlay" else ""
        if upper != _plain(f"{makeshift}/upper"):  # as an earlier run has left it
            shown = ""  # what an upper that cannot be written to has; read with what it covers
            try:
                base = self.directory(backing)
                if upper == _plain(f"{base}/upper"):
                    return PRESENT
                shown = f"{base}/upper" if os.path.isdir(f"{base}/upper") else ""
                return self._stack(where, base, like=where)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            self._stack(where, self.directory(makeshift), like=shown or where, over=shown)
        raise MakeshiftError(
            f"cannot keep what changes in '{target}': {os.strerror(errno.ENOSPC)}",
            hint=f"free space or inodes on the file system that holds {backing}, and boot again",
        )

    def _stack(self, where: str, base: str, *, like: str, over: str = "") -> str:
        """Mount an overlay on `where` whose upper and work are in `base`, and another lower layer `over`.

        A new upper is `like` another directory. index and metacopy are off because the lower of a kept upper
        is replaced by upgrades (overlayfs.rst, "Changes to underlying filesystems").
        """
        upper = f"{base}/upper"
        if not os.path.isdir(upper):
            files.remove(f"{base}/upper.new")  # of a boot that was cut off here
            os.mkdir(f"{base}/upper.new", 0o700)
            files.copy_attributes(like, f"{base}/upper.new")
            files.fsync(f"{base}/upper.new")
            os.rename(f"{base}/upper.new", upper)
        os.makedirs(f"{base}/work", 0o700, exist_ok=True)
        paths = dict(overlay_paths(where, base))
        if over:
            paths["lowerdir"] = f"{dict(overlay_paths(over, base))['lowerdir']}:{paths['lowerdir']}"
        data = ",".join(f"{key}={path}" for key, path in paths.items())
        syscalls.mount("overlay", where, "overlay", 0, f"{data},index=off,metacopy=off")
        if os.statvfs(where).f_flag & os.ST_RDONLY:  # overlayfs then only tells the kernel's log
            syscalls.umount(where)
            raise OSError(errno.ENOSPC, f"nothing can be made in '{base}/work'", where)
        return DONE

    def seed(self, source: str, target: str, image: str) -> str:
        """Copy the directory `source` to `target`, which appears whole or not at all.

        One that is there follows `source` if that is of another image than the last time (contract §4.2).
        """
        parent, _, name = target.rpartition("/")
        where = f"{self.directory(parent)}/{name}"
        if os.path.isdir(where) and not os.path.islink(where) and (not image or _is_of(where, image)):
            return PRESENT
        import contextlib

        from immucore import statedir  # an image that is not new needs neither

        with contextlib.suppress(FileNotFoundError):
            statedir.refuse_what_is_in_use(where, self.path(source))
        with contextlib.ExitStack() as opened:
            given = self._of_image(source, opened) or self.directory(source)
            outcome = statedir.follow(given, where, image)
        self.merged[target] = str(outcome)
        self.conflicts += [f"{as_booted(source)}/{each.path}".rstrip("/") for each in outcome.conflicts]
        return DONE

    def _of_image(self, path: str, opened: ExitStack) -> str:
        """Name a directory as the image has it, whatever is mounted over it by now; empty if it has none."""
        root = self._roots[0]
        image = syscalls.clone_mount(root)
        opened.callback(os.close, image)
        try:
            descriptor = syscalls.openat2(
                image, path[len(root) :].lstrip("/") or ".", os.O_PATH | os.O_DIRECTORY
            )
        except FileNotFoundError:
            return ""
        opened.callback(os.close, descriptor)
        return f"/proc/self/fd/{descriptor}/."  # the directory, and not the link to it

    def unmount(self, target: str) -> None:
        """Take away what this run has mounted on `target`, at the latest when nobody uses it any more."""
        syscalls.umount(self.place(target), syscalls.MNT_DETACH)

    def write_file(self, target: str, content: str) -> str:
        """Write `content` to `target` (mode 0644), replacing what was there in one step."""
        parent, _, name = target.rpartition("/")
        where = f"{self.directory(parent)}/{name}"
        if os.path.isfile(where) and not os.path.islink(where) and observe.text(where) == content:
            return PRESENT
        descriptor = os.open(
            f"{where}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
        )
        with open(descriptor, "wb") as file:
            file.write(content.encode("utf-8", "surrogateescape"))
        if is_below(target, self._roots[0]):
            files.copy_label(where if os.path.lexists(where) else os.path.dirname(where), f"{where}.new")
        os.rename(f"{where}.new", where)
        return DONE

    def make_directory(self, target: str, mode: int) -> str:
        """Make a directory, and those above it (0755); one that is there stays what it is."""
        try:
            self.path(target, os.O_DIRECTORY)
        except FileNotFoundError:
            os.chmod(self.directory(target), mode)
            return DONE
        return PRESENT

    def machine_id(self, target: str, source: str) -> str:
        """Write the id at `source` to `target` if there is none; without one anywhere, a new one to both.

        An image without one has an empty file, or the word uninitialized (machine-id(5)).
        """
        if _machine_id(self._text(target)):
            return PRESENT
        kept = _machine_id(self._text(source))
        self.write_file(target, f"{kept or observe.text(RANDOM_UUID).strip().replace('-', '')}\n")
        if not kept:
            self.write_file(source, self._text(target))
            files.fsync(self.path(source))
        return DONE

    def extensions(self, target: str, source: str, sets: tuple[str, ...], spared: tuple[str, ...]) -> str:
        """Link images of extensions to where systemd looks for them, if there are any."""
        try:
            self.path(source, os.O_DIRECTORY)
        except FileNotFoundError:
            return PRESENT
        from immucore import extensions  # most machines have none

        return DONE if extensions.link(self, source, target, sets, spared) else PRESENT

    def _text(self, path: str) -> str:
        try:
            return observe.text(self.path(path))
        except FileNotFoundError:
            return ""

    def tell_boot_loader(self, target: str, entry: str) -> str:
        """Set next_entry in GRUB's environment block; a block that is none is made anew.

        It is written in place, because GRUB wants it in one piece, and to the disk before anybody restarts.
        """
        from immucore import grubenv  # only a boot that has failed gets here

        parent, _, name = target.rpartition("/")
        path = f"{self.directory(parent)}/{name}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            values = grubenv.parse(os.read(descriptor, grubenv.SIZE_BYTES))
            if values.get("next_entry") == entry:  # GRUB takes it away when it reads it
                raise MountError(
                    f"cannot have '{entry}' booted: the boot loader has not read next_entry the last time",
                    hint=f"choose '{entry}' in the boot menu; see that grub.cfg loads {target} (load_env)",
                )
            try:
                block = grubenv.render({**values, "next_entry": entry})
            except ValueError as reason:
                raise MountError(
                    f"cannot set next_entry in '{target}': {reason}",
                    hint=f"remove what nobody needs: grub-editenv {target} unset …",
                ) from None
            os.pwrite(descriptor, block, 0)
            os.ftruncate(descriptor, len(block))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return DONE

    def remove_file(self, path: str) -> str:
        """Remove a file, if it is there."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            return PRESENT
        return DONE

    def path(self, path: str, flags: int = 0) -> str:
        """Return the name of an existing `path` without any symlink in it. Raises OSError.

        `flags` are those of open(2), such as O_DIRECTORY.
        """
        root = next((root for root in self._roots if is_below(path, root)), None)
        if root is None:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
        else:
            directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                below = path[len(root) :].lstrip("/") or "."
                descriptor = syscalls.openat2(directory, below, os.O_PATH | flags)
            finally:
                os.close(directory)
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def directory(self, path: str) -> str:
        """Return the name of a directory without any symlink in it; it is made (0755) if absent."""
        try:
            return self.path(path, os.O_DIRECTORY)
        except FileNotFoundError:
            parent, _, name = path.rpartition("/")
            real = os.path.join(self.directory(parent or "/"), name)
            try:
                files.make_directory(real)
            except FileExistsError:
                raise MountError(
                    f"cannot use '{path}': it is a symlink to nowhere", hint="remove it from the image"
                ) from None
            return real

    def place(self, target: str) -> str:
        """Return where an operation on `target` has mounted something, or found it, without symlinks."""
        return self._places[target]

    def _mount_point(self, target: str, *, is_file: bool = False) -> str:
        """Look up, or make, what to mount on, and remember it for place(): later mounts may lie over it."""
        where = self.path(target) if is_file else self.directory(target)
        self._places[target] = where
        return where

    def _confine(self, target: str) -> None:
        """Look up what lies below a file system that is mounted outside of every other as if it were `/`."""
        if not any(is_below(target, root) for root in self._roots):
            self._roots.append(target)


def split_options(options: tuple[str, ...]) -> tuple[int, str]:
    """Split mount options into the flags of mount(2) and the data for the file system.

    The last of ro and rw counts.
    """
    flags, data = 0, []
    for option in options:
        if option in syscalls.MS:
            flags |= syscalls.MS[option]
        elif option == "rw":
            flags &= ~syscalls.MS["ro"]
        elif option not in _FSTAB_ONLY + _NO_FLAGS and not option.startswith(("x-", "X-", "comment=")):
            data.append(option)
    return flags, ",".join(data)


def _attach(image: str, *, read_only: bool) -> tuple[str, int]:
    """Attach an image; return the name of the loop device and a descriptor that keeps it attached."""
    flags = LO_FLAGS_AUTOCLEAR | (LO_FLAGS_READ_ONLY if read_only else 0)
    mode = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    file = os.open(image, mode)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for attempt in range(LOOP_ATTEMPTS):
            name = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            device = os.open(name, mode)
            # struct loop_config: fd, block_size, struct loop_info64 (lo_flags at 52, lo_file_name at 56),
            # reserved
            config = struct.pack("=II52xI64s216x", file, 0, flags, os.fsencode(image)[:63])
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY or attempt == LOOP_ATTEMPTS - 1:
                    raise
                time.sleep(0.001)  # until it has attached its file the kernel offers the same device again
            else:
                return name, device
        raise AssertionError("the loop returns or raises")
    finally:
        os.close(control)
        os.close(file)


def _whole(image: str) -> str:
    """Return the file system type of an image whose file has all that its superblock claims."""
    size_bytes = os.stat(image).st_size
    if not size_bytes:
        raise MountError(f"cannot mount '{image}': the file is empty", hint=OTHER_SLOT)
    found = superblock.identify(image)
    if not found.fstype:
        raise MountError(
            f"cannot mount '{image}': no superblock of ext2/3/4, squashfs, erofs, xfs or btrfs in it",
            hint=OTHER_SLOT,
        )
    if found.claimed_bytes > size_bytes:
        lost = found.claimed_bytes - size_bytes
        raise MountError(f"cannot mount '{image}': {lost} bytes of it are missing", hint=OTHER_SLOT)
    return found.fstype


def _machine_id(text: str) -> str:
    """Return a valid machine-id, or nothing."""
    text = text.strip()
    return text if len(text) == 32 and not text.strip("0123456789abcdef") else ""


def _is_of(directory: str, image: str) -> bool:
    """Tell whether what a directory of the state keeps was brought there by this image, or followed it.

    Not where a boot was cut off, nor where its manifest cannot be read: that is looked into then.
    """
    head, manifest = manifest_head(image), f"{directory.removesuffix('.bind')}.manifest"
    try:
        descriptor = os.open(manifest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(descriptor, len(head)) == head and not os.path.lexists(f"{manifest}.new")
        finally:
            os.close(descriptor)
    except OSError:
        return False


def _same_source(there: MountPoint, source: str) -> bool:
    """Tell whether a mount is of this device; its number counts, not its name."""
    if there.source == source:
        return True
    try:
        number = os.stat(source).st_rdev
    except OSError:
        return False
    return number != 0 and there.device == f"{os.major(number)}:{os.minor(number)}"


def _upper(there: MountPoint) -> str:
    """Return the upper directory of an overlay as _plain() gives it."""
    options = [unescape(option) for option in there.superblock_options.split(",")]
    return next((_plain(option[9:]) for option in options if option.startswith("upperdir=")), "")


def _plain(path: str) -> str:
    """Take out the backslashes: some kernels show those that overlay_paths() put in, others do not."""
    return path.replace("\\", "")


def _backing_file(there: MountPoint) -> str:
    return observe.text(f"/sys/dev/block/{there.device}/loop/backing_file").rstrip("\n")
