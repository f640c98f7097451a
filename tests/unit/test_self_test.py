"""The self-test names what is missing; what it does in a whole program, test_cli.py has."""

from __future__ import annotations

from pathlib import Path

import immucore
from immucore import self_test


def test_every_module_is_tried() -> None:
    package = Path(immucore.__file__).parent
    files = [path.relative_to(package.parent) for path in package.rglob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert {*self_test._modules()} == names


def test_a_module_that_is_missing() -> None:
    said = self_test._import("immucore.nowhere")
    assert (
        said == "cannot import 'immucore.nowhere': ModuleNotFoundError: No module named 'immucore.nowhere'"
    )


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"no ELF")
    assert self_test._open_library(str(library)) == f"cannot open '{library}': {library}: file too short"


def test_a_library_that_loads() -> None:
    assert self_test._open_library("libc.so.6") is None
