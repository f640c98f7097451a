"""What a boot that went wrong leaves on real file systems, and what `immucore doctor` makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, ItemsView, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from native import ACTIVE, FROZEN, Machine, command, isolated, wait_until_listening

from immucore import evidence, observe, report, syscalls
from immucore.devices import Device, Place

SECRETS = ("geheim-im-token", "geheim.im.iscsi", "geheim_in_netroot", "geheimes credential", "geheim:mount")
PLANTED = (
    f"k3s_token={SECRETS[0]} rd.iscsi.password={SECRETS[1]} netroot=iscsi:me:{SECRETS[2]}@::::iqn "
    f'"systemd.set_credential=x:{SECRETS[3]}" kurz=geheim'
)
MISSING = f"{ACTIVE} rd.cos.timeout=1"
FILES = {*evidence.LIMITS}


def records(machine: Machine, name: str) -> dict[str, dict[str, bytes]]:
    """Read the records on a partition, each with its files."""
    found = {}
    with machine.partition(name) as top:
        for path in sorted(top.glob("immucore/*")):
            found[path.name] = {file.name: file.read_bytes() for file in path.iterdir()}
    return found


def sees_no(machine: Machine, *names: str) -> None:
    for name in names:
        machine.record(machine.part(name)).unlink()


def everything(machine: Machine) -> bytes:
    """Read all that a boot can have left anywhere."""
    left = b""
    for folder in ("/run/immucore", "/run/cos", "/sysroot/oem", "/sysroot/usr/local"):
        for path in machine.path(folder).rglob("*"):
            if path.is_file():
                left += path.read_bytes()
    return left


def doctor(machine: Machine, agent: Sequence[str], *arguments: str) -> str:
    words = machine.inside(*agent[:-1], "doctor", *arguments)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_failed_boot_leaves_its_record_on_oem(machine: Machine, agent: Sequence[str]) -> None:
    sees_no(machine, "persistent")

    boot = machine.boot(MISSING, agent)

    where = boot.files["evidence"]
    ((name, files),) = records(machine, "oem").items()
    assert where == f"/oem/immucore/{name} ({machine.part('oem')})\n"
    assert evidence.NAME.fullmatch(name)
    assert set(files) == FILES
    assert json.loads(files["result.json"]) == boot.result
    assert json.loads(files["steps.json"])["steps"] == boot.steps
    assert json.loads(files["plan.json"]) == boot.plan
    assert files["immucore.log"].decode() == boot.files["immucore.log"]
    assert files["cmdline"].decode() == f"{MISSING}\n"
    assert b" /sysroot/oem rw" in files["mountinfo"]
    uses = {each["path"]: each["use"] for each in json.loads(files["devices.json"])["devices"]}
    assert uses[machine.part("state")] == "taken for /run/initramfs/cos-state"
    assert uses[machine.part("recovery")] == "nothing asked for it"
    said = doctor(machine, agent)
    assert said.startswith("This boot failed.\n")
    assert "What      cannot find a filesystem labelled 'COS_PERSISTENT'\n" in said
    assert "never seen: LABEL=COS_PERSISTENT" in said
    assert "asked for active, booted nothing" in said
    assert f"/sysroot/oem/immucore/{name}" in said
    assert f"{machine.part('state')}  24 MiB" in said
    assert max(map(len, said.splitlines())) < 80


def test_good_boot_leaves_nothing(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(ACTIVE, agent)

    assert boot.result["outcome"] == "ok"
    assert {"devices.json", "evidence"} & {*boot.files} == set()
    assert not machine.path("/sysroot/oem/immucore").exists()
    said = doctor(machine, agent)
    assert said == "This boot went well: active.\nNo boot that went wrong is on record.\n"


def test_no_secret_is_left_anywhere(machine: Machine, agent: Sequence[str]) -> None:
    sees_no(machine, "persistent")
    machine.path("/machine/share").mkdir()
    machine.run("mount", "-t", "tmpfs", f"//server/share,password={SECRETS[4]}", "/machine/share")

    boot = machine.boot(f"{MISSING} {PLANTED} rd.cos.debug", agent)

    left = everything(machine) + boot.stderr.encode() + boot.console.encode()
    left += doctor(machine, agent).encode() + doctor(machine, agent, "--json").encode()
    assert b"boot-000001-" in left
    for secret in (*SECRETS, "kurz=geheim"):
        assert secret.encode() not in left
    for key in (b"k3s_token", b"rd.iscsi.password", b"netroot", b"systemd.set_credential", b"password"):
        assert key + "=…".encode() in left


def test_password_in_root_is_not_logged(machine: Machine, source: Sequence[str]) -> None:
    boot = machine.boot(f"root=live:http://me:{SECRETS[0]}@host/x cos-img/filename=/x rd.cos.debug", source)

    assert "root=…" in boot.files["immucore.log"]
    assert SECRETS[0] not in "".join(boot.files.values()) + boot.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_boot_leaves_its_record(
    machine: Machine, agent: Sequence[str], number: signal.Signals
) -> None:
    sees_no(machine, "persistent")
    process = machine.start(f"{ACTIVE} rd.cos.timeout=30", agent)
    wait_until_listening(machine, process)
    os.kill(machine.agent_pid(), number)

    boot = machine.finish(process, timeout_sec=15)

    ((_, files),) = records(machine, "oem").items()
    assert json.loads(files["result.json"]) == boot.result
    assert boot.result["error"]["message"].startswith(f"stopped by signal {number}")


def test_bug_leaves_its_record(machine: Machine, source: Sequence[str]) -> None:
    bug = "import sys; from immucore import boot, observe; observe.image = None; sys.exit(boot.main())"

    boot = machine.boot(ACTIVE, [sys.executable, "-c", bug, "boot"])

    assert boot.status == 70
    assert "this is a bug in immucore" in boot.result["error"]["message"]
    ((_, files),) = records(machine, "oem").items()
    assert json.loads(files["result.json"]) == boot.result
    assert "Traceback" not in boot.stderr
    assert "Traceback" in files["immucore.log"].decode()


def test_bug_in_keeping_the_evidence_is_one_line(machine: Machine, source: Sequence[str]) -> None:
    sees_no(machine, "persistent")
    bug = "import sys; from immucore import boot, evidence; evidence.save = None; sys.exit(boot.main())"

    boot = machine.boot(MISSING, [sys.executable, "-c", bug, "boot"])

    assert boot.status == 3
    (line,) = [line for line in boot.stderr.splitlines() if "evidence" in line]
    assert line == "<4>cannot keep the evidence of this boot: TypeError: 'NoneType' object is not callable"


def test_image_missing_with_oem_not_mounted(machine: Machine, source: Sequence[str]) -> None:
    with machine.partition("state") as top:
        for image in (top / "cOS").iterdir():
            image.unlink()
    with machine.partition("recovery") as top:
        for image in (top / "cOS").iterdir():
            image.unlink()

    boot = machine.boot(ACTIVE, source)

    assert boot.result["outcome"] == "failed"
    ((_, files),) = records(machine, "oem").items()
    assert json.loads(files["result.json"]) == boot.result
    assert "cannot find the image" in doctor(machine, source)


def test_without_oem_the_next_partition_takes_it(machine: Machine, source: Sequence[str]) -> None:
    sees_no(machine, "oem")

    boot = machine.boot(f"{ACTIVE} rd.cos.oemtimeout=1", source)

    assert boot.result["outcome"] == "degraded"
    ((name, files),) = records(machine, "persistent").items()
    assert json.loads(files["result.json"])["outcome"] == "degraded"
    assert boot.files["evidence"].startswith(f"/usr/local/immucore/{name} ")
    said = doctor(machine, source)
    assert said.startswith("This boot is degraded: active, but not all of it.\n")
    assert "What      /oem: cannot find a filesystem labelled 'COS_OEM'" in said


def test_state_is_the_last_resort_and_read_only_again(machine: Machine, source: Sequence[str]) -> None:
    sees_no(machine, "oem", "persistent")

    boot = machine.boot(f"{MISSING} rd.cos.oemtimeout=1", source)

    state = next(mount for mount in boot.mounts if mount.target == "/run/initramfs/cos-state")
    assert (state.options[0], state.superblock_options[0]) == ("ro", "ro")
    (record,) = machine.path("/run/initramfs/cos-state/immucore").iterdir()
    assert {file.name for file in record.iterdir()} == FILES
    assert boot.files["evidence"].startswith(f"/run/initramfs/cos-state/immucore/{record.name} ")


def test_link_on_oem_does_not_lead_out(machine: Machine, source: Sequence[str]) -> None:
    sees_no(machine, "persistent")
    machine.path("/srv-of-the-initramfs").mkdir()
    with machine.partition("oem") as top:
        (top / "immucore").symlink_to("/srv-of-the-initramfs")

    boot = machine.boot(MISSING, source)

    assert list(machine.path("/srv-of-the-initramfs").iterdir()) == []
    assert boot.files["evidence"].startswith("/run/initramfs/cos-state/immucore/")


def test_oem_that_is_mounted_read_only_is_left_alone(machine: Machine, source: Sequence[str]) -> None:
    sees_no(machine, "persistent")

    boot = machine.boot(f"{MISSING} rd.cos.mount=LABEL=COS_OEM:/oem:ro", source)

    oem = next(mount for mount in boot.mounts if mount.target == "/sysroot/oem")
    assert (oem.options[0], oem.superblock_options[0]) == ("ro", "ro")
    assert boot.files["evidence"].startswith("/run/initramfs/cos-state/immucore/")
    assert not machine.path("/sysroot/oem/immucore").exists()


def test_path_does_not_command_the_terminal(machine: Machine, source: Sequence[str]) -> None:
    image = f"/cOS/{'x' * 5000}\x1b[2J/{'y' * 5000}.img"

    boot = machine.boot(f"elemental.mode=active elemental.image={image} rd.cos.fallback=off", source)

    summary = boot.files["summary"]
    assert "x\\u001b[2J/y" in boot.files["immucore.log"]
    assert "\x1b" not in summary
    assert summary.startswith("immucore: cannot ")
    assert summary.endswith(" More: immucore doctor\n")
    assert "all of it is in /run/immucore/immucore.log" in summary
    assert len(summary) < report.MAX_CONSOLE_CHARACTERS + 100


def test_nothing_takes_it(machine: Machine, source: Sequence[str]) -> None:
    for name in ("oem", "state", "persistent"):
        with machine.partition(name) as top:
            (top / "immucore").write_text("in the way")
    sees_no(machine, "persistent")

    boot = machine.boot(MISSING, source)

    (line,) = [line for line in boot.stderr.splitlines() if "evidence" in line]
    assert line.startswith("<4>cannot keep the evidence of this boot: ")
    assert f"{machine.part('oem')}: Not a directory; {machine.part('state')}: Not a directory" in line
    assert "evidence" not in boot.files
    assert boot.status == 3


def test_doctor_finds_it_in_the_next_boot(switch_on: Callable[[], Machine], agent: Sequence[str]) -> None:
    machine = switch_on()
    sees_no(machine, "persistent")
    machine.boot(MISSING, agent)
    machine = switch_on()

    boot = machine.boot(ACTIVE, agent)

    assert boot.result["outcome"] == "ok"
    said = doctor(machine, agent)
    assert said.startswith("This boot went well: active.\nThe last boot that went wrong (failed):\n")
    assert "What      cannot find a filesystem labelled 'COS_PERSISTENT'\n" in said
    found = json.loads(doctor(machine, agent, "--json"))
    assert found["this_boot"]["outcome"] == "ok"
    assert found["last_failure"]["where"].startswith("/sysroot/oem/immucore/boot-000001-")
    assert found["earlier"] == []
    assert doctor(machine, agent, "/sysroot/oem/immucore").startswith(
        "The last boot that went wrong (failed):\n"
    )


def test_failure_before_a_repair_in_the_same_boot(machine: Machine, source: Sequence[str]) -> None:
    number = machine.record(machine.part("persistent"))
    number.rename(number.with_name("away"))
    machine.boot(MISSING, source)
    number.with_name("away").rename(number)

    assert machine.boot(ACTIVE, source).result["outcome"] == "ok"

    said = doctor(machine, source)
    assert said.startswith("This boot went well: active.\nThe last boot that went wrong (failed):\n")
    assert "What      cannot find a filesystem labelled 'COS_PERSISTENT'\n" in said


def test_agent_that_is_switched_off_leaves_the_disks_alone(machine: Machine, source: Sequence[str]) -> None:
    machine.path("/run/cos").write_text("in the way")

    boot = machine.boot(f"{ACTIVE} rd.cos.disable", source)

    assert boot.result["outcome"] == "failed"
    assert {"devices.json", "evidence"} & {*boot.files} == set()
    assert records(machine, "oem") == {}


def test_doctor_looks_into_what_is_not_mounted(
    switch_on: Callable[[], Machine], agent: Sequence[str]
) -> None:
    machine = switch_on()
    sees_no(machine, "persistent")
    machine.boot(MISSING, agent)
    machine = switch_on()

    said = doctor(machine, agent)

    assert said.startswith("This boot has no record")
    assert "What      cannot find a filesystem labelled 'COS_PERSISTENT'\n" in said
    assert f"Evidence  {machine.part('oem')} (not mounted) immucore/boot-000001-" in said
    assert not [mount for mount in machine._mount_table() if mount.source == machine.part("oem")]


# File systems by themselves

RECORD = {name: b"x" * (limit // 2) for name, limit in evidence.LIMITS.items()}


@contextmanager
def mounted(
    folder: Path, *options: str, size_kib: int = 2048, fstype: str = "ext4"
) -> Iterator[tuple[Path, Device]]:
    """Give a file system on a loop device and the device; it is mounted, as a boot would have it."""
    image, top = folder / "image", folder / "top"
    top.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size_kib << 10)
    command("mke2fs", "-q", "-F", "-t", fstype, "-m", "0", *options, image)
    loop = command("losetup", "--find", "--show", image).strip()
    try:
        command("mount", "-t", fstype, loop, top)
        try:
            yield top, Device(path=loop, fstype=fstype, disks=(loop,), label="COS_OEM")
        finally:
            command("umount", top)
    finally:
        command("losetup", "--detach", loop)


def place(device: Device, **changes: bool) -> Place:
    changed: Place = Place(device=device, path="/oem", own_disk=True).replace(**changes)
    return changed


def fill(top: Path) -> None:
    """Leave not one free block."""
    with (top / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
        os.fsync(file.fileno())


def fill_inodes(top: Path) -> None:
    (top / "files").mkdir()
    try:
        for number in range(1 << 20):
            (top / f"files/{number}").touch()
    except OSError:
        return


@pytest.mark.parametrize("fstype", ["ext4", "ext2"])
@isolated(user=False)
def test_five_are_kept(tmp_path: Path, fstype: str) -> None:
    with mounted(tmp_path, size_kib=8192, fstype=fstype) as (top, device):
        for number in range(8):
            tree = syscalls.detached_mount(device.path, fstype, read_only=False)
            directory = evidence.open_records(tree, make=True)
            evidence.write_record(directory, {"result.json": b"{}"}, f"{number:08x}")
            os.close(directory)
            os.close(tree)
        names = sorted(path.name for path in (top / "immucore").iterdir())
        assert names == [f"boot-{number + 1:06}-{number:08x}" for number in range(3, 8)]
        assert {file.name for file in (top / "immucore" / names[-1]).iterdir()} == {"result.json"}


@isolated(user=False)
def test_full_in_bytes_older_records_make_room(tmp_path: Path) -> None:
    with mounted(tmp_path) as (top, device):
        for number in range(3):
            older = top / f"immucore/boot-{number + 1:06}-0000000{number}"
            older.mkdir(parents=True)
            (older / "result.json").write_bytes(b"x" * (200 << 10))
        fill(top)

        where, reasons = evidence.save(RECORD, (place(device),))

        assert reasons == []
        assert where.startswith("/oem/immucore/boot-000004-")
        left = sorted(path.name for path in (top / "immucore").iterdir())
        assert left[0] == "boot-000003-00000002"
        assert {file.name for file in (top / "immucore" / left[1]).iterdir()} == FILES


@isolated(user=False)
def test_little_room_takes_the_essential(tmp_path: Path) -> None:
    with mounted(tmp_path) as (top, device):
        (top / "immucore").mkdir()
        fill(top)
        with (top / "filler").open("r+b") as file:
            file.truncate(os.fstat(file.fileno()).st_size - (20 << 10))
            os.fsync(file.fileno())

        where, reasons = evidence.save(RECORD, (place(device),))

        assert (reasons, where != "") == ([], True)
        (record,) = (top / "immucore").iterdir()
        assert (record / "result.json").stat().st_size == evidence.ESSENTIAL["result.json"]
        assert {file.name for file in record.iterdir()} <= {*evidence.ESSENTIAL}


@pytest.mark.parametrize("how", [fill, fill_inodes])
@isolated(user=False)
def test_full_partition_is_passed_over(tmp_path: Path, how: Callable[[Path], None]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with mounted(tmp_path / "a") as (full, oem), mounted(tmp_path / "b") as (top, other):
        how(full)

        where, reasons = evidence.save(RECORD, (place(oem), place(other, own_disk=False)))

        assert reasons == [f"{oem.path}: No space left on device"]
        assert where.endswith(f"({other.path})")
        assert len(list((top / "immucore").iterdir())) == 1
        assert not list(full.glob("immucore/*"))


@pytest.mark.parametrize("how", [fill, fill_inodes])
@isolated(user=False)
def test_the_last_old_record_goes_where_nothing_else_is_left(
    tmp_path: Path, how: Callable[[Path], None]
) -> None:
    with mounted(tmp_path) as (top, device):
        older = top / "immucore/boot-000007-01234567"
        older.mkdir(parents=True)
        for name in evidence.LIMITS:
            (older / name).write_bytes(b"x" * (80 << 10))
        how(top)

        where, _ = evidence.save(RECORD, (place(device),))

        assert where.startswith("/oem/immucore/boot-000008-")
        assert not older.exists()


@isolated(user=False)
def test_nothing_stays_mounted_or_damaged(tmp_path: Path) -> None:
    with mounted(tmp_path) as (top, device):
        command("umount", top)

        where, reasons = evidence.save(RECORD, (place(device),))

        assert (where != "", reasons) == (True, [])
        assert device.path not in Path("/proc/self/mountinfo").read_text()
        command("e2fsck", "-fn", device.path)
        command("mount", device.path, top)
        assert len(list(top.glob("immucore/boot-000001-*/*"))) == len(FILES)


@pytest.mark.parametrize("value", ["2", "3"])
@isolated(user=False)
def test_file_system_with_errors_is_left_alone(tmp_path: Path, value: str) -> None:
    with mounted(tmp_path) as (top, device):
        command("umount", top)
        command("debugfs", "-w", "-R", f"set_super_value state {value}", device.path)

        answer = evidence.save(RECORD, (place(device),))

        assert answer == ("", [f"{device.path}: its file system is damaged"])
        command("mount", device.path, top)
        assert not (top / "immucore").exists()


@isolated(user=False)
def test_superblock_that_is_none_is_left_alone(tmp_path: Path) -> None:
    with mounted(tmp_path) as (top, device):
        command("umount", top)
        with open(device.path, "r+b", buffering=0) as file:
            before = file.read(4096)
            file.seek(0)
            file.write(bytes(4096))
            os.fsync(file.fileno())

        answer = evidence.save(RECORD, (place(device),))

        assert answer == ("", [f"{device.path}: its file system is damaged"])
        with open(device.path, "r+b", buffering=0) as file:
            assert file.read(4096) == bytes(4096)
            file.seek(0)
            file.write(before)
        command("mount", device.path, top)


@isolated(user=False)
def test_removable_disk_is_no_place_unless_the_system_is_on_it(tmp_path: Path) -> None:
    with mounted(tmp_path) as (top, device):
        stick = device.replace(removable=True)

        foreign = evidence.save(RECORD, (place(stick, own_disk=False),))
        own = evidence.save(RECORD, (place(stick),))

        assert foreign == ("", [f"{device.path}: it is on a removable disk"])
        assert own[0].startswith("/oem/immucore/boot-000001-")
        assert (top / "immucore").exists()


@isolated(user=False)
def test_what_the_kernel_made_read_only_is_left_alone(tmp_path: Path) -> None:
    with mounted(tmp_path) as (top, device):
        # errors=remount-ro leaves this: the mount is still rw, the file system no longer is.
        tree = syscalls.detached_mount(device.path, device.fstype, read_only=False)
        syscalls.reconfigure(tree, "ro")
        os.close(tree)

        answer = evidence.save(RECORD, (place(device, remount=True),))

        assert answer == ("", [f"{device.path}: the kernel has made it read-only because of errors"])
        assert not (top / "immucore").exists()


class Slow(dict[str, bytes]):
    """What takes longer to write than anybody waits for."""

    def items(self) -> ItemsView[str, bytes]:
        time.sleep(60)
        return super().items()


class Stubborn(Slow):
    """Nor does whoever writes it listen to anybody."""

    def items(self) -> ItemsView[str, bytes]:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        return super().items()


def read_only(top: Path) -> bool:
    (mount,) = [each for each in observe.mounts() if each.target == str(top)]
    return mount.superblock_options.split(",")[0] == "ro"


@isolated(user=False)
def test_what_was_made_writable_is_read_only_again_when_the_time_is_over(tmp_path: Path) -> None:
    with mounted(tmp_path) as (top, device):
        command("mount", "-o", "remount,ro", top)
        assert read_only(top)

        answer = evidence.save(Slow(RECORD), (place(device, remount=True),), 0.3)

        assert answer == ("", ["the disk took longer than 0.3 s"])
        assert (top / "immucore").exists()  # so it had been writable
        assert read_only(top)


@isolated(user=False)
def test_who_does_not_listen_is_killed(tmp_path: Path) -> None:
    with mounted(tmp_path) as (_, device):
        started = time.monotonic()

        answer = evidence.save(Stubborn(RECORD), (place(device),), 0.3)

        assert answer == ("", ["the disk took longer than 0.3 s"])
        assert time.monotonic() - started < 2


@isolated(user=False)
def test_partition_behind_another_in_its_place_is_named_by_its_device(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with mounted(tmp_path / "a") as (own, device), mounted(tmp_path / "b") as (other, _):
        for at in (own, other):
            where, _ = evidence.save(RECORD, (Place(device=device, path=str(at), own_disk=True),))
            (record,) = (own / "immucore").iterdir()
            there = f"{own}/immucore/{record.name} ({device.path})"
            assert where == (there if at == own else f"{device.path} immucore/{record.name}")


def test_frozen_doctor_refuses_in_one_sentence(tmp_path: Path, frozen: Sequence[str]) -> None:
    done = subprocess.run([FROZEN[0], "doctor", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"immucore: cannot find a record of immucore in '{tmp_path}'\n  hint: ")
