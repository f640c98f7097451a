"""Cloud-init stages on a real disk: what the image's, OEM's and the command line's ask for is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from native import ACTIVE, RECOVERY, SOURCE, Boot, Machine, command

STOCK = Path(__file__).with_name("stages")
# What the stages run in the new root: the programs that a step may need, with their libraries.
PROGRAMS = ("sh", "cat", "id", "touch", "mkdir", "echo", "ls", "grep", "sleep", "readlink", "chroot")


def oem(machine: Machine, **files: str) -> None:
    """Put cloud-init files on OEM, by their names without suffix."""
    with machine.partition("oem") as root:
        for name, text in files.items():
            (root / f"{name}.yaml").write_text(text)


def programs(root: Path, *names: str) -> None:
    """Put programs of the host with their libraries into a new root."""
    for name in (*PROGRAMS, *names):
        path = shutil.which(name)
        assert path, name
        real = Path(path).resolve()
        place = root / "usr/bin" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(real, place)
        for word in command("ldd", real).split():
            if word.startswith("/") and not (root / word[1:]).exists():
                (root / word[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(Path(word).resolve(), root / word[1:])
    if not (root / "bin").exists():
        (root / "bin").symlink_to("usr/bin")


def failures(boot: Boot) -> list[str]:
    return list(boot.result["degraded"])


def text(machine: Machine, path: str) -> str:
    return machine.path(path).read_text()


LAYOUT = """\
name: layout
stages:
  rootfs:
    - if: '[ ! -f /run/cos/recovery_mode ]'
      name: Layout configuration
      environment_file: /run/cos/cos-layout.env
      environment:
        VOLUMES: "LABEL=COS_PERSISTENT:/usr/local"
        RW_PATHS: "/etc /srv"
        PERSISTENT_STATE_PATHS: "/var /home"
        PERSISTENT_STATE_BIND: "true"
    - if: '[ -f /run/cos/recovery_mode ]'
      environment_file: /run/cos/cos-layout.env
      environment:
        RW_PATHS: /etc
"""


def test_a_layout_that_a_stage_writes_takes_effect(machine: Machine, agent: Sequence[str]) -> None:
    with machine.image() as root:
        (root / "system/oem").mkdir(parents=True)
        (root / "system/oem/00_layout.yaml").write_text(LAYOUT)

    boot = machine.boot(ACTIVE, agent)

    assert boot.result["outcome"] == "ok", boot.stderr
    kinds = {mount.target: mount.fstype for mount in boot.mounts}
    assert [path for path, kind in kinds.items() if kind == "overlay"] == ["/sysroot/etc", "/sysroot/srv"]
    assert {"/sysroot/var", "/sysroot/home", "/sysroot/usr/local"} <= {*kinds}
    assert os.readlink(machine.path("/system")) == "/sysroot/system"
    assert text(machine, "/run/cos/active_mode") == "1"
    assert boot.outcomes()["stage /system/oem/00_layout.yaml"] == "done"


def test_recovery_has_its_own(machine: Machine) -> None:
    oem(machine, layout=LAYOUT)

    boot = machine.boot(RECOVERY.replace("squashfs", "img"), SOURCE)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert [m.target for m in boot.mounts if m.fstype == "overlay"] == ["/sysroot/etc"]
