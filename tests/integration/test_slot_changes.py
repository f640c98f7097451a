"""The commit of an upgrade and a rollback, cut off at every change of the file system."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import native
import pytest

from immucore import files, syscalls
from immucore.bootcount import ACTIVE, PASSIVE
from immucore.system import slots

CHANGING = ("link", "rename", "renameat2", "unlink", "fsync")
RUN = "from immucore.system import slots"
END = "slots.settle(sys.argv[1]); slots.clean(sys.argv[1], int(sys.argv[2]))"
STEPS = {
    "active": f"slots.commit(sys.argv[1], 'active'); {END}",
    "passive": f"slots.commit(sys.argv[1], 'passive'); {END}",
    "swap": "slots.swap(sys.argv[1]); slots.settle(sys.argv[1])",
}
START = {"active.img": "A", "passive.img": "P", "transition.img": "N"}


def put(directory: Path, images: dict[str, str]) -> Path:
    directory.mkdir(parents=True)
    for name, content in images.items():
        (directory / name).write_text(content)
    return directory


def found(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def inode(directory: Path, name: str) -> int:
    return (directory / name).stat().st_ino


def cut_off(directory: Path, what: str, call: str, when: int) -> bool:
    """Do a step, and be killed at the so manieth call; True if there is none of that number."""
    command = ["strace", "--quiet=all", "--output=/dev/null", "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:signal=SIGKILL:when={when}", sys.executable, "-I", "-B", "-c"]
    command += [f"import sys; sys.path.insert(0, {str(native.ROOT)!r}); {RUN}; {STEPS[what]}"]
    command += [str(directory), str(inode(directory, "active.img"))]
    ran = subprocess.run(command, check=False, timeout=60)
    assert ran.returncode in (0, -9)
    return ran.returncode == 0


@pytest.mark.parametrize("what", STEPS)
def test_cut_off_at_every_change(tmp_path: Path, what: str) -> None:
    """Two whole images at every instant, what is kept among them; then it is cleaned, and done once more."""
    start = {name: START[name] for name in START if what != "swap" or name != "transition.img"}
    allowed = {"active": ("AP", "AA", "NA"), "passive": ("AP", "NP"), "swap": ("AP", "PA")}[what]
    seen = set()
    for call in CHANGING:
        for when in range(1, 30):
            directory = put(tmp_path / f"{call}{when}", start)
            running = inode(directory, "active.img")
            if cut_off(directory, what, call, when):
                break
            after = found(directory)
            state = after["active.img"] + after["passive.img"]
            assert state in allowed
            seen.add(state)
            slots.clean(str(directory), running)
            names = {"active.img", "passive.img"} | ({"previous.img"} if state == "NP" else set())
            assert {*found(directory)} == names
            (directory / "transition.img").write_text("M")
            keep = {"active": ACTIVE, "passive": PASSIVE, "swap": PASSIVE}[what]
            slots.commit(str(directory), keep)
            slots.clean(str(directory), running)
            assert found(directory)["active.img"] == "M"
            assert found(directory)["passive.img"] == state[keep == PASSIVE]
            shutil.rmtree(directory)
    assert seen == {*allowed}


def test_the_ends(tmp_path: Path) -> None:
    directory = put(tmp_path / "active", START)
    slots.commit(str(directory), ACTIVE)
    slots.clean(str(directory), inode(directory, "passive.img"))
    assert found(directory) == {"active.img": "N", "passive.img": "A"}
    directory = put(tmp_path / "passive", START)
    slots.commit(str(directory), PASSIVE)
    slots.clean(str(directory), 0)
    assert found(directory) == {"active.img": "N", "passive.img": "P"}
    for name, gone in (("no active", "active.img"), ("no passive", "passive.img")):
        directory = put(tmp_path / name, {each: START[each] for each in START if each != gone})
        slots.commit(str(directory), PASSIVE if gone == "active.img" else ACTIVE)
        slots.clean(str(directory), 0)
        assert found(directory) == {"active.img": "N", "passive.img": "P" if gone == "active.img" else "A"}


def test_a_rollback_without_an_active(tmp_path: Path) -> None:
    directory = put(tmp_path / "images", {"passive.img": "P"})
    slots.swap(str(directory))
    assert found(directory) == {"active.img": "P", "passive.img": "P"}


def test_recovery_under_its_earlier_name(tmp_path: Path) -> None:
    """cos-toolkit's boot menu prefers recovery.squashfs: what is left of it would be booted for ever."""
    directory = put(tmp_path / "images", {"recovery.squashfs": "R", "transition.img": "N"})
    running = inode(directory, "recovery.squashfs")
    slots.replace(str(directory), "recovery")
    slots.clean(str(directory), running)
    assert found(directory) == {"recovery.img": "N", "previous.img": "R"}
    slots.clean(str(directory), 0)
    assert found(directory) == {"recovery.img": "N"}


@pytest.mark.parametrize("passive", [True, False])
@pytest.mark.parametrize("keep", [ACTIVE, PASSIVE])
def test_a_commit_that_the_kernel_refuses_has_changed_nothing(
    tmp_path: Path, keep: str, passive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {name: START[name] for name in START if passive or name != "passive.img"}
    directory = put(tmp_path / "images", start)
    exchange = syscalls.exchange

    def refuse(one: str, other: str) -> None:
        if other.endswith("active.img"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), other)
        exchange(one, other)

    monkeypatch.setattr(syscalls, "exchange", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        slots.commit(str(directory), keep)
    assert found(directory) == start


@pytest.mark.parametrize("passive", [True, False])
@pytest.mark.parametrize("keep", [ACTIVE, PASSIVE])
def test_a_disk_that_cannot_be_written_to_loses_no_image(
    tmp_path: Path, keep: str, passive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails before the commit, and nothing was changed, or behind it, and everything was."""
    start = {name: START[name] for name in START if passive or name != "passive.img"}
    directory = put(tmp_path / "images", start)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    if keep == ACTIVE:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            slots.commit(str(directory), keep)
        assert found(directory) == start
    else:
        slots.commit(str(directory), keep)
        assert found(directory) == {**start, "active.img": "N", "transition.img": "A"}
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            slots.settle(str(directory))


@native.isolated(user=False)
def test_grub_sees_at_once_what_was_committed(tmp_path: Path) -> None:
    """It replays no journal: what stands only there, a power cut would take back for it."""
    disk, mounted = tmp_path / "disk", tmp_path / "mounted"
    mounted.mkdir()
    native.command("truncate", "-s", "32M", disk)
    native.command("mke2fs", "-q", "-t", "ext4", "-O", "^metadata_csum_seed", disk)
    native.command("mount", "-o", "loop", disk, mounted)
    directory = put(mounted / "cOS", {name: START[name] for name in START if name != "transition.img"})
    native.command("mount", "-o", "remount,ro", mounted)
    native.command("mount", "-o", "remount,rw", mounted)
    (directory / "transition.img").write_text("N")
    files.fsync(str(directory / "transition.img"))
    for act, active, passive in (
        (lambda: slots.commit(str(directory), ACTIVE), "N", "A"),
        (lambda: slots.swap(str(directory)), "A", "N"),
    ):
        act()
        slots.settle(str(directory))
        for name, content in (("active", active), ("passive", passive)):
            seen = native.command("grub-fstest", disk, "cat", f"(loop0)/cOS/{name}.img")
            assert seen == content


@native.isolated(user=False)
def test_an_image_that_runs_keeps_a_name(tmp_path: Path) -> None:
    """ext4 cannot be made read-only while a file without a name is open: this is why it has one."""
    disk, mounted = tmp_path / "disk", tmp_path / "mounted"
    mounted.mkdir()
    native.command("truncate", "-s", "16M", disk)
    native.command("mke2fs", "-q", "-t", "ext4", disk)
    native.command("mount", "-o", "loop", disk, mounted)
    directory = put(mounted / "cOS", START)
    with (directory / "active.img").open("rb") as running:
        slots.commit(str(directory), PASSIVE)
        for _ in range(2):
            slots.clean(str(directory), os.fstat(running.fileno()).st_ino)
            assert found(directory) == {"active.img": "N", "passive.img": "P", "previous.img": "A"}
            native.command("mount", "-o", "remount,ro", mounted)
            native.command("mount", "-o", "remount,rw", mounted)
        slots.clean(str(directory), 0)
        with pytest.raises(RuntimeError, match="busy"):
            native.command("mount", "-o", "remount,ro", mounted)
