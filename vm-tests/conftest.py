"""Fixtures of the VM tests: everything is built, with visible progress, before the first test starts."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import derivative
import disk as disks
import pytest
from machine import Machine

RACES, CYCLES = (
    1,
    2,
)  # without --boots: machines that are made to race, machines that are switched on and off
CONSOLE_LINES = 60  # of a failed test's console, in pytest's output
WORK = pytest.StashKey[Path]()
FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make soak` ask for more boots of what must go well every time."""
    parser.addoption("--boots", type=int, help="how often a soak test boots its machine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `boot`, the number of the boot, so many times: `pytest -m soak`."""
    if "boot" in metafunc.fixturenames:
        boots = [
            pytest.param(number, marks=pytest.mark.soak, id=f"boot{number}")
            for number in range(metafunc.config.getoption("--boots") or RACES)
        ]
        metafunc.parametrize("boot", boots)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build what nearly every test needs, in one process, before the workers of pytest -n start."""
    if hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    derivative.require_tools()
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        build("bookworm")


def build(suite: str) -> None:
    """Build a derivative: its initramfs images and its ordinary disk."""
    for variant in derivative.VARIANTS:
        derivative.reporting_initramfs(suite, variant)
    disks.cos_disk(suite=suite)
    disks.plain_disk(suite)


@pytest.fixture(scope="session")
def disk() -> disks.Disk:
    """Return the ordinary cOS disk of a Debian 12 derivative; all tests share it, no boot changes it."""
    return disks.cos_disk()


@pytest.fixture(scope="session")
def plain_disk() -> disks.Disk:
    """Return a disk with the same root on a plain ext4 partition."""
    return disks.plain_disk()


@pytest.fixture(scope="session")
def trixie_disk() -> disks.Disk:
    """Return the ordinary cOS disk of a Debian 13 derivative, built when the first test wants it."""
    derivative.reporting_initramfs("trixie", "systemd")
    return disks.cos_disk(suite="trixie")


@pytest.fixture
def boots(request: pytest.FixtureRequest) -> int:
    """Return how often a soak test boots its machine."""
    return request.config.getoption("--boots") or CYCLES


@pytest.fixture
def work(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return a directory for a test's files; build/vm/failed/<test> keeps its evidence if it fails."""
    name = re.sub(r"[^\w.-]+", "-", request.node.name)
    path = derivative.CACHE / "run" / name
    kept = derivative.CACHE / "failed" / name
    for old in (path, kept):
        derivative.remove(old)
    path.mkdir(parents=True)
    request.node.stash[WORK] = path
    yield path
    if request.node.stash.get(FAILED, False):
        for evidence in [*path.rglob("console.*"), *path.rglob("report.*")]:
            target = kept / evidence.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            evidence.rename(target)
    shutil.rmtree(path)


@pytest.fixture
def machine(work: Path) -> Callable[..., Machine]:
    """Return Machine, with the test's directory filled in."""
    return functools.partial(Machine, work=work)


@pytest.fixture
def cos_disk(work: Path) -> Callable[..., disks.Disk]:
    """Return what makes a disk of the test's own, as in `cos_disk(without=("oem",))`."""
    return functools.partial(disks.cos_disk, work / "disk.raw")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the console of a failed test, and keep its files."""
    outcome = yield
    if outcome.failed and WORK in item.stash:
        item.stash[FAILED] = True
        for console in sorted(item.stash[WORK].rglob("console.*")):
            lines = console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
            where = derivative.CACHE / "failed" / console.relative_to(derivative.CACHE / "run")
            outcome.sections.append((str(where), "\n".join(lines)))
    return outcome
