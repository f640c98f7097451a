"""Block devices as values, and which of them a spelling means (contract §1 and §6)."""

from __future__ import annotations

from immucore.errors import AmbiguousError, DeviceError
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What carries something else inside: never mounted itself, whatever label it shows (ID_FS_TYPE of udev).
MEMBERS = (
    *("crypto_LUKS", "LVM2_member", "linux_raid_member", "mpath_member", "bcache", "zfs_member", "drbd"),
    *("isw_raid_member", "ddf_raid_member"),
)
_NAMES = {
    "LABEL": ("label", "a filesystem labelled"),
    "UUID": ("uuid", "a filesystem with the UUID"),
    "PARTLABEL": ("partlabel", "a partition named"),
    "PARTUUID": ("partuuid", "a partition with the PARTUUID"),
    "": ("path", "the device"),
}
_GIVEN = ("LABEL", "PARTLABEL")  # names that anybody gives to anything; the others mean one thing
BOOTDISK, LOADER = "rd.cos.bootdisk", "LoaderDevicePartUUID"  # who can say which disk was booted from

# Where a wanted device may be. "Home" are the disks of the system: the boot disk, those of the state.
ANYWHERE, HOME_FIRST, HOME_ONLY = "anywhere", "home first", "home only"


class Device(Record):
    """A whole disk, partition, mapping or array; empty where nothing is known of it."""

    path: str  # /dev/…
    links: tuple[str, ...] = ()  # its other names, such as /dev/disk/by-id/…
    fstype: str = ""
    label: str = ""
    uuid: str = ""
    partlabel: str = ""
    partuuid: str = ""
    disks: tuple[str, ...] = ()  # the paths of the whole disks that it lies on; a disk's own
    parent: str = ""  # the path of the disk or array that a partition is a part of
    holders: tuple[str, ...] = ()  # the paths of the mappings and arrays that are made of it
    size_bytes: int = 0
    model: str = ""
    serial: str = ""  # of the disk, as the bus gives it
    bus: str = ""  # ata, scsi, usb, …
    removable: bool = (
        False  # it, or a disk that it lies on, comes and goes: sysfs says so, or its bus is USB
    )
    multipath: bool = False  # one of the paths of a multipath device

    @property
    def fstab_name(self) -> str:
        """How fstab names it: nothing that changes when a disk is added (contract §4.3)."""
        if self.uuid and not self.path.startswith("/dev/mapper/"):
            return f"UUID={self.uuid}"
        return f"PARTUUID={self.partuuid}" if self.partuuid else self.path

    @property
    def shut(self) -> bool:
        """Whether there may be more inside: a member not used yet, a mapping that has just been made."""
        stacked = not self.parent and self.path not in self.disks
        return not self.holders and (self.fstype in MEMBERS or (stacked and not self.fstype))

    def is_on(self, disks: Iterable[str]) -> bool:
        """Tell whether it lies on one of these whole disks."""
        return any(disk in disks for disk in self.disks)


class Wanted(Record):
    """A device that the layout asks for, and how long it is waited for from the start of the initramfs."""

    spec: str
    timeout_sec: int  # 0: for ever
    near: str = ""  # the spelling of the partition whose disks are home
    home: str = ANYWHERE
    partlabel: str = ""  # of its partition, where a broken superblock hides it


class Place(Record):
    """A partition of the machine's own that can take the evidence of a boot that went wrong."""

    device: Device
    path: str  # where the booted system sees it
    own_disk: bool  # it is on the disk of the state partition, or the one that was booted from
    remount: bool = False  # it is mounted read-only on purpose, and made writable for the moment


class Devices(Record):
    """Every block device of one look at the machine."""

    all: tuple[Device, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()  # (spelling, why what should answer to it cannot be repaired)
    unknown: tuple[Device, ...] = ()  # the kernel shows them, and udev has not looked at them yet
    boot: str = ""  # a spelling of the disk that was booted from, or of anything on it; empty: nobody says
    boot_origin: str = ""  # who says so: BOOTDISK or LOADER

    def candidates(
        self, spec: str, *, near: Device | None = None, home_only: bool = False
    ) -> tuple[Device, ...]:
        """List the devices that `spec` can mean: none, the one, or several of which none stands out."""
        return self._choose(spec, near, home_only)[0]

    def find(self, spec: str, *, near: Device | None = None, home_only: bool = False) -> Device:
        """Return the one device that `spec` means (HACKING.md, "Which device a spelling means").

        Raises DeviceError when there is none, or several of which none stands out.
        """
        if self.boot_origin == BOOTDISK and not self.boot_disks():
            raise AmbiguousError(
                f"cannot find {describe(self.boot)}, which {BOOTDISK} says was booted from",
                hint=f"{self._seen(self.boot)}; without {BOOTDISK} the agent goes by the firmware",
            )
        found, refused = self._choose(spec, near, home_only)
        if len(found) == 1:
            return found[0]
        if not found and spec in dict(self.broken):
            raise DeviceError(
                dict(self.broken)[spec], hint=f"boot recovery and repair it; {self._seen(spec)}"
            )
        claimants = self._claimants(spec)
        table = "".join(f"\n    {line}" for line in _table(claimants, refused))
        if found:
            raise AmbiguousError(
                f"cannot choose {describe(spec)}: {len(found)} devices have it",
                hint="remove all but one of them, or name one by its UUID= or PARTUUID=, "
                f"or its disk by {BOOTDISK}=:{table}",
            )
        hint = self._seen(spec)
        if any(_usable(each) for each in claimants):
            hint += f"; name it by its UUID= if it is one of those that were not taken:{table}"
        raise DeviceError(f"cannot find {describe(spec)}", hint=hint)

    def answers(self, wanted: Wanted) -> tuple[Device, ...]:
        """List the devices that a wanted one can be; none while the disk of BOOTDISK is not there."""
        if self.boot_origin == BOOTDISK and not self.boot_disks():
            return ()
        return self.candidates(wanted.spec, near=self._near(wanted), home_only=wanted.home == HOME_ONLY)

    def table(self, wanted: Wanted) -> list[str]:
        """Give a line for each device that has the name, with why it is not the one if it is not."""
        _, refused = self._choose(wanted.spec, self._near(wanted), wanted.home == HOME_ONLY)
        return list(_table(self._claimants(wanted.spec), refused))

    def unsettled(self, wanted: Wanted) -> str:
        """Say why the answer to `wanted` may still be another in a moment; empty when it is settled.

        A choice must not depend on which disk was faster: what would come first has to have been seen.
        """
        found, near = self.answers(wanted), self._near(wanted)
        if not found:
            return "it is not there"
        kind, value = split(wanted.spec)
        boot, close = self.boot_disks(), near.disks if near else ()
        if kind == "" and found[0].path == value:
            return ""
        if self.boot and not boot:
            return f"the disk with {self.boot}, which was booted from ({self.boot_origin}), is not there"
        first = set() if found[0].is_on(boot) else boot if found[0].is_on(close) else {*boot, *close}
        if found[0].removable and kind in _GIVEN and not (boot or close):
            return f"{found[0].path} is removable, and nobody says which disk was booted from"
        home = boot if found[0].is_on(boot) else close
        for device in self.unknown:  # it comes when its other disk does
            if len(device.disks) > 1 and device.is_on(home):
                return f"udev has not looked at {device.path} yet"
        return self._unseen(wanted, found, first, close)

    def _unseen(
        self, wanted: Wanted, found: tuple[Device, ...], first: Iterable[str], close: Iterable[str]
    ) -> str:
        """Say what has to be seen before `found` is chosen: all of the disks that come `first`.

        And of every fixed disk, when it is not at home, because another may have the same name.
        """
        own = {disk for device in found for disk in device.disks}
        for device in self.unknown:
            if (
                device.is_on(first)
                or device.path in [each.parent for each in found]
                or not (
                    found[0].is_on(close)
                    or device.is_on(own)
                    or (device.removable and not found[0].removable)
                    or _is_loop(device)
                )
            ):
                return f"udev has not looked at {device.path} yet"
        for device in self.all:
            hidden = wanted.partlabel != "" and device.partlabel == wanted.partlabel and not device.fstype
            if device.is_on(first) and (hidden or (device.shut and wanted.home != ANYWHERE)):
                return f"what is on {device.path} is not known yet"
        return ""

    def boot_disks(self) -> set[str]:
        """Name the disks that were booted from; none where nobody says which, or it is not there."""
        if not self.boot:
            return set()
        found = [*self._claimants(self.boot), *(each for each in self.unknown if each.path == self.boot)]
        found = [each for each in found if not each.removable] or found  # a stick can be a copy of the disk
        return {disk for device in found for disk in device.disks}

    def _near(self, wanted: Wanted) -> Device | None:
        found = self.candidates(wanted.near) if wanted.near else ()
        return found[0] if len(found) == 1 else None

    def _claimants(self, spec: str) -> tuple[Device, ...]:
        """List every device that carries the name, also those that cannot be meant."""
        kind, value = split(spec)
        field = _NAMES[kind][0]
        if kind in ("UUID", "PARTUUID"):  # written in either case
            value = value.lower()
            return tuple(device for device in self.all if getattr(device, field).lower() == value)
        return tuple(
            device
            for device in self.all
            if getattr(device, field) == value or (kind == "" and value in device.links)
        )

    def _choose(
        self, spec: str, near: Device | None, home_only: bool
    ) -> tuple[tuple[Device, ...], dict[str, str]]:
        """Return what `spec` can mean, and by their paths why the others that have the name are not."""
        claimants = sorted(self._claimants(spec), key=_by_path)
        wholes = {device.path: device for device in self.all} if claimants else {}
        refused = {device.path: why for device in claimants if (why := _obstacle(device, wholes))}
        boot, close = self.boot_disks(), near.disks if near else ()
        home = {*boot, *close}
        if (home or home_only) and split(spec)[0] in _GIVEN:
            locked = next((each for each in claimants if each.fstype in MEMBERS and each.is_on(home)), None)
            for device in claimants:
                if device.path not in refused and not device.is_on(home):
                    why = _foreign(device, home_only and bool(home), locked)
                    if spec in dict(self.broken):  # old data of another disk would be taken for the lost one
                        why = why or "what has the name on the system's disk is damaged"
                    refused.update({device.path: why} if why else {})
        left = [device for device in claimants if device.path not in refused]
        for why, better in (
            ("not on the boot disk", [device for device in left if device.is_on(boot)]),
            (f"not on the disk of {near.path if near else ''}", [d for d in left if d.is_on(close)]),
            ("removable", [device for device in left if not device.removable]),
        ):
            if better:
                refused.update({device.path: why for device in left if device not in better})
                left = better
                break
        things: dict[object, Device] = {}
        for device in left:
            same = things.setdefault(_thing(device), device)
            if same is not device:
                refused[device.path] = f"the same as {same.path}"
        return tuple(things.values()), refused

    def _seen(self, spec: str) -> str:
        kind, _ = split(spec)
        field = _NAMES[kind][0]
        seen = [f"{getattr(device, field)} ({device.path})" for device in self.all if getattr(device, field)]
        if kind == "":
            seen = [device.path for device in self.all]
        members = [f"{d.path} is {d.fstype}" for d in self.all if d.fstype in MEMBERS]
        what = {"LABEL": "labels", "UUID": "UUIDs", "PARTLABEL": "partition names", "PARTUUID": "PARTUUIDs"}
        text = f"{what.get(kind, 'devices')} seen: {', '.join(seen) or 'none'}"
        if members:
            text += f"; not looked into: {', '.join(members)}"
        if self.unknown:
            text += f"; not known to udev yet: {', '.join(device.path for device in self.unknown)}"
        return text


def split(spec: str) -> tuple[str, str]:
    """Split `LABEL=x` and the like into (kind, value); `/dev/…` has an empty kind."""
    kind, separator, value = spec.partition("=")
    return (kind, value) if separator and kind in _NAMES and kind else ("", spec)


def describe(spec: str) -> str:
    """Say what a spelling looks for, for messages: a filesystem labelled 'COS_STATE'."""
    kind, value = split(spec)
    return f"{_NAMES[kind][1]} '{value}'"


def _obstacle(device: Device, wholes: dict[str, Device]) -> str:
    """Say why a device is never mounted itself; empty where it may be."""
    if device.multipath:
        return "a path of a multipath device"
    if device.fstype in MEMBERS:
        return f"holds {device.fstype}"
    if device.holders:
        return f"used by {', '.join(device.holders)}"
    whole = wholes.get(device.parent)  # the members of a mirror show the partitions of the mirror too
    why = _obstacle(whole, wholes) if whole else ""
    return f"on {device.parent}: {why}" if why else ""


def _foreign(device: Device, home_only: bool, locked: Device | None) -> str:
    """Say why a device on a foreign disk is not meant by a name; empty where it may be."""
    if device.removable:
        return "removable, and not the boot disk"
    if home_only:
        return "on another disk than the system"
    return f"{locked.path}, on the system's disk, has the name too" if locked else ""


def _thing(device: Device) -> object:
    """Give what is equal for two paths to one thing, and for nothing else."""
    if device.serial and not device.removable and (device.uuid or device.partuuid):
        return (device.serial, device.bus, device.uuid, device.partuuid, device.size_bytes)
    return device.path


def _by_path(device: Device) -> tuple[int, str]:
    return len(device.path), device.path


def _is_loop(device: Device) -> bool:
    return all(disk.startswith("/dev/loop") for disk in device.disks)


def _usable(device: Device) -> bool:
    return device.fstype not in MEMBERS and not device.holders and not device.multipath


def _table(devices: Iterable[Device], refused: dict[str, str]) -> Iterator[str]:
    for device in devices:
        line = f"{device.path}  {device.size_bytes >> 20} MiB  {device.model or '-'}  {device.serial or '-'}"
        why = refused.get(device.path)
        line += f"  UUID={device.uuid or '-'}  on {', '.join(device.disks)}"
        yield f"{line}: {why}" if why else line
