"""The cOS layout (contract §1, §3, §4).

A partition with images, one of them looped as root, the rest laid over it.

Pure: command line, devices and what the image says in, plans out.
"""

from __future__ import annotations

from immucore.cmdline import shown_root
from immucore.devices import ANYWHERE, HOME_FIRST, HOME_ONLY, Device, Devices, Place, Wanted
from immucore.errors import AmbiguousError, CmdlineError, DeviceError, LayoutError
from immucore.fstab import lines_of, mount_point
from immucore.layouts.cos.inside import furnish
from immucore.layouts.cos.modes import attempts, image_path, mode, partition, users_data
from immucore.layouts.cos.names import directory_names
from immucore.layouts.cos.settings import (
    OEM,
    PERSISTENT_VOLUME,
    Volume,
    by_components,
    effective,
    listed_paths,
    oem,
    read,
)
from immucore.layouts.upkeep import kept_up
from immucore.plan import (
    IMPORTANT,
    OPTIONAL,
    REQUIRED,
    SYSROOT,
    Bind,
    Loop,
    Missing,
    Mount,
    Operation,
    Overlay,
    Plan,
    Refused,
    Seed,
    TellBootLoader,
    WriteFile,
    is_below,
)

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.cmdline import Cmdline
    from immucore.image import Image
    from immucore.layouts.cos.settings import Rejected, Settings

__all__ = [
    "attempts",
    "evidence_places",
    "fell_back",
    "image_file",
    "lenient",
    "listed_paths",
    "mode",
    "next_entry",
    "root",
    "root_devices",
    "sentinels",
    "state",
    "state_devices",
    "tell_boot_loader",
]

STATE = "/run/initramfs/cos-state"
OVERLAY_BASE = "/run/overlay"
PARTLABELS = {"LABEL=COS_PERSISTENT": "persistent"}  # contract §1
BOOT_LOADER = "/run/immucore/boot-loader"  # where OEM is mounted to tell GRUB something
OPTIONAL_TIMEOUT_SEC = 30
PERSISTENT = ("LABEL=COS_PERSISTENT", "PARTLABEL=persistent")


def lenient(cmdline: Cmdline) -> bool:
    """Whether a layout that cannot be read is left out: recovery needs nothing of the user's."""
    return not users_data(cmdline)


def image_file(cmdline: Cmdline) -> tuple[str, str]:
    """Say where the image is: on what, and its path there."""
    return STATE, image_path(cmdline)


def root_devices(cmdline: Cmdline) -> tuple[Wanted, ...]:
    """List the devices that root() needs."""
    state = Wanted(
        spec=partition(cmdline),
        timeout_sec=cmdline.timeout_sec,
        near=cmdline.near,
        home=HOME_ONLY if cmdline.near else HOME_FIRST,
    )
    if cmdline.safe:
        return (state,)
    return state, _wanted(oem(cmdline), cmdline.oem_timeout_sec, cmdline)


def root(cmdline: Cmdline, devices: Devices) -> Plan:
    """Mount the partition, the image in it, and OEM: what has to be there before the layout can be read."""
    device = _system(cmdline, devices)
    access = ("rw" if cmdline.debug_rw else "ro",)
    why = f"root={shown_root(cmdline.root)}" if cmdline.root else f"the mode is {mode(cmdline)}"
    why_image = f"cos-img/filename={cmdline.image}"
    if cmdline.instead_of:
        why = why_image = f"{cmdline.instead_of} could not be booted (rd.cos.fallback)"
    operations = (
        _mount(device, STATE, access, why, REQUIRED),
        Loop(
            source="".join(image_file(cmdline)),
            target=SYSROOT,
            options=access,
            init=cmdline.init,
            why=why_image,
        ),
        *(() if cmdline.safe else (_oem(cmdline, devices, device),)),
    )
    return Plan(
        operations=kept_up(operations, cmdline.fsck_mode, cmdline.fsck_repair), warnings=cmdline.warnings
    )


def _system(cmdline: Cmdline, devices: Devices) -> Device:
    """Find the partition that holds the image; for a slot that is booted instead, on the same disk."""
    near = _known(cmdline.near, devices) if cmdline.near else None
    return devices.find(partition(cmdline), near=near, home_only=bool(cmdline.near))


def _known(spec: str, devices: Devices) -> Device | None:
    found = devices.candidates(spec)
    return found[0] if len(found) == 1 else None


def state_devices(cmdline: Cmdline, image: Image) -> tuple[Wanted, ...]:
    """List the devices that state() needs beside those of root()."""
    settings = read(cmdline, image)
    needless = not users_data(cmdline)
    volumes = [(volume, needless or "nofail" in volume.options) for volume in settings.volumes]
    if _on_device(settings):
        volumes.append((_overlay_volume(settings), needless))
    return tuple(
        _wanted(volume, OPTIONAL_TIMEOUT_SEC if optional else cmdline.timeout_sec, cmdline)
        for volume, optional in volumes
    )


def _wanted(volume: Volume, timeout_sec: int, cmdline: Cmdline) -> Wanted:
    return Wanted(
        spec=volume.spec,
        timeout_sec=timeout_sec,
        near=partition(cmdline),
        home=_home(volume),
        partlabel="oem" if volume.mountpoint == OEM else PARTLABELS.get(volume.spec, ""),
    )


def _home(volume: Volume) -> str:
    """Say where a volume may be: what configures the machine is on its own disks, its data should be."""
    if volume.mountpoint == OEM:
        return HOME_ONLY
    return HOME_FIRST if volume.spec in PERSISTENT else ANYWHERE


def state(cmdline: Cmdline, devices: Devices, image: Image) -> Plan:
    """Lay volumes, overlays and persistent state over the root that root() mounted."""
    settings = read(cmdline, image)
    near = _system(cmdline, devices)
    needed = users_data(cmdline)
    if needed:
        _refuse_second_oem(cmdline, settings, devices, near)
    lost = _lost_state(cmdline, settings, devices, near)
    if lost:
        settings = _ephemeral_instead(settings, lost)
    names = directory_names(listed.name for listed in settings.ephemeral.values())
    layers: dict[str, tuple[Operation, ...]] = {
        volume.mountpoint: (_volume(volume, REQUIRED if needed else IMPORTANT, devices, near),)
        for volume in settings.volumes
    }
    if lost and lost.mountpoint in layers:  # whatever its options say: what it keeps is wanted
        layers[lost.mountpoint] = tuple(
            each.replace(criticality=IMPORTANT) for each in layers[lost.mountpoint]
        )
    for path, listed in settings.ephemeral.items():
        backing = f"{OVERLAY_BASE}/{names[listed.name]}.overlay"
        layers[path] = (_overlay(path, backing, listed.why, needed),)
    layers.update(_tmp(image, {*layers, *settings.persistent}))
    # Persistent paths come after the volume that keeps them, and before what lies below them.
    persistent = _persistent(settings, image.identity, needed)
    later = {path for path in layers if any(is_below(path, kept) for kept in persistent)}
    ordered = [layers[path] for path in sorted({*layers} - later, key=by_components)]
    layers.update(persistent)
    ordered += [layers[path] for path in sorted({*later, *persistent}, key=by_components)]
    operations = (
        *_overlay_base(settings, devices, near, needed),
        *(operation for layer in ordered for operation in layer),
        *(_rejected(each) for each in settings.rejected),
        *furnish(cmdline, image, settings),
    )
    return Plan(
        operations=kept_up(operations, cmdline.fsck_mode, cmdline.fsck_repair),
        notes=settings.notes,
        warnings=settings.warnings,
        layout=tuple(effective(settings).items()),
    )


def _lost_state(cmdline: Cmdline, settings: Settings, devices: Devices, near: Device) -> Volume | None:
    """Return the volume that keeps the state if it is not there and the boot goes on nevertheless."""
    volumes = [*settings.volumes, *(() if cmdline.safe else (oem(cmdline),))]
    holding = [volume for volume in volumes if is_below(settings.state_target, volume.mountpoint)]
    volume = max(holding, key=lambda each: len(each.mountpoint), default=None)
    if volume is None or not settings.persistent or _candidates(volume, devices, near):
        return None
    required = users_data(cmdline) and "nofail" not in volume.options and volume in settings.volumes
    return None if required else volume


def _ephemeral_instead(settings: Settings, lost: Volume) -> Settings:
    """Keep nothing in this boot, and say so for each path."""
    why = f"{lost}, which keeps it, is not there"
    whole: Settings = settings.replace(
        ephemeral={**settings.ephemeral, **settings.persistent},
        persistent={},
        warnings=(*settings.warnings, *(f"{path} is ephemeral: {why}" for path in settings.persistent)),
    )
    return whole


def sentinels(cmdline: Cmdline) -> Plan:
    """Say which mode was booted, in the field's two places.

    Written after success (contract §3); before it only for the cloud-init stages, where there are any, and
    taken back by a boot that fails (Boot._stage).
    """
    name = mode(cmdline)
    return Plan(
        operations=tuple(
            WriteFile(target=f"/run/{field}/{name}_mode", content="1", why=f"the mode is {name}")
            for field in ("cos", "elemental")
        ),
        warnings=() if cmdline.engaged else cmdline.warnings,
    )


def evidence_places(cmdline: Cmdline, devices: Devices) -> tuple[Place, ...]:
    """List where the evidence of a boot that went wrong may be kept, the best place first.

    Only what a boot would mount itself; without the state partition, and where nobody says which disk was
    booted from, none of them is known to be on the machine's own disk.
    """
    try:
        state = devices.find(partition(cmdline))
    except (CmdlineError, DeviceError):  # that may be what went wrong
        state = None
    home = {*devices.boot_disks(), *(state.disks if state else ())}
    places = []
    persistent, _, mountpoint = PERSISTENT_VOLUME.partition(":")
    for spec, path in ((oem(cmdline).spec, OEM), (persistent, mountpoint)):
        try:
            device = devices.find(spec, near=state, home_only=path == OEM)
        except DeviceError:
            continue
        places.append(Place(device=device, path=path, own_disk=device.is_on(home)))
    if state is not None:
        places.append(Place(device=state, path=STATE, own_disk=True, remount=True))
    return tuple(places)


def next_entry(cmdline: Cmdline, failed: tuple[str, ...]) -> str:
    """Name the boot loader's entry for the next slot that has not failed; empty when there is none.

    The entries of cos-toolkit and Kairos are cos, fallback and recovery; those of Elemental v2, which names
    the mode on the command line, have the modes' names.
    """
    order = ("active", "passive", "recovery")
    later = order[order.index(mode(cmdline)) + 1 :]
    name = next((name for name in later if name not in failed), "")
    return name if cmdline.mode else {"passive": "fallback"}.get(name, name)


def tell_boot_loader(cmdline: Cmdline, devices: Devices, entry: str) -> Plan:
    """Have the boot loader boot another entry, once: its environment block lies on OEM (contract §1).

    Raises DeviceError where an OEM may be anybody's.
    """
    why = f"{mode(cmdline)} could not be booted (rd.cos.fallback)"
    near = _known(partition(cmdline), devices)
    if near is None and not devices.boot_disks():
        raise DeviceError(
            "cannot tell which OEM is this machine's: neither its state nor its boot disk is there",
            hint="name the disk that was booted from: rd.cos.bootdisk=/dev/disk/by-id/…",
        )
    mount = _volume(oem(cmdline).replace(why=why), REQUIRED, devices, near, target=BOOT_LOADER)
    tell = TellBootLoader(target=f"{BOOT_LOADER}/grubenv", entry=entry, why=why)
    return Plan(operations=(mount, tell))


def fell_back(cmdline: Cmdline, reason: str) -> Plan:
    """Tell the booted system that it is not the one that was asked for (contract §3)."""
    return Plan(
        operations=(
            WriteFile(
                target="/run/cos/upgrade_failure",
                content=f"{reason}\n",
                why=f"{mode(cmdline)} is booted instead of {cmdline.instead_of}",
            ),
        )
    )


def _candidates(volume: Volume, devices: Devices, near: Device) -> tuple[Device, ...]:
    return devices.candidates(volume.spec, near=near, home_only=_home(volume) == HOME_ONLY)


def _mount(device: Device, target: str, options: tuple[str, ...], why: str, criticality: str) -> Operation:
    return Mount(
        source=device.path,
        target=target,
        fstype=device.fstype,
        options=options,
        fstab_name=device.fstab_name,
        why=why,
        criticality=criticality,
    )


def _volume(
    volume: Volume, criticality: str, devices: Devices, near: Device | None, target: str = ""
) -> Operation:
    """Mount a volume, rw unless its options say otherwise."""
    target = target or SYSROOT + volume.mountpoint
    criticality = OPTIONAL if "nofail" in volume.options else criticality
    try:
        device = devices.find(volume.spec, near=near, home_only=_home(volume) == HOME_ONLY)
    except DeviceError as error:
        return Missing(
            spec=volume.spec,
            target=target,
            reason=error.message,
            hint=error.hint,
            why=volume.why,
            criticality=criticality,
        )
    options = volume.options if {"ro", "rw"} & {*volume.options} else ("rw", *volume.options)
    why = volume.why
    if near and not device.is_on(near.disks):
        why += f", on another disk than {near.path}"
    return _mount(device, target, options, why, criticality)


def _oem(cmdline: Cmdline, devices: Devices, near: Device) -> Operation:
    """Mount OEM: a boot goes on without it.

    Raises AmbiguousError where nobody can tell which it is (contract §6), except in recovery.
    """
    if users_data(cmdline):
        try:
            devices.find(oem(cmdline).spec, near=near, home_only=True)
        except AmbiguousError:
            raise
        except DeviceError:
            pass  # told by the operation
    return _volume(oem(cmdline), IMPORTANT, devices, near)


def _rejected(each: Rejected) -> Refused:
    return Refused(
        spec=each.text,
        target=f"'{each.text}' of {each.why}",
        reason=each.reason,
        hint=each.hint,
        why=each.why,
        criticality=IMPORTANT,
    )


def _refuse_second_oem(cmdline: Cmdline, settings: Settings, devices: Devices, near: Device) -> None:
    """Accept another spelling of the OEM that is mounted already, but no other device (contract §4, 6)."""
    ours, theirs = oem(cmdline), settings.oem
    if theirs is None or theirs.spec == ours.spec:
        return
    there = devices.candidates(theirs.spec, near=near)
    if there and there != _candidates(ours, devices, near):
        raise LayoutError(
            f"cannot mount both '{ours}' and '{theirs}' on {theirs.mountpoint}",
            hint=f"OEM is found before the layout: use rd.cos.oemlabel=, or correct what {theirs.why}",
        )


def _criticality(path: str, needed: bool) -> str:
    """Tell what the loss of a writable path means (contract §7).

    Recovery goes on to its shell without any.
    """
    return REQUIRED if path in ("/etc", "/var") and needed else IMPORTANT


def _overlay(path: str, backing: str, why: str, needed: bool) -> Operation:
    return Overlay(target=SYSROOT + path, backing=backing, why=why, criticality=_criticality(path, needed))


def _on_device(settings: Settings) -> bool:
    return bool(settings.ephemeral) and not settings.overlay.startswith("tmpfs:")


def _overlay_volume(settings: Settings) -> Volume:
    return Volume(spec=settings.overlay, mountpoint=OVERLAY_BASE, options=(), why=settings.overlay_why)


def _overlay_base(settings: Settings, devices: Devices, near: Device, needed: bool) -> tuple[Operation, ...]:
    """Mount what backs the ephemeral overlays, if there are any."""
    criticality = _criticality("/etc", needed)
    if not settings.ephemeral:
        return ()
    if _on_device(settings):
        return (_volume(_overlay_volume(settings), criticality, devices, near, target=OVERLAY_BASE),)
    size = settings.overlay.partition(":")[2]
    return (
        Mount(
            source="immucore-overlay",  # systemd binds a source that begins with /dev/ to a device unit
            target=OVERLAY_BASE,
            fstype="tmpfs",
            options=("mode=0755", f"size={size}"),
            why=settings.overlay_why,
            criticality=criticality,
        ),
    )


def _persistent(settings: Settings, identity: str, needed: bool) -> dict[str, tuple[Operation, ...]]:
    """Keep each path below the target: a directory that is seeded and bound, or an overlay's upper."""
    target = settings.state_target
    base = target if is_below(target, "/run") else SYSROOT + target
    names = directory_names(listed.name for listed in settings.persistent.values())
    layers: dict[str, tuple[Operation, ...]] = {}
    for path, listed in settings.persistent.items():
        kept, why, criticality = f"{base}/{names[listed.name]}", listed.why, _criticality(path, needed)
        if settings.bind:
            layers[path] = (
                Seed(
                    source=SYSROOT + path,
                    target=f"{kept}.bind",
                    image=identity,
                    why=why,
                    criticality=criticality,
                ),
                Bind(source=f"{kept}.bind", target=SYSROOT + path, why=why, criticality=criticality),
            )
        else:
            layers[path] = (_overlay(path, f"{kept}.overlay", why, needed),)
    return layers


def _tmp(image: Image, taken: set[str]) -> dict[str, tuple[Operation, ...]]:
    """Give /tmp a tmpfs, unless the layout or the image does something about it itself."""
    target = "/tmp"  # noqa: S108  the directory of the new root
    theirs = [mount_point(line) for line in lines_of(image.fstab)]
    if target in taken or target in theirs or image.mounts_tmp:
        return {}
    mount = Mount(
        source="tmpfs",
        target=SYSROOT + target,
        fstype="tmpfs",
        options=("mode=1777", "nosuid", "nodev"),
        why=f"{target} has to be writable (the default)",
        criticality=IMPORTANT,
    )
    return {target: (mount,)}
