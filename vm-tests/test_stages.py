"""Cloud-init files of OEM, done by the programs of the real system, looked at from inside the booted one."""

from __future__ import annotations

import base64
import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import expect
from derivative import run
from disk import MIB, Disk
from machine import Machine

PACKED = base64.b64encode(gzip.compress(b"packed\n")).decode()
CLOUD_CONFIG = {
    "00_files": f"""\
stages:
  rootfs.before:
    - files: [{{path: /run/order, content: "before "}}]
  rootfs:
    - files: [{{path: /run/made/packed, encoding: gz+b64, content: {PACKED}, permissions: 0640, group: 4}}]
      directories: [{{path: /run/made/deep, permissions: 01777, owner: 7}}]
  initramfs:
    - files: [{{path: /etc/made, content: inside, owner_string: "daemon:4711"}}]
      directories: [{{path: /etc/deep/er, permissions: 0700}}]
""",
    "01_commands": """\
stages:
  rootfs:
    - commands: ["printf 'main ' >>/run/order"]
  rootfs.after:
    - commands: ["printf 'after ' >>/run/order"]
  initramfs.before:
    - commands: ["printf 'inside ' >>/run/order; head -c 5 /proc/version >/etc/version"]
  initramfs.after:
    - commands: ["printf end >>/run/order"]
""",
    "02_environment": """\
stages:
  rootfs:
    - environment_file: /run/cos/cos-layout.env
      environment: {RW_PATHS: "/etc /var /srv /root", PERSISTENT_STATE_PATHS: /home}
  initramfs:
    - environment_file: /etc/environment
      environment: {GREETING: "good morning"}
""",
    "03_network": """\
stages:
  initramfs:
    - hostname: 'node-{{ trunc 4 .MachineID }}'
      dns: {nameservers: [192.0.2.1], search: [example.org], path: /etc/resolv.stage}
      timesyncd: {NTP: ntp.example.org}
""",
    "04_kernel": """\
stages:
  initramfs:
    - sysctl: {kernel.panic: 7}
      modules: [nbd nbds_max=3]
""",
    "05_accounts": """\
stages:
  initramfs:
    - groups: [staged]
      ensure_entities:
        - path: /etc/passwd
          entity: |
            kind: user
            username: entity
            uid: 4713
            gid: 4713
            homedir: /srv/entity
            shell: /bin/sh
      users:
        stager:
          uid: "4711"
          passwd: $6$salt$hash
          groups: [staged]
          homedir: /srv/stager
          shell: /bin/bash
          ssh_authorized_keys: [ssh-ed25519 AAAA one]
      authorized_keys:
        root: [ssh-ed25519 BBBB two]
""",
    "05a_broken": "stages:\n  rootfs:\n    - commands: [touch /run/never\n  x: y\n",
    "06_units": """\
stages:
  initramfs:
    - files:
        - path: /etc/systemd/system/staged.service
          content: |
            [Service]
            Type=oneshot
            RemainAfterExit=yes
            ExecStart=/bin/sh -c 'echo "$SAID" >/run/staged'
            [Install]
            WantedBy=multi-user.target
      systemctl:
        enable: [staged.service]
        mask: [systemd-tmpfiles-clean.timer]
        disable: [systemd-timesyncd.service]
        overrides: [{service: staged.service, content: "[Service]\\nEnvironment=SAID=overridden"}]
""",
    "07_firstboot": """\
stages:
  initramfs:
    - systemd_firstboot: {locale: C.UTF-8, timezone: UTC}
""",
    "08_growth": """\
stages:
  rootfs.after:
    - layout: {device: {label: COS_PERSISTENT}, expand_partition: {size: 0}}
""",
    "09_conditions": """\
stages:
  initramfs:
    - {if: '[ -f /run/cos/active_mode ]', commands: ["printf 'if ' >>/etc/conditions"]}
    - {if: '[ -f /run/cos/recovery_mode ]', commands: ["printf 'not-if ' >>/etc/conditions"]}
    - {if_files: {all: [/etc/os-release]}, commands: ["printf 'files ' >>/etc/conditions"]}
    - {only_os: 'immucore.*', commands: ["printf 'os ' >>/etc/conditions"]}
    - {only_os: 'Other.*', commands: ["printf 'not-os ' >>/etc/conditions"]}
    - {only_os_version: '^9', commands: ["printf 'not-version ' >>/etc/conditions"]}
    - {only_arch: amd64, commands: ["printf 'arch ' >>/etc/conditions"]}
    - {only_service_manager: systemd, commands: ["printf 'manager ' >>/etc/conditions"]}
""",
}
# What is asked of the booted system, and what it has to answer.
ANSWERS = {
    "cat /run/order": "before line main after inside end",
    "cat /run/made/packed; stat -c '%a %g' /run/made/packed; stat -c '%a %u' /run/made/deep": (
        "packed\n640 4\n1777 7"
    ),
    "cat /etc/made; stat -c ' %U %g' /etc/made; stat -c %a /etc/deep/er": "inside daemon 4711\n700",
    "cat /etc/version; ls /run/never 2>&1 | grep -c 'No such'": "Linux1",
    "cat /etc/environment": 'GREETING="good morning"',
    "[ $(hostname) = node-$(head -c 4 /usr/local/etc/machine-id) ] && hostname | diff - /etc/hostname": "",
    "cat /etc/resolv.stage /etc/systemd/timesyncd.conf.d/*": (
        "nameserver 192.0.2.1\nsearch example.org\n[Time]\nNTP=ntp.example.org"
    ),
    "cat /proc/sys/kernel/panic; cat /sys/module/nbd/parameters/nbds_max": "7\n3",
    "id stager; getent passwd stager entity": (
        "uid=4711(stager) gid=4711(stager) groups=4711(stager),1000(staged)\n"
        "stager:x:4711:4711::/srv/stager:/bin/bash\n"
        "entity::4713:4713::/srv/entity:/bin/sh"
    ),
    "getent shadow stager | cut -d: -f2": "$6$salt$hash",
    "cat /srv/stager/.ssh/authorized_keys /root/.ssh/authorized_keys": (
        "ssh-ed25519 AAAA one\nssh-ed25519 BBBB two"
    ),
    "stat -c '%a %U' /srv/stager /srv/stager/.ssh /srv/stager/.ssh/authorized_keys /root/.ssh": (
        "755 stager\n700 stager\n600 stager\n700 root"
    ),
    "systemctl is-active staged.service; cat /run/staged": "active\noverridden",
    "systemctl is-enabled systemd-tmpfiles-clean.timer || true": "masked",
    "cat /etc/default/locale; readlink /etc/localtime | grep -o UTC": "LANG=C.UTF-8\nUTC",
    "cat /etc/conditions": "if files os arch manager",
    "findmnt -no FSTYPE /srv; findmnt -no FSTYPE /home": "overlay\noverlay",
    "[ $(($(stat -f -c '%b*%S' /usr/local))) -gt 115343360 ] && echo grown": "grown",
}
GROWN_MIB = 64


def program(path: str) -> dict[str, Path | str | bytes]:
    """Return a program of the host with its libraries, as install_items of dracut puts one into place."""
    found = {path: Path(path).resolve()}
    for word in run("ldd", path).split():
        if word.startswith("/") and not word.startswith("/lib64"):
            found[f"/usr/lib/x86_64-linux-gnu/{Path(word).name}"] = Path(word).resolve()
    return {name.strip("/"): place for name, place in found.items()}


def test_a_file_of_each_key_and_a_broken_one_among_them(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    """Ten files do what they say, all of it by the system's own programs, and the eleventh is told of."""
    disk = cos_disk(oem={f"{name}.yaml": text for name, text in CLOUD_CONFIG.items()})
    os.truncate(disk.path, disk.path.stat().st_size + GROWN_MIB * MIB)
    sfdisk = shutil.which("sfdisk", path="/usr/sbin:/sbin")
    assert sfdisk
    line = "stages.rootfs.before[0].commands[0]=\"printf 'line ' >>/run/order\""

    report = machine(disk, f"{expect.ACTIVE} {line}", initramfs_files=program(sfdisk)).boot(
        limit_s=120, commands=tuple(ANSWERS)
    )

    assert (report.slot, report.result["outcome"]) == ("active", "degraded"), report.console[-3000:]
    assert report.result["degraded"] == [
        "/oem/05a_broken.yaml: cannot read /oem/05a_broken.yaml:4:4: expected ',' or ']', but got ':'"
    ]
    assert {question: report.output(question) for question in ANSWERS} == ANSWERS
    assert report.failed_units == []
