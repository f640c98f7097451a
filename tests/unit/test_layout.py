"""The cOS layout: which mode, which partition, and what every plan has to hold to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import image_of, partition
from hypothesis import event, given, settings
from hypothesis import strategies as st

from immucore import cmdline, fstab, layouts
from immucore.devices import Device, Devices, Wanted
from immucore.errors import CmdlineError, DeviceError, ImmucoreError, LayoutError
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
    Seed,
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
    assert cos.root_devices(asked(line))[0] == Wanted(spec=where, timeout_sec=180)


@pytest.mark.parametrize("line", ["", "root=UUID=1", "root=live:/dev/sr0 cos-img/filename=/cOS/active.img"])
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
    line = "" if mode == "live" else f"elemental.mode={mode} elemental.image=/x"
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
        Wanted(spec="LABEL=COS_STATE", timeout_sec=0),
        Wanted(spec="LABEL=CONF", timeout_sec=7, partlabel="oem", near="LABEL=COS_STATE"),
    )
    assert cos.state_devices(line, Image()) == (
        Wanted(spec="UUID=1", timeout_sec=0, near="LABEL=COS_STATE"),
        Wanted(spec="LABEL=B", timeout_sec=cos.OPTIONAL_TIMEOUT_SEC, near="LABEL=COS_STATE"),
        Wanted(spec="LABEL=COS_PERSISTENT", timeout_sec=0, partlabel="persistent", near="LABEL=COS_STATE"),
        Wanted(spec="LABEL=O", timeout_sec=0, near="LABEL=COS_STATE"),
    )


def test_an_overlay_device_is_not_waited_for_when_nothing_needs_it() -> None:
    line = asked(f"{ACTIVE} rd.cos.overlay=LABEL=O")
    wanted = cos.state_devices(line, image_of({"RW_PATHS": ""}))
    assert [each.spec for each in wanted] == ["LABEL=COS_PERSISTENT"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"RW_PATHS": "etc"}, "cannot use 'etc' (RW_PATHS in {}) as a path"),
        ({"RW_PATHS": "/"}, "cannot use '/' (RW_PATHS in {}) as a path"),
        ({"RW_PATHS": "/a/.."}, "cannot use '/a/..' (RW_PATHS in {}) as a path"),
        ({"RW_PATHS": "/a\\b"}, "cannot use '/a\\b' (RW_PATHS in {}) as a path"),
        ({"PERSISTENT_STATE_TARGET": "x"}, "cannot use 'x' (PERSISTENT_STATE_TARGET in {}) as a path"),
        ({"CUSTOM_BIND_MOUNTS": "x"}, "cannot use 'x' (CUSTOM_BIND_MOUNTS in {}) as a path"),
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
    with pytest.raises(DeviceError, match="cannot find a filesystem labelled 'DATA'"):
        cos.state(asked(f"{ACTIVE} rd.cos.mount=LABEL=DATA:/data"), DISK, Image())


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
    [{"RW_PATHS": "/x"}, {"PERSISTENT_STATE_PATHS": "/x"}, {"VOLUMES": "LABEL=COS_PERSISTENT:/x"}],
)
def test_a_listed_path_that_leads_to_the_root_is_refused(layout: dict[str, str]) -> None:
    with pytest.raises(LayoutError):
        cos.state(asked(ACTIVE), DISK, linked(layout, ("/x", "/")))


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
    places = [operation.target for operation in plan if made(operation)]
    for operation in plan:
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
            disk="/dev/vda",
        )
        for n, spec in enumerate({each.spec for each in wanted})
    ]
    try:
        plan = whole(line, Devices(all=tuple(there)), image)
    except LayoutError:
        return
    assert [each for each in plan if isinstance(each, Missing)] == []
