"""Doing the steps of a stage, in the `/` of the process that does them. Imported only where there are some.

Whatever cannot be done is told to a Teller, and what stands beside it is done.
"""

from __future__ import annotations

import os
import re

from immucore import observe, process, stage_accounts, stage_growth
from immucore.errors import ImmucoreError
from immucore.stage_tools import (
    COMMAND_SEC,
    StepError,
    command,
    in_place,
    together,
    told,
    write,
    write_environment,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, Protocol

    from immucore.devices import Device
    from immucore.stage_keys import File, Systemctl
    from immucore.stages import Step

    class Teller(Protocol):
        """Who is told what becomes of the steps."""

        def debug(self, message: str) -> None:
            """Say what only somebody who looks for a fault wants to know."""

        def warning(self, message: str) -> None:
            """Say what is not done, and nobody has asked this agent for."""

        def ignored_of(self, step: Step, message: str) -> None:
            """Say what of a step has failed, and is no matter of the boot."""

        def failed(self, step: Step, message: str) -> None:
            """Say what of a step could not be done."""


CONDITION_SEC = 60.0
TEMPLATE = "{{…}}"
SHELL = "/bin/sh"
HOME = {"HOME": "/root"}  # beside the fixed PATH, which process has
ENVIRONMENT_FILE = "/etc/environment"
GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
SHOWN_LINES = 40  # of what a command has printed
MACHINE_ID = re.compile(r"\{\{-?\s*(?:trunc\s+(\d{1,2})\s+)?\.MachineID\s*-?\}\}")


class _NotHere(ImmucoreError):
    """Something that a stage of this agent cannot do, and everybody's files ask for."""


class Steps:
    """Does steps. `offline`: in a new root that does not run yet; `release` is what its os-release says.

    `find` gives the partition with a label, None for one that is not to be touched.
    """

    def __init__(
        self,
        teller: Teller,
        release: Mapping[str, str],
        *,
        offline: bool,
        find: Callable[[str], Device | None],
    ) -> None:
        self._teller = teller
        self._find = find
        self._release = release
        self._offline = offline
        self._does: dict[str, Callable[[Any], None]] = {
            "dns": self._dns,
            "groups": stage_accounts.add_groups,
            "ensure_entities": stage_accounts.ensure_entities,
            "directories": self._files,
            "files": self._files,
            "hostname": self._hostname,
            "sysctl": self._sysctl,
            "users": stage_accounts.add_users,
            "authorized_keys": stage_accounts.add_authorized_keys,
            "modules": self._modules,
            "timesyncd": self._timesyncd,
            "systemctl": self._systemctl,
            "systemd_firstboot": self._firstboot,
            "layout": self._layout,
        }

    def do(self, step: Step) -> bool:
        """Do a step, if its conditions hold: False where they do not."""
        for problem in step.problems:
            self._teller.failed(step, problem)
        if step.broken:
            return True
        try:
            if not self._holds(step):
                return False
        except (ImmucoreError, OSError) as error:
            self._teller.failed(step, told(error))
            return True
        for place in _templates(step.keys):
            self._left_as_it_is(f"{step.place}: {TEMPLATE} in {place}")
        for key in step.unknown:
            self._teller.warning(f"{key}: this agent does nothing with it ('{step.name}' of {step.stage})")
        for key, value in step.keys.items():
            if key == "commands":
                self._commands(step, value)
            elif key == "environment":
                path = step.keys.get("environment_file", ENVIRONMENT_FILE)
                self._attempt(step, key, self._write_environment, (path, value))
            elif key in self._does:
                self._attempt(step, key, self._does[key], value)
        return True

    def _attempt(self, step: Step, key: str, do: Callable[[Any], None], value: Any) -> None:
        """Do one key. Those that have several things to do try all, and raise the errors as one."""
        try:
            do(value)
        except _NotHere as error:
            self._teller.ignored_of(step, f"{key}: {error}")
        except (ImmucoreError, OSError, ValueError) as error:
            self._teller.failed(step, f"{key}: {told(error)}")
        except Exception as error:  # noqa: BLE001  what nobody thought of costs this key alone
            bug = f"this is a bug in immucore: {type(error).__name__}: {error}"
            self._teller.failed(step, f"{key}: {bug}")

    def _left_as_it_is(self, what: str) -> None:
        self._teller.warning(f"{what} is left as it is: this agent fills in no templates")

    def _holds(self, step: Step) -> bool:
        machine = os.uname().machine
        subjects = {
            # yip's OS.Name is PRETTY_NAME: stock files ask for "Ubuntu.*|Debian.*".
            "only_os": (self._release.get("PRETTY_NAME", ""), self._release.get("ID", "")),
            "only_os_version": (self._release.get("VERSION_ID", ""),),
            "only_arch": (machine, GO_NAMES.get(machine, machine)),
            "only_service_manager": ("systemd",) if _has_systemd() else ("openrc",),
            "node": (os.uname().nodename,),
        }
        for key, values in subjects.items():  # first what costs nothing
            pattern = step.conditions.get(key, "")
            if pattern and not any(re.search(pattern, value) for value in values):
                self._teller.debug(f"{step.place}: '{step.name}' is left out: {key} is {pattern}")
                return False
        if not _files_are_there(step.conditions.get("if_files", {})):
            self._teller.debug(f"{step.place}: '{step.name}' is left out: if_files")
            return False
        condition = step.conditions.get("if", "")
        if condition and _has_template(condition):
            self._left_as_it_is(f"{step.place}: {TEMPLATE} in if")
        if condition and (status := self._shell(condition, "if", CONDITION_SEC)):
            self._teller.debug(f"{step.place}: '{step.name}' is left out: if ends with status {status}")
            return False
        return True

    def _commands(self, step: Step, commands: tuple[tuple[str, str], ...]) -> None:
        for place, text in commands:
            if _has_template(text):
                self._left_as_it_is(f"{place}: {TEMPLATE}")
            try:
                status = self._shell(text, place, COMMAND_SEC)
            except OSError as error:
                self._teller.failed(step, f"{place}: cannot start {SHELL}: {error.strerror}")
                continue
            ended = f"{place}: the command ended with status {status}"
            if status == process.TIMED_OUT:
                self._teller.failed(step, f"{ended}, it took longer than {COMMAND_SEC:g} s")
            elif status:  # nobody looks at it in the field: many a stock command ends so on each boot
                self._teller.ignored_of(step, ended)

    def _shell(self, text: str, what: str, timeout_sec: float) -> int:
        def say(taken_sec: float) -> None:
            self._teller.warning(f"{what}: the command has been running for {taken_sec:.0f} s")

        finished = process.run_apart(
            (SHELL, "-c", text), timeout_sec=timeout_sec, environment=HOME, meanwhile=say
        )
        for line in finished.output.rstrip("\n").split("\n")[-SHOWN_LINES:]:
            if line:
                self._teller.debug(f"{what}: {line}")
        return finished.status

    def _files(self, files: tuple[File, ...]) -> None:
        together(put, files)

    def _write_environment(self, asked: tuple[str, Mapping[str, str]]) -> None:
        write_environment(*asked)

    def _layout(self, asked: tuple[str, str, int]) -> None:
        if said := stage_growth.expand(asked, self._find):
            self._teller.warning(said)

    def _hostname(self, name: str) -> None:
        name = MACHINE_ID.sub(
            lambda found: observe.text("/etc/machine-id").strip()[: int(found[1] or 32)], name
        ).strip()
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", name):
            raise StepError(f"'{name[:80]}' is no name of a host")
        write("/etc/hostname", f"{name}\n".encode())
        lines = observe.whole("/etc/hosts").split("\n")
        ours = [number for number, line in enumerate(lines) if line.split()[:1] == ["127.0.0.1"]]
        if ours:
            names = [each for each in lines[ours[0]].split()[1:] if each != name]
            lines[ours[0]] = " ".join(["127.0.0.1", *names, name])
        else:
            lines.insert(0, f"127.0.0.1 localhost {name}")
        write("/etc/hosts", "\n".join(lines).encode("utf-8", "surrogateescape"))
        in_place("/proc/sys/kernel/hostname", name.encode())

    def _sysctl(self, values: Mapping[str, str]) -> None:
        def one(item: tuple[str, str]) -> None:
            key, value = item
            parts = key.split("/" if "/" in key else ".")
            if any(part in ("", ".", "..") for part in parts):
                raise StepError(f"'{key[:80]}' is no name of a setting")
            # In a name with slashes the dots are those of an interface: net/ipv4/conf/eth0.5 (sysctl(8)).
            in_place("/proc/sys/" + "/".join(parts), value.encode())

        together(one, values.items())

    def _modules(self, modules: tuple[str, ...]) -> None:
        def one(module: str) -> None:
            command("modprobe", "--", *module.split())  # with its options

        together(one, modules)

    def _dns(self, keys: Mapping[str, tuple[str, ...]]) -> None:
        lines = [f"nameserver {each}" for each in keys.get("nameservers", ())]
        lines += [f"{key} {' '.join(keys[key])}" for key in ("search", "options") if keys.get(key)]
        path = (*keys.get("path", ()), "/etc/resolv.conf")[0]
        write(path, "".join(f"{line}\n" for line in lines).encode())

    def _timesyncd(self, values: Mapping[str, str]) -> None:
        lines = ["[Time]", *(f"{key}={value}" for key, value in values.items())]
        write("/etc/systemd/timesyncd.conf.d/50-stages.conf", "".join(f"{x}\n" for x in lines).encode())

    def _systemctl(self, asked: Systemctl) -> None:
        not_started: list[str] = []

        def one(item: tuple[str, str]) -> None:
            verb, unit = item
            if verb != "start":
                command("systemctl", *(("--root=/",) if self._offline else ()), verb, unit)
            elif self._offline:
                not_started.append(unit)
            else:
                command("systemctl", "--no-block", "start", unit)

        for each in asked.overrides:
            write(f"/etc/systemd/system/{each.service}.d/{each.name}", each.content.encode())
        together(one, [(verb, unit) for verb, units in asked.verbs for unit in units])
        if not_started:
            raise _NotHere(
                f"cannot start {', '.join(not_started)}: the new root does not run yet; enable it"
            )

    def _firstboot(self, values: Mapping[str, str]) -> None:
        options = [f"--{k}" if v.lower() == "true" else f"--{k}={v}" for k, v in values.items()]
        command("systemd-firstboot", *(("--root=/",) if self._offline else ()), *options)


def _has_template(text: str) -> bool:
    return "{{" in text and "}}" in text


def _templates(keys: Mapping[str, Any]) -> Iterator[str]:
    """Name what has templates that stay as they are, beside commands and the condition."""
    for file in keys.get("files", ()):
        if _has_template(file.path + file.content.decode("latin-1")):
            yield f"files: {file.path}"
    for name, value in keys.get("environment", {}).items():
        if _has_template(value):
            yield f"environment: {name}"


def put(file: File) -> None:
    """Write a file, or make a directory, with its mode and owner."""
    owner = stage_accounts.owner_ids(file.owner)
    if file.content is not None:
        write(file.path, file.content, file.mode, owner)
        return
    real = os.path.realpath(file.path)
    os.makedirs(real, exist_ok=True)
    os.chown(real, *owner)
    os.chmod(real, file.mode)


def _has_systemd() -> bool:
    return any(os.path.exists(path) for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd"))


def _files_are_there(asked: Mapping[str, tuple[str, ...]]) -> bool:
    there = {key: [os.path.exists(path) for path in paths] for key, paths in asked.items()}
    some = any(there["any"]) if there.get("any") else True
    return some and all(there.get("all", ())) and not any(there.get("none", ()))
