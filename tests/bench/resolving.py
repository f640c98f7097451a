"""Look at the devices and find those of a boot, among many: prints the microseconds (CPU) of each run.

Run by bench.py as the agent is frozen: python -I -S -OO resolving.py REPOSITORY DIRECTORY DEVICES RUNS.
"""

from __future__ import annotations

import os
import sys
import time

sys.path.insert(0, sys.argv[1])
from immucore import observe
from immucore.devices import HOME_FIRST, HOME_ONLY, Wanted

RECORD = """\
S:disk/by-label/{label}
S:disk/by-uuid/{number:08x}-0000-4000-8000-000000000000
S:disk/by-path/pci-0000:00:05.0-part{number}
I:1409321
E:ID_SERIAL=disk-{disk}
E:ID_MODEL=QEMU_HARDDISK
E:ID_BUS=scsi
E:ID_PART_TABLE_TYPE=gpt
E:ID_FS_TYPE=ext4
E:ID_FS_LABEL_ENC={label}
E:ID_FS_UUID_ENC={number:08x}-0000-4000-8000-000000000000
E:ID_PART_ENTRY_NAME=part{number}
E:ID_PART_ENTRY_UUID={number:08x}-1111-4111-8111-111111111111
E:PARTN={number}
G:systemd
"""
LABELS = ("COS_STATE", "COS_OEM", "COS_PERSISTENT")
PER_DISK = 7  # partitions of a disk; with itself eight devices


def make(directory: str, many: int) -> None:
    """Make a /sys/class/block and a udev database with `many` devices, the system's on the first disk."""
    os.makedirs(f"{directory}/class")
    os.makedirs(f"{directory}/udev/data")
    with open(f"{directory}/udev/control", "w", encoding="utf-8"):
        pass
    for number in range(many):
        disk, part = divmod(number, PER_DISK + 1)
        name = f"disk{disk}" + (f"p{part}" if part else "")
        label = "COS_STATE" if many == 1 else LABELS[part - 1] if not disk and 0 < part < 4 else f"D{number}"
        real = f"{directory}/devices/disk{disk}" + (f"/{name}" if part else "")
        os.makedirs(real)
        os.symlink(real, f"{directory}/class/{name}")
        record = RECORD.format(number=number, disk=disk, label=label if part or many == 1 else "")
        files = {f"{real}/dev": f"8:{number}\n", f"{real}/size": "2048\n", f"{real}/removable": "0\n"}
        for path, content in {**files, f"{directory}/udev/data/b8:{number}": record}.items():
            with open(path, "w", encoding="utf-8") as file:
                file.write(content)


def main() -> None:
    """Make the devices, and look for those of a boot as often as asked."""
    directory, many, runs = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    make(directory, many)
    state = Wanted(spec="LABEL=COS_STATE", timeout_sec=180, home=HOME_FIRST)
    wanted = [state]
    if many > 1:
        wanted.append(Wanted(spec="LABEL=COS_OEM", timeout_sec=10, near=state.spec, home=HOME_ONLY))
        wanted.append(Wanted(spec="LABEL=COS_PERSISTENT", timeout_sec=180, near=state.spec, home=HOME_FIRST))
    for _ in range(runs):
        started = time.process_time_ns()
        devices = observe.devices(sysfs=f"{directory}/class", udev=f"{directory}/udev/data")
        near = devices.find(state.spec)
        for each in wanted:
            if devices.unsettled(each) or not devices.find(each.spec, near=near):
                raise SystemExit(f"{each.spec} is not settled")
        took = time.process_time_ns() - started
        print(took // 1000)


if __name__ == "__main__":
    main()
