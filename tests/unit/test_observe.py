"""What the machine and its image look like: a udev database, mountinfo, superblocks, layouts, as files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import observe
from immucore.devices import Device, Devices
from immucore.errors import LayoutError, MountError
from immucore.image import Setting


class Machine:
    """A /sys/class/block, a /run/udev with a udevd, and the variables of the firmware."""

    def __init__(self, root: Path) -> None:
        self.sysfs, self.run, self._real = root / "class/block", root / "udev", root / "devices"
        self.efivars = root / "LoaderDevicePartUUID"
        for directory in (self.sysfs, self.run / "data", self._real):
            directory.mkdir(parents=True)
        (self.run / "control").touch()

    def add(
        self, place: str, number: str, sectors: int, udev: str | None, *, removable: bool = False
    ) -> Path:
        """Add the block device `place` (vda, or vda/vda1) as the kernel and udev show it."""
        real = self._real / place
        real.mkdir(parents=True)
        (real / "dev").write_text(f"{number}\n")
        (real / "size").write_text(f"{sectors}\n")
        (real / "removable").write_text(f"{removable:d}\n")
        (self.sysfs / real.name).symlink_to(real)
        if udev is not None:
            (self.run / f"data/b{number}").write_text(udev)
        return real

    def stack(self, name: str, number: str, udev: str | None, *slaves: str) -> None:
        """Add a mapping or an array that is made of others."""
        real = self.add(f"virtual/block/{name}", number, 2, udev)
        (real / "slaves").mkdir()
        for slave in slaves:
            (real / "slaves" / slave).symlink_to(self.sysfs / slave)

    def look(self, boot: str = "auto") -> Devices:
        return observe.devices(
            boot, sysfs=str(self.sysfs), udev=str(self.run / "data"), efivars=str(self.efivars)
        )

    def devices(self) -> list[Device]:
        return [*self.look().all]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


PARTITION = """\
S:disk/by-label/COS_STATE
W:12
I:1409321
E:ID_FS_TYPE=ext4
E:ID_FS_LABEL=COS_STATE
E:ID_FS_LABEL_ENC=COS_STATE
E:ID_FS_UUID=8d0e0c29-9a4e-4b0e-9c0e-0a3b1c1e5a11
E:ID_FS_UUID_ENC=8d0e0c29-9a4e-4b0e-9c0e-0a3b1c1e5a11
E:ID_PART_ENTRY_NAME=state
E:ID_PART_ENTRY_UUID=5b3c7a55-7f3a-4f8e-8a15-0f9c2d4b6e77
E:PARTN=4
G:systemd
"""


def test_a_disk_and_a_partition(machine: Machine) -> None:
    machine.add("vda", "254:0", 16777216, "E:ID_PART_TABLE_TYPE=gpt\n")
    machine.add("vda/vda4", "254:4", 2048, PARTITION)
    assert machine.devices() == [
        Device(path="/dev/vda", disks=("/dev/vda",), size_bytes=8 << 30),
        Device(
            path="/dev/vda4",
            links=("/dev/disk/by-label/COS_STATE",),
            fstype="ext4",
            label="COS_STATE",
            uuid="8d0e0c29-9a4e-4b0e-9c0e-0a3b1c1e5a11",
            partlabel="state",
            partuuid="5b3c7a55-7f3a-4f8e-8a15-0f9c2d4b6e77",
            disks=("/dev/vda",),
            parent="/dev/vda",
            size_bytes=1 << 20,
        ),
    ]


def test_what_a_partition_has_from_its_disk(machine: Machine) -> None:
    machine.add(
        "pci/nvme0/nvme0n1", "259:0", 4, "E:ID_SERIAL=S1\nE:ID_MODEL=SSD\nE:ID_BUS=nvme\n", removable=True
    )
    machine.add("pci/nvme0/nvme0n1/nvme0n1p1", "259:1", 2, "E:ID_FS_TYPE=ext4\n")
    disk, part = machine.devices()
    assert (disk.disks, disk.parent) == (("/dev/nvme0n1",), "")
    assert (part.path, part.disks, part.parent) == ("/dev/nvme0n1p1", ("/dev/nvme0n1",), "/dev/nvme0n1")
    for device in (disk, part):
        assert (device.serial, device.model, device.bus) == ("S1", "SSD", "nvme")
        assert device.removable


def test_a_disk_on_usb_is_removable_whatever_it_says_of_itself(machine: Machine) -> None:
    machine.add("pci/usb2/2-1/2-1:1.0/host6/block/sda", "8:0", 2, "E:ID_BUS=ata\n")
    machine.add("pci/ata1/host0/block/sdb", "8:16", 2, "E:ID_BUS=ata\n")
    assert [device.removable for device in machine.devices()] == [True, False]


def test_what_udev_has_not_looked_at_is_not_known_yet(machine: Machine) -> None:
    machine.add("sda", "8:0", 2, None)
    machine.add("sda/sda1", "8:1", 2, None)
    machine.add("sdb", "8:16", 2, "")
    machine.add("sr0", "11:0", 0, None)  # without a medium
    machine.add("virtual/block/loop7", "7:7", 2, None)  # an image of somebody's
    look = machine.look()
    assert look.all == ()
    assert [(each.path, each.disks) for each in look.unknown] == [
        ("/dev/sda", ("/dev/sda",)),
        ("/dev/sda1", ("/dev/sda",)),
        ("/dev/sdb", ("/dev/sdb",)),
    ]


def test_a_stack(machine: Machine) -> None:
    """A volume on an array of two disks lies on both, and neither it nor its members are free."""
    machine.add("pci/vda", "254:0", 8, "E:ID_SERIAL=A\n")
    machine.add("pci/vda/vda1", "254:1", 8, "E:ID_FS_TYPE=linux_raid_member\n")
    machine.add("pci/usb1/sda", "8:0", 8, "E:ID_SERIAL=B\n")
    machine.add("pci/usb1/sda/sda1", "8:1", 8, "E:ID_FS_TYPE=linux_raid_member\n")
    machine.stack("md127", "9:127", "E:ID_FS_TYPE=LVM2_member\n", "vda1", "sda1")
    machine.stack("dm-0", "253:0", "E:DM_NAME=vg-data\nE:ID_FS_LABEL_ENC=DATA\n", "md127")
    machine.stack("dm-1", "253:1", None, "md127")
    devices = {device.path: device for device in machine.devices()}
    assert devices["/dev/vda1"].holders == devices["/dev/sda1"].holders == ("/dev/md127",)
    assert devices["/dev/md127"].holders == ("/dev/mapper/vg-data", "/dev/dm-1")
    volume = devices["/dev/mapper/vg-data"]
    assert (volume.disks, volume.holders, volume.parent) == (("/dev/sda", "/dev/vda"), (), "")
    assert (volume.removable, volume.serial) == (True, "")
    assert [each.disks for each in machine.look().unknown] == [("/dev/sda", "/dev/vda")]


def test_paths_of_a_multipath_device(machine: Machine) -> None:
    machine.add("pci/sda", "8:0", 8, "E:DM_MULTIPATH_DEVICE_PATH=1\nE:ID_FS_TYPE=mpath_member\n")
    machine.add("pci/sdb", "8:16", 8, "E:DM_MULTIPATH_DEVICE_PATH=0\n")
    assert [device.multipath for device in machine.devices()] == [True, False]


def test_a_path_that_the_kernels_own_multipath_hides_is_no_device(machine: Machine) -> None:
    (machine.add("pci/nvme0/nvme0c0n1", "0:0", 8, None) / "dev").unlink()
    assert machine.look() == Devices()


@pytest.mark.parametrize(
    ("variable", "boot"),
    [
        (b"\6\0\0\0" + "5B3C7A55-7F3A-4F8E\0".encode("utf-16-le"), "PARTUUID=5b3c7a55-7f3a-4f8e"),
        (b"\6\0\0\0" + "5b3c7a55-7f3a-4f8e".encode("utf-16-le"), "PARTUUID=5b3c7a55-7f3a-4f8e"),
        (b"\6\0\0\0" + "no GUID".encode("utf-16-le"), ""),
        (b"\6\0\0\0", ""),
        (b"", ""),
        (b"\xff" * 99, ""),
        (None, ""),
    ],
)
def test_what_the_boot_loader_says(machine: Machine, variable: bytes | None, boot: str) -> None:
    if variable is not None:
        machine.efivars.write_bytes(variable)
    look = machine.look()
    assert (look.boot, look.boot_origin) == (boot, "LoaderDevicePartUUID" if boot else "")
    named = machine.look("/dev/sda")
    assert (named.boot, named.boot_origin) == ("/dev/sda", "rd.cos.bootdisk")


def test_firmware_that_fails_is_no_reason_not_to_boot(machine: Machine) -> None:
    machine.efivars.mkdir()
    assert machine.look() == Devices()


def test_a_mapping_goes_by_its_name(machine: Machine) -> None:
    machine.add("dm-0", "253:0", 2, "E:DM_NAME=vg-data\nE:ID_FS_TYPE=xfs\nE:ID_FS_LABEL_ENC=DATA\n")
    assert machine.devices() == [
        Device(
            path="/dev/mapper/vg-data",
            fstype="xfs",
            label="DATA",
            disks=("/dev/mapper/vg-data",),
            size_bytes=1024,
        )
    ]


def test_a_slash_in_a_name_is_an_exclamation_mark_in_sysfs(machine: Machine) -> None:
    machine.add("cciss!c0d0", "104:0", 2, "E:ID_PART_TABLE_TYPE=dos\n")
    assert [(each.path, each.disks) for each in machine.devices()] == [
        ("/dev/cciss/c0d0", ("/dev/cciss/c0d0",))
    ]


def test_labels_are_decoded(machine: Machine) -> None:
    machine.add(
        "vdb",
        "254:16",
        2,
        "E:ID_FS_LABEL=MY_DATA\nE:ID_FS_LABEL_ENC=MY\\x20DATA\nE:ID_PART_ENTRY_NAME=my\\x20part\nE:X\nE:Y=a=b\n",
    )
    (device,) = machine.devices()
    assert (device.label, device.partlabel) == ("MY DATA", "my part")


def test_a_device_that_goes_while_one_looks(machine: Machine) -> None:
    """Sysfs lists it, and nothing is behind it any more: no reason to fail a boot that does not want it."""
    (machine.sysfs / "sdc").symlink_to("/nowhere")
    machine.add("vda", "254:0", 2, "E:ID_FS_TYPE=ext4\n")
    assert [each.path for each in machine.devices()] == ["/dev/vda"]


@pytest.mark.parametrize(
    ("encoded", "text"),
    [
        ("", ""),
        ("plain", "plain"),
        ("a\\x20b", "a b"),
        ("\\xc3\\xa4", "ä"),
        ("\\x2fdev", "/dev"),
        ("a\\x5cx20", "a\\x20"),
        ("\\xzz", "\\xzz"),
        ("\\xff", "\udcff"),
        ("\\x", "\\x"),
        ("\\x2", "\\x2"),
        ("\\x  a", "\\x  a"),
    ],
)
def test_decode(encoded: str, text: str) -> None:
    assert observe.decode(encoded) == text


@given(text=st.text(max_size=12))
def test_decode_undoes_udevs_encoding(text: str) -> None:
    """Encoded as systemd does (encode_devnode_name()): ASCII that is not safe becomes hexadecimal."""
    safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789#+-.:=@_"
    encoded = "".join(c if c in safe or ord(c) > 127 else f"\\x{ord(c):02x}" for c in text)
    assert observe.decode(encoded) == text


@given(encoded=st.text("\\x0aG ", max_size=12))
def test_decode_never_raises(encoded: str) -> None:
    assert isinstance(observe.decode(encoded), str)


MOUNTINFO = r"""
22 27 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
28 1 7:0 / /sysroot ro,relatime shared:1 - ext4 /dev/loop0 ro
36 28 254:5 /.state/my\040home.bind /sysroot/my\040home rw,relatime shared:1 master:2 - ext4 /dev/vda5 rw
37 28 0:40 / /sysroot/a\134b\043c\011d rw - overlay over\040lay rw,lowerdir=/x,upperdir=/y
a line that is none
"""


def test_a_mount_point_may_have_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    """The kernel escapes blank, tab, newline and backslash; str.splitlines() knows ten other characters."""
    names = ("/a\u2028b", "/a\x0bb", "/a\rb", "/a\x85b", "/a\x1cb")
    lines = (f"1 2 0:1 / {name} rw - tmpfs tmpfs rw\n" for name in names)
    (tmp_path / "mountinfo").write_bytes("".join(lines).encode())
    assert [each.target for each in observe.mounts(str(tmp_path / "mountinfo"))] == [*names]


def test_mounts(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    sys, root, bind, overlay = observe.mounts(str(tmp_path / "mountinfo"))
    assert (sys.target, sys.fstype, sys.device) == ("/sys", "sysfs", "0:20")
    assert (root.target, root.source, root.options, root.superblock_options) == (
        "/sysroot",
        "/dev/loop0",
        "ro,relatime",
        "ro",
    )
    assert (bind.target, bind.root, bind.device) == ("/sysroot/my home", "/.state/my home.bind", "254:5")
    assert (overlay.target, overlay.source) == ("/sysroot/a\\b#c\td", "over lay")
    assert overlay.superblock_options == "rw,lowerdir=/x,upperdir=/y"


def test_this_machines_mounts() -> None:
    assert "/" in [each.target for each in observe.mounts()]


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory to make images of."""
    root = tmp_path_factory.mktemp("tree")
    (root / "etc").mkdir()
    (root / "etc/os-release").write_text("ID=test\n")
    return root


def test_text(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert observe.text(str(file)) == ""
    assert observe.text(str(file), missing="none") == "none"
    file.write_bytes(b"a\xff\r\n")
    assert observe.text(str(file)) == "a\udcff\r\n"
    file.write_bytes(b"x" * (observe.MAX_FILE_BYTES + 5))
    assert observe.text(str(file)) == "x" * observe.MAX_FILE_BYTES
    with pytest.raises(IsADirectoryError) as failure:
        observe.text(str(tmp_path))
    assert failure.value.filename == str(tmp_path)


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def look(root: Path, *, lenient: bool = False) -> observe.Image:
    return observe.image(str(root), str(root / "run/cos"), lenient=lenient)


def test_an_image_that_says_nothing(tmp_path: Path) -> None:
    assert look(tmp_path) == observe.Image()


def test_the_layouts_in_the_order_in_which_they_override(tmp_path: Path) -> None:
    write(tmp_path / "etc/cos/cos-layout.env", "A=image\nB=image\n")
    write(tmp_path / "oem/cos-layout.env", "B=oem\n")
    write(tmp_path / "run/cos/extra-layout.env", "C=extra\n")
    write(tmp_path / "run/cos/custom-layout.env", "D=custom\n")
    assert look(tmp_path).settings == (
        Setting(name="A", value="image", origin="/etc/cos/cos-layout.env"),
        Setting(name="B", value="image", origin="/etc/cos/cos-layout.env"),
        Setting(name="B", value="oem", origin="/oem/cos-layout.env"),
        Setting(name="C", value="extra", origin="/run/cos/extra-layout.env", adds=True),
        Setting(name="D", value="custom", origin="/run/cos/custom-layout.env", adds=True),
    )


@pytest.mark.parametrize("content", ["A=run\n", ""])
def test_the_layout_of_run_replaces_the_images(tmp_path: Path, content: str) -> None:
    write(tmp_path / "run/cos/cos-layout.env", content)
    write(tmp_path / "etc/cos/cos-layout.env", "A=image\nB=image\n")
    assert [each.value for each in look(tmp_path).settings] == (["run"] if content else [])


def test_a_layout_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "etc/cos/cos-layout.env", "A=1\n")
    write(tmp_path / "oem/cos-layout.env", "nonsense\n")
    with pytest.raises(LayoutError, match=r"cannot read line 1 of /oem/cos-layout\.env"):
        look(tmp_path)


def test_recovery_leaves_a_layout_out_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "etc/cos/cos-layout.env", "A=1\n")
    write(tmp_path / "oem/cos-layout.env", "nonsense\n")
    image = look(tmp_path, lenient=True)
    assert [each.name for each in image.settings] == ["A"]
    assert image.warnings == (
        "cannot read line 1 of /oem/cos-layout.env: 'nonsense' is not an assignment;"
        " this boot goes on without it",
    )


@pytest.mark.parametrize("name", ["etc/cos/cos-layout.env", "oem/cos-layout.env", "etc/fstab"])
def test_half_of_a_file_is_not_taken_for_it(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "# much\n" * (observe.MAX_FILE_BYTES // 7 + 1))
    with pytest.raises(MountError) as caught:
        look(tmp_path)
    assert caught.value.message == f"cannot read '/{name}': it is larger than 1024 KiB"
    assert caught.value.hint == f"correct or remove /{name}, or boot another slot"


def test_symlinks_stay_inside_the_image(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "usr/share/layout.env", "A=inside\n")
    write(tmp_path / "outside.env", "A=outside\n")
    (root / "etc/cos").mkdir(parents=True)
    (root / "oem").mkdir()
    (root / "etc/cos/cos-layout.env").symlink_to("/usr/share/layout.env")
    (root / "oem/cos-layout.env").symlink_to("../../outside.env")
    assert [each.value for each in look(root).settings] == ["inside"]


def test_a_symlink_to_nowhere_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fstab").symlink_to("/nowhere")
    assert look(tmp_path).fstab == ""


@pytest.mark.parametrize("name", ["/etc/cos/cos-layout.env", "/oem/cos-layout.env"])
def test_a_layout_that_the_disk_does_not_give(tmp_path: Path, name: str) -> None:
    """A symlink to itself stands for every error of the kernel's."""
    (tmp_path / name[1:]).parent.mkdir(parents=True)
    (tmp_path / name[1:]).symlink_to(Path(name).name)
    with pytest.raises(MountError) as caught:
        look(tmp_path)
    assert caught.value.message == f"cannot read '{name}': Too many levels of symbolic links"
    assert caught.value.hint
    assert look(tmp_path, lenient=True).warnings == (
        f"{caught.value.message}; this boot goes on without it",
    )


def test_a_fifo_does_not_hold_up_the_boot(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/fstab")
    assert look(tmp_path).fstab == ""


def test_the_images_fstab(tmp_path: Path) -> None:
    write(tmp_path / "etc/fstab", "tmpfs /x tmpfs defaults 0 0\n")
    assert look(tmp_path).fstab == "tmpfs /x tmpfs defaults 0 0\n"


@pytest.mark.parametrize("where", ["etc", "usr/lib", "lib"])
def test_the_image_mounts_tmp(tmp_path: Path, where: str) -> None:
    wants = tmp_path / where / "systemd/system/local-fs.target.wants"
    wants.mkdir(parents=True)
    assert not look(tmp_path).mounts_tmp
    (wants / "tmp.mount").symlink_to("/usr/lib/systemd/system/tmp.mount")
    assert look(tmp_path).mounts_tmp


@pytest.mark.parametrize(
    ("link", "target", "path", "real"),
    [
        ("home", "/var/home", "/home", "/var/home"),
        ("home", "var/home", "/home", "/var/home"),
        ("home", "var/home", "/home/a/b", "/var/home/a/b"),
        ("var/run", "../run", "/var/run/x", "/run/x"),
        ("home", "../../../../var", "/home", "/var"),
        ("home", "/", "/home", "/"),
        ("home", "/nowhere", "/home/x", "/nowhere/x"),
    ],
)
def test_links(tmp_path: Path, link: str, target: str, path: str, real: str) -> None:
    (tmp_path / "var/home").mkdir(parents=True)
    (tmp_path / link).symlink_to(target)
    assert observe.links(str(tmp_path), [path, "/var/home", "/var/lib/x"]) == ((path, real),)


def test_a_link_to_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("c/d")
    (tmp_path / "c").symlink_to("/e")
    assert observe.links(str(tmp_path), ["/a"]) == (("/a", "/e/d"),)


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    (tmp_path / "b").symlink_to("/c")
    assert observe.links(str(tmp_path), ["/a", "/b"]) == (("/b", "/c"),)


def test_links_of_a_path_longer_than_paths_can_be(tmp_path: Path) -> None:
    """Its own mount will fail; looking at it is no endless recursion, and not the end of the others."""
    (tmp_path / "b").symlink_to("/c")
    deep, long = "/a" * 5000, "/" + "a" * 300
    assert observe.links(str(tmp_path), [deep, long, "/b"]) == (("/b", "/c"),)
