"""A cOS machine without a VM: a real disk on a loop device, a real kernel, a root of its own to boot in.

A `Machine` is a mount and PID namespace. It sees the host's programs below a root on tmpfs, so the agent can
use /sysroot and /run as it does in an initramfs and the host sees nothing of it. Its kernel command
line, udev database, kernel log and console are its own. Whatever happens, also to the tests, nothing is left
behind: the namespaces end with the process that made them, and the loop devices with the namespaces.

Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import coverage
import psutil

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build/bundle"
SOURCE = (sys.executable, "-m", "immucore", "boot")
FROZEN = (str(BUNDLE / "immucore/immucore"), "boot")
ACTIVE = "root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img"
PASSIVE = "root=LABEL=COS_PASSIVE cos-img/filename=/cOS/passive.img"
RECOVERY = "root=LABEL=COS_SYSTEM cos-img/filename=/cOS/recovery.squashfs"

# name and label of the partition, MiB; the numbers of the partitions follow this order
PARTITIONS = {"oem": ("COS_OEM", 6), "state": ("COS_STATE", 24), "recovery": ("COS_RECOVERY", 12)}
PARTITIONS |= {"persistent": ("COS_PERSISTENT", 16)}
IMAGE_MIB = 8

# Runs as the first process of the namespaces: $1 is an empty directory, $2 the disk or nothing.
_SET_UP = r"""
set -eu
base=$1 disk=$2
mount -t tmpfs -o mode=0755 machine "$base"
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$base$entry"; continue; fi
    case $entry in /run | /sysroot | /lost+found) continue ;; esac
    [ -d "$entry" ] || continue
    mkdir "$base$entry"
    [ "$entry" != /proc ] || { mount -t proc proc "$base/proc"; continue; }
    [ "$entry" != /etc ] || continue
    mount --bind "$entry" "$base$entry"
done
mkdir "$base/sysroot" "$base/run" "$base/machine"
mkdir "$base/machine/udev" "$base/machine/etc" "$base/machine/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$base/machine/etc,workdir=$base/machine/work" etc "$base/etc"
: >"$base/etc/initrd-release"
mount -t tmpfs -o mode=0755 run "$base/run"
mkdir "$base/run/udev"
mount --bind "$base/machine/udev" "$base/run/udev"
mkdir "$base/run/udev/data"
: >"$base/run/udev/control"  # somebody fills the database
for number in /sys/class/block/[!l]*/dev; do  # the host's disks are there too, and hold nothing
    [ ! -e "$number" ] || echo I:1 >"$base/run/udev/data/b$(cat "$number")"
done
printf '../machine/console\n' >"$base/machine/active"
: >"$base/machine/cmdline"
mkfifo "$base/machine/console" "$base/machine/kmsg"
exec 8<>"$base/machine/console" 9<>"$base/machine/kmsg"  # open for ever: a reader never meets the end
mount --bind "$base/machine/cmdline" "$base/proc/cmdline"
mount --bind "$base/machine/active" "$base/sys/class/tty/console/active"
mount --bind "$base/machine/kmsg" "$base/dev/kmsg"
device=
if [ -n "$disk" ]; then
    device=$(losetup --find --show --partscan "$disk")
    exec 7<"$device"
    losetup --detach "$device"  # as soon as nobody has it open
    partx --update "$device"    # not every kernel reads GPT
    for part in "/sys/class/block/${device#/dev/}"/*/partition; do
        part=${part%/partition}
        record=$base/run/udev/data/b$(cat "$part/dev")
        blkid --probe --output udev "/dev/${part##*/}" | sed 's/^/E:/' >"$record"
    done
fi
echo "ready $device"
exec chroot "$base" sleep infinity
"""


def require_root() -> None:
    """Say what is missing instead of failing somewhere in the middle."""
    if os.geteuid() != 0:
        raise PermissionError("mounts, loop devices and namespaces need root: run this as root")


def isolated(*, user: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test in a child process with its own mounts; `user`: in a user namespace, without root."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def wrapper(*arguments: Any, **named: Any) -> None:
            if not user:
                require_root()
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(read)
                _child(write, user, lambda: test(*arguments, **named))
            os.close(write)
            with os.fdopen(read) as pipe:
                failure = pipe.read()
            assert os.waitpid(child, 0)[1] == 0, failure
            if failure:
                raise AssertionError(failure)

        return wrapper

    return decorate


def _child(write: int, user: bool, test: Callable[[], None]) -> None:
    status = 1
    try:
        enter_namespaces(user=user)
        test()
        status = 0
    except BaseException:  # noqa: BLE001  pytest's own Failed is no Exception; it is told by the parent
        os.write(write, traceback.format_exc().encode()[:60000])
    finally:
        if (measured := coverage.Coverage.current()) is not None:
            measured.stop()
            measured.save()  # to a file of its own, because the process is another
        os._exit(status)


def enter_namespaces(*, user: bool) -> None:
    """Give this process mounts of its own; `user`: and make it root of a user namespace with one user."""
    libc = ctypes.CDLL(None, use_errno=True)
    ids = os.getuid(), os.getgid()
    if libc.unshare(0x00020000 | (0x10000000 if user else 0)) < 0:  # CLONE_NEWNS, CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {ids[0]} 1")
        Path("/proc/self/gid_map").write_text(f"0 {ids[1]} 1")
    if libc.mount(b"none", b"/", None, 0x44000, None) < 0:  # MS_REC | MS_PRIVATE
        raise OSError(ctypes.get_errno(), "mount")


def command(*words: str | Path, stdin: str = "") -> str:
    """Run a program of the host and return its output; its error is in the exception's text."""
    done = subprocess.run([*map(str, words)], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit status {done.returncode}: {done.stderr}")
    return done.stdout


def build_bundle(program: str = "immucore") -> Path:
    """Freeze a program, the agent or another of frozen/checks.py, if that has not been done yet."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/freeze.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest -n: each worker comes here
        command(sys.executable, ROOT / "frozen/freeze.py", program)
    return BUNDLE / program


def service_environment(bundle: Path | str = BUNDLE / "immucore") -> list[str]:
    """Give what immucore.service adds to the agent's environment, NAME=VALUE, for one in this folder."""
    unit = (ROOT / "dracut-module/50immucore/immucore.service").read_text()
    lines = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("Environment=")]
    return [word.replace("/usr/lib/immucore", str(bundle)) for line in lines for word in line.split()]


def make_tree(root: Path, slot: str) -> Path:
    """Make what an image holds: little, but of every kind that the agent has to keep as it is."""
    for path in (
        "etc/cos",
        "home",
        "oem",
        "opt",
        "proc",
        "run",
        "srv",
        "sys",
        "dev",
        "sbin",
        "usr/local",
        "tmp",
    ):
        (root / path).mkdir(parents=True)
    (root / "etc/os-release").write_text('ID=cos\nPRETTY_NAME="Debian GNU/Linux 12"\nVERSION_ID="1"\n')
    (root / "etc/slot").write_text(slot)
    (root / "etc/fstab").write_text("# UNCONFIGURED FSTAB FOR BASE SYSTEM\n")
    (root / "sbin/init").write_text("#!/bin/sh\n")
    (root / "sbin/init").chmod(0o755)
    (root / "tmp").chmod(0o1777)
    home = root / "root"
    home.mkdir()
    os.setxattr(home, "user.kept", b"yes")
    (home / ".profile").write_text("PS1='# '\n")
    os.chown(home, 4711, 4712)
    home.chmod(0o700)  # after chown(2)
    make_varied(root / "var")
    return root


def make_varied(directory: Path) -> Path:
    """Make a directory with every kind of file and attribute that copying one can lose."""
    (directory / "log").mkdir(parents=True)
    (directory / "log/messages").write_text("hello\n")
    os.link(directory / "log/messages", directory / "log/again")
    (directory / "log/link").symlink_to("messages")
    (directory / "log/nowhere").symlink_to("/not/there")
    os.chown(directory / "log/nowhere", 7, 8, follow_symlinks=False)
    os.mkfifo(directory / "log/fifo", 0o620)
    os.mknod(directory / "log/null", 0o20660, os.makedev(1, 3))
    with (directory / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"in the middle")
        file.truncate(3 << 20)
    tool = directory / "tool"
    tool.write_bytes(b"\x7fELF")
    tool.chmod(0o6755)
    command("setcap", "cap_net_raw+ep", tool)
    os.setxattr(tool, "user.kept", b"\0binary\xff")
    command("setfacl", "-m", "u:4711:rwx,d:u:4711:rx", directory / "log")
    (directory / "log").chmod(0o1770)
    os.utime(directory / "sparse", ns=(1_500_000_000_123_456_789, 1_600_000_000_987_654_321))
    os.utime(directory / "log", ns=(1_500_000_000_000_000_001, 1_600_000_000_000_000_002))
    return directory


def described(directory: Path) -> dict[str, object]:
    """Describe everything below a directory that copying it has to keep."""
    found: dict[str, object] = {}
    inodes: dict[tuple[int, int], str] = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        status = path.lstat()
        name = str(path.relative_to(directory))
        first = inodes.setdefault((status.st_dev, status.st_ino), name)
        found[name] = {
            "mode": oct(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "mtime": status.st_mtime_ns,
            "device": status.st_rdev,
            "first of its links": first,
            "links": status.st_nlink if stat.S_ISREG(status.st_mode) else 0,
            "xattrs": {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            },
            "content": path.read_bytes()
            if stat.S_ISREG(status.st_mode)
            else os.readlink(path)
            if path.is_symlink()
            else None,
        }
    return found


def make_disk(disk: Path, work: Path) -> None:
    """Make a GPT disk of a cOS machine, without loop devices or mounts."""
    images = work / "images"
    images.mkdir(parents=True)
    for slot, label in (("active", "COS_ACTIVE"), ("passive", "COS_PASSIVE"), ("recovery", "COS_SYSTEM")):
        _make_ext(
            images / f"{slot}.img", IMAGE_MIB, label, make_tree(work / slot, slot), "-O", "^has_journal"
        )
    command("mksquashfs", work / "recovery", images / "recovery.squashfs", "-quiet", "-no-progress")
    holds = {"state": ("active.img", "passive.img"), "recovery": ("recovery.img", "recovery.squashfs")}
    table = "label: gpt\n"
    for name, (_, size_mib) in PARTITIONS.items():
        table += f"size={size_mib}MiB, name={name}\n"
    with disk.open("wb") as file:
        file.truncate((sum(size for _, size in PARTITIONS.values()) + 2) << 20)
    command("sfdisk", "--quiet", disk, stdin=table)
    start_mib = 1
    for name, (label, size_mib) in PARTITIONS.items():
        tree = work / "partitions" / name
        (tree / "cOS").mkdir(parents=True)
        for image in holds.get(name, ()):
            (images / image).rename(tree / "cOS" / image)
        _make_ext(disk, size_mib, label, tree, "-E", f"offset={start_mib << 20}")
        start_mib += size_mib
    shutil.rmtree(work)


def _make_ext(file: Path, size_mib: int, label: str, tree: Path, *options: str) -> None:
    command("mke2fs", "-q", "-F", "-t", "ext4", "-L", label, "-d", tree, *options, file, f"{size_mib}M")


class Boot:
    """What a run of the agent said and left behind."""

    def __init__(self, machine: Machine, status: int, stderr: str) -> None:
        self.status = status
        self.stderr = stderr
        self.console = machine.console()
        self.mounts = machine.mounts()
        record = machine.path("/run/immucore")
        self.files = {file.name: file.read_text() for file in record.iterdir()} if record.is_dir() else {}
        self.result: dict[str, Any] = json.loads(self.files.get("result.json", "{}"))
        self.plan: dict[str, Any] = json.loads(self.files.get("plan.json", "{}"))
        self.steps: list[dict[str, Any]] = json.loads(self.files.get("steps.json", "{}")).get("steps", [])

    def outcomes(self) -> dict[str, str]:
        """Map `kind target` of each step to its outcome."""
        return {f"{s['operation']['kind']} {s['operation']['target']}": s["outcome"] for s in self.steps}


class Mounted:
    """A line of mountinfo, as proc(5) calls its fields."""

    def __init__(self, line: str) -> None:
        left, _, right = line.partition(" - ")
        fields = left.split()
        self.device, self.root, self.target = fields[2], fields[3], fields[4]
        self.options = fields[5].split(",")
        self.fstype, self.source, superblock_options = right.split(" ", 2)
        self.superblock_options = superblock_options.split(",")


class Machine:
    """A machine that has been switched on, with `disk` (changed in place) or without any."""

    def __init__(self, folder: Path, disk: Path | None = None) -> None:
        require_root()
        folder.mkdir(parents=True, exist_ok=True)
        self.base = folder
        self._started: list[subprocess.Popen[str]] = []
        # If this process is killed, the kernel kills what is below it.
        arguments = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
        ]
        arguments += ["--propagation", "private", "sh", "-c", _SET_UP, "sh", str(folder), str(disk or "")]
        self._holder = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._holder.stdout
        assert self._holder.stderr
        word, _, self.device = self._holder.stdout.readline().strip().partition(" ")
        if word != "ready":
            self._holder.wait()
            raise RuntimeError(f"cannot set up a machine: {self._holder.stderr.read()}")
        self._backing = Path(f"/sys/class/block/{self.device[5:]}/loop/backing_file")
        self._attached = self._backing.read_text() if self.device else ""
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self.pid = int(children.read_text())
        while os.readlink(f"/proc/{self.pid}/root") != str(folder):  # between "ready" and chroot(2)
            time.sleep(0.001)
        self._before = {(mount.target, mount.device) for mount in self._mount_table()}

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:  # nsenter is in the mount namespace too
            process.kill()
            process.communicate()
        self._holder.kill()
        self._holder.communicate()
        # The kernel detaches a moment after the last process of the namespaces has gone.
        for _attempt in range(500):
            with suppress(OSError):
                if self.device and self._backing.read_text() == self._attached:  # not somebody else's by now
                    time.sleep(0.01)
                    continue
            return
        raise RuntimeError(f"{self.device} is still attached")

    def path(self, path: str) -> Path:
        """Give the host's name of a path in the machine; symlinks in it are the host's to follow."""
        return Path(f"/proc/{self.pid}/root{path}")

    def part(self, name: str) -> str:
        """Give the device of a partition."""
        return f"{self.device}p{list(PARTITIONS).index(name) + 1}"

    def record(self, device: str) -> Path:
        """Give the file in the udev database that describes a device; without it, the agent sees none."""
        number = os.stat(device).st_rdev
        return self.path(f"/machine/udev/data/b{os.major(number)}:{os.minor(number)}")

    def inside(self, *words: str | Path) -> list[str]:
        """Give the command that runs a command in the machine, in the project's folder."""
        place = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", f"--wdns={ROOT}"]
        return [*place, *map(str, words)]

    def run(self, *words: str | Path) -> str:
        """Run a program in the machine and return its output."""
        return command(*self.inside(*words))

    def start(
        self, cmdline: str, agent: Sequence[str] = SOURCE, *, journal: bool = True
    ) -> subprocess.Popen[str]:
        """Boot and do not wait for the end."""
        self.path("/machine/cmdline").write_text(cmdline + "\n")
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | (
            {"JOURNAL_STREAM": "8:1"} if journal else {}
        )
        process = subprocess.Popen(
            self.inside(*agent), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._started.append(process)
        return process

    def boot(self, cmdline: str, agent: Sequence[str] = SOURCE, *, journal: bool = True) -> Boot:
        """Boot and wait for the end."""
        return self.finish(self.start(cmdline, agent, journal=journal))

    def finish(self, process: subprocess.Popen[str], *, timeout_sec: float = 30) -> Boot:
        """Wait for a boot that was started."""
        stdout, stderr = process.communicate(timeout=timeout_sec)
        assert stdout == ""
        return Boot(self, process.returncode, stderr)

    def agent_pid(self) -> int:
        """Find the process of a boot that was started, which is below nsenter, by its number on the host."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "boot" in words and "nsenter" not in words[0]:
                    return process.pid
        raise ProcessLookupError("no boot is running in this machine")

    def console(self) -> str:
        """Take what was written to the console since the last look."""
        return self._drain("/machine/console")

    def kernel_log(self) -> str:
        """Take what was written to the kernel's log since the last look."""
        return self._drain("/machine/kmsg")

    def _drain(self, path: str) -> str:
        descriptor = os.open(self.path(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(descriptor, 1 << 20).decode()
        except BlockingIOError:
            return ""
        finally:
            os.close(descriptor)

    def _mount_table(self) -> list[Mounted]:
        return [Mounted(line) for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()]

    def mounts(self) -> list[Mounted]:
        """List what has been mounted since the machine was switched on, in its order."""
        return [mount for mount in self._mount_table() if (mount.target, mount.device) not in self._before]

    @contextmanager
    def partition(self, name: str) -> Iterator[Path]:
        """Give a partition's files, to change them before a boot."""
        with self.device_files(self.part(name)) as path:
            yield path

    @contextmanager
    def device_files(self, device: str) -> Iterator[Path]:
        """Give the files on a device, to change them before a boot."""
        with self._mounted(device, "/machine/partition", "rw") as path:
            yield path

    @contextmanager
    def image(self, name: str = "active.img", partition: str = "state") -> Iterator[Path]:
        """Give an image's files, to change them before a boot."""
        with (
            self.partition(partition),
            self._mounted(f"/machine/partition/cOS/{name}", "/machine/image", "loop") as path,
        ):
            yield path

    @contextmanager
    def _mounted(self, source: str, target: str, options: str) -> Iterator[Path]:
        self.path(target).mkdir(exist_ok=True)
        self.run("mount", "-o", options, source, target)
        try:
            yield self.path(target)
        finally:
            self._unmount(target)

    def _unmount(self, target: str) -> None:
        for _attempt in range(100):  # the kernel lets an image go a moment after its umount(8)
            with suppress(RuntimeError):
                self.run("umount", target)
                return
            time.sleep(0.02)
        self.run("umount", target)


def wait_until_listening(machine: Machine, process: subprocess.Popen[str]) -> None:
    """Wait until the agent has subscribed to uevents and sleeps."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            directory = Path(f"/proc/{machine.agent_pid()}")
            sockets = [os.readlink(link) for link in (directory / "fd").iterdir()]
            asleep = "poll" in (directory / "wchan").read_text()
        except OSError:
            continue
        if asleep and any(name.startswith("socket:") for name in sockets):
            return
        time.sleep(0.01)
    raise TimeoutError("the agent does not wait")
