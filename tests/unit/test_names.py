"""The names of the directories in which changes are kept; systemd-escape is the reference."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore.layouts.cos.names import _escaped, directory_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], []),
        (["/etc"], ["etc"]),
        (["/var/log", "/var/lib/foo"], ["var-log", "var-lib-foo"]),
        (["/var/lib-foo"], ["var-lib-foo"]),
        (["/var/lib/foo", "/var/lib-foo"], ["var-lib-foo", r"var-lib\x2dfoo"]),
        (["/a/b/c", "/a-b/c", "/a/b-c"], ["a-b-c", r"a\x2db-c", r"a-b\x2dc"]),
        (["/my data/.x"], ["my data-.x"]),
    ],
)
def test_names(paths: list[str], names: list[str]) -> None:
    assert list(directory_names(paths).values()) == names


COMPONENT = st.text("abc-._:", min_size=1, max_size=4).filter(lambda part: part not in (".", ".."))
PATHS = st.lists(COMPONENT, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))


@given(paths=st.sets(PATHS, max_size=8))
def test_no_two_paths_share_a_directory(paths: set[str]) -> None:
    names = directory_names(sorted(paths))
    assert set(names) == paths
    assert len({*names.values()}) == len(paths)
    assert all(name and "/" not in name and name not in (".", "..") for name in names.values())


@given(paths=st.sets(PATHS, min_size=1, max_size=8))
def test_a_name_does_not_depend_on_the_order(paths: set[str]) -> None:
    assert directory_names(sorted(paths)) == directory_names(sorted(paths, reverse=True))


def test_escaped_as_systemd_escapes() -> None:
    paths = [
        "/var/lib-foo",
        "/.hidden/.x",
        "/a b",
        "/ä/é",
        "/x:y_z.w",
        "/a--b/-",
        "/tab\tx",
        "/#",
        "/a\\b",
        "/%",
        "/~",
    ]
    said = subprocess.run(
        ["systemd-escape", "--path", "--", *paths], capture_output=True, text=True, check=True
    ).stdout
    assert [_escaped(path) for path in paths] == said.split()
