"""Assembling what wanted devices are inside of: LUKS containers, md arrays, LVM volume groups.

Imported only by a boot that waits, when its first look has missed something. Where a program is not in the
initramfs, what it would assemble stays as it is, and a line says so.
"""

from __future__ import annotations

import json
import os

from immucore import cmdline, observe, process
from immucore.devices import BOOTDISK, HOME_ONLY, MEMBERS, describe, split
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from immucore.devices import Device, Devices, Wanted
    from immucore.log import Log

LUKS, MD, LVM = "crypto_LUKS", "linux_raid_member", "LVM2_member"
# Of systemd 252 and, where /lib is not /usr/lib, of its ancestors; systemd 257 has it among the programs.
CRYPTSETUP = ("/usr/lib/systemd/systemd-cryptsetup", "/lib/systemd/systemd-cryptsetup", "systemd-cryptsetup")
KEYS = ("/etc/cryptsetup-keys.d", "/run/cryptsetup-keys.d")  # crypttab(5)
UNITS = ("/run/systemd/generator", "/run/systemd/generator.early", "/run/systemd/generator.late")
SWITCHES = {LUKS: "rd.luks", MD: "rd.md", LVM: "rd.lvm"}  # dracut.cmdline(7): 0 leaves them alone
# What is not complete is started without what it lacks when no member has come for so long, as
# mdadm-last-resort@.timer does; never earlier: a leg that is only slow would be thrown out.
DEGRADED_SEC = 30.0
METADATA_BYTES = 1 << 20  # where pvcreate(8) puts the description of the volume group, unless told otherwise
MAX_HEADER_BYTES = 4 << 20  # of LUKS2: cryptsetup's LUKS2_HDR_OFFSET_MAX
SYSFS = "/sys/class/block"
MD_HINT = "look at them: mdadm --examine --scan; cat /proc/mdstat"


class Machine(Record):
    """Where all of this is looked up; the tests have their own."""

    find: Callable[[str], str | None]
    start: Callable[[Sequence[str]], process.Child]
    sysfs: str = SYSFS
    keys: tuple[str, ...] = KEYS
    units: tuple[str, ...] = UNITS
    cmdline: str = "/proc/cmdline"


class Job(Record):
    """A program that runs: what for, as a message says it, and what helps when it fails."""

    child: process.Child
    what: str
    hint: str
    asks: bool = False  # it waits for somebody to type, maybe


class Stack(Record):
    """The members of one array or volume group, as far as they are there."""

    members: tuple[Device, ...]
    home: bool  # one of them is on a disk of the system

    @property
    def fstype(self) -> str:
        """What its members are: MD or LVM."""
        return self.members[0].fstype


class Assembler:
    """What has been started in one wait to bring devices that were not there.

    Nothing here blocks: programs run beside the wait, and what they bring is found by its next look.
    """

    def __init__(self, log: Log, machine: Machine | None = None) -> None:
        self._log = log
        self._machine = machine or Machine(find=process.find, start=process.Child)
        self._jobs: dict[str, Job] = {}
        self._tried: set[str] = set()
        self._said: set[str] = set()
        self._kin: dict[tuple[str, str, str, str], bool] = {}
        self._members: frozenset[tuple[str, str]] = frozenset()
        self._quiet_since = 0.0
        self._switched_off = _switched_off(self._machine.cmdline)

    def look(self, devices: Devices, wanted: tuple[Wanted, ...], now: float) -> None:
        """Start what may bring `wanted`, which no device of `devices` answers to.

        `now` is CLOCK_MONOTONIC in seconds. To be called after each look, at least once a second: it also
        tells how the programs have ended.
        """
        self._reap()
        self._unlock(devices, wanted)
        locked = {
            each
            for device, each in containers(devices, wanted)
            if _is_named(device, each.spec) and not self._held(device.path)
        }
        lost = [each for each in wanted if each not in locked and not devices.answers(each)]
        home = frozenset().union(*(home_disks(devices, each) for each in wanted))
        elsewhere = any(each.home != HOME_ONLY for each in lost)
        stacks = self._stacks(devices, home)
        allowed = {
            device.path
            for stack in stacks
            for device in stack.members
            if device.is_on(home) or (not device.removable and (stack.home or elsewhere))
        }
        self._tell(stacks, allowed)
        self._assemble([each for stack in stacks for each in stack.members if each.path in allowed])
        self._activate(stacks, allowed)
        whole = [stack for stack in stacks if all(each.path in allowed for each in stack.members)]
        members = frozenset((each.path, each.uuid) for stack in whole for each in stack.members)
        if members - self._members:
            self._quiet_since = now
        self._members = members
        if lost and now - self._quiet_since >= DEGRADED_SEC and self._start_degraded(whole):
            self._quiet_since = (
                now  # what it brings may be what is wanted: nothing further before that is known
            )

    def close(self) -> None:
        """End what still asks for a passphrase; call it when the wait is over, however it ends."""
        self._reap()
        for key, job in self._jobs.items():
            if job.asks and not self._held(key):  # else it has its answer, and is about to end
                self._log.info(f"gave up to {job.what}: {_words(job.child.end())}")
        self._jobs = {}

    def _reap(self) -> None:
        for key, job in list(self._jobs.items()):
            finished = job.child.finished()
            if finished is None:
                continue
            del self._jobs[key]
            self._log.debug(
                f"{job.what}: exit status {finished.status}: {' '.join(finished.output.split())}"
            )
            if finished.status:
                self._log.warning(f"cannot {job.what}: {_words(finished)}\n  hint: {job.hint}")

    def _start(self, key: str, argv: Sequence[str], what: str, *, hint: str, asks: bool = False) -> None:
        """Run a program once for `key`, unless it has been switched off or is not there."""
        if key in self._tried:
            return
        self._tried.add(key)
        try:
            child = self._machine.start(argv)
        except OSError as error:
            self._log.warning(f"cannot {what}: {argv[0]}: {error.strerror}\n  hint: {hint}")
            return
        self._log.info(what)
        self._log.debug(f"runs: {' '.join(argv)}")
        self._jobs[key] = Job(child=child, what=what, hint=hint, asks=asks)

    def _program(self, kind: str, path: str, *names: str) -> str | None:
        """Find what assembles members of this kind; say once why nothing will."""
        if kind in self._switched_off:
            why = f"{SWITCHES[kind]}=0 is on the kernel command line"
        else:
            for name in names:
                if found := self._machine.find(name):
                    return found
            why = f"this initramfs has no {names[-1]}"
        if kind not in self._said:
            self._said.add(kind)
            self._log.warning(f"'{path}' ({kind}) is not looked into: {why}")
        return None

    # LUKS

    def _unlock(self, devices: Devices, wanted: tuple[Wanted, ...]) -> None:
        for device, each in containers(devices, wanted):
            if device.path in self._tried or self._held(device.path):
                continue
            program = self._program(LUKS, device.path, *CRYPTSETUP)
            if not program:
                return
            if unit := self._unit(device):
                if unit not in self._said:
                    self._said.add(unit)
                    self._log.info(f"'{device.path}' is left to {unit}")
                continue
            key, tpm2 = self._key_file(device), "systemd-tpm2" in tokens(device.path)
            asks = not (key or tpm2)
            if asks and any(job.asks for job in self._jobs.values()):
                continue  # one question at a time: systemd remembers the answer, which may fit the next
            how = f"key file {key}" if key else "the TPM" if tpm2 else "a passphrase"
            self._start(
                device.path,
                (
                    *(program, "attach", f"luks-{device.uuid}", device.path, key or "-"),
                    "luks,tpm2-device=auto" if tpm2 and not key else "luks",
                ),
                f"unlock '{device.path}' with {how}: it may hold {describe(each.spec)}",
                hint=f"boot again to try again, or type {program} attach luks-{device.uuid} {device.path}",
                asks=True,  # a wrong key, and a TPM that refuses, end in the question for a passphrase
            )

    def _key_file(self, device: Device) -> str | None:
        names = [f"luks-{device.uuid}.key", *([f"{device.label}.key"] if device.label else [])]
        paths = [
            f"{directory}/{name}" for directory in self._machine.keys for name in names if "/" not in name
        ]
        return next((path for path in paths if os.path.isfile(path)), None)

    def _unit(self, device: Device) -> str | None:
        """Find the unit that rd.luks.* or a crypttab has made for a container."""
        names = [f"'{name}'" for name in (device.path, *device.links)]
        for directory in self._machine.units:
            try:
                found = [name for name in os.listdir(directory) if name.startswith("systemd-cryptsetup@")]
            except FileNotFoundError:
                continue
            for name in sorted(found):
                unit = f"{directory}/{name}"
                if os.path.isfile(unit) and any(each in observe.text(unit) for each in names):
                    return name
        return None

    def _held(self, path: str) -> bool:
        """Tell, of now and not of the last look, whether something has been made of a device."""
        try:
            return bool(os.listdir(f"{self._machine.sysfs}/{_kernel_name(path)}/holders"))
        except OSError:  # it has left
            return True

    # md and LVM

    def _stacks(self, devices: Devices, home: frozenset[str]) -> list[Stack]:
        """Sort the members of arrays and volume groups by what they are members of."""
        groups: list[list[Device]] = []
        for device in devices.all:
            if device.fstype in (MD, LVM):
                own = [group for group in groups if any(self._are_kin(device, each) for each in group)]
                groups = [group for group in groups if group not in own]
                groups.append([*(each for group in own for each in group), device])
        return [
            Stack(members=tuple(group), home=any(each.is_on(home) for each in group)) for group in groups
        ]

    def _tell(self, stacks: Sequence[Stack], allowed: set[str]) -> None:
        for device in (each for stack in stacks for each in stack.members):
            if device.path not in allowed and device.path not in self._said:
                self._said.add(device.path)
                why = "removable" if device.removable else "on another disk than the system"
                self._log.info(f"'{device.path}' ({device.fstype}) is left alone: it is {why}")

    def _are_kin(self, one: Device, other: Device) -> bool:
        """Tell whether two are members of the same array or volume group.

        For udev the UUID of an md member is the array's, and that of a physical volume its own.
        """
        if one.fstype != other.fstype or not (one.uuid and other.uuid):
            return False
        if one.fstype == MD:
            return one.uuid == other.uuid
        key = (one.path, one.uuid, other.path, other.uuid)
        if key not in self._kin:
            self._kin[key] = one.uuid.encode() in _metadata(other.path) or other.uuid.encode() in _metadata(
                one.path
            )
        return self._kin[key]

    def _assemble(self, members: Sequence[Device]) -> None:
        """Add each md member to its array, which starts when it is complete."""
        for device in members:
            if device.fstype == MD and device.path not in self._tried and not self._held(device.path):
                program = self._program(MD, device.path, "mdadm")
                if not program:
                    return
                argv = (program, "--incremental", device.path)
                self._start(device.path, argv, f"add '{device.path}' to its array", hint=MD_HINT)

    def _activate(self, stacks: Sequence[Stack], allowed: set[str], *, mode: str = "complete") -> bool:
        """Activate volume groups, when physical volumes have come that nothing uses yet."""
        groups = [
            paths
            for stack in stacks
            if stack.fstype == LVM
            and (paths := [each.path for each in stack.members if each.path in allowed])
            and not all(self._held(path) for path in paths)
        ]
        paths = sorted(path for group in groups for path in group)
        key = f"vg {mode} {paths}"
        if not paths or key in self._tried or any(name.startswith("vg ") for name in self._jobs):
            return False
        program = self._program(LVM, paths[0], "lvm")
        if not program:
            return False
        what = f"activate the volume groups on {', '.join(paths)}"
        argv = (program, "vgchange", "-aay", "--sysinit", "--activationmode", mode)
        what += ", degraded" if mode == "degraded" else ""
        self._start(key, (*argv, "--config", _only(paths)), what, hint="look at them: lvm vgs; lvm pvs")
        return True

    def _start_degraded(self, stacks: Sequence[Stack]) -> bool:
        """Start without the missing members what only can hold what is wanted; tell whether anything was."""
        if any(name.startswith("vg ") for name in self._jobs):
            return False
        lacking = [stack for stack in stacks if self._lacks(stack)]
        chosen = [stack for stack in lacking if stack.home] or lacking
        if not all(stack.home for stack in chosen) and len(places := _places(chosen)) > 1:
            if "places" not in self._said:
                self._said.add("places")
                self._log.warning(
                    "nothing is started degraded: each of these may hold what is missing:"
                    f" {'; '.join(places)}\n  hint: name the disk of the system by {BOOTDISK}=,"
                    " or start the right one: mdadm --run /dev/md…;"
                    " lvm vgchange -ay --activationmode degraded"
                )
            return False
        for stack in chosen:
            for name in self._inactive_arrays(stack):
                if program := self._program(MD, f"/dev/{name}", "mdadm"):
                    what = f"start '/dev/{name}' without the members that it lacks, degraded"
                    argv = (program, "--run", f"/dev/{name}")
                    self._start(f"run {name} {_names(stack)}", argv, what, hint=MD_HINT)
        self._activate(chosen, {each.path for stack in chosen for each in stack.members}, mode="degraded")
        self._tried.update(f"degraded {_names(stack)}" for stack in chosen)
        return bool(chosen)

    def _lacks(self, stack: Stack) -> bool:
        """Tell whether a stack is there in part, and has not been started so."""
        if f"degraded {_names(stack)}" in self._tried:
            return False
        if stack.fstype == MD:
            return bool(self._inactive_arrays(stack) and self._program(MD, _names(stack), "mdadm"))
        return bool(self._program(LVM, _names(stack), "lvm")) and not all(
            self._held(each.path) for each in stack.members
        )

    def _inactive_arrays(self, stack: Stack) -> list[str]:
        """Name the arrays that wait for more members, and have none but these."""
        if stack.fstype != MD:
            return []
        members = {_kernel_name(each.path) for each in stack.members}
        found = []
        for name in os.listdir(self._machine.sysfs):
            if not name.startswith("md"):
                continue
            directory = f"{self._machine.sysfs}/{name}"
            try:
                slaves = set(os.listdir(f"{directory}/slaves"))
                state = observe.text(f"{directory}/md/array_state").strip()
            except OSError:  # it has left
                continue
            if state == "inactive" and slaves and slaves <= members:
                found.append(name)
        return found


def _kernel_name(path: str) -> str:
    return os.path.realpath(path).removeprefix("/dev/").replace("/", "!")


def _names(stack: Stack) -> str:
    return ", ".join(sorted(each.path for each in stack.members))


def _places(stacks: Sequence[Stack]) -> list[str]:
    """Name the members of stacks, those that share a disk together: they are of one machine."""
    groups: list[tuple[set[str], list[str]]] = []
    for stack in stacks:
        disks = {disk for each in stack.members for disk in each.disks}
        own = [group for group in groups if group[0] & disks]
        groups = [group for group in groups if group not in own]
        names = [*(name for group in own for name in group[1]), _names(stack)]
        groups.append((disks.union(*(group[0] for group in own)), names))
    return [", ".join(names) for _, names in groups]


def _metadata(path: str) -> bytes:
    """Read where a physical volume describes its group, with the UUIDs of all of its members."""
    try:
        with open(path, "rb") as file:
            return file.read(METADATA_BYTES)
    except OSError:
        return b""


def _only(paths: Sequence[str]) -> str:
    """Let lvm see nothing but these (lvm.conf(5)); --devices would be of 2.03.12, and Ubuntu 22.04 has .11.

    What could mean something in a regular expression or in the quotes is any character.
    """
    patterns = ["".join(each if each.isalnum() or each in "/_-" else "." for each in path) for path in paths]
    accepted = "".join(f'"a|^{pattern}$|",' for pattern in patterns)
    return f'devices {{ use_devicesfile=0 filter=[{accepted}"r|.*|"] }}'


def _words(finished: process.Finished) -> str:
    """Give the last line that a program printed, which is where it says why."""
    return (finished.output.strip() or f"exit status {finished.status}").splitlines()[-1]


def containers(devices: Devices, wanted: tuple[Wanted, ...]) -> Iterator[tuple[Device, Wanted]]:
    """List the LUKS containers that may hold what is wanted, and for whom each would be unlocked.

    Those on the disk of the system go before others of the same name; a foreign one on a stick must not ask
    for a passphrase by a name that anybody can give. One that says nothing of itself may hold the system or
    its data, on its disk.
    """
    luks = [device for device in devices.all if device.fstype == LUKS]
    for each in wanted:
        home = home_disks(devices, each)
        named = [device for device in luks if _is_named(device, each.spec)]
        own = [device for device in named if device.is_on(home)]
        silent = [device for device in luks if device.is_on(home) and not (device.label or device.partlabel)]
        if split(each.spec)[0] in ("LABEL", "PARTLABEL"):
            named = [device for device in named if not device.removable]
            if home and each.home == HOME_ONLY:
                named = []
        for device in own or named or (silent if each.home != HOME_ONLY else ()):
            yield device, each


def home_disks(devices: Devices, wanted: Wanted) -> frozenset[str]:
    """Name the disks that hold the system, as far as can be told before it is mounted."""
    near = devices.candidates(wanted.near) if wanted.near else ()
    known = devices.boot_disks().union(near[0].disks if len(near) == 1 else ())
    names = ("COS_STATE", "COS_RECOVERY", "COS_GRUB")
    system = [each for each in devices.all if each.label in names and each.fstype not in MEMBERS]
    return frozenset(known or {disk for each in system if not each.removable for disk in each.disks})


def _is_named(device: Device, spec: str) -> bool:
    """Tell whether a container is the one in which a spelling is to be looked for."""
    kind, value = split(spec)
    if kind == "LABEL":
        names = (value, value.removeprefix("COS_").lower()) if value.startswith("COS_") else (value,)
        return device.label in (value, f"{value}_LUKS") or device.partlabel in names
    if kind == "PARTLABEL":
        return device.partlabel == value
    if kind in ("UUID", "PARTUUID"):
        return value.lower() in (device.uuid.lower() if kind == "UUID" else device.partuuid.lower(),)
    return value in (f"/dev/mapper/luks-{device.uuid}", device.path, *device.links)


def tokens(path: str) -> tuple[str, ...]:
    """List the types of the tokens in a LUKS2 header: what else than a passphrase opens the container.

    None where it is not LUKS2, or its header cannot be read: it is not trusted to be whole.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            size = int.from_bytes(start[8:16], "big")
            if start[:8] != b"LUKS\xba\xbe\x00\x02" or not 4096 < size <= MAX_HEADER_BYTES:
                return ()
            text = file.read(size - 4096).partition(b"\0")[0]
        header = json.loads(text)
        return tuple(str(token["type"]) for token in header["tokens"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()


def _switched_off(path: str) -> frozenset[str]:
    """Read which kinds the kernel command line says are to be left alone."""
    with open(path, "rb") as file:
        given: Mapping[str, str | None] = dict(cmdline.words(file.read().strip()))
    off = set()
    for kind, key in SWITCHES.items():
        if key in given:
            try:
                if not cmdline.boolean(given[key]):
                    off.add(kind)
            except ValueError:
                continue
    return frozenset(off)
