"""Which partition a step grows, and which file system it leaves alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fakes import partition

from immucore import stage_growth, syscalls
from immucore.devices import HOME_FIRST, Device, Devices, Wanted
from immucore.errors import DeviceError
from immucore.stage_tools import StepError

STATE = Wanted(spec="LABEL=COS_STATE", timeout_sec=1, home=HOME_FIRST)
HERE = partition(2, "COS_STATE"), partition(4, "COS_PERSISTENT")
ELSEWHERE = partition(1, "COS_PERSISTENT", disk="/dev/vdb")
LUKS = HERE[1].replace(fstype="crypto_LUKS", label="")


def chosen(*devices: Device) -> str | None:
    found = stage_growth.labelled("COS_PERSISTENT", STATE, lambda: Devices(all=devices), None)
    return found.path if found else None


def test_it_is_on_the_disk_of_the_state() -> None:
    assert chosen(*HERE, ELSEWHERE) == "/dev/vda4"
    with pytest.raises(DeviceError, match="cannot find a filesystem labelled 'COS_PERSISTENT'"):
        chosen(HERE[0], ELSEWHERE)
    with pytest.raises(StepError, match="nobody knows the disk"):
        chosen(ELSEWHERE)


def test_a_container_on_the_disk_of_the_state_is_nothing_to_do() -> None:
    assert chosen(HERE[0], LUKS, ELSEWHERE) is None
    opened = HERE[1].replace(path="/dev/mapper/luks-x", parent="")
    assert chosen(HERE[0], LUKS.replace(holders=("/dev/mapper/luks-x",)), opened) is None


def test_what_is_not_there_yet_is_waited_for() -> None:
    asked: list[str] = []

    def wait(wanted: Wanted) -> Devices:
        asked.append(wanted.spec)
        return Devices(all=HERE)

    early = Devices(all=(HERE[0], ELSEWHERE))
    found = stage_growth.labelled("COS_PERSISTENT", STATE, lambda: early, wait)
    assert (found, asked) == (HERE[1], ["LABEL=COS_PERSISTENT"])


def test_a_link_by_label_is_a_label() -> None:
    asked: list[str] = []

    def find(label: str) -> None:
        asked.append(label)

    assert stage_growth.expand(("path", "/dev/disk/by-label/a\\x20b", 0), find) == ""
    assert asked == ["a b"]


def test_a_file_system_that_fills_its_partition_or_is_damaged_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True)
    mounted: list[str] = []

    def mount(source: str, *_: object, **__: object) -> int:
        mounted.append(source)
        raise PermissionError(1, "no")

    monkeypatch.setattr(syscalls, "detached_mount", mount)
    assert stage_growth._grow_file_system(str(image)) == ""
    with image.open("r+b") as file:
        file.truncate(16 << 20)
        file.seek(1024 + 58)
        file.write(b"\2\0")
    said = stage_growth._grow_file_system(str(image))
    assert said == f"{image} contains a file system with errors: it is not grown before it was checked"
    assert mounted == []
    with image.open("r+b") as file:
        file.seek(1024 + 58)
        file.write(b"\1\0")
    with pytest.raises(PermissionError):
        stage_growth._grow_file_system(str(image))
