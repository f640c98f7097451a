"""Block devices as values, and which of them a spelling means (contract §1 and §6)."""

from __future__ import annotations

from immucore.errors import DeviceError
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

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


class Device(Record):
    """A whole disk, partition, mapping or array; empty where udev knows nothing."""

    path: str  # /dev/…
    links: tuple[str, ...] = ()  # its other names, such as /dev/disk/by-id/…
    fstype: str = ""
    label: str = ""
    uuid: str = ""
    partlabel: str = ""
    partuuid: str = ""
    disk: str = ""  # the whole disk's path; a disk's own
    size_bytes: int = 0

    @property
    def fstab_name(self) -> str:
        """How fstab names it: nothing that changes when a disk is added (contract §4.3)."""
        if self.uuid and not self.path.startswith("/dev/mapper/"):
            return f"UUID={self.uuid}"
        return f"PARTUUID={self.partuuid}" if self.partuuid else self.path


def split(spec: str) -> tuple[str, str]:
    """Split `LABEL=x` and the like into (kind, value); `/dev/…` has an empty kind."""
    kind, separator, value = spec.partition("=")
    return (kind, value) if separator and kind in _NAMES and kind else ("", spec)


class Devices(Record):
    """Every block device of one look at the machine."""

    all: tuple[Device, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()  # (spelling, why what should answer to it cannot be repaired)

    def candidates(self, spec: str) -> tuple[Device, ...]:
        """List the devices that `spec` can mean; members of something else are none."""
        kind, value = split(spec)
        field = _NAMES[kind][0]
        fold = kind in ("UUID", "PARTUUID")  # written in either case
        wanted = value.lower() if fold else value
        return tuple(
            device
            for device in self.all
            if (
                (getattr(device, field).lower() if fold else getattr(device, field)) == wanted
                or (kind == "" and wanted in device.links)
            )
            and device.fstype not in MEMBERS
        )

    def find(self, spec: str, *, near: Device | None = None) -> Device:
        """Return the one device that `spec` means; of several, the one on the disk of `near`.

        Raises DeviceError when there is none, or several of which none stands out.
        """
        found = self.candidates(spec)
        if len(found) > 1 and near is not None:
            found = tuple(device for device in found if device.disk == near.disk) or found
        if not found and spec in dict(self.broken):
            raise DeviceError(
                dict(self.broken)[spec], hint=f"boot recovery and repair it; {self._seen(spec)}"
            )
        if not found:
            raise DeviceError(f"cannot find {describe(spec)}", hint=self._seen(spec))
        if len(found) > 1:
            table = "".join(f"\n    {line}" for line in _table(found))
            raise DeviceError(
                f"cannot choose {describe(spec)}: {len(found)} devices have it",
                hint=f"remove all but one of them, or name one by its UUID=:{table}",
            )
        return found[0]

    def _seen(self, spec: str) -> str:
        kind, _ = split(spec)
        field = _NAMES[kind][0]
        seen = [f"{getattr(device, field)} ({device.path})" for device in self.all if getattr(device, field)]
        if kind == "":
            seen = [device.path for device in self.all]
        members = [f"{d.path} is {d.fstype}" for d in self.all if d.fstype in MEMBERS]
        what = {"LABEL": "labels", "UUID": "UUIDs", "PARTLABEL": "partition names", "PARTUUID": "PARTUUIDs"}
        text = f"{what.get(kind, 'devices')} seen: {', '.join(seen) or 'none'}"
        return f"{text}; not looked into: {', '.join(members)}" if members else text


def describe(spec: str) -> str:
    """Say what a spelling looks for, for messages: a filesystem labelled 'COS_STATE'."""
    kind, value = split(spec)
    return f"{_NAMES[kind][1]} '{value}'"


def _table(devices: tuple[Device, ...]) -> Iterator[str]:
    for device in devices:
        yield f"{device.path}  {device.size_bytes >> 20} MiB  UUID={device.uuid or '-'}  on {device.disk}"


class Wanted(Record):
    """A device that the layout asks for, and how long it is waited for from the start of the initramfs."""

    spec: str
    timeout_sec: int  # 0: for ever
    # Where a broken superblock hides it: the PARTLABEL of its partition, on the disk of the device `near`.
    partlabel: str = ""
    near: str = ""


class Place(Record):
    """A partition of the machine's own that can take the evidence of a boot that went wrong."""

    device: Device
    path: str  # where the booted system sees it
    own_disk: bool  # it is on the disk of the state partition; no other may be a removable one
    remount: bool = False  # it is mounted read-only on purpose, and made writable for the moment
