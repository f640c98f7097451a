"""SIGTERM in the middle of a boot, wherever that is: a failed boot, which a second run can continue."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from native import ACTIVE, ROOT, SOURCE, Boot, Machine

GUARD = ROOT / "dracut-module/50immucore/immucore-guard"
LAYOUT = 'PERSISTENT_STATE_PATHS="/var /home"\nPERSISTENT_STATE_BIND=true\n'
MESSAGE = "stopped by signal 15 in the middle of the boot"
# During the boot's n-th system call of this name: the state partition, the image, OEM, overlays, the volume,
# the binds are mounted; paths looked up, directories made; what is kept is copied, its copy renamed.
MOMENTS = [
    ("mount", 1),
    ("mount", 2),
    ("mount", 3),
    ("mount", 6),
    ("mount", 9),
    ("mount", 11),
    ("openat2", 4),
    ("mkdir", 3),
    ("symlink", 1),
    ("rename", 1),
]


def interrupted(call: str, number: int) -> tuple[str, ...]:
    """Return the command of an agent that is sent SIGTERM during a system call."""
    injected = f"inject={call}:signal=SIGTERM:when={number}"
    return ("strace", "--output=/dev/null", f"--trace={call}", "-e", injected, *SOURCE)


def table(boot: Boot) -> list[tuple[str, ...]]:
    return sorted((mount.target, mount.fstype, mount.root, *mount.options) for mount in boot.mounts)


@pytest.mark.parametrize(("call", "number"), MOMENTS, ids=[f"{call}-{number}" for call, number in MOMENTS])
def test_a_second_run_goes_on_after_sigterm(
    switch_on: Callable[[], Machine], call: str, number: int
) -> None:
    machine = switch_on()
    with machine.image() as root:
        (root / "etc/cos/cos-layout.env").write_text(LAYOUT)
        names = sorted(str(path.relative_to(root)) for path in (root / "var").rglob("*"))

    stopped = machine.boot(ACTIVE, interrupted(call, number))

    assert stopped.status == 4, stopped.stderr
    assert stopped.result["outcome"] == "failed"
    assert stopped.result["exit_status"] == 4
    assert stopped.result["error"]["message"] == MESSAGE
    assert f"immucore: {MESSAGE}" in stopped.console
    assert "Traceback" not in stopped.stderr + stopped.console
    assert not machine.path("/run/cos/active_mode").exists()
    guard = subprocess.run(machine.inside("sh", GUARD), capture_output=True, text=True, check=False)
    assert guard.returncode == 1

    second = machine.boot(ACTIVE, SOURCE)

    assert second.status == 0, second.stderr
    assert second.result["outcome"] == "ok"
    assert machine.path("/run/cos/active_mode").read_text() == "1"
    assert not machine.path("/run/immucore/summary").exists()
    machine.run("sh", GUARD)
    kept = Path(machine.path("/sysroot/var"))
    assert sorted(f"var/{path.relative_to(kept)}" for path in kept.rglob("*")) == sorted(
        [*names, "var/log/audit"]
    )
    fstab = machine.path("/sysroot/etc/fstab").read_text()
    undisturbed = switch_on()
    assert table(undisturbed.boot(ACTIVE, SOURCE)) == table(second)
    assert undisturbed.path("/sysroot/etc/fstab").read_text() == fstab
