"""What must not get into an initramfs stops its build, and everything else that has to be in it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import derivative
import pytest

# A root, and what is laid over it in a directory that takes all changes; then dracut in it.
BUILD = """
mount --make-rprivate /
mount -t tmpfs tmpfs "$2" && mkdir "$2/upper" "$2/work" "$2/root" && cp -a "$3/." "$2/upper"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
for kernel in proc sys dev; do mount --rbind /$kernel "$2/root/$kernel"; done
for scratch in tmp var/tmp run; do mount -t tmpfs tmpfs "$2/root/$scratch"; done
exec chroot "$2/root" dracut --force --no-hostonly --no-compress --add immucore --kver "$4" $5 /run/initrd
"""


def dracut(work: Path, suite: str, files: Path, options: str = "") -> subprocess.CompletedProcess[str]:
    """Build an initramfs in a derivative's root with `files` laid over it."""
    scratch = work / "scratch"
    scratch.mkdir()
    version = derivative.kernel(suite).name.removeprefix("vmlinuz-")
    words = ["sh", "-ec", BUILD, "sh", derivative.root(suite), scratch, files, version, options]
    return subprocess.run(["unshare", "--mount", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("suite", derivative.SUITES)
def test_library_that_is_missing_fails_the_build(work: Path, suite: str) -> None:
    files = work / "files"
    bundle = files / "usr/lib/immucore/_internal"
    bundle.mkdir(parents=True)
    source, needed = work / "empty.c", work / "libnowhere.so"
    source.touch()
    derivative.run("gcc", "-shared", "-fPIC", source, "-o", needed, "-Wl,-soname,libnowhere.so.7")
    library = bundle / "broken.so"
    derivative.run("gcc", "-shared", "-fPIC", source, "-o", library, "-Wl,--no-as-needed", needed)

    done = dracut(work, suite, files)

    assert done.returncode != 0
    assert "/usr/lib/immucore/_internal/broken.so needs a library that is not there" in done.stderr
    assert "libnowhere.so.7 => not found" in done.stderr


@pytest.mark.parametrize("suite", derivative.SUITES)
def test_systemd_without_dracuts_hooks_fails_the_build(work: Path, suite: str) -> None:
    """They would not run, and what they keep off our devices would not be kept off."""
    files = work / "files"
    files.mkdir()

    done = dracut(work, suite, files, "--omit=dracut-systemd")

    assert done.returncode != 0
    assert "systemd is in this initramfs, and dracut-systemd is not" in done.stderr


@pytest.mark.parametrize("suite", derivative.SUITES)
def test_initramfs_has_what_a_boot_needs(suite: str) -> None:
    unpacked = derivative.unpacked(suite)
    (modules,) = (unpacked / "usr/lib/modules").iterdir()
    built_in = (modules / "modules.builtin").read_text().split()
    names = {Path(name).name.partition(".ko")[0] for name in [*map(str, modules.rglob("*.ko*")), *built_in]}

    assert {"loop", "overlay", "squashfs", "ext4", "erofs", "vfat", "xfs", "btrfs"} <= names
    for path in (
        "usr/lib/immucore/immucore",
        "usr/lib/immucore/immucore-guard",
        "usr/lib/systemd/system-generators/immucore-generator",
        "usr/lib/systemd/system/immucore.service",
    ):
        assert (unpacked / path).is_file()
    unit = (unpacked / "usr/lib/systemd/system/immucore.service").read_text()
    assert "IgnoreOnIsolate=yes\n" in unit
    assert "\nConflicts=" not in unit


@pytest.mark.parametrize("suite", derivative.SUITES)
def test_initramfs_has_nothing_of_the_booted_system(suite: str) -> None:
    root, unpacked = derivative.root(suite), derivative.unpacked(suite)
    assert (root / "usr/bin/immucore").readlink() == Path("../lib/immucore-system/immucore")
    assert (unpacked / "usr/bin/immucore").readlink() == Path("../lib/immucore/immucore")
    assert (root / "usr/lib/immucore/checks.d").is_dir()
    for path in ("usr/lib/immucore-system", "usr/lib/immucore/checks.d"):
        assert not (unpacked / path).exists()
