"""Units that tests add to an initramfs."""

from __future__ import annotations

# Stops the agent as a person does, in the middle of its wait.
KILL = """\
[Unit]
DefaultDependencies=no
After=systemd-udev-trigger.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'until [ "$(systemctl show -P SubState immucore.service)" = start ]; do sleep 0.2; \\
done; sleep 3; systemctl kill --signal=TERM immucore.service'
"""


def unit(name: str, text: str) -> dict[str, str]:
    """Return the files of a unit that starts with the initramfs."""
    link = f"etc/systemd/system/sysinit.target.d/50-{name}.conf"
    return {f"etc/systemd/system/{name}.service": text, link: f"[Unit]\nWants={name}.service\n"}
