"""What cos-layout.env, the command line and the defaults together ask for (contract §4.1)."""

from __future__ import annotations

from immucore.cmdline import DEVICE_PREFIXES, overlay
from immucore.errors import LayoutError
from immucore.layouts.cos.modes import MODES, mode
from immucore.plan import is_below
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.cmdline import Cmdline
    from immucore.image import Image

OEM = "/oem"
DEFAULT_RW_PATHS = "/etc /root /home /opt /srv /usr/local /var"
DEFAULT_STATE_TARGET = "/usr/local/.state"
PERSISTENT_VOLUME = "LABEL=COS_PERSISTENT:/usr/local"


class Volume(Record):
    """An entry of VOLUMES or rd.cos.mount=."""

    spec: str  # a spelling of a device
    mountpoint: str
    options: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return ":".join((self.spec, self.mountpoint, *filter(None, [",".join(self.options)])))


class Settings(Record):
    """Every question of the layout with its answer.

    A path is in one place only; `notes` say where it was in two.
    """

    volumes: tuple[Volume, ...]  # without OEM; by mount point, what holds others first
    oem: Volume | None  # what the layout says about /oem, where OEM is mounted already
    overlay: str  # tmpfs:<size> or a spelling of a device
    overlay_why: str
    ephemeral: dict[str, str]  # path → why
    persistent: dict[str, str]  # path → why
    state_target: str
    bind: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def read(cmdline: Cmdline, image: Image) -> Settings:
    """Settle the layout of this boot. Raises LayoutError."""
    notes: list[str] = []
    volumes = _volumes(cmdline, image, notes)
    ephemeral = _paths(image, "RW_PATHS", DEFAULT_RW_PATHS, "CUSTOM_EPHEMERAL_MOUNTS")
    persistent = _paths(image, "PERSISTENT_STATE_PATHS", "", "CUSTOM_BIND_MOUNTS")
    state_target = _state_target(image)
    if persistent and not any(is_below(state_target, path) for path in (*volumes, "/run")):
        first = next(iter(persistent.values()))
        if MODES[mode(cmdline)].users_data:
            raise LayoutError(
                f"cannot keep state in {state_target} ({first}): it lies on no volume",
                hint=f"add a volume for it to VOLUMES, such as {PERSISTENT_VOLUME}",
            )
        notes += [f"{path}: ephemeral, {state_target} lies on no volume of this mode" for path in persistent]
        ephemeral, persistent = {**ephemeral, **persistent}, {}
    for path, why in [*ephemeral.items(), *persistent.items()]:
        if path in volumes:
            notes.append(f"{path}: a volume, although {why}")
        elif path in persistent and path in ephemeral and persistent[path] != why:
            notes.append(f"{path}: persistent, although {why}")
    base = image.setting("OVERLAY")
    bind = image.setting("PERSISTENT_STATE_BIND")
    return Settings(
        volumes=tuple(volume for path, volume in volumes.items() if path != OEM),
        oem=volumes.get(OEM),
        overlay=_overlay(base.value, base.why) if base and base.value else cmdline.overlay,
        overlay_why=base.why if base and base.value else f"rd.cos.overlay={cmdline.overlay}",
        ephemeral={p: why for p, why in ephemeral.items() if p not in volumes and p not in persistent},
        persistent={path: why for path, why in persistent.items() if path not in volumes},
        state_target=state_target,
        bind=bool(bind and bind.value == "true"),
        notes=tuple(notes),
        warnings=(*image.warnings, *_not_yet(image)),
    )


def oem(cmdline: Cmdline) -> Volume:
    """Say where OEM is before any layout is read: rd.cos.mount= may name it, else its label does."""
    for volume in _cmdline_volumes(cmdline):
        if volume.mountpoint == OEM:
            return volume
    why = f"OEM is labelled {cmdline.oem_label} (rd.cos.oemlabel)"
    return Volume(spec=f"LABEL={cmdline.oem_label}", mountpoint=OEM, options=(), why=why)


def _volumes(cmdline: Cmdline, image: Image, notes: list[str]) -> dict[str, Volume]:
    """Merge VOLUMES, rd.cos.mount= and the defaults: mount point → volume, what holds others first."""
    setting, merge = image.setting("VOLUMES"), image.setting("MERGE")
    listed = _by_mountpoint(
        [_volume(word, setting.why) for word in setting.value.split()] if setting else []
    )
    arguments = _by_mountpoint(_cmdline_volumes(cmdline))
    if merge and merge.value != "true":
        notes += [f"{volume}: ignored, {merge.why} is {merge.value}" for volume in arguments.values()]
        arguments = {}
    for path, volume in arguments.items():
        if path in listed and listed[path].spec != volume.spec:
            notes.append(f"{volume}: ignored, {listed[path].why}")
    volumes = {**arguments, **listed}
    if setting is None and MODES[mode(cmdline)].users_data:
        default = _volume(PERSISTENT_VOLUME, "VOLUMES (the default)")
        volumes.setdefault(default.mountpoint, default)
    return {path: volumes[path] for path in sorted(volumes, key=by_components)}


def _by_mountpoint(volumes: list[Volume]) -> dict[str, Volume]:
    found: dict[str, Volume] = {}
    for volume in volumes:
        other = found.setdefault(volume.mountpoint, volume)
        if other.spec != volume.spec:
            raise LayoutError(
                f"cannot mount both '{other}' and '{volume}' on {volume.mountpoint}",
                hint=f"remove one of them, or give it another mount point ({volume.why})",
            )
    return found


def _cmdline_volumes(cmdline: Cmdline) -> list[Volume]:
    return [_volume(text, "rd.cos.mount") for text in cmdline.mounts]


def _volume(text: str, why: str) -> Volume:
    """Read `<device>:/mountpoint[:options]`."""
    spec, separator, rest = text.partition(":/")
    mountpoint, _, options = rest.partition(":")
    if not separator or not spec.startswith(DEVICE_PREFIXES):
        raise LayoutError(
            f"cannot read the volume '{text}' ({why})",
            hint="write <device>:/mountpoint[:options], such as LABEL=DATA:/data:noatime,nofail",
        )
    return Volume(
        spec=spec,
        mountpoint=_path("/" + mountpoint, why),
        options=tuple(filter(None, options.split(","))),
        why=f"{why} has {text}",
    )


def _path(text: str, why: str) -> str:
    """Normalise an absolute path of the new root."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not text.startswith("/") or ".." in parts or not parts or "\\" in text:
        raise LayoutError(
            f"cannot use '{text}' ({why}) as a path",
            hint="write an absolute path below / without '..' and '\\'",
        )
    return "/" + "/".join(parts)


def _paths(image: Image, name: str, default: str, custom: str) -> dict[str, str]:
    """Read a list of paths and what adds to it: path → why, each once, by its first mention."""
    setting = image.setting(name)
    lists = [(setting.value, setting.why)] if setting else [(default, f"{name} (the default)")]
    own = image.setting(custom)
    adding = [*image.additions(name), *([own] if own else []), *image.additions(custom)]
    lists += [(addition.value, addition.why) for addition in adding]
    found: dict[str, str] = {}
    for value, why in lists:
        for word in value.split():
            found.setdefault(_path(word, why), f"{why} has {word}")
    return {path: found[path] for path in sorted(found, key=by_components)}


def by_components(path: str) -> list[str]:
    """Sort paths so that what holds others comes first, and `/var/log` before `/var-x`.

    Text order is not that.
    """
    return path.split("/")


def _overlay(value: str, why: str) -> str:
    try:
        return overlay(value)
    except ValueError as reason:
        hint = "write OVERLAY=tmpfs:20%"
        raise LayoutError(f"cannot read '{value}' ({why}): {reason}", hint=hint) from None


def _state_target(image: Image) -> str:
    setting = image.setting("PERSISTENT_STATE_TARGET")
    return _path(setting.value, setting.why) if setting and setting.value else DEFAULT_STATE_TARGET


def _not_yet(image: Image) -> list[str]:
    setting = image.setting("DEBUG_RW")
    if setting is None or setting.value != "true":
        return []
    return [f"{setting.why} is not supported yet and does nothing: use rd.cos.debugrw on the command line"]
