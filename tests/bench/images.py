"""What making an image of 1 GiB costs, beside copying the same files with cp and rsync in the same run."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import native

HERE = Path(__file__).parent
TREE_MIB, LARGE_MIB = 1024, 32
SMALL_FILES = 20_000
PARTS = ("measure", "unpack", "build", "verify", "commit")

Row = tuple[str, float, str, str]  # name, value, unit, note


def measure(runs: int, file_system: Callable[[Path, int], AbstractContextManager[Path]]) -> Iterator[Row]:
    """Make an ext4 and a squashfs of a tree of 1 GiB, and copy that; all of it on an ext4 in memory.

    Copies are written out as the image is: what is only in the page cache was not done.
    """
    times: dict[str, list[float]] = {}
    peak_kib = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, file_system(Path(name), 7 << 10) as root:
        make_tree(root / "tree")
        for _ in range(max(3, runs // 15)):
            for fstype in ("ext4", "squashfs"):
                cos = root / "cOS"
                cos.mkdir()
                words = ["/usr/bin/python3.11", "-I", "-S", HERE / "image.py", native.ROOT]
                said = [*map(int, native.command(*words, root / "tree", cos, fstype).split())]
                for part, took_usec in zip(PARTS, said, strict=False):
                    times.setdefault(f"{fstype}: {part}", []).append(took_usec / 1e6)
                times.setdefault(fstype, []).append(sum(said[:-1]) / 1e6)
                peak_kib = max(peak_kib, said[-1])
                native.command("rm", "-r", cos)
            for tool in (("cp", "-a", "--sparse=auto"), ("rsync", "-aHAXS")):
                started = time.monotonic()
                native.command(*tool, f"{root}/tree/", root / "copy")
                native.command("sync", "-f", root / "copy")
                times.setdefault(tool[0], []).append(time.monotonic() - started)
                native.command("rm", "-r", root / "copy")
    middle = {name: statistics.median(each) for name, each in times.items()}
    for fstype in ("ext4", "squashfs"):
        note = ", ".join(f"{part} {middle[f'{fstype}: {part}']:.2f}" for part in PARTS)
        yield f"an {fstype} of {TREE_MIB} MiB, verified, in place", middle[fstype], "s", note
    for tool in ("cp", "rsync"):
        yield f"{tool} of the same files", middle[tool], "s", "written out"
    yield "ext4 / cp", middle["ext4"] / middle["cp"], "x", "unpacking is one cp, building another"
    yield "ext4 / rsync", middle["ext4"] / middle["rsync"], "x", ""
    yield "peak memory", peak_kib / 1024, "MiB", "its children excepted"


def make_tree(root: Path) -> None:
    """Make what an operating system is made of: many small files, and some large ones."""
    chance = random.Random(1)  # noqa: S311
    for path in ("etc/cos", "sbin", "boot", "usr/lib/modules/1", "usr/lib/os"):
        (root / path).mkdir(parents=True)
    for path in ("etc/os-release", "sbin/init", "boot/vmlinuz-1", "boot/initrd"):
        (root / path).write_text(path)
    (root / "etc/cos/bootargs.cfg").write_text("set kernel=/boot/vmlinuz-1\nset initramfs=/boot/initrd\n")
    block = chance.randbytes(1 << 20)
    for number in range(SMALL_FILES):
        directory = root / f"usr/lib/os/{number // 200}"
        directory.mkdir(exist_ok=True)
        (directory / str(number)).write_bytes(block[: chance.randrange(40_000)] + os.urandom(16))
    used = native.command("du", "--summarize", "--block-size=1M", root).split()[0]
    for number in range((TREE_MIB - int(used)) // LARGE_MIB):
        with (root / f"usr/lib/large{number}").open("wb") as file:
            for _ in range(LARGE_MIB):
                file.write(block[:500_000] + bytes(548_576))
