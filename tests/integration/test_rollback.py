"""Rollback and reset, on a real disk."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from pathlib import Path

import native
import pytest
import upgrading
from test_upgrade import bootable, fallen_back, given_up, judged, settled, stop_at

from immucore import bootcount
from immucore.bootcount import BAD, GOOD, TRYING
from immucore.system import slots


def test_there_and_back(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    before = here.images()
    here.set(judged(before["active"], GOOD))
    assert here.run("upgrade", f"dir:{new}").status == 0
    made = here.images()["active"]
    here = boot("active")
    here.set(saved_entry="passive")
    values = here.values()
    ran = here.run("rollback", "--json")
    assert ran.status == 0, ran.stderr
    assert ran.result["image_id"] == before["active"]
    assert bootable(here) == {**before, "passive": made}
    del values["saved_entry"]
    assert here.values() == values, "what was judged goes with the image"
    state = here.state()["state"]
    assert state["active"]["source"] == "dir:/a"
    assert state["passive"]["source"] == f"dir:{new}"
    assert here.state("recovery")["state"] == state
    settled(here)
    here = boot("active")
    assert here.machine.path("/sysroot/etc/version").read_text() == "a"
    assert here.run("rollback").status == 0
    assert here.images() == {**before, "active": made, "passive": before["active"]}


@pytest.mark.parametrize("slot", ["passive", "recovery"])
def test_after_a_fallback(boot: upgrading.Boot, slot: str) -> None:
    here = boot(slot)
    before = here.images()
    here.set(judged(before["active"], BAD), judged(before["passive"], GOOD))
    assert here.run("rollback").status == 0
    assert here.images() == {**before, "active": before["passive"], "passive": before["active"]}
    boot("active")


@pytest.mark.parametrize("reboot", [False, True])
def test_what_could_not_be_booted_is_not_kept_by_an_upgrade(
    boot: upgrading.Boot, new: Path, reboot: bool
) -> None:
    """Nobody has counted that the boot loader passed over active: its count is as good as it ever was."""
    here, before = fallen_back(boot, "passive", GOOD, TRYING)
    ran = here.run("rollback")
    assert ran.status == 0, ran.stderr
    assert bootable(here) == {**before, "active": before["passive"], "passive": before["active"]}
    assert bootcount.read(here.values(), str(before["active"])).state == BAD
    if reboot:
        here = boot("active")
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert bootable(here)["passive"] == before["passive"]


def test_what_could_not_be_booted_and_the_way_back_to_it(boot: upgrading.Boot) -> None:
    here, before = fallen_back(boot, "passive", GOOD, GOOD)
    assert here.run("rollback").status == 0
    ran = here.run("rollback")
    assert (ran.status, f"passive ({before['active']}) was judged bad" in ran.stderr) == (4, True)
    assert here.run("rollback", "--force").status == 0
    assert here.images() == before
    assert bootcount.read(here.values(), str(before["active"])).state == TRYING
    assert bootcount.read(here.values(), str(before["passive"])).state == GOOD


def test_a_passive_that_could_not_be_booted(boot: upgrading.Boot) -> None:
    here = boot("active")
    given_up(here, "passive")
    before = here.images()
    here.set(judged(before["active"], GOOD), judged(before["passive"], GOOD), saved_entry="passive")
    values = here.values()
    ran = here.run("rollback")
    assert ran.status == 4
    assert f"cannot roll back: passive ({before['passive']}) could not be booted" in ran.stderr
    assert (here.images(), here.values()) == (before, values)
    assert here.run("rollback", "--force").status == 0
    assert here.images()["active"] == before["passive"]
    assert bootcount.read(here.values(), str(before["passive"])).state == TRYING


@pytest.mark.parametrize("call", ["pwrite64", "renameat2", "fsync"])
def test_a_rollback_that_is_killed_favours_nothing_that_could_not_be_booted(
    boot: upgrading.Boot, call: str
) -> None:
    """As before, or: what was passive first, and the other one known to be bad."""
    here = boot("passive")
    given_up(here)
    before = here.images()
    counts = (judged(before["active"], GOOD), judged(before["passive"], TRYING))
    seen = set()
    for number in range(1, 30):
        here.set(*counts)
        if here.images() != before:  # back to where it was
            with here.machine.partition("state") as path:
                slots.swap(str(path / "cOS"))
        here.machine.path("/run/immucore/slots-moved").unlink(missing_ok=True)
        argv = ["strace", "--output=/dev/null", "-e", f"inject={call}:signal=SIGKILL:when={number}"]
        argv = here.machine.inside(*argv, "-e", f"trace={call}", *upgrading.PROGRAM, "rollback")
        done = subprocess.run(argv, check=False, capture_output=True, timeout=120, env=upgrading.ENVIRONMENT)
        after = bootable(here)
        if after != before:
            assert after == {**before, "active": before["passive"], "passive": before["active"]}
            assert bootcount.read(here.values(), str(before["active"])).state == BAD
        seen.add(after == before)
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert seen == {True, False}


@pytest.mark.parametrize("entry", ["recovery", "fallback", "cos", ""])
def test_what_the_next_boot_boots_is_said_as_it_is(boot: upgrading.Boot, entry: str) -> None:
    """Who has chosen that for once is obeyed, and told."""
    here = boot("active")
    passive = here.images()["passive"]
    here.set(next_entry=entry)
    ran = here.run("rollback", "--json")
    assert ran.status == 0, ran.stderr
    upcoming = {"recovery": "recovery", "fallback": "passive"}.get(entry, "active")
    done = f"active is {passive} now, which was passive"
    once = "" if upcoming == "active" else ", once (immucore boot next auto takes that back)"
    assert ran.result["message"] == f"{done}; the next boot boots {upcoming}{once}"
    assert (ran.result["image_id"], ran.result["next"]) == (passive, upcoming)
    assert here.values().get("next_entry", "") == entry
    images = here.images()
    booted, _ = bootcount.boot(here.values(), images["active"], images["passive"])
    assert booted == upcoming


def test_a_passive_that_was_judged_bad(boot: upgrading.Boot) -> None:
    here = boot("active")
    before = here.images()
    here.set(judged(before["passive"], BAD))
    ran = here.run("rollback")
    assert ran.status == 4
    assert f"cannot roll back: passive ({before['passive']}) was judged bad" in ran.stderr
    assert "--force" in ran.stderr
    assert here.images() == before
    assert here.run("rollback", "--force").status == 0
    assert here.images()["active"] == before["passive"]
    assert bootcount.read(here.values(), str(before["passive"])).state == TRYING


def test_without_a_passive(boot: upgrading.Boot) -> None:
    here = boot("recovery")
    with here.machine.partition("state") as path:
        os.truncate(path / "cOS/passive.img", 4 << 20)
    for _ in range(2):
        ran = here.run("rollback")
        assert ran.status == 4
        assert "cannot roll back: there is no whole passive.img" in ran.stderr
        settled(here)
        with here.machine.partition("state") as path:
            (path / "cOS/passive.img").unlink(missing_ok=True)


@pytest.mark.parametrize("words", [(), ("--force",)])
def test_a_passive_that_cannot_be_read(boot: upgrading.Boot, words: tuple[str, ...]) -> None:
    here = boot("recovery")
    here.set(judged(here.images()["active"], GOOD))
    with here.machine.partition("state") as path:
        upgrading.damage(path / "cOS/passive.img")
        before = [(path / f"cOS/{slot}.img").read_bytes() for slot in bootcount.COUNTED]
    here = boot("active")
    values = here.values()
    ran = here.run("rollback", *words)
    assert ran.status == 4
    assert re.match(
        r"immucore: cannot roll back: cannot read which image '.*/cOS/passive\.img' is: .*\n"
        r"  hint: immucore upgrade SOURCE\n$",
        ran.stderr,
    )
    assert here.values() == values
    with here.part("state") as path:
        assert [(path / f"cOS/{slot}.img").read_bytes() for slot in bootcount.COUNTED] == before
    settled(here)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_rollback_that_is_stopped(boot: upgrading.Boot, how: signal.Signals) -> None:
    """At every call that locks, mounts, starts, writes or renames: all or nothing, told in a sentence."""
    here = boot("active")
    before = here.images()
    swapped = {**before, "active": before["passive"], "passive": before["active"]}
    seen = set()
    for call in ("flock", "move_mount", "vfork,clone,clone3", "pwrite64", "renameat2", "fsync", "umount2"):
        for number in itertools.count(1):
            here.set(saved_entry="passive")  # which is taken back in the end
            now, values = here.images(), here.values()
            argv = ["strace", "--output=/run/strace", "-e", f"trace={call}"]
            argv += ["-e", f"inject={call}:signal={how.name}:when={number}"]
            argv = here.machine.inside(*argv, *upgrading.PROGRAM, "rollback")
            ended = subprocess.run(
                argv, check=False, capture_output=True, text=True, timeout=120, env=upgrading.ENVIRONMENT
            )
            if f"--- {how.name}" not in here.machine.path("/run/strace").read_text():
                assert number > 1, call
                assert ended.returncode == 0
                break
            settled(here)
            if ended.returncode:
                said = f"immucore: stopped by signal {how.value}: nothing was changed\n"
                assert (ended.returncode, ended.stderr) == (4, said)
                assert (here.images(), here.values()) == (now, values)
            else:
                assert ended.stderr.startswith("active is ")
                assert ended.stderr.count("\n") == 1
                assert here.images() == (before if now == swapped else swapped)
            seen.add((call, ended.returncode))
    assert {status for _, status in seen} == {0, 4}
    assert {status for call, status in seen if call == "renameat2"} == {0}, "that is the step itself"


def test_a_reset(boot: upgrading.Boot) -> None:
    here = boot("recovery")
    before = here.images()
    here.set(judged(before["active"], BAD), judged(before["passive"], BAD), saved_entry="recovery")
    with here.machine.partition("persistent") as path:
        (path / "kept").write_text("kept")
    (here.machine.path("/sysroot/oem") / "kept.yaml").write_text("kept")
    with here.machine.partition("state") as path:
        (path / "state.yaml").write_text(f"failed: ['{str(before['recovery'])[:16]}', other]\nmore: true\n")
    ran = here.run("reset", "--json")
    assert ran.status == 0, ran.stderr
    after = bootable(here)
    assert after["recovery"] == before["recovery"]
    assert len({*after.values()}) == 3
    assert {str(image_id)[:16] for image_id in after.values()} == {str(before["recovery"])[:16]}
    assert (ran.result["active"], ran.result["passive"]) == (after["active"], after["passive"])
    assert ran.result["message"] == "active and passive are what recovery is; the next boot boots active"
    assert here.values() == {f"tries_{after[slot]}": "3" for slot in ("active", "passive")}
    assert here.state()["state"]["passive"]["action"] == "reset"
    settled(here)
    with here.part("persistent") as path:
        assert (path / "kept").exists()
    assert (here.machine.path("/sysroot/oem") / "kept.yaml").exists()
    here = boot("active")
    assert here.machine.path("/sysroot/etc/version").read_text() == "r"


def test_a_reset_does_not_promise_active_where_another_slot_was_chosen(boot: upgrading.Boot) -> None:
    here = boot("recovery")
    here.set(next_entry="recovery")
    ran = here.run("reset")
    assert ran.status == 0, ran.stderr
    assert "are what recovery is; the next boot boots recovery, once (" in ran.stderr


def test_a_reset_of_everything(boot: upgrading.Boot) -> None:
    here = boot("recovery")
    with here.machine.partition("persistent") as path:
        (path / ".state/etc.bind").mkdir(parents=True)
        (path / "data").write_text("data")
    oem = here.machine.path("/sysroot/oem")
    (oem / "config").mkdir()
    (oem / "config/99.yaml").write_text("x")
    inode = (oem / "grubenv").stat().st_ino
    ran = here.run("reset", "--persistent", "--oem")
    assert ran.status == 0, ran.stderr
    with here.part("persistent") as path:
        assert os.listdir(path) == ["lost+found"]
    assert sorted(os.listdir(oem)) == ["grubenv", "lost+found"]
    assert (oem / "grubenv").stat().st_ino == inode, "GRUB writes into its blocks"
    here = boot("active")


@pytest.mark.parametrize("slot", ["active", "passive"])
def test_a_reset_only_from_recovery(boot: upgrading.Boot, slot: str) -> None:
    here = boot(slot)
    before = here.images()
    ran = here.run("reset", "--persistent", "--oem")
    assert ran.status == 2
    assert f"cannot reset: this system was booted from {slot}" in ran.stderr
    assert here.images() == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_reset_that_is_cut_off(boot: upgrading.Boot, how: signal.Signals) -> None:
    here = boot("recovery")
    before = here.images()
    for number in range(2, 11):
        ended = stop_at(here, number, how, "reset")
        assert ended.status != 0 or number > 8
        if how == signal.SIGTERM:
            assert f"stopped by signal {how.value}: recovery is as it was, do it again" in ended.said or (
                ended.status == 0
            )
            settled(here)
        assert bootable(here)["recovery"] == before["recovery"]
    assert here.run("reset").status == 0
    settled(here)
    assert {str(each)[:16] for each in here.images().values()} == {str(before["recovery"])[:16]}


def test_a_reset_without_room(boot: upgrading.Boot) -> None:
    here = boot("recovery")
    before, values = here.images(), here.values()
    with here.machine.partition("state") as path:
        status = os.statvfs(path)
        with (path / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bfree * status.f_frsize - (2 << 20))
    ran = here.run("reset")
    assert ran.status == 4
    assert "and 1 MiB are free" in ran.stderr
    assert (here.images(), here.values()) == (before, values)
    settled(here)


def test_a_reset_of_a_state_partition_that_is_lost(boot: upgrading.Boot) -> None:
    here = boot("recovery")
    device = here.machine.part("state")
    native.command("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=90", "conv=fsync")
    said = native.command("blkid", "--probe", "--output", "udev", device)
    assert "ID_FS_TYPE" not in said
    here.machine.record(device).write_text("".join(f"E:{line}\n" for line in said.splitlines()))
    ran = here.run("upgrade", "dir:/nowhere")
    assert (ran.status, "cannot find a filesystem labelled 'COS_STATE'" in ran.stderr) == (3, True)
    ran = here.run("reset")
    assert ran.status == 0, ran.stderr
    assert f"making the file system COS_STATE on {device}, which has none" in ran.stderr
    bootable(here)
    here = boot("active")
    assert here.machine.path("/sysroot/etc/version").read_text() == "r"


def test_a_reset_without_the_partitions(boot: upgrading.Boot) -> None:
    here = boot("recovery")
    here.machine.record(here.machine.part("persistent")).write_text("I:1\n")
    ran = here.run("reset", "--persistent")
    assert ran.status == 3
    assert "cannot find a filesystem labelled 'COS_PERSISTENT'" in ran.stderr
    here.machine.record(here.machine.part("state")).write_text("I:1\n")
    ran = here.run("reset")
    assert ran.status == 3
    assert "cannot find a filesystem labelled 'COS_STATE'" in ran.stderr
    settled(here)
