"""The three-way merge: each case that contract §4.2 names, and any trees at all against a simple model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from immucore.merge import Change, Entry, merge

Tree = Mapping[str, Entry]
VERSIONS = ("file one", "file two", "file three", "directory", "directory 0700", "symlink", "absent")


def entry(version: str) -> Entry:
    kind, _, which = version.partition(" ")
    mode = 0o700 if which == "0700" else 0o755
    return Entry(kind=kind, mode=mode, uid=0, gid=0, content=which if kind == "file" else "")


def tree(**paths: str) -> Tree:
    """Make a tree; __ is a slash, and directories that are not named are ordinary ones."""
    made = {"": entry("directory")}
    for name, version in paths.items():
        path = name.replace("__", "/")
        while (path := path.rpartition("/")[0]) and path not in made:
            made[path] = entry("directory")
        if version != "absent":
            made[name.replace("__", "/")] = entry(version)
    return made


def applied(now: Tree, changes: tuple[Change, ...]) -> dict[str, Entry]:
    """Do the changes one by one, as a file system would allow it."""
    result = dict(now)
    for change in changes:
        below = [
            path for path in result if path.startswith(f"{change.path}/" if change.path else "") and path
        ]
        there = result.get(change.path)
        if change.entry is None:
            assert there is not None
            assert below == [] or there.kind != "directory"
            del result[change.path]
            continue
        if change.path:
            assert result[change.path.rpartition("/")[0]].kind == "directory"
        if there is not None:
            assert (there.kind == "directory") == (change.entry.kind == "directory")
        result[change.path] = change.entry
    return result


def is_whole(result: Tree) -> bool:
    return all(
        result.get(path.rpartition("/")[0], entry("file one")).kind == "directory" for path in result if path
    )


@pytest.mark.parametrize("image", VERSIONS)
@pytest.mark.parametrize("now", VERSIONS)
@pytest.mark.parametrize("before", VERSIONS)
def test_every_case_of_one_path(before: str, now: str, image: str) -> None:
    old, ours, theirs = (tree(x=version) for version in (before, now, image))
    done = merge(old, ours, theirs)

    expected = image if now == before else now
    assert applied(ours, done.changes) == tree(x=expected)
    both = before not in (now, image) and now != image
    assert [(each.path, each.ours, each.theirs) for each in done.conflicts] == (
        [("x", ours.get("x"), theirs.get("x"))] if both else []
    )


CASES = {
    "a directory goes with what nobody has touched": (
        tree(d__f="file one"),
        tree(d__f="file one"),
        tree(),
        tree(),
        [],
    ),
    "a directory stays for what somebody has put into it": (
        tree(d__f="file one"),
        tree(d__f="file one", d__mine="file two"),
        tree(),
        tree(d__mine="file two"),
        [],
    ),
    "also where the image has a file in its place": (
        tree(d__f="file one"),
        tree(d__f="file one", d__mine="file two"),
        tree(d="file three"),
        tree(d__mine="file two"),
        ["d"],
    ),
    "and where a changed file is in it": (
        tree(d__f="file one"),
        tree(d__f="file two"),
        tree(d="file three"),
        tree(d__f="file two"),
        ["d", "d/f"],
    ),
    "what the image adds to a deleted directory has no place": (
        tree(d__f="file one"),
        tree(),
        tree(d__f="file one", d__e__new="file two"),
        tree(),
        ["d/e", "d/e/new"],
    ),
    "nor in a directory that somebody has made a symlink": (
        tree(d__f="file one"),
        tree(d="symlink"),
        tree(d__f="file one", d__new="file two"),
        tree(d="symlink"),
        ["d/new"],
    ),
    "a directory becomes a file": (
        tree(d__e__f="file one"),
        tree(d__e__f="file one"),
        tree(d="file two"),
        tree(d="file two"),
        [],
    ),
    "a file becomes a directory": (
        tree(d="file one"),
        tree(d="file one"),
        tree(d__e__f="file two"),
        tree(d__e__f="file two"),
        [],
    ),
    "but not one that somebody has changed": (
        tree(d="file one"),
        tree(d="file two"),
        tree(d__f="file three"),
        tree(d="file two"),
        ["d", "d/f"],
    ),
    "a mode follows the image, and what is below it is left alone": (
        tree(d__f="file one"),
        tree(d__f="file two"),
        tree(d="directory 0700", d__f="file one"),
        tree(d="directory 0700", d__f="file two"),
        [],
    ),
}


@pytest.mark.parametrize(("before", "now", "image", "expected", "conflicts"), CASES.values(), ids=CASES)
def test_what_lies_in_another(
    before: Tree, now: Tree, image: Tree, expected: Tree, conflicts: list[str]
) -> None:
    done = merge(before, now, image)
    assert applied(now, done.changes) == expected
    assert [each.path for each in done.conflicts] == conflicts


def test_an_adopted_directory_is_not_touched() -> None:
    """What the image gave is taken to be what it gives: nothing has changed, so nothing is done."""
    now, image = tree(a="file one", b="file two"), tree(a="file three", c="file one")
    assert merge(image, now, image).changes == ()


NAMES = [
    f"{a}{b}{c}" for a in ("a", "b") for b in ("", "/a", "/b") for c in (("", "/a", "/b") if b else ("",))
]


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    made = {"": entry("directory")}
    for path in NAMES:
        parent = made.get(path.rpartition("/")[0])
        version = draw(st.sampled_from(VERSIONS))
        if parent is not None and parent.kind == "directory" and version != "absent":
            made[path] = entry(version)
    return made


@settings(max_examples=500, deadline=None)
@given(trees(), trees(), trees())
def test_any_trees(before: Tree, now: Tree, image: Tree) -> None:
    done = merge(before, now, image)
    result = applied(now, done.changes)

    assert is_whole(result)
    for path in {*before, *now, *image, *result}:
        old, ours, theirs, got = (each.get(path) for each in (before, now, image, result))
        assert got in (ours, theirs)
        if ours is not None and ours != old:
            assert got == ours, "what somebody has made is never lost"
        if ours is None and old is not None:
            assert got is None, "what somebody has deleted does not come back"
    told = {each.path: each for each in done.conflicts}
    for path in {*before, *now, *image}:
        old, ours, theirs, got = (each.get(path) for each in (before, now, image, result))
        if got != theirs and theirs not in (None, old):
            assert (told[path].ours, told[path].theirs) == (got, theirs), "what was not taken is told"
        if ours == old and theirs is None and got is not None:
            mine = [each for each in now if each.startswith(f"{path}/") and now[each] != before.get(each)]
            assert mine, "what nobody has touched goes with the image, unless somebody's lies in it"
        if path in told:
            assert got != theirs
            assert theirs != old


@settings(max_examples=200, deadline=None)
@given(trees(), trees())
def test_what_only_one_side_has_changed(old: Tree, new: Tree) -> None:
    assert applied(old, merge(old, old, new).changes) == new
    assert merge(old, old, new).conflicts == ()
    assert merge(old, new, old).changes == ()
    assert merge(old, new, old).conflicts == ()
    assert merge(old, new, new).changes == ()
    assert merge(old, new, new).conflicts == ()
