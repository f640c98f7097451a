"""What file systems need around their mounting, whatever the layout (contract §5). Pure."""

from __future__ import annotations

from immucore.plan import OPTIONAL, Check, Grow, Mount, Operation
from immucore.superblock import CHECKED

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

GROW = "x-systemd.growfs"  # systemd.mount(5)


def kept_up(operations: Iterable[Operation], mode: str, repair: str) -> tuple[Operation, ...]:
    """Check each device once, before it is mounted rw, and grow what asks for it once it is mounted.

    `mode` and `repair` are those of systemd-fsck(8).
    """
    whole: list[Operation] = []
    checked = set()
    for operation in operations:
        mount = operation if isinstance(operation, Mount) and operation.source.startswith("/dev/") else None
        if mount and mode != "skip" and _is_checked(mount) and mount.source not in checked:
            checked.add(mount.source)
            whole.append(
                Check(
                    target=mount.source,
                    fstype=mount.fstype,
                    mode=mode,
                    repair=repair,
                    why=f"it is about to be mounted rw on {mount.target}",
                    criticality=mount.criticality,
                )
            )
        whole.append(operation)
        if mount and GROW in mount.options:
            why = f"{GROW} in its options: {mount.why}"
            whole.append(Grow(source=mount.source, target=mount.target, why=why, criticality=OPTIONAL))
    return tuple(whole)


def _is_checked(mount: Mount) -> bool:
    access = [option for option in mount.options if option in ("ro", "rw")]
    return mount.fstype in CHECKED and access[-1:] != ["ro"]
