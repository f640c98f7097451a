"""Builds the test derivatives: from Debian packages to a kernel, initramfs images and slot images.

Every product lies under build/vm/, named after the hash of what it was made from, so that a second call
costs nothing and a changed input rebuilds what depends on it and no more:

    base      mmdebstrap: systemd, udev, kernel, dracut                    (a minute; half with cached .debs)
    root      base + `make install` + what only a test machine has          (a second)
    initramfs dracut in a chroot of root; variants systemd, shell, plain    (seconds each)
    images    active.img, passive.img, recovery.img, recovery.squashfs      (seconds)
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
HERE = PROJECT / "vm-tests"
CACHE = PROJECT / "build" / "vm"
UNUSED_SECONDS = 3600  # older versions of a product are removed when nobody used them for so long

MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES = ("bookworm", "trixie")
PACKAGES = """
systemd systemd-sysv udev dracut kmod e2fsprogs util-linux mount login passwd attr dmsetup
"""
# A derivative of another flavour is <suite>-<flavour>: `stacks` has what assembles LUKS, LVM and md, a
# kernel that knows USB, and a policy of SELinux', whose labels its images have.
FLAVOURS = {
    "": "linux-image-cloud-amd64",
    "stacks": (
        "linux-image-amd64 cryptsetup-bin lvm2 mdadm libtss2-esys-3.0.2-0 libtss2-rc0 libtss2-tcti-device0"
        " selinux-policy-default policycoreutils selinux-utils"
    ),
}
# Never unpacked: nothing in a boot reads them, and dpkg and mke2fs take their time over them.
EXCLUDED = (
    "/usr/share/doc/* /usr/share/man/* /usr/share/info/* /usr/share/locale/* /usr/share/lintian/*"
    " /usr/share/bash-completion/* /usr/share/zsh/* /lib/udev/hwdb.d/* /usr/lib/udev/hwdb.d/*"
)
# Nor these drivers, nine tenths of the kernel that is not made for clouds.
EXCLUDED_DRIVERS = " ".join(
    f"/lib/modules/*/kernel/{directory}/*"
    for directory in (
        *("sound", "net", "drivers/accel", "drivers/gpu", "drivers/iio", "drivers/infiniband"),
        *("drivers/isdn", "drivers/media", "drivers/net", "drivers/staging", "drivers/video"),
    )
)


class ToolMissingError(Exception):
    """A program that the harness calls is not installed; the text names its package."""


def require_tools() -> None:
    """Raise with the command to type when a program of packages.txt is missing."""
    missing = []
    for line in (HERE / "packages.txt").read_text().splitlines():
        package, _, tools = line.partition(":")
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        if not all(
            Path(tool).exists() if "/" in tool else shutil.which(tool, path=path) for tool in tools.split()
        ):
            missing.append(package)
    if missing:
        raise ToolMissingError(f"the VM tests lack programs: apt-get install {' '.join(missing)}")


def run(*command: str | Path, input: str = "", env: Mapping[str, str] | None = None) -> str:
    """Run a program and return its output; a failure raises with everything that it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        input=input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


@contextlib.contextmanager
def step(what: str, *, is_long: bool = False) -> Iterator[None]:
    """Show one line for a step, with its seconds; for a long one another when it starts."""
    if is_long:
        print(f"vm-tests: {what} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    yield
    print(f"vm-tests: {what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def digest(*parts: str | bytes | Path) -> str:
    """Return the hash of texts and of the content, mode, owner and links of files and trees."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            paths = [part, *sorted(part.rglob("*"))] if part.is_dir() and not part.is_symlink() else [part]
            for path in paths:
                info = path.lstat()
                state.update(
                    f"\0{path.relative_to(part)}\0{info.st_mode:o} {info.st_uid} {info.st_gid}".encode()
                )
                if stat.S_ISLNK(info.st_mode):
                    state.update(os.readlink(path).encode())
                elif stat.S_ISREG(info.st_mode):
                    state.update(path.read_bytes())
        else:
            state.update(b"\1" + (part.encode() if isinstance(part, str) else part))
    return state.hexdigest()[:16]


def cached(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return build/vm/<name>-<key>, a file or a tree that `make` writes when it is not there yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}-{key}"
    partial = CACHE / f"{name}.partial"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may want the same thing
        if not path.exists():
            remove(partial)
            with step(name, is_long=name.endswith("-base")):
                make(partial)
            partial.rename(path)
        os.utime(path)
        for other in CACHE.glob(f"{name}-????????????????"):
            if time.time() - other.stat().st_mtime > UNUSED_SECONDS:
                remove(other)
    return path


def remove(path: Path) -> None:
    """Remove a file or a tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def base(suite: str) -> Path:
    """Return a minimal Debian root with systemd, kernel and dracut, as the packages leave it."""
    release, _, flavour = suite.partition("-")
    packages = f"{PACKAGES} {FLAVOURS[flavour]}".split()
    excluded = f"{EXCLUDED} {EXCLUDED_DRIVERS if flavour else ''}".split()
    debs = PROJECT / "build" / "debs" / release
    command = [
        "mmdebstrap",
        "--mode=root",
        "--variant=essential",
        f"--include={','.join(packages)}",
        f"--keyring={KEYRING}",
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in excluded),
        '--setup-hook=mkdir -p "$1/var/cache/apt/archives"',
        f"--setup-hook=sync-in {debs} /var/cache/apt/archives",
        f"--customize-hook=sync-out /var/cache/apt/archives {debs}",
        "--skip=download/empty,essential/unlink",
        release,
    ]

    def make(target: Path) -> None:
        require_root()
        debs.mkdir(parents=True, exist_ok=True)
        # INITRD=No: the kernel package would build an initrd that nobody boots (12 s).
        run(*command, target, MIRROR, env={**os.environ, "INITRD": "No"})

    return cached(f"{suite}-base", digest(*command), make)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a tree with everything that belongs to it, extended attributes and hard links too."""
    run("cp", "-a", "--reflink=auto", source, target)


def require_root() -> None:
    """Raise unless run by root: a root tree has owners and device nodes."""
    if os.geteuid() != 0:
        raise PermissionError("vm-tests build root trees with mmdebstrap and chroot: run them as root")


@functools.cache
def installation() -> Path:
    """Return what `make install` puts below its DESTDIR: the product that all this is made to test."""
    stage = CACHE / f"install.{os.getpid()}"
    remove(stage)
    stage.mkdir(parents=True)
    try:
        run("make", "-C", PROJECT, "install", f"DESTDIR={stage}")
        return cached("install", digest(stage), lambda target: copy_tree(stage, target))
    finally:
        remove(stage)


OS_RELEASE = """\
PRETTY_NAME="immucore test machine (Debian {suite})"
NAME="immucore test machine"
ID=immucore-test
ID_LIKE=debian
VERSION_CODENAME={suite}
"""
# What Debian starts at every boot and no test looks at: some needs a bus or a network, all costs time.
UNWANTED = """
systemd-logind.service getty@tty1.service getty-static.service e2scrub_reap.service remote-fs.target
systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-pstore.service timers.target
modprobe@efi_pstore.service sys-kernel-debug.mount sys-kernel-tracing.mount
dev-hugepages.mount dev-mqueue.mount proc-sys-fs-binfmt_misc.automount systemd-binfmt.service
systemd-hwdb-update.service modprobe@drm.service modprobe@configfs.service modprobe@dm_mod.service
modprobe@fuse.service modprobe@loop.service sys-kernel-config.mount sys-fs-fuse-connections.mount
"""
GENERATORS = ("systemd-fstab-generator", "systemd-getty-generator")  # the others are masked: 0.1 s each


def root(suite: str) -> Path:
    """Return base with our product installed and the files that only a test machine has."""
    source = base(suite)

    def make(target: Path) -> None:
        copy_tree(source, target)
        run("cp", "-a", "--no-preserve=ownership", f"{installation()}/.", target)
        run("cp", "-a", "--no-preserve=ownership", f"{HERE}/guest/system/.", target)
        (target / "usr/lib/vm-test").mkdir()
        shutil.copy(HERE / "guest/report.sh", target / "usr/lib/vm-test")

        for directory in ("oem", "system", "usr/local"):
            (target / directory).mkdir(exist_ok=True)
        (target / "usr/lib/os-release").write_text(OS_RELEASE.format(suite=suite))
        (target / "etc/hostname").write_text("immucore-test\n")
        (target / "etc/fstab").write_text("")
        # Empty, not missing and not "uninitialized": a first boot asks questions and waits for a key.
        (target / "etc/machine-id").write_text("")
        run("chroot", target, "passwd", "--delete", "root")
        run("chroot", target, "systemctl", "mask", *UNWANTED.split())
        run("chroot", target, "systemctl", "set-default", "multi-user.target")
        generators = target / "etc/systemd/system-generators"
        generators.mkdir()
        for generator in (target / "usr/lib/systemd/system-generators").iterdir():
            if generator.name not in GENERATORS:
                (generators / generator.name).symlink_to("/dev/null")
        # What an ephemeral overlay must not change. No user.* on the directory itself: before Linux 6.6
        # tmpfs, where the overlay's upper is, has no such attributes.
        os.chown(target / "srv", 1001, 0)  # systemd-tmpfiles gives /root to root
        (target / "root").chmod(0o700)
        os.setxattr(target / "root", "trusted.immucore", b"of the directory")
        owned = target / "root/owned"
        owned.write_text("by somebody\n")
        os.setxattr(owned, "user.immucore", b"of the file")
        os.chown(owned, 1000, 1000)
        owned.chmod(0o640)
        # Newer than /usr, or systemd brings /etc and /var up to date at every boot.
        for directory in ("etc", "var"):
            (target / directory / ".updated").touch()

    return cached(f"{suite}-root", digest(source.name, installation().name, HERE / "guest", CODE), make)


# A changed builder is a changed product.
CODE = digest(Path(__file__))

# What the machine has; the rest our module's installkernel must ask for.
DRIVERS = "virtio_pci virtio_blk virtio_rng"
STACKS_DRIVERS = "xhci_pci usb_storage sd_mod"
VARIANTS = ("systemd", "shell", "plain")


def kernel(suite: str) -> Path:
    """Return the kernel of a derivative."""
    return next(base(suite).glob("boot/vmlinuz-*"))


def initramfs(suite: str, variant: str = "systemd") -> Path:
    """Return an uncompressed initramfs as a derivative's dracut makes it, and nothing of the tests in it.

    `systemd` is the usual one, `shell` has no systemd, `plain` has systemd and not our module.
    """
    source = root(suite)
    version = kernel(suite).name.removeprefix("vmlinuz-")
    with_systemd = sorted(
        module.name[2:] for module in source.glob("usr/lib/dracut/modules.d/*") if "systemd" in module.name
    )
    selection = {
        "systemd": ["--add", "immucore"],
        "shell": ["--add", "immucore", "--omit", " ".join(with_systemd)],
        "plain": ["--omit", "immucore"],
    }[variant]
    drivers = f"{DRIVERS} {STACKS_DRIVERS}" if suite.endswith("-stacks") else DRIVERS
    dracut = ["dracut", "--force", "--no-hostonly", "--no-compress", "--drivers", drivers, *selection]
    dracut += ["--kver", version, "/mnt/initramfs"]

    def make(target: Path) -> None:
        require_root()
        target.mkdir()
        log = run("unshare", "--mount", "sh", "-ec", CHROOT, "chroot", source, target, *dracut)
        (target / "dracut.log").write_text(log)

    return cached(f"{suite}-initramfs-{variant}", digest(source.name, *dracut, CHROOT), make) / "initramfs"


# chroot ROOT OUTPUT COMMAND...: run a command in a root with kernel file systems and OUTPUT at /mnt.
CHROOT = """
mount --make-rprivate /
root=$1 output=$2
shift 2
mount --bind "$root" "$root"
for kernel in proc sys dev; do mount --rbind /$kernel "$root/$kernel"; done
for scratch in tmp var/tmp run; do mount -t tmpfs tmpfs "$root/$scratch"; done
mount --bind "$output" "$root/mnt"
exec chroot "$root" "$@"
"""


def unpacked(suite: str, variant: str = "systemd") -> Path:
    """Return the tree in an initramfs, to look at it and to run programs of it in a chroot."""
    source = initramfs(suite, variant)

    def make(target: Path) -> None:
        target.mkdir()
        run("sh", "-ec", 'cd "$1" && cpio -idm --quiet < "$2"', "sh", target, source)

    return cached(f"{suite}-unpacked-{variant}", digest(source.parent.name), make)


def reporting_initramfs(suite: str, variant: str = "systemd") -> Path:
    """Return an initramfs with an archive appended that makes a failed boot report and switch itself off.

    Its programs and libraries lie below /vm-test, so that they do not hide what the real initramfs lacks.
    """
    source, real = root(suite), initramfs(suite, variant)
    tools = ("tar", "sync", "findmnt", "losetup", "dmesg", "getfattr", "stat", "timeout")

    def make(target: Path) -> None:
        files = {"vm-test/report.sh": HERE / "guest/report.sh"}
        for path in (HERE / "guest/initramfs").rglob("*"):
            if not path.is_dir() or path.is_symlink():
                files[str(path.relative_to(HERE / "guest/initramfs"))] = path
        for tool in tools:
            program = Path(run("chroot", source, "sh", "-c", f"command -v {tool}").strip())
            files[f"vm-test/bin/{tool}"] = source / program.relative_to("/")
            for word in run("chroot", source, "ldd", program).split():
                if word.startswith("/") and "ld-linux" not in word:
                    library = run("chroot", source, "realpath", word).strip()
                    files[f"vm-test/lib/{Path(word).name}"] = source / library[1:]
        run("cp", "--sparse=never", "--reflink=auto", real, target)
        with target.open("ab") as stream:
            stream.write(cpio(files))

    key = digest(real.parent.name, HERE / "guest", CODE)
    return cached(f"{suite}-reporting-initramfs-{variant}", key, make)


def cpio(files: Mapping[str, Path | str | bytes]) -> bytes:
    """Return a newc archive; appended to an initramfs the kernel unpacks it over that.

    Directories are made as needed, but none of those that an initramfs may have as links (/lib, /bin): the
    kernel would replace the link.
    """
    entries: dict[str, tuple[int, bytes]] = {}
    for name, content in files.items():
        for parent in reversed(Path(name).parents[:-1]):
            if parent.parts[0] not in ("lib", "bin", "sbin"):
                entries[str(parent)] = (stat.S_IFDIR | 0o755, b"")
        if isinstance(content, Path) and content.is_symlink():
            entries[name] = (stat.S_IFLNK | 0o777, os.readlink(content).encode())
        elif isinstance(content, Path):
            entries[name] = (content.stat().st_mode, content.read_bytes())
        else:
            entries[name] = (stat.S_IFREG | 0o755, content.encode() if isinstance(content, str) else content)
    archive = bytearray()
    for number, (name, (mode, data)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))], 721):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        archive += b"\0" * (-len(archive) % 4) + data
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive) + b"\0" * (-len(archive) % 512)


# Not in the images: packaging, perl, tables nobody reads at boot. It makes them three times smaller.
STRIPPED = """
boot/* var/lib/apt/* var/cache/* var/lib/dpkg/info/* var/lib/dpkg/*-old var/log/* usr/share/doc usr/share/man
usr/share/info usr/share/locale usr/share/perl* usr/share/zoneinfo usr/share/common-licenses
usr/bin/*perl* usr/lib/*/perl* usr/lib/*/gconv usr/lib/*/libperl* usr/share/i18n usr/share/bug
"""
# The modules that images keep: what a test may boot from or mount. The others udev would load for nothing.
MODULES = """
fs lib crypto drivers/virtio drivers/block drivers/md drivers/nvme drivers/char/hw_random drivers/watchdog
"""
SLOTS = ("active", "passive", "recovery")
LABELS = {"active": "COS_ACTIVE", "passive": "COS_PASSIVE", "recovery": "COS_SYSTEM"}
SLOT_FILE = "etc/immucore-slot"  # tells a booted system which image it came from
# What the oldest mount helpers and boot loaders of the field understand.
EXT4 = ("-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file", "-b", "4096")


def image_tree(suite: str) -> Path:
    """Return the tree that the images hold: root without what no boot reads."""
    source = root(suite)

    def make(target: Path) -> None:
        copy_tree(source, target)
        for pattern in STRIPPED.split():
            for path in target.glob(pattern):
                remove(path)
        modules = next((target / "usr/lib/modules").iterdir())
        kept = tuple(f"{modules}/kernel/{directory}/" for directory in MODULES.split())
        for path in modules.rglob("*.ko*"):
            if not str(path).startswith(kept):
                path.unlink()
        run("chroot", target, "depmod", modules.name)
        (target / SLOT_FILE).write_text("active")
        contexts = target / "etc/selinux/default/contexts/files/file_contexts"
        if contexts.exists():
            (target / "etc/selinux/config").write_text("SELINUX=permissive\nSELINUXTYPE=default\n")
            script = 'mount --bind /proc "$1/proc"; exec chroot "$1" setfiles -F -e /proc "/$2" /'
            run("unshare", "--mount", "sh", "-ec", script, "sh", target, contexts.relative_to(target))

    return cached(f"{suite}-tree", digest(source.name, STRIPPED, MODULES), make)


def images(suite: str) -> dict[str, Path]:
    """Return active.img, passive.img, recovery.img and recovery.squashfs, by their names."""
    source = image_tree(suite)

    def make(target: Path) -> None:
        target.mkdir()
        mebibytes = (
            int(run("du", "-sm", source).split()[0]) * 5 // 4 + 24
        )  # the image is read-only: little to spare
        active = target / "active.img"
        run("mke2fs", "-q", *EXT4, "-m", "0", "-L", LABELS["active"], "-d", source, active, f"{mebibytes}M")
        for slot in ("passive", "recovery"):
            image = target / f"{slot}.img"
            run("cp", "--sparse=always", active, image)
            write_file(image, SLOT_FILE, slot)
            run("tune2fs", "-L", LABELS[slot], "-U", "random", image)
        squashed = target / "tree"
        run("cp", "-al", source, squashed)
        (squashed / SLOT_FILE).unlink()  # a hard link: not to be written through
        (squashed / SLOT_FILE).write_text("recovery")
        fast = ("-noappend", "-quiet", "-no-progress", "-comp", "zstd", "-Xcompression-level", "3")
        run("mksquashfs", squashed, target / "recovery.squashfs", *fast)
        remove(squashed)

    directory = cached(f"{suite}-images", digest(source.name, *EXT4), make)
    return {path.name: path for path in sorted(directory.iterdir())}


# As a derivative brings them (cos-toolkit's convention); the words are those of machine.CMDLINE.
BOOTARGS = """\
set kernel=/boot/vmlinuz
set initramfs=/boot/initrd
set kernelcmd="console=ttyS0 norandmaps nokaslr cryptomgr.notests tsc=reliable quiet {more}"
"""


def bootable_tree(
    suite: str, name: str = "first", files: Mapping[str, str] | None = None, more: str = ""
) -> Path:
    """Return the images' tree with what a boot loader needs: kernel, initramfs, kernel arguments.

    `name` is in its /etc/immucore-slot; `files` are added to it, and `more` is for the kernel.
    """
    source, initrd = image_tree(suite), initramfs(suite)

    def make(target: Path) -> None:
        run("cp", "-al", source, target)
        (target / SLOT_FILE).unlink()  # a hard link: not to be written through
        contents = {SLOT_FILE: name, "etc/cos/bootargs.cfg": BOOTARGS.format(more=more), **(files or {})}
        for path, content in contents.items():
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content)
            place.chmod(0o755 if content.startswith("#!") else 0o644)
        run("cp", "--reflink=auto", kernel(suite), target / "boot/vmlinuz")
        run("zstd", "-q", "-10", initrd, "-o", target / "boot/initrd")  # GRUB takes its time over a big one

    key = digest(source.name, initrd.parent.name, name, repr(sorted((files or {}).items())), more, CODE)
    return cached(f"{suite}-bootable-{name}", key, make)


def write_file(image: Path, path: str, content: str | bytes, offset: int = 0) -> None:
    """Put a file into an ext4 file system that begins at `offset` of `image`, without mounting it."""
    path = path.strip("/")
    directories = [
        f"mkdir /{parent}" for parent in reversed(Path(path).parents[:-1])
    ]  # refused where they exist
    with tempfile.NamedTemporaryFile() as scratch:
        scratch.write(content.encode() if isinstance(content, str) else content)
        scratch.flush()
        os.fchmod(scratch.fileno(), 0o644)
        directory, name = f"/{Path(path).parent}", Path(path).name
        debugfs(
            image,
            *directories,
            f"cd {directory}",
            f"rm {name}",
            f"write {scratch.name} {name}",
            offset=offset,
        )


def debugfs(image: Path, *commands: str, offset: int = 0) -> str:
    """Run debugfs commands on an ext4 file system inside a file."""
    where = f"{image}?offset={offset}" if offset else str(image)
    text = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(
        ["debugfs", "-w", "-f", "-", where], input=text, capture_output=True, text=True, check=True
    )
    return done.stdout


def edited(image: Path, files: Mapping[str, str | bytes]) -> Path:
    """Return a copy of an ext4 image with some files of it replaced or added."""

    def make(target: Path) -> None:
        run("cp", "--sparse=always", "--reflink=auto", image, target)
        for path, content in files.items():
            write_file(target, path, content)

    return cached(f"edited-{image.name}", digest(str(image), repr(sorted(files.items()))), make)


def main() -> None:
    """Build everything of the suites on the command line."""
    for suite in sys.argv[1:] or SUITES:
        products = [
            kernel(suite),
            *(initramfs(suite, variant) for variant in VARIANTS),
            *images(suite).values(),
        ]
        for path in products:
            print(f"{path.stat().st_size / 2**20:8.1f} MiB  {path}")


if __name__ == "__main__":
    main()
