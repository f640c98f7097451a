"""`immucore boot …` on a machine with a real disk, booted by the real agent."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import native
import pytest
import upgrading
from upgrading import Upgradable

from immucore import bootcount, grubenv
from immucore.bootcount import Count

Boot = Callable[..., Upgradable]


@pytest.fixture
def boot(upgradable: Path, tmp_path: Path, source: Sequence[str]) -> Iterator[Boot]:
    disk = tmp_path / "disk.img"
    native.command("cp", "--sparse=always", upgradable, disk)
    with native.Machine(tmp_path / "machine", disk) as machine:

        def switch_on(slot: str = "active", words: str = "", without: str = "") -> Upgradable:
            if without:
                with machine.partition(upgrading.HOLDERS[without]) as path:
                    (path / f"cOS/{without}.img").unlink()
            here = Upgradable.__new__(Upgradable)
            here.machine, here.slot, here._program = machine, slot, (*source[:-2], "immucore.system")
            booted = machine.boot(f"{upgrading.COMMANDS[slot]} {words}")
            assert booted.status == 0, booted.stderr
            return here

        yield switch_on


def status(here: Upgradable) -> tuple[int, dict[str, Any]]:
    ran = here.run("boot", "status", "--json")
    assert ran.stderr == ""
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return ran.status, found


def test_status_of_a_good_boot(boot: Boot) -> None:
    here = boot()
    ids = here.images()
    code, found = status(here)
    assert code == 0
    assert {name: found[name] for name in found if name != "slots"} == {
        "schema": 1,
        "booted": "active",
        "wanted": "active",
        "reason": "",
        "image_id": ids["active"],
        "health": {"verdict": "unknown", "reasons": []},
        "next": "active",
        "next_entry": "",
        "saved_entry": "",
        "environment": {"path": "/sysroot/oem/grubenv", "problem": ""},
        "problems": [],
    }
    for slot, source in (("active", "dir:/a"), ("passive", "dir:/p"), ("recovery", "dir:/r")):
        assert found["slots"][slot] == {
            "image": f"/cOS/{slot}.img",
            "image_id": ids[slot],
            "label": upgrading.LABELS[slot],
            "state": "" if slot == "recovery" else "trying",
            "left": None if slot == "recovery" else 3,
            "running": slot == "active",
            "problem": "",
            "source": source,
            "digest": str(ids[slot])[:16],
            "fs": "",
            "date": "",
            "action": "install",
        }


def test_status_for_people(boot: Boot) -> None:
    here = boot("passive", "upgrade_failure=active")
    ids = here.images()
    here.set(
        Count(image_id=ids["active"], left=0), Count(image_id=ids["passive"], left=1), saved_entry="active"
    )
    ran = here.run("boot", "status")
    assert ran.status == 5
    assert ran.stdout == (
        f"  active    bad                  {ids['active']}\n"
        "            COS_ACTIVE  dir:/a\n"
        f"* passive   trying, 1 boot left  {ids['passive']}\n"
        "            COS_PASSIVE  dir:/p\n"
        f"  recovery  not counted          {ids['recovery']}\n"
        "            COS_SYSTEM  dir:/r\n"
        "booted: passive\n"
        "    instead of active: it is bad: no boot of it came up in good health, or it was judged so\n"
        "health: unknown\n"
        "next boot: passive\n"
        "default: active\n"
    )


def test_status_after_a_fallback_to_recovery(boot: Boot) -> None:
    here = boot("recovery", "upgrade_failure=active", without="active")
    here.set(bootcount.condemned(bootcount.armed(str(here.images()["passive"]))))
    code, found = status(here)
    assert code == 5
    assert (found["booted"], found["wanted"], found["next"]) == ("recovery", "active", "recovery")
    assert found["reason"] == "there is no whole image in it"
    assert {name: slot["state"] for name, slot in found["slots"].items()} == {
        "active": "missing",
        "passive": "bad",
        "recovery": "",
    }
    assert [name for name, slot in found["slots"].items() if slot["running"]] == ["recovery"]
    assert "/run/immucore/status" not in [mount.target for mount in here.machine.mounts()]


def test_status_of_a_slot_that_somebody_has_chosen(boot: Boot) -> None:
    code, found = status(boot("passive"))
    assert code == 0
    assert (found["booted"], found["wanted"]) == ("passive", "passive")


def test_status_with_a_bad_slot_that_is_not_booted(boot: Boot) -> None:
    here = boot()
    here.set(bootcount.condemned(bootcount.armed(str(here.images()["passive"]))))
    assert status(here)[0] == 5


def test_status_without_an_environment_block(boot: Boot) -> None:
    here = boot()
    here.machine.path("/sysroot/oem/grubenv").write_bytes(bytes(1024))
    problem = "it does not begin as an environment block"
    assert status(here)[1]["environment"]["problem"] == problem
    lines = here.run("boot", "status").stdout.splitlines()
    assert lines[-1] == f"boots are not counted: /sysroot/oem/grubenv: {problem}"


@pytest.mark.parametrize(("slot", "lost"), [("active", "recovery"), ("recovery", "state")])
def test_status_without_one_of_the_partitions(boot: Boot, slot: str, lost: str) -> None:
    here = boot(slot)
    here.machine.record(here.machine.part(lost)).unlink()
    code, found = status(here)
    assert code == 5
    missing = [name for name, holder in upgrading.HOLDERS.items() if holder == lost]
    assert [name for name, each in found["slots"].items() if each["state"] == "missing"] == missing
    assert sorted(found["slots"]) == ["active", "passive", "recovery"]
    assert [name for name, each in found["slots"].items() if each["running"]] == [slot]
    (problem,) = found["problems"]
    assert problem == f"cannot find a filesystem labelled 'COS_{lost.upper()}'"
    ran = here.run("boot", "status")
    assert (ran.status, ran.stderr) == (5, "")
    assert f"\n{problem}\nbooted: {slot}\n" in ran.stdout
    if lost == "state":
        ran = here.run("boot", "bad", "passive")
        assert (ran.status, ran.stderr) == (2, f"immucore: cannot judge passive bad: {problem}\n")


def test_status_with_a_partition_that_cannot_be_mounted(boot: Boot) -> None:
    here = boot()
    device = here.machine.part("recovery")
    here.machine.run("wipefs", "--all", "--force", device)
    code, found = status(here)
    assert code == 5
    assert found["slots"]["recovery"]["state"] == "missing"
    assert found["slots"]["active"]["running"] is True
    reason = f"'{device}': Invalid argument"
    assert found["problems"] == [f"cannot look at the images on COS_RECOVERY: {reason}"]


def test_status_tells_the_health_service(boot: Boot) -> None:
    here = boot()
    told = {"schema": 1, "verdict": "waiting", "reasons": ["a", "b"]}
    here.machine.path("/run/immucore/health.json").write_text(json.dumps(told))
    assert status(here)[1]["health"] == told
    assert "health: waiting\n    a\n    b\nnext boot:" in here.run("boot", "status").stdout
    here.machine.path("/run/immucore/health.json").write_text("[")
    assert status(here)[1]["health"]["verdict"] == "unknown"


def test_status_while_an_upgrade_is_at_work(boot: Boot) -> None:
    here = boot()
    with here.machine.path("/run/immucore/images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status(here)[0] == 0


def test_status_of_what_was_booted_from_no_image(boot: Boot) -> None:
    here = boot()
    for name in ("cos", "elemental"):
        here.machine.path(f"/run/{name}/active_mode").unlink()
    ran = here.run("boot", "status")
    assert ran.status == 2
    assert ran.stderr.startswith(
        "immucore: cannot tell what is booted: this system was not booted from an image"
    )


def test_good_and_bad(boot: Boot) -> None:
    here = boot("passive")
    ids = here.images()
    running = str(ids["passive"])
    here.set(Count(image_id=running, left=1), extra_cmdline="x")
    assert here.run("boot", "good").stdout == f"{running} is good\n"
    assert here.values() == {f"tries_{running}": "3", f"good_{running}": "1", "extra_cmdline": "x"}
    ran = here.run("boot", "bad")
    assert (ran.status, ran.stdout) == (0, f"{running} is bad: it is not booted again\n")
    assert here.values() == {f"tries_{running}": "0", "extra_cmdline": "x"}
    assert status(here)[1]["next"] == "active"


@pytest.mark.parametrize("slot", ["active", "recovery"])
def test_bad_of_another_slot_or_image(boot: Boot, slot: str) -> None:
    here = boot(slot)
    passive = str(here.images()["passive"])
    assert here.run("boot", "bad", "fallback").status == 0
    other = "0123456789abcdef_01234567"
    assert here.run("boot", "bad", other).status == 0
    assert here.values() == {f"tries_{passive}": "0", f"tries_{other}": "0"}


def test_bad_of_nothing_is_not_what_runs(boot: Boot) -> None:
    """`immucore boot bad "$slot"`, with a variable that is empty."""
    here = boot()
    ran = here.run("boot", "bad", "")
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr == (
        "immucore: cannot judge '' bad: that is neither active nor passive, nor an image id\n"
        "  hint: immucore boot status lists them\n"
    )
    assert here.values() == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("good",), "cannot judge this boot good: it is no boot of active or passive, and is not counted"),
        (("bad",), "cannot judge this boot bad: it is no boot of active or passive, and is not counted"),
        (
            ("bad", "recovery"),
            "cannot judge 'recovery' bad: that is neither active nor passive, nor an image id",
        ),
        (("bad", "0123"), "cannot judge '0123' bad: that is neither active nor passive, nor an image id"),
        (("bad", "active"), "cannot judge active bad: there is no image in it"),
        (("next", "x"), "cannot boot 'x': there is no such entry"),
        (("default", "0"), "cannot boot '0': there is no such entry"),
    ],
)
def test_what_cannot_be_said(boot: Boot, words: tuple[str, ...], message: str) -> None:
    here = boot("recovery", without="active")
    ran = here.run("boot", *words)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"immucore: {message}\n")
    assert here.values() == {}


def test_next_and_default(boot: Boot) -> None:
    here = boot()
    assert here.run("boot", "next", "recovery").stdout == "the next boot boots recovery\n"
    assert here.run("boot", "default", "fallback").stdout == "passive is booted as long as it can be\n"
    assert here.values() == {"next_entry": "recovery", "saved_entry": "passive"}
    _, found = status(here)
    assert (found["next"], found["next_entry"], found["saved_entry"]) == ("recovery", "recovery", "passive")
    assert "next boot: recovery (this once)\ndefault: passive\n" in here.run("boot", "status").stdout
    assert here.run("boot", "next", "").stdout == "no entry is chosen for the next boot alone\n"
    assert status(here)[1]["next"] == "passive"
    usual = "active is booted as long as it can be, then passive, then recovery\n"
    assert here.run("boot", "default", "auto").stdout == usual
    assert here.values() == {}


def test_a_block_that_is_damaged_is_made_anew(boot: Boot) -> None:
    here = boot()
    here.machine.path("/sysroot/oem/grubenv").unlink()
    assert here.run("boot", "next", "passive").status == 0
    assert here.machine.path("/sysroot/oem/grubenv").read_bytes() == grubenv.render(
        {"next_entry": "passive"}
    )


def test_a_block_that_cannot_be_written(boot: Boot) -> None:
    here = boot()
    here.machine.run("mount", "-o", "remount,ro", "/sysroot/oem")
    ran = here.run("boot", "next", "passive")
    assert ran.status == 4
    assert ran.stderr == (
        "immucore: cannot write '/sysroot/oem/grubenv': Read-only file system\n"
        "  hint: COS_OEM has to be mounted there, read-write: findmnt /sysroot/oem\n"
    )


AS_NOBODY = """
import os, sys
from immucore.system import commands
os.setresuid(65534, 65534, 65534)
sys.exit(commands.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("action", "message", "hint"),
    [
        ("status", "cannot tell what is booted: that is for root alone", "sudo immucore boot status"),
        ("good", "cannot write '/sysroot/oem/grubenv': Permission denied", "that is for root alone"),
    ],
)
def test_who_is_not_root_is_told(boot: Boot, action: str, message: str, hint: str) -> None:
    words = boot().machine.inside(sys.executable, "-c", AS_NOBODY, "boot", action)
    ran = subprocess.run(words, capture_output=True, text=True, env=upgrading.ENVIRONMENT, check=False)
    assert (ran.returncode, ran.stderr) == (4, f"immucore: {message}\n  hint: {hint}\n")
