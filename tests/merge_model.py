"""A simple model of the three-way merge: trees of a few versions, and what has to hold of any result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hypothesis import strategies as st

from immucore.merge import Conflict, Entry

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


def is_whole(result: Tree) -> bool:
    return all(
        result.get(path.rpartition("/")[0], entry("file one")).kind == "directory" for path in result if path
    )


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


def check(before: Tree, now: Tree, image: Tree, result: Tree, conflicts: Iterable[Conflict]) -> None:
    """Check the result of a merge, and what is said to be in conflict."""
    assert is_whole(result)
    for path in {*before, *now, *image, *result}:
        old, ours, theirs, got = (each.get(path) for each in (before, now, image, result))
        assert got in (ours, theirs)
        if ours is not None and ours != old:
            assert got == ours, "what somebody has made is never lost"
        if ours is None and old is not None:
            assert got is None, "what somebody has deleted does not come back"
    listed = [*conflicts]
    told = {each.path: each for each in listed}
    assert len(told) == len(listed)
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
