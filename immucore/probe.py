"""What is on the block devices where udev does not run: blkid says it, as udev's own rules ask it.

Imported only there: it runs a program for each device.
"""

from __future__ import annotations

import os

from immucore import process
from immucore.errors import DeviceError

BLKID = "blkid"
NOTHING_FOUND = 2  # also the answer where there is no medium: blkid(8)
AMBIVALENT = 8  # several signatures: nothing is taken for sure, so neither do we
TIMEOUT_SEC = 30.0  # a disk that does not answer must not keep the others
# Where the kernel shows a disk's own name, in place of ID_SERIAL of udev's rules; the first there is.
SERIAL = ("serial", "device/serial", "wwid", "device/wwid")


def record(_path: str, directory: str) -> str:
    """Return what udev's database would say of the device that sysfs shows at `directory`.

    Raises DeviceError where there is no blkid that can tell.
    """
    name = directory.rpartition("/")[2]
    found = {
        "DM_NAME": _attribute(directory, "dm/name"),
        "ID_MODEL": _attribute(directory, "device/model"),
        "ID_SERIAL": next(filter(None, (_attribute(directory, each) for each in SERIAL)), ""),
    }
    lines = [f"E:{key}={value}" for key, value in found.items() if value]
    if _attribute(directory, "size") not in ("", "0"):
        lines += [f"E:{line}" for line in _blkid(f"/dev/{name.replace('!', '/')}")]
    return "I:1\n" + "".join(f"{line}\n" for line in lines)


def _blkid(device: str) -> list[str]:
    program = process.find(BLKID)
    if not program:
        raise DeviceError(
            "cannot look at the disks: udev does not run here, and there is no blkid",
            hint="put udev or util-linux's blkid into the initramfs",
        )
    done = process.run([program, "--probe", "--output", "udev", device], timeout_sec=TIMEOUT_SEC)
    if "BusyBox" in done.output:
        raise DeviceError(
            "cannot look at the disks: udev does not run here, and blkid is BusyBox's, which cannot probe",
            hint="put udev or util-linux's blkid into the initramfs",
        )
    return [line for line in done.output.splitlines() if line.startswith("ID_")] if done.status == 0 else []


def _attribute(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), encoding="utf-8", errors="surrogateescape") as file:
            return " ".join(file.read(4096).split())
    except OSError:  # most devices have few of them
        return ""
