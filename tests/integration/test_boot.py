"""The whole agent, from source and frozen, on a real disk with real file systems."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from native import ACTIVE, PASSIVE, RECOVERY, ROOT, Boot, Machine, described, wait_until_listening

STATE = "/run/initramfs/cos-state"
RW_PATHS = ("/etc", "/home", "/opt", "/root", "/srv", "/usr/local", "/var")  # as they are mounted
GUARD = ROOT / "dracut-module/50immucore/immucore-guard"
FILES = {"immucore.log", "layout.json", "mounts", "plan.json", "result.json", "steps.json"}
MODES = {"active", "passive", "recovery", "live"}
BIND_STATE = 'PERSISTENT_STATE_PATHS="/var /home"\nPERSISTENT_STATE_BIND=true\n'
OVERLAY_STATE = 'PERSISTENT_STATE_PATHS="/var /home"\nPERSISTENT_STATE_BIND=false\n'
ALONE = f"{ACTIVE} rd.cos.fallback=off"
OTHER_SLOT = "boot another slot from the boot menu, and install this one again from there"


def layout(machine: Machine, text: str, **place: str) -> None:
    """Write the cos-layout.env of an image."""
    with machine.image(**place) as root:
        (root / "etc/cos/cos-layout.env").write_text(text)


def sentinels(machine: Machine) -> set[str]:
    """Read every sentinel; each has to hold 1 without a newline."""
    found = set()
    for field in ("cos", "elemental"):
        directory = machine.path(f"/run/{field}")
        for file in directory.glob("*_mode") if directory.is_dir() else ():
            assert file.read_text() == "1"
            found.add(f"{field}/{file.name}")
    return found


def check_mounts(machine: Machine, boot: Boot) -> None:
    """Compare what is mounted with the plan: everything, nothing else, and each as it was planned."""
    done = [step["operation"] for step in boot.steps if step["outcome"] in ("done", "present")]
    planned = [each for each in done if each["kind"] in ("mount", "loop", "bind", "overlay")]
    assert sorted(mount.target for mount in boot.mounts) == sorted(each["target"] for each in planned)
    assert sorted(boot.files["mounts"].splitlines()) == sorted(f"{m.device} {m.target}" for m in boot.mounts)
    for each in planned:
        mount = next(mount for mount in boot.mounts if mount.target == each["target"])
        match each["kind"]:
            case "mount":
                assert (mount.source, mount.fstype) == (each["source"], each["fstype"])
                assert "ro" not in each["options"] or "ro" in mount.options
                assert {"nosuid", "nodev", "noexec"} & {*each["options"]} <= {*mount.options}
            case "loop":
                backing = machine.run("cat", f"/sys/dev/block/{mount.device}/loop/backing_file")
                assert backing == each["source"] + "\n"
                assert mount.options[0] == each["options"][0]
            case "overlay":
                assert f"upperdir={each['backing']}/upper" in mount.superblock_options
                assert mount.options[0] == "rw"
            case "bind":
                source, target = (machine.path(path).stat() for path in (each["source"], each["target"]))
                assert (source.st_dev, source.st_ino) == (target.st_dev, target.st_ino)


def check_good(machine: Machine, boot: Boot, mode: str, image: str) -> None:
    """Check everything that holds for every good boot."""
    assert boot.status == 0
    assert boot.stderr.startswith(f"<6>{mode} booted from {image} in ")
    assert boot.stderr.count("\n") == 1
    assert boot.console == ""
    bound = any(mount.target == "/sysroot/etc/fstab" for mount in boot.mounts)
    assert set(boot.files) == FILES | ({"fstab"} if bound else set())
    result = boot.result
    expected = {"schema": 1, "outcome": "ok", "exit_status": 0, "mode_asked": mode, "mode_booted": mode}
    assert {key: result[key] for key in expected} == expected
    assert (result["error"], result["degraded"], result["waits"]) == (None, [], [])
    root = machine.path("/sysroot").stat()
    assert result["root"] == {
        "dev": f"{os.major(root.st_dev)}:{os.minor(root.st_dev)}",
        "ino": root.st_ino,
    }
    assert [step["operation"] for step in boot.steps] == boot.plan["operations"]
    assert all(step["outcome"] in ("done", "present") and not step["reason"] for step in boot.steps)
    started = [step["started_usec"] for step in boot.steps]
    assert started == sorted(started)
    assert started[0] >= result["started_usec"]
    assert sum(step["took_usec"] for step in boot.steps) <= result["took_usec"]
    assert sentinels(machine) == {f"cos/{mode}_mode", f"elemental/{mode}_mode"}
    assert not machine.path("/run/cos/degraded").exists()
    slot = "recovery" if mode == "recovery" else mode
    assert machine.path("/sysroot/etc/slot").read_text() == slot
    check_mounts(machine, boot)
    machine.run("sh", GUARD)
    check_fstab(machine)


def check_fstab(machine: Machine) -> None:
    """Check that each mount point has one line that can be read, as the booted system names it."""
    text = machine.path("/sysroot/etc/fstab").read_text()
    assert "/sysroot" not in text
    targets = [line.split()[1] for line in text.splitlines() if not line.startswith("#")]
    assert len(targets) == len(set(targets))
    assert all(line.startswith("#") or len(line.split()) == 6 for line in text.splitlines())


def check_failed(machine: Machine, boot: Boot, status: int, message: str, hint: str) -> None:
    """Check everything that holds for every failed boot."""
    assert boot.status == status
    assert (
        FILES | {"devices.json", "summary"}
        <= set(boot.files)
        <= FILES | {"devices.json", "summary", "evidence"}
    )
    assert boot.result["outcome"] == "failed"
    assert boot.result["exit_status"] == status
    assert boot.result["mode_booted"] == ""
    assert boot.result["error"] == {"message": message, "hint": hint}
    for said in (boot.stderr, boot.console):
        assert f"immucore: {message}" in said
        assert f"  hint: {hint}" in said
        assert "The boot stops here. More: immucore doctor" in said
        assert "Traceback" not in said
    assert "Traceback" not in boot.files["immucore.log"]
    assert sentinels(machine) == set()
    check_mounts(machine, boot)
    refused = subprocess.run(machine.inside("sh", GUARD), capture_output=True, text=True, check=False)
    assert refused.returncode == 1


# Good boots


@pytest.mark.parametrize(
    ("cmdline", "mode", "image"),
    [
        (ACTIVE, "active", "/cOS/active.img"),
        (PASSIVE, "passive", "/cOS/passive.img"),
        ("root=LABEL=COS_STATE cos-img/filename=/cOS/active.img", "active", "/cOS/active.img"),
        ("elemental.mode=passive elemental.image=/cOS/passive.img", "passive", "/cOS/passive.img"),
        ("root=PARTLABEL=state cos-img/filename=/cOS/active.img", "active", "/cOS/active.img"),
        (RECOVERY, "recovery", "/cOS/recovery.squashfs"),
        (RECOVERY.replace("squashfs", "img"), "recovery", "/cOS/recovery.img"),
    ],
)
def test_boots_each_slot(
    machine: Machine, agent: Sequence[str], cmdline: str, mode: str, image: str
) -> None:
    boot = machine.boot(cmdline, agent)

    check_good(machine, boot, mode, image)
    targets = {mount.target: mount for mount in boot.mounts}
    root = targets["/sysroot"]
    assert "ro" in root.options
    assert root.fstype == ("squashfs" if image.endswith("squashfs") else "ext4")
    assert "ro" in targets[STATE].options
    assert targets[STATE].source == machine.part("recovery" if mode == "recovery" else "state")
    assert targets["/sysroot/oem"].source == machine.part("oem")
    assert "rw" in targets["/sysroot/oem"].options
    overlays = [mount.target for mount in boot.mounts if mount.fstype == "overlay"]
    if mode == "recovery":
        assert overlays == ["/sysroot" + path for path in RW_PATHS]
    else:
        assert overlays == ["/sysroot" + path for path in RW_PATHS if path != "/usr/local"]
        assert targets["/sysroot/usr/local"].source == machine.part("persistent")


@pytest.mark.parametrize("cmdline", [ACTIVE, RECOVERY], ids=["active", "recovery"])
def test_a_healthy_boot_starts_no_process(machine: Machine, frozen: Sequence[str], cmdline: str) -> None:
    """One process from the start to the exit, in which the launcher executes the frozen program once more.

    PyInstaller's launcher does that to have its libraries found; it is nobody else, and no fork.
    """
    calls = "--trace=execve,execveat,fork,vfork,clone,clone3"
    strace = ("strace", "--follow-forks", "--output=/machine/trace", calls)

    boot = machine.boot(cmdline, (*strace, *frozen))

    assert boot.result["outcome"] == "ok"
    *executed, end = machine.path("/machine/trace").read_text().splitlines()
    assert len(executed) == 2, executed
    assert all(f' execve("{frozen[0]}", ' in line for line in executed)
    assert len({line.split()[0] for line in (*executed, end)}) == 1
    assert end.endswith("+++ exited with 0 +++")


def test_keeps_what_the_directories_are(machine: Machine, agent: Sequence[str]) -> None:
    """An overlay has the mode, owner and attributes of what it covers, and /tmp its sticky bit."""
    machine.boot(ACTIVE, agent)

    root = machine.path("/sysroot/root").stat()
    assert (stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid) == (0o700, 4711, 4712)
    assert os.getxattr(machine.path("/sysroot/root"), "user.kept") == b"yes"
    assert stat.S_IMODE(machine.path("/sysroot/tmp").stat().st_mode) == 0o1777
    assert stat.S_IMODE(machine.path("/sysroot/etc").stat().st_mode) == 0o755


@pytest.mark.parametrize("layout_text", ["", BIND_STATE, OVERLAY_STATE])
def test_a_second_run_changes_nothing(machine: Machine, agent: Sequence[str], layout_text: str) -> None:
    layout(machine, layout_text)
    first = machine.boot(ACTIVE, agent)
    fstab = machine.path("/sysroot/etc/fstab").read_text()
    utab = machine.path("/run/mount/utab").read_text()
    table = machine.run("cat", "/proc/self/mountinfo")

    second = machine.boot(ACTIVE, agent)

    assert second.status == 0
    assert machine.run("cat", "/proc/self/mountinfo") == table
    assert second.outcomes() == dict.fromkeys(first.outcomes(), "present")
    assert machine.path("/sysroot/etc/fstab").read_text() == fstab
    assert machine.path("/run/mount/utab").read_text() == utab
    assert (second.files["mounts"], second.plan) == (first.files["mounts"], first.plan)
    machine.run("sh", GUARD)


@pytest.mark.parametrize("layout_text", [BIND_STATE, OVERLAY_STATE])
def test_state_survives_and_the_rest_does_not(
    switch_on: Callable[[], Machine], agent: Sequence[str], layout_text: str
) -> None:
    machine = switch_on()
    layout(machine, layout_text)
    check_good(machine, machine.boot(ACTIVE, agent), "active", "/cOS/active.img")
    for path in ("/var/mine", "/home/mine", "/usr/local/mine", "/oem/mine", "/etc/mine"):
        machine.path(f"/sysroot{path}").write_text("kept")
    machine.path("/sysroot/var/log/messages").write_text("edited")
    machine.path("/sysroot/var/sparse").unlink()

    machine = switch_on()
    boot = machine.boot(ACTIVE, agent)

    check_good(machine, boot, "active", "/cOS/active.img")
    for path in ("/var/mine", "/home/mine", "/usr/local/mine", "/oem/mine"):
        assert machine.path(f"/sysroot{path}").read_text() == "kept"
    assert not machine.path("/sysroot/etc/mine").exists()
    assert machine.path("/sysroot/var/log/messages").read_text() == "edited"
    assert not machine.path("/sysroot/var/sparse").exists()
    seeds = [outcome for step, outcome in boot.outcomes().items() if step.startswith("seed")]
    assert seeds == (["present"] * 2 if layout_text == BIND_STATE else [])


def test_the_effective_layout_says_where_it_comes_from(machine: Machine, agent: Sequence[str]) -> None:
    layout(machine, 'RW_PATHS="/etc /var /srv"\n' + BIND_STATE)
    with machine.partition("oem") as oem:
        (oem / "cos-layout.env").write_text('RW_PATHS="-/srv /opt nonsense"\n')

    boot = machine.boot(ACTIVE, agent)

    shown = json.loads(boot.files["layout.json"])
    image, ours = "RW_PATHS in /etc/cos/cos-layout.env has", "RW_PATHS in /oem/cos-layout.env has"
    assert shown["ephemeral"] == [
        {"path": "/etc", "listed_as": "/etc", "why": f"{image} /etc"},
        {"path": "/opt", "listed_as": "/opt", "why": f"{ours} /opt"},
    ]
    assert [each["path"] for each in shown["persistent"]] == ["/home", "/var"]
    assert shown["removed"] == [{"path": "/srv", "why": f"{ours} -/srv"}]
    assert [each["text"] for each in shown["rejected"]] == ["nonsense"]
    assert [each["mountpoint"] for each in shown["volumes"]] == ["/usr/local"]
    assert (shown["persistent_target"], shown["persistent_bind"]) == ("/usr/local/.state", True)
    mounted = [mount.target for mount in boot.mounts]
    assert "/sysroot/opt" in mounted
    assert "/sysroot/srv" not in mounted


def test_the_machine_keeps_its_id(switch_on: Callable[[], Machine], agent: Sequence[str]) -> None:
    """An image without one gets the one that the machine had; the first boot of all makes one."""
    machine = switch_on()
    with machine.image() as root:
        (root / "etc/machine-id").write_text("uninitialized\n")
    machine.boot(ACTIVE, agent)
    first = machine.path("/sysroot/etc/machine-id").read_text()
    assert re.fullmatch("[0-9a-f]{32}\n", first)
    assert machine.path("/sysroot/usr/local/etc/machine-id").read_text() == first

    machine = switch_on()
    boot = machine.boot(ACTIVE, agent)
    assert boot.outcomes()["machineid /sysroot/etc/machine-id"] == "done"
    assert machine.path("/sysroot/etc/machine-id").read_text() == first

    machine = switch_on()
    with machine.image() as root:
        (root / "etc/machine-id").write_text("0" * 31 + "1\n")
    boot = machine.boot(ACTIVE, agent)
    assert boot.outcomes()["machineid /sysroot/etc/machine-id"] == "present"
    assert machine.path("/sysroot/etc/machine-id").read_text() == "0" * 31 + "1\n"


def test_audit_logs_are_for_root(machine: Machine, agent: Sequence[str]) -> None:
    machine.boot(ACTIVE, agent)
    assert stat.S_IMODE(machine.path("/sysroot/var/log/audit").stat().st_mode) == 0o700
    assert stat.S_IMODE(machine.path("/sysroot/var/log").stat().st_mode) == 0o1770, "the image's own"


def test_extensions_of_the_slot_and_of_all(machine: Machine, agent: Sequence[str]) -> None:
    layout(machine, "PERSISTENT_STATE_PATHS=/var/lib/kairos\nPERSISTENT_STATE_BIND=true\n")
    with machine.image() as root:
        for name in ("usr/bin", "usr/share", "usr/local"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in ("active/a.raw", "active/both.raw", "common/both.raw", "common/c.raw", "passive/p.raw"):
            for kind in ("extensions", "confexts"):
                file = root / "var/lib/kairos" / kind / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("image")
        (root / "var/lib/kairos/extensions/active/out.raw").symlink_to("/etc/passwd")
        (root / "var/lib/kairos/extensions/active/no-image").write_text("")

    boot = machine.boot(ACTIVE, agent)

    check_good(machine, boot, "active", "/cOS/active.img")
    for kind in ("extensions", "confexts"):
        links = {path.name: os.readlink(path) for path in machine.path(f"/run/{kind}").iterdir()}
        base = f"/var/lib/kairos/{kind}"
        assert links == {
            "a.raw": f"{base}/active/a.raw",
            "both.raw": f"{base}/active/both.raw",
            "c.raw": f"{base}/common/c.raw",
        }
    drop_in = machine.path("/run/systemd/system/systemd-sysext.service.d/immucore.conf").read_text()
    (hierarchies,) = re.findall('SYSTEMD_SYSEXT_HIERARCHIES=(.*)"', drop_in)
    assert {"/usr/bin", "/usr/share"} <= {*hierarchies.split(":")}
    assert not {"/usr", "/usr/local", "/opt"} & {*hierarchies.split(":")}
    assert {*machine.boot(ACTIVE, agent).outcomes().values()} == {"present"}


@pytest.mark.parametrize("bind", ["true", "false"])
def test_a_directory_that_is_made_has_the_label_of_its_parent(
    machine: Machine, agent: Sequence[str], bind: str
) -> None:
    """As the kernel gives it where a policy is loaded; without one it would be nobody's."""
    label = b"system_u:object_r:var_lib_t:s0\0"
    with machine.image() as root:
        (root / "var/lib").mkdir(exist_ok=True)
        os.setxattr(root / "var/lib", "security.selinux", label)
    layout = f'PERSISTENT_STATE_PATHS="/var/lib/kept/deep"\nPERSISTENT_STATE_BIND={bind}\n'
    with machine.partition("oem") as root:
        (root / "cos-layout.env").write_text(layout)

    boot = machine.boot(ACTIVE, agent)

    assert boot.result["outcome"] == "ok", boot.stderr
    for path in ("kept", "kept/deep"):
        assert os.getxattr(machine.path(f"/sysroot/var/lib/{path}"), "security.selinux") == label


def test_written_files_keep_their_label(machine: Machine, agent: Sequence[str]) -> None:
    """On an image that is labelled for SELinux; on one that is not there is none."""
    label = b"system_u:object_r:etc_t:s0\0"
    with machine.image() as root:
        os.setxattr(root / "etc/fstab", "security.selinux", label)
        os.setxattr(root / "etc", "security.selinux", b"system_u:object_r:other_t:s0\0")
    machine.boot(ACTIVE, agent)
    assert os.getxattr(machine.path("/sysroot/etc/fstab"), "security.selinux") == label
    assert os.getxattr(machine.path("/sysroot/etc"), "security.selinux") == b"system_u:object_r:other_t:s0\0"
    assert not machine.path("/run/systemd/relabel-extra.d").exists()


KEPT = "/sysroot/usr/local/.state"


def test_an_upgrade_and_the_way_back(switch_on: Callable[[], Machine], agent: Sequence[str]) -> None:
    """What nobody has touched follows the image that is booted, what somebody has changed stays."""
    machine = switch_on()
    for slot in ("active", "passive"):
        layout(machine, BIND_STATE.replace("/var", "/var /var/log"), name=f"{slot}.img")
    with machine.image(name="passive.img") as root:
        (root / "var/log/messages").write_text("passive\n")
        (root / "var/tool").write_text("passive\n")
        (root / "var/new").write_text("passive\n")
        (root / "var/sparse").unlink()
    check_good(machine, machine.boot(ACTIVE, agent), "active", "/cOS/active.img")
    first = described(machine.path(f"{KEPT}/var.bind"))
    machine.path("/sysroot/var/tool").write_text("mine\n")
    machine.path("/sysroot/var/mine").write_text("mine\n")

    machine = switch_on()
    boot = machine.boot(PASSIVE, agent)

    check_good(machine, boot, "passive", "/cOS/passive.img")
    assert boot.outcomes()[f"seed {KEPT}/var.bind"] == "done"
    assert machine.path("/sysroot/var/tool").read_text() == "mine\n"
    assert machine.path("/sysroot/var/new").read_text() == "passive\n"
    assert machine.path("/sysroot/var/log/messages").read_text() == "passive\n"
    assert not machine.path("/sysroot/var/sparse").exists()
    assert boot.result["conflicts"] == ["/var/tool"]

    machine = switch_on()
    boot = machine.boot(ACTIVE, agent)

    check_good(machine, boot, "active", "/cOS/active.img")
    assert boot.result["conflicts"] == []
    back = described(machine.path(f"{KEPT}/var.bind"))
    assert back.pop("mine")["content"] == b"mine\n"
    assert back["tool"]["content"] == b"mine\n"
    for each in (back, first):
        each.pop("tool")
        each.pop("."), each.pop("log")  # the times of directories are those of their changes
    assert back == first


def test_an_image_that_has_not_changed_is_not_compared(machine: Machine, agent: Sequence[str]) -> None:
    """A boot of the same image looks at no file of the state, and at none of what the image gives for it."""
    layout(machine, BIND_STATE)
    machine.boot(ACTIVE, agent)
    for path in ("/sysroot/home", "/sysroot/var"):
        machine.run("umount", path)
    strace = ("strace", "--output=/machine/trace", "--trace=%file,%desc", "--decode-fds=path")

    boot = machine.boot(ACTIVE, (*strace, *agent))

    assert [outcome for step, outcome in boot.outcomes().items() if step.startswith("seed")] == [
        "present"
    ] * 2
    # Whether /var/log/audit is there is asked by its name; nothing is opened for that (O_PATH).
    trace = re.sub(".*/sysroot/var/log/audit.*\n", "", machine.path("/machine/trace").read_text())
    assert "/.state/var.manifest" in trace
    assert not re.findall(r".*/\.state/[a-z]+\.bind/.*", trace)
    assert not re.findall(r".*/sysroot/(?:home|var)/.*", trace)
    assert "getdents64" not in "\n".join(line for line in trace.splitlines() if "/.state" in line)


def test_a_second_run_does_not_take_the_state_for_the_image(machine: Machine, agent: Sequence[str]) -> None:
    """A disk that was too full for the new image's files, and an agent that is started once more."""
    layout(machine, BIND_STATE)
    machine.boot(ACTIVE, agent)
    for path in ("/sysroot/home", "/sysroot/var"):
        machine.run("umount", path)
    machine.path("/sysroot/var").stat()
    (machine.path(f"{KEPT}/var.bind") / "tool").write_text("mine")
    manifest = machine.path(f"{KEPT}/var.manifest")
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(['{"image": "another"}\n', *lines[1:]]))
    machine.boot(ACTIVE, agent)
    manifest.write_text("".join(['{"image": "another"}\n', *lines[1:]]))

    other = manifest.read_text()

    boot = machine.boot(ACTIVE, agent)  # with /var bound

    assert boot.result["outcome"] == "degraded"
    assert ["it is in use" in reason for reason in boot.result["degraded"]] == [True]
    assert manifest.read_text() == other
    assert machine.path("/sysroot/var/tool").read_text() == "mine"


def test_overlay_on_a_block_device_is_kept(switch_on: Callable[[], Machine], agent: Sequence[str]) -> None:
    cmdline = f"{ACTIVE} rd.cos.overlay=LABEL=COS_RECOVERY"
    machine = switch_on()
    boot = machine.boot(cmdline, agent)
    check_good(machine, boot, "active", "/cOS/active.img")
    base = next(mount for mount in boot.mounts if mount.target == "/run/overlay")
    assert (base.source, base.fstype) == (machine.part("recovery"), "ext4")
    machine.path("/sysroot/etc/mine").write_text("kept")

    machine = switch_on()
    check_good(machine, machine.boot(cmdline, agent), "active", "/cOS/active.img")

    assert machine.path("/sysroot/etc/mine").read_text() == "kept"


def test_volume_on_etc_takes_the_fstab(machine: Machine, agent: Sequence[str]) -> None:
    """A volume makes /etc writable as an overlay does, and needs no file of the image to bind over."""
    layout(machine, 'RW_PATHS=/var\nVOLUMES="LABEL=COS_PERSISTENT:/etc"\n')

    boot = machine.boot(ACTIVE, agent)

    assert (boot.status, boot.result["outcome"]) == (0, "ok")
    assert boot.outcomes()["writefile /sysroot/etc/fstab"] == "done"
    assert "/etc ext4 rw" in machine.path("/sysroot/etc/fstab").read_text()
    check_mounts(machine, boot)


def test_no_writable_path_at_all(machine: Machine, agent: Sequence[str]) -> None:
    """RW_PATHS that is set but empty means none: fstab is then bound over the image's."""
    layout(machine, "RW_PATHS=\n")

    boot = machine.boot(ACTIVE, agent)

    check_good(machine, boot, "active", "/cOS/active.img")
    assert not [mount for mount in boot.mounts if mount.fstype == "overlay"]
    assert "/sysroot/etc/fstab" in [mount.target for mount in boot.mounts]
    with pytest.raises(OSError, match="Read-only"):
        machine.path("/sysroot/etc/mine").write_text("")


def test_layouts_of_image_and_oem_are_merged(machine: Machine, agent: Sequence[str]) -> None:
    layout(machine, 'RW_PATHS="/etc /var"\nVOLUMES="LABEL=COS_OEM:/oem LABEL=COS_PERSISTENT:/usr/local"\n')
    with machine.partition("oem") as oem:
        (oem / "cos-layout.env").write_text("RW_PATHS='/etc /var /srv'\n")

    boot = machine.boot(ACTIVE, agent)

    check_good(machine, boot, "active", "/cOS/active.img")
    overlays = [each for each in boot.plan["operations"] if each["kind"] == "overlay"]
    origins = {"/etc": "/etc/cos", "/var": "/etc/cos", "/srv": "/oem"}
    assert {each["target"]: each["why"] for each in overlays} == {
        f"/sysroot{path}": f"RW_PATHS in {origin}/cos-layout.env has {path}"
        for path, origin in origins.items()
    }


def test_nested_volumes(machine: Machine, agent: Sequence[str]) -> None:
    """A volume below another is mounted after it, on a directory made in it."""
    nested = "rd.cos.mount=LABEL=COS_RECOVERY:/usr/local/data:ro,noexec"

    boot = machine.boot(f"{ACTIVE} {nested}", agent)

    check_good(machine, boot, "active", "/cOS/active.img")
    targets = [mount.target for mount in boot.mounts]
    assert targets.index("/sysroot/usr/local") < targets.index("/sysroot/usr/local/data")
    assert machine.path("/sysroot/usr/local/data/cOS/recovery.img").is_file()


def test_debug_rw(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(f"{ACTIVE} rd.cos.debugrw", agent)

    check_good(machine, boot, "active", "/cOS/active.img")
    writable = {mount.target: "rw" in mount.options for mount in boot.mounts}
    assert writable["/sysroot"]
    assert writable[STATE]
    machine.path("/sysroot/sbin/mine").write_text("")


@pytest.mark.parametrize(
    ("cmdline", "mode"),
    [
        (f"{ACTIVE} rd.cos.disable", "active"),
        (f"{RECOVERY} rd.immucore.disable=1", "recovery"),
        (f"{ACTIVE} elemental.disable", "active"),
        ("root=live:CDLABEL=COS_LIVE", "live"),
        ("root=/dev/vda1 ro quiet", ""),
        ("root=/dev/vda1 rd.cos.disable", ""),
    ],
)
def test_leaves_the_machine_alone(machine: Machine, agent: Sequence[str], cmdline: str, mode: str) -> None:
    """Disabled and live boots get their sentinel; a boot that is none of ours not even that."""
    boot = machine.boot(cmdline, agent)

    assert (boot.status, boot.console, boot.mounts) == (0, "", [])
    assert boot.stderr == "" or re.fullmatch("<6>nothing to do: .*\n", boot.stderr)
    assert (boot.result["outcome"], boot.result["root"]) == ("ok", None)
    assert sentinels(machine) == ({f"cos/{mode}_mode", f"elemental/{mode}_mode"} if mode else set())


def test_debug_tells_everything(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(f"{ACTIVE} rd.cos.debug", agent)

    assert boot.status == 0
    said = boot.stderr.splitlines()
    assert all(line.startswith(("<7>", "<6>")) for line in said)
    text = "\n".join(said)
    assert f"<7>command line: {ACTIVE} rd.cos.debug" in said
    for name in ("oem", "state", "recovery", "persistent"):
        assert f"device: Device(path='{machine.part(name)}'" in text
    for step in boot.steps:
        operation = step["operation"]
        assert f"<7>plan: {operation['text']}, because {operation['why']}" in said
        assert f"<7>{step['outcome']} in {step['took_usec']} us: {operation['text']}" in said
    assert "overlay overlay rw" in text  # mountinfo
    logged = [line.partition("] ")[2] for line in boot.files["immucore.log"].splitlines()]
    assert [line.replace("> ", ">", 1) for line in logged] == said


def test_warns_of_every_key_it_does_not_know(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(f"{ACTIVE} rd.cos.nonsense=1 rd.cos.timeout=soon", agent)

    assert boot.status == 0
    warnings = [line for line in boot.stderr.splitlines() if line.startswith("<4>")]
    assert len(warnings) == 2
    assert "rd.cos.nonsense=1" in warnings[0]
    assert "rd.cos.timeout=soon" in warnings[1]
    assert "180" in warnings[1]


def test_tells_the_kernel_log_without_systemd(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(ACTIVE, agent, journal=False)

    assert (boot.status, boot.stderr) == (0, "")
    assert machine.kernel_log().startswith("<6>immucore: active booted from /cOS/active.img in ")


# Failed and degraded boots


def test_no_state_partition(machine: Machine, agent: Sequence[str]) -> None:
    machine.record(machine.part("state")).unlink()
    started = time.monotonic()

    boot = machine.boot(f"{ALONE} rd.cos.timeout=1", agent)

    assert time.monotonic() - started < 4
    seen = [("COS_OEM", "oem"), ("COS_RECOVERY", "recovery"), ("COS_PERSISTENT", "persistent")]
    hint = "labels seen: " + ", ".join(f"{label} ({machine.part(name)})" for label, name in seen)
    told = boot.result["error"]["hint"]
    assert told.startswith(f"{hint}; not known to udev yet: ")
    assert machine.part("state") in told
    check_failed(machine, boot, 3, "cannot find a filesystem labelled 'COS_STATE'", told)
    assert boot.mounts == []
    assert boot.result["waits"][0]["missing"] == ["LABEL=COS_STATE"]
    assert 900_000 < boot.result["waits"][0]["took_usec"] < 2_000_000


def test_no_persistent_partition(machine: Machine, agent: Sequence[str]) -> None:
    """A node without its data would set itself up anew."""
    machine.record(machine.part("persistent")).unlink()

    boot = machine.boot(f"{ACTIVE} rd.cos.timeout=1", agent)

    assert (boot.status, boot.result["outcome"]) == (3, "failed")
    assert boot.result["error"]["message"] == "cannot find a filesystem labelled 'COS_PERSISTENT'"
    assert sentinels(machine) == set()


def test_recovery_needs_nothing_of_the_users(machine: Machine, agent: Sequence[str]) -> None:
    for name in ("persistent", "oem", "state"):
        machine.record(machine.part(name)).unlink()

    boot = machine.boot(f"{RECOVERY} rd.cos.oemtimeout=1", agent)

    assert (boot.status, boot.result["outcome"]) == (0, "degraded")
    assert sentinels(machine) == {"cos/recovery_mode", "elemental/recovery_mode"}


def test_oem_that_never_comes(machine: Machine, agent: Sequence[str]) -> None:
    machine.record(machine.part("oem")).unlink()

    boot = machine.boot(f"{ACTIVE} rd.cos.oemtimeout=1", agent)

    reason = "/oem: cannot find a filesystem labelled 'COS_OEM'"
    assert boot.status == 0
    assert boot.result["outcome"] == "degraded"
    assert boot.result["degraded"] == [reason]
    assert machine.path("/run/cos/degraded").read_text() == reason + "\n"
    assert f"immucore: this boot is degraded: {reason}" in boot.console
    assert boot.outcomes()["missing /sysroot/oem"] == "degraded"
    assert sentinels(machine) == {"cos/active_mode", "elemental/active_mode"}
    check_mounts(machine, boot)
    machine.run("sh", GUARD)
    assert [line.split()[0] for line in boot.stderr.splitlines()] == [
        "<6>waiting",
        "<4>cannot",
        "<4>active",
        "<6>the",  # evidence is kept
    ]
    assert boot.stderr.splitlines()[2].endswith(f"degraded: {reason}")


def test_image_missing(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(ALONE.replace("active.img", "gone.img"), agent)

    check_failed(machine, boot, 4, f"cannot find the image '{STATE}/cOS/gone.img'", OTHER_SLOT)


def test_image_empty(machine: Machine, agent: Sequence[str]) -> None:
    with machine.partition("state") as state:
        (state / "cOS/active.img").write_bytes(b"")

    boot = machine.boot(ALONE, agent)

    check_failed(machine, boot, 4, f"cannot mount '{STATE}/cOS/active.img': the file is empty", OTHER_SLOT)


def test_image_is_no_file_system(machine: Machine, agent: Sequence[str]) -> None:
    with machine.partition("state") as state:
        (state / "cOS/active.img").write_bytes(b"garbage" * 10000)

    boot = machine.boot(ALONE, agent)

    known = "ext2/3/4, squashfs, erofs, xfs or btrfs"
    message = f"cannot mount '{STATE}/cOS/active.img': no superblock of {known} in it"
    check_failed(machine, boot, 4, message, OTHER_SLOT)


@pytest.mark.parametrize("kept_bytes", [4096, 65536, 4 << 20])
def test_image_cut_short(machine: Machine, agent: Sequence[str], kept_bytes: int) -> None:
    """The superblock is whole and says more than there is."""
    with machine.partition("state") as state:
        os.truncate(state / "cOS/active.img", kept_bytes)

    boot = machine.boot(ALONE, agent)

    message = f"cannot mount '{STATE}/cOS/active.img': {(8 << 20) - kept_bytes} bytes of it are missing"
    check_failed(machine, boot, 4, message, OTHER_SLOT)


@pytest.mark.parametrize(
    ("missing", "lacks"),
    [
        ("etc/os-release", "etc/os-release and usr/lib/os-release"),
        ("sbin/init", "an init (/sbin/init)"),
    ],
)
def test_image_without_a_system(machine: Machine, agent: Sequence[str], missing: str, lacks: str) -> None:
    with machine.image() as root:
        (root / missing).unlink()

    boot = machine.boot(ALONE, agent)

    message = f"cannot boot '{STATE}/cOS/active.img': there is no {lacks} in it"
    check_failed(machine, boot, 4, message, OTHER_SLOT)
    assert [mount.target for mount in boot.mounts] == [STATE]


def test_init_of_the_command_line_is_what_counts(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(f"{ALONE} init=/sbin/other", agent)

    message = f"cannot boot '{STATE}/cOS/active.img': there is no init=/sbin/other in it"
    check_failed(machine, boot, 4, message, OTHER_SLOT)


# Another slot in the same boot


def check_fallback(machine: Machine, boot: Boot, mode: str, reason: str) -> None:
    """Check that another slot was booted, and that everyone can see which and why."""
    assert boot.status == 0
    assert (boot.result["mode_asked"], boot.result["mode_booted"]) == ("active", mode)
    assert boot.result["outcome"] == "degraded"
    assert boot.result["failures"][0]["message"].startswith(reason)
    assert sentinels(machine) == {f"cos/{mode}_mode", f"elemental/{mode}_mode"}
    told = machine.path("/run/cos/upgrade_failure").read_text()
    assert told.startswith(f"active: {reason}")
    assert f"{mode} is booted instead of active: active: {reason}" in boot.console
    assert f"{mode} is booted instead of active" in machine.path("/run/cos/degraded").read_text()
    assert machine.path("/sysroot/etc/slot").read_text() == mode
    machine.run("sh", GUARD)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cannot find the image": lambda image: image.unlink(),
    "cannot mount": lambda image: os.truncate(image, 1 << 20),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_passive_instead_of_active(machine: Machine, agent: Sequence[str], reason: str) -> None:
    with machine.partition("state") as state:
        DAMAGE[reason](state / "cOS/active.img")

    boot = machine.boot(ACTIVE, agent)

    check_fallback(machine, boot, "passive", reason)
    undisturbed = machine.mounts()
    again = machine.boot(ACTIVE, agent)
    assert [(m.target, m.device) for m in machine.mounts()] == [(m.target, m.device) for m in undisturbed]
    assert again.result["mode_booted"] == "passive"


def test_passive_instead_of_an_active_whose_layout_cannot_be_read(
    machine: Machine, agent: Sequence[str]
) -> None:
    """All that active had mounted is taken back first."""
    layout(machine, "VOLUMES='LABEL=x\n")

    boot = machine.boot(ACTIVE, agent)

    check_fallback(machine, boot, "passive", "cannot read line 1 of /etc/cos/cos-layout.env")
    assert [mount.target for mount in boot.mounts].count("/sysroot") == 1
    assert [mount.target for mount in boot.mounts].count(STATE) == 1


def test_recovery_instead_of_both(machine: Machine, agent: Sequence[str]) -> None:
    with machine.partition("state") as state:
        for image in (state / "cOS").iterdir():
            os.truncate(image, 1 << 20)

    boot = machine.boot(ACTIVE, agent)

    check_fallback(machine, boot, "recovery", "cannot mount")
    assert [failure["mode"] for failure in boot.result["failures"]] == ["active", "passive"]
    (where,) = (mount for mount in boot.mounts if mount.target == STATE)
    assert where.source == machine.part("recovery")


def test_recovery_instead_of_a_state_partition(machine: Machine, agent: Sequence[str]) -> None:
    machine.record(machine.part("state")).unlink()

    boot = machine.boot(f"{ACTIVE} rd.cos.timeout=1", agent)

    check_fallback(machine, boot, "recovery", "cannot find a filesystem labelled 'COS_STATE'")


def test_no_slot_is_left(machine: Machine, agent: Sequence[str]) -> None:
    for place in ("state", "recovery"):
        with machine.partition(place) as files:
            for image in (files / "cOS").iterdir():
                image.write_bytes(b"")

    boot = machine.boot(ACTIVE, agent)

    empty = [
        f"cannot mount '{STATE}/cOS/{name}': the file is empty" for name in ("active.img", "passive.img")
    ]
    empty += [f"cannot mount '{STATE}/cOS/recovery.squashfs': the file is empty"]
    empty += [f"cannot mount '{STATE}/cOS/recovery.img': the file is empty"]
    others = f"passive: {empty[1]}; recovery: {empty[2]}; recovery: {empty[3]}"
    message = f"{empty[0]}; and instead of active: {others}"
    check_failed(machine, boot, 4, message, OTHER_SLOT)
    assert boot.mounts == []
    assert boot.result["next_entry"] == ""


def test_passive_instead_of_an_active_that_cannot_be_read(machine: Machine, agent: Sequence[str]) -> None:
    """One damaged inode where the layout has a path."""
    with machine.partition("state"):
        machine.run(
            "debugfs", "-w", "-R", "set_inode_field /srv mode 0", "/machine/partition/cOS/active.img"
        )

    boot = machine.boot(ACTIVE, agent)

    check_fallback(machine, boot, "passive", "cannot use '/srv': Structure needs cleaning")


def test_the_reason_is_still_told_by_a_second_run(machine: Machine, agent: Sequence[str]) -> None:
    """What somebody types `exit` for, in the emergency shell, finds passive where it was left."""
    with machine.partition("state") as state:
        (state / "cOS/active.img").write_bytes(b"")
    record = machine.record(machine.part("persistent"))
    kept = record.read_bytes()
    record.unlink()
    assert machine.boot(f"{ACTIVE} rd.cos.timeout=1", agent).status == 3
    record.write_bytes(kept)

    boot = machine.boot(ACTIVE, agent)

    check_fallback(machine, boot, "passive", f"cannot mount '{STATE}/cOS/active.img': the file is empty")


def test_a_second_run_gives_up_the_root_of_the_first(machine: Machine, agent: Sequence[str]) -> None:
    """Active was booted up to a volume that was missing; in the shell its layout was damaged."""
    record = machine.record(machine.part("persistent"))
    kept = record.read_bytes()
    record.unlink()
    assert machine.boot(f"{ACTIVE} rd.cos.timeout=1", agent).status == 3
    record.write_bytes(kept)
    machine.path("/run/cos").mkdir(exist_ok=True)
    machine.path("/run/cos/cos-layout.env").write_text("no assignment\n")

    boot = machine.boot(ACTIVE, agent)

    check_fallback(machine, boot, "recovery", "cannot read line 1 of /run/cos/cos-layout.env")


def test_two_of_one_label_stop_the_boot_and_are_no_reason_for_another_slot(
    machine: Machine, agent: Sequence[str]
) -> None:
    for name in ("recovery", "persistent"):
        text = machine.record(machine.part(name)).read_text()
        machine.record(machine.part(name)).write_text(text.replace(f"COS_{name.upper()}", "COS_OEM"))

    boot = machine.boot(ACTIVE, agent)

    assert (boot.status, boot.result["outcome"], boot.mounts) == (3, "failed", [])
    assert (
        boot.result["error"]["message"] == "cannot choose a filesystem labelled 'COS_OEM': 3 devices have it"
    )
    assert [failure["mode"] for failure in boot.result["failures"]] == ["active"]


def test_a_missing_volume_is_nothing_that_another_slot_would_have(
    machine: Machine, agent: Sequence[str]
) -> None:
    machine.record(machine.part("persistent")).unlink()

    boot = machine.boot(f"{ACTIVE} rd.cos.timeout=1", agent)

    assert (boot.status, boot.result["failures"]) == (3, [])
    assert boot.outcomes()["overlay /sysroot/etc"] == "done"  # the siblings are there for who looks into it


# What cannot be booted at all


def test_unknown_mode(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(f"{ACTIVE} elemental.mode=pasive", agent)

    hint = "write elemental.mode=active, elemental.mode=passive or elemental.mode=recovery"
    check_failed(machine, boot, 2, "cannot boot the unknown mode 'pasive'", hint)


def test_syntax_error_in_the_layout(machine: Machine, agent: Sequence[str]) -> None:
    layout(machine, "RW_PATHS=/etc\nVOLUMES='LABEL=x\n")

    boot = machine.boot(ALONE, agent)

    name = "/etc/cos/cos-layout.env"
    check_failed(
        machine, boot, 2, f"cannot read line 2 of {name}: the quote ' is never closed", f"close it in {name}"
    )


def test_syntax_error_does_not_stop_recovery(machine: Machine, agent: Sequence[str]) -> None:
    with machine.partition("oem") as oem:
        (oem / "cos-layout.env").write_text("this is not an assignment\n")

    boot = machine.boot(RECOVERY, agent)

    assert boot.status == 0
    assert "<4>cannot read line 1 of /oem/cos-layout.env" in boot.stderr


def test_damaged_layout_file(machine: Machine, agent: Sequence[str]) -> None:
    """What the disk cannot give is no bug in immucore."""
    layout(machine, "RW_PATHS=/etc\n")
    with machine.partition("state"):
        damage = "set_inode_field /etc/cos/cos-layout.env mode 0"
        machine.run("debugfs", "-w", "-R", damage, "/machine/partition/cOS/active.img")

    boot = machine.boot(ALONE, agent)

    assert boot.status == 4
    assert "/etc/cos/cos-layout.env" in boot.result["error"]["message"]
    assert boot.result["error"]["message"].endswith("Structure needs cleaning")
    assert boot.result["error"]["hint"]


@pytest.mark.parametrize("kind", ["directory", "fifo", "loop", "dangling"])
def test_layout_that_is_no_file(machine: Machine, agent: Sequence[str], kind: str) -> None:
    """Nothing to read is no layout; nothing of it may hang the boot."""
    with machine.image() as root:
        path = root / "etc/cos/cos-layout.env"
        match kind:
            case "directory":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case "loop":
                path.symlink_to("cos-layout.env")
            case "dangling":
                path.symlink_to("/nowhere")

    boot = machine.boot(ALONE, agent)

    assert "this is a bug" not in boot.stderr
    assert "Traceback" not in boot.files["immucore.log"]
    if kind in ("fifo", "dangling"):
        check_good(machine, boot, "active", "/cOS/active.img")
    else:
        assert boot.status == 4
        assert "/etc/cos/cos-layout.env" in boot.result["error"]["message"]
        assert boot.result["error"]["hint"]


def test_disk_full_while_seeding(machine: Machine, agent: Sequence[str]) -> None:
    layout(machine, BIND_STATE)
    with machine.image() as root:
        (root / "var/large").write_bytes(os.urandom(1 << 20))
    with machine.partition("persistent") as persistent:
        fill(persistent, free_bytes=500_000)
        before = os.statvfs(persistent).f_bfree

    boot = machine.boot(ACTIVE, agent)

    copy = "/sysroot/usr/local/.state/var.bind"
    message = boot.result["error"]["message"]
    reason = f"cannot seed '{copy}': No space left on device: ([0-9]+) KiB more are needed"
    told = re.fullmatch(reason, message)
    assert told is not None
    assert 500 < int(told[1]) < 700
    check_failed(machine, boot, 4, message, "free space on the file system that holds it")
    assert not machine.path(copy).exists()
    assert not machine.path(f"{copy}.new").exists()
    assert before - os.statvfs(machine.path("/sysroot/usr/local")).f_bfree < 16  # blocks of directories


def test_disk_full_for_what_is_only_important(machine: Machine, agent: Sequence[str]) -> None:
    """The image's own directory stays to be seen; nothing is bound over it."""
    layout(machine, "PERSISTENT_STATE_PATHS=/home\nPERSISTENT_STATE_BIND=true\n")
    with machine.image() as root:
        (root / "home/large").write_bytes(os.urandom(1 << 20))
    with machine.partition("persistent") as persistent:
        fill(persistent, free_bytes=500_000)

    boot = machine.boot(ACTIVE, agent)

    assert (boot.status, boot.result["outcome"]) == (0, "degraded")
    assert "No space left on device" in boot.result["degraded"][0]
    (second,) = boot.result["degraded"][1:]
    assert second.startswith("/home: cannot bind /sysroot/usr/local/.state/home.bind on /sysroot/home: ")
    assert second.endswith("/usr/local/.state/home.bind is not there")
    assert boot.outcomes()["seed /sysroot/usr/local/.state/home.bind"] == "degraded"
    assert boot.outcomes()["bind /sysroot/home"] == "skipped"
    assert machine.path("/sysroot/home/large").stat().st_size == 1 << 20
    check_mounts(machine, boot)


def fill(directory: Path, *, free_bytes: int) -> None:
    """Leave so much space on a file system."""
    status = os.statvfs(directory)
    (directory / "filler").write_bytes(b"x" * (status.f_bfree * status.f_frsize - free_bytes))


@pytest.mark.parametrize("path", RW_PATHS)
def test_a_writable_path_that_is_lost(machine: Machine, source: Sequence[str], path: str) -> None:
    """/etc and /var stop the boot, the others degrade it (contract §7)."""
    layout(machine, "VOLUMES=LABEL=COS_OEM:/oem\n")
    with machine.image() as root:
        lost = root / path[1:]
        if path == "/etc":
            (root / "usr/lib").mkdir()
            lost.rename(root / "etc.before")
            (root / "etc.before/os-release").rename(root / "usr/lib/os-release")
        else:
            shutil.rmtree(lost)
        lost.write_text("a file")

    boot = machine.boot(ACTIVE, source)

    message = (
        f"cannot overlay on /sysroot{path} (upper in /run/overlay/{path[1:].replace('/', '-')}.overlay)"
    )
    if path in ("/etc", "/var"):
        assert (boot.status, boot.result["outcome"]) == (4, "failed")
        assert boot.result["error"]["message"] == f"{message}: Not a directory"
    else:
        assert (boot.status, boot.result["outcome"]) == (0, "degraded")
        assert boot.result["degraded"] == [f"{path}: {message}: Not a directory"]
        machine.run("sh", GUARD)
    check_mounts(machine, boot)


def test_a_listed_directory_that_the_image_lacks(machine: Machine, agent: Sequence[str]) -> None:
    """It is made where its parent is writable, else left out in one clear line."""
    layout(machine, 'RW_PATHS="/etc /var /var/lib/made /data"\n')

    boot = machine.boot(ACTIVE, agent)

    assert (boot.status, boot.result["outcome"]) == (0, "degraded")
    assert boot.outcomes()["overlay /sysroot/var/lib/made"] == "done"
    assert boot.outcomes()["overlay /sysroot/data"] == "degraded"
    lines = [line for line in boot.stderr.splitlines() if "the boot goes on without it" in line]
    assert len(lines) == 1
    assert "Read-only file system" in lines[0]
    check_mounts(machine, boot)


def test_arguments_are_refused(machine: Machine, agent: Sequence[str]) -> None:
    boot = machine.boot(ACTIVE, [*agent, "--really"])

    assert boot.status == 2
    assert "unrecognized arguments: --really" in boot.stderr
    assert not machine.path("/run/immucore").exists()


def test_running_system_is_not_booted(machine: Machine, agent: Sequence[str]) -> None:
    machine.path("/etc/initrd-release").unlink()

    boot = machine.boot(ACTIVE, agent)

    assert boot.status == 2
    assert "cannot boot a system that is running" in boot.stderr
    assert "hint: `immucore plan`" in boot.stderr
    assert not machine.path("/run/immucore").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle(machine: Machine, agent: Sequence[str], number: signal.Signals) -> None:
    """Half a system must not be booted (contract §7)."""
    machine.record(machine.part("oem")).unlink()
    process = machine.start(f"{ACTIVE} rd.cos.oemtimeout=30", agent)
    wait_until_listening(machine, process)

    os.kill(machine.agent_pid(), number)
    boot = machine.finish(process, timeout_sec=15)

    hint = "see who stopped immucore.service: journalctl -b"
    check_failed(machine, boot, 4, f"stopped by signal {number} in the middle of the boot", hint)


def test_crash_of_the_interpreter_is_told(machine: Machine, agent: Sequence[str]) -> None:
    machine.record(machine.part("oem")).unlink()
    process = machine.start(f"{ACTIVE} rd.cos.oemtimeout=30", agent)
    wait_until_listening(machine, process)

    os.kill(machine.agent_pid(), signal.SIGSEGV)
    boot = machine.finish(process, timeout_sec=15)

    assert boot.status != 0
    assert "Fatal Python error: Segmentation fault" in boot.stderr
    assert "in for_devices" in boot.stderr
    assert boot.result == {}


def test_killed_while_seeding(switch_on: Callable[[], Machine], source: Sequence[str]) -> None:
    """What was copied so far is not taken for a whole copy, and the next boot completes it."""
    machine = switch_on()
    layout(machine, BIND_STATE)
    with machine.image() as root:
        for number in range(700):
            (root / f"var/{number}").write_text(str(number))
        names = sorted(path.name for path in (root / "var").iterdir())
    process = machine.start(ACTIVE, source)
    copy = machine.path("/sysroot/usr/local/.state/var.bind")
    growing = machine.path("/sysroot/usr/local/.state/var.bind.new/150")  # one of the first
    deadline = time.monotonic() + 10
    pid = 0
    while not (pid and growing.exists()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        with suppress(ProcessLookupError):
            pid = pid or machine.agent_pid()  # takes too long to do it when the moment has come

    os.kill(pid, signal.SIGKILL)
    process.communicate()

    assert not copy.exists()
    assert not machine.path("/run/immucore/result.json").exists()
    machine = switch_on()
    check_good(machine, machine.boot(ACTIVE, source), "active", "/cOS/active.img")
    copy = machine.path("/sysroot/usr/local/.state/var.bind")
    assert sorted(path.name for path in copy.iterdir()) == names
    assert not copy.with_name("var.bind.new").exists()


# Images with symlinks


def test_links_that_lead_out_stay_inside(machine: Machine, agent: Sequence[str]) -> None:
    """The machine that boots is not the image: nothing of the initramfs may be mounted over."""
    with machine.image() as root:
        (root / "home").rmdir()
        (root / "home").symlink_to("/../../../../srv/home")
        (root / "srv/home").mkdir()
    machine.path("/srv-of-the-initramfs").mkdir()

    boot = machine.boot(ACTIVE, agent)

    check_linked(machine, boot, "/srv/home")


def test_absolute_link_as_writable_path(machine: Machine, agent: Sequence[str]) -> None:
    """/srv → /var/srv, as image-based systems have it."""
    with machine.image() as root:
        (root / "srv").rmdir()
        (root / "var/srv").mkdir()
        (root / "srv").symlink_to("/var/srv")

    boot = machine.boot(ACTIVE, agent)

    check_linked(machine, boot, "/var/srv")


def check_linked(machine: Machine, boot: Boot, real: str) -> None:
    """Check that what a link leads to is writable, inside the root, and that the boot goes on."""
    assert boot.status == 0
    assert boot.result["outcome"] == "ok"
    assert all(
        mount.target.startswith(("/sysroot", "/run/overlay", "/run/initramfs")) for mount in boot.mounts
    )
    machine.path(f"/sysroot{real}/mine").write_text("written")
    machine.run("sh", GUARD)


def test_link_to_nowhere(machine: Machine, agent: Sequence[str]) -> None:
    with machine.image() as root:
        (root / "opt").rmdir()
        (root / "opt").symlink_to("/not/there")

    boot = machine.boot(ACTIVE, agent)

    assert (boot.status, boot.result["outcome"]) == (0, "degraded")
    [reason] = boot.result["degraded"]
    assert reason.startswith("/not/there: cannot overlay on /sysroot/not/there")
    [lost] = [step["operation"] for step in boot.steps if step["outcome"] == "degraded"]
    assert lost["why"].endswith("has /opt, a symlink to /not/there")
    machine.run("sh", GUARD)


def test_layout_that_is_a_link_out_of_the_image(machine: Machine, agent: Sequence[str]) -> None:
    """It is read in the image; the initramfs's file of that name is somebody else's."""
    with machine.image() as root:
        (root / "etc/cos/cos-layout.env").symlink_to("/../../etc/other.env")
        (root / "etc/other.env").write_text("RW_PATHS=/srv\n")

    boot = machine.boot(ACTIVE, agent)

    assert boot.status == 0
    overlays = [mount.target for mount in boot.mounts if mount.fstype == "overlay"]
    assert overlays == ["/sysroot/srv"]


def test_without_udev_database(machine: Machine, agent: Sequence[str]) -> None:
    shutil.rmtree(machine.path("/machine/udev/data"))

    boot = machine.boot(f"{ALONE} rd.cos.timeout=1 rd.cos.oemtimeout=1", agent)

    hint = boot.result["error"]["hint"]
    assert hint.startswith("labels seen: none; not known to udev yet: ")
    assert machine.part("state") in hint
    check_failed(machine, boot, 3, "cannot find a filesystem labelled 'COS_STATE'", hint)


def test_record_that_cannot_be_written(machine: Machine, agent: Sequence[str]) -> None:
    """A boot without its record must not look like a good one."""
    machine.path("/run/immucore").write_text("in the way")

    boot = machine.boot(ACTIVE, agent)

    assert boot.status == 70
    assert "cannot write the record to /run/immucore: Not a directory" in boot.stderr
    assert "Traceback" not in boot.stderr
