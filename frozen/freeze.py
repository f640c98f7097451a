#!/usr/bin/env python3
"""Freeze the agent into build/bundle/immucore: PyInstaller, strip, and checks that fail the build.

Nothing is done when the inputs have not changed since the last bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "freeze"
LIMIT_RAW_BYTES = 15 * 1024 * 1024
LIMIT_COMPRESSED_BYTES = 5 * 1024 * 1024
# Each costs milliseconds before a boot has done anything (README.md); branches that need one import it then.
FORBIDDEN_AT_START = {
    *(
        "argparse",
        "asyncio",
        "contextlib",
        "ctypes",
        "dataclasses",
        "enum",
        "functools",
        "inspect",
        "json",
        "logging",
    ),
    *("pathlib", "psutil", "pyroute2", "re", "socket", "subprocess", "typing", "yaml", "zipfile"),
}


# PyInstaller's start-up code, which bootstrap.py replaces in part and relies on for the rest.
LOADER_SHA256 = "20f43e39605c8548746a177a0c0942ccb7aeeb4a64be60d525a50f55419f841d"


class FreezeError(Exception):
    """The bundle cannot be built, or is not fit for a boot."""


def main() -> int:
    """Freeze what the arguments ask for, unless the last result is still good."""
    parser = argparse.ArgumentParser(description="Freeze the agent with PyInstaller, and check the result.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "bundle", help="folder for the bundle"
    )
    parser.add_argument("--empty", action="store_true", help="freeze an empty program, for the benchmark")
    arguments = parser.parse_args()
    program = "empty" if arguments.empty else "immucore"
    bundle, stamp = arguments.output / program, arguments.output / f"{program}.stamp"

    inputs = hash_of_inputs()
    if stamp.is_file() and bundle.is_dir() and stamp.read_text().split("\n")[0] == inputs:
        print(f"{bundle}: up to date")
        return 0
    try:
        check_loader()
        built = run_pyinstaller(program)
        check_exclusions(WORK / program)
        strip(built)
        summary = check(built, program)
    except FreezeError as error:
        print(f"freeze: {error}", file=sys.stderr)
        return 1
    stamp.unlink(missing_ok=True)
    shutil.rmtree(bundle, ignore_errors=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    shutil.move(built, bundle)
    stamp.write_text(f"{inputs}\n{summary}\n")
    print(f"{bundle}: {summary}")
    return 0


def hash_of_inputs() -> str:
    """Hash everything that the bundle is made from."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("pyinstaller", "pyinstaller-hooks-contrib", "pyroute2", "PyYAML"):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    sources = [path for folder in ("immucore", "frozen") for path in (ROOT / folder).rglob("*")]
    for path in sorted([ROOT / "pyproject.toml", *sources]):
        if path.suffix in {".py", ".spec", ".toml"}:
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


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


def run_pyinstaller(program: str) -> Path:
    """Build the bundle from its recipe; the work folder holds nothing of an earlier build."""
    work = WORK / program
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    environment = {
        **os.environ,
        "FREEZE_PROGRAM": program,
        "FREEZE_THIRD_PARTY": str(prune_third_party(work / "third-party")),
        # Stored, not deflated: smaller once the initramfs is compressed, and the start is no slower.
        "PYINSTALLER_ZLIB_COMPRESSION_LEVEL": "0",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "0",
    }
    log = work / "pyinstaller.log"
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--distpath", str(work / "dist")]
    command += ["--workpath", str(work), str(ROOT / "frozen" / "immucore.spec")]
    with log.open("wb") as output:
        result = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if result.returncode:
        raise FreezeError(
            f"PyInstaller failed, the end of {log}:\n" + "\n".join(log.read_text().split("\n")[-15:])
        )
    return work / "dist" / program


def check_exclusions(work: Path) -> None:
    """Refuse a bundle without a module that the agent names, even in a branch the probe does not run."""
    for report in work.rglob("warn-*.txt"):
        for line in report.read_text().splitlines():
            module, _, importers = line.partition(" - imported by ")
            if re.search(r"(^|[ ,])immucore[. ]", importers):
                raise FreezeError(f"the agent imports what the bundle leaves out: {module.split()[-1]}")


# Of PyYAML what makes events of a text; what makes objects of them is not there at all.
YAML_MODULES = ("error", "events", "parser", "reader", "scanner", "tokens")


def prune_third_party(folder: Path) -> Path:
    """Copy pyroute2 and PyYAML with an empty __init__: the real ones import all, for 100 and 40 ms."""
    for name, modules in (("pyroute2", None), ("yaml", YAML_MODULES)):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise FreezeError(f"cannot find {name}: pip install -e '.[freeze]'")
        source, target = Path(spec.origin).parent, folder / name
        if modules is None:
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True)
            for module in modules:
                shutil.copy(source / f"{module}.py", target)
        (target / "__init__.py").write_text('"""Import the submodules by name."""\n')
    return folder


def elf_files(bundle: Path) -> list[Path]:
    """List the launcher and the shared libraries."""
    files = (path for path in sorted(bundle.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path for path in files if path.open("rb").read(4) == b"\x7fELF"]


def strip(bundle: Path) -> None:
    """Remove what is of use to debuggers only."""
    for path in elf_files(bundle):
        output_of("strip", "--strip-unneeded", str(path))


def check(bundle: Path, program: str) -> str:
    """Refuse a bundle that is slow, incomplete, too big or too new for the distribution; answer its size."""
    if program == "immucore":
        check_with_probe(bundle / "startup_probe")
    for path in elf_files(bundle):
        check_library(path, bundle / "_internal")
    raw = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    tar = subprocess.run(
        ["tar", "--sort=name", "-C", bundle.parent, "-c", program], check=True, capture_output=True
    )
    compressed = len(
        subprocess.run(["zstd", "-19", "-c"], input=tar.stdout, check=True, capture_output=True).stdout
    )
    for size, limit, name in (
        (raw, LIMIT_RAW_BYTES, "raw"),
        (compressed, LIMIT_COMPRESSED_BYTES, "zstd -19"),
    ):
        if size > limit:
            raise FreezeError(f"the bundle is too big: {size} bytes {name}, the limit is {limit}")
    return f"{raw / 2**20:.2f} MiB, {compressed / 2**20:.2f} MiB by zstd -19"


def check_with_probe(probe: Path) -> None:
    """Look at the imports of a boot's start and run the self-test, both frozen."""
    result = subprocess.run([probe], check=False, capture_output=True, text=True)
    probe.unlink()
    if result.returncode:
        raise FreezeError(f"the start-up probe failed:\n{result.stdout}{result.stderr}")
    lines = [line.partition(" ") for line in result.stdout.splitlines()]
    imported = {
        name.split(".")[0] for kind, _, names in lines if kind == "imported" for name in names.split()
    }
    if forbidden := sorted(imported & FORBIDDEN_AT_START):
        hint = "hint: import it in the branch that uses it"
        raise FreezeError(f"'immucore boot' imports at its start: {' '.join(forbidden)}\n  {hint}")
    if problems := [text for kind, _, text in lines if kind == "problem"]:
        raise FreezeError("the self-test found:\n  " + "\n  ".join(problems))
    bundled = {name for kind, _, names in lines if kind == "bundled" for name in names.split()}
    if missing := sorted(modules_of_source() - bundled):
        raise FreezeError(f"PyInstaller left out: {' '.join(missing)}\n  hint: see the log in {WORK}")


def modules_of_source() -> set[str]:
    """Name every module of the package; PyInstaller leaves one out silently if it cannot compile it."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "immucore").rglob("*.py"))
    return {".".join(path.parts).removesuffix(".__init__") for path in paths}


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


if __name__ == "__main__":
    sys.exit(main())
