"""What must hold for any bytes at all: one function for each text that comes from outside.

Each takes the bytes and raises AssertionError, or whatever broke, where something does not hold. `make fuzz`
calls them from libFuzzer, test_fuzz_targets.py with the seed corpus and with random bytes.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from immucore import cmdline, documents, envfile, fstab, grubenv, observe, report, stages, superblock
from immucore.cmdline import Cmdline
from immucore.devices import MEMBERS, Device, Devices, describe, split
from immucore.errors import ImmucoreError, LayoutError
from immucore.execute import Step
from immucore.image import Image, Setting
from immucore.layouts import cos
from immucore.layouts.cos.settings import listed_paths, read
from immucore.plan import Bind, Check, Loop, Mount, Overlay, Plan, Refused, is_below

SEPARATOR = b"\n---\n"  # between the files of one input
ACTIVE = b"cos-img/filename=/cOS/active.img root=LABEL=COS_STATE"
MAX_MESSAGE = 2000  # beside what it quotes of the input


def on_cmdline(data: bytes) -> None:
    """A kernel command line: no word of ours is lost, and what it asks for can be planned or is refused."""
    data = data.partition(b"\0")[0]  # for the kernel that is its end
    asked = cmdline.parse(data)
    assert asked == cmdline.parse(data)
    words = list(cmdline.words(data.removesuffix(b"\n")))
    assert len(asked.warnings) <= len(words)
    shown = [key if value is None else f"{key}={value}" for key, value in words]
    for warning in asked.warnings:
        assert any(warning.startswith(f"'{word}' ") for word in shown), warning
    assert len("".join(asked.warnings)) <= len(data) + 300 * len(words)
    _plan_or_refusal(asked, Image(), len(data))


def on_layout(data: bytes) -> None:
    """The files of a layout: command line, image's, OEM's, added, fstab; what was read can be written."""
    line, *files = data.split(SEPARATOR)
    line = line.partition(b"\0")[0]
    image_env, oem_env, added_env, image_fstab = (files + [b""] * 4)[:4]
    settings: list[Setting] = []
    for content, name in ((image_env, "/etc/cos/x.env"), (oem_env, "/oem/x.env"), (added_env, "/run/x.env")):
        text = content.decode("utf-8", "surrogateescape")
        try:
            values = envfile.parse(text, name)
        except LayoutError as error:
            _is_told(error, 0, name)  # a line of whatever length is cut
            continue
        assert values == envfile.parse(text, name)
        assert all(key.isidentifier() and "\0" not in value for key, value in values.items())
        assert sum(map(len, values.values())) <= len(text)
        assert envfile.parse(_written(values), name) == values
        settings += [
            Setting(name=key, value=value, origin=name, adds=name.startswith("/run"))
            for key, value in values.items()
        ]
    image = Image(settings=tuple(settings), fstab=image_fstab.decode("utf-8", "surrogateescape"))
    _plan_or_refusal(cmdline.parse(line or ACTIVE), image, len(data))


def on_mountinfo(data: bytes) -> None:
    """A table of mounts: each line is read as it is written; the guard's list and fstab name the same."""
    text = data.decode("utf-8", "surrogateescape")
    table = _observed(data)
    assert table == _observed(data)
    assert len(table) <= text.count("\n") + 1
    for each in table:
        line = (
            f"1 1 {each.device} {_mangled(each.root)} {_mangled(each.target)} {each.options} shared:1"
            f" - {each.fstype} {_mangled(each.source)} {each.superblock_options}\n"
        )
        assert _observed(line.encode("utf-8", "surrogateescape")) == (each,)
    record = [
        Step(
            operation=Mount(
                source="/dev/" + each.source, target=each.target, fstype=each.fstype, why="fuzz"
            ),
            outcome="done",
            started_usec=0,
            took_usec=0,
        )
        for each in table
    ]
    listed = report.mount_points(record, lambda path: path, table)
    found = {tuple(line.split(" ")) for line in listed.split("\n")[:-1]}
    assert {_unmangled(path) for _, path in found} == {each.target for each in table}
    assert report.json(report.steps(record)) == report.json(report.steps(record))
    whole = [each.operation for each in record if each.operation.fstype and _is_path(each.operation.target)]
    _is_fstab_of(whole, text)


def on_udev(data: bytes) -> None:
    """Records of udev's database: values are what they are in the bytes; no member, nothing ambiguous."""
    records = dict(zip(NAMES, data.split(SEPARATOR), strict=False))
    machine = _Machine.here()
    machine.write(records)
    look = machine.look()
    assert look == machine.look()
    expected = {
        (_path(name, record), _property(record, b"ID_FS_TYPE"), _property(record, b"ID_PART_ENTRY_UUID"))
        for name, record in records.items()
    }
    assert {(device.path, device.fstype, device.partuuid) for device in look.all} <= expected
    json.loads(report.json(list(look.all)))
    specs = [f"{kind}={getattr(device, kind.lower())}" for device in look.all for kind in KINDS]
    for spec in {
        *specs,
        *(device.path for device in look.all),
        *(link for d in look.all for link in d.links),
    }:
        _finds_what_it_says(look, spec)
    text = data.decode("utf-8", "surrogateescape")
    decoded = observe.decode(text)
    assert len(decoded) <= len(text)
    assert observe.decode(_encoded(decoded)) == decoded


def on_superblock(data: bytes) -> None:
    """The head of an image or device: an answer within its bounds, the same from memory and from a file."""
    found = superblock.parse(data[: superblock.HEAD_BYTES])
    assert found.fstype in ("", "ext4", "squashfs", "erofs", "xfs")
    assert 0 <= found.claimed_bytes < 1 << 100
    assert found.fstype or found == superblock.Superblock()
    with _file(data) as path:
        assert superblock.identify(path) == found
        assert superblock.claimed_bytes(path) == found.claimed_bytes
        for fstype in ("ext4", "vfat", "xfs", found.fstype):
            said = superblock.damage(path, fstype, 2e9)
            assert said.isprintable()
            assert len(said) < 100


def on_grubenv(data: bytes) -> None:
    """GRUB's environment block: what is read can be written, with one variable changed, and read again."""
    data = grubenv.SIGNATURE + data
    values = grubenv.parse(data)
    changed = {**values, "next_entry": "fallback"}
    try:
        block = grubenv.render(changed)
    except ValueError:
        assert sum(map(len, [*values, *values.values()])) > grubenv.SIZE_BYTES // 2
        return
    assert len(block) == grubenv.SIZE_BYTES
    assert grubenv.parse(block) == changed


def on_stages(data: bytes) -> None:
    """A cloud-init file: it is read, or refused with its name; so is each step, and each of its keys."""
    try:
        found = documents.read(data.decode("utf-8", "surrogateescape"), "x.yaml")
    except documents.DocumentError as error:
        _is_told(error, 0, "x.yaml")
        return
    for stage in ("rootfs.before", "rootfs", "initramfs"):
        try:
            steps = stages.steps_of(found, stage)
        except documents.DocumentError as error:
            _is_placed(error.message)
            continue
        for step in steps:
            for problem in step.problems:
                _is_placed(problem)
            assert not step.broken or step.problems


TARGETS: dict[str, Callable[[bytes], None]] = {
    "cmdline": on_cmdline,
    "layout": on_layout,
    "mountinfo": on_mountinfo,
    "udev": on_udev,
    "superblock": on_superblock,
    "grubenv": on_grubenv,
    "stages": on_stages,
}


def _is_placed(message: str) -> None:
    assert message.startswith("x.yaml:")
    assert len(message) < MAX_MESSAGE


def _is_told(error: ImmucoreError, quoted: int, named: str) -> None:
    """An error is a sentence that begins with `cannot`, has a hint, and no more text than it quotes."""
    assert named in error.message
    assert error.message.startswith("cannot ")
    assert error.hint
    assert len(error.message + error.hint) <= MAX_MESSAGE + 3 * quoted
    json.loads(report.json(error.message))


def _written(values: dict[str, str]) -> str:
    """Write an env file as systemd does (env-file.c, write_env_var())."""
    quoted = {key: re.sub(r'(["\\`$])', r"\\\1", value) for key, value in values.items()}
    return "".join(f'{key}="{value}"\n' for key, value in quoted.items())


def _plan_or_refusal(asked: Cmdline, image: Image, length: int) -> None:
    """Whatever is asked for is planned or refused with a sentence, and so is what is booted instead."""
    if not asked.engaged:
        return
    try:
        slots = cos.attempts(asked)
    except ImmucoreError as error:
        _is_told(error, length, "")
        return
    modes = [slot.mode for slot in slots]
    assert modes == sorted(modes)  # active, passive, recovery
    assert all(slot.instead_of == modes[0] for slot in slots[1:])
    for slot in slots:
        _slot_plan_or_refusal(slot, image, length)


def _slot_plan_or_refusal(asked: Cmdline, image: Image, length: int) -> None:
    """A slot is planned, twice the same, or refused with a sentence."""
    try:
        wanted = [each.spec for each in cos.root_devices(asked)]
        listed_paths(asked, image)
        wanted += [each.spec for each in cos.state_devices(asked, image)]
        devices = _machine_with(wanted)
        plan = cos.root(asked, devices) + cos.state(asked, devices, image) + cos.sentinels(asked)
        assert plan == cos.root(asked, devices) + cos.state(asked, devices, image) + cos.sentinels(asked)
        settings = read(asked, image)
    except ImmucoreError as error:
        _is_told(error, length, "")
        return
    assert not {*settings.ephemeral} & {*settings.persistent}
    _holds_together(plan)
    _is_fstab_of([each for each in plan if isinstance(each, Mount | Bind | Overlay | Loop)], image.fstab)
    json.loads(report.json(report.plan(plan)))


def _machine_with(specs: list[str]) -> Devices:
    """Give the devices that `specs` spell, each its own."""
    found: dict[tuple[str, str], Device] = {}
    for number, spec in enumerate(dict.fromkeys(specs)):
        kind, value = split(spec)
        path = value if kind == "" else f"/dev/vda{number}"
        key = (kind, value.lower())
        named = {kind.lower(): value} if kind else {}
        found.setdefault(key, Device(**{"path": path, "fstype": "ext4", "disks": ("/dev/vda",), **named}))
    return Devices(all=tuple(found.values()))


def _holds_together(plan: Plan) -> None:
    """Nothing lies outside, nothing is mounted twice, and nothing hides what was mounted before it."""
    mounted: list[str] = []
    for operation in plan:
        if isinstance(operation, Check):
            assert operation.target.startswith("/dev/")
        if isinstance(operation, Check | Refused):
            continue
        parts = operation.target.split("/")
        assert operation.target.startswith(("/sysroot", "/run/")) or operation.target == "/run"
        assert not {".", ".."} & {*parts}
        assert "\0" not in operation.target
        assert operation.why
        if isinstance(operation, Mount | Bind | Overlay | Loop):
            hidden = [path for path in mounted if is_below(path, operation.target)]
            assert not hidden, f"{operation} hides {hidden}"
            mounted.append(operation.target)


def _is_fstab_of(operations: list[Mount | Bind | Overlay | Loop], image_fstab: str) -> None:
    """Fstab, read as getmntent(3) does, has our mounts and the image's other lines, also when made anew."""
    text = fstab.render(operations, image_fstab)
    assert text == fstab.render(operations, fstab.of_image(text))
    ours, _, theirs = text.partition(fstab.MARK)
    assert {*theirs.split("\n")} <= {*image_fstab.split("\n"), ""}
    entries = [re.split("[ \t]+", line) for line in ours.split("\n")[:-1] if not line.startswith("#")]
    assert all(len(entry) == 6 for entry in entries), ours
    mounts = [each for each in operations if not isinstance(each, Loop)]
    targets = {fstab.as_booted(each.target) for each in mounts}
    assert {_getmntent(entry[1]) for entry in entries} == targets
    assert len(entries) == len({each.target for each in mounts})
    for line in theirs.split("\n"):
        fields = re.split("[ \t]+", line.strip(" \t"))
        assert len(fields) < 2 or fields[0].startswith("#") or _getmntent(fields[1]) not in targets


def _is_path(text: str) -> bool:
    return text.startswith("/") and text == os.path.normpath(text)


def _getmntent(field: str) -> str:
    return re.sub(r"\\(040|011|012|134)", lambda escaped: chr(int(escaped[1], 8)), field)


def _mangled(text: str) -> str:
    r"""Write a name as the kernel's mangle() does (fs/proc_namespace.c)."""
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\#" else c for c in text)


def _unmangled(text: str) -> str:
    return re.sub(r"\\(040|011|012|134|043)", lambda escaped: chr(int(escaped[1], 8)), text)


def _observed(table: bytes) -> tuple[observe.MountPoint, ...]:
    with _file(table) as path:
        return observe.mounts(path)


@contextmanager
def _file(content: bytes) -> Iterator[str]:
    """Give the path of a file with this content, which is on no file system."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


KINDS = ("LABEL", "UUID", "PARTLABEL", "PARTUUID")
# What sysfs calls the block devices; `!` is a slash in /dev. Sorted, as observe lists them.
NAMES = ("cciss!c0d0", "dm-0", "dm-1", "md0", "sda", "vda", "vda1", "vda2")


class _Machine:
    """A /sys/class/block and a /run/udev/data, made once, on a file system in memory."""

    _only: _Machine | None = None

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="fuzz-udev-", dir="/dev/shm"))
        atexit.register(shutil.rmtree, self._root, ignore_errors=True)
        (self._root / "class").mkdir()
        (self._root / "udev/data").mkdir(parents=True)
        (self._root / "udev/control").touch()  # udevd is there
        for minor, name in enumerate(NAMES):
            disk = name.rstrip("0123456789") if name.startswith("vda") else name
            real = self._root / "devices" / ("" if disk == name else disk) / name
            real.mkdir(parents=True, exist_ok=True)
            (real / "dev").write_text(f"254:{minor}\n")
            (real / "size").write_text("2048\n")
            if disk != name:
                (real / "partition").write_text("1\n")
            (self._root / "class" / name).symlink_to(os.path.relpath(real, self._root / "class"))

    @classmethod
    def here(cls) -> _Machine:
        cls._only = cls._only or cls()
        return cls._only

    def write(self, records: dict[str, bytes]) -> None:
        for minor, name in enumerate(NAMES):
            file = self._root / "udev/data" / f"b254:{minor}"
            if records.get(name):
                file.write_bytes(records[name])
            else:
                file.unlink(missing_ok=True)

    def look(self) -> Devices:
        sysfs, udev = self._root / "class", self._root / "udev/data"
        return observe.devices(sysfs=str(sysfs), udev=str(udev), efivars=str(self._root / "no-efivars"))


def _property(record: bytes, name: bytes) -> str:
    """Find a property of a record: the last, to the end of its line."""
    start = b"E:" + name + b"="
    found = [line[len(start) :] for line in record.split(b"\n") if line.startswith(start)]
    return (found or [b""])[-1].decode("utf-8", "surrogateescape")


def _path(name: str, record: bytes) -> str:
    mapped = _property(record, b"DM_NAME")
    return f"/dev/mapper/{mapped}" if mapped else "/dev/" + name.replace("!", "/")


def _encoded(text: str) -> str:
    r"""Write a name as udev does: what is not harmless becomes \xNN (systemd: encode_devnode_name())."""
    return "".join(
        c if c.isalnum() or c in "#+-.:=@_" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in text
    )


def _finds_what_it_says(look: Devices, spec: str) -> None:
    kind, value = split(spec)
    found = look.candidates(spec)
    for device in found:
        assert device.fstype not in MEMBERS
        if kind:
            assert getattr(device, kind.lower()).lower() == value.lower()
        else:
            assert value in (device.path, *device.links)
    try:
        assert look.find(spec) in found
    except ImmucoreError as error:
        _is_told(error, len(repr(look)), describe(spec))
        refused = True
    else:
        refused = False
    assert refused == (len(found) != 1)
