"""Twenty entries of a layout, of which one fails: the others are mounted all the same, the result says so.

What fails does so in the real kernel: a volume by an option that its file system does not know, a writable
or persistent path by a file where its directory would be kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import native
import pytest
from native import ACTIVE, Machine

from immucore.plan import is_below

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VOLUMES = {  # mount point → label
    "/usr/local": "COS_PERSISTENT",
    "/data": "DATA1",
    "/data/inner": "DATA2",
    "/var/lib/volume": "DATA3",
    "/spare": "DATA4",
    "/mnt/deep": "DATA5",
}
NOFAIL = "/spare"
EPHEMERAL = ("/etc", "/home", "/root", "/sbin", "/srv", "/var", "/var/log")
PERSISTENT = ("/etc/one", "/etc/two", "/home/one", "/opt", "/root/one", "/var/lib/one", "/var/lib/two")
ENTRIES = (*VOLUMES, *EPHEMERAL, *PERSISTENT)
STATE = "/usr/local/.state"
REQUIRED = ({*VOLUMES} - {NOFAIL}) | {"/etc", "/var"}
ADDED = ("DATA1", "DATA2", "DATA3", "DATA4", "DATA5", "SCRATCH")  # partitions behind those of every test
ADDED_MIB = 2


@pytest.fixture(scope="module")
def large(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a disk with a partition for each volume, and one that backs the overlays."""
    disk = tmp_path_factory.mktemp("large") / "disk.img"
    native.command("cp", "--sparse=always", template, disk)
    end_mib = sum(size for _, size in native.PARTITIONS.values()) + 1
    with disk.open("r+b") as file:
        file.truncate((end_mib + len(ADDED) * ADDED_MIB + 1) << 20)
    native.command("sfdisk", "--quiet", "--relocate", "gpt-bak-std", disk)
    table = "".join(f"size={ADDED_MIB}MiB, name={label.lower()}\n" for label in ADDED)
    native.command("sfdisk", "--quiet", "--append", disk, stdin=table)
    for number, label in enumerate(ADDED):
        offset = (end_mib + number * ADDED_MIB) << 20
        options = ("-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", label, "-E", f"offset={offset}")
        native.command("mke2fs", *options, disk, f"{ADDED_MIB}M")
    return disk


@pytest.fixture
def machine(large: Path, tmp_path: Path) -> Iterator[Machine]:
    """Switch on a machine with that disk."""
    disk = tmp_path / "disk.img"
    native.command("cp", "--sparse=always", large, disk)
    with native.Machine(tmp_path / "machine", disk) as machine:
        yield machine


def lay_out(machine: Machine, broken: str) -> None:
    """Write a layout of all the entries, and see to it that one of them cannot be done."""
    options = {path: ["nofail"] if path == NOFAIL else [] for path in VOLUMES}
    if broken in VOLUMES:
        options[broken].append("no_such_option")
    volumes = [
        ":".join((f"LABEL={label}", path, *filter(None, [",".join(options[path])])))
        for path, label in VOLUMES.items()
    ]
    layout = {
        "VOLUMES": " ".join(volumes),
        "OVERLAY": "LABEL=SCRATCH",
        "RW_PATHS": " ".join(EPHEMERAL),
        "PERSISTENT_STATE_PATHS": " ".join(PERSISTENT),
        "PERSISTENT_STATE_BIND": "true",
    }
    with machine.image() as root:
        text = "".join(f'{name}="{value}"\n' for name, value in layout.items())
        (root / "etc/cos/cos-layout.env").write_text(text)
        for path in ("data", "spare", "mnt/deep"):
            (root / path).mkdir(parents=True)
    name = broken.strip("/").replace("/", "-")
    if broken in EPHEMERAL:
        with machine.device_files(f"{machine.device}p{len(native.PARTITIONS) + len(ADDED)}") as scratch:
            (scratch / f"{name}.overlay").write_text("in the way")
    if broken in PERSISTENT:
        with machine.partition("persistent") as kept:
            (kept / ".state").mkdir()
            (kept / f".state/{name}.bind").write_text("in the way")


def stands_on(entry: str, broken: str) -> bool:
    """Whether an entry cannot be without another: it lies in it, or is kept in it."""
    return is_below(entry, broken) or (broken == "/usr/local" and entry in PERSISTENT)


def reason(machine: Machine, broken: str) -> str:
    """What the kernel says, in the words of the step."""
    name = broken.strip("/").replace("/", "-")
    if broken in VOLUMES:
        label = VOLUMES[broken]
        part = machine.part("persistent")
        if label in ADDED:
            part = f"{machine.device}p{len(native.PARTITIONS) + ADDED.index(label) + 1}"
        options = "rw, nofail, no_such_option" if broken == NOFAIL else "rw, no_such_option"
        return f"cannot mount {part} on /sysroot{broken} (ext4, {options}): Invalid argument"
    if broken in EPHEMERAL:
        return f"cannot overlay on /sysroot{broken} (upper in /run/overlay/{name}.overlay): Not a directory"
    kept = f"/sysroot{STATE}/{name}.bind"
    return f"cannot seed {kept} from /sysroot{broken}: Not a directory"


def test_all_twenty(machine: Machine, source: Sequence[str]) -> None:
    assert len({*ENTRIES}) == 20
    lay_out(machine, "")

    boot = machine.boot(ACTIVE, source)

    assert (boot.status, boot.result["outcome"], boot.result["degraded"]) == (0, "ok", [])
    assert {f"/sysroot{path}" for path in ENTRIES} <= {mount.target for mount in boot.mounts}


@pytest.mark.parametrize("broken", ENTRIES)
def test_one_of_twenty_fails(machine: Machine, source: Sequence[str], broken: str) -> None:
    lay_out(machine, broken)

    boot = machine.boot(ACTIVE, source)

    mounted = {mount.target.removeprefix("/sysroot") for mount in boot.mounts}
    lost = {entry for entry in ENTRIES if stands_on(entry, broken)}
    assert {*ENTRIES} - mounted == lost
    why = reason(machine, broken)
    below = [entry for entry in lost if entry != broken]
    degraded = [each for each in boot.result["degraded"] if not each.endswith(" is not there")]
    skipped = [each.partition(":")[0] for each in boot.result["degraded"] if each.endswith(" is not there")]
    assert {*skipped} >= {*below} - REQUIRED
    if broken in REQUIRED:
        assert (boot.status, boot.result["outcome"], boot.result["exit_status"]) == (4, "failed", 4)
        assert boot.result["error"]["message"] == why
        assert degraded == []
    else:
        assert (boot.status, boot.result["exit_status"], boot.result["error"]) == (0, 0, None)
        where = f"{STATE}/{broken[1:].replace('/', '-')}.bind" if broken in PERSISTENT else broken
        assert degraded == ([] if broken == NOFAIL else [f"{where}: {why}"])
        assert boot.result["outcome"] == ("ok" if broken == NOFAIL else "degraded")
