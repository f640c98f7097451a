"""The cloud-init stages of a boot, in a process of their own. Imported only by a boot that has stage files.

Stage rootfs is done in the initramfs, stage initramfs in the new root, which the process makes its own root;
the agent never does. What becomes of the steps comes back through a pipe.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time

from immucore import documents, envfile, linux, observe, report, stage_growth, stage_steps, stages, syscalls
from immucore.errors import ImmucoreError
from immucore.execute import Step
from immucore.log import DEBUG, INFO, WARNING, Log
from immucore.plan import IMPORTANT, OPTIONAL, SYSROOT, Plan, Stage
from immucore.stage_tools import told
from immucore.values import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from immucore.boot import Boot
    from immucore.devices import Device, Devices, Wanted
    from immucore.documents import Node

ROOTFS = "rootfs"
VISIBLE = ("/system", "/oem")  # of the new root, in the initramfs too: files of this stage name them so
SHARED = ("/proc", "/sys", "/dev", "/run")
STAGE_SEC = 1800.0  # for all of a stage: a command has its own deadline, and a file may have many
GRACE_SEC = 3.0  # for what is told to stop
STOPPING = (signal.SIGTERM, signal.SIGINT)
MAX_CHARACTERS = 4000  # of a message
OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")
WORDS = "the kernel command line"


class Stopped(BaseException):
    """Somebody stops the agent, or the machine: no step is begun any more."""


class Asked(Record):
    """A stage that is to be done."""

    stage: str
    directories: tuple[str, ...]  # where its files are
    words: tuple[tuple[str, str], ...]  # its steps on the command line
    state: Wanted  # the partition whose disks are home
    key: str  # what is booted: what an earlier run of the agent has done for it is not done again


def run(boot: Boot, asked: Asked) -> None:
    """Do a stage and record what became of its steps. Raises Interrupted, and nothing for what fails."""
    stage = asked.stage
    take = _Taker(boot)
    if (earlier := _earlier(stage, asked.key)) is not None:
        boot.log.info(f"stage {stage} was done by an earlier run of the agent")
        boot.layouts = earlier.get("layouts", {})
        for said in earlier.get("told", []):
            take.message(*said)
        return
    try:
        if stage == ROOTFS:
            for path in VISIBLE:
                if not os.path.lexists(path):
                    os.symlink(SYSROOT + path, path)
        _run(take, stage, lambda write: _main(write, boot, asked))
        marker = json.dumps({"key": asked.key, "layouts": boot.layouts, "told": take.told})
        boot.kernel.write_file(report.stage_marker(stage), marker)
    except (OSError, TypeError, ValueError) as error:
        take.not_done(stage, f"cannot do stage {stage}: {told(error)}")


def leave_out(boot: Boot, stage: str, error: OSError) -> None:
    """Record that a stage was not begun."""
    _Taker(boot).not_done(stage, f"cannot do stage {stage}: {told(error)}")


def _earlier(stage: str, key: str) -> dict[str, Any] | None:
    """Return what is noted of a stage that an earlier run has done; None where there was none."""
    try:
        noted = json.loads(observe.text(report.stage_marker(stage)))
    except (OSError, ValueError):
        return None
    return noted if isinstance(noted, dict) and noted.get("key") == key else None


def _run(take: _Taker, stage: str, main: Callable[[int], NoReturn]) -> None:
    """Fork a process for a stage and take down what it tells. Raises OSError, TypeError and ValueError."""
    read, write = os.pipe()
    child = 0
    try:
        # A signal that comes before the child has its own handlers must not find those of the agent.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            child = os.fork()
            if child == 0:
                os.close(read)
                main(write)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(write)
        write = -1
        if not _take_lines(take, read):
            take.not_done(stage, f"it has taken longer than {STAGE_SEC:g} s, and was ended")
            return
        _, status = os.waitpid(child, 0)
        child = 0
        if status:
            take.not_done(stage, f"it ended with status {os.waitstatus_to_exitcode(status)}")
    finally:
        for descriptor in (read, write):
            if descriptor >= 0:
                os.close(descriptor)
        if child:
            _stop(child)


def _take_lines(take: _Taker, read: int) -> bool:
    """Take messages until there are no more; False where there is no time any more."""
    deadline = time.monotonic() + STAGE_SEC
    poll = select.poll()
    poll.register(read, select.POLLIN)
    rest = b""
    while (left_sec := deadline - time.monotonic()) > 0:
        if not poll.poll(left_sec * 1000 + 1):
            continue
        block = os.read(read, 1 << 16)
        if not block:
            return True  # half a message is what its status tells of
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            take.message(*json.loads(line))
    return False


class _Taker:
    """Takes down what the process of a stage tells."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._began_usec = time.monotonic_ns() // 1000
        self.told: list[tuple[str, ...]] = []  # what a later run has to know

    def not_done(self, stage: str, message: str) -> None:
        """Take down that a stage as a whole could not be done."""
        self.message("failed", f"stage {stage}", stage, "", message)

    def message(self, kind: str, *said: str) -> None:
        """Take a message as _Teller sends it."""
        if kind in ("failed", "ignored", "done"):
            self.told.append((kind, *said))
        if kind == "failed":
            self.failed(*said)
        elif kind == "ignored":
            target, stage, name, message = said
            self._boot.log.warning(f"'{name}' of stage {stage}: {message}")
            self._record(target, stage, name, outcome="ignored", reason=message)
        elif kind == "done":
            self._record(*said, outcome="done", reason="")
        else:
            self._boot.log.write({"warning": WARNING, "info": INFO}.get(kind, DEBUG), said[0])

    def failed(self, target: str, stage: str, name: str, message: str) -> None:
        """Record what could not be done: the boot goes on, degraded."""
        message = f"'{name}' of stage {stage}: {message}" if name else message
        if any(step.reason == message and step.operation.target == target for step in self._boot.record):
            return  # a file that cannot be read is told of once, not by each stage
        self._boot.log.warning(f"{message}; the boot goes on without it")
        self._record(target, stage, name, outcome="degraded", reason=message)

    def _record(self, target: str, stage: str, name: str, *, outcome: str, reason: str) -> None:
        criticality = OPTIONAL if outcome == "ignored" else IMPORTANT
        operation = Stage(
            target=target, stage=stage, name=name, why="a cloud-init file", criticality=criticality
        )
        now_usec = time.monotonic_ns() // 1000
        step = Step(
            operation=operation,
            outcome=outcome,
            started_usec=self._began_usec,
            took_usec=now_usec - self._began_usec,
            reason=reason,
            hint=f"correct {target}" if reason else "",
        )
        self._began_usec = now_usec
        self._boot.plan += Plan(operations=(operation,))
        self._boot.record.append(step)


def _stop(child: int) -> None:
    """End the process of a stage, which ends what it has started, and kill it where it does not."""
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SEC
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.01)


class _Teller:
    """Tells the agent; the messages are lines of JSON."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failures = 0

    def send(self, kind: str, *said: str) -> None:
        """Send a message."""
        line = json.dumps([kind, *[text[:MAX_CHARACTERS] for text in said]]).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def debug(self, message: str) -> None:
        """Say what only somebody who looks for a fault wants to know."""
        self.send("debug", message)

    def warning(self, message: str) -> None:
        """Say what somebody should look into."""
        self.send("warning", message)

    def ignored_of(self, step: stages.Step, message: str) -> None:
        """Say what of a step has failed, and is no matter of the boot."""
        self.failures += 1
        self.send("ignored", step.place.name, step.stage, step.name, message)

    def failed(self, step: stages.Step, message: str) -> None:
        """Say what of a step could not be done."""
        self.failures += 1
        self.send("failed", step.place.name, step.stage, step.name, message)


class _TellingLog(Log):
    """The log of what is called in the process of a stage, which the agent keeps."""

    def __init__(self, teller: _Teller) -> None:
        super().__init__(journal=False)
        self._teller = teller

    def write(self, level: int, message: str) -> None:
        """Tell a message."""
        self._teller.send("warning" if level < INFO else "info" if level == INFO else "debug", message)


def _main(descriptor: int, boot: Boot, asked: Asked) -> NoReturn:
    """Do a stage, as a child; it never returns to what the agent was about."""
    status, stage = 1, asked.stage
    try:
        for number in STOPPING:
            signal.signal(number, _stopped)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        teller = _Teller(descriptor)
        try:
            _do(teller, boot, asked)
        except (ImmucoreError, OSError) as error:
            teller.send("failed", f"stage {stage}", stage, "", f"cannot do stage {stage}: {told(error)}")
        except Exception as error:  # noqa: BLE001  a bug too has to be told in one sentence
            teller.send("failed", f"stage {stage}", stage, "", _bug(error))
        status = 0
    finally:
        os._exit(status)


def _bug(error: Exception) -> str:
    return f"this is a bug in immucore: {type(error).__name__}: {error}"


def _stopped(_number: int, _frame: object) -> None:
    raise Stopped


def _do(teller: _Teller, boot: Boot, asked: Asked) -> None:
    stage, words = asked.stage, asked.words
    root = SYSROOT
    release = _os_release()
    if stage != ROOTFS:
        _enter_new_root(teller)
        root = "/"
    log, offline, boot_disk = _TellingLog(teller), stage != ROOTFS, boot.cmdline.boot_disk

    def wait_for(wanted: Wanted) -> Devices:
        from immucore import wait  # imports pyroute2, as dear as four boots

        return wait.for_devices((wanted,), log, "no", boot_disk)

    def find(label: str) -> Device | None:
        def look() -> Devices:
            return observe.devices(boot_disk)

        # In the new root all has been waited for, and nothing can be imported any more.
        return stage_growth.labelled(label, asked.state, look, None if offline else wait_for)

    steps = stage_steps.Steps(teller, release, offline=offline, find=find)
    from_words, problems = stages.from_words(words)
    read: dict[str, tuple[str, list[Node]]] = {}
    told_already: set[str] = set()
    for pattern in stages.SUB_STAGES:
        sub_stage = pattern.format(stage)
        # Looked for each time: what a step puts there counts from the next one on.
        for path in _listed(teller, root, stage, asked.directories):
            try:
                wanted = stages.steps_of(_documents(root, path, read), sub_stage)
            except Exception as error:  # noqa: BLE001  what nobody thought of costs this file alone
                why = told(error) if isinstance(error, ImmucoreError | OSError) else _bug(error)
                if why not in told_already:
                    told_already.add(why)
                    teller.send("failed", path, sub_stage, "", why)
                continue
            _do_steps(teller, steps, wanted)
        for problem in problems:
            teller.send("failed", WORDS, sub_stage, "", problem)
        problems = []
        _do_steps(teller, steps, stages.steps_of(from_words, sub_stage))


def _listed(teller: _Teller, root: str, stage: str, directories: tuple[str, ...]) -> list[str]:
    found = []
    for directory in directories:
        try:
            found += observe.stage_files(root, (directory,))
        except OSError as error:
            teller.send("failed", directory, stage, "", f"cannot look into {directory}: {error.strerror}")
    return found


def _documents(root: str, path: str, read: dict[str, tuple[str, list[Node]]]) -> list[Node]:
    """Read a file, which is parsed once as long as it stays what it is."""
    content = observe.stage_text(root, path) or ""
    if path not in read or read[path][0] != content:
        read[path] = content, []  # of one that cannot be read nothing is done
        read[path] = content, documents.read(content, path)
    return read[path][1]


def _do_steps(teller: _Teller, steps: stage_steps.Steps, wanted: list[stages.Step]) -> None:
    for step in wanted:
        before = teller.failures
        try:
            did = steps.do(step)
        except Exception as error:  # noqa: BLE001  what nobody thought of costs this step alone
            teller.failed(step, _bug(error))
            continue
        if did and teller.failures == before:
            teller.send("done", step.place.name, step.stage, step.name)


def _os_release() -> dict[str, str]:
    """Read what the new root's system says of itself (os-release(5)); nothing where it says nothing."""
    for path in OS_RELEASE:
        try:
            if content := observe.stage_text(SYSROOT, path):
                return envfile.parse(content, path)
        except ImmucoreError:
            continue
    return {}


def _enter_new_root(teller: _Teller) -> None:
    """Make the new root this process' own, with what a running system has in it, mounted for it alone."""
    syscalls.leave_mounts()
    kernel = linux.Kernel()
    for path in SHARED:
        try:
            where = kernel.directory(SYSROOT + path)
            syscalls.mount(path, where, "none", syscalls.MS_BIND | syscalls.MS_REC, "")
        except (ImmucoreError, OSError) as error:
            teller.warning(f"the stage has no {path}: {told(error)}")
    os.chroot(SYSROOT)
    os.chdir("/")
