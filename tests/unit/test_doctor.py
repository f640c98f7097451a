"""What `immucore doctor` says, also of records that are cut off, old, or somebody's joke."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import cli, doctor
from immucore.doctor import Found

RESULT = {
    "schema": 1,
    "outcome": "failed",
    "mode_asked": "active",
    "mode_booted": "",
    "error": {"message": "cannot mount '/dev/a' on '/a': Input/output error", "hint": "dmesg | tail"},
    "failures": [],
    "degraded": [],
    "waits": [{"specs": ["LABEL=A", "LABEL=B"], "missing": ["LABEL=B"], "took_usec": 8_040_000}],
    "started_usec": 2_500_000,
    "took_usec": 8_100_000,
    "version": "1.2.3",
}
STEPS = {
    "steps": [
        {"outcome": "done", "operation": {"text": "first", "why": "a"}},
        {"outcome": "failed", "operation": {"text": "mount /dev/a on /a", "why": "VOLUMES has it"}},
    ]
}
DEVICES = {
    "devices": [
        {"path": "/dev/a", "size_bytes": 5 << 30, "fstype": "ext4", "label": "A", "use": "taken for /a"},
        {
            "path": "/dev/b",
            "size_bytes": 1 << 10,
            "fstype": "",
            "label": "x\x1b[2J\n",
            "use": "no file system",
        },
    ]
}


def found(where: str = "/oem/immucore/boot-000001-0a0b0c0d", **files: Any) -> Found:
    whole = {"result": RESULT, "steps": STEPS, "devices": DEVICES, **files}
    return Found(where=where, files={f"{name}.json": json.dumps(value) for name, value in whole.items()})


def said(current: Found | None, *older: Found) -> str:
    return "\n".join(doctor.report_of(doctor.diagnosis(current, list(older))))


def test_failed_boot() -> None:
    log = "[1.0] <6> fine\n[2.0] <4> OEM is slow\n"
    record = found()
    record.files.update({"immucore.log": log, "dmesg": "<3>[ 2.5] I/O error\n<6>[ 2.6] fine\n"})
    assert (
        said(record)
        == """\
This boot failed.

What      cannot mount '/dev/a' on '/a': Input/output error
To do     dmesg | tail
Step      mount /dev/a on /a
          asked for by: VOLUMES has it
Waited    8.0 s for LABEL=A, LABEL=B; never seen: LABEL=B
Boot      asked for active, booted nothing; began 2.5 s after the kernel, took
          8.1 s; immucore 1.2.3
Warnings  OEM is slow
Kernel    [ 2.5] I/O error
Devices that were seen:
  /dev/a  5 GiB  ext4  A          taken for /a
  /dev/b  1 KiB        x\\x1b[2J   no file system
Evidence  /oem/immucore/boot-000001-0a0b0c0d"""
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"outcome": "ok", "mode_booted": "active"}, "This boot went well: active."),
        (
            {"outcome": "degraded", "mode_booted": "active"},
            "This boot is degraded: active, but not all of it.",
        ),
        (
            {"outcome": "degraded", "mode_booted": "passive"},
            "This boot is a fallback: passive instead of active.",
        ),
        ({}, "This boot failed."),
        ({"outcome": "what?"}, "This boot has no record: the agent did not run, or was cut off."),
    ],
)
def test_state_of_this_boot(changes: dict[str, object], line: str) -> None:
    assert said(found(result={**RESULT, **changes})).startswith(line)


def test_good_boot_tells_of_the_last_failure_and_lists_the_others() -> None:
    good = found("/run/immucore", result={**RESULT, "outcome": "ok", "mode_booted": "active"})
    older = found("/oem/immucore/boot-000001-00000000", result={"degraded": ["/oem: no disk"]})
    text = said(good, found("/oem/immucore/boot-000002-00000000"), older)
    assert text.startswith(
        "This boot went well: active.\nThe last boot that went wrong (failed):\n\nWhat      "
    )
    assert text.endswith(
        "Evidence  /oem/immucore/boot-000002-00000000\n\n"
        "Earlier boots that went wrong, the newest first:\n"
        "  /oem/immucore/boot-000001-00000000\n    /oem: no disk"
    )


def test_nothing_at_all() -> None:
    assert said(Found(where="/run/immucore", files={})) == (
        "This boot has no record: the agent did not run, or was cut off. See: journalctl\n"
        "-u immucore\nNo boot that went wrong is on record."
    )


def test_the_copy_of_this_boot_is_not_an_earlier_one() -> None:
    record = found("/run/immucore")
    record.files["evidence"] = "/oem/immucore/boot-000001-0a0b0c0d (/dev/a)\n"
    diagnosis = doctor.diagnosis(record, [found()])
    assert diagnosis["earlier"] == []
    assert "Evidence  /oem/immucore/boot-000001-0a0b0c0d (/dev/a), not mounted now" in said(record, found())


def test_the_copy_of_this_boot_on_what_is_not_mounted_is_not_an_earlier_one() -> None:
    record = found("/run/immucore")
    record.files["evidence"] = "/dev/a immucore/boot-000001-0a0b0c0d\n"
    copy = found("/dev/a (not mounted) immucore/boot-000001-0a0b0c0d")
    assert doctor.diagnosis(record, [copy])["earlier"] == []
    assert "Evidence  /dev/a immucore/boot-000001-0a0b0c0d, not mounted now" in said(record, copy)


def test_degraded_boot_names_its_reasons() -> None:
    reasons = ["/oem: cannot find it", "/srv: read-only"]
    record = found(
        result={
            **RESULT,
            "outcome": "degraded",
            "error": None,
            "degraded": reasons,
            "mode_booted": "active",
        },
        steps={"steps": [{"outcome": "degraded", "hint": "plug it in", "operation": {"text": "x"}}]},
    )
    text = said(record)
    assert (
        "What      /oem: cannot find it\n          /srv: read-only\nTo do     plug it in\nStep      x\n"
        in text
    )


def test_every_slot_that_was_tried() -> None:
    failures = [{"mode": "active", "message": "cannot a"}, {"mode": "passive", "message": "cannot b"}]
    text = said(found(result={**RESULT, "failures": failures}))
    assert "Tried     active: cannot a\n          passive: cannot b\nTo do " in text
    assert "Tried" not in said(found(result={**RESULT, "failures": failures[:1]}))


def test_hint_that_is_a_table_stays_one() -> None:
    error = {"message": "cannot choose", "hint": "remove one:\n    /dev/a  5 MiB\n    /dev/b  5 MiB"}
    assert "To do     remove one:\n              /dev/a  5 MiB\n              /dev/b  5 MiB\n" in said(
        found(result={**RESULT, "error": error})
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


def anything(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), JSON, max_size=len(names))


@given(
    result=anything([*RESULT]) | JSON,
    wait=anything(["specs", "missing", "took_usec"]),
    step=anything(["outcome", "operation", "hint"])
    | st.just({"outcome": "failed", "operation": {"text": 3}}),
    device=anything(["path", "size_bytes", "fstype", "label", "use"]),
)
def test_whatever_the_files_hold_it_is_one_screen_of_text(
    result: Any, wait: Any, step: Any, device: Any
) -> None:
    if isinstance(result, dict):
        result = {**result, "waits": [wait]}
    record = found(result=result, steps={"steps": [step]}, devices={"devices": [device, device]})
    for text in (said(record), said(None, record), said(record, record, record)):
        assert all(character.isprintable() or character == "\n" for character in text)
    json.dumps(doctor.diagnosis(record, [record]))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "null", "3", '{"outcome":"failed"', "\0" * 100])
def test_files_that_are_cut_off(content: str) -> None:
    names = ("result.json", "steps.json", "devices.json")
    assert said(Found(where="/x", files=dict.fromkeys(names, content)))


def test_lines_fit_a_terminal() -> None:
    long = {"message": "cannot do " + "a/very/long/path " * 40, "hint": "word " * 100}
    text = said(found(result={**RESULT, "error": long}))
    assert max(map(len, text.splitlines())) < doctor.WIDTH


def write(directory: Path, files: dict[str, str]) -> Path:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_text(content)
    return directory


def test_directories_that_can_be_named(tmp_path: Path) -> None:
    first = write(tmp_path / "immucore/boot-000001-00000000", found().files)
    write(tmp_path / "immucore/boot-000002-00000001", found().files)
    for name, last in (
        (tmp_path, "boot-000002"),
        (tmp_path / "immucore", "boot-000002"),
        (first, "boot-000001"),
    ):
        failure = doctor.examine(str(name))["last_failure"]
        assert last in failure["where"]
        assert failure["what"] == ["cannot mount '/dev/a' on '/a': Input/output error"]


def test_directory_without_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"immucore: cannot find a record of immucore in '{tmp_path}'")
    assert cli.main(["doctor", str(tmp_path / "none")]) == 2
    assert f"cannot read '{tmp_path}/none': No such file" in capsys.readouterr().err


def test_files_that_are_no_files_are_not_read(tmp_path: Path) -> None:
    record = tmp_path / "immucore/boot-000001-00000000"
    record.mkdir(parents=True)
    os.mkfifo(record / "result.json")
    (record / "steps.json").symlink_to("/etc/shadow")
    (record / "devices.json").mkdir()
    (record / "dmesg").write_bytes(b"\xff" * (doctor.MAX_FILE_BYTES + 1))
    (tmp_path / "immucore/boot-000002-00000000").symlink_to("/")
    (each,) = doctor.records_at(str(tmp_path))
    assert set(each.files) == {"dmesg"}
    assert len(each.files["dmesg"]) == doctor.MAX_FILE_BYTES


def test_json_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "immucore/boot-000001-00000000", found().files)
    assert cli.main(["doctor", "--json", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schema"], shown["this_boot"], shown["earlier"]) == (1, None, [])
    assert shown["last_failure"]["step"] == "mount /dev/a on /a"


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 KiB"), (-5, "0 KiB"), (6 << 20, "6 MiB"), (1 << 40, "1 TiB"), (1500 << 20, "1.465 GiB")],
)
def test_sizes(number: int, shown: str) -> None:
    assert doctor.size(number) == shown
