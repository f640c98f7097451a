"""What `immucore state` makes of records, names and trees, without a machine."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import cli, state, state_changes, state_diff, state_paths
from immucore.errors import CmdlineError
from immucore.merge import Entry
from immucore.state_paths import Kept

ETC = Kept(path="/etc", place="/x", overlay=False)
FILE = Entry(kind="file", mode=0o644, uid=0, gid=0, content="2 ab")
STATE = "/sysroot/usr/local/.state"


def step(kind: str, target: str, *, outcome: str = "done", reason: str = "", **more: str) -> dict[str, Any]:
    return {
        "operation": {"kind": kind, "target": target, **more},
        "outcome": outcome,
        "reason": reason,
    }


def bound(outcome: str = "done", reason: str = "", seeded: str = "") -> list[dict[str, Any]]:
    kept = f"{STATE}/etc.bind"
    return [
        step("seed", kept, source="/sysroot/etc", reason=seeded),
        step("bind", "/sysroot/etc", source=kept, outcome=outcome, reason=reason),
    ]


def paths(*steps: object) -> list[Kept]:
    return state_paths.persistent({"steps": [*steps]})


def test_the_persistent_paths_of_a_boot() -> None:
    found = paths(
        step("mount", "/sysroot/oem", source="/dev/vda1"),
        step("overlay", "/sysroot/srv", backing="/run/overlay/srv.overlay"),
        step("overlay", "/sysroot/var", backing=f"{STATE}/var.overlay"),
        *bound(),
        step("bind", "/sysroot/boot", source="/sysroot/efi"),
    )
    assert found == [
        Kept(path="/etc", place=f"{STATE}/etc.bind", overlay=False),
        Kept(path="/var", place=f"{STATE}/var.overlay", overlay=True),
    ]


def test_a_path_that_is_not_as_it_was_asked_for() -> None:
    assert paths(*bound(seeded="the disk is full"))[0].note == "the disk is full"
    assert paths(*bound(outcome="skipped", reason="no volume"))[0].lost == "no volume"
    assert paths(*bound(outcome="failed"))[0].lost == "it is not mounted in this boot"
    makeshift = step("overlay", "/sysroot/var", backing=f"{STATE}/v", outcome="makeshift", reason="full")
    assert (paths(makeshift)[0].note, paths(makeshift)[0].lost) == ("full", "")


def test_of_several_attempts_the_last_counts() -> None:
    assert paths(*bound(outcome="undone")) == []
    assert paths(*bound(outcome="failed"), *bound())[0].lost == ""


@pytest.mark.parametrize("place", ["", "etc", "/../etc", "/a//b", "/a/./b", "/a\0b", 7, None, ["/a"]])
def test_a_record_that_leads_elsewhere(place: object) -> None:
    broken = {"kind": "overlay", "target": "/sysroot/var", "backing": place}
    assert paths({"operation": broken, "outcome": "done"}) == []
    broken = {"kind": "overlay", "target": place, "backing": f"{STATE}/var.overlay"}
    assert paths({"operation": broken, "outcome": "done"}) == []


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_a_record_of_any_shape(value: object) -> None:
    assert state_paths.persistent({"steps": value}) == []
    assert state_paths.persistent({"steps": [{"operation": value}]}) == []


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["state"], ["state", "show"]),
        (["state", "/etc"], ["state", "show", "/etc"]),
        (["state", "--json", "/etc"], ["state", "show", "--json", "/etc"]),
        (["state", "diff", "/x"], ["state", "diff", "/x"]),
        (["state", "reset", "/x"], ["state", "reset", "/x"]),
        (["state", "--help"], ["state", "--help"]),
        (["plan", "state"], ["plan", "state"]),
        ([], []),
    ],
)
def test_the_word_that_can_be_left_out(words: list[str], meant: list[str]) -> None:
    assert cli._with_action(words) == meant


def test_a_user_is_told_who_may(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for words in (["state"], ["state", "diff", "/x"], ["state", "reset", "/x", "--yes"]):
        assert cli.main(words) == 4
        assert capsys.readouterr().err.endswith("that is for root alone\n  hint: sudo immucore state\n")


def test_somebody_interrupts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "show", interrupted)
    assert cli.main(["state"]) == 4
    assert "stopped" in capsys.readouterr().err


def test_names_on_a_terminal() -> None:
    assert state_paths.shown("a\nb\x1b[0m\udcff\u202eü") == "a\\u000ab\\u001b[0m\\udcff\\u202eü"
    assert ETC.shown() == "/etc"
    assert ETC.shown("a", "directory") == "/etc/a/"


@pytest.mark.parametrize(
    ("named", "path"),
    [("/etc", ""), ("/etc/a/b", "a/b"), ("/etc/a/", "a"), ("a/b", "a/b"), ("..a", "..a"), ("a\nb", "a\nb")],
)
def test_a_name_that_is_taken(named: str, path: str) -> None:
    assert ETC.below(named) == path


@pytest.mark.parametrize(
    "named", ["/etcetera", "/", "..", "a/../..", "/etc/../b", "a//b", "./a", "/etc//../a"]
)
def test_a_name_that_leads_elsewhere(named: str) -> None:
    with pytest.raises(CmdlineError):
        ETC.below(named)


def test_differences_in_words() -> None:
    other = FILE.replace(
        mode=0o4755, uid=1, gid=2, flags=0x10, xattrs=(("user.a", b"\0x"), ("user.b", b"y" * 200))
    )
    found = {what: (image, here) for what, image, here in state_diff._attributes(FILE, other)}
    assert found["mode"] == ("0644", "4755")
    assert found["owner"] == ("0:0", "1:2")
    assert found["flags (chattr)"] == ("0x0", "0x10")
    assert found["attribute user.a"] == ("none", "'\\x00x'")
    assert found["attribute user.b"][1].endswith("... (200 bytes)")
    assert [*state_diff._attributes(FILE, FILE.replace(content="3 x"))] == []
    link = Entry(kind="symlink", mode=0o777, uid=0, gid=0, content="a\nb")
    assert [*state_diff._attributes(link, link.replace(content="c"))] == [("target", "a\\u000ab", "c")]
    device = Entry(kind="block", mode=0o600, uid=0, gid=0, content="8:0")
    assert [*state_diff._attributes(device, device.replace(content="8:1"))] == [("device", "8:0", "8:1")]


@given(st.text())
def test_lines_are_those_of_the_text(text: str) -> None:
    assert "".join(state_diff._split(text)) == text
    assert all("\n" not in line[:-1] for line in state_diff._split(text))


def test_a_last_line_without_its_end() -> None:
    found = [*state_diff._by_lines("a\n-- b", "a\nc", "/x")]
    assert found[3:] == [
        " a",
        "--- b",
        "\\ No newline at end of file",
        "+c",
        "\\ No newline at end of file",
    ]


def test_what_is_a_text() -> None:
    assert state_diff._text("für\n".encode()) == "für\n"
    assert state_diff._text(b"a\0b") is None
    assert state_diff._text(b"\xff") is None


def test_trees_are_never_held(tmp_path: Path) -> None:
    """The memory of a comparison is that of the directories that lead to one path."""
    image, now = tmp_path / "image", tmp_path / "now"
    for tree, number in itertools.product((image, now), range(100)):
        (tree / f"{number}").mkdir(parents=True)
        for each in range(30):
            (tree / f"{number}/{each}").touch()
    (now / "5/x").touch()
    state_of = [state_changes.View(str(tree)) for tree in (image, now)]
    tracemalloc.start()
    found = [change.path for change in state_changes._compare(*state_of)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["5/x"]
    assert peak < 200_000


def test_what_goes_while_one_looks(tmp_path: Path) -> None:
    view = state_changes.View(str(tmp_path / "nothing"))
    assert view.kinds("") == {}
    assert view.entry("") is None
    (tmp_path / "a").touch()
    view = state_changes.View(str(tmp_path))
    assert view.kinds("a/b") == {}
    assert view.entry("a/b") is None
    assert [*state_changes._compare(state_changes.View(""), view)] == [
        state_changes.Change(what="added", path="", kind="directory")
    ]
