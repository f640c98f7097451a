"""The frozen programs: each runs on a machine that has nothing but the C library, and has what it should."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import native
import pytest
from PyInstaller.archive.readers import CArchiveReader

from immucore import __version__

ACTIVE = native.ROOT / "tests/golden/cos-active"
# glibc's own, and zlib, which PyInstaller's launcher itself is linked to.
MACHINE = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libutil.so.1",
    "libz.so.1",
}
MACHINE |= {"libresolv.so.2", "ld-linux-x86-64.so.2"}


def libraries(bundle: Path) -> set[Path]:
    """Name what the files of a bundle need of the machine."""
    found = set()
    for path in bundle.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.open("rb").read(4) == b"\x7fELF":
            said = native.command("env", f"LD_LIBRARY_PATH={bundle}/_internal", "ldd", path)
            assert "not found" not in said
            found |= {Path(name) for name in re.findall(r"(/\S+) \(0x", said)}
    return {path for path in found if not path.is_relative_to(bundle)}


@pytest.fixture(scope="session")
def boot() -> Path:
    return native.build_bundle()


@pytest.fixture(scope="session")
def system() -> Path:
    return native.build_bundle("immucore-system")


@pytest.fixture(params=["boot", "system"])
def bare_machine(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Make a root with a program, the C library, and nothing else: no /proc, no /dev, no /tmp."""
    native.require_root()
    bundle: Path = request.getfixturevalue(request.param)
    root = tmp_path / "root"
    for library in libraries(bundle):
        assert library.name in MACHINE
        (root / library.parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
        native.command("cp", "-L", library, root / library.relative_to("/"))
    for folder in ("bin", "lib"):
        (root / "usr" / folder).mkdir(parents=True, exist_ok=True)
    native.command("cp", "-a", bundle, root / "usr/lib")
    (root / "usr/bin/immucore").symlink_to(f"../lib/{bundle.name}/immucore")
    native.command("cp", "-r", ACTIVE, root / "asked")
    (root / "empty").mkdir()
    return root


def run(root: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = ["env", "-i", "PATH=/usr/bin:/bin:/usr/sbin", "chroot", root, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


PLAN = ("plan", "--cmdline", "/asked/cmdline", "--devices", "/asked/devices", "--root", "/empty")


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (("--version",), f"immucore {__version__}\n"),
        (("self-test",), "self-test: every module and library loads\n"),
        (PLAN, "".join(re.findall(r"^(?!    because).*\n", (ACTIVE / "plan").read_text(), re.MULTILINE))),
    ],
)
def test_a_program_needs_nothing_but_the_c_library(
    bare_machine: Path, words: list[str], output: str
) -> None:
    said = run(bare_machine, ["immucore", *words])
    assert (said.returncode, said.stdout, said.stderr) == (0, output, "")


@pytest.mark.parametrize("bare_machine", ["boot"], indirect=True)
def test_the_launcher_of_a_boot_runs_once(bare_machine: Path) -> None:
    """As systemd starts it; otherwise it runs itself again, with the environment that the service has."""

    def starts(*environment: str) -> int:
        command = ["env", "-i", "LD_DEBUG=files", *environment, "/usr/sbin/chroot", bare_machine]
        said = subprocess.run(
            [*command, "/usr/lib/immucore/immucore", "--version"], capture_output=True, text=True, check=True
        )
        assert said.stdout == f"immucore {__version__}\n"
        return said.stderr.count("initialize program: /usr/lib/immucore/immucore")

    ours = native.service_environment("/usr/lib/immucore")
    assert starts(*ours) == 1
    assert starts() == 2
    assert starts(*[word.replace("/immucore", "/elsewhere") for word in ours]) == 2


def modules(bundle: Path) -> set[str]:
    return {*CArchiveReader(str(bundle / "immucore")).open_embedded_archive("PYZ.pyz").toc}


def test_the_initramfs_has_nothing_of_the_booted_system(boot: Path, system: Path) -> None:
    ours = {name for name in modules(boot) if name.split(".")[0] == "immucore"}
    more = {name for name in modules(system) - ours if name.split(".")[0] == "immucore"}
    assert ours < modules(system)
    assert "immucore.system.commands" in more
    assert all(f"{name}.".startswith("immucore.system.") for name in more)
    assert not modules(boot) & {"rich", "ssl", "urllib.request", "tarfile", "yaml.constructor"}
    assert not [*boot.rglob("libcrypto*"), *boot.rglob("libssl*")]


def test_the_booted_system_can_do_tls(system: Path) -> None:
    """OpenSSL comes with the program: an image need not have it, nor the version it was built for."""
    assert {"ssl", "tarfile", "json", "rich.progress", "yaml.constructor"} <= modules(system)
    assert {"libcrypto.so.3", "libssl.so.3"} <= {path.name for path in system.rglob("lib*.so.*")}
