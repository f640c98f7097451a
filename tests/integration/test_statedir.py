"""Directories of the state on real file systems: every step from one image to another, cut off anywhere."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import native
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_model import Tree, check, tree, trees
from native import described, isolated

from immucore import files, manifest, statedir
from immucore.errors import MakeshiftError
from immucore.linux import DONE, PRESENT, Kernel
from immucore.merge import Conflict, Entry
from immucore.statedir import follow
from immucore.tree import Tree as RealTree

FS_IOC_SET_ENCRYPTION_POLICY = 0x800C6613  # linux/fscrypt.h
REPOSITORY = str(Path(__file__).parents[2])
# The system calls that change a file system: what is between two of them is one state.
CHANGING = (
    *("mkdir", "mknod", "mknodat", "link", "linkat", "symlink", "rename", "renameat2", "unlink", "rmdir"),
    *(
        "ftruncate",
        "sendfile",
        "write",
        "lchown",
        "fchown",
        "chmod",
        "fchmod",
        "utimensat",
        "fsync",
        "syncfs",
    ),
)


def put(root: Path, content: Tree) -> None:
    """Make a tree of the model on the disk."""
    for path, entry in sorted(content.items()):
        place = root / path
        if entry.kind == "directory":
            place.mkdir(exist_ok=True)
        elif entry.kind == "symlink":
            place.symlink_to("somewhere")
            continue
        else:
            place.write_text(entry.content)
        place.chmod(entry.mode)


def replace(root: Path, content: Tree) -> None:
    """Make a directory hold just that."""
    for each in root.iterdir() if root.exists() else ():
        files.remove(str(each))
    root.mkdir(exist_ok=True)
    put(root, content)


def found(root: Path) -> dict[str, Entry]:
    """Read a tree as one of the model: what is compared is written down by other code than ours."""
    result = {}
    for path in [root, *root.rglob("*")]:
        name = str(path.relative_to(root)) if path != root else ""
        if path.is_symlink():
            kind, mode, content = "symlink", 0o755, ""
        elif path.is_dir():
            kind, mode, content = "directory", path.stat().st_mode & 0o7777, ""
        else:
            kind, mode, content = "file", path.stat().st_mode & 0o7777, path.read_text()
        result[name] = Entry(kind=kind, mode=mode, uid=0, gid=0, content=content)
    return result


class Machine:
    """Two images, which may change, and a directory of the state."""

    def __init__(self, work: Path) -> None:
        self.image, self.state = work / "image", work / "state"
        self.kept = self.state / "etc.bind"
        self.state.mkdir(parents=True)
        self.image.mkdir()

    def boot(self, image: str = "one") -> statedir.Outcome:
        done = follow(str(self.image), str(self.kept), image)
        assert sorted(os.listdir(self.state)) == ["etc.bind", "etc.manifest"]
        return done

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        with manifest.Reader(str(self.state / "etc.manifest")) as reader:
            return reader.memory().conflicts


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def test_a_seed_and_a_second_boot(machine: Machine) -> None:
    put(machine.image, tree(a="file one", d__b="file two", d__link="symlink"))
    assert machine.boot().done == "seeded"
    assert found(machine.kept) == found(machine.image)
    kernel = Kernel(root=str(machine.state.parent))
    source, target = str(machine.image), str(machine.kept)
    (machine.kept / "a").unlink()
    assert kernel.seed(source, target, "one") == PRESENT
    assert kernel.seed(source, target, "") == PRESENT, "nobody knows which image it is"
    assert not (machine.kept / "a").exists()
    assert kernel.seed(source, target, "two") == DONE
    assert kernel.merged[target].startswith("merged: ")


def test_an_upgrade(machine: Machine) -> None:
    put(
        machine.image,
        tree(same="file one", new="file one", gone="file one", mine="file one", d__x="symlink"),
    )
    machine.boot()
    (machine.kept / "mine").write_text("mine")
    (machine.kept / "d/own").write_text("own")
    replace(
        machine.image, tree(same="file one", new="file two", mine="file two", d="file one", e__f="file one")
    )
    done = machine.boot("two")
    assert (done.taken, done.dropped) == (2, 2)
    got = found(machine.kept)
    assert {path: entry.content for path, entry in got.items() if entry.kind == "file"} == {
        "same": "one",
        "new": "two",
        "mine": "mine",
        "d/own": "own",
        "e/f": "one",
    }
    assert [each.path for each in machine.conflicts] == ["d", "mine"]
    assert machine.boot("two").done == "merged", "nothing is done twice, if it is called at all"
    assert found(machine.kept) == got


def test_what_is_not_changed_is_not_copied(machine: Machine) -> None:
    """A file that stays is the very same file, with its times; the state is not needed twice on the disk."""
    put(machine.image, tree(same="file one", new="file one", d__same="file one"))
    machine.boot()
    (machine.kept / "mine").write_text("mine")
    before = {name: (machine.kept / name).stat() for name in ("same", "d/same", "mine", "d")}
    (machine.image / "new").write_text("two")
    machine.boot("two")
    for name, status in before.items():
        now = (machine.kept / name).stat()
        assert now.st_mtime_ns == status.st_mtime_ns
        assert name == "d" or now.st_ino == status.st_ino


@isolated(user=False)
def test_everything_that_makes_a_file(tmp_path: Path) -> None:
    """What an image has anew is as it is there: ACLs, capabilities, hard links, holes, devices, chattr."""
    machine = Machine(tmp_path / "machine")
    put(machine.image, tree(log="file one", sparse="directory", other="file one"))
    native.command("chattr", "+i", machine.image / "other")
    machine.boot()
    native.command("chattr", "-i", machine.image / "other")
    for name in ("log", "sparse"):
        files.remove(str(machine.image / name))
    native.make_varied(machine.image)
    native.command("chattr", "+Ad", machine.image / "tool")
    os.setxattr(machine.image / "log", "trusted.kept", b"\1")
    os.chown(machine.image, 1, 2)
    machine.image.chmod(0o2751)
    native.command("chattr", "+a", machine.image / "other")

    machine.boot("two")

    assert described(machine.kept) == described(machine.image)
    assert (machine.kept / "sparse").stat().st_blocks <= (machine.image / "sparse").stat().st_blocks
    assert flags(machine.kept) == flags(machine.image)
    assert flags(machine.kept)["other"] == files.APPEND
    machine.boot("three")  # what is immutable does not have to be touched either
    native.command("chattr", "+i", machine.kept / "tool", machine.kept / "log/again")
    machine_tool = described(machine.kept)["tool"]
    (machine.image / "tool").write_bytes(b"new")
    (machine.image / "sparse").unlink()
    done = machine.boot("four")
    assert [each.path for each in done.conflicts] == ["tool"], "chattr +i says hands off"
    assert not (machine.kept / "sparse").exists()
    assert described(machine.kept)["tool"] == machine_tool
    assert flags(machine.kept)["tool"] & files.IMMUTABLE
    files.remove(str(machine.state))  # no test leaves behind what nobody can remove
    files.remove(str(machine.image))


def flags(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): files.flags_of(str(path))
        for path in root.rglob("*")
        if not path.is_symlink() and (path.is_file() or path.is_dir())
    }


def test_links_come_and_go(machine: Machine) -> None:
    (machine.image / "a").write_text("one")
    machine.boot()
    os.link(machine.image / "a", machine.image / "b")
    machine.boot("two")
    assert (machine.kept / "a").samefile(machine.kept / "b")
    (machine.image / "b").unlink()
    (machine.image / "b").write_text("one")
    machine.boot("three")
    assert not (machine.kept / "a").samefile(machine.kept / "b")


def test_a_touch_is_no_change(machine: Machine) -> None:
    put(machine.image, tree(a="file one"))
    machine.boot()
    os.utime(machine.kept / "a", (1, 1))
    (machine.image / "a").write_text("two")
    assert machine.boot("two").conflicts == ()
    assert (machine.kept / "a").read_text() == "two"


def test_holes_are_no_change(machine: Machine) -> None:
    """A file of a terabyte of nothing takes no time, and is the same however its holes are laid out."""
    with (machine.image / "hole").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"in the middle")
    with (machine.image / "zeros").open("wb") as file:
        file.write(bytes(300_000) + b"end")
    entry = RealTree(str(machine.image)).entry("zeros")
    with (machine.image / "zeros").open("wb") as file:
        file.seek(300_000)
        file.write(b"end")
    assert RealTree(str(machine.image)).entry("zeros") == entry
    machine.boot()
    assert (machine.kept / "hole").stat().st_size == 1 << 40
    assert (machine.kept / "hole").stat().st_blocks < 1024
    (machine.image / "new").write_text("")
    assert machine.boot("two").taken == 1


def test_to_another_image_and_back(machine: Machine) -> None:
    one, two = (
        tree(edit="file one", gone="file one", plain="file one"),
        tree(edit="file two", plain="file two"),
    )
    put(machine.image, one)
    machine.boot()
    (machine.kept / "edit").write_text("two")
    (machine.kept / "gone").unlink()
    replace(machine.image, two)
    machine.boot("two")
    replace(machine.image, one)
    machine.boot("one")
    assert found(machine.kept) == tree(edit="file two", plain="file one")
    replace(machine.image, two)
    machine.boot("two")
    replace(machine.image, one)
    machine.boot("one")
    assert found(machine.kept) == tree(edit="file two", plain="file one")


def test_adopts_what_is_there(machine: Machine) -> None:
    """What the peers have made by rsync is taken over as it is; the next image brings what it lacks."""
    put(machine.image, tree(a="file one", b="file one", d__f="file one", e="file one"))
    native.command("rsync", "-aqAX", f"{machine.image}/", machine.kept)
    (machine.kept / "a").write_text("mine")
    (machine.kept / "own").write_text("own")
    (machine.kept / "e").unlink()
    (machine.kept / "e").mkdir()
    files.remove(str(machine.kept / "d"))
    before = described(machine.kept)
    assert machine.boot().done == "adopted"
    assert described(machine.kept) == before
    for name in ("a", "b"):
        (machine.image / name).write_text("three")
    assert [each.path for each in machine.boot("two").conflicts] == ["a"]
    assert found(machine.kept) == {
        **tree(b="file three", d__f="file one", e="directory"),
        **{
            name: Entry(kind="file", mode=0o644, uid=0, gid=0, content=text)
            for name, text in (("own", "own"),)
        },
        "a": Entry(kind="file", mode=0o755, uid=0, gid=0, content="mine"),
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense\n",
        b"[" * 100_000 + b"\n",
        b'{"image": "one"}\n',
        b'{"image": "one"}\n["directory"]\n"x"\n',
        b"\xff\n[]\n",
    ],
)
def test_a_manifest_that_is_none(machine: Machine, content: bytes) -> None:
    """Nothing that is there is given up because of it, nor because of one that was being written."""
    put(machine.image, tree(a="file one"))
    machine.boot()
    (machine.kept / "a").write_text("mine")
    (machine.state / "etc.manifest").write_bytes(content)
    (machine.state / "etc.manifest.new").write_bytes(content)
    (machine.image / "a").write_text("two")
    assert machine.boot("two").done == "adopted"
    assert (machine.kept / "a").read_text() == "mine"


@pytest.mark.parametrize("kind", ["directory", "loop", "fifo"])
def test_a_manifest_that_is_no_file(machine: Machine, kind: str) -> None:
    """The old state stays, in a degraded boot that does not hang."""
    put(machine.image, tree(a="file one"))
    machine.boot()
    place = machine.state / "etc.manifest"
    place.unlink()
    match kind:
        case "directory":
            (place / "x").mkdir(parents=True)
        case "loop":
            place.symlink_to(place)
        case "fifo":
            os.mkfifo(place)
    kernel = Kernel(root=str(machine.state.parent))
    try:
        assert kernel.seed(str(machine.image), str(machine.kept), "one") == DONE
    except MakeshiftError:
        assert kind in ("directory", "loop")
    assert found(machine.kept) == tree(a="file one")


def test_what_is_in_the_way_of_a_manifest_goes(machine: Machine) -> None:
    """Nothing of a boot that was cut off is a directory; whatever it is, it does not stop the next merge."""
    put(machine.image, tree(a="file one"))
    machine.boot()
    (machine.state / "etc.manifest.new/x").mkdir(parents=True)
    (machine.image / "a").write_text("two")
    assert machine.boot("two").taken == 1


def test_more_conflicts_than_fit_into_a_line(machine: Machine) -> None:
    conflict = Conflict(path="x" * 200, ours=None, theirs=None)
    many = tuple(conflict.replace(path=f"{number}{conflict.path}") for number in range(10_000))
    root = RealTree(str(machine.image))
    with manifest.write(f"{machine.state}/m", "one", root) as writer:
        writer.finish(manifest.Memory(inode=1, conflicts=many, left=(("a", (("x", root.root),)), ("b", ()))))
    with manifest.Reader(f"{machine.state}/m") as reader:
        memory = reader.memory()
    assert memory.conflicts == many
    assert memory.left == (("a", (("x", root.root),)), ("b", ()))


@isolated(user=False)
def test_what_is_inherited_is_no_change(tmp_path: Path) -> None:
    """A default ACL and chattr +A of the directory that keeps the state get into nothing."""
    machine = Machine(tmp_path / "machine")
    native.command("setfacl", "-d", "-m", "u:1000:rwx", machine.state)
    native.command("chattr", "+A", machine.state)
    put(machine.image, tree(a="file one", d__b="file one", d__link="symlink"))
    machine.boot()
    assert described(machine.kept) == described(machine.image)
    assert flags(machine.kept) == flags(machine.image)
    (machine.image / "d/b").write_text("two")
    (machine.image / "e").mkdir()
    assert machine.boot("two").conflicts == ()
    assert {path: each["xattrs"] for path, each in described(machine.kept).items()} == {  # type: ignore[index]
        path: each["xattrs"]
        for path, each in described(machine.image).items()  # type: ignore[index]
    }
    assert not {*flags(machine.kept).values()} - {0}


@isolated(user=False)
def test_links_of_what_is_immutable(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    put(machine.image, tree(a="file one", other="file one"))
    os.link(machine.image / "a", machine.image / "b")
    native.command("chattr", "+i", machine.image / "a")
    machine.boot()
    assert (machine.kept / "a").samefile(machine.kept / "b")
    assert flags(machine.kept)["a"] & files.IMMUTABLE
    (machine.image / "other").write_text("two")
    machine.boot("two")
    assert (machine.kept / "a").samefile(machine.kept / "b")
    assert flags(machine.kept)["b"] & files.IMMUTABLE
    files.remove(str(machine.state))
    files.remove(str(machine.image))


@isolated(user=False)
def test_an_encrypted_directory_is_left_alone(tmp_path: Path) -> None:
    """Without its key nothing in it has its name: it must not be linked to another directory."""
    machine = Machine(tmp_path / "machine")
    disk = tmp_path / "disk"
    native.command("truncate", "-s", "16M", disk)
    native.command("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "encrypt", disk)
    native.command("mount", "-o", "loop", disk, machine.state)
    shutil.rmtree(machine.state / "lost+found")
    put(machine.image, tree(a="file one"))
    machine.boot()
    secret = machine.kept / "secret"
    secret.mkdir()
    descriptor = os.open(secret, os.O_RDONLY)
    policy = bytes((0, 1, 4, 0)) + b"descript"  # struct fscrypt_policy_v1: AES-256-XTS, AES-256-CTS
    fcntl.ioctl(descriptor, FS_IOC_SET_ENCRYPTION_POLICY, policy)
    os.close(descriptor)
    (machine.image / "a").write_text("two")
    with pytest.raises(MakeshiftError, match="encrypted or casefolded") as told:
        machine.boot("two")
    assert "secret" in str(told.value)
    assert (machine.kept / "a").read_text() == "one"


def test_the_other_image_after_a_cut(machine: Machine, tmp_path: Path) -> None:
    """Cut off between the exchange and its end, and then the image of before is booted."""
    one, two = tree(a="file one"), tree(a="file two")
    put(machine.image, one)
    machine.boot("one")
    replace(machine.image, two)
    assert not cut_off(machine, "two", "rename", 1)
    assert found(machine.kept) == two
    replace(machine.image, one)
    kernel = Kernel(root=str(machine.state.parent))
    assert kernel.seed(str(machine.image), str(machine.kept), "one") == DONE
    assert found(machine.kept) == one
    assert sorted(os.listdir(machine.state)) == ["etc.bind", "etc.manifest"]


def test_what_is_finished_tells_its_conflicts(machine: Machine) -> None:
    put(machine.image, tree(a="file one", b="file one"))
    machine.boot()
    (machine.kept / "a").write_text("mine")
    replace(machine.image, tree(a="file two", b="file two"))
    assert not cut_off(machine, "two", "rename", 1)
    done = machine.boot("two")
    assert done.done == "finished"
    assert [each.path for each in done.conflicts] == ["a"]


def test_over_two_other_images_and_back(machine: Machine) -> None:
    """What was deleted stays so, also where only the second of the others does not have it."""
    one = tree(x="file one", p="file one")
    put(machine.image, one)
    machine.boot("one")
    (machine.kept / "x").unlink()
    for name, image in (
        ("two", tree(x="file one", p="file two")),
        ("three", tree(p="file three")),
        ("one", one),
    ):
        replace(machine.image, image)
        machine.boot(name)
    assert found(machine.kept) == tree(p="file one")


@isolated(user=False)
def test_a_full_disk_says_what_is_missing_also_at_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    Kernel(root=str(tmp_path)).mount("state", str(machine.state), "tmpfs", ("size=1m",))
    put(machine.image, tree(a="file one"))
    machine.boot()
    with pytest.raises(OSError, match="No space left"):
        (machine.state / "filler").write_bytes(bytes(2 << 20))
    (machine.image / "a").write_text("two")
    with pytest.raises(MakeshiftError, match=r"No space left on device: [0-9]+ KiB more are needed"):
        follow(str(machine.image), str(machine.kept), "two")
    assert (machine.kept / "a").read_text() == "one"


@isolated(user=False)
def test_what_is_in_use_waits_for_the_next_boot(tmp_path: Path) -> None:
    """A second run of the agent, over what the first has bound and mounted."""
    machine = Machine(tmp_path / "machine")
    kernel = Kernel(root=str(tmp_path / "machine"))
    put(machine.image, tree(same="file one", d__f="file one"))
    kept, source = str(machine.kept), str(machine.image)
    assert kernel.seed(source, kept, "one") == DONE
    for bound in (source, f"{kept}/d"):
        kernel.bind(kept if bound == source else f"{source}/d", bound)
        with pytest.raises(MakeshiftError, match="it is in use"):
            kernel.seed(source, kept, "two")
        native.command("umount", bound)
    assert kernel.seed(source, kept, "two") == DONE


@pytest.mark.parametrize("name", ["..", "../../outside", "", "a/b", "/etc/passwd"])
def test_no_name_in_a_manifest_leads_out(machine: Machine, name: str) -> None:
    put(machine.image, tree(a="file one"))
    machine.boot()
    (machine.state / "outside").mkdir()
    (machine.state / "outside/file").write_text("mine")
    text = (machine.state / "etc.manifest").read_text()
    (machine.state / "etc.manifest").write_text(text.replace('["a", ', f'["{name}", '))
    (machine.image / "a").write_text("two")
    assert follow(str(machine.image), str(machine.kept), "two").done == "adopted"
    assert (machine.state / "outside/file").read_text() == "mine"


@isolated(user=False)
def test_no_space_leaves_the_old_state(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    kernel = Kernel(root=str(tmp_path))
    kernel.mount("state", str(machine.state), "tmpfs", ("size=1m",))
    put(machine.image, tree(a="file one", z="file one"))
    machine.boot()
    before = described(machine.kept)
    (machine.image / "a").write_text("two")
    (machine.image / "large").write_bytes(os.urandom(3 << 20))
    with pytest.raises(
        MakeshiftError, match=r"No space left on device: ([0-9]+) KiB more are needed"
    ) as told:
        machine.boot("two")
    assert 2000 < int(str(told.value).partition("device: ")[2].split(" ")[0]) < 2200
    assert described(machine.kept) == before
    assert sorted(os.listdir(machine.state)) == ["etc.bind", "etc.manifest"]
    (machine.image / "large").write_bytes(b"small")
    assert machine.boot("two").taken == 2
    assert found(machine.kept)["a"].content == "two"


@isolated(user=False)
def test_no_inodes_leave_the_old_state(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine")
    Kernel(root=str(tmp_path)).mount("state", str(machine.state), "tmpfs", ("nr_inodes=20",))
    put(machine.image, tree(a="file one"))
    machine.boot()
    for number in range(30):
        (machine.image / f"new{number}").write_text("new")
    with pytest.raises(MakeshiftError, match=r"No space left on device: [0-9]+ inodes more are needed"):
        machine.boot("two")
    assert found(machine.kept) == tree(a="file one")


def test_an_image_that_cannot_be_read_leaves_the_old_state(machine: Machine) -> None:
    put(machine.image, tree(a="file one"))
    machine.boot()
    files.remove(str(machine.image))
    with pytest.raises(MakeshiftError, match=os.strerror(errno.ENOENT)):
        machine.boot("two")
    assert found(machine.kept) == tree(a="file one")
    assert sorted(os.listdir(machine.state)) == ["etc.bind", "etc.manifest"]


def test_deep_directories(machine: Machine) -> None:
    deep = machine.image
    for _ in range(600):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "f").write_text("one")
    machine.boot()
    (deep / "f").write_text("two")
    machine.boot("two")
    assert (machine.kept / deep.relative_to(machine.image) / "f").read_text() == "two"
    files.remove(str(machine.state))
    files.remove(str(machine.image))


STEP = "import sys; from immucore.statedir import follow; print(follow(*sys.argv[1:]))"


def cut_off(machine: Machine, image: str, call: str, when: int) -> bool:
    """Kill a step at a call of the system; tell whether there was none."""
    command = ["strace", "--quiet=all", "--output=/dev/null", "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:signal=SIGKILL:when={when}", sys.executable]
    command += ["-I", "-B", "-c", f"import sys; sys.path.insert(0, {REPOSITORY!r}); {STEP}"]
    ran = subprocess.run([*command, str(machine.image), str(machine.kept), image], check=False, timeout=60)
    assert ran.returncode in (0, -9)
    return ran.returncode == 0


OLD = tree(same="file one", new="file one", gone__f="file one", kind="file one", d__e="file two")
NEW = tree(same="file one", new="file two", kind__f="file one", d__e="file three", d__x="symlink")


@pytest.mark.parametrize("what", ["seed", "adopt", "merge"])
def test_cut_off_anywhere(tmp_path: Path, what: str) -> None:
    """Killed at every single change of the file system: the old state or the new one, and then the new."""
    states: list[bool] = []
    for call in CHANGING:
        for when in range(1, 100):
            machine = Machine(tmp_path / f"{call}{when}")
            put(machine.image, OLD)
            if what == "merge":
                machine.boot()
                (machine.kept / "mine").write_text("mine")
                replace(machine.image, NEW)
            elif what == "adopt":
                native.command("cp", "-a", machine.image, machine.kept)
            old = described(machine.kept) if what != "seed" else None
            if cut_off(machine, "two", call, when):
                break
            between = described(machine.kept) if machine.kept.exists() else None
            machine.boot("two")
            after = described(machine.kept)
            own = {"mine": Entry(kind="file", mode=0o644, uid=0, gid=0, content="mine")}
            assert found(machine.kept) == ({**NEW, **own} if what == "merge" else OLD)
            assert _but_times(between) in (_but_times(old), _but_times(after))
            states.append(between == old)
            shutil.rmtree(machine.state.parent)
    assert len(states) > {"seed": 40, "adopt": 5, "merge": 40}[what]
    assert {*states} == ({True} if what == "adopt" else {True, False})


def _but_times(state: dict[str, object] | None) -> object:
    """Leave out what is different in two runs: times of directories, and links that a copy still has."""
    return state and {
        path: {key: value for key, value in each.items() if key not in ("mtime", "links")}  # type: ignore[attr-defined]
        for path, each in state.items()
    }


CONTENTS = {
    f"{len(text)} {hashlib.blake2b(bytes(8) + text.encode(), digest_size=20).hexdigest()}": text
    for text in ("one", "two", "three")
}


def modelled(conflict: Conflict) -> Conflict:
    """Give a conflict with the model's entries."""

    def side(entry: Entry | None) -> Entry | None:
        if entry is None:
            return None
        mode = 0o755 if entry.kind == "symlink" else entry.mode
        modelled: Entry = entry.replace(mode=mode, content=CONTENTS.get(entry.content, ""))
        return modelled

    return Conflict(path=conflict.path, ours=side(conflict.ours), theirs=side(conflict.theirs))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(trees(), trees(), st.sampled_from(["one", "two", ""])), min_size=1, max_size=6))
def test_any_history(history: list[tuple[Tree, Tree, str]]) -> None:
    """Images come and go, and people change what they like: each step against the model.

    In each step either somebody puts another tree there, or nothing; then an image is booted, a new one or
    one of two that are known.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
        machine = Machine(Path(work) / "machine")
        known: dict[str, Tree] = {}
        before: Tree | None = None
        for number, (image, now, name) in enumerate(history):
            there = known.setdefault(name, image) if name else image
            identity = name or f"new{number}"
            replace(machine.image, there)
            if before is not None and number % 2:
                replace(machine.kept, now)
            old = found(machine.kept) if before is not None else {}
            machine.boot(identity)
            result = found(machine.kept)
            if before is None:
                assert result == there
            elif (
                not name and there != before
            ):  # what a known image had of somebody's is not what this model knows
                check(before, old, there, result, map(modelled, machine.conflicts))
            before = there
