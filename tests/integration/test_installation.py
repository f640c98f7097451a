"""What `make install` puts into a derivative."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import native
import pytest

SYSTEM = native.ROOT / "dracut-module/system"


def install(root: Path) -> None:
    native.command("make", "-C", native.ROOT, "install", f"DESTDIR={root}")


@pytest.fixture(scope="module")
def derivative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native.build_bundle()
    native.build_bundle("immucore-system")
    root = tmp_path_factory.mktemp("derivative")
    install(root)
    return root


def test_the_program_of_the_booted_system_is_the_one_in_the_path(derivative: Path) -> None:
    assert (derivative / "usr/bin/immucore").readlink() == Path("../lib/immucore-system/immucore")
    assert native.command(derivative / "usr/bin/immucore", "--version").startswith("immucore ")
    assert native.command(derivative / "usr/lib/immucore/immucore", "--version").startswith("immucore ")


def test_installed_again_it_leaves_what_is_a_derivatives(derivative: Path) -> None:
    check = derivative / "usr/lib/immucore/checks.d/network"
    check.touch()
    stale = [derivative / "usr/lib" / name / "_internal/old.so" for name in ("immucore", "immucore-system")]
    for path in stale:
        path.touch()

    install(derivative)

    assert check.exists()
    assert not [path for path in stale if path.exists()]
    check.unlink()


def test_units_are_where_systemd_looks_and_enabled_where_they_say(derivative: Path) -> None:
    folder = derivative / "usr/lib/systemd/system"
    files = [path for path in SYSTEM.rglob("*") if path.is_file()]
    for path in files:
        inside = path.relative_to(SYSTEM)
        copy = folder / inside if len(inside.parts) == 1 else derivative / "usr/lib/systemd" / inside
        assert copy.read_text() == path.read_text()
        assert copy.stat().st_mode & 0o777 == 0o644
        for target in " ".join(re.findall(r"^WantedBy=(.*)", path.read_text(), re.MULTILINE)).split():
            assert (folder / f"{target}.wants" / path.name).resolve() == copy.resolve()


def test_without_the_programs_it_says_what_to_type(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-C", native.ROOT, "install", f"DESTDIR={tmp_path}/root", f"BUNDLES={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert f"{tmp_path}/immucore is not there: run 'make freeze' first" in done.stderr
    assert not (tmp_path / "root").exists()
