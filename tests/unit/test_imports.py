"""The diet of the boot path: what it imports, in a fresh interpreter like the one that is frozen."""

from __future__ import annotations

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# What every Python 3.11 has imported before the program starts, with -I -S.
START = {
    *(
        "__main__",
        "_abc",
        "_codecs",
        "_frozen_importlib",
        "_frozen_importlib_external",
        "_imp",
        "_io",
        "_signal",
    ),
    *("_thread", "_warnings", "_weakref", "abc", "builtins", "codecs", "encodings", "encodings.aliases"),
    *("encodings.utf_8", "io", "marshal", "posix", "sys", "time", "winreg", "zipimport"),
}
ALLOWED = {
    *("_collections_abc", "_stat", "genericpath", "os", "os.path", "posixpath", "stat"),  # os
    *("_ctypes", "_struct", "struct"),  # mount(2), ioctls
    *("errno", "faulthandler", "fcntl", "_json", "__future__"),
    "_blake2",  # the identity of the image
}
OURS = {
    "immucore",
    *(
        f"immucore.{name}"
        for name in (
            "boot",
            "cmdline",
            "devices",
            "ending",
            "envfile",
            "errors",
            "execute",
            "files",
            "fstab",
        )
    ),
    *(f"immucore.{name}" for name in ("image", "layouts", "linux", "log", "observe", "plan", "report")),
    *(
        f"immucore.layouts.{name}"
        for name in ("cos", "cos.inside", "cos.modes", "cos.names", "cos.settings", "upkeep")
    ),
    *(f"immucore.{name}" for name in ("superblock", "syscalls", "values")),
}

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
{code}
print("\\n".join(sys.modules))
"""

BOOT = """
from immucore import boot, cmdline, fstab, layouts, observe, report
from immucore.devices import Device, Devices
from immucore.errors import ImmucoreError
from immucore.execute import execute

class Kernel:
    def __getattr__(self, name):
        return lambda *arguments: "done"

labels = ("COS_STATE", "COS_OEM", "COS_PERSISTENT")
found = [Device(path="/dev/" + x, fstype="ext4", label=x, uuid=x, disks=("/dev/a",)) for x in labels]
devices = Devices(all=tuple(found))
asked = cmdline.parse(b"cos-img/filename=/cOS/active.img rd.cos.nonsense rd.cos.debug=x")
observe.mounts()
observe.text("/proc/self/mountinfo")
image = observe.image("/proc/self/cwd/tests/golden", "/nowhere")
layout = layouts.select(asked)
record = []
for plan in (layout.root(asked, devices), layout.state(asked, devices, image), layout.sentinels(asked)):
    execute(plan, Kernel(), record)
    report.json(report.plan(plan))
layout.state_devices(asked, image)
fstab.render([step.operation for step in record], image.fstab)
report.json(report.steps(record))
report.mount_points(record, str, observe.mounts())
report.degraded(record)
try:
    layout.root(asked, Devices())
except ImmucoreError as error:
    report.summary(error, record[-1])
else:
    raise SystemExit("a plan without devices")
"""


def imported(code: str) -> set[str]:
    """Run `code` as the frozen program is run, and return the modules that it has imported."""
    said = subprocess.run(
        ["/usr/bin/python3.11", "-I", "-S", "-c", RUN.format(code=code), REPOSITORY],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    return set(said.stdout.split())


def test_the_start_is_as_the_list_says() -> None:
    assert imported("") <= START


def test_importing_immucore_imports_nothing_else() -> None:
    assert imported("import immucore") - START == {"immucore"}


def test_the_boot_path_imports_what_is_allowed_and_nothing_else() -> None:
    found = imported("import immucore.boot") - START
    assert found - ALLOWED == OURS


def test_planning_and_executing_import_nothing_more() -> None:
    found = imported(BOOT) - START
    assert found - ALLOWED == OURS


def test_main_does_not_import_the_tools() -> None:
    found = imported("import immucore.__main__") - START
    assert found - ALLOWED == {"immucore", "immucore.__main__"}
