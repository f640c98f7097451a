"""The system calls: what they answer, and that each failure is an OSError with the number and the path."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from immucore import syscalls


@pytest.fixture
def root(tmp_path: Path) -> int:
    """Open a directory with a file, and a symlink that leads out of it."""
    (tmp_path / "file").write_text("inside")
    (tmp_path / "out").symlink_to("../../../file")
    return os.open(tmp_path, os.O_PATH)


def test_openat2_stays_below_the_directory(root: int) -> None:
    for path in ("file", "/file", "../file", "out"):
        descriptor = syscalls.openat2(root, path, os.O_RDONLY)
        assert os.read(descriptor, 9) == b"inside"
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_openat2_gives_its_flags_and_its_way_to_resolve_to_the_kernel(root: int) -> None:
    no_symlinks = 0x04
    with pytest.raises(OSError, match="out") as failure:
        syscalls.openat2(root, "out", os.O_RDONLY, no_symlinks)
    assert failure.value.errno == errno.ELOOP
    with pytest.raises(NotADirectoryError):
        syscalls.openat2(root, "file", os.O_RDONLY | os.O_DIRECTORY)


def test_names_that_are_not_utf8(root: int, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff")).touch()
    os.close(syscalls.openat2(root, os.fsdecode(b"\xff"), os.O_RDONLY))


def test_syncfs(root: int, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    syscalls.syncfs(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize(
    ("call", "number", "path"),
    [
        (lambda root: syscalls.openat2(root, "nowhere", os.O_RDONLY), errno.ENOENT, "nowhere"),
        (lambda root: syscalls.openat2(-1, "file", os.O_RDONLY), errno.EBADF, "file"),
        (lambda root: syscalls.openat2(root, "file", os.O_RDONLY, 1 << 40), errno.EINVAL, "file"),
        (lambda root: syscalls.mount("none", "/nowhere", "tmpfs", 0, ""), errno.ENOENT, "/nowhere"),
        (syscalls.syncfs, errno.EBADF, ""),  # O_PATH
    ],
)
def test_a_failure_has_its_number_and_path(
    root: int, call: Callable[[int], object], number: int, path: str
) -> None:
    with pytest.raises(OSError, match=r".") as failure:
        call(root)
    assert (failure.value.errno, failure.value.filename) == (number, path)
    assert failure.value.strerror == os.strerror(number)
