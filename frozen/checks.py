"""What is frozen, and the checks that a bundle has to pass: each problem raises FreezeError."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from PyInstaller.archive.readers import CArchiveReader

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024


class Program(NamedTuple):
    """What is frozen: by which recipe, from which Python packages, and how big it may be, in MiB."""

    recipe: str
    packages: tuple[str, ...]
    limit_raw: int
    limit_compressed: int


BOOT, SYSTEM, EMPTY = "immucore", "immucore-system", "empty"
PROGRAMS = {
    BOOT: Program("immucore.spec", ("pyroute2", "PyYAML"), 15, 5),
    SYSTEM: Program("system.spec", ("pyroute2", "PyYAML", "rich"), 30, 12),
    EMPTY: Program("immucore.spec", (), 15, 5),
}
# The part of the package that only the booted system has.
SYSTEM_PACKAGE = "immucore.system"
# Each costs milliseconds before a boot has done anything (README.md); branches that need one import it then.
FORBIDDEN_AT_START = {
    *("argparse", "asyncio", "contextlib", "ctypes", "dataclasses", "enum", "functools", "inspect", "json"),
    *("logging", "pathlib", "psutil", "pyroute2", "re", "socket", "subprocess", "typing", "yaml", "zipfile"),
}
# PyInstaller's start-up code, which bootstrap.py replaces in part and relies on for the rest.
LOADER_SHA256 = "20f43e39605c8548746a177a0c0942ccb7aeeb4a64be60d525a50f55419f841d"


class FreezeError(Exception):
    """The bundle cannot be built, or is not fit for a boot."""


def sources(program: str) -> list[Path]:
    """List the files of the package that belong into a program, modules and data."""
    if program == EMPTY:
        return []
    everything = (path for path in (ROOT / "immucore").rglob("*") if path.is_file())
    found = [path for path in everything if path.parent.name != "__pycache__"]
    if program == SYSTEM:
        return found
    return [path for path in found if not path.is_relative_to(ROOT / SYSTEM_PACKAGE.replace(".", "/"))]


def check_loader() -> None:
    """Refuse a PyInstaller whose start-up code is not the one that bootstrap.py was written for."""
    spec = importlib.util.find_spec("PyInstaller.loader")
    if spec is None or spec.origin is None:
        raise FreezeError("cannot find PyInstaller: pip install -e '.[freeze]'")
    digest = hashlib.sha256()
    for path in sorted(Path(spec.origin).parent.glob("*.py")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    if digest.hexdigest() != LOADER_SHA256:
        installed = importlib.metadata.version("pyinstaller")
        raise FreezeError(
            f"bootstrap.py was not written for PyInstaller {installed}, {Path(spec.origin).parent}\n"
            "  hint: read what has changed there since the version in pyproject.toml, adapt bootstrap.py,\n"
            f"  and set LOADER_SHA256 to {digest.hexdigest()}"
        )


def check_exclusions(work: Path) -> None:
    """Refuse a bundle without a module that the agent names, even in a branch the probe does not run."""
    for report in work.rglob("warn-*.txt"):
        for line in report.read_text().splitlines():
            module, _, importers = line.partition(" - imported by ")
            if re.search(r"(^|[ ,])immucore[. ]", importers):
                raise FreezeError(f"the agent imports what the bundle leaves out: {module.split()[-1]}")


def elf_files(bundle: Path) -> list[Path]:
    """List the launcher and the shared libraries."""
    files = (path for path in sorted(bundle.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path for path in files if path.open("rb").read(4) == b"\x7fELF"]


def check(bundle: Path, program: str) -> str:
    """Refuse a bundle that is slow, incomplete, too big or too new for the distribution; answer its size."""
    if program == BOOT:
        check_start(bundle / "startup_probe")
    if program != EMPTY:
        check_content(bundle, program)
        result = subprocess.run(
            [bundle / "immucore", "self-test"], check=False, capture_output=True, text=True
        )
        if result.returncode:
            raise FreezeError(f"the self-test failed:\n{result.stdout}{result.stderr}")
    for path in elf_files(bundle):
        check_library(path, bundle / "_internal")
    raw = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    tar = subprocess.run(
        ["tar", "--sort=name", "-C", bundle.parent, "-c", program], check=True, capture_output=True
    )
    compressed = len(
        subprocess.run(["zstd", "-19", "-c"], input=tar.stdout, check=True, capture_output=True).stdout
    )
    limits = PROGRAMS[program]
    for size, limit, name in (
        (raw, limits.limit_raw, "raw"),
        (compressed, limits.limit_compressed, "zstd -19"),
    ):
        if size > limit * MIB:
            raise FreezeError(f"the bundle is too big: {size} bytes {name}, the limit is {limit} MiB")
    return f"{raw / MIB:.2f} MiB, {compressed / MIB:.2f} MiB by zstd -19"


def check_start(probe: Path) -> None:
    """Look at what a frozen boot imports at its start."""
    imported = {name.split(".")[0] for name in output_of(str(probe)).split()}
    probe.unlink()
    if forbidden := sorted(imported & FORBIDDEN_AT_START):
        hint = "hint: import it in the branch that uses it"
        raise FreezeError(f"'immucore boot' imports at its start: {' '.join(forbidden)}\n  {hint}")


def check_content(bundle: Path, program: str) -> None:
    """Compare what a bundle holds of the package with its source.

    PyInstaller silently leaves out a module that it cannot compile, and data that no recipe names.
    """
    archive = CArchiveReader(str(bundle / "immucore")).open_embedded_archive("PYZ.pyz")
    bundled = {name for name in archive.toc if name.split(".")[0] == "immucore"}
    modules = {path for path in sources(program) if path.suffix == ".py"}
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules}
    expected = {name.removesuffix(".__init__") for name in named}
    if missing := sorted(expected - bundled):
        raise FreezeError(f"PyInstaller left out: {' '.join(missing)}\n  hint: see the log in build/freeze")
    if stray := sorted(bundled - expected):
        raise FreezeError(f"this does not belong into '{program}': {' '.join(stray)}")
    for path in {*sources(program)} - modules:
        copy = bundle / "_internal" / path.relative_to(ROOT)
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            raise FreezeError(f"the bundle has no '{path.relative_to(ROOT)}'")


def check_library(path: Path, internal: Path) -> None:
    """Refuse a file whose libraries are missing, or that was built for a newer C library than ours."""
    resolved = output_of("ldd", str(path), environment={**os.environ, "LD_LIBRARY_PATH": str(internal)})
    if missing := re.findall(r"(\S+) => not found", resolved):
        raise FreezeError(f"'{path.name}' needs libraries that are not there: {' '.join(missing)}")
    ours = version((os.confstr("CS_GNU_LIBC_VERSION") or "glibc 0").split()[1])
    wanted = re.findall(r"\bGLIBC_(\d[\d.]*)", output_of("objdump", "-T", str(path)))
    if newer := sorted({name for name in wanted if version(name) > ours}, key=version):
        raise FreezeError(f"'{path.name}' needs GLIBC_{newer[-1]}, newer than this distribution's")


def version(text: str) -> tuple[int, ...]:
    """Make a version comparable."""
    return tuple(int(part) for part in text.split("."))


def output_of(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run a tool and answer what it printed."""
    result = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if result.returncode:
        raise FreezeError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout
