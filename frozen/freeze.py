#!/usr/bin/env python3
"""Freeze the programs into build/bundle: PyInstaller, strip, and checks that fail the build.

Nothing is done for a program whose inputs have not changed since its last bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from checks import (
    BOOT,
    EMPTY,
    PROGRAMS,
    ROOT,
    SYSTEM,
    FreezeError,
    check,
    check_exclusions,
    check_loader,
    elf_files,
    output_of,
    sources,
)

WORK = ROOT / "build" / "freeze"


def main() -> int:
    """Freeze what the arguments ask for, unless the last result is still good."""
    parser = argparse.ArgumentParser(description="Freeze with PyInstaller, and check the result.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "bundle", help="folder for the bundles"
    )
    parser.add_argument(
        "programs",
        nargs="*",
        metavar="PROGRAM",
        help=f"of {', '.join(PROGRAMS)}; none: all but {EMPTY}, which is for the benchmark",
    )
    arguments = parser.parse_args()
    for name in arguments.programs:
        if name not in PROGRAMS:
            parser.error(f"there is no program '{name}'")
    try:
        for name in arguments.programs or (BOOT, SYSTEM):
            freeze(name, arguments.output)
    except FreezeError as error:
        print(f"freeze: {error}", file=sys.stderr)
        return 1
    return 0


def freeze(program: str, output: Path) -> None:
    """Freeze a program, unless the last result is still good. Raises FreezeError."""
    bundle, stamp = output / program, output / f"{program}.stamp"
    inputs = hash_of_inputs(program)
    if stamp.is_file() and bundle.is_dir() and stamp.read_text().split("\n")[0] == inputs:
        print(f"{bundle}: up to date")
        return
    check_loader()
    built = run_pyinstaller(program)
    check_exclusions(WORK / program)
    strip(built)
    summary = check(built, program)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(bundle, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    shutil.move(built, bundle)
    stamp.write_text(f"{inputs}\n{summary}\n")
    print(f"{bundle}: {summary}")


def hash_of_inputs(program: str) -> str:
    """Hash everything that a bundle is made from."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("pyinstaller", "pyinstaller-hooks-contrib", *PROGRAMS[program].packages):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    for path in sorted([ROOT / "pyproject.toml", *(ROOT / "frozen").iterdir(), *sources(program)]):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def run_pyinstaller(program: str) -> Path:
    """Build the bundle from its recipe; the work folder holds nothing of an earlier build."""
    work = WORK / program
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    environment = {
        **os.environ,
        "FREEZE_PROGRAM": program,
        "FREEZE_THIRD_PARTY": str(prune_third_party(program, work / "third-party")),
        # This tree's package, whatever other tree is installed in the environment that PyInstaller runs in.
        "PYTHONPATH": str(ROOT),
        # Stored, not deflated: smaller once the initramfs is compressed, and the start is no slower.
        "PYINSTALLER_ZLIB_COMPRESSION_LEVEL": "0",
        # Where in its line an instruction comes from: of use only beside the line, and no source is there.
        "PYTHONNODEBUGRANGES": "1",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "0",
    }
    log = work / "pyinstaller.log"
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--distpath", str(work / "dist")]
    command += ["--workpath", str(work), str(ROOT / "frozen" / PROGRAMS[program].recipe)]
    with log.open("wb") as output:
        result = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if result.returncode:
        raise FreezeError(
            f"PyInstaller failed, the end of {log}:\n" + "\n".join(log.read_text().split("\n")[-15:])
        )
    return work / "dist" / program


# Of PyYAML what makes events of a text; what makes objects of them is not there at all.
YAML_MODULES = ("error", "events", "parser", "reader", "scanner", "tokens")


def prune_third_party(program: str, folder: Path) -> Path:
    """Copy pyroute2 with an empty __init__, for a boot PyYAML too: the real ones import all (100 and 40 ms).

    The booted system writes YAML as well, and has all of it.
    """
    for name, modules in (("pyroute2", None), ("yaml", YAML_MODULES)):
        if name == "yaml" and program == SYSTEM:
            continue
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


def strip(bundle: Path) -> None:
    """Remove what is of use to debuggers only."""
    for path in elf_files(bundle):
        output_of("strip", "--strip-unneeded", str(path))


if __name__ == "__main__":
    sys.exit(main())
