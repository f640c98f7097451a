"""Machines that `immucore install` has made, and that are started by their own boot loader.

machine = installed.machine(work, efi=True)     the first image is in active, passive and recovery
machine.boot(commands=(JUDGED, STATUS))
own = installed.changed(work, "state", lambda root: (root / "cOS/active.img").unlink())
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import derivative
import stacks
from derivative import cached, digest, run
from disk import MIB, Disk, Partition
from machine import Extra, Machine

from immucore import grubenv

PROGRAM = derivative.PROJECT / "build/bundle/immucore-system/immucore"
CODE = digest(Path(__file__))
SUITE = "bookworm"
WATCHED = stacks.SUITE  # whose kernel has drivers of watchdogs
# An image has some 170 MiB; an upgrade needs room for a tree and one more.
SIZES_MIB = {"efi": 16, "oem": 16, "recovery": 640, "state": 1024}
PERSISTENT_MIB = 64
# The menu waits for nobody; after a panic the machine restarts at once.
ENVIRONMENT = {"timeout": "0", "extra_cmdline": "panic=1 rd.cos.onfail=reboot rd.cos.debug"}
# Every image can fail in these ways, when the kernel's command line says so: FAULT.
FAULT = "vm-test.fault"
FROZEN = "vm-test.frozen"
FILES = {
    "etc/immucore/health.yaml": "deadline: 300\n",
    "etc/immucore/checks.d/database": (
        f"#!/bin/sh\ngrep -q {FAULT}=unhealthy /proc/cmdline || exit 0\n"
        "echo the database is not there\nexit 1\n"
    ),
    "etc/systemd/system/boot-complete.target.d/fault.conf": (
        "[Unit]\nRequires=stuck.service frozen.service\n"
    ),
    "etc/systemd/system/stuck.service": (
        f"[Unit]\nConditionKernelCommandLine={FAULT}=stuck\nBefore=boot-complete.target\n"
        "[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart=/bin/sleep infinity\n"
    ),
    # PID 1 crashes, and does nothing any more, once the watchdog counts.
    "etc/systemd/system/frozen.service": (
        f"[Unit]\nConditionKernelCommandLine={FROZEN}\nBefore=boot-complete.target\n"
        "[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart=/bin/sh -c"
        " 'until grep -qx active /sys/class/watchdog/watchdog0/state; do sleep 0.2; done; kill -SEGV 1'\n"
    ),
}
# Who waits for a boot that gets stuck or is unhealthy waits for its deadline.
IMPATIENT = f"""\
stages:
  initramfs:
    - if: grep -q {FAULT} /proc/cmdline
      files: [{{path: /etc/immucore/health.yaml, content: "deadline: 30"}}]
"""

# Commands in the machine.
STATUS = "immucore boot status --json"
JUDGED = "timeout 120 sh -c 'until grep -q good /run/immucore/health.json; do sleep 0.2; done'"


def tree(name: str = "first", more: str = "", suite: str = SUITE) -> Path:
    """Return what an image is made of; see derivative.bootable_tree."""
    # Debian's packages of kernels have udev load no driver of a watchdog: in /etc that is an image's choice.
    blacklists = derivative.image_tree(suite).glob("usr/lib/modprobe.d/blacklist_linux_*.conf")
    files = {**FILES, **{f"etc/modprobe.d/{path.name}": "" for path in blacklists}}
    return derivative.bootable_tree(suite, name, files, more)


def source(name: str, more: str = "") -> Extra:
    """Return a disk with a tree that a machine can upgrade to: `upgrade(name)`."""
    content = tree(name, more)

    def make(target: Path) -> None:
        mebibytes = int(run("du", "-sm", content).split()[0]) * 5 // 4 + 24
        run("mke2fs", "-q", *derivative.EXT4, "-m", "0", "-d", content, target, f"{mebibytes}M")

    return Extra(cached(f"source-{name}", digest(content.name, CODE), make), name)


def upgrade(name: str, *options: str) -> str:
    """Return the command that upgrades to a source; its steps are on the console too."""
    place = f"/run/{name}"
    device = f"/dev/disk/by-id/virtio-{name}"
    mount = f"mkdir -p {place} && {{ mountpoint -q {place} || mount -o ro {device} {place}; }}"
    command = f"immucore upgrade {' '.join(options)} dir:{place}"
    return (
        f"{mount} && {{ {command} 2>&1; echo $? >/run/status; }} | tee /dev/console; exit $(cat /run/status)"
    )


@functools.cache
def disk(suite: str = SUITE, filesystem: str = "ext4") -> Disk:
    """Return the disk that `immucore install` makes for both firmwares; all tests share it."""
    content = tree(suite=suite)
    words = [
        "install",
        "--json",
        f"--size={sum(SIZES_MIB.values()) + PERSISTENT_MIB + 4}",
        "--firmware=both",
        f"--filesystem={filesystem}",
    ]
    words += [f"--partition={name}={size}" for name, size in SIZES_MIB.items()]

    def make(target: Path) -> None:
        run(PROGRAM, *words, "--target", target, f"dir:{content}")
        with mounted(described(target, suite), "oem") as root:
            (root / "impatient.yaml").write_text(IMPATIENT)
            set_environment(root, **ENVIRONMENT)

    key = digest(content.name, PROGRAM.parent, repr(words), CODE)
    return described(cached(f"{suite}-installed-{filesystem}", key, make), suite)


def set_environment(oem: Path, tries: int = 3, **values: str) -> None:
    """Change variables of GRUB's environment block, and how many boots the images have left.

    One that is empty is taken out.
    """
    file = oem / "grubenv"
    known = grubenv.parse(file.read_bytes())
    known |= {name: str(tries) for name in known if name.startswith("tries_")}
    known |= values
    file.write_bytes(grubenv.render({name: value for name, value in known.items() if value}))


def described(path: Path, suite: str = SUITE) -> Disk:
    """Read the table of an installed disk."""
    table = json.loads(run("sfdisk", "--json", path))["partitiontable"]["partitions"]
    partitions = tuple(Partition(each["name"], "", each["size"] // 2048) for each in table)
    return Disk(path, suite, partitions, {each["name"]: each["start"] * 512 for each in table})


def changed(work: Path, name: str, what: Callable[[Path], object], **kind: str) -> Disk:
    """Return an installed disk of a test's own, with something done to a partition; `kind` as of disk()."""
    own, made = work / "disk.raw", disk(**kind)
    run("cp", "--sparse=always", "--reflink=auto", made.path, own)
    with mounted(described(own, made.suite), name) as root:
        what(root)
    return described(own, made.suite)


def machine(
    work: Path, *, efi: bool, own: Disk | None = None, sources: tuple[Extra, ...] = (), **options: Any
) -> Machine:
    """Return an installed machine, whose disk keeps what it writes."""
    return Machine(
        own or disk(),
        "",
        work=work,
        efi=efi,
        boot_loader=True,
        keep_writes=True,
        extra_disks=sources,
        **options,
    )


@contextlib.contextmanager
def mounted(of: Disk, name: str) -> Iterator[Path]:
    """Mount a partition of a disk that no machine has."""
    size = of.partition(name).size_mib * MIB
    with tempfile.TemporaryDirectory(dir=derivative.CACHE) as where:
        run("mount", "-o", f"loop,offset={of.offsets[name]},sizelimit={size}", of.path, where)
        try:
            yield Path(where)
        finally:
            run("umount", where)


def left(made: Machine) -> Disk:
    """Return the disk of a machine that is off, with what it has written."""
    return described(made.raw())
