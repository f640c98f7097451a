"""What a boot leaves behind, and its last words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import __version__, report
from immucore.errors import DeviceError, KernelMismatchError, MountError
from immucore.execute import Step
from immucore.observe import MountPoint
from immucore.plan import Bind, Loop, Missing, Mount, Operation, Overlay, Plan, Seed, WriteFile

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=VALUES)
def test_json_is_json(value: Any) -> None:
    assert json.loads(report.json(value)) == value
    assert report.json(value) == json.dumps(value, separators=(",", ":"))


def test_json_of_records_and_tuples() -> None:
    wait = report.Wait(specs=("LABEL=A",), missing=(), took_usec=5)
    assert report.json((wait, True, None)) == '[{"specs":["LABEL=A"],"missing":[],"took_usec":5},true,null]'


def test_json_of_what_a_disk_can_hold() -> None:
    assert json.loads(report.json("a\udcff\0\u2028")) == "a\udcff\0\u2028"


@pytest.mark.parametrize("value", [{1}, object()])
def test_no_json_for_the_rest(value: object) -> None:
    with pytest.raises(TypeError, match=f"no JSON for {type(value).__name__}"):
        report.json(value)


def step(operation: Operation, outcome: str = "done", reason: str = "") -> Step:
    return Step(operation=operation, outcome=outcome, started_usec=10, took_usec=2, reason=reason)


MOUNT = Mount(source="/dev/a", target="/sysroot/a b", fstype="ext4", options=("ro",), why="VOLUMES has it")
WRITE = WriteFile(target="/run/cos/active_mode", content="1", why="the mode is active")


def test_plan_as_plan_json_shows_it() -> None:
    plan = Plan(operations=(MOUNT, WRITE), notes=("n",), warnings=("w",))
    assert json.loads(report.json(report.plan(plan))) == {
        "schema": 1,
        "operations": [
            {
                "kind": "mount",
                "text": "mount /dev/a on /sysroot/a b (ext4, ro)",
                "target": "/sysroot/a b",
                "why": "VOLUMES has it",
                "criticality": "required",
                "source": "/dev/a",
                "fstype": "ext4",
                "options": ["ro"],
                "fstab_name": "",
            },
            {
                "kind": "writefile",
                "text": "write /run/cos/active_mode",
                "target": "/run/cos/active_mode",
                "why": "the mode is active",
                "criticality": "required",
            },
        ],
        "notes": ["n"],
        "warnings": ["w"],
    }


def test_steps_as_steps_json_shows_them() -> None:
    (shown,) = json.loads(report.json(report.steps([step(WRITE, "failed", "no space")])))["steps"]
    assert shown.pop("operation")["kind"] == "writefile"
    assert shown == {
        "outcome": "failed",
        "started_usec": 10,
        "took_usec": 2,
        "reason": "no space",
        "hint": "",
    }


def test_degraded() -> None:
    record = [step(MOUNT, "degraded", "no disk"), step(WRITE, "done"), step(MOUNT, "ignored", "optional")]
    assert report.degraded(record) == ["/a b: no disk"]


def test_what_was_skipped_is_a_degradation_unless_it_was_optional() -> None:
    optional: Mount = MOUNT.replace(criticality="optional")
    record = [
        step(optional, "ignored", "no disk"),
        step(optional, "skipped", "x"),
        step(WRITE, "skipped", "gone"),
    ]
    assert report.degraded(record) == ["/run/cos/active_mode: gone"]


def result(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "outcome": "ok",
        "exit_status": 0,
        "mode": "active",
        "booted": "active",
        "failures": [],
        "next_entry": "",
        "degraded": [],
        "conflicts": [],
        "error": None,
        "record": [],
        "waits": [],
        "started_usec": 5,
        "ended_usec": 25,
    }
    shown: dict[str, Any] = json.loads(report.json(report.result(**{**arguments, **changes})))
    return shown


def test_result_of_a_good_boot() -> None:
    shown = result(waits=[report.Wait(specs=("LABEL=A",), missing=("LABEL=A",), took_usec=7)])
    assert shown == {
        "schema": 1,
        "outcome": "ok",
        "exit_status": 0,
        "mode_asked": "active",
        "mode_booted": "active",
        "error": None,
        "failures": [],
        "next_entry": "",
        "degraded": [],
        "conflicts": [],
        "root": None,
        "waits": [{"specs": ["LABEL=A"], "missing": ["LABEL=A"], "took_usec": 7}],
        "started_usec": 5,
        "took_usec": 20,
        "version": __version__,
    }


def test_the_outcome_is_where_the_guard_looks_for_it() -> None:
    text = report.json(
        report.result(
            outcome="ok",
            exit_status=0,
            mode="",
            booted="",
            failures=[],
            next_entry="",
            degraded=[],
            conflicts=[],
            error=None,
            record=[],
            waits=[],
            started_usec=0,
            ended_usec=0,
        )
    )
    assert text.startswith('{"schema":1,"outcome":"ok",')


def test_result_of_a_failed_boot() -> None:
    shown = result(outcome="failed", exit_status=4, error=MountError("cannot", hint="do"))
    assert (shown["outcome"], shown["exit_status"]) == ("failed", 4)
    assert shown["mode_booted"] == ""
    assert shown["error"] == {"message": "cannot", "hint": "do"}


def test_result_of_a_degraded_boot() -> None:
    shown = result(outcome="degraded", degraded=report.degraded([step(MOUNT, "degraded", "no disk")]))
    assert (shown["mode_booted"], shown["degraded"]) == ("active", ["/a b: no disk"])


def test_result_of_another_slot_than_was_asked_for() -> None:
    failures = [
        report.Failure(mode="active", error=MountError("cannot find it")),
        report.Failure(mode="passive", error=KernelMismatchError("no modules of 6.1")),
    ]
    shown = result(outcome="degraded", booted="recovery", failures=failures)
    assert (shown["mode_asked"], shown["mode_booted"]) == ("active", "recovery")
    assert shown["failures"] == [
        {"mode": "active", "message": "cannot find it", "other_kernel": False},
        {"mode": "passive", "message": "no modules of 6.1", "other_kernel": True},
    ]


def test_one_error_of_all_slots() -> None:
    failures = [
        report.Failure(mode="active", error=DeviceError("no disk", hint="plug it in")),
        report.Failure(mode="passive", error=MountError("no image")),
        report.Failure(mode="recovery", error=MountError("no recovery")),
    ]
    error = report.together(failures)
    assert isinstance(error, DeviceError)
    assert error.message == "no disk; and instead of active: passive: no image; recovery: no recovery"
    assert error.hint == "plug it in"
    assert report.together(failures[:1]) is failures[0].error


def test_result_names_the_root(tmp_path: Any) -> None:
    loop = Loop(source="/i", target=str(tmp_path), why="x")
    status = tmp_path.stat()
    assert result(record=[step(loop)])["root"] == {
        "dev": f"{status.st_dev >> 8 & 0xFFF}:{status.st_dev & 0xFF}",
        "ino": status.st_ino,
    }
    assert result(record=[step(loop, "failed")])["root"] is None


def test_mount_points_as_mountinfo_spells_them() -> None:
    record = [
        step(Overlay(target="/sysroot/etc", backing="/run/o", why="x")),
        step(MOUNT),
        step(MOUNT, "present"),
        step(Mount(source="/dev/a", target="/sysroot/a#b", fstype="ext4", why="x")),
        step(Bind(source="/a", target="/sysroot/lost", why="x"), "skipped"),
        step(Missing(spec="LABEL=X", target="/sysroot/x", reason="gone", why="x"), "ignored"),
        step(Seed(source="/a", target="/sysroot/seed", why="x")),
        step(WRITE),
        step(Loop(source="/i", target="/sysroot", why="x")),
    ]
    table = (mounted("/sysroot", "7:0"), mounted("/sysroot/a b", "8:1"), mounted("/sysroot/a#b", "8:1"))
    assert report.mount_points(record, str, (*table, mounted("/sysroot", "7:1"))).splitlines() == [
        "7:1 /sysroot",
        "8:1 /sysroot/a\\040b",
        "8:1 /sysroot/a\\043b",
        "gone /sysroot/etc",
    ]


def mounted(target: str, device: str) -> MountPoint:
    return MountPoint(
        target=target, root="/", device=device, options="", fstype="", source="", superblock_options=""
    )


def test_mount_points_without_symlinks() -> None:
    record = [step(Mount(source="/dev/a", target="/sysroot/var/run", fstype="ext4", why="x"))]
    real = {"/sysroot/var/run": "/sysroot/run"}.__getitem__
    assert report.mount_points(record, real, (mounted("/sysroot/run", "8:1"),)) == "8:1 /sysroot/run\n"


def test_summary() -> None:
    error = MountError("cannot mount /dev/a on /a: Input/output error", hint="see dmesg")
    assert report.summary(error, step(MOUNT, "failed")) == (
        "immucore: cannot mount /dev/a on /a: Input/output error\n"
        "  while: mount /dev/a on /sysroot/a b (ext4, ro) (VOLUMES has it)\n"
        "  hint: see dmesg\n"
        "  The boot stops here. More: immucore doctor"
    )
    assert report.summary(MountError("cannot"), None) == (
        "immucore: cannot\n  The boot stops here. More: immucore doctor"
    )


def test_a_console_gets_no_commands_and_no_flood() -> None:
    assert report.for_terminal("a\x1b[2J\nb") == "a\\u001b[2J\nb"
    assert report.for_console("a\x1b[2J\nb") == b"\r\na\\u001b[2J\r\nb\r\n"
    long = report.for_console("begin " + "ä" * 100000 + " end").decode()
    assert long.startswith("\r\nbegin ä")
    assert long.endswith("ä end\r\n")
    assert "(all of it is in /run/immucore/immucore.log)" in long
    assert len(long) < report.MAX_CONSOLE_CHARACTERS + 100
