"""What the booted system is to find in its place, besides what is mounted: before its first program runs."""

from __future__ import annotations

from immucore.layouts.cos.modes import mode, users_data
from immucore.plan import (
    IMPORTANT,
    OPTIONAL,
    SYSROOT,
    Extensions,
    MachineId,
    MakeDirectory,
    Operation,
    WriteFile,
    is_below,
)

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

    from immucore.cmdline import Cmdline
    from immucore.image import Image
    from immucore.layouts.cos.settings import Settings

AUDIT = "/var/log/audit"
MACHINE_ID = "/etc/machine-id"
SAVED_MACHINE_ID = "/usr/local/etc/machine-id"  # where cos-toolkit's and Kairos' cloud-init files keep it
EXTENSIONS = "/var/lib/kairos"  # as Kairos has them: {extensions,confexts}/{active,passive,recovery,common}
RELABEL = "/run/systemd/relabel-extra.d/immucore.relabel"
OURS = ("/tmp", "/run/cos", "/run/elemental", "/run/immucore")  # noqa: S108  of the new root


def furnish(cmdline: Cmdline, image: Image, settings: Settings) -> tuple[Operation, ...]:
    """Plan what comes after the mounts."""
    volumes = [volume.mountpoint for volume in settings.volumes]
    writable = [*volumes, *settings.ephemeral, *settings.persistent]
    operations: list[Operation] = []
    if _covered(AUDIT, writable):
        why = "the first service that logs finds it, and others cannot read it (auditd(8))"
        operations.append(MakeDirectory(target=SYSROOT + AUDIT, mode=0o700, why=why, criticality=OPTIONAL))
    if (
        users_data(cmdline)
        and _covered(SAVED_MACHINE_ID, volumes)
        and _covered(MACHINE_ID, settings.ephemeral)
    ):
        operations.append(
            MachineId(
                target=SYSROOT + MACHINE_ID,
                source=SYSROOT + SAVED_MACHINE_ID,
                why="/etc does not keep it, and the journal and DHCP know the machine by it (machine-id(5))",
                criticality=IMPORTANT,
            )
        )
    if users_data(cmdline) and _covered(EXTENSIONS, [*volumes, *settings.persistent]):
        operations.append(
            Extensions(
                target="/run",
                source=SYSROOT + EXTENSIONS,
                sets=(mode(cmdline), "common"),
                spared=tuple(writable),
                why=f"{EXTENSIONS} is kept, and may have images for systemd-sysext(8)",
                criticality=IMPORTANT,
            )
        )
    if image.selinux:
        # What is in memory has no label that the policy, which is loaded later, would read from it, and
        # before it is loaded the kernel refuses rootcontext= (security/selinux/hooks.c).
        lines = "".join(f"{path}\n" for path in (*settings.ephemeral, *OURS))
        why = "SELinux is on, and what the agent makes in memory has to be labelled (selinux(8))"
        operations.append(WriteFile(target=RELABEL, content=lines, why=why, criticality=IMPORTANT))
    return tuple(operations)


def _covered(path: str, by: Iterable[str]) -> bool:
    return any(is_below(path, each) for each in by)
