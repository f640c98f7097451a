"""Who uses a disk that a system is to be installed on, in words."""

from __future__ import annotations

import glob
import json
import os
from typing import TYPE_CHECKING, Any

from immucore.log import printable
from immucore.observe import text
from immucore.system.programs import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OURS = ("/", "/usr")  # where a running system has its image
AROUND = "/run/initramfs/"  # and the partition around that


def of_device(path: str) -> list[str]:
    """Say what lsblk knows of the uses of a disk that is in use."""
    options = ("--json", "--output", "PATH,TYPE,MOUNTPOINTS")
    said = run(["lsblk", *options, path], f"cannot look at what '{path}' is used for")
    try:
        listed = json.loads(said[said.index("{") :])["blockdevices"]
    except ValueError:  # of thousands of mounts only the end is kept
        return ["it has more uses than can be listed"]
    return list(_used(listed))


def _used(devices: Sequence[dict[str, Any]]) -> Iterator[str]:
    for each in devices:
        for place in filter(None, each["mountpoints"]):
            if place in OURS or place.startswith(AROUND):
                yield f"this machine runs from {each['path']} ({printable(place)})"
            elif place == "[SWAP]":
                yield f"{each['path']} is swap"
            else:
                yield f"{each['path']} is mounted on '{printable(place)}'"
        above = each.get("children", ())
        for other in above:
            if other["type"] != "part":
                yield f"{each['path']} is part of {printable(other['path'])} ({other['type']})"
        yield from _used(above)


def of_file(path: str) -> list[str]:
    """Say which loop devices a file is attached to."""
    real = os.path.realpath(path)
    found = []
    for place in glob.glob("/sys/block/loop*/loop/backing_file"):
        if text(place, missing="").rstrip("\n") == real:
            found.append(f"/dev/{place.split('/')[3]} is attached to it")
    return found
