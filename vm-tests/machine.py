"""Boots disks in QEMU, by emulation: no KVM is needed, and none is tried.

report = Machine(disk, "root=LABEL=COS_STATE cos-img/filename=/cOS/active.img").boot()
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import derivative
from derivative import CACHE, cpio, run
from disk import Disk
from report import Report, read_answer

# norandmaps: address space randomisation defeats TCG's translation cache, the largest single gain. A machine
# id on the command line: no first boot. After a panic the machine resets, and QEMU ends (-no-reboot).
CMDLINE = (
    "console=ttyS0 norandmaps nokaslr cryptomgr.notests tsc=reliable panic=1 oops=panic"
    " systemd.machine_id=0123456789abcdef0123456789abcdef"
)
# No cmpxchg16b: QEMU 7.2 leaves garbage in RFLAGS after one without a lock prefix, and Linux 6.12, whose
# allocator uses it, panics in every second boot. What a newer processor has besides costs a boot a tenth.
QEMU = (
    "qemu-system-x86_64 -nodefaults -no-user-config -machine q35 -cpu qemu64,+rdrand,-cx16 -display none"
    " -object rng-builtin,id=rng -device virtio-rng-pci,rng=rng"
)
# EDK II; with -kernel it finds kernel and initramfs in QEMU's fw_cfg, and starts the kernel from there.
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
REPORT_MIB = 32
PATIENCE = 2.0  # limits are for a host that boots in 15 s; half as fast has to do too
INSIST_S = 5.0
MANY_COPIES = 64
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)

Action = Callable[["Guest"], None]


@dataclass(frozen=True)
class Extra:
    """Another disk of a machine, and how it is attached."""

    path: Path
    serial: str
    bus: str = "virtio"  # or usb: a stick
    first: bool = False  # on the bus before the machine's own disk
    paths: int = 1  # the same disk so many times


class Machine:
    """A computer with a disk and a kernel command line. Every boot of it is a new process.

    Writes to the disks are thrown away at the end of each boot, unless `keep_writes`; then the next boot
    of this machine sees them. `initramfs` is a variant of derivative.VARIANTS, `initramfs_files` are added
    to it. `disk_paths` attaches the disk more than once, `tpm` is the state of a TPM 2.0, written to only
    with `keep_writes`. With a `screen` the machine has a tty1 too, with `efi` its firmware is UEFI, and each
    boot begins with no variables but the firmware's own. With `boot_loader` the firmware starts that of the
    disk, which alone decides what is booted, and a machine that restarts goes on until it has reported.
    `hardware` is what else QEMU is to be told, as in ("-device", "i6300esb").
    """

    numbers = itertools.count(1)

    def __init__(
        self,
        disk: Disk,
        cmdline: str,
        *,
        memory_mib: int = 1024,
        initramfs: str = "systemd",
        initramfs_files: Mapping[str, Path | str | bytes] | None = None,
        extra_disks: Sequence[Path | Extra] = (),
        with_disk: bool = True,
        disk_paths: int = 1,
        tpm: Path | None = None,
        keep_writes: bool = False,
        screen: bool = False,
        efi: bool = False,
        boot_loader: bool = False,
        hardware: Sequence[str] = (),
        work: Path | None = None,
    ) -> None:
        self.disk = disk
        self.cmdline = cmdline
        self.memory_mib = memory_mib
        self.initramfs = initramfs
        self.initramfs_files = initramfs_files or {}
        own = [Extra(disk.path, "disk0", paths=disk_paths)] if with_disk else []
        extra = [
            each if isinstance(each, Extra) else Extra(each, f"disk{number}")
            for number, each in enumerate(extra_disks, len(own))
        ]
        self.disks = [*(e for e in extra if e.first), *own, *(e for e in extra if not e.first)]
        self.tpm = tpm
        self.keep_writes = keep_writes
        self.screen = screen
        self.efi = efi
        self.boot_loader = boot_loader
        self.hardware = hardware
        self.work = (work or CACHE / "run") / f"machine.{os.getpid()}.{next(self.numbers)}"
        self.work.mkdir(parents=True)
        self.boots = 0

    def boot(
        self,
        *,
        limit_s: float = 60,
        commands: Sequence[str] = (),
        files: Sequence[str] = (),
        when: Sequence[tuple[float | str, Action]] = (),
        until: str = "system",
        poweroff: str = "",
        icount_shift: int | None = None,
    ) -> Report:
        """Boot until the machine has reported and is off, or for `limit_s` seconds, PATIENCE times.

        `commands` are run by sh inside the machine before it reports, `files` are paths (with patterns) to
        bring along. `when` has actions to take after so many seconds, or when a line of the console matches
        an expression. `until` "initramfs" ends a good boot right before the switch. `poweroff` is "clean",
        through systemd, or "fast", without; by default clean where the writes are kept.
        """
        self.boots += 1
        request = self.work / f"report.{self.boots}"
        write_request(request, commands, files, poweroff or ("clean" if self.keep_writes else "fast"))
        cmdline = self.cmdline + (" vm-test.until=initramfs" if until == "initramfs" else "")
        kernel = [] if self.boot_loader else self.kernel(self.reporting_initramfs(), cmdline)
        arguments = [*self.arguments(), *kernel, *drive(request, "report", "raw")]
        if icount_shift is None:
            arguments += ["-accel", "tcg,tb-size=512"]
        else:
            arguments += ["-accel", "tcg,tb-size=512,thread=single", "-icount", f"shift={icount_shift}"]
        if when:
            arguments += ["-device", "qemu-xhci,id=usb"] if "usb.0" not in " ".join(arguments) else []
        for port in range(2 if when else 0):
            arguments += ["-device", f"pcie-root-port,id=port{port},chassis={port + 1}"]
        with contextlib.ExitStack() as stack:
            if self.tpm:
                arguments += stack.enter_context(self.security_chip(self.tpm))
            guest = stack.enter_context(Guest(self.work / f"console.{self.boots}", arguments))
            ended, seconds = guest.run(limit_s * PATIENCE, when)
        report = Report(guest.console, ended, seconds, tuple(commands), read_answer(request))
        (self.work / "initramfs").unlink(missing_ok=True)
        return report

    def reporting_initramfs(self) -> Path:
        """Return the initramfs that reports, with this machine's files."""
        initrd = derivative.reporting_initramfs(self.disk.suite, self.initramfs)
        if not self.initramfs_files:
            return initrd
        own = self.work / "initramfs"
        run("cp", "--reflink=auto", initrd, own)
        with own.open("ab") as stream:
            stream.write(cpio(self.initramfs_files))
        return own

    def interactive(self) -> int:
        """Boot with this terminal as the console and nothing to report; Ctrl-A X ends it."""
        initrd = derivative.initramfs(self.disk.suite, self.initramfs)
        arguments = [
            *self.arguments(),
            *self.kernel(initrd, self.cmdline),
            "-accel",
            "tcg,tb-size=512",
            "-serial",
            "mon:stdio",
        ]
        return subprocess.run(arguments, check=False).returncode

    def kernel(self, initrd: Path, cmdline: str) -> list[str]:
        """Return the arguments with which QEMU is the boot loader; a machine that restarts ends."""
        kernel = derivative.kernel(self.disk.suite)
        return [
            "-no-reboot",
            "-kernel",
            str(kernel),
            "-initrd",
            str(initrd),
            "-append",
            f"{CMDLINE} {cmdline}",
        ]

    def arguments(self) -> list[str]:
        """Return QEMU's command line, but for what a boot adds."""
        arguments = [*QEMU.split(), "-smp", "1", "-m", str(self.memory_mib), *self.hardware]
        if self.screen:
            arguments += ["-device", "VGA"]
        if self.efi:
            variables = shutil.copy(VARIABLES, self.work / "variables")
            arguments += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}"]
            arguments += ["-drive", f"if=pflash,unit=1,format=raw,file={variables}"]
        if any(each.bus == "usb" for each in self.disks):
            arguments += ["-device", "qemu-xhci,id=usb"]
        for each in self.disks:
            # Where writes are kept a flush is one: after a power cut qcow2's tables have to fit the data.
            cache = "writeback" if self.keep_writes else "unsafe"
            overlay = self.overlay(each.path, each.serial)
            arguments += drive(overlay, each.serial, "qcow2", cache, bus=each.bus, paths=each.paths)
            if self.boot_loader and each.path == self.disk.path:
                arguments[-1] += ",bootindex=0"  # firmware looks at no disk that has no place in its order
        return arguments

    @contextlib.contextmanager
    def security_chip(self, state: Path) -> Iterator[list[str]]:
        """Run a TPM beside a boot; QEMU's arguments for it."""
        if not self.keep_writes:
            state = Path(shutil.copytree(state, self.work / f"tpm.{self.boots}"))
        control = self.work / "tpm.socket"
        words = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--terminate"]
        process = subprocess.Popen([*words, "--ctrl", f"type=unixio,path={control}"])
        try:
            while not control.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"swtpm ended with {process.returncode}")
                time.sleep(0.01)
            yield [
                *("-chardev", f"socket,id=tpm,path={control}"),
                *("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0"),
            ]
        finally:
            process.terminate()
            process.wait()
            control.unlink(missing_ok=True)

    def overlay(self, path: Path, name: str) -> Path:
        """Return a file that takes the writes to a disk: a new one, or the last boot's."""
        overlay = self.work / f"{name}.qcow2"
        if not (self.keep_writes and overlay.exists()):
            run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", path.resolve(), overlay)
        return overlay

    def raw(self, number: int = 0) -> Path:
        """Return a disk with what the boots wrote, as a raw file: for e2fsck, debugfs."""
        name = self.disks[number].serial
        raw = self.work / f"{name}.raw"
        run("qemu-img", "convert", "-O", "raw", self.work / f"{name}.qcow2", raw)
        return raw


def drive(
    path: Path, serial: str, form: str, cache: str = "unsafe", *, bus: str = "virtio", paths: int = 1
) -> list[str]:
    """Return the arguments for a disk, attached as often as it has `paths`."""
    if paths == 1:
        disk = ["-drive", f"if=none,id={serial},file={path},format={form},cache={cache},discard=unmap"]
        return [*disk, "-device", f"{DEVICES[bus]},drive={serial},serial={serial}"]
    disk = ["-blockdev", f"node-name={serial},driver={form},file.driver=file,file.filename={path}"]
    return disk + paths * ["-device", f"{DEVICES[bus]},drive={serial},serial={serial},share-rw=on"]


DEVICES = {"virtio": "virtio-blk-pci", "usb": "usb-storage,bus=usb.0,removable=on"}


def write_request(path: Path, commands: Sequence[str], files: Sequence[str], poweroff: str) -> None:
    """Write the disk that a machine reads its task from, and then writes its report to."""
    contents = {f"commands/{number:03}": command for number, command in enumerate(commands)}
    contents["files"] = "\n".join(pattern.lstrip("/") for pattern in files)
    contents["poweroff"] = poweroff
    with path.open("wb") as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content.encode())
                archive.addfile(member, io.BytesIO(content.encode()))
        stream.truncate(REPORT_MIB * 2**20)


class Guest:
    """A running QEMU: its console, and what a test does to it meanwhile."""

    def __init__(self, console: Path, arguments: Sequence[str]) -> None:
        self.log = console.open("wb")
        self.text = bytearray()
        self.monitor, theirs = socket.socketpair()
        self.replies = b""
        self.ended = "unknown"
        self.stopped = False
        self.plugged = 0
        self.insisting: tuple[str, str] | None = None
        self.typed = 0.0
        self.start = time.monotonic()
        parent = os.getpid()

        def die_with_parent() -> None:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the call
                os._exit(1)

        self.process = subprocess.Popen(
            [
                *arguments,
                *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
                *(
                    "-chardev",
                    f"socket,id=monitor,fd={theirs.fileno()}",
                    "-mon",
                    "chardev=monitor,mode=control",
                ),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            pass_fds=[theirs.fileno()],
            preexec_fn=die_with_parent,  # noqa: PLW1509 - no thread of ours holds a lock here
        )
        theirs.close()
        self.qmp("qmp_capabilities")

    def __enter__(self) -> Guest:
        """Return the running machine."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the machine if it still runs."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log, self.monitor):
            if stream:
                stream.close()

    @property
    def console(self) -> str:
        """Everything on the serial console so far."""
        return self.text.decode(errors="replace").replace("\r\n", "\n")

    def run(self, limit_s: float, when: Sequence[tuple[float | str, Action]]) -> tuple[str, float]:
        """Wait for the end of the machine, asleep until something happens; return how and when it came."""
        assert self.process.stdout is not None
        output = self.process.stdout.fileno()
        pending = list(when)
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(self.monitor, select.POLLIN)
        while True:
            elapsed = time.monotonic() - self.start
            if elapsed >= limit_s:
                return "limit", elapsed
            for item in [item for item in pending if self.is_due(item[0], elapsed)]:
                pending.remove(item)
                item[1](self)
            deadline = min([limit_s, *(moment for moment, _ in pending if not isinstance(moment, str))])
            if self.insisting:
                deadline = min(deadline, elapsed + INSIST_S)
            for descriptor, _ in poll.poll(max(0.0, deadline - elapsed) * 1000 + 1):
                if descriptor != output:
                    if not self.receive():
                        poll.unregister(self.monitor)
                elif data := os.read(output, 65536):
                    self.log.write(data)
                    self.text += data
                else:  # QEMU has gone; what it had to say about that is in the monitor's socket
                    while self.receive():
                        pass
                    return self.ended, time.monotonic() - self.start
            self.insist()

    def is_due(self, moment: float | str, elapsed: float) -> bool:
        """Tell whether a moment has come: seconds since the start, or an expression seen on the console."""
        if isinstance(moment, str):
            return re.search(moment, self.console, re.MULTILINE) is not None
        return elapsed >= moment

    def receive(self) -> bool:
        """Read what QEMU says on its monitor; False at its end."""
        data = self.monitor.recv(65536)
        *lines, self.replies = (self.replies + data).split(b"\n")
        for line in filter(None, lines):
            message = json.loads(line)
            if message.get("event") == "SHUTDOWN":
                self.ended = message["data"]["reason"]
            elif message.get("event") in ("STOP", "RESUME"):
                self.stopped = message["event"] == "STOP"
            elif "error" in message:
                raise RuntimeError(f"QEMU refused a command: {message['error']['desc']}")
        return bool(data)

    def qmp(self, command: str, **arguments: object) -> None:
        """Send a command to QEMU; a refusal raises when it is read."""
        self.monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def plug(self, path: Path, serial: str = "late", *, bus: str = "virtio") -> None:
        """Hot-plug a raw disk, or, where `bus` is usb, a stick; what is written to it is thrown away."""
        overlay = Path(self.log.name).with_name(f"{serial}.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", path.resolve(), overlay)
        file: dict[str, Any] = {"driver": "file", "filename": str(overlay)}
        self.qmp("blockdev-add", **{"node-name": serial, "driver": "qcow2", "file": file})
        device: dict[str, Any] = {"id": serial, "drive": serial, "serial": serial}
        if bus == "usb":
            self.qmp("device_add", driver="usb-storage", bus="usb.0", removable=True, **device)
        else:
            self.qmp("device_add", driver="virtio-blk-pci", bus=f"port{self.plugged}", **device)
            self.plugged += 1

    def type(self, text: str) -> None:
        """Type on the serial console."""
        assert self.process.stdin is not None
        self.typed = time.monotonic()
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def insist(self) -> None:
        """Type again what type_until() typed, if its answer has not come."""
        if self.insisting:
            text, answer = self.insisting
            if re.search(answer, self.console, re.MULTILINE):
                self.insisting = None
            elif time.monotonic() - self.typed > INSIST_S:
                self.type(text)

    def type_until(self, text: str, answer: str) -> None:
        """Type, and once more every few seconds until the console matches `answer`.

        sulogin and getty throw away what was typed before they were ready to read.
        """
        self.insisting = (text, answer)
        self.type(text)

    def copies(self, disk: Path, until: str, every_s: float = 0.05) -> list[Path]:
        """Copy a disk's overlay again and again until the console matches `until`: what a power cut leaves.

        The machine stands still meanwhile. What QEMU has not written by then is not in the file, which is
        what it would be if QEMU were killed at that moment.
        """
        found: list[Path] = []
        number = 0
        while re.search(until, self.console, re.MULTILINE) is None:
            number += 1
            found.append(self.copy(disk, number))
            if len(found) > MANY_COPIES:  # it takes longer than expected: half as many, half as often
                for copy in found[1::2]:
                    copy.unlink()
                found, every_s = found[::2], every_s * 2
            if self.run(time.monotonic() - self.start + every_s, ())[0] != "limit":
                break
        return found

    def copy(self, disk: Path, number: int) -> Path:
        """Copy a disk's overlay once, beside it."""
        target = disk.with_suffix(f".{number}{disk.suffix}")
        self.qmp("stop")
        while not self.stopped and self.receive():
            pass
        shutil.copy(disk, target)
        self.qmp("cont")
        return target

    def cut_power(self) -> None:
        """Switch the machine off as a power failure does."""
        self.process.kill()
