"""The environment block as a file: in place, durable, repaired where it is damaged."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from immucore import grubenv
from immucore.errors import CmdlineError, MountError
from immucore.system.environment import Environment

WHOLE = grubenv.render({"saved_entry": "active"})


def test_a_missing_block_is_made(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    assert environment.read() == {}
    assert environment.problem == "it is missing"
    assert not environment.intact
    environment.write({"tries_x": "3"})
    assert environment.intact
    assert environment.read() == {"tries_x": "3"}
    assert os.stat(environment.path).st_size == 1024


def test_a_block_is_changed_in_place(tmp_path: Path) -> None:
    path = tmp_path / "grubenv"
    path.write_bytes(WHOLE)
    before = os.stat(path)
    with open(path, "rb") as held:
        Environment(path).write({"next_entry": "recovery"})
        assert grubenv.parse(held.read()) == {"next_entry": "recovery"}
    assert os.stat(path).st_ino == before.st_ino
    assert os.listdir(tmp_path) == ["grubenv"]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (b"", "it has not the size of 1024 bytes"),
        (WHOLE[:-1], "it has not the size of 1024 bytes"),
        (WHOLE + b"#", "it has not the size of 1024 bytes"),
        (b"\0" * 1024, "it does not begin as an environment block"),
        (b"#" * 1024, "it does not begin as an environment block"),
        (WHOLE[:512] + b"\0" * 512, "it does not end as an environment block"),
        (WHOLE[:-5] + b"x=1\0#", "it does not end as an environment block"),
        (WHOLE[:-5] + b"x=123", "it does not end as an environment block"),
    ],
)
def test_a_damaged_block_is_told_and_repaired(block: bytes, problem: str, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    environment.path.write_bytes(block)
    assert environment.problem == problem
    environment.write({})
    assert environment.path.read_bytes() == grubenv.render({})


@pytest.mark.parametrize("block", [WHOLE, grubenv.SIGNATURE + b"# WARNING: a tool's\n" + b"#" * 979])
def test_an_intact_block(block: bytes, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    environment.path.write_bytes(block)
    assert environment.intact


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    environment.path.write_bytes(WHOLE)
    with pytest.raises(CmdlineError) as caught:
        environment.write({"extra_cmdline": "x" * 1000})
    assert caught.value.message == (
        f"cannot write '{environment.path}': 16 bytes too many for the environment block of GRUB"
    )
    assert f"grub-editenv {environment.path} unset NAME" in caught.value.hint
    assert environment.path.read_bytes() == WHOLE


@pytest.mark.parametrize("kind", ["symlink", "directory", "pipe"])
def test_what_is_no_file_is_neither_read_nor_followed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "grubenv"
    if kind == "symlink":
        (tmp_path / "elsewhere").write_bytes(WHOLE)
        path.symlink_to("elsewhere")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert Environment(path).read() == {}
    assert Environment(path).problem
    with pytest.raises(MountError, match=f"cannot write '{path}': "):
        Environment(path).write({})


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MountError) as caught:
        Environment(tmp_path / "oem/grubenv").write({})
    assert caught.value.message == f"cannot write '{tmp_path}/oem/grubenv': No such file or directory"
    assert caught.value.hint == f"COS_OEM has to be mounted there, read-write: findmnt {tmp_path}/oem"


def test_a_change_keeps_what_it_does_not_change(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    environment.path.write_bytes(WHOLE)
    environment.update(lambda values: {**values, "next_entry": "recovery"})
    assert environment.read() == {"saved_entry": "active", "next_entry": "recovery"}


def test_a_change_that_is_none_writes_nothing(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    environment.path.write_bytes(WHOLE)
    os.utime(environment.path, (1, 1))
    environment.update(lambda values: values)
    assert os.stat(environment.path).st_mtime == 1


@pytest.mark.parametrize("block", [None, bytes(1024)], ids=["missing", "zeros"])
def test_a_change_that_is_none_repairs_what_is_damaged(block: bytes | None, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    if block is not None:
        environment.path.write_bytes(block)
    environment.update(lambda values: values)
    assert environment.path.read_bytes() == grubenv.render({})


def test_changes_wait_for_each_other(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")

    def add_one(values: dict[str, str]) -> dict[str, str]:
        number = int(values.get("number", 0))
        time.sleep(0.01)
        return {**values, "number": str(number + 1)}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(environment.update, [add_one] * 16))
    assert environment.read() == {"number": "16"}


def test_a_change_without_the_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=r"cannot write '.*/oem/grubenv': No such file or directory"):
        Environment(tmp_path / "oem/grubenv").update(lambda values: values)
