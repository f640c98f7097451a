"""The three-way merge: each case that contract §4.2 names, and any trees at all against a simple model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from merge_model import VERSIONS, Tree, check, entry, tree, trees

from immucore.merge import Conflict, Drop, Entry, Keep, Merge, Take


def children(tree: Tree, path: str) -> dict[str, Entry]:
    return {
        other.rpartition("/")[2]: entry
        for other, entry in tree.items()
        if other and other.rpartition("/")[0] == path
    }


class Side:
    """A tree as the merge reads it, on either side; it is asked in the order in which a manifest is read."""

    def __init__(self, tree: Tree) -> None:
        self.root = tree[""]
        self._tree = tree
        self._asked: list[list[str]] = []

    def children(self, path: str) -> dict[str, Entry]:
        here = children(self._tree, path)
        assert self._tree[path].kind == "directory"
        parts = path.split("/") if path else []
        assert not self._asked or self._asked[-1] < parts, "asked for in the order of a walk, and once"
        self._asked.append(parts)
        return here

    def kinds(self, path: str) -> dict[str, str]:
        return {name: entry.kind for name, entry in children(self._tree, path).items()}

    def entry(self, path: str) -> Entry:
        return self._tree[path].alone


def merged(
    before: Tree, now: Tree, image: Tree, mine: Mapping[str, Entry | None] | None = None
) -> tuple[dict[str, Entry], Merge]:
    """Make what a merge decides on, decision by decision."""
    merge = Merge(Side(before), Side(now), Side(image), mine)
    result: dict[str, Entry] = {}
    decided: set[tuple[str, type]] = set()
    for decision in merge:
        path = decision.path
        assert (path, type(decision)) not in decided
        decided.add((path, type(decision)))
        if isinstance(decision, Drop):
            assert path in now
            assert not [each for each in result if each.startswith(f"{path}/")]
            continue
        assert path not in result
        assert isinstance(decision, Keep | Take)
        side = now if isinstance(decision, Keep) else image
        assert decision.whole or side[path].kind == "directory"
        result[path] = side[path]
        if decision.whole:
            result |= {each: entry for each, entry in side.items() if each.startswith(f"{path}/")}
    return result, merge


def conflicts(merge: Merge) -> list[Conflict]:
    return sorted(merge.conflicts, key=lambda each: each.path)


@pytest.mark.parametrize("image", VERSIONS)
@pytest.mark.parametrize("now", VERSIONS)
@pytest.mark.parametrize("before", VERSIONS)
def test_every_case_of_one_path(before: str, now: str, image: str) -> None:
    old, ours, theirs = (tree(x=version) for version in (before, now, image))
    result, done = merged(old, ours, theirs)

    expected = image if now == before else now
    assert result == tree(x=expected)
    both = before not in (now, image) and now != image
    assert [(each.path, each.ours, each.theirs) for each in conflicts(done)] == (
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


@pytest.mark.parametrize(("before", "now", "image", "expected", "told"), CASES.values(), ids=CASES)
def test_what_lies_in_another(before: Tree, now: Tree, image: Tree, expected: Tree, told: list[str]) -> None:
    result, done = merged(before, now, image)
    assert result == expected
    assert [each.path for each in conflicts(done)] == told


def test_what_is_linked_to_what_is_the_images_business() -> None:
    """That nobody has changed a file is seen without looking for what else is the same file."""
    lone = entry("file one")
    both = lone.replace(link="a")
    old = {"": entry("directory"), "a": lone}
    new = {"": entry("directory"), "a": both, "b": both}
    result, done = merged(old, old, new)
    assert result == new
    assert done.conflicts == []
    assert merged(new, {path: each.alone for path, each in new.items()}, old)[0] == old


def test_to_another_image_and_back() -> None:
    """What the other image happens to have as somebody wants it is not taken away by the way back."""
    one = tree(changed="file one", deleted="file one", d__deleted="file one", plain="file one")
    two = tree(changed="file two", plain="file two")
    mine = tree(changed="file two", plain="file one")
    there, done = merged(one, mine, two)
    assert there == two
    assert done.diverged == {
        "changed": entry("file two"),
        **dict.fromkeys(("d", "d/deleted", "deleted")),
    }
    back, done = merged(two, there, one, done.diverged)
    assert back == mine
    assert done.conflicts == []
    assert merged(two, there, one)[0] == one, "without a memory of it nobody could tell"


def test_what_is_changed_in_the_other_image_counts_there() -> None:
    one, two = tree(f="file one"), tree(f="file two")
    there, done = merged(one, tree(), two)
    assert there == tree(), "deleted"
    assert [each.path for each in done.conflicts] == ["f"]
    restored = tree(f="file two")
    assert merged(two, restored, one, done.diverged)[0] == one


@settings(max_examples=500, deadline=None)
@given(trees(), trees(), trees())
def test_any_trees(before: Tree, now: Tree, image: Tree) -> None:
    result, done = merged(before, now, image)

    check(before, now, image, result, done.conflicts)


@settings(max_examples=500, deadline=None)
@given(trees(), trees(), trees())
def test_any_trees_to_another_image_and_back(one: Tree, now: Tree, two: Tree) -> None:
    there, done = merged(one, now, two)
    back, _ = merged(two, there, one, done.diverged)
    for path in {*one, *now, *two}:
        if path in now:
            assert back.get(path) == now[path] or (now[path] == one.get(path) and two.get(path) != one[path])
        elif path in one:
            assert path not in back, "what was deleted stays deleted"
    again, _ = merged(one, back, two)
    assert merged(two, again, one, done.diverged)[0] == back


@settings(max_examples=200, deadline=None)
@given(trees(), trees())
def test_what_only_one_side_has_changed(old: Tree, new: Tree) -> None:
    for before, now, image, expected in ((old, old, new, new), (old, new, old, new), (old, new, new, new)):
        result, done = merged(before, now, image)
        assert result == expected
        assert done.conflicts == []
