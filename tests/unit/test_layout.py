"""The cOS layout: which mode, which partition, and what every plan has to hold to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import image_of, partition
from hypothesis import event, given, settings
from hypothesis import strategies as st

from immucore import cmdline, fstab, layouts
from immucore.devices import HOME_FIRST, HOME_ONLY, Device, Devices, Wanted
from immucore.errors import AmbiguousError, CmdlineError, DeviceError, ImmucoreError, LayoutError
from immucore.image import Image, Setting
from immucore.layouts import cos
from immucore.plan import (
    Bind,
    Check,
    Loop,
    Missing,
    Mount,
    Operation,
    Overlay,
    Plan,
    Refused,
    Seed,
    TellBootLoader,
    WriteFile,
    as_booted,
    is_below,
)

if TYPE_CHECKING:
    from immucore.cmdline import Cmdline

DISK = Devices(
    all=tuple(
        partition(n, f"COS_{name}") for n, name in enumerate(("STATE", "OEM", "PERSISTENT", "RECOVERY"))
    )
)
ACTIVE = "root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img"

RECOVERIES = ["recovery /cOS/recovery.squashfs", "recovery /cOS/recovery.img"]


def asked(line: str) -> Cmdline:
    return cmdline.parse(line.encode())


def whole(line: Cmdline, devices: Devices, image: Image) -> Plan:
    return cos.root(line, devices) + cos.state(line, devices, image) + cos.sentinels(line)


def test_there_is_one_layout() -> None:
    assert layouts.select(asked(ACTIVE)) is cos


@pytest.mark.parametrize(
    ("line", "mode", "where"),
    [
        (ACTIVE, "active", "LABEL=COS_STATE"),
        ("root=LABEL=COS_PASSIVE cos-img/filename=/cOS/passive.img", "passive", "LABEL=COS_STATE"),
        ("root=LABEL=COS_SYSTEM cos-img/filename=/cOS/recovery.img", "recovery", "LABEL=COS_RECOVERY"),
        (
            "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.squashfs",
            "recovery",
            "LABEL=COS_RECOVERY",
        ),
        ("root=LABEL=COS_RECOVERY cos-img/filename=/other.squashfs", "recovery", "LABEL=COS_RECOVERY"),
        ("root=LABEL=COS_STATE cos-img/filename=/cOS/active.img", "active", "LABEL=COS_STATE"),
        ("root=LABEL=COS_STATE cos-img/filename=/cOS/passive.img", "passive", "LABEL=COS_STATE"),
        ("root=UUID=1 cos-img/filename=/cOS/passive.img", "passive", "UUID=1"),
        ("root=/dev/vda4 cos-img/filename=/cOS/active.img", "active", "/dev/vda4"),
        ("elemental.mode=active elemental.image=/x.img", "active", "LABEL=COS_STATE"),
        ("elemental.mode=recovery elemental.image=/x.img", "recovery", "LABEL=COS_RECOVERY"),
        ("elemental.mode=recovery root=PARTLABEL=rescue elemental.image=/x", "recovery", "PARTLABEL=rescue"),
        (
            "elemental.mode=passive root=LABEL=COS_ACTIVE elemental.image=/x.img",
            "passive",
            "LABEL=COS_STATE",
        ),
        ("cos-img/filename=/cOS/recovery.squashfs", "recovery", "LABEL=COS_RECOVERY"),
    ],
)
def test_mode_and_partition(line: str, mode: str, where: str) -> None:
    assert cos.mode(asked(line)) == mode
    assert cos.partition(asked(line)) == where
    assert cos.root_devices(asked(line))[0] == Wanted(spec=where, timeout_sec=180, home=HOME_FIRST)


@pytest.mark.parametrize(
    "line", ["root=live:LABEL=X", "root=live:/dev/sr0 cos-img/filename=/cOS/active.img"]
)
def test_live(line: str) -> None:
    assert cos.mode(asked(line)) == "live"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("elemental.mode=live elemental.image=/x", "cannot boot the unknown mode 'live'"),
        (
            "root=LABEL=COS_STATE cos-img/filename=/live.img",
            "cannot tell the boot mode from cos-img/filename=/live.img and root=LABEL=COS_STATE",
        ),
        ("root=LABE=X cos-img/filename=/active.img", "cannot read root=LABE=X"),
        ("root=nfs cos-img/filename=/active.img", "cannot read root=nfs"),
        ("root=https://me:geheim@host/x cos-img/filename=/active.img", "cannot read root=…"),
        (
            "root=https://me:geheim@host/x cos-img/filename=/x.img",
            "cannot tell the boot mode from cos-img/filename=/x.img and root=…",
        ),
        (
            "cos-img/filename=/cOS/../../active.img",
            "cannot boot the image '/cOS/../../active.img': that is no path of a file in the partition",
        ),
        (
            "cos-img/filename=",
            "cannot boot the image '/': that is no path of a file in the partition",
        ),
        (
            "cos-img/filename=/active/",
            "cannot boot the image '/active/': that is no path of a file in the partition",
        ),
    ],
)
def test_what_nobody_can_boot(line: str, message: str) -> None:
    with pytest.raises(CmdlineError) as caught:
        cos.partition(asked(line))
    assert caught.value.message == message
    assert caught.value.hint.startswith(("write ", "add "))


@pytest.mark.parametrize("mode", ["active", "passive", "recovery", "live"])
def test_sentinels(mode: str) -> None:
    line = "root=live:/dev/sr0" if mode == "live" else f"elemental.mode={mode} elemental.image=/x"
    plan = cos.sentinels(asked(line))
    assert [(each.target, each.content) for each in plan if isinstance(each, WriteFile)] == [
        (f"/run/cos/{mode}_mode", "1"),
        (f"/run/elemental/{mode}_mode", "1"),
    ]


def test_what_is_waited_for_and_how_long() -> None:
    line = asked(
        f"{ACTIVE} rd.cos.timeout=0 rd.cos.oemtimeout=7 rd.cos.oemlabel=CONF"
        " rd.cos.mount=UUID=1:/a rd.cos.mount=LABEL=B:/b:nofail rd.cos.overlay=LABEL=O"
    )
    assert cos.root_devices(line) == (
        Wanted(spec="LABEL=COS_STATE", timeout_sec=0, home=HOME_FIRST),
        Wanted(spec="LABEL=CONF", timeout_sec=7, partlabel="oem", near="LABEL=COS_STATE", home=HOME_ONLY),
    )
    assert cos.state_devices(line, Image()) == (
        Wanted(spec="UUID=1", timeout_sec=0, near="LABEL=COS_STATE"),
        Wanted(spec="LABEL=B", timeout_sec=cos.OPTIONAL_TIMEOUT_SEC, near="LABEL=COS_STATE"),
        Wanted(
            spec="LABEL=COS_PERSISTENT",
            timeout_sec=0,
            partlabel="persistent",
            near="LABEL=COS_STATE",
            home=HOME_FIRST,
        ),
        Wanted(spec="LABEL=O", timeout_sec=0, near="LABEL=COS_STATE"),
    )


def test_an_overlay_device_is_not_waited_for_when_nothing_needs_it() -> None:
    line = asked(f"{ACTIVE} rd.cos.overlay=LABEL=O")
    wanted = cos.state_devices(line, image_of({"RW_PATHS": ""}))
    assert [each.spec for each in wanted] == ["LABEL=COS_PERSISTENT"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"PERSISTENT_STATE_TARGET": "x"}, "cannot use 'x' (PERSISTENT_STATE_TARGET in {}) as a path"),
        ({"VOLUMES": "LABEL=A:/"}, "cannot use '/' (VOLUMES in {}) as a path"),
        ({"VOLUMES": "A:/a"}, "cannot read the volume 'A:/a' (VOLUMES in {})"),
        ({"VOLUMES": "LABEL=A"}, "cannot read the volume 'LABEL=A' (VOLUMES in {})"),
        (
            {"VOLUMES": "LABEL=A:/a LABEL=B:/a:ro"},
            "cannot mount both 'LABEL=A:/a' and 'LABEL=B:/a:ro' on /a",
        ),
        (
            {"OVERLAY": "x"},
            "cannot read 'x' (OVERLAY in {}): it has to be tmpfs:<size> (20%, 512m)"
            " or a device (LABEL=…, UUID=…)",
        ),
    ],
)
def test_a_layout_that_cannot_be_read_is_refused(layout: dict[str, str], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        cos.state_devices(asked(ACTIVE), image_of(layout))
    assert caught.value.message == message.format("/etc/cos/cos-layout.env")
    assert caught.value.hint


@pytest.mark.parametrize(
    "layout",
    [
        {"PERSISTENT_STATE_TARGET": "/a" * 5000},
        {"VOLUMES": "LABEL=A:/" + "a" * 5000},
        {"VOLUMES": "LABEL=A:/a:" + "o," * 5000},
        {"VOLUMES": "A" * 5000},
        {"OVERLAY": "x" * 5000},
        {"PERSISTENT_STATE_BIND": "x" * 5000},
    ],
)
def test_an_entry_of_any_length_is_refused_in_few_words(layout: dict[str, str]) -> None:
    with pytest.raises(LayoutError) as caught:
        cos.state_devices(asked(ACTIVE), image_of(layout))
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", ["RW_PATHS", "PERSISTENT_STATE_PATHS", "CUSTOM_BIND_MOUNTS"])
@pytest.mark.parametrize("entry", ["etc", "/", "/a/..", "/a\\b"])
def test_an_entry_that_is_no_path_does_not_take_its_siblings_with_it(name: str, entry: str) -> None:
    good = cos.state(asked(ACTIVE), DISK, image_of({name: "/etc /srv"}))
    plan = cos.state(asked(ACTIVE), DISK, image_of({name: f"/etc {entry} /srv"}))

    assert [each for each in plan if not isinstance(each, Missing)] == [*good]
    (refused,) = (each for each in plan if isinstance(each, Missing))
    assert refused.reason == f"cannot use '{entry}' ({name} in /etc/cos/cos-layout.env) as a path"
    assert (refused.criticality, refused.target) == (
        "important",
        f"'{entry}' of {name} in /etc/cos/cos-layout.env",
    )


def test_the_same_volume_twice_is_one() -> None:
    wanted = cos.state_devices(asked(ACTIVE), image_of({"VOLUMES": "LABEL=A:/a LABEL=A:/a/"}))
    assert [each.spec for each in wanted] == ["LABEL=A"]


def test_state_below_a_volume_that_nobody_mounts_is_refused() -> None:
    layout = image_of({"PERSISTENT_STATE_PATHS": "/home", "PERSISTENT_STATE_TARGET": "/data/state"})
    with pytest.raises(LayoutError, match="cannot keep state in /data/state"):
        cos.state(asked(ACTIVE), DISK, layout)


@pytest.mark.parametrize("path", ["/usr", "/usr/local/.state"])
@pytest.mark.parametrize("bind", ["true", "false"])
def test_a_state_path_that_would_hold_itself_is_refused(path: str, bind: str) -> None:
    layout = image_of({"PERSISTENT_STATE_PATHS": path, "PERSISTENT_STATE_BIND": bind})
    with pytest.raises(LayoutError, match="cannot keep"):
        cos.state(asked(ACTIVE), DISK, layout)


def test_a_required_volume_that_is_missing_stops_the_plan() -> None:
    plan = cos.state(asked(f"{ACTIVE} rd.cos.mount=LABEL=DATA:/data"), DISK, Image())
    (missing,) = (each for each in plan if isinstance(each, Missing))
    assert (missing.target, missing.criticality) == ("/sysroot/data", "required")
    assert missing.reason == "cannot find a filesystem labelled 'DATA'"


@pytest.mark.parametrize(("options", "criticality"), [("", "required"), (":nofail", "optional")])
def test_volumes_are_required_unless_they_say_nofail(options: str, criticality: str) -> None:
    layout = image_of({"VOLUMES": f"LABEL=COS_PERSISTENT:/usr/local{options}"})
    plan = cos.state(asked(ACTIVE), DISK, layout)
    (mount,) = [each for each in plan if each.target == "/sysroot/usr/local"]
    assert mount.criticality == criticality


def test_recovery_requires_nothing_of_the_users() -> None:
    line = asked("cos-img/filename=/cOS/recovery.img")
    layout = image_of({"VOLUMES": "LABEL=COS_OEM:/oem LABEL=COS_PERSISTENT:/usr/local LABEL=GONE:/gone"})
    plan = cos.root(line, DISK) + cos.state(line, DISK, layout)
    required = [each.target for each in plan if each.criticality == "required"]
    assert required == ["/run/initramfs/cos-state", "/sysroot"]


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image(), True),
        (Image(mounts_tmp=True), False),
        (Image(fstab="tmpfs /tmp tmpfs size=1m 0 0\n"), False),
        (Image(fstab="# tmpfs /tmp tmpfs size=1m 0 0\n\n/tmp\n"), True),
        (image_of({"RW_PATHS": "/tmp"}), False),
        (image_of({"PERSISTENT_STATE_PATHS": "/tmp"}), False),
        (image_of({"VOLUMES": "LABEL=COS_PERSISTENT:/tmp"}), False),
    ],
)
def test_tmp_gets_a_tmpfs_unless_somebody_cares_for_it(image: Image, wanted: bool) -> None:
    plan = cos.state(asked(ACTIVE), DISK, image)
    tmpfs = [
        each
        for each in plan
        if isinstance(each, Mount) and each.target == "/sysroot/tmp" and each.fstype == "tmpfs"
    ]
    assert bool(tmpfs) is wanted


def test_the_last_setting_counts_and_additions_add() -> None:
    settings_ = (
        Setting(name="RW_PATHS", value="/a", origin="image"),
        Setting(name="RW_PATHS", value="/b", origin="oem"),
        Setting(name="RW_PATHS", value="/c", origin="extra", adds=True),
    )
    image = Image(settings=settings_)
    assert image.setting("RW_PATHS") == settings_[1]
    assert image.additions("RW_PATHS") == settings_[2:]
    assert image.setting("VOLUMES") is None
    assert settings_[0].why == "RW_PATHS in image"


def test_a_variable_that_nobody_knows_is_told() -> None:
    plan = cos.state(asked(ACTIVE), DISK, image_of({"RW_PATH": "/x"}))
    assert plan.warnings == ("RW_PATH in /etc/cos/cos-layout.env does nothing: there is no such variable",)


def test_options_of_oem_that_come_too_late_are_told() -> None:
    layout = image_of({"VOLUMES": "LABEL=COS_OEM:/oem:ro LABEL=COS_PERSISTENT:/usr/local"})
    (warning,) = cos.state(asked(ACTIVE), DISK, layout).warnings
    assert "the options of LABEL=COS_OEM:/oem:ro do nothing" in warning
    line = asked(f"{ACTIVE} rd.cos.mount=LABEL=COS_OEM:/oem:ro")
    assert cos.state(line, DISK, layout).warnings == ()


def linked(layout: dict[str, str], *links: tuple[str, str]) -> Image:
    image: Image = image_of(layout).replace(links=links)
    return image


def test_a_path_behind_a_symlink_is_mounted_where_it_leads_and_kept_by_its_own_name() -> None:
    image = linked(
        {"RW_PATHS": "/etc /home", "PERSISTENT_STATE_PATHS": "/opt", "PERSISTENT_STATE_BIND": "true"},
        ("/home", "/var/home"),
        ("/opt", "/var/opt"),
    )
    plan = cos.state(asked(ACTIVE), DISK, image)
    shown = [str(each) for each in plan]
    assert "overlay on /sysroot/var/home (upper in /run/overlay/home.overlay)" in shown
    assert "bind /sysroot/usr/local/.state/opt.bind on /sysroot/var/opt" in shown
    (home,) = [each for each in plan if each.target == "/sysroot/var/home"]
    assert home.why == "RW_PATHS in /etc/cos/cos-layout.env has /home, a symlink to /var/home"


def test_two_names_of_one_directory_are_one_path() -> None:
    plan = cos.state(asked(ACTIVE), DISK, linked({"RW_PATHS": "/home /var/home"}, ("/home", "/var/home")))
    assert [each.target for each in plan if isinstance(each, Overlay)] == ["/sysroot/var/home"]
    assert (
        "/var/home: the same as /home, although RW_PATHS in /etc/cos/cos-layout.env has /var/home"
        in plan.notes
    )


def test_two_volumes_on_two_names_of_one_directory_are_refused() -> None:
    layout = {"VOLUMES": "LABEL=COS_PERSISTENT:/usr/local LABEL=COS_OEM:/local"}
    with pytest.raises(LayoutError, match="cannot mount both"):
        cos.state(asked(ACTIVE), DISK, linked(layout, ("/local", "/usr/local")))


@pytest.mark.parametrize(
    "layout",
    [{"RW_PATHS": "/x"}, {"PERSISTENT_STATE_PATHS": "/x"}],
)
def test_a_listed_path_that_leads_to_the_root_is_refused(layout: dict[str, str]) -> None:
    plan = cos.state(asked(ACTIVE), DISK, linked(layout, ("/x", "/")))
    assert [each.target for each in plan if isinstance(each, Missing)] == [
        f"'/x' of {next(iter(layout))} in /etc/cos/cos-layout.env"
    ]


def test_a_volume_that_leads_to_the_root_is_refused() -> None:
    with pytest.raises(LayoutError):
        cos.state(asked(ACTIVE), DISK, linked({"VOLUMES": "LABEL=COS_PERSISTENT:/x"}, ("/x", "/")))


def test_every_path_whose_symlinks_have_to_be_known() -> None:
    layout = {
        "RW_PATHS": "/etc",
        "PERSISTENT_STATE_PATHS": "/home",
        "VOLUMES": "LABEL=COS_PERSISTENT:/usr/local",
    }
    assert cos.listed_paths(asked(ACTIVE), image_of(layout)) == (
        "/usr/local",
        "/etc",
        "/home",
        "/usr/local/.state",
    )


# Random machines. Paths from few components, so that they nest and collide.
COMPONENTS = st.sampled_from(["etc", "var", "usr", "local", "data", "a", "a-b", "b", "oem", "tmp", "home"])
PATH = st.lists(COMPONENTS, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
WRONG = st.sampled_from(["/etc/../..", "relative", "/a/./b//"])
LIST = st.lists(PATH, max_size=4).map(" ".join) | st.lists(PATH | WRONG, max_size=2).map(" ".join)
LABELS = ("COS_STATE", "COS_OEM", "COS_PERSISTENT", "COS_RECOVERY", "DATA", "MORE")
VOLUME = st.tuples(
    st.sampled_from([*LABELS, "GONE"]), PATH, st.sampled_from(["", ":ro", ":nofail", ":noatime,nofail"])
).map(lambda parts: f"LABEL={parts[0]}:{parts[1]}{parts[2]}")
LAYOUT = st.fixed_dictionaries(
    {},
    optional={
        "RW_PATHS": LIST,
        "PERSISTENT_STATE_PATHS": LIST,
        "PERSISTENT_STATE_BIND": st.sampled_from(["true", "false", ""]),
        "PERSISTENT_STATE_TARGET": st.sampled_from(
            ["/usr/local/.state", "/data/state", "/run/state", "/var"]
        ),
        "CUSTOM_BIND_MOUNTS": LIST,
        "CUSTOM_EPHEMERAL_MOUNTS": LIST,
        "VOLUMES": st.lists(VOLUME, max_size=3).map(" ".join),
        "MERGE": st.sampled_from(["true", "false"]),
        "OVERLAY": st.sampled_from(["tmpfs:10%", "LABEL=MORE", "nonsense", ""]),
    },
)
LINE = st.tuples(
    st.sampled_from(
        [
            ACTIVE,
            "root=LABEL=COS_STATE cos-img/filename=/cOS/passive.img",
            "elemental.mode=recovery elemental.image=/cOS/recovery.img",
        ]
    ),
    st.lists(VOLUME.map("rd.cos.mount={}".format), max_size=2),
).map(lambda parts: " ".join([parts[0], *parts[1]]))
# Symlinks as observe.links() gives them: what they lead to is behind no other.
LINKS = st.dictionaries(PATH, PATH | st.just("/"), max_size=2).filter(
    lambda links: not any(is_below(real, path) for real in links.values() for path in links)
)
DISKS = st.lists(
    st.tuples(
        st.sampled_from(LABELS),
        st.sampled_from(["/dev/vda", "/dev/vdb"]),
        st.sampled_from(["ext4", "crypto_LUKS"]),
    ),
    max_size=3,
).map(
    lambda more: Devices(
        all=(
            *(partition(n, label) for n, label in enumerate(LABELS, 1)),
            *(partition(n, label, fstype, disk) for n, (label, disk, fstype) in enumerate(more, 10)),
        )
    )
)


def made(operation: Operation) -> bool:
    """Whether the operation puts something over its target."""
    return isinstance(operation, Mount | Loop | Overlay | Bind | Missing)


@settings(max_examples=500)
@given(line=LINE, devices=DISKS, layout=LAYOUT, links=LINKS)
def test_every_plan_is_one_that_can_be_carried_out(
    line: str, devices: Devices, layout: dict[str, str], links: dict[str, str]
) -> None:
    image = linked(layout, *links.items())
    try:
        plan = whole(asked(line), devices, image)
    except ImmucoreError as refusal:
        error = refusal
    else:
        error = None
    if error:
        assert error.exit_status in (2, 3)
        assert error.message
        assert error.hint
        event(" ".join(error.message.split()[:3]))
        return

    event("planned")
    assert plan == whole(asked(line), devices, image)
    targets = [operation.target for operation in plan]
    places = [each.target for each in plan if made(each) and each.target.startswith("/")]
    for operation in plan:
        if isinstance(operation, Refused):
            assert operation.criticality == "important"
            continue
        place = "/dev" if isinstance(operation, Check) else "/run"
        assert is_below(operation.target, "/sysroot") or is_below(operation.target, place)
        assert ".." not in [part for need in operation.needs for part in need.split("/")]
        assert "//" not in operation.target
        assert operation.why
        assert operation.criticality in ("required", "important", "optional")
    assert len({*places}) == len(places)
    # What holds others comes before them: nothing is mounted over what an earlier operation made or needs.
    for number, operation in enumerate(plan):
        if made(operation):
            for earlier in plan.operations[:number]:
                assert not is_below(earlier.target, operation.target) or isinstance(earlier, Seed), (
                    earlier,
                    operation,
                )
    # Where changes are kept is never what is covered by them, and is there before.
    for number, operation in enumerate(plan):
        kept = (
            operation.backing
            if isinstance(operation, Overlay)
            else operation.source
            if isinstance(operation, Bind)
            else None
        )
        if kept:
            assert not is_below(kept, operation.target)
            holders = [place for place in places if is_below(kept, place) and place != "/sysroot"]
            assert all(targets.index(place) < number for place in holders)
    kept_names = [each.backing for each in plan if isinstance(each, Overlay)]
    kept_names += [each.source for each in plan if isinstance(each, Bind)]
    assert len({*kept_names}) == len(kept_names)

    text = fstab.render(plan, "")
    mounted = [text_line.split()[1] for text_line in text.splitlines() if not text_line.startswith("#")]
    expected = [as_booted(each.target) for each in plan if isinstance(each, Mount | Bind | Overlay)]
    assert mounted == expected
    assert "/sysroot" not in text


@given(devices=DISKS, layout=LAYOUT)
def test_the_devices_asked_for_are_the_devices_planned(devices: Devices, layout: dict[str, str]) -> None:
    """With all that root_devices() and state_devices() name, nothing can be missing."""
    line, image = asked(ACTIVE), image_of(layout)
    try:
        wanted = [*cos.root_devices(line), *cos.state_devices(line, image)]
    except ImmucoreError:
        return
    there = [
        Device(
            path=f"/dev/vda{n}",
            fstype="ext4",
            label=spec.removeprefix("LABEL="),
            uuid=str(n),
            disks=("/dev/vda",),
        )
        for n, spec in enumerate({each.spec for each in wanted})
    ]
    try:
        plan = whole(line, Devices(all=tuple(there)), image)
    except LayoutError:
        return
    assert [each for each in plan if isinstance(each, Missing) and not isinstance(each, Refused)] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            ACTIVE,
            ["active /cOS/active.img", "passive /cOS/passive.img", *RECOVERIES],
        ),
        (
            "root=UUID=1 elemental.mode=active elemental.image=/x/active.squashfs",
            ["active /x/active.squashfs", "passive /x/passive.squashfs", *RECOVERIES],
        ),
        (
            "root=LABEL=COS_PASSIVE cos-img/filename=/cOS/passive.img",
            ["passive /cOS/passive.img", *RECOVERIES],
        ),
        (
            "root=LABEL=COS_RECOVERY cos-img/filename=/cOS/recovery.squashfs",
            ["recovery /cOS/recovery.squashfs"],
        ),
        (f"{ACTIVE} rd.cos.fallback=off", ["active /cOS/active.img"]),
        (f"{ACTIVE} rd.cos.fallback=reboot", ["active /cOS/active.img"]),
    ],
)
def test_the_slots_that_are_tried(line: str, expected: list[str]) -> None:
    attempts = cos.attempts(asked(line))
    assert [f"{cos.mode(each)} {each.image}" for each in attempts] == expected
    assert [each.instead_of for each in attempts] == [""] + [cos.mode(attempts[0])] * (len(attempts) - 1)


def test_every_attempt_can_be_planned_and_says_why() -> None:
    for attempt in cos.attempts(asked(ACTIVE)):
        state, image, _, oem = cos.root(attempt, DISK)  # the third checks the device of OEM
        assert isinstance(state, Mount)
        assert state.source == {"recovery": "/dev/vda3"}.get(attempt.mode, "/dev/vda0")
        assert isinstance(image, Loop)
        assert image.source == f"/run/initramfs/cos-state{attempt.image}"
        assert oem.target == "/sysroot/oem"
        if attempt.instead_of:
            assert state.why == image.why == "active could not be booted (rd.cos.fallback)"


def test_the_booted_system_is_told_that_it_is_another() -> None:
    passive = cos.attempts(asked(ACTIVE))[1]
    (told,) = cos.fell_back(passive, "active: no image")
    assert told == WriteFile(
        target="/run/cos/upgrade_failure",
        content="active: no image\n",
        why="passive is booted instead of active",
    )


@pytest.mark.parametrize(
    ("line", "failed", "entry"),
    [
        (ACTIVE, ("active",), "fallback"),
        (ACTIVE, ("active", "passive"), "recovery"),
        (ACTIVE, ("active", "passive", "recovery"), ""),
        ("root=LABEL=COS_PASSIVE cos-img/filename=/cOS/passive.img", ("passive",), "recovery"),
        ("elemental.mode=active elemental.image=/cOS/active.img", ("active",), "passive"),
        ("root=LABEL=COS_SYSTEM cos-img/filename=/cOS/recovery.img", ("recovery",), ""),
    ],
)
def test_the_entry_of_the_boot_loader_that_is_next(line: str, failed: tuple[str, ...], entry: str) -> None:
    assert cos.next_entry(asked(line), failed) == entry


def test_the_boot_loader_is_told_on_oem() -> None:
    mount, tell = cos.tell_boot_loader(asked(ACTIVE), DISK, "fallback")
    assert isinstance(mount, Mount)
    assert (mount.source, mount.target, mount.options) == ("/dev/vda1", "/run/immucore/boot-loader", ("rw",))
    assert isinstance(tell, TellBootLoader)
    assert (tell.target, tell.entry) == ("/run/immucore/boot-loader/grubenv", "fallback")


def test_safe_is_the_root_and_default_overlays_and_nothing_else() -> None:
    line = f"{ACTIVE} rd.cos.safe rd.cos.mount=LABEL=DATA:/data"
    layout = image_of({"RW_PATHS": "/x", "PERSISTENT_STATE_PATHS": "/y", "VOLUMES": "nonsense"})
    plan = whole(asked(line), DISK, layout)

    assert [each.spec for each in cos.root_devices(asked(line))] == ["LABEL=COS_STATE"]
    assert cos.state_devices(asked(line), layout) == ()
    assert [each.target for each in plan if isinstance(each, Mount)] == [
        "/run/initramfs/cos-state",
        "/run/overlay",
        "/sysroot/tmp",
    ]
    overlays = [as_booted(each.target) for each in plan if isinstance(each, Overlay)]
    assert overlays == ["/etc", "/home", "/opt", "/root", "/srv", "/usr/local", "/var"]
    assert not [each for each in plan if isinstance(each, Missing | Bind | Seed)]
    assert {each.criticality for each in plan if isinstance(each, Overlay)} == {"important"}


def test_no_persist_leaves_the_volume_out_and_keeps_nothing() -> None:
    line = f"{ACTIVE} rd.cos.nopersist"
    layout = image_of({"PERSISTENT_STATE_PATHS": "/etc/x", "PERSISTENT_STATE_BIND": "true"})
    plan = whole(asked(line), DISK, layout)

    assert cos.state_devices(asked(line), layout) == ()
    assert not [each for each in plan if isinstance(each, Missing | Bind | Seed)]
    overlays = [as_booted(each.target) for each in plan if isinstance(each, Overlay)]
    assert {"/usr/local", "/etc/x"} <= {*overlays}
    assert "LABEL=COS_PERSISTENT:/usr/local: left out, rd.cos.nopersist" in plan.notes


def test_required_state_that_is_missing_is_never_ephemeral() -> None:
    without = Devices(all=tuple(each for each in DISK.all if each.label != "COS_PERSISTENT"))
    layout = image_of({"PERSISTENT_STATE_PATHS": "/home", "PERSISTENT_STATE_BIND": "true"})
    plan = cos.state(asked(ACTIVE), without, layout)
    (missing,) = (each for each in plan if isinstance(each, Missing))
    assert (missing.target, missing.criticality) == ("/sysroot/usr/local", "required")
    (bind,) = (each for each in plan if isinstance(each, Bind))
    assert is_below(bind.source, missing.target)  # so it is never tried


def elsewhere(label: str) -> Device:
    return partition(1, label, disk="/dev/sdb")


def without(*labels: str) -> tuple[Device, ...]:
    return tuple(device for device in DISK.all if device.label not in labels)


def test_recovery_instead_of_another_slot_is_on_the_same_disk() -> None:
    recovery = cos.attempts(asked(ACTIVE))[2]
    both = Devices(all=(elsewhere("COS_RECOVERY"), *DISK.all))
    state = next(iter(cos.root(recovery, both)))
    assert isinstance(state, Mount)
    assert state.source == "/dev/vda3"

    foreign = Devices(all=(elsewhere("COS_RECOVERY"), *without("COS_RECOVERY")))
    with pytest.raises(DeviceError, match="cannot find a filesystem labelled 'COS_RECOVERY'"):
        cos.root(recovery, foreign)


def test_an_ambiguous_oem_stops_the_boot() -> None:
    twice = Devices(all=(*DISK.all, partition(9, "COS_OEM")))
    with pytest.raises(AmbiguousError, match="cannot choose a filesystem labelled 'COS_OEM'"):
        cos.root(asked(ACTIVE), twice)


def test_the_boot_loader_is_never_told_on_somebody_elses_oem() -> None:
    foreign = elsewhere("COS_OEM")
    gone = Devices(all=(foreign, *without("COS_OEM")))
    (missing, _) = cos.tell_boot_loader(asked(ACTIVE), gone, "fallback")
    assert isinstance(missing, Missing)

    with pytest.raises(DeviceError, match="cannot tell which OEM is this machine's"):
        cos.tell_boot_loader(asked(ACTIVE), Devices(all=(foreign,)), "fallback")


def test_labels_where_selinux_is_on() -> None:
    """What is made in memory is relabelled once the policy is loaded."""
    image = image_of({"RW_PATHS": "/etc /var"}).replace(selinux=True)
    plan = cos.state(asked(ACTIVE), DISK, image)
    (relabel,) = [each for each in plan if isinstance(each, WriteFile)]
    assert relabel.target == "/run/systemd/relabel-extra.d/immucore.relabel"
    assert relabel.content == "/etc\n/var\n/tmp\n/run/cos\n/run/elemental\n/run/immucore\n"
    plain = cos.state(asked(ACTIVE), DISK, image_of({}))
    assert not [each for each in plain if isinstance(each, WriteFile)]
