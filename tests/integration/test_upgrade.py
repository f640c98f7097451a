"""Upgrades of a machine on a real disk: from every slot, cut off anywhere, with everything that can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import native
import pytest
import upgrading
from immucore import bootcount
from upgrading import Upgradable

Boot = Callable[[str], Upgradable]


@pytest.fixture(scope="module")
def upgradable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native.require_root()
    folder = tmp_path_factory.mktemp("upgradable")
    versions = {"active": "a", "passive": "p", "recovery": "r"}
    upgrading.make_disk(folder / "disk.img", folder / "work", versions)
    return folder / "disk.img"


@pytest.fixture
def program(source: Sequence[str]) -> Sequence[str]:
    return (*source[:-2], "immucore.system")


@pytest.fixture
def boot(upgradable: Path, tmp_path: Path, program: Sequence[str]) -> Iterator[Boot]:
    disk = tmp_path / "disk.img"
    native.command("cp", "--sparse=always", upgradable, disk)
    machines: list[native.Machine] = []

    def switch_on(slot: str) -> Upgradable:
        while machines:
            machines.pop().__exit__()
        machines.append(native.Machine(tmp_path / "machine", disk))
        return Upgradable(machines[0], slot, program)

    yield switch_on
    while machines:
        machines.pop().__exit__()


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the next version."""
    return upgrading.make_tree(tmp_path_factory.mktemp("new") / "tree", "n")


def test_from_active(boot: Boot, new: Path) -> None:
    here = boot("active")
    before = here.images()
    here.set(bootcount.verdict(bootcount.armed(before["active"])))
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    after = here.images()
    assert after == {
        "active": ran.result["image_id"],
        "passive": before["active"],
        "recovery": before["recovery"],
    }
