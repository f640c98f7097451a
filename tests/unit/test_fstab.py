"""What fstab says of what was mounted; findmnt and the C library read it as the booted system does."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import fstab
from immucore.observe import MountPoint
from immucore.plan import (
    IMPORTANT,
    OPTIONAL,
    Bind,
    Loop,
    Missing,
    Mount,
    Operation,
    Overlay,
    Seed,
    WriteFile,
)

if TYPE_CHECKING:
    from pathlib import Path

WHY = "test"
ROOT = Loop(source="/run/initramfs/cos-state/cOS/active.img", target="/sysroot", why=WHY)
STATE = Mount(
    source="/dev/vda4",
    target="/run/initramfs/cos-state",
    fstype="ext4",
    options=("ro",),
    fstab_name="UUID=4",
    why=WHY,
)
USR_LOCAL = Mount(
    source="/dev/vda5",
    target="/sysroot/usr/local",
    fstype="ext4",
    options=("rw",),
    fstab_name="UUID=5",
    why=WHY,
)
BASE = Mount(
    source="immucore-overlay", target="/run/overlay", fstype="tmpfs", options=("size=20%",), why=WHY
)
ETC = Overlay(target="/sysroot/etc", backing="/run/overlay/etc.overlay", why=WHY)


def lines(*operations: Operation, image: str = "") -> list[str]:
    return [line for line in fstab.render(operations, image).splitlines() if not line.startswith("#")]


def options(line: str) -> list[str]:
    return line.split()[3].split(",")


def test_a_mount() -> None:
    assert lines(STATE) == ["UUID=4 /run/initramfs/cos-state ext4 ro 0 0"]


def test_without_options_or_a_better_name() -> None:
    assert lines(Mount(source="/dev/a", target="/sysroot/a", fstype="xfs", why=WHY)) == [
        "/dev/a /a xfs defaults 0 0"
    ]


def test_the_root_is_a_comment() -> None:
    root = "# / is /run/initramfs/cos-state/cOS/active.img, mounted ro by the initramfs.\n"
    assert fstab.render([ROOT], "") == f"{fstab.HEADER}{root}{fstab.MARK}"


def test_an_overlay_names_its_directories_as_the_booted_system_has_them() -> None:
    assert lines(ETC) == [
        "overlay /etc overlay lowerdir=/etc,upperdir=/run/overlay/etc.overlay/upper,"
        "workdir=/run/overlay/etc.overlay/work,index=off,metacopy=off,x-initrd.mount 0 0"
    ]


def test_a_bind() -> None:
    bind = Bind(source="/sysroot/usr/local/.state/home.bind", target="/sysroot/home", why=WHY)
    assert lines(bind) == ["/usr/local/.state/home.bind /home none bind,x-initrd.mount 0 0"]


def test_what_is_no_mount_has_no_line() -> None:
    assert (
        lines(
            Seed(source="/sysroot/etc", target="/sysroot/s", why=WHY),
            WriteFile(target="/run/x", content="", why=WHY),
            Missing(spec="LABEL=X", target="/sysroot/x", reason="gone", why=WHY),
        )
        == []
    )


@pytest.mark.parametrize("criticality", [IMPORTANT, OPTIONAL])
@pytest.mark.parametrize("given_options", [("rw",), ("rw", "nofail")])
def test_the_booted_system_need_not_have_what_the_boot_need_not(
    criticality: str, given_options: tuple[str, ...]
) -> None:
    (line,) = lines(USR_LOCAL.replace(criticality=criticality, options=given_options))
    assert options(line) == ["rw", "nofail"]
    assert "nofail" in options(lines(ETC.replace(criticality=criticality))[0])


def test_what_others_stand_on_outlives_shutdown() -> None:
    bind = Bind(source="/sysroot/usr/local/.state/home.bind", target="/sysroot/home", why=WHY)
    other = Mount(source="/dev/b", target="/sysroot/data", fstype="ext4", why=WHY)
    rendered = {line.split()[1]: options(line) for line in lines(STATE, BASE, USR_LOCAL, ETC, bind, other)}
    assert {target for target, found in rendered.items() if "x-initrd.mount" in found} == {
        "/usr/local",
        "/etc",
        "/home",
    }


def test_what_others_are_mounted_in_outlives_shutdown() -> None:
    """Or systemd, which unmounts a mount point before its parent, takes the child along."""
    volume = Mount(source="/dev/b", target="/sysroot/data", fstype="ext4", why=WHY)
    bind = Bind(source="/sysroot/usr/local/.state/data-x.bind", target="/sysroot/data/x", why=WHY)
    assert "x-initrd.mount" not in lines(volume)[0]
    assert "x-initrd.mount" in lines(volume, bind)[0]


def there(target: str, source: str, root: str = "/") -> MountPoint:
    return MountPoint(
        target=target, root=root, device="8:1", options="", fstype="x", source=source, superblock_options=""
    )


def test_utab_tells_systemd_what_outlives_shutdown() -> None:
    bind = Bind(source="/sysroot/usr/local/.state/my home.bind", target="/sysroot/home", why=WHY)
    other = Mount(source="/dev/b", target="/sysroot/data", fstype="ext4", why=WHY)
    table = [
        there("/run/overlay", "immucore-overlay"),
        there("/sysroot/usr/local", "/dev/vda5"),
        there("/sysroot/private/etc", "overlay"),
        there("/sysroot/home", "/dev/vda5", "/.state/my home.bind"),
        there("/sysroot/data", "/dev/b"),
    ]
    done = [BASE, USR_LOCAL, ETC, bind, other]

    text = fstab.utab(done, table, lambda path: path.replace("/etc", "/private/etc"), "SRC=a TARGET=/b\n")

    assert text.splitlines() == [
        "SRC=a TARGET=/b",
        "SRC=immucore-overlay TARGET=/run/overlay ROOT=/ OPTS=x-initrd.mount",
        "SRC=/dev/vda5 TARGET=/usr/local ROOT=/ OPTS=x-initrd.mount",
        "SRC=overlay TARGET=/private/etc ROOT=/ OPTS=x-initrd.mount",
        "SRC=/dev/vda5 TARGET=/home ROOT=/.state/my\\040home.bind OPTS=x-initrd.mount",
    ]
    assert fstab.utab(done, table, lambda path: path.replace("/etc", "/private/etc"), text) == text


def test_the_last_mount_on_a_mount_point_is_its_line() -> None:
    over = USR_LOCAL.replace(fstab_name="UUID=6")
    assert lines(USR_LOCAL, over) == ["UUID=6 /usr/local ext4 rw 0 0"]


def test_the_images_lines_stay_but_for_ours_and_the_root() -> None:
    image = (
        "# UNCONFIGURED FSTAB FOR BASE SYSTEM\n"
        "LABEL=COS_ACTIVE / ext4 ro 0 1\n"
        "/dev/x /usr/local ext4 rw 0 2\n"
        "# keep me\n"
        "\n"
        "LABEL=COS_GRUB /efi vfat noauto 0 2\n"
        "/swap none swap sw 0 0\n"
    )
    text = fstab.render([USR_LOCAL], image)
    assert text == (
        f"{fstab.HEADER}UUID=5 /usr/local ext4 rw 0 0\n{fstab.MARK}"
        "# keep me\n\nLABEL=COS_GRUB /efi vfat noauto 0 2\n/swap none swap sw 0 0\n"
    )


@pytest.mark.parametrize("image", ["", "# keep me\n\n/dev/x /x ext4 rw 0 0\n"])
def test_the_images_lines_are_found_again_in_what_was_rendered(image: str) -> None:
    """A second run over a finished one sees our fstab, and must make the same of it."""
    assert fstab.of_image(image) == image
    rendered = fstab.render([ROOT, USR_LOCAL], image)
    assert fstab.of_image(rendered) == image
    assert fstab.render([ROOT, USR_LOCAL], fstab.of_image(rendered)) == rendered


def test_a_line_of_the_image_ends_at_a_newline_only() -> None:
    """str.splitlines() would make a mount of what is a comment, and two lines of one name."""
    image = "# a comment\x0c/dev/x /x ext4 rw 0 0\n/dev/y /a\u2028b ext4 rw 0 0\r\n"
    assert fstab.render([], image) == fstab.HEADER + fstab.MARK + image


def test_an_indented_comment_stays() -> None:
    assert fstab.render([USR_LOCAL], "  # /usr/local is ours\n").endswith("  # /usr/local is ours\n")


def test_blanks_of_other_scripts_are_none() -> None:
    """getmntent(3) knows the blank and the tab."""
    assert lines(USR_LOCAL, image="/dev/x\xa0/usr/local\t/y ext4\n")[1:] == ["/dev/x\xa0/usr/local\t/y ext4"]


def test_every_field_is_escaped() -> None:
    root = ROOT.replace(source="/run/initramfs/cos-state/a\n/dev/x /x ext4 rw")
    odd = Mount(source="/dev/a b", target="/sysroot/c", fstype="a\tb", options=("x\n",), why=WHY)
    assert lines(root, odd) == ["/dev/a\\040b /c a\\011b x\\012 0 0"]


def test_a_comma_in_the_name_of_a_path_adds_no_option() -> None:
    overlay = Overlay(target="/sysroot/a,ro", backing="/run/overlay/a,ro.overlay", why=WHY)
    found = fstab.unescape(lines(overlay)[0]).split()[3].replace("\\,", "")
    assert found.split(",")[3:] == ["index=off", "metacopy=off", "x-initrd.mount"]


def test_the_images_line_is_recognised_in_its_escaped_spelling() -> None:
    ours = Mount(source="/dev/a", target="/sysroot/my data", fstype="ext4", why=WHY)
    assert lines(ours, image="/dev/b /my\\040data ext4 rw 0 0\n") == [
        "/dev/a /my\\040data ext4 defaults 0 0"
    ]


def test_no_initramfs_path_is_left() -> None:
    bind = Bind(source="/sysroot/usr/local/.state/home.bind", target="/sysroot/home", why=WHY)
    assert "/sysroot" not in fstab.render([ROOT, STATE, BASE, USR_LOCAL, ETC, bind], "")


class _Mntent(ctypes.Structure):
    _fields_ = (
        ("fsname", ctypes.c_char_p),
        ("dir", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("opts", ctypes.c_char_p),
        ("freq", ctypes.c_int),
        ("passno", ctypes.c_int),
    )


def getmntent(path: Path) -> list[tuple[str, str, str, str]]:
    """Read an fstab with the C library, as systemd-fstab-generator does."""
    libc = ctypes.CDLL(None)
    libc.setmntent.restype = libc.getmntent.restype = ctypes.c_void_p
    libc.getmntent.argtypes = libc.endmntent.argtypes = (ctypes.c_void_p,)
    file = libc.setmntent(str(path).encode(), b"r")
    found = []
    while address := libc.getmntent(file):
        entry = _Mntent.from_address(address)
        found.append(tuple(os.fsdecode(each) for each in (entry.fsname, entry.dir, entry.type, entry.opts)))
    libc.endmntent(file)
    return found


STRANGE = ("/my data", "/tab\tx", "/back\\slash", "/a#b", "/ä", "/comma,colon:x", "/new\nline")


@pytest.mark.parametrize("path", STRANGE)
def test_the_c_library_reads_strange_mount_points(path: str, tmp_path: Path) -> None:
    mount = Mount(source="/dev/a", target=f"/sysroot{path}", fstype="ext4", why=WHY)
    (tmp_path / "fstab").write_text(fstab.render([mount], ""))
    assert getmntent(tmp_path / "fstab") == [("/dev/a", path, "ext4", "defaults")]


@pytest.mark.parametrize("path", STRANGE)
def test_libmount_reads_strange_mount_points(path: str, tmp_path: Path) -> None:
    mount = Mount(source="/dev/a", target=f"/sysroot{path}", fstype="ext4", why=WHY)
    (tmp_path / "fstab").write_text(fstab.render([mount], ""))
    command = ["findmnt", "--tab-file", tmp_path / "fstab", "--json", "--output", "TARGET"]
    said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [each["target"] for each in said["filesystems"]] == [path]


def test_findmnt_verifies_it(tmp_path: Path) -> None:
    """It looks at the machine that runs the tests, so every place named is made to be there."""
    places = {name: tmp_path / name for name in ("etc", "home", "my data", "local", "overlay")}
    for place in places.values():
        place.mkdir()
    operations = [
        Mount(source="tmpfs", target=str(places["overlay"]), fstype="tmpfs", options=("size=20%",), why=WHY),
        Mount(source="tmpfs", target=str(places["local"]), fstype="tmpfs", why=WHY, criticality=OPTIONAL),
        Mount(source="tmpfs", target=str(places["my data"]), fstype="tmpfs", why=WHY),
        Overlay(target=str(places["etc"]), backing=str(places["overlay"]), why=WHY),
        Bind(source=str(places["local"]), target=str(places["home"]), why=WHY, criticality=IMPORTANT),
    ]
    (tmp_path / "fstab").write_text(
        fstab.render([ROOT, *operations], "# theirs\nproc /proc proc defaults 0 0\n")
    )
    said = subprocess.run(
        ["findmnt", "--verify", "--verbose", "--tab-file", tmp_path / "fstab"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "[E]" not in said.stdout
    # The kernel of the machine that runs the tests may lack overlayfs until the first overlay is mounted.
    assert [line for line in said.stdout.splitlines() if "[W]" in line and "overlay" not in line] == []


@given(text=st.text(max_size=20) | st.text(" \t\n\\#0134a", max_size=20))
def test_unescape_undoes_escape(text: str) -> None:
    escaped = fstab.escape(text)
    assert fstab.unescape(escaped) == text
    assert not {*escaped} & {*" \t\n"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\\040b", "a b"), ("\\134", "\\"), ("\\x", "\\x"), ("\\04", "\\04"), ("\\", "\\")],
)
def test_unescape(text: str, expected: str) -> None:
    assert fstab.unescape(text) == expected


@given(text=st.text(max_size=20) | st.text("\\0189 ", max_size=12))
def test_unescape_never_raises(text: str) -> None:
    assert isinstance(fstab.unescape(text), str)
