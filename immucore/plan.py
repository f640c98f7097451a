"""Operations, what a boot does, as values.

A Plan is a sequence of them. Operations name paths, never each other.
"""

from __future__ import annotations

from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

SYSROOT = "/sysroot"
REQUIRED = "required"  # its failure stops the boot
IMPORTANT = "important"  # the boot goes on, degraded, and everyone sees it
OPTIONAL = "optional"  # fstab's nofail: logged


class Operation(Record):
    """One step of a boot.

    `why` is the setting or rule that asked for it, `criticality` what its failure means.
    """

    target: str
    why: str
    criticality: str = REQUIRED

    @property
    def needs(self) -> tuple[str, ...]:
        """The paths without which it cannot be tried, its target among them."""
        return (self.target,)

    @property
    def loses(self) -> tuple[str, ...]:
        """The paths that are not there when it has failed."""
        return (self.target,)

    @property
    def kind(self) -> str:
        """The word for it in plan.json and steps.json."""
        return type(self).__name__.lower()


class Mount(Operation):
    """Mount a block device, or a file system without one (tmpfs), as mount(2) does."""

    source: str
    fstype: str
    options: tuple[str, ...] = ()
    fstab_name: str = ""  # how fstab names the source; empty: as `source` does

    @property
    def needs(self) -> tuple[str, ...]:
        """A device whose check has failed is not mounted."""
        return (self.source, self.target)

    def __str__(self) -> str:
        return f"mount {self.source} on {self.target} ({', '.join((self.fstype, *self.options))})"


class Missing(Operation):
    """A volume whose device is not there.

    Nothing below its mount point may be tried, and the reason is told.
    """

    spec: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return f"mount {self.spec} on {self.target} (missing: {self.reason})"


class Check(Operation):
    """Check the file system on the device `target` before it is mounted rw, where it says that it needs it.

    `mode` and `repair` are those of systemd-fsck(8).
    """

    fstype: str
    mode: str = "auto"
    repair: str = "preen"

    def __str__(self) -> str:
        return f"check {self.target} ({self.fstype}, fsck.mode={self.mode}, fsck.repair={self.repair})"


class Grow(Operation):
    """Let the file system that is mounted at `target` fill its device, `source`, by ioctl(2)."""

    source: str

    @property
    def needs(self) -> tuple[str, ...]:
        """It is grown where it is mounted."""
        return (self.source, self.target)

    @property
    def loses(self) -> tuple[str, ...]:
        """Nothing: what is mounted stays as large as it was."""
        return ()

    def __str__(self) -> str:
        return f"grow {self.target} to the size of {self.source}"


class Refused(Missing):
    """An entry of a list of paths that is none; its `target` names the entry, not a path."""

    @property
    def loses(self) -> tuple[str, ...]:
        """Nothing: its siblings do not suffer from it."""
        return ()

    def __str__(self) -> str:
        return f"leave out {self.target}"


class Loop(Operation):
    """Attach the image at `source` to a free loop device and mount that, if a system is in it.

    The type is read from its superblock.
    """

    source: str
    options: tuple[str, ...] = ("ro",)
    init: str = ""  # what is to be run in it (init= of the command line); empty: the usual

    @property
    def needs(self) -> tuple[str, ...]:
        """The file lies on a file system that has to be there."""
        return (self.source, self.target)

    def __str__(self) -> str:
        return f"loop {self.source} on {self.target} ({', '.join(self.options)})"


class Overlay(Operation):
    """Stack a writable upper directory on what is at `target` now (overlayfs: Documentation/filesystems)."""

    backing: str  # holds upper/ and work/; one file system, or overlayfs refuses

    @property
    def needs(self) -> tuple[str, ...]:
        """The upper directory has to be there too."""
        return (self.backing, self.target)

    def __str__(self) -> str:
        return f"overlay on {self.target} (upper in {self.backing})"


class Seed(Operation):
    """Copy the image's directory `source` to `target`, or have what is there follow an image that is new."""

    source: str
    image: str = ""  # identity of the image; empty: it is not known, and what is there stays

    @property
    def needs(self) -> tuple[str, ...]:
        """What is copied has to be there too."""
        return (self.source, self.target)

    def __str__(self) -> str:
        return f"seed {self.target} from {self.source}"


class Bind(Operation):
    """Make what is at `source` visible at `target` too (mount --bind)."""

    source: str

    @property
    def needs(self) -> tuple[str, ...]:
        """What is bound has to be there too."""
        return (self.source, self.target)

    def __str__(self) -> str:
        return f"bind {self.source} on {self.target}"


class MakeDirectory(Operation):
    """Make a directory with this mode if there is none."""

    mode: int = 0o755

    def __str__(self) -> str:
        return f"make {self.target} ({self.mode:04o})"


class MachineId(Operation):
    """Give the machine the id that it had, kept at `source`, if the image has none (machine-id(5))."""

    source: str

    @property
    def needs(self) -> tuple[str, ...]:
        """Where it is kept has to be there too."""
        return (self.source, self.target)

    def __str__(self) -> str:
        return f"write {self.target} from {self.source}"


class Extensions(Operation):
    """Link the images at `source` to where systemd-sysext and systemd-confext look, below `target`.

    Those of each of `sets`, the first of two with one name. `spared` are directories of the booted system
    that no extension may hide.
    """

    source: str
    sets: tuple[str, ...]
    spared: tuple[str, ...]

    @property
    def loses(self) -> tuple[str, ...]:
        """Nothing that anything else needs."""
        return ()

    def __str__(self) -> str:
        return f"link the extensions in {self.source} ({', '.join(self.sets)})"


class WriteFile(Operation):
    """Write a small file, replacing what was there in one step."""

    content: str

    def __str__(self) -> str:
        return f"write {self.target}"


class TellBootLoader(Operation):
    """Have GRUB boot `entry` next time, once: next_entry in the environment block at `target`."""

    entry: str

    def __str__(self) -> str:
        return f"set next_entry={self.entry} in {self.target}"


class Stage(Operation):
    """Do a step of a cloud-init stage; `target` is the file that asks for it."""

    stage: str
    name: str

    @property
    def loses(self) -> tuple[str, ...]:
        """Nothing: its siblings do not suffer from it."""
        return ()

    def __str__(self) -> str:
        return f"do '{self.name}' of stage {self.stage}"


class Plan(Record):
    """Operations in their order, and sentences about what was asked for and is done otherwise."""

    operations: tuple[Operation, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    layout: tuple[tuple[str, object], ...] = ()  # what was asked for, entry by entry: layout.json

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __add__(self, other: Plan) -> Plan:
        """Do this and then the other."""
        return Plan(
            operations=self.operations + other.operations,
            notes=self.notes + other.notes,
            warnings=self.warnings + other.warnings,
            layout=self.layout + other.layout,
        )


def is_below(path: str, ancestor: str) -> bool:
    """Tell whether `path` is `ancestor` or lies in it."""
    return path == ancestor or path.startswith(ancestor.rstrip("/") + "/")


def as_booted(path: str) -> str:
    """Give the name that a path of a plan has after the switch to the new root."""
    return path[len(SYSROOT) :] or "/" if is_below(path, SYSROOT) else path
