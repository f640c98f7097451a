"""Labels under a real policy: what the agent has made in the initramfs has those that the policy wants."""

from __future__ import annotations

from collections.abc import Callable

import expect
from disk import Disk
from machine import Machine

LAYOUT = """\
RW_PATHS="/etc /root /opt /srv /var"
PERSISTENT_STATE_PATHS="/home /var/lib/kept"
PERSISTENT_STATE_BIND=true
"""
ENFORCE = "cat /sys/fs/selinux/enforce; cat /proc/1/attr/current | tr -d '\\0'"
# For what lies in /run/cos there is no rule.
PATHS = "/etc /etc/fstab /root /opt /srv /var /var/log /var/lib/kept /home /tmp"
VERIFY = f"matchpathcon -V {PATHS}"
OWN = "ls -dZ /home/labelled | cut -d' ' -f1"
LABEL = "mkdir -p /home/labelled && chcon -t usr_t /home/labelled"
DENIED = "journalctl -b | grep -c 'avc:.*immucore' || true"


def test_what_the_agent_makes_is_labelled(
    machine: Callable[..., Machine], cos_disk: Callable[..., Disk]
) -> None:
    """Overlays, tmpfs and copies have the policy's labels, and a label of somebody's own stays."""
    disk = cos_disk(suite="bookworm-stacks", oem={"cos-layout.env": LAYOUT})
    booted = machine(disk, f"{expect.ACTIVE} security=selinux selinux=1", keep_writes=True)

    first = booted.boot(limit_s=120, commands=(ENFORCE, VERIFY, LABEL, DENIED))
    second = booted.boot(limit_s=120, commands=(VERIFY, OWN))

    expect.healthy(first, "active", "/cOS/active.img")
    assert first.output(ENFORCE) == "0system_u:system_r:init_t:s0"
    for report in (first, second):
        lines = report.commands[VERIFY].output.splitlines()
        assert [line for line in lines if not line.endswith("verified.")] == []
    assert first.output(DENIED) == "0"
    assert first.output(LABEL) == ""
    assert second.output(OWN) == "system_u:object_r:usr_t:s0"
