"""Where the files of an image come from: a directory, an archive, another image, a registry.

Each is unpacked into an empty directory, with everything that makes a file, and with nothing beside it.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from immucore import files, superblock
from immucore.errors import CmdlineError
from immucore.system import content, fakeroot, images, stopping
from immucore.system.errors import ImageError
from immucore.system.oci import Options, Registry
from immucore.system.programs import FAKEROOT, run, silent

if TYPE_CHECKING:
    from immucore.system.programs import Advance

_HINT = "SOURCE is dir:/path, tar:/path, file:/path/image or oci:registry/image:tag"
_FULL = "free space on the file system that is to hold the unpacked tree"
_TOTAL = re.compile(r"^Total bytes read: (\d+)", re.MULTILINE)


class Source:
    """What an image is made of."""

    def __init__(self, text: str) -> None:
        self.text = text  # as somebody has named it
        self.digest = ""  # what it holds: of a registry its manifest's, else content.digest() once unpacked
        self.needs_bytes = 0  # what it takes when it is unpacked, as far as look() can know

    def look(self) -> None:
        """Find out what can be known before anything is written. Raises ImageError."""

    def unpack(self, directory: str, advance: Advance = silent) -> str:
        """Unpack it into a directory, which is made; give the digest of what it holds, content.digest().

        Raises ImageError and OSError.
        """
        self._unpack(directory, advance)
        digest = content.digest(directory)
        self.digest = self.digest or digest
        return digest

    def _unpack(self, directory: str, advance: Advance) -> None:
        raise NotImplementedError


class _Local(Source):
    """A path of this machine."""

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text)
        self.path = path
        self._failure = f"cannot unpack '{text}'"


class Directory(_Local):
    """A tree. What is mounted in it stays outside: its directory is there, and empty."""

    def look(self) -> None:
        """Measure it."""
        try:
            self.needs_bytes = content.room(self.path).bytes
        except OSError as error:
            raise ImageError(f"cannot read '{error.filename}': {error.strerror}") from None

    def _unpack(self, directory: str, advance: Advance) -> None:
        os.mkdir(directory, 0o755)
        # Named one by one, what cannot be kept is an error.
        argv = ["cp", "--recursive", "--no-dereference", "--one-file-system", "--sparse=auto"]
        argv += ["--preserve=mode,ownership,timestamps,links,xattr", "--", f"{self.path}/.", directory]
        run(argv, self._failure, hint=_FULL, advance=advance, total_bytes=self.needs_bytes)
        _copy_labels(self.path, directory)


def _copy_labels(source: str, target: str) -> None:
    """Give a copy the SELinux labels that cp(1) copies only where a policy is loaded."""
    for path, directories, names in os.walk(target):
        stopping.point()
        there = source + path.removeprefix(target)
        files.copy_label(there, path)
        for name in (*directories, *names):  # a symlink to a directory is one of the former
            files.copy_label(f"{there}/{name}", f"{path}/{name}")


class Archive(_Local):
    """An archive of tar(1), compressed with anything that it knows."""

    def look(self) -> None:
        """Read it once from end to end: it is whole, and its size is known."""
        said = run(["tar", "--list", "--totals", "--file", self.path], f"cannot read '{self.path}'")
        found = _TOTAL.search(said)
        self.needs_bytes = int(found[1]) if found else 0

    def _unpack(self, directory: str, advance: Advance) -> None:
        os.mkdir(directory, 0o755)
        argv = ["tar", "--extract", "--numeric-owner", "--same-owner", "--preserve-permissions", "--acls"]
        argv += ["--xattrs", "--xattrs-include=*", "--selinux", "--sparse", "--delay-directory-restore"]
        argv += ["--directory", directory, "--file", self.path]
        run(argv, self._failure, hint=_FULL, advance=advance, total_bytes=self.needs_bytes)
        if FAKEROOT in os.environ:
            fakeroot.mend(directory)


class ImageFile(_Local):
    """An image, which becomes another one with the same files: each has an identity of its own inside."""

    def look(self) -> None:
        """Look what it is."""
        try:
            found = superblock.identify(self.path)
        except OSError as error:
            raise ImageError(f"cannot read '{self.path}': {error.strerror}") from None
        self._fstype = found.fstype
        if not found.fstype:
            raise ImageError(f"cannot read '{self.path}': it holds no file system that is known", hint=_HINT)
        if found.fstype != images.SQUASHFS and not images.is_root():
            raise ImageError(
                f"cannot unpack '{self.text}': only root can read all that {found.fstype} has of a file",
                hint="run it as root; a squashfs or an archive of tar needs none",
            )
        self.needs_bytes = found.claimed_bytes

    def _unpack(self, directory: str, advance: Advance) -> None:
        self.look()
        if self._fstype == images.SQUASHFS:
            images.unpack(self.path, self._fstype, directory)
            return
        with images.mounted(self.path, self._fstype) as there:
            copied = Directory(self.text, there)
            copied.needs_bytes = self.needs_bytes
            copied._unpack(directory, advance)
        files.remove(f"{directory}/lost+found")  # mke2fs made it, and makes it again


class FromRegistry(Source):
    """An OCI image in a registry."""

    def __init__(self, text: str, reference: str, options: Options) -> None:
        super().__init__(text)
        self._registry = Registry(reference, options)

    def look(self) -> None:
        """Ask the registry which image the name means now; that one is fetched, whatever comes later."""
        self.digest = self._registry.resolve()
        # At least: it is fetched and unpacked, and how much more that takes nobody knows before.
        self.needs_bytes = 2 * self._registry.size_bytes()

    def _unpack(self, directory: str, advance: Advance) -> None:
        self.digest = self._registry.resolve()
        self._registry.unpack(directory, advance)


def parse(text: str, options: Options | None = None) -> Source:
    """Read the name of a source. Raises CmdlineError."""
    kind, separator, where = text.partition(":")
    if not separator or not where or "\0" in where:
        raise CmdlineError(f"cannot take '{text}' for the source of an image", hint=_HINT)
    if kind == "oci":
        return FromRegistry(text, where, options or Options())
    kinds: dict[str, type[_Local]] = {"dir": Directory, "tar": Archive, "file": ImageFile}
    if kind not in kinds or not where.startswith("/"):
        raise CmdlineError(f"cannot take '{text}' for the source of an image", hint=_HINT)
    return kinds[kind](text, where)
