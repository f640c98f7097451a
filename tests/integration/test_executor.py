"""Executor and kernel together, in namespaces.

Tmpfs, overlay and bind in a user namespace; loop devices and the file systems of disks as root.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import native
import pytest
from native import described, isolated

from immucore import grubenv, linux, observe
from immucore.errors import KernelMismatchError, MakeshiftError, MountError
from immucore.execute import Step, execute
from immucore.linux import DONE, PRESENT, Kernel
from immucore.plan import Bind, Mount, Operation, Overlay, Plan, Seed, WriteFile

LOOP_CTL_REMOVE = 0x4C81  # linux/loop.h
IMAGE = "0123456789abcdef0123456789abcdef"  # the identity of an image


def mounted(path: Path) -> observe.MountPoint | None:
    """Tell what is mounted on exactly this path."""
    return next((mount for mount in reversed(observe.mounts()) if mount.target == str(path)), None)


def tmpfs(kernel: Kernel, path: Path, *options: str) -> Path:
    """Mount a tmpfs with a name of its own."""
    assert kernel.mount(f"test-{path.name}", str(path), "tmpfs", options) == DONE
    return path


# Without privileges


@isolated(user=True)
def test_a_plan_of_every_kind(tmp_path: Path) -> None:
    root, run = tmp_path / "root", tmp_path / "run"
    kernel = Kernel(root=str(root))
    run.mkdir()
    (tmp_path / "root").mkdir()
    plan = Plan(
        operations=(
            Mount(source="image", target=str(root), fstype="tmpfs", options=("mode=0755",), why="test"),
            WriteFile(target=f"{root}/etc/hostname", content="here\n", why="test"),
            Mount(source="base", target=f"{run}/overlay", fstype="tmpfs", why="test"),
            Overlay(target=f"{root}/etc", backing=f"{run}/overlay/etc.overlay", why="test"),
            Mount(
                source="data", target=f"{root}/data", fstype="tmpfs", options=("noexec", "ro"), why="test"
            ),
            Seed(source=f"{root}/etc", target=f"{run}/state/etc.bind", why="test"),
            Bind(source=f"{run}/state/etc.bind", target=f"{root}/var/etc", why="test"),
            WriteFile(target=f"{root}/etc/fstab", content="# nothing\n", why="test"),
        )
    )
    record: list[Step] = []

    execute(plan, kernel, record)

    assert [step.outcome for step in record] == ["done"] * len(plan.operations)
    assert [mount.target for mount in observe.mounts() if mount.target.startswith(str(tmp_path))] == [
        str(root),
        f"{run}/overlay",
        f"{root}/etc",
        f"{root}/data",
        f"{root}/var/etc",
    ]
    assert (root / "etc/fstab").read_text() == "# nothing\n"
    assert (run / "overlay/etc.overlay/upper/fstab").is_file()
    assert (root / "var/etc/hostname").read_text() == "here\n"
    there = mounted(root / "data")
    assert there
    assert {"ro", "noexec"} <= {*there.options.split(",")}

    record.clear()
    execute(plan, Kernel(root=str(root)), record)
    assert [step.outcome for step in record] == ["present"] * len(plan.operations)


@isolated(user=True)
def test_overlay_takes_the_mode_of_what_it_covers(tmp_path: Path) -> None:
    kernel = Kernel(root=str(tmp_path))
    lower = tmp_path / "home of root"
    lower.mkdir()
    lower.chmod(0o2700)
    os.utime(lower, ns=(1, 1_600_000_000_123_456_789))
    tmpfs(kernel, tmp_path / "base")

    assert kernel.overlay(str(lower), f"{tmp_path}/base/home, of: root") == DONE

    status = lower.stat()
    assert stat.S_IMODE(status.st_mode) == 0o2700
    assert status.st_mtime_ns == 1_600_000_000_123_456_789
    there = mounted(lower)
    assert there
    assert there.fstype == "overlay"
    assert Kernel(root=str(tmp_path)).overlay(str(lower), f"{tmp_path}/base/home, of: root") == PRESENT


@isolated(user=True)
def test_a_kept_upper_keeps_its_own_mode(tmp_path: Path) -> None:
    """What the user changed on the root of an overlay that is kept is the user's."""
    kernel = Kernel(root=str(tmp_path))
    lower = tmp_path / "lower"
    lower.mkdir(mode=0o755)
    upper = tmp_path / "base/upper"
    upper.mkdir(parents=True)
    upper.chmod(0o750)
    (upper / "mine").write_text("kept")

    assert kernel.overlay(str(lower), str(tmp_path / "base")) == DONE

    assert stat.S_IMODE(lower.stat().st_mode) == 0o750
    assert (lower / "mine").read_text() == "kept"


@isolated(user=True)
def test_an_upper_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    """The power fails between making the upper directory and giving it its mode."""
    kernel = Kernel(root=str(tmp_path))
    lower = tmp_path / "lower"
    lower.mkdir()
    lower.chmod(0o700)
    (tmp_path / "base/upper.new").mkdir(parents=True)

    assert kernel.overlay(str(lower), str(tmp_path / "base")) == DONE

    assert stat.S_IMODE(lower.stat().st_mode) == 0o700


@isolated(user=True)
@pytest.mark.parametrize(
    "name", ["with space", "comma,colon:", "back\\slash", "ünïcode", 'quote"', "#hash", "new\nline"]
)
def test_paths_with_strange_characters(tmp_path: Path, name: str) -> None:
    kernel = Kernel(root=str(tmp_path))
    (tmp_path / "lower" / name).mkdir(parents=True)
    tmpfs(kernel, tmp_path / name)

    assert kernel.overlay(f"{tmp_path}/lower/{name}", f"{tmp_path}/{name}/base") == DONE
    assert kernel.bind(f"{tmp_path}/lower/{name}", f"{tmp_path}/bound") == DONE

    kernel = Kernel(root=str(tmp_path))  # looks up what is mounted once
    assert kernel.mount(f"test-{name}", f"{tmp_path}/{name}", "tmpfs", ()) == PRESENT
    assert kernel.overlay(f"{tmp_path}/lower/{name}", f"{tmp_path}/{name}/base") == PRESENT
    assert kernel.bind(f"{tmp_path}/lower/{name}", f"{tmp_path}/bound") == PRESENT
    (tmp_path / "bound/file").write_text("x")
    assert (tmp_path / name / "base/upper/file").read_text() == "x"


@isolated(user=True)
@pytest.mark.parametrize(
    ("target", "real"),
    [("/absolute", "/in/here"), ("/up", "/in/here"), ("/chain", "/in/here"), ("/in/../in/here", "/in/here")],
)
def test_links_of_the_root_stay_in_it(tmp_path: Path, target: str, real: str) -> None:
    root = tmp_path / "root"
    (root / "in/here").mkdir(parents=True)
    (root / "absolute").symlink_to("/in/here")
    (root / "up").symlink_to("../../../../../../in/here")
    (root / "chain").symlink_to("/up")
    kernel = Kernel(root=str(root))

    assert kernel.mount("test", f"{root}{target}", "tmpfs", ()) == DONE

    there = mounted(root / real[1:])
    assert there
    assert there.source == "test"


@isolated(user=True)
def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    (root / "etc/fstab").symlink_to(outside)
    (root / "etc/fstab.new").symlink_to(outside)

    with pytest.raises(OSError, match="symbolic links") as raised:
        Kernel(root=str(root)).write_file(f"{root}/etc/fstab", "ours")
    assert raised.value.errno == errno.ELOOP
    (root / "etc/fstab.new").unlink()
    assert Kernel(root=str(root)).write_file(f"{root}/etc/fstab", "ours") == DONE

    assert outside.read_text() == "theirs"
    assert (root / "etc/fstab").read_text() == "ours"
    assert not (root / "etc/fstab").is_symlink()
    assert Kernel(root=str(root)).write_file(f"{root}/etc/fstab", "ours") == PRESENT


@isolated(user=True)
def test_a_file_is_bound_over_a_file(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "fstab").write_text("the image's")
    (tmp_path / "ours").write_text("ours")
    kernel = Kernel(root=str(root))

    assert kernel.bind(f"{tmp_path}/ours", f"{root}/fstab") == DONE
    assert (root / "fstab").read_text() == "ours"
    assert kernel.bind(f"{tmp_path}/ours", f"{root}/fstab") == PRESENT


@isolated(user=True)
def test_what_the_kernel_refuses_is_told(tmp_path: Path) -> None:
    """Each with the number that the hint is chosen by."""
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to("/not/there")
    kernel = Kernel(root=str(tmp_path))
    tmpfs(kernel, tmp_path / "ro", "ro")
    cases: list[tuple[Callable[[], str], int]] = [
        (lambda: kernel.mount("x", f"{tmp_path}/a", "nosuchfs", ()), errno.ENODEV),
        (lambda: kernel.mount("x", f"{tmp_path}/b", "tmpfs", ("nonsense=1",)), errno.EINVAL),
        (lambda: kernel.mount("x", f"{tmp_path}/file", "tmpfs", ()), errno.ENOTDIR),
        (lambda: kernel.mount("x", f"{tmp_path}/ro/absent", "tmpfs", ()), errno.EROFS),
        (lambda: kernel.overlay(f"{tmp_path}/file", f"{tmp_path}/base"), errno.ENOTDIR),
        (lambda: kernel.overlay(f"{tmp_path}/d", f"{tmp_path}/ro"), errno.EROFS),
        (lambda: kernel.bind(f"{tmp_path}/absent", f"{tmp_path}/d"), errno.ENOENT),
    ]
    for call, number in cases:
        with pytest.raises(OSError, match=os.strerror(number)):
            call()
    with pytest.raises(MountError, match="a symlink to nowhere"):
        kernel.mount("x", f"{tmp_path}/nowhere", "tmpfs", ())
    with pytest.raises(MountError, match="no file system is known"):
        kernel.mount("/dev/null", f"{tmp_path}/d", "", ())


# Copying


@isolated(user=False)
def test_a_seed_is_the_same_in_everything(tmp_path: Path) -> None:
    """Mode, owner, extended attributes, ACLs, capabilities, hard links, holes, devices, times."""
    kernel = Kernel(root=str(tmp_path))
    source = native.make_varied(tmp_path / "image")
    os.setxattr(source / "log", "trusted.kept", b"\1")
    os.setxattr(source / "log", "trusted.overlay.opaque", b"y")
    os.chown(source, 1, 2)
    source.chmod(0o2751)

    assert kernel.seed(str(source), f"{tmp_path}/state/var.bind", IMAGE) == DONE

    copy = tmp_path / "state/var.bind"
    os.removexattr(source / "log", "trusted.overlay.opaque")  # says something about the overlay it came from
    os.utime(source / "log", ns=(0, 1_600_000_000_000_000_002))
    assert described(copy) == described(source)
    kinds = {name.partition(".")[0] for each in described(copy).values() for name in each["xattrs"]}  # type: ignore[index]
    assert kinds == {"user", "system", "security", "trusted"}
    assert (copy / "sparse").stat().st_blocks <= (source / "sparse").stat().st_blocks < 1024
    assert (copy / "log/messages").stat().st_nlink == 2
    assert kernel.seed(str(source), f"{tmp_path}/state/var.bind", IMAGE) == PRESENT
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["var.bind", "var.manifest"]


@isolated(user=False)
def test_an_overlay_has_the_attributes_of_what_it_covers(tmp_path: Path) -> None:
    kernel = Kernel(root=str(tmp_path))
    lower = native.make_varied(tmp_path / "image") / "log"
    os.chown(lower, 4711, 4712)
    lower.chmod(0o1770)
    os.setxattr(lower, "trusted.kept", b"\1")
    os.setxattr(lower, "user.kept", b"yes")
    os.setxattr(lower, "security.selinux", b"system_u:object_r:var_log_t:s0\0")
    os.utime(lower, ns=(1, 1_600_000_000_000_000_002))
    before = described(lower)
    tmpfs(kernel, tmp_path / "base")

    assert kernel.overlay(str(lower), f"{tmp_path}/base/log.overlay") == DONE

    assert described(lower)["."] == before["."]
    assert {*described(lower)} == {*before}


@isolated(user=False)
def test_no_space_leaves_nothing(tmp_path: Path) -> None:
    kernel = Kernel(root=str(tmp_path))
    source = native.make_varied(tmp_path / "image")
    (source / "large").write_bytes(b"x" * 300_000)
    state = tmpfs(kernel, tmp_path / "state", "size=256k")

    with pytest.raises(MountError, match=r"No space left on device: [0-9]+ KiB more are needed"):
        kernel.seed(str(source), f"{state}/var.bind", IMAGE)

    assert list(state.iterdir()) == []


@isolated(user=False)
def test_a_copy_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    kernel = Kernel(root=str(tmp_path))
    source = native.make_varied(tmp_path / "image")
    rest = tmp_path / "state/var.bind.new"
    (rest / "log/deep").mkdir(parents=True)
    (rest / "sparse").write_text("half")
    (rest / "log/out").symlink_to(source)  # must not be followed when it is removed

    assert kernel.seed(str(source), f"{tmp_path}/state/var.bind", IMAGE) == DONE

    assert described(tmp_path / "state/var.bind") == described(source)
    assert not rest.exists()


@isolated(user=False)
def test_a_link_in_place_of_a_seed_is_not_followed(tmp_path: Path) -> None:
    kernel = Kernel(root=str(tmp_path))
    source = native.make_varied(tmp_path / "image")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state/var.bind").symlink_to(elsewhere)

    with pytest.raises((OSError, MountError)):
        kernel.seed(str(source), f"{tmp_path}/state/var.bind", IMAGE)

    assert list(elsewhere.iterdir()) == []


# Images and disks


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an image of every type that a slot may have."""
    native.require_root()
    folder = tmp_path_factory.mktemp("images")
    tree = native.make_tree(folder / "tree", "active")
    for fstype in ("ext2", "ext3", "ext4"):
        native.command("mke2fs", "-q", "-F", "-t", fstype, "-d", tree, folder / f"{fstype}.img", "12M")
    native.command("mksquashfs", tree, folder / "squashfs.img", "-quiet", "-no-progress")
    native.command("mkfs.erofs", folder / "erofs.img", tree)
    return folder


@pytest.mark.parametrize("fstype", ["ext2", "ext3", "ext4", "squashfs", "erofs"])
@isolated(user=False)
def test_loops_an_image_by_its_superblock(images: Path, tmp_path: Path, fstype: str) -> None:
    root, image = tmp_path / "sysroot", str(images / f"{fstype}.img")
    other = "ext3" if fstype == "ext2" else "ext2"
    root.mkdir()
    kernel = Kernel(root=str(root))

    assert kernel.mount_loop(image, str(root), ("ro",)) == DONE
    kernel = Kernel(root=str(root))
    assert kernel.mount_loop(image, str(root), ("ro",)) == PRESENT

    there = mounted(root)
    assert there
    assert there.fstype == (fstype if fstype in ("squashfs", "erofs") else "ext4")
    assert there.options.split(",")[0] == "ro"
    assert (root / "etc/slot").read_text() == "active"
    assert stat.S_IMODE((root / "root").stat().st_mode) == 0o700
    with pytest.raises(MountError, match="is mounted there already"):
        kernel.mount_loop(str(images / f"{other}.img"), str(root), ("ro",))
    with pytest.raises(OSError, match="Read-only"):
        (root / "mine").write_text("")


@isolated(user=False)
def test_an_image_without_the_modules_of_the_running_kernel_does_not_fit(tmp_path: Path) -> None:
    root, modules, tree = tmp_path / "sysroot", tmp_path / "modules", tmp_path / "tree"
    release = os.uname().release
    root.mkdir()
    (modules / release).mkdir(parents=True)
    native.make_tree(tree, "active")
    (tree / "usr/lib/modules/1.2.3").mkdir(parents=True)
    native.command("mksquashfs", tree, tmp_path / "other.img", "-quiet", "-no-progress")
    (tree / "usr/lib/modules" / release).mkdir()
    native.command("mksquashfs", tree, tmp_path / "same.img", "-quiet", "-no-progress")
    kernel = Kernel(root=str(root), modules=str(modules))

    with pytest.raises(KernelMismatchError, match=f"it has no modules for the running kernel {release}"):
        kernel.mount_loop(f"{tmp_path}/other.img", str(root), ("ro",))
    assert mounted(root) is None

    assert kernel.mount_loop(f"{tmp_path}/same.img", str(root), ("ro",)) == DONE


@isolated(user=False)
def test_next_entry_is_set_and_the_rest_of_the_block_kept(tmp_path: Path) -> None:
    block, kernel = tmp_path / "grubenv", Kernel(root=str(tmp_path))
    block.write_bytes(grubenv.render({"saved_entry": "cos"}))

    assert kernel.tell_boot_loader(str(block), "fallback") == DONE
    assert grubenv.parse(block.read_bytes()) == {"saved_entry": "cos", "next_entry": "fallback"}
    assert block.stat().st_size == 1024

    with pytest.raises(MountError, match="has not read next_entry the last time"):
        kernel.tell_boot_loader(str(block), "fallback")  # or the machine would restart for ever

    block.unlink()
    assert kernel.tell_boot_loader(str(block), "recovery") == DONE
    assert grubenv.parse(block.read_bytes()) == {"next_entry": "recovery"}

    block.write_bytes(grubenv.render({"x": "y" * 996}))
    with pytest.raises(MountError, match="cannot set next_entry in"):
        kernel.tell_boot_loader(str(block), "recovery")

    block.unlink()
    block.symlink_to("/nowhere")
    with pytest.raises(OSError, match="symbolic links"):
        kernel.tell_boot_loader(str(block), "recovery")


@isolated(user=False)
def test_the_last_umount_detaches(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "sysroot"
    root.mkdir()
    Kernel(root=str(root)).mount_loop(str(images / "squashfs.img"), str(root), ("ro",))
    there = mounted(root)
    assert there
    backing = Path(f"/sys/class/block/{there.source[5:]}/loop/backing_file")
    assert backing.read_text().strip() == str(images / "squashfs.img")

    native.command("umount", root)

    for _ in range(100):
        if not backing.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{there.source} is still attached")


@isolated(user=False)
def test_a_writable_image_is_written(images: Path, tmp_path: Path) -> None:
    root, image = tmp_path / "sysroot", tmp_path / "rw.img"
    root.mkdir()
    native.command("cp", images / "ext4.img", image)
    kernel = Kernel(root=str(root))

    assert kernel.mount_loop(str(image), str(root), ("rw",)) == DONE
    (root / "mine").write_text("kept")
    native.command("umount", root)
    assert kernel.mount_loop(str(image), str(root), ("ro",)) == DONE

    assert (root / "mine").read_text() == "kept"


@isolated(user=False)
def test_a_failed_mount_leaves_no_loop_device(tmp_path: Path) -> None:
    root, image = tmp_path / "sysroot", tmp_path / "broken.img"
    root.mkdir()
    image.write_bytes(b"hsqs" + b"\xff" * 65536)

    with pytest.raises(MountError, match=r"Invalid|error|missing"):
        Kernel(root=str(root)).mount_loop(str(image), str(root), ("ro",))

    time.sleep(0.05)
    attached = Path("/sys/class/block").glob("loop*/loop/backing_file")
    assert str(image) not in [path.read_text().strip() for path in attached]


def loop_devices() -> set[int]:
    """List the numbers of the loop devices, without their partitions."""
    names = [path.name.removeprefix("loop") for path in Path("/sys/class/block").glob("loop*")]
    return {int(name) for name in names if name.isdecimal()}


def test_fifty_images_at_once(images: Path, tmp_path: Path) -> None:
    """Whoever asks for a free loop device may find it taken a moment later."""
    native.require_root()
    before = loop_devices()
    try:
        fifty_loops(images, tmp_path)
    finally:
        control = os.open("/dev/loop-control", os.O_RDWR)
        for number in loop_devices() - before:
            for _ in range(100):  # they are detached a moment after the namespace has gone
                try:
                    fcntl.ioctl(control, LOOP_CTL_REMOVE, number)
                except OSError:
                    time.sleep(0.01)
                else:
                    break
        os.close(control)


@isolated(user=False)
def fifty_loops(images: Path, tmp_path: Path) -> None:
    """Attach and mount fifty images in fifty processes that start at the same moment."""
    go_read, go_write = os.pipe()
    children = []
    for number in range(50):
        root = tmp_path / str(number)
        root.mkdir()
        child = os.fork()
        if child == 0:
            os.close(go_write)
            os.read(go_read, 1)
            try:
                Kernel(root=str(root)).mount_loop(str(images / "squashfs.img"), str(root), ("ro",))
            except OSError as error:
                os._exit(error.errno or 255)
            os._exit(0)
        children.append(child)
    os.close(go_read)
    os.close(go_write)

    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    assert [os.strerror(number) for number in failed if number] == []
    assert all((tmp_path / str(number) / "etc/slot").is_file() for number in range(50))
    sources = {mount.source for mount in observe.mounts() if mount.target.startswith(str(tmp_path))}
    assert len(sources) == 50


@isolated(user=False)
def test_a_mount_point_taken_by_another_device(images: Path, tmp_path: Path) -> None:
    """What is mounted there from elsewhere is not taken for ours."""
    target = tmp_path / "data"
    target.mkdir()
    native.command("mount", "-o", "loop,ro", images / "ext4.img", target)
    first = mounted(target)
    assert first
    other = native.command("losetup", "--find", "--show", "--read-only", images / "ext3.img").strip()
    try:
        assert Kernel(root=str(tmp_path)).mount(other, str(target), "ext4", ("ro",)) == DONE
        there = mounted(target)
        assert there
        assert there.source == other
        native.command("umount", target)
        assert Kernel(root=str(tmp_path)).mount(first.source, str(target), "ext4", ("ro",)) == PRESENT
    finally:
        subprocess.run(["umount", target], check=False)
        native.command("losetup", "--detach", other)


def test_options_of_fstab_reach_the_kernel_as_flags() -> None:
    flags, data = linux.split_options(
        ("rw", "noatime", "nofail", "x-systemd.growfs", "errors=remount-ro", "defaults", "ro", "rw", "nodev")
    )

    assert (flags, data) == (1024 | 4, "errors=remount-ro")


@pytest.mark.parametrize(
    "option",
    [
        *("atime", "diratime", "norelatime", "nostrictatime", "relatime", "strictatime", "nolazytime"),
        *("lazytime", "loud", "silent", "noiversion", "iversion", "symfollow", "nosymfollow", "async"),
        *("sync", "dirsync", "suid", "dev", "exec"),
    ],
)
@isolated(user=True)
def test_what_mount_takes_for_any_file_system_is_mounted(tmp_path: Path, option: str) -> None:
    linux.Kernel(root="/none").mount("tmpfs", str(tmp_path), "tmpfs", (option,))

    assert any(mount.target == str(tmp_path) for mount in observe.mounts())


def lost_paths() -> Sequence[tuple[str, type[Operation]]]:
    """Name the operations that a plan of the executor can lose."""
    return [("etc", Overlay), ("var", Overlay), ("data", Mount)]


@pytest.mark.parametrize(("name", "kind"), lost_paths())
@isolated(user=True)
def test_what_lies_below_a_lost_path_is_skipped(tmp_path: Path, name: str, kind: type[Operation]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / name).write_text("a file where a directory has to be")
    target = f"{root}/{name}"
    lost: Operation = (
        Overlay(target=target, backing=f"{tmp_path}/base", why="test", criticality="important")
        if kind is Overlay
        else Mount(source="x", target=target, fstype="tmpfs", why="test", criticality="optional")
    )
    below = Mount(source="y", target=f"{target}/below", fstype="tmpfs", why="test", criticality="important")
    beside = Mount(source="z", target=f"{target}-beside", fstype="tmpfs", why="test")
    record: list[Step] = []

    execute(Plan(operations=(lost, below, beside)), Kernel(root=str(root)), record)

    assert [step.outcome for step in record] == [
        "degraded" if kind is Overlay else "ignored",
        "skipped",
        "done",
    ]
    assert mounted(root / f"{name}-beside")


@pytest.mark.parametrize("full", ["bytes", "inodes"])
@pytest.mark.parametrize("first", [True, False])
@isolated(user=False)
def test_a_full_disk_is_shown_with_what_it_keeps(full: str, first: bool, tmp_path: Path) -> None:
    """Changes go to memory: the machine boots, and somebody can make space."""
    lower, disk, memory = tmp_path / "lower", tmp_path / "disk", tmp_path / "memory"
    for directory in (lower, disk, memory):
        directory.mkdir()
    lower.chmod(0o755)
    (lower / "old").write_text("of the image")
    (lower / "removed").write_text("of the image")
    native.command("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-N", "200", tmp_path / "img", "8M")
    native.command("mount", "-o", "loop", tmp_path / "img", disk)
    native.command("mount", "-t", "tmpfs", "memory", memory)
    backing = f"{disk}/.state/lower, it: is.overlay"

    def kernel() -> Kernel:
        return Kernel(str(tmp_path), makeshift=f"{memory}/run")

    if not first:
        assert kernel().overlay(str(lower), backing) == DONE
        (lower / "kept").write_text("of the user")
        (lower / "removed").unlink()
        lower.chmod(0o700)
        native.command("umount", lower)
    script = {
        "bytes": f"dd if=/dev/zero of={disk}/big bs=64k; dd if=/dev/zero of={disk}/more bs=1k; :",
        "inodes": f"(i=0; while : >{disk}/$i; do i=$((i+1)); done) 2>/dev/null; :",
    }
    native.command("sh", "-c", script[full])

    try:
        outcome = kernel().overlay(str(lower), backing)
    except MakeshiftError as error:
        outcome = error.message
        with pytest.raises(MakeshiftError) as again:  # the same once more, and nothing is stacked twice
            kernel().overlay(str(lower), backing)
        assert again.value.hint.startswith("free space or inodes on the file system that holds ")
        assert [mount.target for mount in observe.mounts()].count(str(lower)) == 1

    if first or full == "inodes":
        assert outcome == f"cannot keep what changes in '{lower}': No space left on device"
        (lower / "new").write_text("for now")
    else:  # it depends on the kernel whether removing the old work directory makes room for a new one
        assert outcome in (DONE, f"cannot keep what changes in '{lower}': No space left on device")
    names = {"old", "removed"} if first else {"old", "kept"}
    assert {path.name for path in lower.iterdir()} - {"new"} == names
    assert stat.S_IMODE(lower.stat().st_mode) == (0o755 if first else 0o700)
