"""What cos-layout.env, the command line and the defaults together ask for (contract §4.1)."""

from __future__ import annotations

from immucore.cmdline import DEVICE_PREFIXES, boolean, overlay
from immucore.errors import LayoutError
from immucore.layouts.cos.modes import users_data
from immucore.plan import is_below
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from typing import Any

    from immucore.cmdline import Cmdline
    from immucore.image import Image

OEM = "/oem"
MAX_CHARACTERS = 4096  # of an entry; the kernel takes no longer path (limits.h: PATH_MAX)
DEFAULT_RW_PATHS = "/etc /root /home /opt /srv /usr/local /var"
DEFAULT_STATE_TARGET = "/usr/local/.state"
PERSISTENT_VOLUME = "LABEL=COS_PERSISTENT:/usr/local"
ADDING = ("RW_PATHS", "PERSISTENT_STATE_PATHS", "CUSTOM_BIND_MOUNTS", "CUSTOM_EPHEMERAL_MOUNTS")
VARIABLES = (
    *ADDING,
    *("VOLUMES", "MERGE", "OVERLAY", "DEBUG_RW", "PERSISTENT_STATE_TARGET", "PERSISTENT_STATE_BIND"),
)


class Volume(Record):
    """An entry of VOLUMES or rd.cos.mount=."""

    spec: str  # a spelling of a device
    mountpoint: str
    options: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return ":".join((self.spec, self.mountpoint, *filter(None, [",".join(self.options)])))


class Listed(Record):
    """A path as the layout lists it: its directory is named by that, whatever symlinks the image has."""

    name: str
    why: str


class Removed(Record):
    """An entry that a list takes out again: `-/path`."""

    path: str
    why: str


class Rejected(Record):
    """An entry of a list of paths that is none: it does not take the others with it."""

    text: str
    reason: str
    hint: str
    why: str


class Settings(Record):
    """Every question of the layout with its answer.

    A path is in one place only; `notes` tell of two.
    """

    volumes: tuple[Volume, ...]  # without OEM; by mount point, what holds others first
    oem: Volume | None  # what the layout says about /oem, where OEM is mounted already
    overlay: str  # tmpfs:<size> or a spelling of a device
    overlay_why: str
    ephemeral: dict[str, Listed]  # by the path without symlinks
    persistent: dict[str, Listed]
    state_target: str
    bind: bool
    rejected: tuple[Rejected, ...]
    removed: tuple[Removed, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def read(cmdline: Cmdline, image: Image) -> Settings:
    """Settle the layout of this boot. Raises LayoutError."""
    notes: list[str] = []
    if cmdline.safe:
        notes.append("rd.cos.safe: neither OEM nor any layout nor volume, only the default RW_PATHS")
        image = image.replace(settings=())
    rejected: list[Rejected] = []
    removed: list[Removed] = []
    volumes = {} if cmdline.safe else _volumes(cmdline, image, notes, removed)
    left_out = [path for path, volume in volumes.items() if cmdline.no_persist and _is_persistent(volume)]
    notes += [f"{volumes.pop(path)}: left out, rd.cos.nopersist" for path in left_out]
    mounted = {*volumes, *([] if cmdline.safe else [OEM])}
    lists = _Lists(image, notes, rejected, removed)
    ephemeral = lists.read("RW_PATHS", DEFAULT_RW_PATHS, "CUSTOM_EPHEMERAL_MOUNTS")
    persistent = lists.read("PERSISTENT_STATE_PATHS", "", "CUSTOM_BIND_MOUNTS")
    for path, listed in [*ephemeral.items(), *persistent.items()]:
        if path in mounted:
            notes.append(f"{path}: a volume, although {listed.why}")
        elif path in persistent and path in ephemeral and persistent[path] != listed:
            notes.append(f"{path}: persistent, although {listed.why}")
    persistent = {path: listed for path, listed in persistent.items() if path not in mounted}
    state_target = _state_target(image)
    on_purpose = any(is_below(state_target, path) for path in left_out)
    if persistent and (on_purpose or not _holds_state(cmdline, state_target, persistent, mounted)):
        notes += [f"{path}: ephemeral, {state_target} lies on no volume here" for path in persistent]
        ephemeral, persistent = {**ephemeral, **persistent}, {}
    base = image.setting("OVERLAY")
    return Settings(
        volumes=tuple(volume for path, volume in volumes.items() if path != OEM),
        oem=volumes.get(OEM),
        overlay=_overlay(base.value, base.why) if base and base.value else cmdline.overlay,
        overlay_why=base.why if base and base.value else f"rd.cos.overlay={cmdline.overlay}",
        ephemeral={p: listed for p, listed in ephemeral.items() if p not in mounted and p not in persistent},
        persistent=persistent,
        state_target=state_target,
        bind=_switch(image, "PERSISTENT_STATE_BIND", default=False),
        rejected=tuple(dict.fromkeys(rejected)),
        removed=tuple(removed),
        notes=tuple(notes),
        warnings=(*image.warnings, *_useless(image), *_oem_options(cmdline, volumes.get(OEM))),
    )


def effective(settings: Settings) -> dict[str, object]:
    """Give the layout as layout.json shows it: every entry with what asked for it."""
    return {
        "volumes": settings.volumes,
        "oem": settings.oem,
        "overlay": {"backing": settings.overlay, "why": settings.overlay_why},
        "ephemeral": _entries(settings.ephemeral),
        "persistent": _entries(settings.persistent),
        "persistent_target": settings.state_target,
        "persistent_bind": settings.bind,
        "removed": settings.removed,
        "rejected": settings.rejected,
    }


def _entries(listed: dict[str, Listed]) -> list[dict[str, str]]:
    return [{"path": path, "listed_as": each.name, "why": each.why} for path, each in listed.items()]


def listed_paths(cmdline: Cmdline, image: Image) -> tuple[str, ...]:
    """List every path that the layout mounts something on, symlinks not resolved. Raises LayoutError."""
    settings = read(cmdline, image)
    volumes = [volume.mountpoint for volume in settings.volumes]
    return (*volumes, *settings.ephemeral, *settings.persistent, settings.state_target)


def _holds_state(cmdline: Cmdline, target: str, persistent: dict[str, Listed], mounted: set[str]) -> bool:
    """Tell whether state can be kept in `target`; recovery goes on without, other modes must not."""
    for path, listed in persistent.items():
        if is_below(target, path):
            raise LayoutError(
                f"cannot keep '{path}' ({listed.why}) in {target}: that lies in it",
                hint="take it from the list, or set PERSISTENT_STATE_TARGET to a place outside of it",
            )
    if any(is_below(target, path) for path in (*mounted, "/run")):
        return True
    if users_data(cmdline):
        first = next(iter(persistent.values()))
        raise LayoutError(
            f"cannot keep state in {target} ({first.why}): it lies on no volume",
            hint=f"add a volume for it to VOLUMES, such as {PERSISTENT_VOLUME}",
        )
    return False


def oem(cmdline: Cmdline) -> Volume:
    """Say where OEM is before any layout is read: rd.cos.mount= may name it, else its label does."""
    for volume in _cmdline_volumes(cmdline):
        if volume.mountpoint == OEM:
            return volume
    why = f"OEM is labelled {cmdline.oem_label} (rd.cos.oemlabel)"
    return Volume(spec=f"LABEL={cmdline.oem_label}", mountpoint=OEM, options=(), why=why)


def _volumes(cmdline: Cmdline, image: Image, notes: list[str], removed: list[Removed]) -> dict[str, Volume]:
    """Merge VOLUMES, rd.cos.mount= and the defaults: mount point → volume, what holds others first."""
    lists = [(setting.value.split(), setting.why) for setting in image.lists("VOLUMES")]
    listed: dict[str, Volume] = {}
    default: dict[str, Volume] = {}
    if users_data(cmdline) and _only_removes(lists):
        default = _by_mountpoint([_volume(PERSISTENT_VOLUME, "VOLUMES (the default)")], image)
    for words, why in lists:
        for word in words:
            if word.startswith("-"):
                path = _path(image.real(_path(word[1:], why)), why)
                _take_out(path, default if path in default else listed, word, why, notes, removed)
        added = [_volume(word, why) for word in words if not word.startswith("-")]
        for path, volume in _by_mountpoint(added, image).items():
            if path in listed and listed[path].spec != volume.spec:
                notes.append(f"{listed[path]}: not mounted, {volume.why}")
            listed[path] = volume
    arguments = _by_mountpoint(_cmdline_volumes(cmdline), image)
    if not _switch(image, "MERGE", default=True):
        notes += [f"{volume}: ignored, MERGE is off" for volume in arguments.values()]
        arguments = {}
    for path, volume in arguments.items():
        if path in listed and listed[path].spec != volume.spec:
            notes.append(f"{volume}: ignored, {listed[path].why}")
    volumes = {**default, **arguments, **listed}
    return {path: volumes[path] for path in sorted(volumes, key=by_components)}


def _by_mountpoint(volumes: list[Volume], image: Image) -> dict[str, Volume]:
    found: dict[str, Volume] = {}
    for listed in volumes:
        volume: Volume = listed.replace(mountpoint=_path(image.real(listed.mountpoint), listed.why))
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
    if not separator or not spec.startswith(DEVICE_PREFIXES) or len(text) > MAX_CHARACTERS:
        raise LayoutError(
            f"cannot read the volume '{_cut(text)}' ({why})",
            hint="write <device>:/mountpoint[:options], such as LABEL=DATA:/data:noatime,nofail",
        )
    return Volume(
        spec=spec,
        mountpoint=_path("/" + mountpoint, why),
        options=tuple(filter(None, options.split(","))),
        why=f"{why} has {text}",
    )


def _cut(text: str) -> str:
    """Show enough of an entry to find it: a console prints some 10 000 characters in a second."""
    return text if len(text) <= 200 else text[:197] + "..."


def _path(text: str, why: str) -> str:
    """Normalise an absolute path of the new root."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not text.startswith("/") or ".." in parts or not parts or "\\" in text or len(text) > MAX_CHARACTERS:
        raise LayoutError(
            f"cannot use '{_cut(text)}' ({why}) as a path",
            hint="write an absolute path below / without '..' and '\\'",
        )
    return "/" + "/".join(parts)


def _is_persistent(volume: Volume) -> bool:
    """Tell whether a volume is what rd.cos.nopersist means, however a layout spells its device."""
    spec, _, mountpoint = PERSISTENT_VOLUME.partition(":")
    return volume.spec == spec or volume.mountpoint == mountpoint


class _Lists:
    """Reads the lists of paths, each entry by itself; what is odd about one is told in the three answers."""

    def __init__(
        self, image: Image, notes: list[str], rejected: list[Rejected], removed: list[Removed]
    ) -> None:
        self._image, self._notes, self._rejected, self._removed = image, notes, rejected, removed

    def read(self, name: str, default: str, custom: str) -> dict[str, Listed]:
        """Read a list and what adds to it, and takes from it: each path once, by its first mention."""
        own = self._image.setting(custom)
        settings = [*self._image.lists(name), *([own] if own else []), *self._image.additions(custom)]
        lists = [(setting.value.split(), setting.why) for setting in settings]
        if _only_removes([(s.value.split(), s.why) for s in self._image.lists(name) if not s.adds]):
            lists.insert(0, (default.split(), f"{name} (the default)"))
        found: dict[str, Listed] = {}
        for words, why in lists:
            for word in words:
                try:
                    self._entry(word, why, found)
                except LayoutError as error:
                    self._rejected.append(
                        Rejected(text=_cut(word), reason=error.message, hint=error.hint, why=why)
                    )
        return {path: found[path] for path in sorted(found, key=by_components)}

    def _entry(self, word: str, why: str, found: dict[str, Listed]) -> None:
        """Read `/path`, or `-/path`, which takes that out again."""
        removes = word.startswith("-")
        path = _path(word.removeprefix("-"), why)
        link = "" if self._image.real(path) == path else f", a symlink to {self._image.real(path)}"
        listed = Listed(name=path, why=f"{why} has {word}{link}")
        real = _path(self._image.real(path), listed.why)
        if removes:
            _take_out(real, found, word, why, self._notes, self._removed)
        elif found.setdefault(real, listed).name != path:
            self._notes.append(f"{path}: the same as {found[real].name}, although {listed.why}")


def _only_removes(lists: list[tuple[list[str], str]]) -> bool:
    """Tell whether the default stays beneath: no list is empty or has an entry of its own."""
    return all(words and all(word.startswith("-") for word in words) for words, _ in lists)


def _take_out(  # noqa: PLR0917  the last two are answers
    path: str, found: dict[str, Any], word: str, why: str, notes: list[str], removed: list[Removed]
) -> None:
    if found.pop(path, None) is None:
        notes.append(f"{path}: {why} has {word}, and nothing lists it before")
    else:
        removed.append(Removed(path=path, why=f"{why} has {word}"))
        notes.append(f"{path}: left out, {why} has {word}")


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
        raise LayoutError(f"cannot read '{_cut(value)}' ({why}): {reason}", hint=hint) from None


def _state_target(image: Image) -> str:
    setting = image.setting("PERSISTENT_STATE_TARGET")
    given = _path(setting.value, setting.why) if setting and setting.value else DEFAULT_STATE_TARGET
    return image.real(given)


def _switch(image: Image, name: str, *, default: bool) -> bool:
    """Read a switch. A word that is none is refused: to guess could move somebody's state."""
    setting = image.setting(name)
    if setting is None or not setting.value:
        return default
    try:
        return boolean(setting.value)
    except ValueError as reason:
        hint = f"write {name}=true or {name}=false in {setting.origin}"
        shown = _cut(setting.value)
        raise LayoutError(f"cannot read '{shown}' ({setting.why}): {reason}", hint=hint) from None


def _useless(image: Image) -> list[str]:
    """Name the settings that do nothing: a mistyped one must not cost somebody's data in silence."""
    unknown = [setting for setting in image.settings if setting.name not in VARIABLES]
    warnings = [f"{setting.why} does nothing: there is no such variable" for setting in unknown]
    warnings += [
        f"{s.why} does nothing: this file can only add to {', '.join(ADDING)}"
        for s in image.settings
        if s.adds and s.name in VARIABLES and s.name not in ADDING
    ]
    debug_rw = image.setting("DEBUG_RW")
    if debug_rw and _switch(image, "DEBUG_RW", default=False):
        warnings.append(f"{debug_rw.why} is not supported yet and does nothing: use rd.cos.debugrw")
    return warnings


def _oem_options(cmdline: Cmdline, theirs: Volume | None) -> list[str]:
    if theirs is None or theirs.options in ((), oem(cmdline).options):
        return []
    return [
        f"OEM is mounted before the layout is read: the options of {theirs} do nothing; use rd.cos.mount="
    ]
