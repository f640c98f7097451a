"""What is kept of the image's directories, over upgrades, the way back, and power cuts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import derivative
import expect
import pytest
from derivative import run
from disk import MIB, Disk, size_mib
from machine import Machine

ACTIVE = expect.ACTIVE
PASSIVE = ACTIVE.replace("active.img", "passive.img")
LAYOUT = 'PERSISTENT_STATE_PATHS="/srv/table"\nPERSISTENT_STATE_BIND=true\n'
KINDS = ("file", "directory", "symlink", "absent")
DID = ("same", "changed", "deleted", "added")
CODE = derivative.digest(Path(__file__))
INNER = "what is in it\n"


def version(kind: str, did: str, by: str) -> str | None:
    """Say what a thing of this kind becomes when somebody did this to it; None: that makes no sense."""
    if (kind == "absent") != (did == "added") and did != "same":
        return None
    return {"same": kind, "deleted": "absent", "added": f"file {by}", "changed": f"{kind} {by}"}[did]


# Name → what the first image, somebody, and the second image have.
TABLE = {
    f"{kind}-{user}-{image}": (kind, ours, theirs)
    for kind in KINDS
    for user in DID
    for image in DID
    if (ours := version(kind, user, "mine")) is not None
    and (theirs := version(kind, image, "new")) is not None
}


def shown(name: str, what: str) -> dict[str, str]:
    """Give the lines in which the machine shows a thing: kind, mode, target; and a file's text."""
    kind, _, by = what.partition(" ")
    match kind:
        case "file":
            return {name: f"f 644  {name} {by}".rstrip()}
        case "directory":
            return {name: f"d {'700' if by else '755'}", f"{name}/inner": f"f 644  {INNER.strip()}"}
        case "symlink":
            return {name: f"l 777 to-{by or 'nothing'}"}
    return {}


SHOW = """\
cd /srv/table && find . -mindepth 1 | sort | while read -r path; do
    text=; [ -L "$path" ] || [ ! -f "$path" ] || text=$(cat "$path")
    printf '%s\\t%s %s %s %s\\n' "${path#./}" "$(find "$path" -maxdepth 0 -printf '%y')" \\
        "$(find "$path" -maxdepth 0 -printf '%m')" "$(readlink "$path")" "$text"
done"""


def image(slot: str, name: str, contents: dict[str, str]) -> Path:
    """Make an image of a slot that has these things in /srv/table."""

    def make(target: Path) -> None:
        run("cp", "--sparse=always", derivative.images("bookworm")[f"{slot}.img"], target)
        texts = target.with_name(f"{target.name}.texts")
        texts.mkdir()
        commands = ["mkdir /srv/table"]
        for number, (path, what) in enumerate(contents.items()):
            kind, _, by = what.partition(" ")
            place = f"/srv/table/{path}"
            (texts / str(number)).write_text(f"{path} {by}\n" if kind == "file" else INNER)
            if kind == "directory":
                commands += [f"mkdir {place}", f"set_inode_field {place} mode 0040{'700' if by else '755'}"]
                place += "/inner"
            if kind == "symlink":
                commands.append(f"symlink {place} to-{by or 'nothing'}")
            elif kind != "absent":
                commands += [f"write {texts / str(number)} {place}", f"set_inode_field {place} mode 0100644"]
        (texts / "commands").write_text("\n".join(commands) + "\n")
        run("debugfs", "-w", "-f", texts / "commands", target)
        derivative.remove(texts)

    return derivative.cached(
        f"{slot}-{name}.img", derivative.digest(repr(contents), derivative.CODE, CODE), make
    )


def edits() -> str:
    """Write what somebody does as a script for the machine."""
    lines = ["cd /srv/table"]
    for name, (before, ours, _) in TABLE.items():
        if before == ours:
            continue
        kind, _, by = ours.partition(" ")
        match kind:
            case "file":
                lines.append(f"echo {name} {by} > {name}")
            case "directory":
                lines.append(f"chmod 700 {name}")
            case "symlink":
                lines.append(f"ln -sfn to-{by} {name}")
            case "absent":
                lines.append(f"rm -r {name}")
    return "\n".join(lines)


def column(number: int) -> dict[str, str]:
    """Give what the first image, somebody, or the second image has, as the machine shows it."""
    return {path: text for name, has in TABLE.items() for path, text in shown(name, has[number]).items()}


def merged() -> dict[str, str]:
    """Give what the machine has to show of the second image: every path by itself."""
    before, ours, theirs = column(0), column(1), column(2)
    result = {}
    for path in {*before, *ours, *theirs}:
        side = theirs if ours.get(path) == before.get(path) else ours
        if path in side:
            result[path] = side[path]
    return result


def lines(output: str) -> dict[str, str]:
    return {path: text.rstrip() for path, _, text in (line.partition("\t") for line in output.splitlines())}


def test_upgrade_and_rollback(machine: Callable[..., Machine], cos_disk: Callable[..., Disk]) -> None:
    """Every kind of thing, whatever the image and whatever somebody did to it, there and back."""
    images = {
        "cOS/active.img": image("active", "table", {name: old for name, (old, _, _) in TABLE.items()}),
        "cOS/passive.img": image("passive", "table", {name: new for name, (_, _, new) in TABLE.items()}),
    }
    disk = cos_disk(oem={"cos-layout.env": LAYOUT}, state=images)
    kept = machine(disk, ACTIVE, keep_writes=True)
    edit = edits()

    first = kept.boot(limit_s=90, commands=(SHOW, edit))
    kept.cmdline = PASSIVE
    second = kept.boot(limit_s=90, commands=(SHOW,), files=("/usr/local/.state/*.manifest",))
    kept.cmdline = ACTIVE
    third = kept.boot(limit_s=90, commands=(SHOW,))

    expect.healthy(first, "active", "/cOS/active.img")
    expect.healthy(second, "passive", "/cOS/passive.img")
    expect.healthy(third, "active", "/cOS/active.img")
    assert first.output(edit) == ""
    assert lines(first.output(SHOW)) == column(0)
    assert lines(second.output(SHOW)) == merged()
    assert lines(third.output(SHOW)) == column(1)
    before, ours, theirs = column(0), column(1), column(2)
    both = {
        f"/srv/table/{name}"
        for name in TABLE
        if before.get(name) not in (ours.get(name), theirs.get(name)) and ours.get(name) != theirs.get(name)
    }
    assert {path for path in second.result["conflicts"] if not path.endswith("/inner")} == both
    assert "/usr/local/.state/srv-table.manifest" in second.files


MANY = {f"file{number}": "file" for number in range(1500)}
CHANGED = {name: "file new" if number % 3 == 0 else "file" for number, name in enumerate(MANY)}
MARKER, END = r"plan: seed ", r"(?:done|present) in \d+ us: seed "


@pytest.mark.soak
@pytest.mark.parametrize("what", ["seed", "merge"])
def test_power_cut_while_it_changes(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], work: Path, boots: int, what: str
) -> None:
    """Cut off anywhere in a first seeding, and in a merge: the old state or the new one; then the new."""
    old, new = image("active", "many", MANY), image("passive", "many", CHANGED)
    disk = cos_disk(oem={"cos-layout.env": LAYOUT}, state={"cOS/active.img": old, "cOS/passive.img": new})
    console = "systemd.journald.forward_to_console=1 systemd.journald.max_level_console=debug"
    options = f"rd.cos.debug {console}"
    states: dict[str, dict[str, str] | None] = {"none": None, "old": texts(MANY), "new": texts(CHANGED)}
    before, after, asked = "none", "old", ACTIVE
    if what == "merge":
        seeded = machine(disk, ACTIVE, keep_writes=True)
        seeded.boot(limit_s=90, until="initramfs", poweroff="clean")
        disk = dataclasses.replace(disk, path=seeded.raw())
        before, after, asked = "old", "new", PASSIVE
    changing = machine(disk, f"{asked} {options}", keep_writes=True)
    copies: list[Path] = []
    overlay = changing.work / "disk0.qcow2"
    changing.boot(
        limit_s=240,
        until="initramfs",
        when=[(MARKER, lambda guest: copies.extend(guest.copies(overlay, END)))],
    )
    assert content(changing, disk, work) == states[after]

    cuts = min(len(copies), max(1, boots - 1))
    assert len(copies) > 3
    for number in range(cuts):
        cut = machine(disk, f"{asked} {options}", keep_writes=True)
        copies[len(copies) * (2 * number + 1) // (2 * cuts)].rename(cut.work / "disk0.qcow2")
        assert content(cut, disk, work) in (states[before], states[after]), number

        cut.boot(limit_s=120, until="initramfs")
        assert content(cut, disk, work) == states[after]
        assert leftovers(cut, disk, work) == ["srv-table.bind", "srv-table.manifest"]
        derivative.remove(cut.work)


def texts(contents: dict[str, str]) -> dict[str, str]:
    return {name: f"{name} {what.partition(' ')[2]}\n" for name, what in contents.items()}


def content(cut: Machine, disk: Disk, work: Path) -> dict[str, str] | None:
    """Read what is kept, as the next boot finds it: with nothing but the journal replayed."""
    with partition(cut, disk, "persistent", work) as root:
        kept = root / ".state/srv-table.bind"
        return {path.name: path.read_text() for path in kept.iterdir()} if kept.exists() else None


def leftovers(cut: Machine, disk: Disk, work: Path) -> list[str]:
    with partition(cut, disk, "persistent", work) as root:
        return sorted(os.listdir(root / ".state"))


# What makes a file, besides its data: run where /srv/given of an image is to be, or what peers have kept.
MAKE = """\
mkdir -p plain/deep
echo given >plain/file && chmod 4750 plain/file && chown 3:4 plain/file
ln plain/file plain/deep/linked && ln -s ../file plain/deep/link && ln -s /nowhere dangling
truncate -s 3M holes && printf end | dd of=holes bs=1 seek=2000000 conv=notrunc status=none
cp plain/file capable && setcap cap_net_raw,cap_net_admin=ep capable
echo shared >shared && setfacl -m u:7:rw,g:8:r shared
mkdir inheriting && setfacl -m u:7:rwx -m d:u:7:rwx -m d:g:8:rx inheriting && echo in >inheriting/it
setfattr -n user.note -v kept shared && setfattr -n trusted.note -v kept plain
mknod null c 1 3 && mkfifo fifo && chmod 1777 inheriting
echo fixed >fixed && echo longer >longer
touch -d '2001-02-03 04:05:06.123456789' plain/file holes && touch -h -d '2002-02-03 04:05:06.7' dangling
chattr +i fixed && chattr +a longer && chattr +d holes
"""
LIST = """\
find . ! -type l | sort | xargs getfacl -n; find . | sort | xargs getfattr -hd -m - -e hex
getcap -r . | sort; lsattr -aR . 2>/dev/null | sort  # symlinks have none
find . ! -type d -printf '%P %y %m %U %G %s %n %T@ %l\\n' | sort
find . -type d -printf '%P %y %m %U %G %T@\\n' | sort
find . -type f -exec sha256sum {} + | sort
"""


def test_everything_that_makes_a_file_is_kept(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk], work: Path
) -> None:
    """A first copy has all that the image has; what rsync has made for the peers stays to the last byte."""
    ours = work / "active.img"
    run("cp", "--sparse=always", derivative.images("bookworm")["active.img"], ours)
    with mounted(ours, work / "image") as root:
        for name in ("given", "kept"):
            (root / "srv" / name).mkdir()
            run("sh", "-ec", f"cd {root}/srv/{name}\n{MAKE}")
        given = listing(root / "srv/given")
        peers = work / "peers"
        peers.mkdir()
        run("rsync", "-aquAX", f"{root}/srv/kept/", peers)
    layout = 'PERSISTENT_STATE_PATHS="/srv/given /srv/kept"\nPERSISTENT_STATE_BIND=true\n'
    disk = cos_disk(oem={"cos-layout.env": layout}, state={"cOS/active.img": ours})
    with mounted(disk.path, work / "persistent", disk.offsets["persistent"]) as root:
        kept = root / ".state/srv-kept.bind"
        kept.mkdir(parents=True)
        run("rsync", "-aquAX", f"{peers}/", kept)
        run(
            "sh",
            "-ec",
            f"cd {kept} && echo mine >plain/file && rm shared && mkdir -m 700 own && cd own\n{MAKE}",
        )
        before = listing(kept)
    booted = machine(disk, ACTIVE, keep_writes=True)

    report = booted.boot(limit_s=90, until="initramfs", poweroff="clean")

    assert report.result["outcome"] == "ok", report.console[-3000:]
    with partition(booted, disk, "persistent", work) as root:
        assert listing(root / ".state/srv-given.bind") == given
        assert listing(root / ".state/srv-kept.bind") == before


def listing(root: Path) -> list[str]:
    return run("sh", "-ec", f"cd {root}\n{LIST}").splitlines()


@contextlib.contextmanager
def mounted(file: Path, where: Path, offset: int = 0) -> Iterator[Path]:
    """Mount a file system that is in a file, to write into it."""
    where.mkdir(exist_ok=True)
    run("mount", "-o", f"loop,offset={offset}", file, where)
    try:
        yield where
    finally:
        run("umount", where)


@contextlib.contextmanager
def partition(cut: Machine, disk: Disk, name: str, work: Path) -> Iterator[Path]:
    """Mount a partition of a machine that is off."""
    where, raw = work / "mounted", cut.raw()
    where.mkdir(exist_ok=True)
    place = f"loop,offset={disk.offsets[name]},sizelimit={size_mib(disk.partition(name)) * MIB}"
    run("mount", "-o", place, raw, where)
    try:
        yield where
    finally:
        run("umount", where)
        raw.unlink()


def test_a_full_disk_keeps_the_old_state(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    """COS_PERSISTENT full in the middle of a merge: the old state, and how much is missing."""
    old = image("active", "many", MANY)
    new = derivative.edited(image("passive", "many", CHANGED), {"srv/table/large": os.urandom(2 * MIB)})
    disk = cos_disk(oem={"cos-layout.env": LAYOUT}, state={"cOS/active.img": old, "cOS/passive.img": new})
    kept = machine(disk, ACTIVE, keep_writes=True)
    fill = "dd if=/dev/zero of=/usr/local/filler bs=64k; truncate -s -1M /usr/local/filler"
    look = "cd /srv/table && cat file0 file1 && ls large; ls /usr/local/.state"

    kept.boot(limit_s=90, commands=(fill,))
    kept.cmdline = PASSIVE
    full = kept.boot(limit_s=90, commands=(look, "rm /usr/local/filler"))
    freed = kept.boot(limit_s=90, commands=(look,))

    assert (full.result["outcome"], full.slot) == ("degraded", "passive")
    (reason,) = full.result["degraded"]
    assert "No space left on device" in reason
    assert "KiB more are needed" in reason
    assert full.output(look).splitlines()[:2] == ["file0 ", "file1 "]
    expect.healthy(freed, "passive", "/cOS/passive.img")
    assert freed.output(look).splitlines()[:3] == ["file0 new", "file1 ", "large"]
    assert "srv-table.bind.new" not in freed.output(look)
