"""Superblocks of real file systems, whole and damaged."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from immucore import superblock
from immucore.superblock import Superblock

MIB = 1 << 20
NOW_SEC = 1_900_000_000.0


def run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "etc").mkdir(parents=True)
    (root / "etc/os-release").write_text("ID=test\n")
    return root


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """Make an ext4 file system as mke2fs makes it, whole."""
    run("mke2fs", "-q", "-t", "ext4", "-L", "DATA", tmp_path / "ext4", "8M")
    return tmp_path / "ext4"


@pytest.mark.parametrize(
    ("command", "fstype", "size_bytes"),
    [
        (["mke2fs", "-q", "-t", "ext2", "-d", "{tree}", "{image}", "1M"], "ext4", MIB),
        (["mke2fs", "-q", "-t", "ext3", "-d", "{tree}", "{image}", "4M"], "ext4", 4 * MIB),
        (["mke2fs", "-q", "-t", "ext4", "-d", "{tree}", "{image}", "1M"], "ext4", MIB),
        (["mkfs.xfs", "-q", "-d", "name={image},file,size=300m"], "xfs", 300 * MIB),
        (["mkfs.btrfs", "-q", "--byte-count", "128m", "{image}"], "btrfs", 128 * MIB),
    ],
)
def test_what_a_file_system_claims(
    command: list[str], fstype: str, size_bytes: int, tree: Path, tmp_path: Path
) -> None:
    image = tmp_path / "an.image"
    if fstype in ("btrfs", "ext4"):
        image.touch()
        os.truncate(image, 128 * MIB)
    run(*(word.format(tree=tree, image=image) for word in command))

    found = superblock.identify(str(image))

    assert (found.fstype, found.claimed_bytes) == (fstype, size_bytes)
    assert superblock.claimed_bytes(str(image)) == size_bytes
    assert found.block_bytes in (1024, 4096)


@pytest.mark.parametrize(
    ("command", "fstype"),
    [
        (["mksquashfs", "{tree}", "{image}", "-quiet", "-no-progress"], "squashfs"),
        (["mkfs.erofs", "--quiet", "{image}", "{tree}"], "erofs"),
    ],
)
def test_an_image_that_is_padded_claims_nearly_all_of_it(
    command: list[str], fstype: str, tree: Path, tmp_path: Path
) -> None:
    image = tmp_path / "an.image"
    (tree / "big").write_bytes(os.urandom(100_000))
    run(*(word.format(tree=tree, image=image) for word in command))

    found = superblock.identify(str(image))

    assert found.fstype == fstype
    assert image.stat().st_size - 4096 < found.claimed_bytes <= image.stat().st_size


def test_more_blocks_than_32_bits_count(ext4: Path) -> None:
    run("debugfs", "-w", "-R", "set_super_value blocks_count_hi 3", ext4)
    head = bytearray(ext4.read_bytes()[:4096])
    assert superblock.parse(bytes(head)).claimed_bytes == (3 << 32) * 1024 + 8 * MIB
    head[1024 + 96] &= ~superblock.EXT_64BIT & 0xFF
    assert superblock.parse(bytes(head)).claimed_bytes == 8 * MIB


@pytest.mark.parametrize("content", [b"", b"hs", b"garbage" * 1000, bytes(2048), b"hsqs", b"XFSB" * 100])
def test_no_superblock(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(content)
    assert superblock.identify(str(tmp_path / "image")) == Superblock()


def test_absurd_sizes_are_numbers_still() -> None:
    """Nothing that a disk can say makes a shift of terabytes or an exception."""
    for magic, offset in ((b"\x53\xef", 1080), (b"hsqs", 0), (b"\xe2\xe1\xf5\xe0", 1024), (b"XFSB", 0)):
        head = bytearray(b"\xff" * 4096)
        head[offset : offset + len(magic)] = magic
        assert 0 < superblock.parse(bytes(head)).claimed_bytes < 1 << 128


def test_a_clean_file_system_is_not_damaged(ext4: Path) -> None:
    assert superblock.damage(str(ext4), "ext4", NOW_SEC) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("state 2", "contains a file system with errors"),
        ("state 3", "contains a file system with errors"),
        ("state 0", "was not cleanly unmounted"),
        ("state 5", "was left while orphaned inodes were recovered"),
        ("max_mnt_count 20", "has been mounted 30 times without being checked"),
        ("checkinterval 86400", "has gone 1989 days without being checked"),
        ("feature_incompat 0x2c6", ""),  # needs_recovery: replaying the journal is the kernel's business
    ],
)
def test_what_ext4_says_of_its_damage(change: str, reason: str, ext4: Path) -> None:
    commands = ["mnt_count 30", "lastcheck @1728086400", change]
    for command in commands:
        run("debugfs", "-w", "-R", f"set_super_value {command}", ext4)

    assert superblock.damage(str(ext4), "ext4", 1_900_000_000.0) == reason


def test_e2fsck_agrees_about_what_is_damaged(ext4: Path) -> None:
    """What the superblock says is what e2fsck -p goes by."""
    assert "clean" in run("e2fsck", "-p", ext4)
    for change in ("max_mnt_count 20", "mnt_count 30"):
        run("debugfs", "-w", "-R", f"set_super_value {change}", ext4)
    reason = superblock.damage(str(ext4), "ext4", time.time())
    assert reason == "has been mounted 30 times without being checked"
    assert reason in run("e2fsck", "-p", ext4)
    assert superblock.damage(str(ext4), "ext4", time.time()) == ""


def test_a_clock_that_is_behind_is_not_believed(ext4: Path) -> None:
    """A board without a battery is in 1970 at every boot."""
    for change in ("lastcheck @1800000000", "checkinterval 86400"):
        run("debugfs", "-w", "-R", f"set_super_value {change}", ext4)
    assert superblock.damage(str(ext4), "ext4", 1000.0) == ""


@pytest.mark.parametrize(
    ("bits", "size", "dirty_at"), [("12", "2M", 37), ("16", "16M", 37), ("32", "40M", 65)]
)
def test_the_dirty_bit_of_fat(bits: str, size: str, dirty_at: int, tmp_path: Path) -> None:
    image = tmp_path / "fat"
    image.touch()
    os.truncate(image, int(size[:-1]) * MIB)
    run("mkfs.vfat", "-F", bits, image)
    assert superblock.damage(str(image), "vfat", NOW_SEC) == ""

    with image.open("r+b") as file:
        file.seek(dirty_at)
        file.write(b"\1")

    assert superblock.damage(str(image), "vfat", NOW_SEC) == "was not cleanly unmounted"


def test_a_device_that_ends_early_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(100))
    assert (
        superblock.damage(f"{tmp_path}/short", "ext4", 0)
        == "has no superblock of ext2/3/4 where it has to be"
    )
    assert superblock.damage(f"{tmp_path}/short", "vfat", 0) == "has no boot sector"


def test_what_has_no_mark_is_not_opened() -> None:
    assert superblock.damage("/not/there", "xfs", 0) == ""
    assert superblock.damage("/not/there", "btrfs", 0) == ""
