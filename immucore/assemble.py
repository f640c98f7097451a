"""Assembling what wanted devices are inside of: LUKS containers, md arrays, LVM volume groups.

Imported only by a boot that waits, when its first look has missed something. Where a program is not in the
initramfs, what it would assemble stays as it is, and a line says so.
"""

from __future__ import annotations

import json
import os

from immucore import cmdline, observe, process
from immucore.devices import HOME_ONLY, MEMBERS, describe, split
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
# What is not complete is started without what it lacks when nothing has been added to it for so long, as
# mdadm-last-resort@.timer does; earlier, not to miss its own deadline, but never at once: a leg that is only
# slow would be thrown out.
DEGRADED_SEC, LEAST_DEGRADED_SEC = 30.0, 10.0
MAX_HEADER_BYTES = 4 << 20  # of LUKS2: cryptsetup's LUKS2_HDR_OFFSET_MAX
SYSFS = "/sys/class/block"


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
        self._members: frozenset[str] = frozenset()
        self._quiet_since = 0.0
        self._switched_off = _switched_off(self._machine.cmdline)

    def look(self, devices: Devices, wanted: tuple[Wanted, ...], now: float) -> None:
        """Start what may bring `wanted`, which no device of `devices` answers to.

        `now` is CLOCK_MONOTONIC in seconds. To be called after each look, at least once a second: it also
        tells how the programs have ended.
        """
        self._reap()
        members = frozenset(device.path for device in devices.all if device.fstype in (MD, LVM))
        if members != self._members:
            self._members, self._quiet_since = members, now
        degraded = now - self._quiet_since >= patience_sec(wanted)
        self._unlock(devices, wanted)
        self._assemble(devices, degraded=degraded)
        self._activate(devices, degraded=degraded)

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
        name = os.path.realpath(path).removeprefix("/dev/").replace("/", "!")
        try:
            return bool(os.listdir(f"{self._machine.sysfs}/{name}/holders"))
        except OSError:  # it has left
            return True

    # md and LVM

    def _assemble(self, devices: Devices, *, degraded: bool) -> None:
        """Add each md member to its array, which starts when it is complete; later also without."""
        members = [device for device in devices.all if device.fstype == MD]
        free = [device for device in members if not self._held(device.path)]
        if not members or not (free or degraded):
            return
        program = self._program(MD, members[0].path, "mdadm")
        if not program:
            return
        hint = "look at them: mdadm --examine --scan; cat /proc/mdstat"
        for device in free:
            what = f"add '{device.path}' to its array"
            self._start(device.path, (program, "--incremental", device.path), what, hint=hint)
        if degraded and self._inactive_arrays():
            argv = (program, "--incremental", "--run", "--scan")
            key = f"degraded {sorted(self._members)}"
            self._start(key, argv, "start arrays that lack a member, degraded", hint=hint)

    def _inactive_arrays(self) -> bool:
        return any(
            observe.text(f"{self._machine.sysfs}/{name}/md/array_state").strip() == "inactive"
            for name in os.listdir(self._machine.sysfs)
            if name.startswith("md")
        )

    def _activate(self, devices: Devices, *, degraded: bool) -> None:
        """Activate volume groups, when physical volumes have come that nothing uses yet."""
        free = sorted(
            device.path for device in devices.all if device.fstype == LVM and not self._held(device.path)
        )
        if not free or any(key.startswith("vg ") for key in self._jobs):
            return
        program = self._program(LVM, free[0], "lvm")
        if not program:
            return
        mode = "degraded" if degraded else "complete"
        argv = (program, "vgchange", "-aay", "--sysinit", "--activationmode", mode)
        what = f"activate the volume groups on {', '.join(free)}"
        self._start(
            f"vg {mode} {free}",
            argv,
            f"{what}, degraded" if degraded else what,
            hint="look at them: lvm vgs; lvm pvs",
        )


def _words(finished: process.Finished) -> str:
    """Give the last line that a program printed, which is where it says why."""
    return (finished.output.strip() or f"exit status {finished.status}").splitlines()[-1]


def patience_sec(wanted: tuple[Wanted, ...]) -> float:
    """How long what is incomplete may stay so, before it is started without what it lacks."""
    longest = max((each.timeout_sec or DEGRADED_SEC * 2 for each in wanted), default=0)
    return max(LEAST_DEGRADED_SEC, min(DEGRADED_SEC, longest / 2))


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
