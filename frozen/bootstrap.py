"""What the frozen interpreter runs first, in the place of PyInstaller's `pyiboot01_bootstrap`.

It does of that what this program needs: PyInstaller's importer, and `sys.frozen`. It leaves out

- the hook for ctypes (`pyimod03_ctypes`): it imports ctypes at every start, to have it look for libraries in
  the bundle. The launcher's LD_LIBRARY_PATH has the dynamic linker do that, and a boot does without ctypes;
- importing encodings, which the interpreter has done itself, and warnings, which nobody has asked for;
- removing VIRTUAL_ENV from the environment, and adding eggs to sys.path: there are none.

It adds that garbage is collected later, and an importer of its own before PyInstaller's, which opens the
archive anew and looks into three folders for each module. For what is not in the archive, that one remains.
What ours loads has no `__file__`.

All this relies on PyInstaller's internals, so it is made for one version of them: freeze.py compares their
hash.
"""

import gc
import marshal
import os
import sys
import zlib
from _frozen_importlib import ModuleSpec

import pyimod02_importers

# A boot makes fewer objects than this; one that waits for a device for hours still has to be collected.
gc.set_threshold(50_000)

pyimod02_importers.install()
sys.frozen = True

archive = pyimod02_importers.pyz_archive
descriptor = os.open(archive._filename, os.O_RDONLY)
MODULE, PACKAGE = 0, 1  # pyimod01_archive.PYZ_ITEM_MODULE, PYZ_ITEM_PKG


class Importer:
    """Import a module of the archive: one look into its table, one system call."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Answer how to load a module, None if it is not in the archive."""
        kind = archive.toc.get(name, (None,))[0]
        if kind not in (MODULE, PACKAGE):
            return None
        return ModuleSpec(name, Importer, is_package=kind == PACKAGE)

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Have the module made in the usual way."""

    @staticmethod
    def exec_module(module: object) -> None:
        """Run the module's code."""
        _, offset, length = archive.toc[module.__spec__.name]
        data = zlib.decompress(os.pread(descriptor, length, archive._start_offset + offset))
        exec(marshal.loads(data), module.__dict__)  # noqa: S102, S302  it is this program


sys.meta_path.insert(-1, Importer)  # before PathFinder, which asks PyInstaller's
