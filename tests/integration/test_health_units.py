"""The units of the booted system that judge its health, as systemd itself reads them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEM = Path(__file__).parents[2] / "dracut-module/system"
UNIT = "immucore-health.service"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Install the units beside those of the host, as `make install` does."""
    shutil.copytree(SYSTEM / "system", tmp_path / "units")
    (tmp_path / "units/sysinit.target.wants").mkdir()
    (tmp_path / "units/sysinit.target.wants" / UNIT).symlink_to(f"../{UNIT}")
    text = (SYSTEM / UNIT).read_text()
    assert "ExecStart=/usr/bin/immucore boot verdict\n" in text
    (tmp_path / "units" / UNIT).write_text(text.replace("/usr/bin/immucore", "/usr/bin/true"))
    return tmp_path / "units"


def verify(units: Path, *names: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names],
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{units}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("target", ["multi-user.target", "graphical.target", "rescue.target"])
def test_systemd_finds_no_fault_and_no_cycle(units: Path, target: str) -> None:
    assert verify(units, target, UNIT, "boot-complete.target") == ""


def test_a_cycle_would_be_found(units: Path) -> None:
    (units / "multi-user.target.d").mkdir()
    (units / "multi-user.target.d/test.conf").write_text("[Unit]\nAfter=boot-complete.target\n")
    assert "ordering cycle" in verify(units, "multi-user.target", UNIT)


def test_the_watchdog_is_configured_where_systemd_looks(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/systemd"
    shutil.copytree(SYSTEM / "system.conf.d", folder / "system.conf.d")
    done = subprocess.run(
        ["systemd-analyze", f"--root={tmp_path}", "cat-config", "systemd/system.conf"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "RuntimeWatchdogSec=30\nRebootWatchdogSec=2min\n" in done.stdout
