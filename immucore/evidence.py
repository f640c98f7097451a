"""What a boot that went wrong leaves on the disk, so that somebody can read it after the next one.

Imported only by a boot that failed, is degraded or is another than the one asked for, and by `immucore
doctor`. A record is a directory `immucore/boot-<counter>-<boot id>` on a partition of the machine's own. It
holds no secret, is bounded, and appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import select
import shutil
import signal
import stat
import time

from immucore import cmdline, layouts, observe, report, superblock, syscalls
from immucore.devices import MEMBERS
from immucore.plan import Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from immucore.boot import Boot
    from immucore.devices import Device, Devices, Place
    from immucore.plan import Plan

DIRECTORY = "immucore"  # on the partition
NAME = re.compile(r"boot-([0-9]{6,9})-([0-9a-f]{8})")
UNFINISHED = ".new"
KEPT = 5
LIMIT_SEC = 4.0  # so long may a disk that does not answer hold up the shell, which is to be there in five
GRACE_SEC = 0.5  # for what has to be made read-only again
CUT = "[... {} bytes left out ...]\n"
# How much is kept of each file; what is longer keeps its beginning, a log its end. In the order of writing.
LIMITS = {
    "result.json": 32 << 10,
    "devices.json": 48 << 10,
    "immucore.log": 96 << 10,
    "steps.json": 128 << 10,
    "plan.json": 72 << 10,
    "layout.json": 16 << 10,
    "cmdline": 8 << 10,
    "mountinfo": 48 << 10,
    "dmesg": 64 << 10,
}
LOGS = ("immucore.log", "dmesg")
# What is written where there is no room for all.
ESSENTIAL = {"result.json": 8 << 10, "immucore.log": 8 << 10, "devices.json": 8 << 10}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = 0x14 | 0x01  # openat2(2): RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV


class Unusable(Exception):
    """A place that is left alone, and why."""


class Stopped(BaseException):
    """The time is over, or somebody stops the agent: no place is tried any more, only tidied up."""


def keep(boot: Boot, files: Mapping[str, str]) -> None:
    """Keep the record of a boot, and what it was met with, on the disk; whatever fails here is one log line.

    What /run/immucore gets too: the table of devices, and where the evidence lies.
    """
    try:
        _keep(boot, files)
    except Exception as failure:  # noqa: BLE001  the boot has failed already: this must not make it worse
        boot.log.warning(f"cannot keep the evidence of this boot: {type(failure).__name__}: {failure}")


def _keep(boot: Boot, files: Mapping[str, str]) -> None:
    devices = boot.devices if boot.devices.all else observe.devices(boot.cmdline.boot_disk)
    layout = layouts.select(boot.cmdline)
    table = device_table(devices, boot.plan)
    with open("/proc/cmdline", "rb") as file:
        line = file.read()
    contents = {
        **files,
        "devices.json": report.json({"schema": report.SCHEMA, "devices": table}) + "\n",
        "cmdline": cmdline.redacted(line) + "\n",
        "mountinfo": mountinfo(),
        "dmesg": without_secrets(kernel_log(), line),
    }
    boot.kernel.write_file(f"{report.DIRECTORY}/devices.json", contents["devices.json"])
    places = known(layout.evidence_places(boot.cmdline, devices))
    where, reasons = save(bounded(contents, LIMITS), places)
    if where:
        boot.kernel.write_file(f"{report.DIRECTORY}/evidence", f"{where}\n")
        boot.log.info(f"the evidence of this boot is kept: {where}")
    else:
        why = "; ".join(reasons) or "no partition of the machine's own is there"
        boot.log.warning(f"cannot keep the evidence of this boot: {why}")


def known(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """Give the places to write to: none where nobody knows the machine's own disk, all may be another's."""
    return places if any(place.own_disk for place in places) else ()


def save(
    contents: Mapping[str, bytes], places: tuple[Place, ...], limit_sec: float = LIMIT_SEC
) -> tuple[str, list[str]]:
    """Write the contents to the first place that takes them; return where they are, and why not elsewhere.

    In a process of its own: when the time is over it is stopped, and what a dying disk does not let go even
    then is left behind.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _stop)
            try:
                answer = _save(contents, places)
            except Exception as failure:  # noqa: BLE001  to be told by the parent
                answer = ("", [f"{type(failure).__name__}: {failure}"])
            os.write(write, json.dumps(answer).encode()[: 1 << 15])
        finally:
            os._exit(0)
    os.close(write)
    said, why = b"", "it was killed"
    try:
        for patience_sec, number in ((limit_sec, signal.SIGTERM), (GRACE_SEC, signal.SIGKILL)):
            deadline = time.monotonic() + patience_sec
            while (left := deadline - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
                if not (block := os.read(read, 1 << 16)):
                    os.waitpid(child, 0)
                    where, reasons = json.loads(said) if said else ("", [why])
                    return where, reasons
                said += block
            os.kill(child, number)
            why = f"the disk took longer than {limit_sec:g} s"
    finally:
        os.close(read)
    return "", [why]


def _stop(_number: int, _frame: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the tidying up is not to be stopped once more
    raise Stopped


def _save(contents: Mapping[str, bytes], places: tuple[Place, ...]) -> tuple[str, list[str]]:
    identity = observe.text("/proc/sys/kernel/random/boot_id").replace("-", "")[:8]
    reasons: list[str] = []
    # The newest of the older records goes only where no place takes the new one otherwise.
    for spare in (1, 0):
        reasons = []
        for place in places:
            try:
                name = _save_at(place, contents, identity, spare)
            except (OSError, Unusable) as failure:
                reasons.append(f"{place.device.path}: {getattr(failure, 'strerror', None) or failure}")
            else:
                return _where(place, name), reasons
    return "", reasons


def _where(place: Place, name: str) -> str:
    """Say where a record is: by its device alone where something else is mounted in its place.

    That is so after a fallback to recovery, whose partition is mounted where COS_STATE would be.
    """
    there = [mount.device for mount in observe.mounts() if mount.target == place.path]
    if there and there[-1] != _number(place.device):
        return f"{place.device.path} {DIRECTORY}/{name}"
    return f"{place.path}/{DIRECTORY}/{name} ({place.device.path})"


def _number(device: Device) -> str:
    """Give the number of a device as mountinfo has it. Raises OSError."""
    number = os.stat(device.path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def _save_at(place: Place, contents: Mapping[str, bytes], identity: str, spare: int) -> str:
    _refuse(place)
    device = place.device
    # One more mount of the partition, mounted already or not, that nobody else sees, and that ends with its
    # descriptor, whatever happens.
    tree = syscalls.detached_mount(
        device.path, device.fstype, read_only=False, options=("ro",) if place.remount else ()
    )
    try:
        try:
            if place.remount:
                syscalls.reconfigure(tree, "rw")
            directory = open_records(tree, make=True)
            try:
                return write_record(directory, contents, identity, spare=spare)
            finally:
                os.close(directory)
        finally:
            if place.remount:
                syscalls.reconfigure(tree, "ro")
    finally:
        os.close(tree)


def _refuse(place: Place) -> None:
    """Refuse what is not ours to write to, or would be harmed by it. Raises Unusable and OSError."""
    device = place.device
    if not place.own_disk and device.removable:
        raise Unusable("it is on a removable disk")
    mounted = _number(device)
    for mount in observe.mounts():
        if mount.device != mounted:
            continue
        if "ro" in mount.superblock_options.split(","):
            if "rw" in mount.options.split(","):
                raise Unusable("the kernel has made it read-only because of errors")
            if not place.remount:
                raise Unusable("it is mounted read-only")
    if device.fstype in superblock.EXT and superblock.ext_errors(device.path):
        raise Unusable("its file system is damaged")


def open_records(top: int, *, make: bool = False) -> int:
    """Open the directory of records below `top`, and no other: no symlink is followed. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    try:
        return syscalls.openat2(top, DIRECTORY, flags, _NO_LINKS)
    except FileNotFoundError:
        if not make:
            raise
    os.mkdir(DIRECTORY, 0o700, dir_fd=top)
    return syscalls.openat2(top, DIRECTORY, flags, _NO_LINKS)


def records(directory: int) -> list[str]:
    """List the names of the records in a directory, the oldest first."""
    return sorted(filter(NAME.fullmatch, os.listdir(directory)), key=_order)


def _order(name: str) -> tuple[int, str]:
    found = NAME.fullmatch(name)
    return (int(found[1]) if found else 0, name)


def write_record(directory: int, contents: Mapping[str, bytes], identity: str, *, spare: int = 1) -> str:
    """Write a record into a directory, and return its name; the last five are kept. Raises OSError.

    Where the room does not suffice, older records go first, but for `spare` of them; then only the essential
    is written. Another record of the same boot is replaced.
    """
    for name in os.listdir(directory):
        if name.endswith(UNFINISHED) and NAME.fullmatch(name.removesuffix(UNFINISHED)):
            _remove(directory, name)  # of a boot that was cut off here
    older = records(directory)
    counter = min(_order(older[-1])[0] + 1 if older else 1, 999_999_999)
    name = f"boot-{counter:06}-{identity}"
    remaining = list(older)
    attempt = contents
    while True:
        try:
            _write(directory, f"{name}{UNFINISHED}", attempt, partial=attempt is not contents)
            break
        except OSError as failure:
            _remove(directory, f"{name}{UNFINISHED}")
            if failure.errno not in _FULL:
                raise
            if len(remaining) > spare:
                _remove(directory, remaining.pop(0))
            elif attempt is contents:
                attempt = bounded(
                    {each: contents[each] for each in ESSENTIAL if each in contents}, ESSENTIAL
                )
            else:
                raise
    if name in remaining:
        _remove(directory, name)
    os.rename(f"{name}{UNFINISHED}", name, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)
    same = [each for each in remaining if each != name and each.endswith(f"-{identity}")]
    others = [each for each in remaining if each != name and each not in same]
    for each in (*same, *others[: max(0, len(others) - KEPT + 1)]):
        _remove(directory, each)
    return name


def _write(directory: int, name: str, contents: Mapping[str, bytes], *, partial: bool) -> None:
    """Write the files of a record, each safe on the disk. `partial`: the first of them suffices."""
    os.mkdir(name, 0o700, dir_fd=directory)
    record = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        for number, (file, content) in enumerate(contents.items()):
            try:
                _write_file(record, file, content)
            except OSError as failure:
                if not (partial and number and failure.errno in _FULL):
                    raise
                _remove(record, file)
        os.fsync(record)
    finally:
        os.close(record)


def _write_file(directory: int, name: str, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: int, name: str) -> None:
    """Remove what has this name, whatever it is; what a damaged file system does not give away stays."""
    try:
        if stat.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode):
            shutil.rmtree(name, ignore_errors=True, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
    except OSError:
        return


def bounded(contents: Mapping[str, str | bytes], limits: Mapping[str, int]) -> dict[str, bytes]:
    """Cut each file to its limit; files without one are left out."""
    return {
        name: _cut(contents[name], limit, name in LOGS) for name, limit in limits.items() if name in contents
    }


def _cut(content: str | bytes, limit: int, keep_end: bool) -> bytes:
    raw = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    if len(raw) <= limit:
        return raw
    mark = CUT.format(len(raw) - limit).encode()
    room = limit - len(mark)
    return mark + raw[-room:] if keep_end else raw[:room] + mark


def device_table(devices: Devices, plan: Plan) -> list[dict[str, object]]:
    """List every device with what it was taken for, or why it was not taken."""
    targets: dict[str, list[str]] = {}
    for operation in plan:
        if isinstance(operation, Mount):
            targets.setdefault(operation.source, []).append(operation.target)
    taken = [device for device in devices.all if device.path in targets]
    return [
        {**dict(device.items()), "use": _use(device, targets.get(device.path, []), taken)}
        for device in devices.all
    ]


def _use(device: Device, targets: list[str], taken: list[Device]) -> str:
    if targets:
        return f"taken for {', '.join(targets)}"
    if device.fstype in MEMBERS:
        return f"not looked into: {device.fstype}"
    if not device.fstype:
        return "no file system"
    for other in taken:
        if device.label and device.label == other.label:
            return f"not taken: {other.path} has the same label"
    return "nothing asked for it"


_OPTION = re.compile(
    r"\b((?:\w*pass\w*|\w*secret\w*|\w*token\w*|\w*cred\w*|user(?:name)?)=)[^,\s]*", re.IGNORECASE
)


def mountinfo() -> str:
    """Give the table of mounts without the passwords in it, such as those of network file systems."""
    return _OPTION.sub(r"\1…", observe.text("/proc/self/mountinfo"))


def kernel_log() -> str:
    """Give the end of the kernel's log (syslog(2)); empty where that is not allowed."""
    buffer = ctypes.create_string_buffer(LIMITS["dmesg"])
    length = ctypes.CDLL(None).klogctl(3, buffer, len(buffer))  # SYSLOG_ACTION_READ_ALL
    return buffer.raw[: max(0, length)].decode("utf-8", "replace")


def without_secrets(log: str, line: bytes) -> str:
    """Take out of a log what redacted() takes out of the command line: kernel, udev and dracut repeat it."""
    secrets = [(k, v) for k, v in cmdline.words(line) if v and not cmdline.harmless(k, v)]
    log = re.sub(r"(?im)(command line[^:\n]*:\s*).*$", lambda m: m[1] + _repeated(m[0][len(m[1]) :]), log)
    for key, value in sorted(secrets, key=lambda each: -len(each[1])):
        for spelled in (f'{key}="{value}', f"{key}={value}"):
            log = log.replace(spelled, f"{key}=…")
        if len(value) >= 8 and not value.startswith(
            "/"
        ):  # shorter ones would take half of the log with them
            log = log.replace(value, "…")
    return log


def _repeated(text: str) -> str:
    return cmdline.redacted(text.encode("utf-8", "surrogateescape"))
