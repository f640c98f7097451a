"""Image files: built of trees, verified, and told apart, with the real tools and file systems."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import native
import pytest
import upgrading
from native import described, isolated

from immucore import superblock
from immucore.errors import CmdlineError
from immucore.system import bootable, content, images
from immucore.system.errors import ImageError, UnreadableError

ROOT = native.ROOT
FSTYPES = ("ext4", "squashfs")
# GRUB 2.06, grub-core/fs/ext2.c: what it knows of s_feature_incompat: filetype, extents, flex_bg, 64bit
GRUB_KNOWS = {"filetype", "extent", "flex_bg", "64bit", "meta_bg"}
INCOMPATIBLE = {
    "compression",
    "filetype",
    "needs_recovery",
    "journal_dev",
    "meta_bg",
    "extent",
    "64bit",
    "mmp",
}
INCOMPATIBLE |= {
    "flex_bg",
    "ea_inode",
    "dirdata",
    "metadata_csum_seed",
    "large_dir",
    "inline_data",
    "encrypt",
}
INCOMPATIBLE |= {"casefold"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return upgrading.make_tree(tmp_path / "tree", "one")


def without_acls(tree: Path) -> Path:
    native.command("setfacl", "--recursive", "--remove-all", "--remove-default", tree)
    return tree


def build(tree: Path, fstype: str = "ext4") -> Path:
    image = tree.parent / f"{fstype}.img"
    upgrading.build(tree, image, "active", fstype)
    return image


@pytest.mark.parametrize("fstype", FSTYPES)
@isolated(user=False)
def test_an_image_holds_what_its_tree_does(tmp_path: Path, fstype: str) -> None:
    """Owners, modes, times, ACLs, capabilities, hard links, holes, devices: as the kernel sees them."""
    tree = upgrading.make_tree(tmp_path / "tree", "one")
    if fstype == "squashfs":
        without_acls(tree)
    image = tmp_path / "image"
    image_id = upgrading.build(tree, image, "active", fstype)
    assert images.identity(str(image)) == image_id
    assert image_id[:16] == content.digest(str(tree))
    images.verify(str(image), str(tree))
    with images.mounted(str(image), fstype) as there:
        shutil.rmtree(f"{there}/lost+found", ignore_errors=True)
        found, wanted = described(Path(there)), described(tree)
        found.pop("lost+found", None)
        for path in (found, wanted):
            for facts in path.values():
                assert isinstance(facts, dict)
                facts["mtime"] //= 10**9  # squashfs has seconds
        found.pop("."), wanted.pop(".")
        assert found == wanted
        assert images.running(there) == image_id
    assert subprocess.run(["findmnt", "--source", image], capture_output=True, check=False).returncode == 1
    loops = native.command("losetup", "--list", "--noheadings", "--output", "BACK-FILE")
    assert str(image) not in loops


def test_an_ext4_is_one_that_grub_reads_and_no_hole_is_in_it(tree: Path) -> None:
    image = build(tree)
    said = native.command("dumpe2fs", "-h", image)
    features = set(re.findall(r"^Filesystem features: +(.*)$", said, re.MULTILINE)[0].split())
    assert features & INCOMPATIBLE <= GRUB_KNOWS
    assert not features & {"orphan_file", "has_journal", "metadata_csum_seed"}
    assert re.search(r"^Filesystem volume name: +COS_ACTIVE$", said, re.MULTILINE)
    assert re.search(r"^Reserved block count: +0$", said, re.MULTILINE)
    status = image.stat()
    assert status.st_blocks * 512 >= status.st_size == superblock.claimed_bytes(str(image))


@pytest.mark.parametrize("fstype", FSTYPES)
@isolated(user=False)
def test_grub_reads_of_an_image_what_the_kernel_does(tmp_path: Path, fstype: str) -> None:
    """On a partition that had other data before: GRUB 2.06 takes what is allocated for what is written."""
    disk, mounted = tmp_path / "disk", tmp_path / "mounted"
    disk.write_bytes(random.Random(1).randbytes(48 << 20))  # noqa: S311
    native.command("mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard", "-O", "^metadata_csum_seed", disk)
    mounted.mkdir()
    native.command("mount", "-o", "loop", disk, mounted)
    tree = without_acls(upgrading.make_tree(tmp_path / "tree", "one"))
    (tree / "boot/initrd").write_bytes(b"070701" + bytes(300_000) + b"an initramfs" + bytes(300_000))
    image = mounted / "image"
    upgrading.build(tree, image, "active", fstype)
    by_kernel = image.read_bytes()
    native.command("umount", mounted)
    native.command("sync", disk)
    native.command("grub-fstest", disk, "cp", "(loop0)/image", tmp_path / "by grub")
    assert (tmp_path / "by grub").read_bytes() == by_kernel
    native.command("grub-fstest", tmp_path / "by grub", "cp", "(loop0)/boot/initrd", tmp_path / "initrd")
    assert (tmp_path / "initrd").read_bytes() == (tree / "boot/initrd").read_bytes()


def test_a_squashfs_is_compressed_as_grub_reads_it(tree: Path) -> None:
    said = native.command("unsquashfs", "-stat", build(without_acls(tree), "squashfs"))
    assert "Compression gzip" in said


def test_what_a_squashfs_cannot_hold_is_told_before_it_is_made(tree: Path) -> None:
    with pytest.raises(ImageError, match="'/var/log' has an ACL, and squashfs has none") as caught:
        build(tree, "squashfs")
    assert "setfacl" in caught.value.hint
    assert not (tree.parent / "squashfs.img").exists()


@pytest.mark.parametrize(
    ("fstype", "why"), [("erofs", "GRUB 2.06 cannot read it"), ("xfs", "no image has it")]
)
def test_other_file_systems_are_refused_by_name(tree: Path, fstype: str, why: str) -> None:
    with pytest.raises(CmdlineError, match=f"of type '{fstype}': {why}"):
        build(tree, fstype)


@pytest.mark.parametrize("seed", range(6))
def test_an_ext4_has_room_for_any_tree(tmp_path: Path, seed: int) -> None:
    """The size is worked out beforehand: it has to suffice, and not to be much more than is needed."""
    chance = random.Random(seed)  # noqa: S311
    tree = tmp_path / "tree"
    tree.mkdir()
    count, size = [(3000, 0), (2000, 200), (3000, 4097), (40, 2 << 20), (1, 0), (6000, 30)][seed]
    for number in range(count):
        directory = tree / (f"d{number % 7}" if seed % 2 else "d") / ("deep" * (seed % 3))
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{number}{'x' * chance.randrange(200)}"
        if number % 10 == 9:
            path.symlink_to("y" * chance.randrange(1, 300))
            continue
        path.write_bytes(chance.randbytes(chance.randrange(size + 1)))
        if number % 11 == 0:
            os.setxattr(path, "user.large", chance.randbytes(chance.randrange(1, 3000)))
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(5 << 20)
        file.write(b"x" * 5000)
    image = tmp_path / "image"
    room = content.room(str(tree))
    images.build(str(tree), str(image), fstype="ext4", label="x", image_id="0" * 16 + "_" + "0" * 8)
    native.command("e2fsck", "-fn", image)
    with images.mounted(str(image), "ext4") as there:
        assert content.difference(str(tree), there) == ""
        free = os.statvfs(there).f_bfree * 4096
    assert free < (8 << 20) + room.bytes // 8


def test_a_digest_says_whether_two_trees_are_the_same(tmp_path: Path, tree: Path) -> None:
    other = tmp_path / "other"
    native.command("cp", "-a", tree, other)
    digest = content.digest(str(tree))
    assert re.fullmatch("[0-9a-f]{16}", digest)
    build(other)
    assert (other / content.IDENTITY).exists()
    assert content.digest(str(other)) == digest, "which image file it is, is no part of what is in it"
    os.utime(other / "etc/slot", (1, 1))
    (other / "tmp/socket").parent.mkdir(exist_ok=True)
    native.command(sys.executable, "-c", f"import socket; socket.socket(1).bind('{other}/tmp/socket')")
    assert content.digest(str(other)) == digest
    seen = {digest}
    changes: list[Callable[[], object]] = [
        lambda: (other / "etc/slot").write_text("two"),
        lambda: (other / "etc/slot").chmod(0o600),
        lambda: os.chown(other / "etc/slot", 1, 0),
        lambda: os.setxattr(other / "etc/slot", "user.x", b"1"),
        lambda: (other / "etc/slot").rename(other / "etc/slat"),
        lambda: os.link(other / "etc/slat", other / "etc/slit"),
        (other / "etc/empty").mkdir,
        lambda: (other / "etc/link").symlink_to("slat"),
        lambda: (other / "etc/link").unlink() or (other / "etc/link").symlink_to("slit"),
        lambda: other.chmod(0o700),
    ]
    for change in changes:
        change()
        found = content.digest(str(other))
        assert found not in seen
        seen.add(found)


def broken(tree: Path, image: Path, how: str) -> None:
    if how == "a bit of data":
        raw = image.read_bytes()
        place = raw.index(b"PS1='# '")
        image.write_bytes(raw[:place] + b"PS2" + raw[place + 3 :])
    elif how == "a file less":
        native.command("debugfs", "-w", "-R", "rm /etc/slot", image)
    elif how == "a file more":
        (tree / "etc/zz").write_text("")
    elif how == "a label":
        native.command("debugfs", "-w", "-R", "ea_rm /etc/version security.selinux", image)
    elif how == "an owner":
        native.command("debugfs", "-w", "-R", "set_inode_field /etc/slot uid 7", image)
    else:
        native.command("debugfs", "-w", "-R", "ea_set /etc/slot user.x 1", image)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a bit of data", "'/root/.profile' is not the same"),
        ("a file less", "its file system is damaged|'/etc/slot' is only in one of them"),
        ("a file more", "'/etc/zz' is only in one of them"),
        ("an owner", "'/etc/slot' is not the same"),
        ("an attribute", "'/etc/slot' is not the same"),
        ("a label", "'/etc/version' is not the same"),
    ],
)
def test_what_is_not_as_in_the_tree_is_found(tree: Path, how: str, said: str) -> None:
    image = build(tree)
    images.verify(str(image), str(tree))
    broken(tree, image, how)
    with pytest.raises(ImageError, match=said):
        images.verify(str(image), str(tree))


def test_a_damaged_file_system_is_found(tree: Path) -> None:
    image = build(tree)
    with image.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 20000)
    with pytest.raises(ImageError, match="its file system is damaged"):
        images.verify(str(image), str(tree))


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("etc/os-release", "no etc/os-release and usr/lib/os-release"),
        ("sbin/init", r"no init \(/sbin/init\)"),
        ("etc/cos/bootargs.cfg", "no /etc/cos/bootargs.cfg, from which the boot loader has the kernel,"),
        (
            f"boot/vmlinuz-{upgrading.KERNEL}",
            "no /boot/vmlinuz, which /etc/cos/bootargs.cfg has for kernel,",
        ),
        ("boot/initrd", "no /boot/initrd, which /etc/cos/bootargs.cfg has for initramfs,"),
        (f"usr/lib/modules/{upgrading.KERNEL}", f"no lib/modules/{upgrading.KERNEL}, for its kernel"),
    ],
)
def test_what_a_boot_needs_has_to_be_in_it(tree: Path, lacking: str, said: str) -> None:
    bootable.check(str(tree))
    path = tree / lacking
    path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(ImageError, match=said) as caught:
        bootable.check(str(tree))
    assert caught.value.hint == "correct the source of the image"
    image = build(tree)
    with pytest.raises(ImageError, match=said):
        images.verify(str(image), str(tree))


def test_bootargs_without_a_kernel_and_a_kernel_that_says_its_release(tree: Path) -> None:
    args = tree / "etc/cos/bootargs.cfg"
    args.write_text("set initramfs=/boot/initrd\n")
    with pytest.raises(ImageError, match=r"no 'set kernel=' in /etc/cos/bootargs\.cfg"):
        bootable.check(str(tree))
    args.write_text('if [ "$x" ]; then\n  set kernel="/boot/vmlinuz"\nfi\nset initramfs=$y\n')
    bootable.check(str(tree))
    head = bytearray(0x300)
    head[0x202:0x206], head[0x20E:0x210] = b"HdrS", (0x80).to_bytes(2, "little")
    head[0x280:0x290] = b"7.7.7-x (me@x)\0\0"
    (tree / f"boot/vmlinuz-{upgrading.KERNEL}").write_bytes(head)
    with pytest.raises(ImageError, match=r"no lib/modules/7\.7\.7-x, for its kernel /boot/vmlinuz"):
        bootable.check(str(tree))


@pytest.mark.parametrize("name", ["kernel", "initramfs"])
def test_what_bootargs_names_is_a_file(tree: Path, name: str) -> None:
    args = tree / "etc/cos/bootargs.cfg"
    args.write_text(args.read_text() + f"set {name}=/boot\n")
    with pytest.raises(ImageError, match=f"no /boot, which /etc/cos/bootargs.cfg has for {name},"):
        bootable.check(str(tree))
    args.unlink()
    args.mkdir()
    with pytest.raises(ImageError, match=r"no /etc/cos/bootargs\.cfg"):
        bootable.check(str(tree))


def test_a_kernel_that_is_cut_short_has_its_release_in_its_name(tree: Path) -> None:
    kernel = tree / f"boot/vmlinuz-{upgrading.KERNEL}"
    kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(2))
    bootable.check(str(tree))
    kernel.rename(tree / "boot/vmlinuz-8")
    (tree / "boot/vmlinuz").unlink()
    (tree / "boot/vmlinuz").symlink_to("vmlinuz-8")
    with pytest.raises(ImageError, match="no lib/modules/8, for its kernel"):
        bootable.check(str(tree))


def test_a_symlink_in_a_tree_leads_nowhere_else(tmp_path: Path, tree: Path) -> None:
    """What is written into a tree and looked up in it stays in it, whatever its symlinks say."""
    outside = tmp_path / "outside"
    (outside / "cos").mkdir(parents=True)
    shutil.rmtree(tree / "usr/lib")
    (tree / "usr/lib").symlink_to(outside)
    with pytest.raises(OSError, match="No such file"):
        build(tree)
    assert os.listdir(outside / "cos") == []
    (tree / "usr/lib").unlink()
    (tree / f"usr/lib/modules/{upgrading.KERNEL}").mkdir(parents=True)
    (tree / "usr/lib/cos").mkdir()
    (tree / "usr/lib/cos/image.cfg").symlink_to(outside / "image.cfg")
    build(tree)
    assert not (outside / "image.cfg").exists()
    (tree / f"boot/vmlinuz-{upgrading.KERNEL}").unlink()
    (tree / f"boot/vmlinuz-{upgrading.KERNEL}").symlink_to("/etc/hostname")  # the host has one
    with pytest.raises(ImageError, match="no /boot/vmlinuz"):
        bootable.check(str(tree))


def test_a_directory_that_is_made_in_a_tree_is_made_there(tmp_path: Path, tree: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(tree / "usr")
    (tree / "usr").symlink_to(outside)
    inside = tree / str(outside)[1:]
    inside.mkdir(parents=True)
    build(tree)
    assert os.listdir(outside) == []
    assert (inside / "lib/cos/image.cfg").is_file()


@pytest.mark.parametrize("content_", [b"", b"set image_id=x\n", b"\0" * (1 << 20)])
def test_what_has_no_identity(tmp_path: Path, content_: bytes) -> None:
    image = tmp_path / "image"
    assert images.identity(str(image)) is None
    image.write_bytes(content_)
    assert images.identity(str(image)) is None
    assert images.running(str(tmp_path)) is None


@pytest.mark.parametrize("fstype", ["ext4", "squashfs"])
def test_what_cannot_be_read_is_not_without_an_identity(
    tree: Path, fstype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = build(without_acls(tree), fstype)
    monkeypatch.setattr(images, "_IDENTITY_SEC", 0.0)
    with pytest.raises(ImageError, match=f"cannot read which image '{image}' is: .* took longer") as caught:
        images.identity(str(image))
    assert not isinstance(caught.value, UnreadableError)
    monkeypatch.undo()
    size = image.stat().st_size
    with image.open("r+b") as file:
        file.seek(4096 if fstype == "ext4" else 96)
        file.write(bytes(size - file.tell()))
    with pytest.raises(UnreadableError, match=f"cannot read which image '{image}' is: "):
        images.identity(str(image))


def test_an_image_of_somebody_else_has_no_identity(tmp_path: Path, tree: Path) -> None:
    image = tmp_path / "image"
    native._make_ext(image, 8, "COS_ACTIVE", tree)
    assert images.identity(str(image)) is None


@isolated(user=False)
def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    tree = upgrading.make_tree(tmp_path / "tree", "one")
    small = tmp_path / "small"
    small.mkdir()
    native.command("mount", "-t", "tmpfs", "-o", "size=2m", "small", small)
    with pytest.raises(
        ImageError, match=rf"'{small}/image' of \d+ MiB: {os.strerror(errno.ENOSPC)}"
    ) as caught:
        upgrading.build(tree, small / "image", "active")
    assert "free space" in caught.value.hint
    without_acls(tree)
    (tree / "large").write_bytes(os.urandom(3 << 20))
    with pytest.raises(ImageError, match=r"cannot make a file system of .*No space left on device"):
        upgrading.build(tree, small / "image", "active", "squashfs")
    assert os.listdir(small) == []


FAKED = """
import os, sys
sys.path[:0] = [sys.argv.pop()]
from immucore.system import content, images
from immucore.system.errors import ImageError
tree, image, fstype, break_it = sys.argv[1:]
os.chown(f"{tree}/etc/slot", 47, 11)
images.build(tree, image, fstype=fstype, label="X", image_id=images.new_identity(content.digest(tree)))
if break_it:
    open(f"{tree}/etc/slot", "w").write("other")
try:
    images.verify(image, tree)
except ImageError as error:
    print(error)
"""


@pytest.mark.parametrize("break_it", ["", "yes"])
@pytest.mark.parametrize("fstype", FSTYPES)
def test_without_root(tmp_path: Path, fstype: str, break_it: str) -> None:
    """Under fakeroot: owners go into the image, data is read back and compared, nothing is mounted."""
    tree, image = tmp_path / "tree", tmp_path / "image"
    kernel = f"boot/vmlinuz-{upgrading.KERNEL}"
    for path in ("etc/cos", "sbin", "boot", f"usr/lib/modules/{upgrading.KERNEL}"):
        (tree / path).mkdir(parents=True)
    for path in ("etc/os-release", "sbin/init", kernel, "etc/slot"):
        (tree / path).write_text(path)
    (tree / "boot/kernel").symlink_to(f"vmlinuz-{upgrading.KERNEL}")
    (tree / "etc/cos/bootargs.cfg").write_text(f"set kernel=/boot/kernel\nset initramfs=/{kernel}\n")
    argv = [
        "setpriv",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "fakeroot",
        "/usr/bin/python3.11",
        "-c",
        FAKED,
    ]
    said = native.command(*argv, tree, image, fstype, break_it, ROOT)
    assert ("'/etc/slot' is not the same" in said) == bool(break_it), said
    with images.mounted(str(image), fstype) as there:
        assert os.stat(f"{there}/etc/slot").st_uid == 47
        assert os.stat(f"{there}/sbin/init").st_uid == 0
