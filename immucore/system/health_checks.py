"""What a boot has to fulfil to be healthy: its target, its mounts, and the checks of vendor and machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from immucore import observe, process, report
from immucore.fstab import lines_of, unescape
from immucore.plan import as_booted
from immucore.system import settings
from immucore.system.settings import SettingsError
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from immucore.observe import MountPoint

TARGET = "boot-complete.target"
SETTINGS = "etc/immucore/health.yaml"
# Of two checks with the same name the later one's counts.
FOLDERS = ("usr/lib/immucore/checks.d", "etc/immucore/checks.d")
EXTENSIONS = ("sysext", "confext")  # what systemd-sysext mounts over /opt, /usr and /etc
_MOUNTS = f"{report.DIRECTORY}/mounts"
_SYSTEMCTL_SEC = 20.0
_MAX_SEC = 10**9  # 31 years
_LAST_CHARACTERS = 300  # of what a check has printed


class Settings(Record):
    """What /etc/immucore/health.yaml sets."""

    deadline: float = 600  # seconds since the start of the kernel, until which a boot has to be healthy
    check_timeout: float = 60  # seconds that a check may take


def configured(root: str) -> tuple[Settings, list[str]]:
    """Read the settings, and say what is wrong with them: a mistake there makes no boot unhealthy."""
    path = os.path.join(root, SETTINGS)
    try:
        given = settings.read(path)
    except SettingsError as error:
        return Settings(), [error.message]
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        if name not in Settings._fields:
            problems.append(f"'{name}' in '{path}' is not known: there are {', '.join(Settings._fields)}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_SEC:
            problems.append(f"'{name}' in '{path}' has to be a number of seconds: {value!r} is none")
        else:
            values[name] = value
    return Settings(**values), problems


def unreached() -> str:
    """Say that systemd has not come to its target yet; "" where it has."""
    try:
        done = process.run(["systemctl", "is-active", TARGET], timeout_sec=_SYSTEMCTL_SEC)
    except OSError as error:
        return f"cannot ask for {TARGET}: systemctl: {error.strerror}"
    return "" if done.status == 0 else f"{TARGET} is not reached"


def unmounted(root: str) -> list[str]:
    """List what the agent has mounted and is not mounted any more, as its guard did before the switch."""
    planned = observe.text(_MOUNTS)
    if not planned:
        return [f"there is no {_MOUNTS}: nobody knows what has to be mounted"]
    return differing(planned, observe.mounts(), booted=root == "/")


def differing(planned: str, table: Sequence[MountPoint], *, booted: bool) -> list[str]:
    """Compare what is mounted with `major:minor path` lines; `booted`: the switch to the root was made."""
    found = []
    top: dict[str, MountPoint] = {}
    for mount in table:  # in the order of mounting
        if mount.source not in EXTENSIONS:
            top[mount.target] = mount
    for line in lines_of(planned):
        device, _, escaped = line.partition(" ")
        path = unescape(escaped)
        path = as_booted(path) if booted else path
        if path not in top:
            found.append(f"{path} is no longer mounted")
        elif top[path].device != device:
            found.append(f"{path} has something else mounted over it")
    return sorted(found)


def checks(root: str) -> list[str]:
    """List the executables to run, by name. One in the folder of the machine masks the vendor's."""
    named: dict[str, str] = {}
    for folder in FOLDERS:
        directory = os.path.join(root, folder)
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        named.update({name: os.path.join(directory, name) for name in names})
    return [path for _, path in sorted(named.items()) if os.path.isfile(path) and os.access(path, os.X_OK)]


def failure(check: str, timeout_sec: float) -> str:
    """Run a check, and say what is wrong; "" where it passes."""
    name = os.path.basename(check)
    try:
        done = process.run_apart([check], timeout_sec=timeout_sec)
    except OSError as error:
        return f"check {name} cannot be run: {error.strerror}"
    if done.status == 0:
        return ""
    said = " ".join(done.output.split())[-_LAST_CHARACTERS:]
    how = "is stopped" if done.status == process.TIMED_OUT else f"has failed ({done.status})"
    return f"check {name} {how}: {said}" if said else f"check {name} {how}"
