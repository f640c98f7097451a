"""The kernel command line: split as the kernel splits it, every key, every alias, every warning."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import cmdline
from immucore.cmdline import Cmdline

if TYPE_CHECKING:
    from collections.abc import Callable

Words = list[tuple[str, str | None]]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Words]:
    """Compile the kernel's algorithm, and return it as a function."""
    library = tmp_path_factory.mktemp("next_arg") / "next_arg.so"
    source = Path(__file__).with_name("next_arg.c")
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    split = ctypes.CDLL(str(library)).split

    def words(line: bytes) -> Words:
        out = ctypes.create_string_buffer(4 * len(line) + 16)
        split(ctypes.create_string_buffer(line), out)
        found: Words = []
        raw = out.raw
        while raw[:1] == b"K":
            key, _, raw = raw[1:].partition(b"\0")
            value = None
            if raw[:1] == b"V":
                value, _, raw = raw[1:].partition(b"\0")
            else:
                raw = raw[1:]
            found.append((key.decode("utf-8", "surrogateescape"), _text(value)))
        assert raw[:1] == b"E"
        return found

    return words


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")


# Lines that are all quotes, blanks and separators: what hypothesis' own bytes hardly ever are.
LINES = st.lists(
    st.sampled_from(
        [
            b'"',
            b'"',
            b"=",
            b" ",
            b"-",
            b"a",
            b"rd.cos.",
            b"\t",
            b"\n",
            b"\xa0",
            b"\xc3\xa0",
            b"\x85",
            b"--",
            b"\\",
        ]
    ),
    max_size=14,
).map(b"".join) | st.binary(max_size=40).map(lambda line: line.replace(b"\0", b""))


@given(line=LINES)
def test_words_are_the_kernels(kernel: Callable[[bytes], Words], line: bytes) -> None:
    assert list(cmdline.words(line)) == kernel(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"", []),
        (b" \t\n", []),
        (b"a", [("a", None)]),
        (b"a=", [("a", "")]),
        (b"a=b=c", [("a", "b=c")]),
        (b"=a", [("=a", None)]),
        (b"=a=b", [("=a", "b")]),
        (b'a="b c" d', [("a", "b c"), ("d", None)]),
        (b'"a=b c" d', [("a", "b c"), ("d", None)]),
        (b'a=b" "c', [("a", 'b" "c')]),
        (b'a="b', [("a", "b")]),
        (b'"k="v""', [("k", 'v"')]),
        (b'""', [("", None)]),
        (b'a="', [("a", "")]),
        (b"a -- b", [("a", None)]),
        (b"a --=1 b", [("a", None), ("--", "1"), ("b", None)]),
        (b"a\xa0b", [("a", None), ("b", None)]),
        ("ä=ö".encode(), [("ä", "ö")]),
        (b"a=\xff", [("a", "\udcff")]),
        (b"a=b\\ c", [("a", "b\\"), ("c", None)]),
    ],
)
def test_words(kernel: Callable[[bytes], Words], line: bytes, expected: Words) -> None:
    assert kernel(line) == expected
    assert list(cmdline.words(line)) == expected


def test_the_newline_of_proc_cmdline_is_none_of_a_value() -> None:
    """The kernel never saw it: fs/proc/cmdline.c adds it."""
    assert cmdline.parse(b'rd.cos.oemlabel="COS OEM\n').oem_label == "COS OEM"


ON, OFF = (b"", b"=1", b"=yes", b"=on", b"=true", b"=TRUE"), (b"=0", b"=no", b"=off", b"=false", b"=Off")
SWITCHES = {
    "debug": (b"rd.cos.debug", b"rd.immucore.debug"),
    "debug_rw": (b"rd.cos.debugrw", b"rd.immucore.debugrw"),
    "safe": (b"rd.cos.safe", b"rd.immucore.safe"),
    "no_persist": (b"rd.cos.nopersist", b"rd.immucore.nopersist"),
    "disable": (b"rd.cos.disable", b"rd.immucore.disable", b"elemental.disable"),
}


@pytest.mark.parametrize(
    ("field", "key"), [(field, key) for field, keys in SWITCHES.items() for key in keys]
)
def test_a_switch(field: str, key: bytes) -> None:
    assert not getattr(cmdline.parse(b""), field)
    for value in ON:
        assert cmdline.parse(key + value) == Cmdline(**{field: True})
    for value in OFF:
        assert cmdline.parse(key + b" " + key + value) == Cmdline(**{field: False})


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("cos-img/filename=/cOS/active.img", "image", "/cOS/active.img"),
        ("cos_img/filename=/cOS/active.img", "image", "/cOS/active.img"),
        ("elemental.image=/cOS/active.img", "image", "/cOS/active.img"),
        ("cos-img/filename=cOS/active.img", "image", "/cOS/active.img"),
        ("cos-img/filename=", "image", "/"),
        ("cos-img/filename", "image", "/"),
        ("root=LABEL=COS_STATE", "root", "LABEL=COS_STATE"),
        ("root=live:CDLABEL=X", "root", "live:CDLABEL=X"),
        ("elemental.mode=passive", "mode", "passive"),
        ("rd.cos.overlay=tmpfs:512m", "overlay", "tmpfs:512m"),
        ("rd.immucore.overlay=tmpfs:30%", "overlay", "tmpfs:30%"),
        ("elemental.overlay=LABEL=SCRATCH", "overlay", "LABEL=SCRATCH"),
        ("rd.cos.overlay=/dev/vdb", "overlay", "/dev/vdb"),
        ("rd.cos.mount=LABEL=DATA:/data", "mounts", ("LABEL=DATA:/data",)),
        ("rd.immucore.mount=UUID=1:/data:ro", "mounts", ("UUID=1:/data:ro",)),
        ("rd.cos.mount=PARTLABEL=a:b:/data", "mounts", ("PARTLABEL=a:b:/data",)),
        ("rd.cos.oemlabel=OEM", "oem_label", "OEM"),
        ("rd.immucore.oemlabel=OEM", "oem_label", "OEM"),
        ("elemental.oemlabel=OEM", "oem_label", "OEM"),
        ("rd.cos.oemtimeout=1", "oem_timeout_sec", 1),
        ("rd.immucore.oemtimeout=1800", "oem_timeout_sec", 1800),
        ("elemental.oemtimeout=60", "oem_timeout_sec", 60),
        ("rd.cos.timeout=0", "timeout_sec", 0),
        ("rd.immucore.timeout=7", "timeout_sec", 7),
        ("rd.cos.break=/etc", "breaks", ("/etc",)),
        ("rd.cos.fallback=reboot", "fallback", "reboot"),
        ("rd.immucore.fallback=off", "fallback", "off"),
        ("rd.cos.onfail=reboot:5", "onfail", "reboot:5"),
        ("rd.cos.onfail=reboot", "onfail", "reboot"),
        ("rd.cos.timeout=1000000000", "timeout_sec", 10**9),
        ("rd.cos.onfail=halt", "onfail", "halt"),
        ("init=/bin/sh", "init", "/bin/sh"),
    ],
)
def test_a_key(word: str, field: str, value: Any) -> None:
    assert cmdline.parse(word.encode()) == Cmdline(**{field: value})


def test_the_last_one_wins_and_mounts_add_up() -> None:
    asked = cmdline.parse(
        b"rd.cos.oemlabel=A rd.immucore.oemlabel=B elemental.oemlabel=C"
        b" rd.cos.mount=LABEL=A:/a rd.immucore.mount=LABEL=B:/b rd.cos.break=/a rd.cos.break=/b"
    )
    assert asked == Cmdline(oem_label="C", mounts=("LABEL=A:/a", "LABEL=B:/b"), breaks=("/a", "/b"))


NUMBER = "it has to be a number of seconds from "
VOLUME = "it has to be <device>:/mountpoint[:options] (LABEL=DATA:/data); it is left out"
SWITCH = "it is a switch: 1 or 0, yes or no, on or off, true or false; the default is taken: off"
ONFAIL = "it has to be shell, reboot, reboot:<seconds> or halt; the default is taken: shell"
OVERLAY = (
    "it has to be tmpfs:<size> (20%, 512m) or a device (LABEL=…, UUID=…); the default is taken: tmpfs:20%"
)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("root=", "it needs a value; the default is taken: none"),
        ("elemental.mode", "it needs a value; the default is taken: none"),
        ("rd.cos.overlay=tmpfs:", OVERLAY),
        ("rd.cos.overlay=tmpfs:0", OVERLAY),
        ("rd.cos.overlay=tmpfs:20x", OVERLAY),
        ("rd.cos.overlay=LABEL=", OVERLAY),
        ("rd.cos.overlay", "it needs a value; the default is taken: tmpfs:20%"),
        ("rd.cos.mount=DATA:/data", VOLUME),
        ("rd.cos.mount=LABEL=DATA", VOLUME),
        ("rd.cos.mount=LABEL=DATA:data", VOLUME),
        ("rd.cos.mount=LABEL=DATA:/..", VOLUME),
        ("rd.cos.mount", "it needs a value; it is left out"),
        ("rd.cos.oemlabel=", "it needs a value; the default is taken: COS_OEM"),
        ("rd.cos.oemtimeout=0", NUMBER + "1 to 1800; the default is taken: 10"),
        ("rd.cos.oemtimeout=1801", NUMBER + "1 to 1800; the default is taken: 10"),
        ("rd.cos.timeout=1m", NUMBER + "0 to 1000000000; the default is taken: 180"),
        ("rd.cos.timeout=\N{SUPERSCRIPT TWO}", NUMBER + "0 to 1000000000; the default is taken: 180"),
        ("rd.cos.timeout", NUMBER + "0 to 1000000000; the default is taken: 180"),
        ("rd.cos.debug=maybe", SWITCH),
        ("elemental.disable=", SWITCH),
        ("rd.cos.break=", "it needs a value; it is left out"),
        ("rd.cos.fallback", "it has to be same-boot, reboot or off; the default is taken: same-boot"),
        ("rd.cos.onfail=panic", ONFAIL),
        ("rd.cos.onfail=halt:5", ONFAIL),
        ("rd.cos.onfail=reboot:86401", NUMBER + "0 to 86400; the default is taken: shell"),
        ("rd.cos.onfail=reboot:000010", NUMBER + "0 to 86400; the default is taken: shell"),
        ("rd.cos.onfail=reboot:", NUMBER + "0 to 86400; the default is taken: shell"),
    ],
)
def test_a_malformed_value_is_one_warning_and_the_default(word: str, reason: str) -> None:
    shown = f"'{word}' on the kernel command line cannot be read: {reason}"
    assert cmdline.parse(word.encode()) == Cmdline(warnings=(shown,))


def test_a_malformed_value_takes_the_default_even_after_a_good_one() -> None:
    asked = cmdline.parse(b"rd.cos.overlay=tmpfs:50% rd.cos.overlay=x")
    assert asked.overlay == "tmpfs:20%"
    assert len(asked.warnings) == 1


@pytest.mark.parametrize(
    ("line", "mode", "repair", "allowed"),
    [
        ("", "auto", "preen", "preen"),
        ("fsck.mode=auto fsck.repair=preen", "auto", "preen", "preen"),
        ("fsck.mode=force fsck.repair=yes", "force", "yes", "yes"),
        ("fsck.mode=force fsck.mode=skip", "skip", "preen", "no"),
        ("fsck.repair", "auto", "yes", "yes"),
        ("fsck.repair=y fsck.repair=0", "auto", "no", "no"),
        ("fsck.repair=n", "auto", "no", "no"),
    ],
)
def test_fsck(line: str, mode: str, repair: str, allowed: str) -> None:
    parsed = cmdline.parse(line.encode())
    assert parsed == Cmdline(fsck_mode=mode, fsck_repair=repair)
    assert parsed.fsck_repair_allowed == allowed


@pytest.mark.parametrize(
    ("word", "reason", "default"),
    [
        ("fsck.mode=never", "it has to be auto, force or skip", "auto"),
        ("fsck.mode", "it has to be auto, force or skip", "auto"),
        ("fsck.repair=perhaps", "it has to be preen, yes or no", "preen"),
    ],
)
def test_fsck_that_cannot_be_read(word: str, reason: str, default: str) -> None:
    said = f"'{word}' on the kernel command line cannot be read: {reason}; the default is taken: {default}"
    assert cmdline.parse(word.encode()) == Cmdline(warnings=(said,))


@pytest.mark.parametrize("word", ["rd.cos.debugg", "rd.immucore.uki=1", "rd.cos.", "rd.cos.mount.x"])
def test_an_unknown_key_of_ours_is_a_warning(word: str) -> None:
    said = f"'{word}' on the kernel command line is not a key of immucore and does nothing"
    assert cmdline.parse(word.encode()) == Cmdline(warnings=(said,))


@pytest.mark.parametrize(
    "line",
    [
        "quiet ro panic=5 console=ttyS0,115200n8",
        "elemental.health_check rd.break rd.cosmic=1 xrd.cos.debug",
        "fsck.mode=auto fsck.repair=preen",
        "rd.cos.safe=0 rd.cos.nopersist=off rd.cos.bootdisk=auto",
        "rd.cos.fallback=same-boot rd.cos.onfail=shell",
        "-- rd.cos.debug rd.cos.nonsense",
    ],
)
def test_what_is_not_ours_or_asks_for_what_happens_anyway_is_no_warning(line: str) -> None:
    assert cmdline.parse(line.encode()) == Cmdline()


@pytest.mark.parametrize(
    ("line", "engaged", "bystander"),
    [
        ("cos-img/filename=/a.img", True, False),
        ("cos-img/filename=", True, False),
        ("root=LABEL=COS_STATE", False, False),
        ("", False, False),
        ("cos-img/filename=/a.img rd.cos.disable", False, True),
        ("cos-img/filename=/a.img rd.cos.disable=0", True, False),
        ("root=/dev/sda1 rd.cos.disable", False, False),
        ("root=live:/dev/sr0", False, True),
        ("cos-img/filename=/a.img root=live:/dev/sr0", False, True),
    ],
)
def test_whose_boot_it_is(line: str, engaged: bool, bystander: bool) -> None:
    asked = cmdline.parse(line.encode())
    assert (asked.engaged, asked.bystander) == (engaged, bystander)


KEYS = sorted(cmdline._readers())
OURS = st.tuples(
    st.sampled_from(KEYS) | st.text("abc.-_", max_size=6).map(lambda rest: f"rd.cos.{rest}"),
    st.none()
    | st.sampled_from(["1", "", "tmpfs:1%", "LABEL=A:/b", "/x", "7"])
    | st.text(st.characters(exclude_characters='"\0', exclude_categories=["Cs"]), max_size=8),
)


@given(words=st.lists(OURS, max_size=5))
def test_no_word_of_ours_is_lost(words: list[tuple[str, str | None]]) -> None:
    """Each is taken, or named in a warning, or was overridden by a later word for the same thing."""
    texts = [key if value is None else f'{key}="{value}"' for key, value in words]
    line = " ".join(texts).encode()
    asked = cmdline.parse(line)
    for key, value in cmdline.words(line):
        if not key.startswith(("rd.cos.", "rd.immucore.")):
            continue
        shown = key if value is None else f"{key}={value}"
        warned = any(warning.startswith(f"'{shown}' ") for warning in asked.warnings)
        alone = cmdline.parse(shown.encode() if value is None else f'{key}="{value}"'.encode())
        assert warned == bool(alone.warnings)
        if not warned and key.endswith(".mount"):
            assert value in asked.mounts


@given(line=st.binary(max_size=80))
def test_parse_never_raises(line: bytes) -> None:
    assert isinstance(cmdline.parse(line), Cmdline)
