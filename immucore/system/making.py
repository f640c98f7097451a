"""An image that is made of a source, beside those that are there."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from immucore import files, superblock
from immucore.system import bootable, images, slots
from immucore.system.errors import ImageError

if TYPE_CHECKING:
    from immucore.system.programs import Advance
    from immucore.system.sources import Source

_MIB = 1 << 20


class Making:
    """A source on its way to be an image in `directory`, the `cOS` of a partition, which has room for both.

    All that is made has names that slots.clean() removes.
    """

    def __init__(self, directory: str, source: Source, fstype: str) -> None:
        self.directory, self.source, self.fstype = directory, source, fstype
        self.image = os.path.join(directory, slots.TRANSITION)
        self.tree = self.content = self.image_id = ""

    def measure(self) -> None:
        """Look at the source, and for room for tree and image. Raises ImageError and OSError."""
        self.source.look()
        needed = self.source.needs_bytes
        needed += (
            needed + needed // 16 if self.fstype == images.EXT4 else 0
        )  # else nobody knows how much less
        free = files.free(self.directory).bytes
        if needed > free:
            raise ImageError(
                f"cannot make an image of '{self.source.text}': that takes {needed // _MIB} MiB in"
                f" '{self.directory}', and {free // _MIB} MiB are free",
                hint="remove what is not needed there, or set `filesystem: squashfs`",
            )

    def unpack(self, advance: Advance) -> None:
        """Unpack the source into an empty directory. Raises ImageError and OSError."""
        work = tempfile.mkdtemp(prefix=slots.WORK, dir=self.directory)
        self.tree = f"{work}/tree"
        self.content = self.source.unpack(self.tree, advance)

    def build(self, label: str, advance: Advance) -> None:
        """Build the image of the tree, with a new identity. Raises ImageError and OSError."""
        bootable.check(self.tree)
        self.image_id = images.new_identity(self.content)
        images.build(
            self.tree,
            self.image,
            fstype=self.fstype,
            label=label,
            image_id=self.image_id,
            advance=advance,
        )

    def verify(self, advance: Advance) -> None:
        """Look whether the image holds the tree. Raises ImageError and OSError."""
        images.verify(self.image, self.tree, advance)


def fstype_of(image: str, wanted: str) -> str:
    """Give the type of file system of a new image: the wanted one, else that of the image it replaces."""
    try:
        there = superblock.identify(image).fstype
    except OSError:
        there = ""
    return wanted or (there if there in images.FSTYPES else images.EXT4)
