"""Kernel command line → Cmdline.

The kernel's own rules (lib/cmdline.c, next_arg) and the keys of contract §2.
"""

from __future__ import annotations

from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

BLANKS = " \t\n\v\f\r\xa0"  # isspace() of the kernel's lib/ctype.c, which is Latin-1
DEFAULT_OVERLAY = "tmpfs:20%"


class Cmdline(Record):
    """What the command line asks for.

    `warnings` has a sentence for each word that could not be taken as it stands.
    """

    image: str = ""  # path inside the partition; empty: this is not our boot
    root: str = ""
    mode: str = ""
    overlay: str = DEFAULT_OVERLAY
    mounts: tuple[str, ...] = ()
    oem_label: str = "COS_OEM"
    oem_timeout_sec: int = 10
    timeout_sec: int = 180  # 0: for ever
    boot_disk: str = "auto"  # a spelling of the disk that was booted from, or of anything on it
    debug: bool = False
    debug_rw: bool = False
    disable: bool = False
    fsck_mode: str = "auto"
    fsck_repair: str = "preen"
    breaks: tuple[str, ...] = ()  # paths before whose steps a shell is wanted
    safe: bool = False
    no_persist: bool = False
    fallback: str = "same-boot"
    onfail: str = "shell"  # halt, reboot, or reboot:<seconds that the summary stays>
    stages: tuple[tuple[str, str], ...] = ()  # stages.<stage>[0].<key>=…, as they are written
    init: str = ""  # what is to be run in the new root; empty: the usual
    instead_of: str = ""  # the mode that was asked for and failed, in the attempts after it
    near: str = ""  # and the partition it names: what is booted instead lies on the same disk
    warnings: tuple[str, ...] = ()

    @property
    def engaged(self) -> bool:
        """Whether the agent mounts anything at all in this boot."""
        return bool(self.image) and not self.bystander

    @property
    def bystander(self) -> bool:
        """Whether somebody else mounts the root, and the agent only says which mode it is."""
        return self.root.startswith("live:") or (self.disable and bool(self.image))

    @property
    def fsck_repair_allowed(self) -> str:
        """What may be repaired in this boot: preen, yes or no."""
        return "no" if self.fsck_mode == "skip" else self.fsck_repair


def words(line: bytes) -> Iterator[tuple[str, str | None]]:
    """Split a command line into (key, value), value None for a bare key, until `--`, as next_arg() does.

    Blanks separate, double quotes protect blanks, and only a quote around the whole word or the whole value
    goes.
    """
    text = line.decode("latin-1")  # one character a byte; UTF-8 comes back at the end
    position, length = 0, len(text)
    while position < length:
        if text[position] in BLANKS:
            position += 1
            continue
        quoted = text[position] == '"'
        start = position + quoted
        end, equals, in_quote = start, 0, quoted
        while end < length and (in_quote or text[end] not in BLANKS):
            if text[end] == "=" and not equals:
                equals = end - start  # one at the very start is no separator, for the kernel neither
            in_quote ^= text[end] == '"'
            end += 1
        position = end + 1
        word = text[start:end]
        key, value = (word[:equals], word[equals + 1 :]) if equals else (word, None)
        if word.endswith('"') and (quoted or (value is not None and value.startswith('"'))):
            word = word[:-1]  # one closing quote goes, whichever was opened
            key, value = (key, value and value[:-1]) if equals else (word, None)
        if word == "--":
            return
        yield _utf8(key), None if value is None else _utf8(value.removeprefix('"'))


def _utf8(text: str) -> str:
    return text.encode("latin-1").decode("utf-8", "surrogateescape")


def _text(value: str | None) -> str:
    if not value:
        raise ValueError("it needs a value")
    return value


def _image(value: str | None) -> str:
    """Read the image's path in its partition; an empty one is kept as `/`, for the layout to refuse."""
    return "/" + (value or "").lstrip("/")


def boolean(value: str | None) -> bool:
    """Read a switch: the bare key is true. Raises ValueError saying what it may be."""
    if value is None or value.lower() in ("1", "yes", "on", "true"):
        return True
    if value.lower() in ("0", "no", "off", "false"):
        return False
    raise ValueError("it is a switch: 1 or 0, yes or no, on or off, true or false")


def _seconds(low: int, high: int) -> Callable[[str | None], int]:
    def read(value: str | None) -> int:
        digits = value if value and value.isascii() and value.isdecimal() else ""
        # No more digits than the highest has, leading zeros too: immucore-generator can tell that as well.
        if not 0 < len(digits) <= len(str(high)) or not low <= int(digits) <= high:
            raise ValueError(f"it has to be a number of seconds from {low} to {high}")
        return int(digits)

    return read


def overlay(value: str | None) -> str:
    """Check `tmpfs:<size>`, `LABEL=…` or another spelling of a device.

    Raises ValueError saying what it may be.
    """
    kind, _, size = _text(value).partition(":")
    number = size[:-1] if size[-1:] in "kKmMgG%" else size
    if kind == "tmpfs" and number.isascii() and number.isdecimal() and int(number[:18]) > 0:
        return f"tmpfs:{size}"
    return _device(value, "it has to be tmpfs:<size> (20%, 512m) or a device (LABEL=…, UUID=…)")


DEVICE_PREFIXES = ("LABEL=", "UUID=", "PARTLABEL=", "PARTUUID=", "/dev/")


def _device(value: str | None, expected: str) -> str:
    for prefix in DEVICE_PREFIXES:
        if value is not None and value.startswith(prefix) and len(value) > len(prefix):
            return value
    raise ValueError(expected)


def _boot_disk(value: str | None) -> str:
    return "auto" if value == "auto" else _device(value, "it has to be auto or a device (LABEL=…, UUID=…)")


def _volume(value: str | None) -> str:
    spec, separator, rest = _text(value).partition(":/")
    expected = "it has to be <device>:/mountpoint[:options] (LABEL=DATA:/data)"
    _device(spec, expected)
    if not separator or ".." in rest.partition(":")[0].split("/"):
        raise ValueError(expected)
    return _text(value)


def _fsck_mode(value: str | None) -> str:
    if value in ("auto", "force", "skip"):
        return value
    raise ValueError("it has to be auto, force or skip")


def _fsck_repair(value: str | None) -> str:
    """Read a switch, or preen: what is safe to repair (systemd-fsck(8), whose booleans may be short)."""
    if value == "preen":
        return value
    try:
        return (
            "yes"
            if boolean({"y": "yes", "t": "yes", "n": "no", "f": "no"}.get(value or "", value))
            else "no"
        )
    except ValueError:
        raise ValueError("it has to be preen, yes or no") from None


def _choice(*choices: str) -> Callable[[str | None], str]:
    def read(value: str | None) -> str:
        if value not in choices:
            raise ValueError(f"it has to be {', '.join(choices[:-1])} or {choices[-1]}")
        return value

    return read


def _onfail(value: str | None) -> str:
    action, separator, seconds = _text(value).partition(":")
    if action not in ("shell", "reboot", "halt") or (separator and action != "reboot"):
        raise ValueError("it has to be shell, reboot, reboot:<seconds> or halt")
    if separator:
        _seconds(0, 86400)(seconds)
    return _text(value)


# Field of Cmdline → (spellings beside rd.cos.X and rd.immucore.X, reader). Contract §2; the last one wins.
_NATIVE: dict[str, tuple[str, Callable[[str | None], Any]]] = {
    "overlay": ("rd.cos.overlay", overlay),
    "mounts": ("rd.cos.mount", _volume),
    "oem_label": ("rd.cos.oemlabel", _text),
    "oem_timeout_sec": ("rd.cos.oemtimeout", _seconds(1, 1800)),
    "timeout_sec": ("rd.cos.timeout", _seconds(0, 10**9)),
    "boot_disk": ("rd.cos.bootdisk", _boot_disk),
    "debug_rw": ("rd.cos.debugrw", boolean),
    "disable": ("rd.cos.disable", boolean),
    "debug": ("rd.cos.debug", boolean),
    "breaks": ("rd.cos.break", _text),
    "safe": ("rd.cos.safe", boolean),
    "no_persist": ("rd.cos.nopersist", boolean),
    "fallback": ("rd.cos.fallback", _choice("same-boot", "reboot", "off")),
    "onfail": ("rd.cos.onfail", _onfail),
}
_OTHER: dict[str, tuple[str, Callable[[str | None], Any]]] = {
    "cos_img/filename": ("image", _image),
    "elemental.image": ("image", _image),
    "root": ("root", _text),
    "init": ("init", _text),
    "elemental.mode": ("mode", _text),
    "elemental.overlay": ("overlay", overlay),
    "elemental.oemlabel": ("oem_label", _text),
    "elemental.oemtimeout": ("oem_timeout_sec", _seconds(1, 1800)),
    "elemental.disable": ("disable", boolean),
    "fsck.mode": ("fsck_mode", _fsck_mode),
    "fsck.repair": ("fsck_repair", _fsck_repair),
}
_REPEATABLE = ("mounts", "breaks")


def _readers() -> dict[str, tuple[str, Callable[[str | None], Any]]]:
    readers = dict(_OTHER)
    for field, (key, reader) in _NATIVE.items():
        readers[key] = readers[key.replace("rd.cos.", "rd.immucore.")] = (field, reader)
    return readers


def parse(line: bytes) -> Cmdline:
    """Read a whole command line.

    Never raises: what cannot be taken is named in `warnings` with what is done.
    """
    values: dict[str, Any] = {}
    warnings: list[str] = []
    stages: list[tuple[str, str]] = []
    readers = _readers()
    for spelled, value in words(
        line.removesuffix(b"\n")
    ):  # /proc/cmdline has a newline that the kernel never saw
        key = spelled.replace("-", "_")
        shown = spelled if value is None else f"{spelled}={value}"
        native = key.startswith(("rd.cos.", "rd.immucore."))
        if key in readers:
            field, reader = readers[key]
            try:
                taken = reader(value)
            except ValueError as reason:
                default = getattr(Cmdline, field)
                if field in _REPEATABLE:
                    instead = "it is left out"
                else:
                    values.pop(field, None)
                    instead = f"the default is taken: {'off' if default is False else default or 'none'}"
                warnings.append(f"'{shown}' on the kernel command line cannot be read: {reason}; {instead}")
            else:
                values[field] = (*values.get(field, ()), taken) if field in _REPEATABLE else taken
        elif key.startswith("stages."):
            stages.append((spelled, value or ""))
        elif native:
            warnings.append(
                f"'{shown}' on the kernel command line is not a key of immucore and does nothing"
            )
    return Cmdline(**values, stages=tuple(stages), warnings=tuple(warnings))


def stage_of(key: str) -> str:
    """Name the stage that a `stages.…` word is for, without .before and .after; empty where it has none."""
    rest = key.removeprefix("stages.").removeprefix('"')
    end = next((number for number, character in enumerate(rest) if character in '."[]'), len(rest))
    return rest[:end]


# What is shown of other people's command line. By name, because nobody can tell a secret by its looks.
_NAMES = """
    boot_image cos_img/filename elemental.image elemental.mode elemental.overlay elemental.oemlabel
    elemental.oemtimeout elemental.disable root rootfstype rootflags rootdelay rootwait ro rw init rdinit
    resume noresume quiet debug splash single fsck.mode fsck.repair console earlycon earlyprintk loglevel
    ignore_loglevel log_buf_len printk.devkmsg printk.time panic oops nomodeset fbcon vga video
    plymouth.enable net.ifnames biosdevname ip vconsole.keymap locale.lang selinux enforcing autorelabel
    security lsm apparmor audit crashkernel mitigations nokaslr norandmaps cryptomgr.notests max_loop
    loop.max_loop modprobe.blacklist module_blacklist pci acpi apic noapic nolapic nosmp maxcpus nr_cpus mem
    tsc clocksource iommu intel_iommu amd_iommu idle intel_idle.max_cstate processor.max_cstate nmi_watchdog
    softlockup_panic hung_task_panic usbcore.autosuspend random.trust_cpu cgroup_enable cgroup_memory
    """
_HARMLESS = frozenset(_NAMES.split())
_OURS = ("rd.cos.", "rd.immucore.")
_MOSTLY_HARMLESS = ("rd.", "systemd.", "scsi_mod.", "nvme_core.", "libata.", "dm_mod.", "raid")
_TELLING = ("pass", "secret", "token", "cred", "auth", "chap", "user", "setenv", "systemd.run")


def redacted(line: bytes) -> str:
    """Spell a command line as a log may show it: `key=…` unless the key is known to carry no secret.

    What follows `--` is for init, and is left out.
    """
    return " ".join(_shown(key, value) for key, value in words(line.removesuffix(b"\n")))


def harmless(key: str, value: str) -> bool:
    """Tell whether a parameter may be shown to everybody who reads a log."""
    key = key.replace("-", "_").lower()
    if key.startswith(_OURS):
        return True
    known = key in _HARMLESS or key.startswith(_MOSTLY_HARMLESS)
    # user:password@host stands in root=, of all places.
    return known and "@" not in value and not any(telling in key for telling in _TELLING)


def shown_root(root: str) -> str:
    """Spell the value of root= as everybody may read it."""
    return root if harmless("root", root) else "…"


def _shown(key: str, value: str | None) -> str:
    if value is None:
        return key
    word = f"{key}={value}" if harmless(key, value) else f"{key}=…"
    return f'"{word}"' if any(blank in word for blank in BLANKS) else word
