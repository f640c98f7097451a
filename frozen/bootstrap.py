"""What the frozen interpreter runs first, in the place of PyInstaller's `pyiboot01_bootstrap`.

It does of that what this program needs: it reads the table of PyInstaller's archive, and imports what is
there. It leaves out

- PyInstaller's own importer (`pyimod02_importers`), which takes a millisecond to get ready, opens the
  archive anew and looks into three folders for each module: for data files, eggs, sources and `__file__`,
  and nothing here asks for them. What is no Python module of the archive is found as in any interpreter:
  built in, frozen, or a library in `_internal/python3.11/lib-dynload`;
- the hook for ctypes (`pyimod03_ctypes`): it imports ctypes at every start, to have it look for libraries in
  the bundle. LD_LIBRARY_PATH has the dynamic linker do that, and a boot does without ctypes;
- importing encodings, which the interpreter has done itself, and warnings, which nobody has asked for;
- removing VIRTUAL_ENV from the environment, and adding eggs to sys.path: there are none.

It adds that garbage is collected later. What it imports has no `__file__`.

All this relies on PyInstaller's internals, so it is made for one version of them: freeze.py compares their
hash.
"""

import gc
import marshal
import os
import sys
import zlib
from _frozen_importlib import ModuleSpec

MODULE, PACKAGE = 0, 1  # pyimod01_archive.PYZ_ITEM_MODULE, PYZ_ITEM_PKG

# A boot makes fewer objects than this; one that waits for a device for hours still has to be collected.
gc.set_threshold(50_000)


class Importer:
    """The modules of the archive that starts at `start` in the file `path`: one system call for each."""

    def __init__(self, path: str, start: int) -> None:
        self.start = start
        self.descriptor = os.open(path, os.O_RDONLY)
        # "PYZ" and a zero, the magic number of the interpreter, and where the table is: at the end.
        end = start + int.from_bytes(os.pread(self.descriptor, 4, start + 8))
        entries = os.pread(self.descriptor, os.fstat(self.descriptor).st_size - end, end)
        self.table = dict(marshal.loads(entries))  # noqa: S302  it is this program

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Answer how to load a module, None if it is not in the archive."""
        kind = self.table.get(name, (None,))[0]
        if kind not in (MODULE, PACKAGE):
            return None
        return ModuleSpec(name, self, is_package=kind == PACKAGE)

    def create_module(self, spec: ModuleSpec) -> None:
        """Have the module made in the usual way."""

    def exec_module(self, module: object) -> None:
        """Run the module's code.

        Without zlib's header and checksum: the modules are stored, and nobody sums libpython up either.
        """
        _, offset, length = self.table[module.__spec__.name]
        data = os.pread(self.descriptor, length - 2, self.start + offset + 2)
        code = marshal.loads(zlib.decompress(data, -zlib.MAX_WBITS, length))  # noqa: S302  it is this program
        exec(code, module.__dict__)  # noqa: S102


file, _, offset = sys._pyinstaller_pyz.rpartition("?")  # the launcher has put it there
sys.meta_path.insert(-1, Importer(file, int(offset)))  # before PathFinder
sys.frozen = True
