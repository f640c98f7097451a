"""The ways to boot a cOS machine, and which of them a command line asks for (contract §2 and §3)."""

from __future__ import annotations

from immucore.cmdline import DEVICE_PREFIXES, shown_root
from immucore.errors import CmdlineError
from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.cmdline import Cmdline


RECOVERY = "/cOS/recovery"  # the image, without its suffix


class Mode(Record):
    """A way to boot: what its image and its partition are called."""

    image_label: str
    partition: str
    users_data: bool  # whether the user's data has to be there (contract §7)


MODES = {
    "active": Mode(image_label="COS_ACTIVE", partition="COS_STATE", users_data=True),
    "passive": Mode(image_label="COS_PASSIVE", partition="COS_STATE", users_data=True),
    "recovery": Mode(image_label="COS_SYSTEM", partition="COS_RECOVERY", users_data=False),
    "live": Mode(image_label="", partition="", users_data=False),
}


def mode(cmdline: Cmdline) -> str:
    """Tell which of MODES the command line asks for, in any of the field's three dialects.

    Raises CmdlineError.
    """
    if cmdline.mode:
        if cmdline.mode not in ("active", "passive", "recovery"):
            raise CmdlineError(
                f"cannot boot the unknown mode '{cmdline.mode}'",
                hint="write elemental.mode=active, elemental.mode=passive or elemental.mode=recovery",
            )
        return cmdline.mode
    if cmdline.root.startswith("live:"):
        return "live"
    for name, row in MODES.items():
        if row.image_label and cmdline.root == f"LABEL={row.image_label}":
            return name
    stem = cmdline.image.rpartition("/")[2].partition(".")[0]
    if stem in MODES and stem != "live":
        return stem
    if cmdline.root == f"LABEL={MODES['recovery'].partition}":
        return "recovery"
    root = shown_root(cmdline.root)
    raise CmdlineError(
        f"cannot tell the boot mode from cos-img/filename={cmdline.image} and root={root}",
        hint="add elemental.mode=active, passive or recovery to the kernel command line",
    )


def image_path(cmdline: Cmdline) -> str:
    """Return the image's path in its partition. Raises CmdlineError for one that names no file in it."""
    if cmdline.image.endswith("/") or ".." in cmdline.image.split("/"):
        raise CmdlineError(
            f"cannot boot the image '{cmdline.image}': that is no path of a file in the partition",
            hint="write cos-img/filename=/cOS/active.img, a path without '..'",
        )
    return cmdline.image


def partition(cmdline: Cmdline) -> str:
    """Spell the partition that holds the image: root=, or what the mode says where that names the image."""
    image_path(cmdline)
    row = MODES[mode(cmdline)]
    if not cmdline.root or cmdline.root in [f"LABEL={other.image_label}" for other in MODES.values()]:
        return f"LABEL={row.partition}"
    if not cmdline.root.startswith(DEVICE_PREFIXES):
        raise CmdlineError(
            f"cannot read root={shown_root(cmdline.root)}",
            hint=f"write root=LABEL={row.partition}, UUID=…, PARTLABEL=…, PARTUUID=… or /dev/…",
        )
    return cmdline.root


def attempts(cmdline: Cmdline) -> tuple[Cmdline, ...]:
    """List the command lines to try, the one that was asked for first: A → B → Recovery (contract §7).

    Each names its mode. The partition of another slot follows from it, unless root= names one that both
    have. A recovery image has two names in the field, so there are two ways to it.
    """
    asked: Cmdline = cmdline.replace(mode=mode(cmdline))
    if cmdline.fallback != "same-boot" or asked.mode not in ("active", "passive"):
        return (asked,)
    directory, _, name = image_path(asked).rpartition("/")
    row = MODES["recovery"]
    others = [
        asked.replace(mode="recovery", root=f"LABEL={row.partition}", image=f"{RECOVERY}.{suffix}")
        for suffix in ("squashfs", "img")
    ]
    if asked.mode == "active":
        suffix = name.rpartition(".")[2] if "." in name else "img"
        others.insert(0, asked.replace(mode="passive", image=f"{directory}/passive.{suffix}"))
    near = partition(asked)
    return (asked, *(other.replace(instead_of=asked.mode, near=near) for other in others))


def users_data(cmdline: Cmdline) -> bool:
    """Tell whether this boot needs the user's data: recovery and rd.cos.safe must get on without."""
    return MODES[mode(cmdline)].users_data and not cmdline.safe
