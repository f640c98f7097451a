"""What a file system can be inside of: LUKS containers, md arrays, volume groups.

Each is a file to attach as a disk or to put into a partition. They are made in a machine, so that the host
needs neither the programs nor the kernel's device mapper.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import derivative
import disk as disks
from derivative import cached, digest
from machine import Extra, Machine

SUITE = "bookworm-stacks"
LUKS_UUID = "5c5c5c5c-0000-4000-8000-00000000000{}"
INNER_UUID = "1e1e1e1e-0000-4000-8000-00000000000{}"
PASSPHRASE = "correct horse"  # noqa: S105 - of what is made here
MIB = 40  # 16 of it are the header of LUKS2

# Few iterations: the machines are emulated. $1 device, $2 label of the container, $3 number.
LUKS = """
luks() {
    printf '%s' '@PASSPHRASE@' | cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 \
        --pbkdf-force-iterations 1000 --uuid "5c5c5c5c-0000-4000-8000-00000000000$3" ${2:+--label "$2"} \
        --key-file - "$1"
    printf '%s' '@PASSPHRASE@' | cryptsetup open --key-file - "$1" inner
    mke2fs -q -t ext4 -L COS_PERSISTENT -U "1e1e1e1e-0000-4000-8000-00000000000$3" /dev/mapper/inner
    cryptsetup close inner
}
"""
DEVICE = "/dev/disk/by-id/virtio-{}"


@dataclass(frozen=True)
class Stack:
    """What one script makes of some empty disks."""

    disks: tuple[str, ...]
    script: str


STACKS = (
    Stack(
        ("pv",),
        """
pvcreate $pv
vgcreate cos $pv
lvcreate --yes --wipesignatures n -l 100%FREE -n persistent cos
mke2fs -q -t ext4 -L COS_PERSISTENT -U 1e1e1e1e-0000-4000-8000-000000000008 /dev/cos/persistent
vgchange -an cos
""",
    ),
    Stack(
        ("mirror-a", "mirror-b"),
        """
pvcreate $mirror_a $mirror_b
vgcreate mirror $mirror_a $mirror_b
lvcreate --yes --wipesignatures n --type raid1 --mirrors 1 --nosync -L 24M -n persistent mirror
mke2fs -q -t ext4 -L COS_PERSISTENT -U 1e1e1e1e-0000-4000-8000-00000000000a /dev/mirror/persistent
vgchange -an mirror
""",
    ),
    Stack(("luks",), "luks $luks COS_PERSISTENT 1"),
    Stack(("luks-suffixed",), "luks $luks_suffixed COS_PERSISTENT_LUKS 2"),
    Stack(("luks-silent",), "luks $luks_silent '' 3"),
    Stack(("luks-other",), "luks $luks_other DATA 4"),
    Stack(
        ("luks-tpm",),
        """
luks $luks_tpm COS_PERSISTENT 5
PASSWORD='@PASSPHRASE@' systemd-cryptenroll --tpm2-device=auto --tpm2-pcrs= $luks_tpm
""",
    ),
    *(
        Stack(
            (f"md{number}-a", f"md{number}-b"),
            f"""
mdadm --create /dev/md/{number} --run --metadata={metadata} --level=1 --raid-devices=2 --assume-clean \\
    --bitmap=none --homehost=any $md{number}_a $md{number}_b
udevadm settle
mke2fs -q -t ext4 -L COS_PERSISTENT -U 1e1e1e1e-0000-4000-8000-00000000000{number} /dev/md/{number}
mdadm --wait-clean /dev/md/{number} || :
mdadm --stop /dev/md/{number}
""",
        )
        for number, metadata in ((6, "1.0"), (7, "1.2"))
    ),
    Stack(
        ("whole",),
        "mke2fs -q -F -t ext4 -L COS_PERSISTENT -U 1e1e1e1e-0000-4000-8000-000000000009 $whole",
    ),
)


def script() -> str:
    """Return what the machine is to run: every stack, each of its disks in a variable."""
    names = [name for stack in STACKS for name in stack.disks]
    lines = [f"{name.replace('-', '_')}={DEVICE.format(name)}" for name in names]
    text = "\n".join(
        ["set -ex", "modprobe -a dm_crypt raid1", LUKS, *lines, *(each.script for each in STACKS)]
    )
    return text.replace("@PASSPHRASE@", PASSPHRASE)


def images() -> dict[str, Path]:
    """Return the disk images by their names, and the state of the TPM as `tpm`."""

    def make(target: Path) -> None:
        work = target.with_name(f"{target.name}.machine")
        derivative.remove(work)
        target.mkdir()
        (target / "tpm").mkdir()
        names = [name for stack in STACKS for name in stack.disks]
        for name in names:
            with (target / name).open("wb") as stream:
                stream.truncate(MIB * disks.MIB)
        machine = Machine(
            disks.plain_disk(SUITE),
            "root=PARTLABEL=root rw quiet",
            extra_disks=[Extra(target / name, name) for name in names],
            tpm=target / "tpm",
            keep_writes=True,
            work=work,
        )
        text = script()
        report = machine.boot(limit_s=180, commands=(text,), poweroff="fast")
        if report.stage != "system" or report.commands[text].status:
            said = report.commands[text].output if report.commands else ""
            raise RuntimeError(f"the stacks cannot be made: {said}\n{report.console[-2000:]}")
        for number, name in enumerate(names, 1):
            machine.raw(number).replace(target / name)
        shutil.rmtree(work)

    key = digest(derivative.root(SUITE).name, script(), str(MIB), CODE)
    directory = cached("stacks", key, make)
    return {path.name: path for path in directory.iterdir()}


CODE = digest(Path(__file__))
