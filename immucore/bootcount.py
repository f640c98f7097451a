"""Boot counting: which slot the boot loader tries, and how many boots an image has left (pure).

A boot takes one try of its image before the kernel starts, and the health verdict gives them back. What is
counted is the image and not the slot, so an upgrade that renames the files of images mixes nothing up. This
module says what is to happen; it is stored in GRUB's environment block, where grub.cfg does the same.
"""

from __future__ import annotations

from immucore.values import Record

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

TRIES = 3

GOOD = "good"
TRYING = "trying"
BAD = "bad"

ACTIVE, PASSIVE, RECOVERY = "active", "passive", "recovery"
COUNTED = (ACTIVE, PASSIVE)  # in the order in which they are tried; recovery has no limit
ENTRIES = {ACTIVE: ACTIVE, PASSIVE: PASSIVE, RECOVERY: RECOVERY, "cos": ACTIVE, "fallback": PASSIVE}

_LEFT = "tries_"
_GOOD = "good_"


class Count(Record):
    """How far an image has come: the boots it has left, 0 to TRIES, and whether it was ever judged good."""

    image_id: str
    left: int = TRIES
    good: bool = False

    @property
    def state(self) -> str:
        """GOOD, TRYING or BAD."""
        if self.left == 0:
            return BAD
        return GOOD if self.good else TRYING


def wanted(saved: str) -> str:
    """Return the slot that is booted as long as it can be: that of `saved_entry`, else active."""
    return ENTRIES.get(saved, ACTIVE)


def order(saved: str, active: Count | None, passive: Count | None, last_resort: str = "") -> tuple[str, ...]:
    """List the slots as they are tried, each if the one before cannot be loaded; None: it has no image.

    The wanted one comes first, then active, then passive; one that is bad is passed over. Then recovery, and
    what remains when there is none, by turns: `last_resort` is the slot that was it the last time.
    """
    counts = {ACTIVE: active, PASSIVE: passive}
    rest = (PASSIVE, ACTIVE) if last_resort == ACTIVE else COUNTED
    good = [
        slot
        for slot in (wanted(saved), *COUNTED)
        if slot == RECOVERY or ((count := counts[slot]) is not None and count.state != BAD)
    ]
    return tuple(dict.fromkeys((*good, RECOVERY, *rest)))


def boot(
    values: Mapping[str, str],
    active: str | None,
    passive: str | None,
    broken: Collection[str] = (),
) -> tuple[str | None, dict[str, str]]:
    """Do what the boot loader does: return the slot whose kernel it starts, and the variables it leaves.

    `active` and `passive` are the ids of the images, `broken` are slots that cannot be loaded. None where
    there is nothing to start. This is grub.cfg as a function.
    """
    after = {name: value for name, value in values.items() if name != "next_entry" or not value}
    ids = {ACTIVE: active, PASSIVE: passive}
    first, second = (read(values, image_id) if image_id else None for image_id in (active, passive))
    slots = order(values.get("saved_entry", ""), first, second, values.get("last_resort", ""))
    once = ENTRIES.get(values.get("next_entry", ""), "")
    for slot in dict.fromkeys((once, *slots) if once else slots):
        if (image_id := ids.get(slot)) and slot != once:
            count = read(after, image_id)
            after |= {"last_resort": slot} if count.state == BAD else {}
            after = written(after, started(count))
        if slot not in broken and (image_id or slot == RECOVERY):
            return slot, after
    return None, after


def upcoming(
    values: Mapping[str, str], active: str | None, passive: str | None, broken: Collection[str] = ()
) -> str:
    """Name the entry that the boot loader takes next, one of grubcustom too; empty where there is none."""
    once = values.get("next_entry", "")
    return once if once and once not in ENTRIES else boot(values, active, passive, broken)[0] or ""


def armed(image_id: str) -> Count:
    """Return the count of an image that was never booted."""
    return Count(image_id=image_id)


def started(count: Count) -> Count:
    """Take the try that a boot costs."""
    left: Count = count.replace(left=max(0, count.left - 1))
    return left


def verdict(count: Count) -> Count:
    """Judge an image good: its boot has come to its end in health."""
    return Count(image_id=count.image_id, left=TRIES, good=True)


def condemned(count: Count) -> Count:
    """Judge an image bad: it is not booted again, whatever it was before."""
    return Count(image_id=count.image_id, left=0, good=False)


def read(values: Mapping[str, str], image_id: str) -> Count:
    """Read the count of an image from the variables of an environment block.

    What is not there, or cannot be, counts as never booted: grub.cfg takes it so, too.
    """
    left = values.get(_LEFT + image_id, "")
    return Count(
        image_id=image_id,
        left=int(left) if left in map(str, range(TRIES + 1)) else TRIES,
        good=values.get(_GOOD + image_id) == "1",
    )


def written(values: Mapping[str, str], count: Count) -> dict[str, str]:
    """Return the variables with this count in them."""
    changed = {name: value for name, value in values.items() if name != _GOOD + count.image_id}
    changed[_LEFT + count.image_id] = str(count.left)
    if count.good:
        changed[_GOOD + count.image_id] = "1"
    return changed


def forgotten(values: Mapping[str, str], keep: Collection[str]) -> dict[str, str]:
    """Return the variables without the counts of images that are not in `keep`: a block has 1024 bytes."""
    kept = {prefix + image_id for image_id in keep for prefix in (_LEFT, _GOOD)}
    return {
        name: value for name, value in values.items() if name in kept or not name.startswith((_LEFT, _GOOD))
    }
