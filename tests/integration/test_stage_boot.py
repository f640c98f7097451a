"""Cloud-init stages on a real disk: what the image's, OEM's and the command line's ask for is done."""

from __future__ import annotations

import base64
import gzip
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from native import ACTIVE, RECOVERY, SOURCE, Boot, Machine, command

STOCK = Path(__file__).with_name("stages")
# What the stages run in the new root: the programs that a step may need, with their libraries.
PROGRAMS = ("sh", "cat", "cp", "mkdir", "touch")


def oem(machine: Machine, **files: str) -> None:
    """Put cloud-init files on OEM, by their names without suffix."""
    with machine.partition("oem") as root:
        for name, text in files.items():
            (root / f"{name}.yaml").write_text(text)


def programs(root: Path, *names: str) -> None:
    """Put programs of the host with their libraries into a new root."""
    for name in (*PROGRAMS, *names):
        path = shutil.which(name)
        assert path, name
        real = Path(path).resolve()
        place = root / "usr/bin" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(real, place)
        for word in command("ldd", real).split():
            if word.startswith("/") and not (root / word[1:]).exists():
                (root / word[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(Path(word).resolve(), root / word[1:])
    if not (root / "bin").exists():
        (root / "bin").symlink_to("usr/bin")


def failures(boot: Boot) -> list[str]:
    return list(boot.result["degraded"])


def text(machine: Machine, path: str) -> str:
    return machine.path(path).read_text()


LAYOUT = """\
name: layout
stages:
  rootfs:
    - if: '[ ! -f /run/cos/recovery_mode ]'
      name: Layout configuration
      environment_file: /run/cos/cos-layout.env
      environment:
        VOLUMES: "LABEL=COS_PERSISTENT:/usr/local"
        RW_PATHS: "/etc /srv"
        PERSISTENT_STATE_PATHS: "/var /home"
        PERSISTENT_STATE_BIND: "true"
    - if: '[ -f /run/cos/recovery_mode ]'
      environment_file: /run/cos/cos-layout.env
      environment:
        RW_PATHS: /etc
"""


def test_a_layout_that_a_stage_writes_takes_effect(machine: Machine, agent: Sequence[str]) -> None:
    with machine.image() as root:
        (root / "system/oem").mkdir(parents=True)
        (root / "system/oem/00_layout.yaml").write_text(LAYOUT)

    boot = machine.boot(ACTIVE, agent)

    assert boot.result["outcome"] == "ok", boot.stderr
    kinds = {mount.target: mount.fstype for mount in boot.mounts}
    assert [path for path, kind in kinds.items() if kind == "overlay"] == ["/sysroot/etc", "/sysroot/srv"]
    assert {"/sysroot/var", "/sysroot/home", "/sysroot/usr/local"} <= {*kinds}
    assert os.readlink(machine.path("/system")) == "/sysroot/system"
    assert text(machine, "/run/cos/active_mode") == "1"
    assert boot.outcomes()["stage /system/oem/00_layout.yaml"] == "done"


def test_recovery_has_its_own(machine: Machine) -> None:
    oem(machine, layout=LAYOUT)

    boot = machine.boot(RECOVERY.replace("squashfs", "img"), SOURCE)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert [m.target for m in boot.mounts if m.fstype == "overlay"] == ["/sysroot/etc"]


def fake(root: Path, *names: str) -> None:
    """Put programs that only note how they are called into a new root."""
    for name in names:
        (root / "usr/bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >>/run/called\n')
        (root / "usr/bin" / name).chmod(0o755)


def own_setting(machine: Machine, name: str) -> Path:
    """Give a machine a setting of the kernel of its own: it shares the host's."""
    file = machine.path(f"/machine/{name}")
    file.write_text("")
    machine.run("mount", "--bind", f"/machine/{name}", f"/proc/sys/kernel/{name}")
    return file


@pytest.mark.parametrize("stock", ["elemental", "kairos"])
def test_stock_files_do_as_they_are(machine: Machine, agent: Sequence[str], stock: str) -> None:
    host = own_setting(machine, "hostname")
    with machine.image() as root:
        programs(root)
        fake(root, "systemctl")
        (root / "etc/machine-id").write_text("beef0000000000000000000000000000\n")
        (root / "system/oem").mkdir(parents=True)
        shutil.copy(STOCK / f"{stock}.yaml", root / "system/oem/00_rootfs.yaml")

    boot = machine.boot(ACTIVE, agent)

    assert boot.result["outcome"] == "ok", boot.stderr
    bound = {mount.target for mount in boot.mounts if mount.root.endswith(".bind")}
    if stock == "elemental":
        paths = ("/etc/systemd", "/etc/ssh", "/home", "/opt", "/root", "/var/log")
        assert bound == {f"/sysroot{path}" for path in paths}
        assert text(machine, "/sysroot/usr/local/etc/machine-id") == text(machine, "/sysroot/etc/machine-id")
        assert machine.path("/sysroot/usr/local/bin").is_dir()
        assert "00_rootfs.yaml:7:9: datasource: this agent does nothing with it" in boot.stderr
    else:
        assert bound == {f"/sysroot{path}" for path in ("/home", "/root", "/opt", "/srv")}
        assert not machine.path("/run/cos/custom-layout.env").exists()
        assert text(machine, "/run/called").splitlines() == [
            "systemctl --root=/ enable cos-setup-boot",
            "systemctl --root=/ mask systemd-firstboot.service",
        ]
        assert text(machine, "/sysroot/etc/hostname") == "kairos-beef\n"
        assert text(machine, "/sysroot/etc/hosts").startswith("127.0.0.1 localhost kairos-beef\n")
        assert host.read_text() == "kairos-beef"
        assert boot.stderr.count("\n") == 1


PACKED = base64.b64encode(gzip.compress(b"packed\n")).decode()
EVERYTHING = f"""\
stages:
  rootfs.before:
    - files: [{{path: /run/order, content: "before "}}]
  rootfs:
    - name: first
      environment: {{GREETING: 'say "$HOME" \\ `x`'}}
      environment_file: /run/environment
      directories:
        - {{path: /run/made/deep, permissions: 01777, owner: 7}}
      files:
        - {{path: /run/made/file, content: hello, permissions: 0640, owner: 3, group: 4}}
        - {{path: /run/made/packed, encoding: gz+b64, content: {PACKED}}}
        - {{path: /run/made/owned, owner_string: "daemon:4711"}}
      commands:
        - printf 'main ' >>/run/order
        - printf '%s' "$GREETING" >/run/greeting; echo "$PATH:$HOME" >/run/path  # it is for the file alone
        - echo said by a command
      sysctl: {{kernel.panic: 7}}
      groups: [staged, {{staging: [daemon]}}]
      ensure_entities:
        - path: /etc/passwd
          entity: |
            kind: user
            username: entity
            uid: 4713
            gid: 4713
            homedir: /run/entity
            shell: /bin/sh
      users:
        stager:
          uid: 4711
          passwd: $6$salt$hash
          groups: [staged]
          homedir: /run/stager
          shell: /bin/sh
          no_create_home: true
          no_log_init: true
          lock_passwd: false
          ssh_authorized_keys: [ssh-ed25519 AAAA one]
      authorized_keys:
        entity: [ssh-ed25519 BBBB two]
      dns: {{nameservers: [192.0.2.1, 192.0.2.2], search: [example.org], path: /run/resolv.conf}}
      timesyncd: {{NTP: ntp.example.org}}
      systemctl:
        overrides: [{{service: sshd, content: "[Service]"}}]
  rootfs.after:
    - commands: ["printf 'after ' >>/run/order"]
  initramfs:
    - modules: ["dummy numdummies=2", loop]
      systemctl: {{disable: [one.service], start: []}}
      systemd_firstboot: {{keymap: us, setup-machine-id: true}}
"""


def test_every_key_does_what_it_says(machine: Machine) -> None:
    panic = own_setting(machine, "panic")
    with machine.image() as root:
        programs(root)
        fake(root, "systemctl", "modprobe", "systemd-firstboot")
    oem(machine, everything=EVERYTHING)
    line = 'stages.rootfs.before[0].commands[0]="printf line >>/run/order"'

    boot = machine.boot(f"{ACTIVE} {line}", SOURCE)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert text(machine, "/run/order") == "before linemain after "
    assert text(machine, "/run/environment") == 'GREETING="say \\"\\$HOME\\" \\\\ \\`x\\`"\n'
    assert text(machine, "/run/greeting") == ""
    assert text(machine, "/run/path") == "/usr/sbin:/usr/bin:/sbin:/bin:/root\n"
    assert re.search(r"<7> /oem/everything.yaml:17:11: said by a command\n", boot.files["immucore.log"])
    deep, file = (machine.path(f"/run/made/{name}").stat() for name in ("deep", "file"))
    assert (stat.S_IMODE(deep.st_mode), deep.st_uid) == (0o1777, 7)
    assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid) == (0o640, 3, 4)
    assert text(machine, "/run/made/packed") == "packed\n"
    assert machine.path("/run/made/owned").stat().st_gid == 4711
    assert panic.read_text() == "7"
    passwd, group = text(machine, "/etc/passwd"), text(machine, "/etc/group")
    assert "\nstager:x:4711:4711:" in passwd
    assert "entity::4713:4713::/run/entity:/bin/sh\n" in passwd
    assert "\nstager:$6$salt$hash:" in text(machine, "/etc/shadow")
    assert ":stager\n" in group[group.index("\nstaged:") :]
    assert ":daemon\n" in group[group.index("\nstaging:") :]
    keys = machine.path("/run/stager/.ssh/authorized_keys")
    assert keys.read_text() == "ssh-ed25519 AAAA one\n"
    assert (stat.S_IMODE(keys.stat().st_mode), keys.stat().st_uid) == (0o600, 4711)
    assert text(machine, "/run/entity/.ssh/authorized_keys") == "ssh-ed25519 BBBB two\n"
    assert text(machine, "/run/resolv.conf") == (
        "nameserver 192.0.2.1\nnameserver 192.0.2.2\nsearch example.org\n"
    )
    assert text(machine, "/etc/systemd/timesyncd.conf.d/50-stages.conf") == "[Time]\nNTP=ntp.example.org\n"
    assert text(machine, "/etc/systemd/system/sshd.service.d/override-yip.conf") == "[Service]"
    assert text(machine, "/run/called").splitlines() == [
        "modprobe -- dummy numdummies=2",
        "modprobe -- loop",
        "systemctl --root=/ disable one.service",
        "systemd-firstboot --root=/ --keymap=us --setup-machine-id",
    ]


def test_a_broken_file_among_ten_good_ones(machine: Machine, agent: Sequence[str]) -> None:
    good = {
        f"{number:02}": f"stages: {{rootfs: [{{commands: [printf {number} >>/run/ran]}}]}}"
        for number in range(10)
    }
    oem(machine, **good, **{"05_broken": "stages:\n  rootfs:\n    - commands: [a\n  x: y\n"})

    boot = machine.boot(ACTIVE, agent)

    assert (boot.status, boot.result["outcome"]) == (0, "degraded")
    assert text(machine, "/run/ran") == "0123456789"
    assert failures(boot) == [
        "/oem/05_broken.yaml: cannot read /oem/05_broken.yaml:4:4: expected ',' or ']', but got ':'"
    ]
    assert "05_broken.yaml:4:4" in text(machine, "/run/cos/degraded")
    assert "Traceback" not in boot.stderr + boot.console


def test_what_fails_costs_nothing_beside_it(machine: Machine) -> None:
    oem(
        machine,
        one=(
            "stages:\n  rootfs:\n"
            "    - name: bad\n      commands: [exit 3, touch /run/beside]\n      modules: x\n"
            "      users: {stager: {shell: /nowhere, groups: [':']}}\n"
            "      files: [{path: /proc/nowhere/x}, {path: /run/file}]\n"
            "    - name: good\n      commands: [touch /run/sibling]\n"
            "    - name: nobody knows\n      only_os: '('\n      commands: [touch /run/never]\n"
        ),
    )

    boot = machine.boot(ACTIVE, SOURCE)

    assert boot.result["outcome"] == "degraded"
    for path in ("/run/beside", "/run/file", "/run/sibling"):
        assert machine.path(path).exists()
    assert not machine.path("/run/never").exists()
    where = "/oem/one.yaml: 'bad' of stage rootfs: "
    said = "\n".join(failures(boot))
    assert f"{where}/oem/one.yaml:5:16: it has to be a list, and is a text" in said
    assert "the command ended" not in said  # it is in the record, and no matter of the boot
    assert '"outcome":"ignored"' in boot.files["steps.json"]
    assert '"reason":"/oem/one.yaml:4:18: the command ended with status 3"' in boot.files["steps.json"]
    assert (
        "<4> 'bad' of stage rootfs: /oem/one.yaml:4:18: the command ended with status 3"
        in (boot.files["immucore.log"])
    )
    assert f"{where}files: /proc/nowhere: No such file or directory" in said
    assert f"{where}users: groupadd ended with status" in said
    assert "'nobody knows' of stage rootfs: /oem/one.yaml:11:16: it is no regular expression" in said


def test_the_new_root_cannot_be_climbed_out_of(machine: Machine, agent: Sequence[str]) -> None:
    # What /proc/1/root says is taken for a path of the new root, like any other symlink.
    paths = ("/../../../machine/a", "/climb/b", "/far/c", "/proc/1/root/machine/d", "/etc/up/machine/e")
    listed = ", ".join(f"{{path: {path}, content: x}}" for path in paths)
    with machine.image() as root:
        programs(root)
        (root / "machine").mkdir()
        (root / "far").symlink_to("/machine")
        (root / "climb").symlink_to("../../../../machine")
        (root / "etc/up").symlink_to("../../../..")
    oem(
        machine,
        climbing=f"stages:\n  initramfs:\n    - files: [{listed}]\n    - commands: [touch /etc/inside]\n",
    )
    machine.path("/machine/here").write_text(
        "stages: {rootfs: [{commands: [touch /run/escaped]}], initramfs: [{files: [{path: /run/escaped}]}]}"
    )
    with machine.partition("oem") as root:
        (root / "outside.yaml").symlink_to("/machine/here")  # it is looked up in the new root

    boot = machine.boot(f"{ACTIVE} rd.cos.mount=LABEL=COS_PERSISTENT:/machine", agent)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert {path.name for path in machine.path("/sysroot/machine").iterdir()} >= {*"abce"}
    assert not {*"abcde"} & {path.name for path in machine.path("/machine").iterdir()}
    assert not machine.path("/run/escaped").exists()
    assert machine.path("/sysroot/etc/inside").exists()
    assert not machine.path("/etc/inside").exists()
    inside = {mount.target for mount in boot.mounts}
    assert not inside & {"/sysroot/proc", "/sysroot/sys", "/sysroot/dev", "/sysroot/run"}


def test_safe_runs_no_stage(machine: Machine) -> None:
    with machine.image() as root:
        (root / "system/oem").mkdir(parents=True)
        (root / "system/oem/x.yaml").write_text("stages: {rootfs: [{commands: [touch /run/ran]}]}")

    boot = machine.boot(f'{ACTIVE} rd.cos.safe stages.rootfs[0].commands[0]="touch /run/ran"', SOURCE)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert not machine.path("/run/ran").exists()
    assert not machine.path("/system").is_symlink()


def test_words_for_a_stage_of_the_booted_system_are_left_to_it(machine: Machine) -> None:
    boot = machine.boot(f"{ACTIVE} stages.boot[0].hostname=x stages.network.before[0].hostname=x", SOURCE)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert not machine.path("/system").is_symlink()  # no stage was begun


def test_a_second_run_does_no_stage_again(machine: Machine) -> None:
    oem(machine, one="stages: {rootfs: [{commands: ['echo x >>/run/ran']}], initramfs: [{modules: [x]}]}")
    boot = machine.boot(f"{ACTIVE} rd.cos.mount=LABEL=NOT_THERE:/data rd.cos.timeout=1", SOURCE)
    assert boot.result["outcome"] == "failed"
    assert text(machine, "/run/ran") == "x\n"

    boot = machine.boot(ACTIVE, SOURCE)

    assert boot.result["outcome"] == "degraded"
    assert failures(boot) == [
        "/oem/one.yaml: 'step 1' of stage initramfs: modules: there is no modprobe here"
    ]
    assert text(machine, "/run/ran") == "x\n"


def test_a_layout_that_was_corrected_is_written_again(machine: Machine) -> None:
    def layout(content: str) -> str:
        return f"stages: {{rootfs: [{{files: [{{path: /run/cos/cos-layout.env, content: {content}}}]}}]}}"

    oem(machine, one=layout("no assignment"))
    assert machine.boot(f"{ACTIVE} rd.cos.fallback=off", SOURCE).result["outcome"] == "failed"
    machine.path("/sysroot/oem/one.yaml").write_text(layout("RW_PATHS=/srv"))

    boot = machine.boot(f"{ACTIVE} rd.cos.fallback=off", SOURCE)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert [m.target for m in boot.mounts if m.fstype == "overlay"] == ["/sysroot/srv"]


def test_sigterm_during_a_stage_is_a_failed_boot(machine: Machine) -> None:
    oem(machine, slow="stages: {rootfs: [{commands: ['touch /run/begun; sleep 1234.5']}]}")
    process = machine.start(ACTIVE)
    deadline = time.monotonic() + 20
    while not machine.path("/run/begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)

    os.kill(machine.agent_pid(), signal.SIGTERM)
    boot = machine.finish(process)

    assert boot.status == 4
    assert boot.result["error"]["message"] == "stopped by signal 15 in the middle of the boot"
    assert not machine.path("/run/cos/active_mode").exists()
    assert "1234.5" not in machine.run("ps", "ax")


def test_the_stages_of_a_slot_that_cannot_be_booted_leave_nothing_to_the_next(machine: Machine) -> None:
    with machine.image() as root:
        (root / "system/oem").mkdir(parents=True)
        (root / "system/oem/x.yaml").write_text(
            "stages: {rootfs: [{files: [{path: /run/cos/cos-layout.env, content: no assignment}]}]}"
        )

    boot = machine.boot(ACTIVE, SOURCE)

    assert boot.result["mode_booted"] == "passive"
    assert not machine.path("/run/cos/cos-layout.env").exists()
    assert not machine.path("/run/cos/active_mode").exists()
    assert text(machine, "/run/cos/passive_mode") == "1"


def expanding(device: str, size_mib: int) -> str:
    step = f"layout: {{device: {{{device}}}, expand_partition: {{size: {size_mib}}}}}"
    return f"stages: {{rootfs.after: [{{{step}}}]}}"


def test_the_last_partition_grows(
    switch_on: Callable[[], Machine], disk: Path, agent: Sequence[str]
) -> None:
    os.truncate(disk, disk.stat().st_size + (24 << 20))
    machine = switch_on()
    device = machine.part("persistent")
    size = Path(f"/sys/class/block/{device[5:]}/size")
    before = int(size.read_text())
    oem(machine, grow=expanding("label: COS_PERSISTENT", 0))

    boot = machine.boot(ACTIVE, agent)

    assert int(size.read_text()) - before > 22 << 11
    assert device in [mount.source for mount in boot.mounts]  # it is the same device still
    command("sfdisk", "--verify", disk)
    capabilities = int(re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
    if capabilities >> 24 & 1:  # CAP_SYS_RESOURCE, which ext4 wants to see
        assert boot.result["outcome"] == "ok", boot.stderr
        status = os.statvfs(machine.path("/sysroot/usr/local"))
        assert status.f_blocks * status.f_frsize > 30 << 20
    else:
        assert failures(boot) == [
            f"/oem/grow.yaml: 'step 1' of stage rootfs.after: layout: {device}: Operation not permitted"
        ]


def test_only_the_last_partition_grows(switch_on: Callable[[], Machine], disk: Path) -> None:
    os.truncate(disk, disk.stat().st_size + (24 << 20))
    machine = switch_on()
    device = machine.part("recovery")
    oem(machine, grow=expanding(f"path: {device}", 40))

    boot = machine.boot(ACTIVE, SOURCE)

    assert boot.result["outcome"] == "degraded"
    assert re.search(r"layout: \S+ lies behind \S+: it cannot grow$", failures(boot)[0])


def test_what_is_missing_in_the_new_root_is_named(machine: Machine, agent: Sequence[str]) -> None:
    """The image has no program at all; what needs none is done."""
    oem(
        machine,
        one=(
            "stages:\n  initramfs:\n"
            "    - name: x\n      commands: [touch /etc/never]\n      users: {a: {}}\n"
            "      files: [{path: /etc/file}]\n"
        ),
    )

    boot = machine.boot(ACTIVE, agent)

    where = "/oem/one.yaml: 'x' of stage initramfs: "
    assert failures(boot) == [
        f"{where}/oem/one.yaml:4:18: cannot start /bin/sh: No such file or directory",
        f"{where}users: there is no useradd here",
    ]
    assert machine.path("/sysroot/etc/file").read_text() == ""
    assert "Traceback" not in boot.stderr


def test_no_command_is_shown(machine: Machine) -> None:
    oem(machine, one="stages: {rootfs: [{commands: ['exit 1 # hush']}, {if: 'exit 1 # hush'}]}")

    boot = machine.boot(f'{ACTIVE} rd.cos.debug stages.rootfs[0].commands[0]="exit 1 # hush"', SOURCE)

    assert boot.files["immucore.log"].count("the command ended with status 1") == 2
    assert "hush" not in boot.stderr + boot.console + "".join(boot.files.values())
    record = machine.path("/sysroot/oem/immucore")
    assert all("hush" not in file.read_text() for file in record.rglob("*") if file.is_file())


def test_what_everybodys_files_have_degrades_no_boot(machine: Machine) -> None:
    with machine.image() as root:
        programs(root)
        fake(root, "systemctl")
    oem(
        machine,
        one=(
            "stages:\n  rootfs:\n    - commands: ['exit 3']\n"
            "      files: [{path: /run/made, permsisions: 0600, content: '{{ .X }}'}]\n"
            "  initramfs:\n    - systemctl: {start: [x], enable: [y]}\n"
        ),
    )

    boot = machine.boot(ACTIVE, SOURCE)

    assert boot.result["outcome"] == "ok", boot.stderr
    assert text(machine, "/run/made") == "{{ .X }}"
    assert text(machine, "/run/called") == "systemctl --root=/ enable y\n"
    for said in (
        "/oem/one.yaml:3:18: the command ended with status 3",
        ": permsisions: this agent does nothing with it",
        "{{…}} in files: /run/made is left as it is",
        "systemctl: cannot start x: the new root does not run yet",
    ):
        assert said in boot.stderr
