"""The machine that the integration tests boot: one disk for all, and a copy of it for each test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import native
import upgrading

MakeMachine = Callable[..., native.Machine]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cOS disk once."""
    native.require_root()
    folder = tmp_path_factory.mktemp("disk")
    native.make_disk(folder / "disk.img", folder / "work")
    return folder / "disk.img"


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> Sequence[str]:
    """Give the command of the agent from source, with its coverage measured if that of the tests is."""
    if not request.config.pluginmanager.hasplugin("_cov"):
        return native.SOURCE
    return (native.SOURCE[0], "-m", "coverage", "run", "--parallel-mode", *native.SOURCE[1:])


@pytest.fixture(scope="session")
def frozen() -> Sequence[str]:
    """Give the command of the frozen agent, made from the source as it is now."""
    native.build_bundle()
    return native.FROZEN


@pytest.fixture(params=["source", "frozen"])
def agent(request: pytest.FixtureRequest) -> Sequence[str]:
    """Run a test with either agent."""
    command: Sequence[str] = request.getfixturevalue(request.param)
    return command


@pytest.fixture
def disk(template: Path, tmp_path: Path) -> Path:
    """Give a test a disk of its own, to keep over several boots."""
    path = tmp_path / "disk.img"
    native.command("cp", "--sparse=always", template, path)
    return path


@pytest.fixture
def switch_on(disk: Path, tmp_path: Path) -> Iterator[MakeMachine]:
    """Switch a machine with the test's disk on; the one before is switched off then."""
    machines: list[native.Machine] = []

    def make() -> native.Machine:
        while machines:
            machines.pop().__exit__()
        machines.append(native.Machine(tmp_path / "machine", disk))
        return machines[0]

    yield make
    while machines:
        machines.pop().__exit__()


@pytest.fixture
def machine(switch_on: MakeMachine) -> native.Machine:
    """Switch a machine on."""
    return switch_on()


@pytest.fixture(scope="session")
def upgradable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a disk once whose images can be upgraded."""
    native.require_root()
    folder = tmp_path_factory.mktemp("upgradable")
    versions = {"active": "a", "passive": "p", "recovery": "r"}
    upgrading.make_disk(folder / "disk.img", folder / "work", versions)
    return folder / "disk.img"


@pytest.fixture(scope="session")
def program(source: Sequence[str]) -> Sequence[str]:
    """Give the command of the booted system, from source."""
    return (*source[:-2], "immucore.system")


@pytest.fixture
def boot(upgradable: Path, tmp_path: Path, program: Sequence[str]) -> Iterator[upgrading.Boot]:
    """Boot a slot of the test's own disk; the machine before is switched off then."""
    disk = tmp_path / "disk.img"
    native.command("cp", "--sparse=always", upgradable, disk)
    machines: list[native.Machine] = []

    def switch_on(slot: str) -> upgrading.Upgradable:
        while machines:
            machines.pop().__exit__()
        machines.append(native.Machine(tmp_path / "machine", disk))
        return upgrading.Upgradable(machines[0], slot, program)

    yield switch_on
    while machines:
        machines.pop().__exit__()


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the next version."""
    return upgrading.make_tree(tmp_path_factory.mktemp("new") / "tree", "n")


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the version after it."""
    return upgrading.make_tree(tmp_path_factory.mktemp("newer") / "tree", "nn")
