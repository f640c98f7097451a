"""What was booted and what was to be booted; what is told of that; the mounts that have to be there."""

from __future__ import annotations

from typing import Any

import pytest

from immucore.observe import MountPoint
from immucore.system import boot_state, boot_status, health_checks
from immucore.system.boot_state import GIVEN_UP, BootState

IMAGE = b"root=LABEL=COS_STATE cos-img/filename=/cOS/active.img"
COUNTED = IMAGE + b" panic=10 rd.cos.onfail=reboot:10"
ID = "0123456789abcdef_01234567"


def of(line: bytes = COUNTED, mode: str = "active", image_id: str | None = ID, **result: Any) -> BootState:
    return boot_state.of(line, result, mode, image_id)


def test_an_ordinary_boot() -> None:
    state = of(mode_asked="active", mode_booted="active")
    assert (state.wanted, state.reason, state.restarts, state.planned) == ("active", "", True, True)
    assert state.counted_as == ID
    assert str(state.environment.path) == "/oem/grubenv"


@pytest.mark.parametrize(
    ("line", "mode", "restarts"),
    [
        (IMAGE, "active", False),
        (COUNTED, "passive", True),
        (COUNTED, "recovery", False),
        (COUNTED, "live", False),
        (IMAGE + b" rd.cos.onfail=reboot", "active", True),
        (COUNTED + b" rd.cos.onfail=shell", "active", False),
        (b"rd.cos.onfail=nonsense", "active", False),
    ],
)
def test_which_boots_restart_the_machine(line: bytes, mode: str, restarts: bool) -> None:
    assert of(line, mode).restarts == restarts


@pytest.mark.parametrize(
    ("mode", "image_id", "counted_as"),
    [
        ("active", ID, ID),
        ("active", None, "active"),
        ("passive", None, "passive"),
        ("recovery", ID, None),
        ("live", None, None),
        ("", None, None),
    ],
)
def test_what_the_tries_are_counted_by(mode: str, image_id: str | None, counted_as: str | None) -> None:
    assert of(mode=mode, image_id=image_id).counted_as == counted_as


def test_without_an_identity_nothing_is_counted_once_images_were_moved() -> None:
    assert of(mode="passive", image_id=None).replace(moved=True).counted_as is None
    assert of(mode="passive", image_id=ID).replace(moved=True).counted_as == ID


@pytest.mark.parametrize(
    ("words", "failures", "mode", "given_up"),
    [
        (b"", [], "active", ()),
        (b" upgrade_failure=active", [], "passive", ("active",)),
        (b" upgrade_failure=active", ["passive"], "recovery", ("active", "passive")),
        (b"", ["active", "passive"], "recovery", ("active", "passive")),
        (b" upgrade_failure=recovery", [], "active", ("recovery",)),
    ],
)
def test_which_slots_could_not_be_booted(
    words: bytes, failures: list[str], mode: str, given_up: tuple[str, ...]
) -> None:
    listed = [{"mode": each, "message": "it is damaged", "other_kernel": False} for each in failures]
    state = of(COUNTED + words, mode, mode_asked=(*failures, mode)[0], failures=listed)
    assert state.given_up == given_up


def test_an_image_of_another_kernel_may_well_be_booted_by_its_own() -> None:
    passive = {"mode": "passive", "message": "it has no modules of 6.1", "other_kernel": True}
    active = {"mode": "active", "message": "it is damaged", "other_kernel": False}
    state = of(mode="recovery", mode_asked="active", failures=[active, passive])
    assert state.given_up == ("active",)


@pytest.mark.parametrize(
    ("words", "mode", "wanted"),
    [
        (b"upgrade_failure=active", "passive", "active"),
        (b"upgrade_failure=passive", "recovery", "passive"),
        (b"upgrade_failure=active", "active", "active"),
        (b"upgrade_failure=nonsense", "passive", "passive"),
        (b"upgrade_failure", "passive", "passive"),
    ],
)
def test_a_fallback_of_the_boot_loader(words: bytes, mode: str, wanted: str) -> None:
    state = of(COUNTED + b" " + words, mode, mode_asked=mode, mode_booted=mode)
    assert state.wanted == wanted
    assert state.reason == (GIVEN_UP if wanted != mode else "")


@pytest.mark.parametrize(
    ("failures", "reason"),
    [
        ([{"mode": "active", "message": "cannot mount"}], "active: cannot mount"),
        (
            [{"mode": "active", "message": "a"}, {"mode": "passive", "message": "b"}],
            "active: a; passive: b",
        ),
        ([], "the agent could not boot it"),
        (None, "the agent could not boot it"),
        (["x"], "the agent could not boot it"),
    ],
)
def test_a_fallback_of_the_agent(failures: object, reason: str) -> None:
    state = of(mode="recovery", mode_asked="active", mode_booted="recovery", failures=failures)
    assert (state.wanted, state.reason) == ("active", reason)


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ({"active": "bad"}, "it is bad: no boot of it came up in good health, or it was judged so"),
        ({"active": "missing"}, "there is no whole image in it"),
        ({"active": "trying"}, GIVEN_UP),
        ({}, GIVEN_UP),
    ],
)
def test_why_the_boot_loader_fell_back(states: dict[str, str], reason: str) -> None:
    state = of(COUNTED + b" upgrade_failure=active", "passive")
    assert boot_state.reason(state, states) == reason
    agents = of(mode="passive", mode_asked="active", failures=[{"mode": "active", "message": "x"}])
    assert boot_state.reason(agents, states) == "active: x"


def facts(**changes: Any) -> dict[str, Any]:
    slot = {"image_id": None, "label": "", "source": "", "date": "", "running": False, "problem": ""}
    whole = {
        "booted": "active",
        "wanted": "active",
        "reason": "",
        "health": {"verdict": "good"},
        "next": "active",
        "next_entry": "",
        "saved_entry": "",
        "environment": {"path": "/oem/grubenv", "problem": ""},
        "problems": [],
        "slots": {"active": {**slot, "state": "missing", "left": None}},
    }
    return whole | changes


def test_what_is_told_where_nothing_is_there() -> None:
    assert list(boot_status.lines(facts(next=None))) == [
        "  active    missing              -",
        "booted: active",
        "health: good",
        "next boot: nothing can be booted",
    ]


def mount(target: str, device: str, source: str = "x") -> MountPoint:
    return MountPoint(
        target=target,
        root="/",
        device=device,
        options="rw",
        fstype="x",
        source=source,
        superblock_options="rw",
    )


PLANNED = "0:30 /sysroot/etc\n0:31 /sysroot/a\\040b\n7:0 /sysroot\n0:32 /run/overlay\n"
MOUNTED = (mount("/", "7:0"), mount("/run/overlay", "0:32"), mount("/etc", "0:30"), mount("/a b", "0:31"))


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (MOUNTED, []),
        ((*MOUNTED, mount("/etc/x", "0:50"), mount("/etc", "0:51", "confext")), []),
        ((*MOUNTED, mount("/etc", "0:51")), ["/etc has something else mounted over it"]),
        (MOUNTED[:3], ["/a b is no longer mounted"]),
        ((), ["/ is no longer mounted", "/a b is no longer mounted", "/etc is no longer mounted"]),
    ],
)
def test_mounts_of_the_booted_system(table: tuple[MountPoint, ...], found: list[str]) -> None:
    differing = health_checks.differing(PLANNED, table, booted=True)
    assert [each for each in differing if "/run/overlay" not in each] == found


def test_mounts_before_the_switch() -> None:
    table = [mount(f"/sysroot{each.target}".rstrip("/"), each.device) for each in MOUNTED]
    table[1] = MOUNTED[1]
    assert health_checks.differing(PLANNED, table, booted=False) == []
