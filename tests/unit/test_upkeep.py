"""What is checked before it is mounted, and grown after."""

from __future__ import annotations

import pytest

from immucore.layouts.upkeep import kept_up
from immucore.plan import IMPORTANT, OPTIONAL, Check, Grow, Mount


def mount(*options: str, fstype: str = "ext4", source: str = "/dev/a", target: str = "/a") -> Mount:
    return Mount(
        source=source, target=target, fstype=fstype, options=options, why="VOLUMES", criticality=IMPORTANT
    )


@pytest.mark.parametrize("fstype", ["ext2", "ext3", "ext4", "vfat"])
def test_what_is_mounted_rw_is_checked_first(fstype: str) -> None:
    operation = mount("rw", fstype=fstype)
    check, kept = kept_up([operation], "force", "yes")
    assert kept == operation
    assert check == Check(
        target="/dev/a",
        fstype=fstype,
        mode="force",
        repair="yes",
        why="it is about to be mounted rw on /a",
        criticality=IMPORTANT,
    )


@pytest.mark.parametrize(
    "operation",
    [
        mount("ro"),
        mount("rw", "ro"),
        mount("rw", fstype="xfs"),
        mount("rw", fstype="btrfs"),
        mount("rw", fstype=""),
        mount(fstype="tmpfs", source="immucore-overlay"),
    ],
)
def test_nothing_else_is(operation: Mount) -> None:
    assert kept_up([operation], "auto", "preen") == (operation,)


def test_a_device_is_checked_once() -> None:
    first, second = mount("ro", "rw"), mount(target="/b")
    assert [type(each) for each in kept_up([first, second], "auto", "preen")] == [Check, Mount, Mount]


def test_nothing_is_checked_where_nothing_may_be() -> None:
    assert kept_up([mount("rw")], "skip", "preen") == (mount("rw"),)


def test_growing_comes_after_mounting() -> None:
    operation = mount("rw", "x-systemd.growfs", fstype="xfs")
    assert kept_up([operation], "auto", "preen") == (
        operation,
        Grow(
            source="/dev/a",
            target="/a",
            why="x-systemd.growfs in its options: VOLUMES",
            criticality=OPTIONAL,
        ),
    )
