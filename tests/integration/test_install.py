"""`immucore install` for real: on files and block devices, by root and others, refused and interrupted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import native
import pytest
import upgrading
import yaml

from immucore import bootcount, grubenv
from immucore.errors import DeviceError
from immucore.system import disks, filesystems, images, partitions
from immucore.system.partitions import MIB

SIZES = {"efi": 16, "oem": 16, "recovery": 32, "state": 48}
SMALL = tuple(word for name, size in SIZES.items() for word in ("--partition", f"{name}={size}"))
DISK_MIB = 160
NOBODY = 65534
# Who is not root may not be allowed to read where the tests are: this one can read everything, and no more.
UNPRIVILEGED = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"),
)
# What GRUB 2.06 reads of ext4 (grub-core/fs/ext2.c: EXT2_DRIVER_SUPPORTED_INCOMPAT, IGNORED_INCOMPAT).
GRUBS_FEATURES = set(filesystems.EXT4_FEATURES.split(",")) - {"none"}
Install = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(source: Sequence[str]) -> Sequence[str]:
    return (*source[:-2], "immucore.system")


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory that anybody can write to; pytest's are for root alone."""
    native.require_root()
    directory = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="immucore-test."))
    directory.chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def install(program: Sequence[str], place: Path) -> Install:
    """Run the command; `before` is what starts it, `command` another program than that from source."""

    def run(
        *words: str | Path, before: Sequence[str] = (), command: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        # Who is not root cannot write down what of the code is covered.
        plain = (sys.executable, "-B", "-m", "immucore.system") if before else program
        done = subprocess.run(
            [*before, *(command or plain), "install", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=native.ROOT,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert not list(place.glob("immucore.*")) + list(place.glob("*.partial")), "nothing is left over"
        return done

    return run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what is installed: every kind of file, and what the boot loader asks for."""
    return upgrading.make_tree(tmp_path_factory.mktemp("install") / "tree", "installed")


@pytest.fixture(scope="module")
def plain_tree(tree: Path) -> Path:
    """Make the same without access control lists, which no squashfs has."""
    plain = tree.parent / "plain"
    native.command("cp", "-a", tree, plain)
    native.command("setfacl", "--recursive", "--physical", "--remove-all", "--remove-default", plain)
    return plain


def packed(tree: Path, archive: Path) -> str:
    native.command("tar", "--xattrs", "--xattrs-include=*", "--acls", "-C", tree, "-cf", archive, ".")
    return f"tar:{archive}"


class Installed:
    """A disk that something was installed on."""

    def __init__(self, disk: Path | str) -> None:
        self.disk = str(disk)
        table = json.loads(native.command("sfdisk", "--json", disk))["partitiontable"]
        unit = table["sectorsize"]
        self.partitions: dict[str, dict[str, Any]] = {each["name"]: each for each in table["partitions"]}
        self.offsets = {name: each["start"] * unit for name, each in self.partitions.items()}
        self.sizes = {name: each["size"] * unit // MIB for name, each in self.partitions.items()}

    def fact(self, name: str, fact: str) -> str:
        region = ("--offset", str(self.offsets[name]), "--size", str(self.sizes[name] * MIB))
        return native.command("blkid", "--probe", *region, "-o", "value", "-s", fact, self.disk).strip()

    @contextlib.contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        region = f"offset={self.offsets[name]},sizelimit={self.sizes[name] * MIB}"
        with mounted(self.disk, f"ro,noload,loop,{region}") as there:
            yield there

    def bytes_at(self, offset: int, size: int) -> bytes:
        with open(self.disk, "rb") as file:
            return os.pread(file.fileno(), size, offset)

    def check(self, firmware: Sequence[str], fstype: str) -> None:
        """Look at all that does not depend on what was installed."""
        assert list(self.partitions) == [*firmware, *partitions.SYSTEM]
        assert "No errors" in native.command("sfdisk", "--verify", self.disk)
        for name in partitions.SYSTEM:
            place = f"{self.disk}?offset={self.offsets[name]}"
            native.command("e2fsck", "-f", "-n", place)
            assert (self.fact(name, "LABEL"), self.fact(name, "TYPE")) == (partitions.LABELS[name], "ext4")
            assert self.partitions[name]["type"] == partitions.LINUX
            header = native.command("dumpe2fs", "-h", place)
            features = header.partition("Filesystem features:")[2].partition("\n")[0].split()
            assert set(features) <= GRUBS_FEATURES
        self.check_boot_loader()
        self.check_slots(fstype)

    def check_boot_loader(self) -> None:
        if "efi" in self.partitions:
            assert self.partitions["efi"]["type"] == partitions.EFI
            assert (self.fact("efi", "LABEL"), self.fact("efi", "TYPE")) == ("COS_GRUB", "vfat")
            image = f"{self.disk}@@{self.offsets['efi']}"
            loader = subprocess.run(
                ["mtype", "-i", image, "::/EFI/BOOT/BOOTX64.EFI"], capture_output=True, check=True
            )
            assert loader.stdout.startswith(b"MZ")
            assert b"menuentry" in loader.stdout, "the menu is in it"
        if "bios" in self.partitions:
            assert self.partitions["bios"]["type"] == partitions.BIOS
            code, core = self.bytes_at(0, 512), self.bytes_at(self.offsets["bios"], 512)
            boot = Path("/usr/lib/grub/i386-pc/boot.img").read_bytes()
            assert (code[:0x5C], code[0x68:440]) == (boot[:0x5C], boot[0x68:440])
            assert int.from_bytes(code[0x5C:0x64], "little") * 512 == self.offsets["bios"]
            assert int.from_bytes(core[0x1F4:0x1FC], "little") * 512 == self.offsets["bios"] + 512
            assert code[510:] == b"\x55\xaa"
            assert code[450] == 0xEE, "the table that protects the GPT"
        else:
            assert not self.bytes_at(0, 440).strip(b"\0")

    def check_slots(self, fstype: str) -> None:
        """Look at what state.yaml and the environment block say of the images, and at these."""
        found = {}
        for name, slots in (("state", ["active", "passive"]), ("recovery", ["recovery"])):
            with self.mounted(name) as there:
                document = yaml.safe_load((there / "state.yaml").read_text())
                assert sorted(path.name for path in there.iterdir()) == ["cOS", "lost+found", "state.yaml"]
                assert sorted(path.name for path in (there / "cOS").iterdir()) == [f"{s}.img" for s in slots]
                for slot in slots:
                    image = there / f"cOS/{slot}.img"
                    entry = document[upgrading.HOLDERS[slot]][slot]
                    assert stat.S_IMODE(image.stat().st_mode) == 0o644
                    assert (image.stat().st_uid, image.stat().st_gid) == (0, 0)
                    assert entry["image_id"] == images.identity(str(image))
                    assert entry["image_id"].startswith(entry["digest"])
                    label = upgrading.LABELS[slot]
                    assert (entry["label"], entry["fs"], entry["action"]) == (label, fstype, "install")
                    if fstype == "ext4":
                        assert native.command("e2label", image).strip() == label
                    found[slot] = entry["image_id"]
        assert len(set(found.values())) == 3
        with self.mounted("oem") as there:
            block = (there / "grubenv").read_bytes()
        values = grubenv.parse(block)
        assert len(block) == 1024
        assert sorted(values) == sorted(f"tries_{found[slot]}" for slot in bootcount.COUNTED)
        assert all(bootcount.read(values, found[slot]).state == "trying" for slot in bootcount.COUNTED)

    def image(self, slot: str) -> dict[str, object]:
        """Describe everything in an image."""
        with (
            self.mounted(upgrading.HOLDERS[slot]) as there,
            mounted(there / f"cOS/{slot}.img", "ro,loop") as root,
        ):
            return comparable(root)


@contextlib.contextmanager
def mounted(what: Path | str, options: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as where:
        native.command("mount", "-o", options, what, where)
        try:
            yield Path(where)
        finally:
            native.command("umount", where)


def comparable(root: Path) -> dict[str, Any]:
    """Describe a tree but for what an image has of its own, and times, which are less exact in an image."""
    found: dict[str, Any] = native.described(root)
    for path in ("lost+found", "usr/lib/cos", "usr/lib/cos/image.cfg"):
        found.pop(path, None)
    for entry in found.values():
        del entry["mtime"]
    return found


def blank(disk: Path | str) -> bool:
    return not native.command("wipefs", "--no-act", disk).strip()


def new_file(place: Path, size_mib: int = DISK_MIB) -> Path:
    disk = place / "disk.img"
    with disk.open("wb") as file:
        file.truncate(size_mib * MIB)
    return disk


@contextlib.contextmanager
def loop(file: Path, *options: str) -> Iterator[str]:
    device = native.command("losetup", "--find", "--show", *options, file).strip()
    # without --partscan the kernel still has the partitions of who had this device before
    subprocess.run(["partx", "--delete", device], capture_output=True, check=False)
    try:
        yield device
    finally:
        native.command("losetup", "--detach", device)


def test_onto_a_new_file(install: Install, place: Path, tree: Path) -> None:
    disk, oem = place / "disk.img", place / "90_custom.yaml"
    oem.write_text("stages: {}\n")
    done = install("--json", "--target", disk, "--size", DISK_MIB, *SMALL, "--oem", oem, f"dir:{tree}")
    assert done.returncode == 0, done.stderr

    result = json.loads(done.stdout.splitlines()[-1])
    installed = Installed(disk)
    installed.check(("bios", "efi"), "ext4")
    assert result["result"] is True
    assert [(each["name"], each["size_mib"]) for each in result["partitions"]] == [*installed.sizes.items()]
    assert {name: installed.sizes[name] for name in SIZES} == SIZES
    assert disk.stat().st_size == DISK_MIB * MIB
    assert disk.stat().st_blocks * 512 < DISK_MIB * MIB // 2, "holes stay holes"
    for slot in upgrading.HOLDERS:
        assert installed.image(slot) == comparable(tree)
    with installed.mounted("oem") as there:
        assert (there / oem.name).read_text() == oem.read_text()
        assert stat.S_IMODE((there / oem.name).stat().st_mode) == 0o600, "it may hold a password"
    with installed.mounted("persistent") as there:
        assert [path.name for path in there.iterdir()] == ["lost+found"]
        assert (there.stat().st_uid, stat.S_IMODE(there.stat().st_mode)) == (0, 0o755)


@pytest.mark.parametrize("frozen", [False, True], ids=["source", "frozen"])
def test_by_somebody_who_is_not_root(install: Install, place: Path, tree: Path, frozen: bool) -> None:
    """Owners, modes, devices, capabilities and access control lists are in the image all the same."""
    disk, source = place / "disk.img", packed(tree, place / "tree.tar")
    command = [str(native.build_bundle("immucore-system") / "immucore")] if frozen else []
    words = ("--target", disk, "--size", DISK_MIB, *SMALL, source)
    done = install(*words, before=UNPRIVILEGED, command=command)
    assert done.returncode == 0, done.stderr

    assert (disk.stat().st_uid, disk.stat().st_gid) == (NOBODY, NOBODY)
    installed = Installed(disk)
    installed.check(("bios", "efi"), "ext4")
    for slot in upgrading.HOLDERS:
        assert installed.image(slot) == comparable(tree)


@pytest.mark.parametrize("before", [(), UNPRIVILEGED], ids=["root", "nobody"])
def test_squashfs(install: Install, place: Path, plain_tree: Path, before: Sequence[str]) -> None:
    """From a squashfs into squashfs, onto a file that is there, for one firmware."""
    source = place / "source.squashfs"
    native.command("mksquashfs", plain_tree, source, "-quiet", "-no-progress")
    disk = new_file(place)
    os.chown(disk, NOBODY, NOBODY)
    options = ("--filesystem", "squashfs", "--firmware", "efi")
    done = install("--target", disk, *options, *SMALL, f"file:{source}", before=before)
    assert done.returncode == 0, done.stderr

    installed = Installed(disk)
    installed.check(("efi",), "squashfs")
    for slot in upgrading.HOLDERS:
        assert installed.image(slot) == comparable(plain_tree)


def test_onto_a_block_device(install: Install, place: Path, tree: Path) -> None:
    """The kernel knows the partitions at once; what a disk holds is named, and goes only with --wipe."""
    disk = new_file(place)
    words = ("--scratch", place, "--firmware", "both", *SMALL, f"dir:{tree}")
    with loop(disk) as device:
        assert install("--target", device, *words).returncode == 0
        Installed(device).check(("bios", "efi"), "ext4")
        first = [Path(f"{device}p{number}").stat().st_rdev for number in range(1, 7)]
        assert len(set(first)) == 6
        assert native.command("e2label", f"{device}p5") == "COS_STATE\n"

        native.command("mke2fs", "-q", "-L", "mine\x1b[31m", f"{device}p6")
        refused = install("--target", device, *words)
        assert refused.returncode == 3
        assert (
            f"cannot install on '{device}': it is not empty: gpt, partition 'bios', partition 'efi' (vfat"
            " 'COS_GRUB'), partition 'oem' (ext4 'COS_OEM'), partition 'recovery' (ext4 'COS_RECOVERY'),"
            " partition 'state' (ext4 'COS_STATE'), partition 'persistent' (ext2 'mine"
        ) in refused.stderr
        assert "\x1b" not in refused.stderr
        assert "--wipe" in refused.stderr

        sizes = ("--partition", "oem=20", *words[4:])  # other partitions, in other places
        done = install("--target", device, "--wipe", "--scratch", place, "--firmware", "efi", *sizes)
        assert done.returncode == 0, done.stderr
        Installed(device).check(("efi",), "ext4")
        assert native.command("e2label", f"{device}p4") == "COS_STATE\n"
        assert not Path(f"{device}p6").exists()


def test_sectors_of_4096_bytes(install: Install, place: Path, tree: Path) -> None:
    disk = new_file(place)
    words = ("--scratch", place, *SMALL[2:], f"dir:{tree}")
    with loop(disk, "--sector-size", "4096") as device:
        refused = install("--target", device, "--firmware", "bios", *words)
        assert refused.returncode == 3
        assert "a BIOS starts from no disk with sectors of 4096 bytes" in refused.stderr
        assert "--firmware efi" in refused.stderr
        assert blank(device)
        done = install("--target", device, "--firmware", "efi", "--partition", "efi=32", *words)
        assert done.returncode == 0, done.stderr
        Installed(device).check(("efi",), "ext4")
        with mounted(f"{device}p4", "ro") as there:
            assert (there / "cOS/active.img").is_file()


def array_member(size_bytes: int) -> tuple[int, bytes]:
    """Give the superblock of a member of an array, version 1.0, and where it lies (linux/raid/md_p.h)."""
    place = size_bytes - 8192
    superblock = bytearray(256)
    struct.pack_into("<II", superblock, 0, 0xA92B4EFC, 1)
    struct.pack_into("<Q", superblock, 144, place // 512)
    return place, bytes(superblock)


def test_signatures_of_an_earlier_use_are_gone(install: Install, place: Path, tree: Path) -> None:
    """What mkfs.vfat has made would be a part of an array for blkid, and for the agent."""
    disk = new_file(place)
    with disk.open("r+b") as file:
        for start_mib, size_mib in ((2, 16), (18, 16), (34, 32), (66, 48), (114, 45)):
            there, superblock = array_member(size_mib * MIB)
            os.pwrite(file.fileno(), superblock, start_mib * MIB + there)
    with loop(disk) as device:
        assert blank(device), "it has no table"
        done = install("--target", device, "--scratch", place, "--firmware", "both", *SMALL, f"dir:{tree}")
        assert done.returncode == 0, done.stderr
        Installed(device).check(("bios", "efi"), "ext4")


def ext4(path: Path) -> None:
    native.command("mke2fs", "-q", "-F", "-L", "DATA", path)


def some_text(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(70 * MIB)
        file.write(b"the only copy of my thesis")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (ext4, "it is not empty: ext2 'DATA'"),
        (some_text, "it is not empty: data of a kind that is not known"),
    ],
)
def test_what_is_in_a_file_is_not_overwritten(
    install: Install, place: Path, tree: Path, make: Callable[[Path], None], found: str
) -> None:
    disk = new_file(place)
    make(disk)
    before = disk.read_bytes()
    refused = install("--target", disk, *SMALL, f"dir:{tree}")
    assert refused.returncode == 3
    assert f"immucore: cannot install on '{disk}': {found}\n" in refused.stderr
    assert disk.read_bytes() == before
    assert install("--target", disk, "--wipe", *SMALL, f"dir:{tree}").returncode == 0
    Installed(disk).check(("bios", "efi"), "ext4")


def test_a_table_that_is_too_long_to_be_read_is_one(install: Install, place: Path, tree: Path) -> None:
    disk = new_file(place, 900)
    table = "label: gpt\ntable-length: 1024\n" + "size=1MiB, name=of-many\n" * 700
    native.command("sfdisk", "--quiet", disk, stdin=table)
    refused = install("--target", disk, *SMALL, f"dir:{tree}")
    assert refused.returncode == 3
    assert f"cannot install on '{disk}': it is not empty: gpt\n" in refused.stderr


def test_a_disk_in_use_is_refused_whatever_is_said(install: Install, place: Path, tree: Path) -> None:
    disk, words = new_file(place), ("--wipe", "--scratch", place, *SMALL, f"dir:{tree}")
    with loop(disk) as device:
        refused = install("--target", disk, *words)
        assert refused.returncode == 3
        assert f"it is in use: {device} is attached to it" in refused.stderr

        words = ("--firmware", "efi", *words)
        assert install("--target", device, *words).returncode == 0
        with mounted(f"{device}p3", "ro") as there:
            refused = install("--target", device, *words)
            assert refused.returncode == 3
            assert f"it is in use: {device}p3 is mounted on '{there}'" in refused.stderr
            assert "umount" in refused.stderr
        # as a machine that was booted has it
        booted = (
            "mount -t tmpfs t /run; mkdir -p /run/initramfs/s; mount -o ro $0p4 /run/initramfs/s; exec $@"
        )
        before = ("unshare", "--mount", "sh", "-c", booted, device)
        refused = install("--target", device, *words, before=before)
        assert refused.returncode == 3
        assert f"it is in use: this machine runs from {device}p4 (/run/initramfs/s)" in refused.stderr
        Installed(device).check(("efi",), "ext4")

        refused = install("--target", f"{device}p3", *words)
        assert refused.returncode == 3
        assert "it is a partition, and a system takes a whole disk" in refused.stderr
        assert f"--target {device}\n" in refused.stderr


def test_the_partitions_of_a_disk_that_has_grown_are_named(
    install: Install, place: Path, tree: Path
) -> None:
    """Of its table sfdisk says first that its end is not that of the disk."""
    disk = new_file(place)
    native.command("sfdisk", "--quiet", disk, stdin="label: gpt\nsize=8MiB, name=precious\n")
    os.truncate(disk, 2 * DISK_MIB * MIB)
    refused = install("--target", disk, *SMALL, f"dir:{tree}")
    assert refused.returncode == 3
    assert "it is not empty: gpt, partition 'precious'\n" in refused.stderr


def test_a_disk_with_more_uses_than_can_be_listed_is_in_use(
    install: Install, place: Path, tree: Path
) -> None:
    disk = new_file(place)
    ext4(disk)
    many = (
        "mount -t tmpfs t /mnt; for n in $(seq 400); do"
        " d=/mnt/$(printf %0200d $n); mkdir $d; mount $0 $d; done;"
        ' exec "$@"'
    )
    with loop(disk) as device:
        words = ("--wipe", "--scratch", place, "--firmware", "efi", *SMALL)
        before = ("unshare", "--mount", "sh", "-c", many, device)
        refused = install("--target", device, *words, f"dir:{tree}", before=before)
    assert refused.returncode == 3
    assert "it is in use: it has more uses than can be listed\n" in refused.stderr


def test_nobody_else_can_use_a_disk_from_the_first_look_on(
    program: Sequence[str], place: Path, tree: Path
) -> None:
    disk = new_file(place)
    ext4(disk)
    with loop(disk) as device:
        words = ("--wipe", "--target", device, "--firmware", "both", "--scratch", place, *SMALL)
        with started(program, *words, f"dir:{tree}") as process:
            until(process, "making active.img")
            process.send_signal(signal.SIGSTOP)
            try:
                busy = pytest.raises(RuntimeError, match="already mounted or mount point busy")
                with busy, mounted(device, "ro"):
                    pass
            finally:
                process.send_signal(signal.SIGCONT)
            _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        Installed(device).check(("bios", "efi"), "ext4")


CLAIM = f"""\
{sys.executable} -c 'import errno, os, sys, time
try:
    claim = os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
else:
    os.pwrite(claim, b"mine", 0)
    print("free", flush=True)
    os.close(1)
    os.close(2)
    time.sleep(float(sys.argv[2]))
' """


@pytest.mark.parametrize(
    "when", [("partx", "--delete", "$2p1"), ("partx", "--delete", "$2"), ("sfdisk", "--quiet", "$6")]
)
def test_nobody_else_can_use_a_disk_that_is_being_written(
    install: Install, place: Path, tmp_path: Path, tree: Path, when: tuple[str, str, str]
) -> None:
    """Between the last look at it and its erasing, and before the table is written."""
    program, option, what = when
    disk, said = new_file(place), tmp_path / "said"
    native.command("sfdisk", "--quiet", disk, stdin="label: gpt\nsize=8MiB, name=precious\n")
    with loop(disk) as device:
        native.command("partx", "--update", device)
        before = instead(program, f'[ "$1" != {option} ] || {CLAIM} {what} 0 >{said}', tmp_path)
        words = ("--wipe", "--target", device, "--firmware", "efi", "--scratch", place, *SMALL)
        done = install(*words, f"dir:{tree}", before=before)
        assert done.returncode == 0, done.stderr
        assert said.read_text() == "EBUSY\n"
        Installed(device).check(("efi",), "ext4")


def test_a_disk_that_is_taken_while_it_is_written_is_left_alone(
    install: Install, place: Path, tmp_path: Path, tree: Path
) -> None:
    """mke2fs claims it by itself; who is there before us when that has ended has it."""
    disk, said = new_file(place), tmp_path / "said"
    script = f"{CLAIM} ${{3%%\\?*}} 60 >{said} 2>/dev/null & echo $! >>{tmp_path}/pids"
    script = f"{script}; until [ -s {said} ]; do sleep 0.1; done"
    with loop(disk) as device:
        before = instead("e2fsck", f'case "$3" in {device}*) {script};; esac', tmp_path)
        try:
            words = ("--target", device, "--firmware", "efi", "--scratch", place, *SMALL)
            done = install(*words, f"dir:{tree}", before=before)
            assert said.read_text() == "free\n"
            assert done.returncode == 3
            told = "which no longer is what it was: it is in use: another program holds it"
            assert f"cannot write '{device}', {told}\n" in done.stderr
            assert disk.read_bytes()[:4] == b"mine"
        finally:
            for pid in (tmp_path / "pids").read_text().split():
                os.kill(int(pid), signal.SIGKILL)


def test_two_at_once(install: Install, place: Path, tree: Path) -> None:
    disk = new_file(place)
    with subprocess.Popen(["flock", disk, "sleep", "60"]) as other:
        try:
            refused = install("--target", disk, *SMALL, f"dir:{tree}")
        finally:
            other.terminate()
    assert refused.returncode == 3
    assert "another program has locked it" in refused.stderr


def test_two_at_once_that_make_the_same_file(place: Path) -> None:
    """The one that waits for the lock finds that its file has become the other one's disk."""
    partial, disk = str(place / "disk.img.partial"), place / "disk.img"

    def second() -> None:
        with disks.created(partial, 1, name=str(disk)):
            raise AssertionError("it has another one's disk")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with disks.created(partial, 1, name=str(disk)) as first:
            first.write(0, b"the first")
            waiting = pool.submit(second)
            with pytest.raises(concurrent.futures.TimeoutError):
                waiting.result(timeout=0.5)
            os.rename(partial, disk)
        with pytest.raises(DeviceError) as caught:
            waiting.result()
    assert caught.value.message == f"cannot install on '{disk}': another installation has made it meanwhile"
    assert caught.value.hint == "take another name, or remove it"
    assert disk.read_bytes().startswith(b"the first")
    assert [path.name for path in place.iterdir()] == ["disk.img"]


REFUSED = {
    "no source": (("--size", "160", "nonsense"), 2, "cannot take 'nonsense' for the source of an image"),
    "no disk": (("--target", "/dev/no-such", "dir:/x"), 3, "cannot install on '/dev/no-such': No such file"),
    "no size": (
        ("dir:/x",),
        3,
        "'s disk.img': No such file or directory\n  hint: list the disks with: lsblk; for",
    ),
    "no directory": (
        ("--target", "/no/such/x.img", "--size", "9", "dir:/x"),
        2,
        "cannot make images in '/no/such'",
    ),
    "a directory": (("--target", "/etc", "dir:/x"), 3, "cannot install on '/etc': Is a directory"),
    "no disk at all": (("--target", "/dev/null", "dir:/x"), 3, "neither a block device nor a file"),
    "size of a device": (
        ("--target", "/dev/sdx", "--size", "99", "dir:/x"),
        2,
        "cannot give '/dev/sdx' a size",
    ),
    "size of nothing": (("--size", "-5", "dir:/x"), 2, "'s disk.img' a size"),
    "size of the world": (("--size", "9" * 20, "dir:/x"), 2, "'s disk.img' a size"),
    "size of more than a file": (("--size", str(1 << 39), *SMALL, "dir:/x"), 4, "disk.img': File too large"),
    "too small": (
        ("--size", "300", "dir:/x"),
        3,
        "of 300 MiB: they need 12435 MiB, which are bios 1, efi 64",
    ),
    "size in GiB": (("--size", "9", "--partition", "state=8G", "dir:/x"), 2, "cannot read 'state=8G'"),
    "erofs": (("--size", "9", "--filesystem", "erofs", "dir:/x"), 2, "GRUB 2.06 cannot read it"),
    "no file": (("--size", "9", "--oem", "/no/file", "dir:/x"), 2, "cannot read '/no/file'"),
    "two files": (
        ("--size", "9", "--oem", "/etc/passwd", "--oem", "/etc/./passwd", "dir:/x"),
        2,
        "cannot put '/etc/./passwd' on OEM: there already is a passwd",
    ),
    "no room": (
        ("--size", "160", *SMALL, "--oem", "large", "tree"),
        3,
        "cannot put 12 MiB on partition 'oem': of its 16 MiB it has room for 9\n  hint: --partition oem=19",
    ),
    "not the boot loader's": (
        ("--size", "160", *SMALL, "empty"),
        4,
        "cannot make an image that boots: there is no ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(install: Install, place: Path, tree: Path, case: str) -> None:
    words, status, message = REFUSED[case]
    (place / "empty").mkdir()
    (place / "large").write_bytes(bytes(12 * MIB - 1024))
    files = {"tree": f"dir:{tree}", "empty": f"dir:{place}/empty", "large": f"{place}/large"}
    target = ("--target", place / "it's disk.img") if "--target" not in words else ()
    done = install(*target, *(files.get(word, word) for word in words))
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "\n  hint: " in done.stderr or "File too large" in message
    assert sorted(path.name for path in place.iterdir()) == ["empty", "large"]


def test_a_file_that_is_there_has_its_size(install: Install, place: Path, tree: Path) -> None:
    disk = new_file(place)
    refused = install("--target", disk, "--size", DISK_MIB, *SMALL, f"dir:{tree}")
    assert refused.returncode == 3
    assert "it is there already, and --size makes a new file" in refused.stderr
    assert blank(disk)


def test_no_room_for_an_upgrade_is_said(install: Install, place: Path, tree: Path) -> None:
    done = install(
        "--target", place / "disk.img", "--size", "160", *SMALL, "--partition=state=18", f"dir:{tree}"
    )
    assert done.returncode == 0
    assert "note: no room for an upgrade of this size: that takes --partition state=" in done.stderr
    assert "--partition recovery=" not in done.stderr


def hidden(path: str) -> Sequence[str]:
    """Return what starts a command where a program is none, or a directory is empty."""
    nothing = "-t tmpfs nothing" if os.path.isdir(path) else "--bind /dev/null"
    return ("unshare", "--mount", "sh", "-ec", f'mount {nothing} "$0"; exec "$@"', path)


MISSING = {  # what is not there → the message, and the package
    "/usr/bin/mcopy": ("there is no mcopy", "mtools"),
    "/usr/bin/mksquashfs": ("there is no mksquashfs", "squashfs-tools"),
    "/usr/sbin/sfdisk": ("there is no sfdisk", "fdisk"),
    "/usr/lib/grub/i386-pc": ("there is no /usr/lib/grub/i386-pc", "grub-pc-bin"),
    "/usr/lib/grub/x86_64-efi": ("there is no /usr/lib/grub/x86_64-efi", "grub-efi-amd64-bin"),
    "/usr/bin/fakeroot": ("who is not root needs fakeroot", "fakeroot"),
}


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_not_installed_is_named(install: Install, place: Path, tree: Path, missing: str) -> None:
    message, package = MISSING[missing]
    before = UNPRIVILEGED if package == "fakeroot" else ()
    options = ("--filesystem", "squashfs") if package == "squashfs-tools" else ()
    words = ("--target", place / "disk.img", "--size", "160", *options, *SMALL, f"dir:{tree}")
    refused = install(*words, before=(*hidden(os.path.realpath(missing)), *before))
    assert refused.returncode == 4, refused.stderr
    assert message in refused.stderr
    assert f"hint: install {package}" in refused.stderr
    assert not list(place.iterdir())


def test_who_is_not_root_cannot_unpack_an_ext4(install: Install, place: Path, tree: Path) -> None:
    image = place / "image"
    upgrading.build(tree, image, "active")
    words = ("--target", place / "disk.img", "--size", "160", *SMALL, f"file:{image}")
    refused = install(*words, before=UNPRIVILEGED)
    assert refused.returncode == 4
    assert f"cannot unpack 'file:{image}': only root can read all that ext4 has of a file" in refused.stderr
    assert install(*words).returncode == 0
    assert Installed(place / "disk.img").image("active") == comparable(tree)


def started(program: Sequence[str], *words: str | Path) -> subprocess.Popen[str]:
    command = [*program, "install", "--json", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=native.ROOT
    )


def until(process: subprocess.Popen[str], step: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step", "").startswith(step):
            return
    raise AssertionError(f"it never came to {step}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_stopped_before_it_writes_it_has_changed_nothing(
    program: Sequence[str], place: Path, tree: Path, number: int
) -> None:
    disk = new_file(place)
    ext4(disk)
    before = disk.read_bytes()
    with started(program, "--wipe", "--target", disk, *SMALL, f"dir:{tree}") as process:
        until(process, "making passive.img")
        process.send_signal(number)
        _, stderr = process.communicate()
    assert disk.read_bytes() == before
    if number != signal.SIGKILL:
        assert process.returncode == 4
        assert "stopped" in stderr
        assert [path.name for path in place.iterdir()] == ["disk.img"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_it_writes_the_disk_is_blank(
    install: Install, program: Sequence[str], place: Path, tree: Path, number: int
) -> None:
    disk = new_file(place)
    ext4(disk)
    scratch = place / "scratch"
    scratch.mkdir()
    with loop(disk) as device:
        words = ("--wipe", "--target", device, "--firmware", "both", "--scratch", scratch, *SMALL)
        with started(program, *words, f"dir:{tree}") as process:
            until(process, "writing the partitions")
            process.send_signal(number)
            _, stderr = process.communicate()
        assert blank(device)
        assert not list(Path("/dev").glob(f"{Path(device).name}p*"))
        if number == signal.SIGTERM:
            assert process.returncode == 4
            assert f"immucore: stopped: '{device}' is blank now" in stderr
            assert not list(scratch.iterdir())
        # nothing has to be wiped, and all can be done once more
        again = install("--target", device, "--firmware", "both", "--scratch", place, *SMALL, f"dir:{tree}")
        assert again.returncode == 0, again.stderr
        Installed(device).check(("bios", "efi"), "ext4")


@pytest.mark.parametrize("room_kib", [64, 512, 1100, 1500])
def test_a_disk_that_cannot_be_written_to_stays_blank(
    install: Install, place: Path, tree: Path, room_kib: int
) -> None:
    """A file on a full file system is a disk that fails in the middle."""
    full, scratch = place / "full", place / "scratch"
    full.mkdir()
    scratch.mkdir()
    native.command("mount", "-t", "tmpfs", "-o", f"size={room_kib}k", "full", full)
    try:
        disk = new_file(full)
        failed = install("--target", disk, "--scratch", scratch, *SMALL, f"dir:{tree}")
        assert failed.returncode == 3
        assert f"cannot write '{disk}', which is blank now: " in failed.stderr
        assert blank(disk)
        words = ("--target", full / "new.img", "--size", "160", "--scratch", scratch, *SMALL, f"dir:{tree}")
        assert install(*words).returncode == 3
        assert [path.name for path in full.iterdir()] == ["disk.img"]
    finally:
        native.command("umount", full)


def instead(program: str, script: str, folder: Path) -> Sequence[str]:
    """Return what starts a command for which a program does something else first."""
    path = os.path.realpath(str(shutil.which(program)))
    shutil.copy(path, folder / "real")
    (folder / "script").write_text(f'#!/bin/sh\n{script}\nexec {folder}/real "$@"\n')
    (folder / "script").chmod(0o755)
    bind = 'mount --bind "$0" "$1"; shift; exec "$@"'
    return ("unshare", "--mount", "sh", "-ec", bind, str(folder / "script"), path)


@pytest.mark.parametrize("option", ["--delete", "--update"])
def test_what_the_kernel_is_not_told(
    install: Install, place: Path, tmp_path: Path, tree: Path, option: str
) -> None:
    """Before anything is written that is an error, and afterwards no more than a warning."""
    disk = new_file(place)
    native.command("sfdisk", "--quiet", disk, stdin="label: gpt\nsize=8MiB, name=precious\n")
    fail = f'[ "$1" != {option} ] || {{ echo not today; exit 1; }}'
    with loop(disk) as device:
        native.command("partx", "--update", device)
        words = ("--wipe", "--target", device, "--firmware", "efi", "--scratch", place, *SMALL)
        done = install(*words, f"dir:{tree}", before=instead("partx", fail, tmp_path))
        if option == "--delete":
            assert done.returncode == 3
            assert f"cannot write '{device}', which is as it was: " in done.stderr
            assert list(Installed(device).partitions) == ["precious"]
            native.command("partx", "--delete", device)
        else:
            assert done.returncode == 0
            warning = f"warning: cannot have the kernel look at '{device}' again: not today; restart, or:"
            assert f"{warning} partprobe {device}\n" in done.stderr
            Installed(device).check(("efi",), "ext4")


def test_no_room_to_make_images_in(install: Install, place: Path, tree: Path) -> None:
    scratch = place / "scratch"
    scratch.mkdir()
    native.command("mount", "-t", "tmpfs", "-o", "size=1M", "full", scratch)
    try:
        words = ("--target", place / "disk.img", "--size", "160", "--scratch", scratch, *SMALL)
        failed = install(*words, f"dir:{tree}")
    finally:
        native.command("umount", scratch)
    assert failed.returncode in (3, 4)
    assert "cannot " in failed.stderr
    assert not (place / "disk.img").exists()


@pytest.mark.parametrize(
    ("size_mib", "sector_bytes", "version"),
    [
        *((8, 512, "FAT16"), (16, 512, "FAT16"), (34, 512, "FAT16"), (35, 512, "FAT32"), (64, 512, "FAT32")),
        *((274, 512, "FAT32"), (1024, 512, "FAT32")),
        *((8, 4096, "FAT12"), (39, 4096, "FAT12"), (64, 4096, "FAT16"), (274, 4096, "FAT32")),
    ],
)
def test_the_esp_of_any_size_on_a_disk_of_any_size(
    tmp_path: Path, size_mib: int, sector_bytes: int, version: str
) -> None:
    disk, file = tmp_path / "disk", tmp_path / "file"
    with disk.open("wb") as stream:
        stream.truncate(2000 * MIB)
    file.write_text("hello\n")
    where = {"size_mib": size_mib, "offset_bytes": MIB, "directory": str(tmp_path / "files")}
    (tmp_path / "files/EFI/BOOT").mkdir(parents=True)
    file.rename(tmp_path / "files/EFI/BOOT/BOOTX64.EFI")
    filesystems.vfat(str(disk), label="COS_GRUB", sector_bytes=sector_bytes, **where)
    region = ("--offset", str(MIB), "--size", str(size_mib * MIB))
    facts = native.command("blkid", "--probe", *region, "-o", "export", disk).splitlines()
    assert "LABEL=COS_GRUB" in facts
    assert f"VERSION={version}" in facts
    assert native.command("mtype", "-i", f"{disk}@@{MIB}", "::/EFI/BOOT/BOOTX64.EFI") == "hello\n"


@pytest.mark.parametrize("size_mib", [16, 17, 127, 128, 129, 511, 512, 1024, 1700, 8192, 16384])
def test_a_partition_has_the_room_that_is_counted_with(tmp_path: Path, size_mib: int) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(size_mib * MIB)
    filesystems.ext4(str(disk), label="COS_STATE", size_mib=size_mib)
    free = native.command("dumpe2fs", "-h", disk).partition("Free blocks:")[2].partition("\n")[0]
    room = filesystems.room_bytes(size_mib)
    assert room <= int(free) * 4096
    assert room >= int(free) * 4096 * 19 // 20 - 2 * MIB, "and little more"
