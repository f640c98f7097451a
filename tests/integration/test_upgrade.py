"""Upgrades of a machine on a real disk: from every slot, cut off anywhere, with everything that can fail."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import native
import psutil
import pytest
import upgrading
import yaml
from registry import Registry
from upgrading import Upgradable

from immucore import bootcount
from immucore.bootcount import BAD, GOOD, TRYING
from immucore.system import content

STEPS = 12
ARMING, COMMIT = 10, 11  # the numbers of these steps


def judged(image_id: str | None, state: str) -> bootcount.Count:
    """Give the count of an image that was judged."""
    assert image_id
    one = bootcount.armed(image_id)
    return {GOOD: bootcount.verdict(one), BAD: bootcount.condemned(one), TRYING: one}[state]


def settled(here: Upgradable, *beside: str) -> None:
    """Look whether work has left nothing behind, and everything as it was mounted."""
    for name in ("state", "recovery"):
        files = here.files(name)
        work = ("work.", "transition", "spare", "previous")
        assert not [each for each in files if each.startswith(work) and each not in beside], files
    table = [mount for mount in here.machine.mounts() if mount.device == _device(here, "state")]
    for mount in table:
        assert "ro" in mount.superblock_options, mount.target
    assert [each.target for each in here.machine.mounts() if each.target.startswith("/run/immucore")] == []


def _device(here: Upgradable, name: str) -> str:
    number = os.stat(here.machine.part(name)).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def bootable(here: Upgradable) -> dict[str, str | None]:
    """Look whether both slots are whole, and one of them is booted; give what is in them."""
    images = here.images()
    assert images["active"]
    assert images["passive"]
    counts = [bootcount.read(here.values(), str(images[slot])) for slot in bootcount.COUNTED]
    assert bootcount.order("", *counts)[0] != bootcount.RECOVERY
    return images


def test_from_active(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    before = here.images()
    here.set(judged(before["active"], GOOD), extra_cmdline="kept", tries_gone="2")
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    after = here.images()
    made = ran.result["image_id"]
    assert after == {"active": made, "passive": before["active"], "recovery": before["recovery"]}
    assert here.values() == {
        "extra_cmdline": "kept",
        f"tries_{before['active']}": "3",
        f"good_{before['active']}": "1",
        f"tries_{made}": "3",
    }
    settled(here)
    states = [here.state(name) for name in ("state", "recovery")]
    assert [each["state"] for each in states] == [states[0]["state"]] * 2
    entries = states[0]["state"]
    assert entries["active"] == {
        "image_id": made,
        "source": f"dir:{new}",
        "digest": content.digest(str(new)),
        "label": "COS_ACTIVE",
        "fs": "ext4",
        "date": entries["active"]["date"],
        "action": "upgrade",
    }
    assert entries["passive"]["source"] == "dir:/a"
    assert states[0]["recovery"]["recovery"]["source"] == "dir:/r"
    numbers = [line["step"].partition(":")[0] for line in ran.lines if line.get("state") == "started"]
    assert numbers == [f"step {number} of {STEPS}" for number in range(1, STEPS + 1)]
    here = boot("active")
    assert here.machine.path("/sysroot/etc/version").read_text() == "n"


@pytest.mark.parametrize(
    "case",  # booted, what active and passive were judged, which of them stays
    [
        ("passive", BAD, GOOD, "passive"),
        ("passive", GOOD, GOOD, "passive"),
        ("recovery", BAD, GOOD, "passive"),
        ("recovery", GOOD, BAD, "active"),
        ("active", TRYING, GOOD, "passive"),
        ("active", TRYING, TRYING, "active"),
    ],
)
def test_what_becomes_of_the_others(
    boot: upgrading.Boot, new: Path, case: tuple[str, str, str, str]
) -> None:
    slot, active, passive, keeps = case
    here = boot(slot)
    before = here.images()
    here.set(judged(before["active"], active), judged(before["passive"], passive), saved_entry=slot)
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    made = ran.result["image_id"]
    assert bootable(here) == {"active": made, "passive": before[keeps], "recovery": before["recovery"]}
    running_is_gone = slot == "active" != keeps
    settled(here, *(["previous.img"] if running_is_gone else []))
    assert ("previous.img" in here.files("state")) == running_is_gone
    values = here.values()
    assert values.get("saved_entry") in (None, "active"), "the next boot is to boot the new image"
    assert {name.partition("_")[2] for name in values if name.startswith("tries_")} == {made, before[keeps]}
    bad = [before[name] for name, state in (("active", active), ("passive", passive)) if state == BAD]
    assert here.state().get("failed", []) == [str(image_id)[:16] for image_id in bad]


def test_after_a_fallback_that_nobody_has_counted(boot: upgrading.Boot, new: Path) -> None:
    """The boot loader passes over an image that it cannot load: its count is as good as it ever was."""
    here, before = fallen_back(boot, "passive", GOOD, TRYING)
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert bootable(here)["passive"] == before["passive"]


def test_what_could_not_be_booted_is_made_anew_of_the_same_source(boot: upgrading.Boot, new: Path) -> None:
    """It holds what the source does, its identity says, and is not in order all the same."""
    here = boot("active")
    assert here.run("upgrade", f"dir:{new}").status == 0
    here = boot("passive")
    given_up(here)
    before = here.images()
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert ran.result["upgraded"] is True
    assert here.images()["active"] != before["active"]
    assert here.images()["passive"] == before["passive"]


def fallen_back(
    boot: upgrading.Boot, slot: str, active: str, passive: str
) -> tuple[Upgradable, dict[str, str | None]]:
    """Boot a slot instead of active, with these states of the images; give these too."""
    here = boot(slot)
    given_up(here)
    before = here.images()
    here.set(judged(before["active"], active), judged(before["passive"], passive))
    return here, before


def given_up(here: Upgradable, slot: str = "active") -> None:
    """Let the boot loader have started another slot than this one."""
    line = f"{upgrading.COMMANDS[here.slot]} upgrade_failure={slot}\n"
    here.machine.path("/machine/cmdline").write_text(line)


def test_two_upgrades_after_a_fallback_without_a_reboot(
    boot: upgrading.Boot, new: Path, newer: Path
) -> None:
    """What could not be booted was in active: by the second upgrade the first new image is there."""
    here, _ = fallen_back(boot, "recovery", GOOD, BAD)
    assert here.run("upgrade", f"dir:{new}").status == 0
    made = here.images()["active"]
    ran = here.run("upgrade", f"dir:{newer}")
    assert ran.status == 0, ran.stderr
    assert bootable(here)["passive"] == made


def test_two_upgrades_after_a_fallback_keep_what_is_good(
    boot: upgrading.Boot, new: Path, newer: Path
) -> None:
    here, before = fallen_back(boot, "recovery", GOOD, GOOD)
    for source in (new, newer):
        assert here.run("upgrade", f"dir:{source}").status == 0
        assert bootable(here)["passive"] == before["passive"]


def test_what_could_not_be_booted_and_is_all_there_is(boot: upgrading.Boot, new: Path) -> None:
    """It is kept, for there is no other, and known for what it is after a reboot too."""
    here = boot("recovery")
    given_up(here)
    before = here.images()
    here.set(judged(before["active"], GOOD))
    with here.machine.partition("state") as path:
        (path / "cOS/passive.img").unlink()
    assert here.run("upgrade", f"dir:{new}").status == 0
    assert here.images()["passive"] == before["active"]
    assert bootcount.read(here.values(), str(before["active"])).state == BAD


def test_recovery_is_kept_where_nothing_else_could_be_booted(boot: upgrading.Boot, new: Path) -> None:
    here, before = fallen_back(boot, "recovery", GOOD, BAD)
    ran = here.run("upgrade", "--recovery", f"dir:{new}")
    assert (ran.status, "cannot upgrade recovery: it is all there is" in ran.stderr) == (4, True)
    assert here.images() == before


def test_a_slot_that_was_chosen_for_the_next_boot_is_named(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    here.set(next_entry="recovery")
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    done = f"active is {ran.result['image_id']} now, made of dir:{new}"
    once = "the next boot boots recovery, once (immucore boot next auto takes that back)"
    assert (ran.result["message"], ran.result["next"]) == (f"{done}; {once}", "recovery")
    assert here.values()["next_entry"] == "recovery"
    ran = here.run("upgrade", "--json", "--recovery", f"dir:{new}")
    assert ran.result["message"] == f"recovery is {ran.result['image_id']} now, made of dir:{new}"


def test_an_image_that_cannot_be_read_is_not_kept(boot: upgrading.Boot, new: Path) -> None:
    here = boot("recovery")
    before = here.images()
    here.set(judged(before["active"], GOOD), judged(before["passive"], TRYING))
    with here.machine.partition("state") as path:
        upgrading.damage(path / "cOS/active.img")
    here = boot("passive")
    ran = here.run("boot", "status")
    assert (ran.status, "cannot read which image" in ran.stdout) == (5, True), ran.stdout + ran.stderr
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert bootable(here)["passive"] == before["passive"]


def test_two_upgrades_without_a_reboot(boot: upgrading.Boot, new: Path, newer: Path) -> None:
    """The image that runs is good, and passive by then: the second upgrade must not put active over it."""
    here = boot("active")
    before = here.images()
    here.set(judged(before["active"], GOOD))
    assert here.run("upgrade", f"dir:{new}").status == 0
    assert here.run("upgrade", f"dir:{newer}").status == 0
    assert bootable(here)["passive"] == before["active"]
    boot("active")


def test_recovery_alone(boot: upgrading.Boot, new: Path, newer: Path) -> None:
    here = boot("active")
    before, values = here.images(), here.values()
    with here.part("recovery") as path:
        assert (path / "cOS/recovery.img").exists()
    ran = here.run("upgrade", "--recovery", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert here.images() == {**before, "recovery": ran.result["image_id"]}
    assert here.values() == values
    settled(here)
    for name in ("state", "recovery"):
        assert here.state(name)["recovery"]["recovery"]["label"] == "COS_SYSTEM"
    here = boot("recovery")
    assert here.machine.path("/sysroot/etc/version").read_text() == "n"
    here.set(judged(before["active"], BAD), judged(before["passive"], GOOD))
    for source in (newer, new):  # what runs has a name until it does not run any more
        assert here.run("upgrade", "--recovery", f"dir:{source}").status == 0
        assert here.files("recovery") == ["previous.img", "recovery.img"]
    here = boot("recovery")
    assert here.run("upgrade", f"dir:{newer}").status == 0
    settled(here, "previous.img")
    assert here.run("upgrade", "--recovery", f"dir:{newer}").status == 0
    here = boot("active")
    here.run("upgrade", "--recovery", "--force", f"dir:{newer}")
    settled(here)
    here = boot("recovery")
    here.set(judged(here.images()["active"], BAD), judged(here.images()["passive"], BAD))
    ran = here.run("upgrade", "--recovery", f"dir:{new}")
    assert ran.status == 4
    assert "cannot upgrade recovery: it is all there is" in ran.stderr
    assert "--force" in ran.stderr


def test_an_upgrade_to_squashfs_and_back(boot: upgrading.Boot, plain_new: Path) -> None:
    here = boot("active")
    configure(here, filesystem="squashfs", source=f"dir:{plain_new}")
    ran = here.run("upgrade", "--json")
    assert ran.status == 0, ran.stderr
    assert ran.result["fs"] == "squashfs"
    settled(here)
    here = boot("active")
    assert here.machine.path("/sysroot/etc/version").read_text() == "plain"
    with here.machine.image("active.img"):  # the kernel reads it
        assert (here.machine.path("/machine/image/etc/version")).read_text() == "plain"


def configure(here: Upgradable, **settings: object) -> None:
    """Write upgrade.yaml."""
    directory = here.machine.path("/etc/immucore")
    directory.mkdir(exist_ok=True)
    named = {name.replace("_", "-"): value for name, value in settings.items()}
    (directory / "upgrade.yaml").write_text(yaml.safe_dump(named))


def test_what_is_there_already(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    assert here.run("upgrade", f"dir:{new}").status == 0
    before, values = here.images(), here.values()
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0
    assert ran.result["upgraded"] is False
    assert (
        ran.result["message"] == f"nothing to be done: active ({before['active']}) holds what dir:{new} does"
    )
    assert (here.images(), here.values()) == (before, values)
    settled(here)
    ran = here.run("upgrade", "--json", "--force", f"dir:{new}")
    assert ran.result["upgraded"] is True
    assert here.images()["active"] != before["active"]


def test_a_reboot_afterwards(boot: upgrading.Boot, new: Path) -> None:
    """A way that there is not is told before anything is done; a reboot that fails has been an upgrade."""
    here = boot("active")
    before = here.images()
    ran = here.run("upgrade", "--reboot", "soon", f"dir:{new}")
    assert (ran.status, "cannot reboot by 'soon'" in ran.stderr) == (2, True), ran.stderr
    assert here.images() == before
    configure(here, reboot="now")  # no systemd runs here
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status not in (0, 2)
    assert "cannot reboot" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert here.images()["passive"] in (before["active"], before["passive"])
    assert here.images()["active"] != before["active"]
    settled(here)
    ran = here.run("upgrade", f"dir:{new}")
    assert (ran.status, "nothing to be done" in ran.stderr) == (0, True), "and nothing to reboot for"


def test_a_new_recovery_is_nothing_to_reboot_for(boot: upgrading.Boot, new: Path, newer: Path) -> None:
    """upgrade.yaml is not asked; who asks for a reboot has one, which fails here: no systemd runs."""
    here = boot("active")
    configure(here, reboot="now")
    ran = here.run("upgrade", "--recovery", f"dir:{new}")
    assert (ran.status, "reboot" in ran.stderr) == (0, False), ran.stderr
    made = here.images()["recovery"]
    ran = here.run("upgrade", "--recovery", "--reboot", "now", f"dir:{newer}")
    assert (ran.status not in (0, 2), "cannot reboot" in ran.stderr) == (True, True), ran.stderr
    assert here.images()["recovery"] not in (None, made)
    configure(here, reboot="soon")
    assert here.run("upgrade", "--recovery", f"dir:{new}").status == 0


def test_what_was_judged_bad(boot: upgrading.Boot, new: Path, newer: Path) -> None:
    here = boot("active")
    before = here.images()
    here.set(judged(before["active"], GOOD))
    assert here.run("upgrade", f"dir:{new}").status == 0
    bad = here.images()["active"]
    here.set(judged(bad, BAD))
    here = boot("passive")
    for _ in range(2):
        ran = here.run("upgrade", f"dir:{new}")
        assert ran.status == 4
        assert f"cannot install dir:{new}: this machine has judged it bad ({str(bad)[:16]})" in ran.stderr
        assert "--force" in ran.stderr
        settled(here)
        assert (
            here.run("upgrade", f"dir:{newer}").status == 0
        )  # the bad image goes, what is known of it stays
        assert bootable(here)["passive"] == before["active"]
        assert str(bad) not in str(here.values())
        assert here.state()["failed"] == [str(bad)[:16]]
    assert here.run("upgrade", "--force", f"dir:{new}").status == 0
    assert here.state()["failed"] == []


def test_failures_stay_in_their_order(boot: upgrading.Boot, new: Path) -> None:
    """The oldest ones are those that go when there are too many."""
    here = boot("recovery")
    with here.machine.partition("state") as path:
        (path / "state.yaml").write_text("failed: [z, a, m]\n")
    here = boot("active")
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert here.state()["failed"] == ["z", "a", "m"]


def test_from_a_registry(boot: upgrading.Boot, new: Path, tmp_path: Path) -> None:
    here = boot("active")
    with Registry(tmp_path / "registry", tls=True) as registry:
        digest = registry.push("my/os:1", new)
        source = f"oci:{registry.address}/my/os:1"
        configure(
            here,
            source=source,
            authfile=str(registry.authfile),
            cert_dir=str(registry.certificates),
            tls_verify=True,
        )
        ran = here.run("upgrade", "--json")
        assert ran.status == 0, ran.stderr
        assert ran.result["digest"] == digest
        assert here.state()["state"]["active"]["source"] == source
        settled(here)
        registry.blob(registry.layers(digest)[0]).write_text("nobody reads it again")
        ran = here.run("upgrade", "--json")
        assert (ran.status, ran.result["upgraded"]) == (0, False)
        assert not any("unpacking" in line.get("step", "") for line in ran.lines)
        ran = here.run("upgrade", "--force")
        assert ran.status == 4
        assert f"cannot fetch '{source}'" in ran.stderr
        settled(here)


@pytest.mark.parametrize(
    ("settings", "words", "status", "said"),
    [
        ({}, (), 2, "cannot upgrade: there is no source"),
        ({"source": 7}, (), 2, "cannot read 'source' in /etc/immucore/upgrade.yaml: it has to be a text"),
        ({"tls_verify": "no"}, ("dir:/x",), 2, "cannot read 'tls-verify' in .*: it has to be true or false"),
        ({"filesystem": "erofs"}, ("dir:/x",), 2, "of type 'erofs': GRUB 2.06 cannot read it"),
        ({}, ("x",), 2, "cannot take 'x' for the source of an image"),
        ({}, ("dir:/not/there",), 4, "cannot read '/not/there': No such file or directory"),
    ],
)
def test_what_cannot_be_asked_for(
    booted: Upgradable, settings: dict[str, object], words: tuple[str, ...], status: int, said: str
) -> None:
    configure(booted, **settings)
    before = booted.images()
    ran = booted.run("upgrade", *words)
    assert ran.status == status, ran.stderr
    assert re.search(said, ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr
    assert booted.images() == before
    settled(booted)


def test_where_there_is_nothing_to_upgrade(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    run = here.machine.path("/run/cos")
    (run / "active_mode").rename(run / "live_mode")
    ran = here.run("upgrade", f"dir:{new}")
    assert (ran.status, "this is a live system" in ran.stderr) == (2, True), ran.stderr
    (run / "live_mode").unlink()
    ran = here.run("upgrade", f"dir:{new}")
    assert (ran.status, "this system was not booted from an image" in ran.stderr) == (2, True), ran.stderr
    argv = here.machine.inside(
        "setpriv", "--reuid=1", "--clear-groups", *upgrading.PROGRAM, "upgrade", "dir:/x"
    )
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=upgrading.ENVIRONMENT)
    assert (done.returncode, "that is for root alone" in done.stderr) == (4, True), done.stderr


def test_one_at_a_time(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    hook(here, "before-upgrade", "10", "touch /run/begun; while [ ! -e /run/go-on ]; do sleep 0.02; done")
    first = here.start("upgrade", f"dir:{new}")
    while not here.machine.path("/run/begun").exists():
        assert first.poll() is None
        time.sleep(0.01)
    for words in (("upgrade", f"dir:{new}"), ("rollback",)):
        ran = here.run(*words)
        assert ran.status == 4
        assert f"cannot {words[0]}: somebody else is at work on the images of this machine" in ran.stderr
    here.machine.path("/run/go-on").touch()
    assert first.wait(60) == 0
    assert here.run("upgrade", f"dir:{new}").status == 0


def hook(
    here: Upgradable, stage: str, name: str, text: str, where: str = "/sysroot/etc/immucore/hooks"
) -> Path:
    """Give the machine a hook."""
    directory = here.machine.path(f"{where}/{stage}.d")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)
    return directory / name


STAGES = ("before-upgrade", "after-upgrade-chroot", "after-upgrade")


def with_a_shell(tree: Path) -> Path:
    """Give a tree what a hook runs with."""
    (tree / "bin").mkdir()
    busybox = tree / "bin/busybox"
    native.command("cp", "/bin/busybox", busybox)
    for name in ("sh", "ls", "cat", "env", "mkdir", "touch"):
        (tree / "bin" / name).symlink_to("busybox")
    return tree


def test_hooks(boot: upgrading.Boot, tmp_path: Path) -> None:
    """Before, in the new tree, and after: in order, and with what they have to know."""
    tree = with_a_shell(upgrading.make_tree(tmp_path / "tree", "hooked"))
    own = tree / "usr/lib/immucore/hooks/after-upgrade-chroot.d"
    own.mkdir(parents=True)
    (own / "05-own").write_text(
        "#!/bin/sh\nset -e\ncat /etc/version >>/run/said\nls /proc/self /dev/null /sys/class >/dev/null\n"
        "touch /etc/made-by-a-hook\n"
    )
    (own / "05-own").chmod(0o755)
    here = boot("active")
    active = here.images()["active"]
    say = 'echo "$0 $IMMUCORE_STAGE $IMMUCORE_SLOT $IMMUCORE_SOURCE" >>/run/said'
    for stage in STAGES:
        hook(here, stage, "20", say)
        hook(here, stage, "10", f"{say}; echo ignored")
        hook(here, stage, "30", "exit 1").chmod(0o644)
        hook(here, stage, ".40", "exit 1")
    (here.machine.path("/sysroot/etc/immucore/hooks") / "after-upgrade.d/50").symlink_to("/dev/null")
    hook(here, "after-upgrade", "15", 'ls -l "$IMMUCORE_IMAGE" >/dev/null && echo there >>/run/said')
    ran = here.run("upgrade", "--json", f"dir:{tree}")
    assert ran.status == 0, ran.stderr
    told = f"active dir:{tree}"
    etc, inside = "/sysroot/etc/immucore/hooks", "/run/immucore/hooks"
    assert here.machine.path("/run/said").read_text().splitlines() == [
        f"{etc}/before-upgrade.d/10 before-upgrade {told}",
        f"{etc}/before-upgrade.d/20 before-upgrade {told}",
        f"hooked{inside}/10 after-upgrade-chroot {told}",
        f"{inside}/20 after-upgrade-chroot {told}",
        f"{etc}/after-upgrade.d/10 after-upgrade {told}",
        "there",
        f"{etc}/after-upgrade.d/20 after-upgrade {told}",
    ]
    settled(here)
    assert ran.result["image_id"][:16] == content.digest(str(tree)), "a hook makes no other source of it"
    assert here.images()["passive"] == active
    here = boot("active")
    assert here.machine.path("/sysroot/etc/made-by-a-hook").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_hook_that_fails(boot: upgrading.Boot, tmp_path: Path, stage: str) -> None:
    tree = with_a_shell(upgrading.make_tree(tmp_path / "tree", "hooked"))
    here = boot("active")
    before, values = here.images(), here.values()
    hook(here, stage, "10", "echo it is not to be; exit 3")
    hook(here, stage, "20", "touch /run/not-reached")
    ran = here.run("upgrade", f"dir:{tree}")
    assert ran.status == 4
    assert f"/10' of {stage} ended with status 3: it is not to be" in ran.stderr
    assert not here.machine.path("/run/not-reached").exists()
    assert (here.images(), here.values()) == (before, values)
    settled(here)
    hook(here, stage, "10", "exit 0").write_text("#!/no/such/program\n")
    ran = here.run("upgrade", f"dir:{tree}")
    assert ran.status == 4
    assert "Traceback" not in ran.stderr
    settled(here)


def test_a_hook_that_leaves_something_behind(boot: upgrading.Boot, tmp_path: Path) -> None:
    """A program that goes on in the new tree keeps /dev and the others mounted: nothing there is removed."""
    tree = with_a_shell(upgrading.make_tree(tmp_path / "tree", "hooked"))
    here = boot("active")
    hook(
        here,
        "after-upgrade-chroot",
        "10",
        "cd /dev; exec 3>/run/x; sleep 1000 >/dev/null 2>&1 & touch /run/ran",
    )
    hook(here, "after-upgrade-chroot", "20", "[ -e /run/ran ]")
    ran = here.run("upgrade", f"dir:{tree}")
    assert ran.status == 0, ran.stderr
    assert here.machine.path("/dev/null").exists()
    assert bootable(here)["active"] is not None
    assert "warning: cannot make" in ran.stderr
    assert "read-only again: Device or resource busy" in ran.stderr


def fill(here: Upgradable, name: str, left_mib: int) -> None:
    """Leave so much room on a partition."""
    with here.machine.partition(name) as path:
        status = os.statvfs(path)
        size = status.f_bfree * status.f_frsize - (left_mib << 20)
        with (path / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def test_a_full_partition(boot: upgrading.Boot, new: Path, tmp_path: Path) -> None:
    """Told before anything is written where the size is known, else as soon as it is full."""
    large = upgrading.make_tree(tmp_path / "large", "large")
    (large / "large").write_bytes(os.urandom(6 << 20))
    archive = tmp_path / "archive"
    native.command("tar", "--create", "--acls", "--xattrs", "--file", archive, "--directory", large, ".")
    machine = boot("recovery")
    fill(machine, "state", 8)
    here = boot("active")
    before, values = here.images(), here.values()
    with Registry(tmp_path / "registry") as registry:
        (large / "compressible").write_bytes(bytes(range(256)) * (20 << 12))
        registry.push("my/os:1", large)
        configure(here, tls_verify=False)
        for source, said in (
            (f"dir:{large}", "and 8 MiB are free|and 7 MiB are free"),
            (f"tar:{archive}", "and 8 MiB are free|and 7 MiB are free"),
            (
                f"oci:{registry.address}/my/os:1",
                "and [78] MiB are free|No space left on device|no space left",
            ),
        ):
            ran = here.run("upgrade", source)
            assert ran.status == 4, ran.stdout + ran.stderr
            assert re.search(said, ran.stderr), ran.stderr
            assert "hint: " in ran.stderr
            assert (here.images(), here.values()) == (before, values)
            settled(here)


def test_a_partition_that_fills_up_meanwhile(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    before, values = here.images(), here.values()
    hook(
        here,
        "before-upgrade",
        "10",
        "cd /run/immucore/images && fallocate -l $(df -B1 --output=avail . | tail -1) filler",
    )
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status == 4
    assert "No space left on device" in ran.stderr
    assert (here.images(), here.values()) == (before, values)
    settled(here)


def step_of(line: str) -> int:
    """Give the number of the step that a line announces, 0 if none."""
    words = line.split()
    return int(words[1]) if words[:1] == ["step"] and line.rstrip().endswith("...") else 0


class Stopped(NamedTuple):
    """What became of a command that was stopped."""

    status: int
    said: str


def stop_at(here: Upgradable, number: int, how: signal.Signals, *words: str) -> Stopped:
    """Start a command, and end it at a step."""
    process = here.start(*words)
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if step_of(line) == number:
            for child in psutil.Process(process.pid).children(recursive=True):
                if "immucore.system" in " ".join(child.cmdline()):
                    child.send_signal(how)
                    break
            break
    said += process.stderr.readlines()
    return Stopped(process.wait(60), "".join(said))


def killed_at_line(here: Upgradable, number: int, *words: str) -> tuple[int, str]:
    """Run a command, and kill it while it writes its so manieth line; give its status and what it said."""
    said = here.machine.path("/run/said")
    said.write_text("")
    argv = ["strace", "--output=/dev/null", "--trace-path=/run/said"]
    argv += ["-e", f"inject=write:signal=SIGKILL:when={number}", "sh", "-c", 'exec "$@" 2>/run/said', "sh"]
    argv = here.machine.inside(*argv, *here._program, *words)
    done = subprocess.run(argv, check=False, timeout=120, env=upgrading.ENVIRONMENT)
    return done.returncode, said.read_text()


def test_killed_at_every_step(boot: upgrading.Boot, new: Path, newer: Path) -> None:
    """At the beginning and the end of each, and whatever is left: both slots are whole, the machine boots.

    What was good and runs is in one of them, and the next upgrade goes well.
    """
    here = boot("active")
    before = here.images()
    here.set(judged(before["active"], GOOD))
    seen = set()
    for number in range(1, 2 * STEPS + 1):
        words = ("upgrade", "--force", f"dir:{(new, newer)[number % 2]}")
        active = here.images()["active"]
        status, said = killed_at_line(here, number, *words)
        assert status != 0
        steps = [step_of(line) for line in said.splitlines()]
        seen.add(max(steps, default=0))
        after = bootable(here)
        assert before["active"] in (after["active"], after["passive"])
        assert (after["active"] != active) == (number >= 2 * COMMIT), "from the end of that step on"
    assert seen == {*range(STEPS + 1)}
    assert here.run("upgrade", "--force", f"dir:{new}").status == 0
    settled(here)
    assert bootable(here)["passive"] == before["active"]
    assert len(here.values()) == 3
    here = boot("active")
    assert here.machine.path("/sysroot/etc/version").read_text() == "n"


@pytest.mark.parametrize("number", range(1, STEPS + 1))
def test_stopped_at_every_step(booted: Upgradable, new: Path, newer: Path, number: int) -> None:
    """SIGTERM and SIGINT: as it was before, or done."""
    here = booted
    before, values = here.images(), here.values()
    how = (signal.SIGTERM, signal.SIGINT)[number % 2]
    source = (new, newer)[number % 2]
    ended = stop_at(here, number, how, "upgrade", "--force", f"dir:{source}")
    assert "Traceback" not in ended.said
    settled(here)
    if ended.status == 0:
        assert bootable(here)["active"] != before["active"]
        assert number >= ARMING - 1
        return
    assert number <= ARMING
    assert ended.status == 4
    assert f"stopped by signal {how.value}: nothing was changed" in ended.said
    assert (here.images(), here.values()) == (before, values)


def test_killed_at_random(boot: upgrading.Boot, new: Path, newer: Path) -> None:
    here = boot("active")
    before = here.images()
    here.set(judged(before["active"], GOOD))
    chance = random.Random(1)  # noqa: S311
    for number in range(5):
        source = (new, newer)[number % 2]
        process = here.start("upgrade", "--force", f"dir:{source}")
        time.sleep(chance.uniform(0.3, 2))
        for child in psutil.Process(process.pid).children(recursive=True):
            if "immucore.system" in " ".join(child.cmdline()):
                child.kill()
                break
        process.communicate()
        after = bootable(here)
        assert before["active"] in (after["active"], after["passive"])
    assert here.run("upgrade", "--force", f"dir:{new}").status == 0
    settled(here)


def test_an_environment_that_is_not_there(boot: upgrading.Boot, new: Path) -> None:
    here = boot("active")
    here.machine.path("/sysroot/oem/grubenv").unlink()
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert here.values() == {f"tries_{ran.result['image_id']}": "3"}


def test_without_oem(boot: upgrading.Boot, new: Path) -> None:
    """Where the boot counting cannot be armed, nothing is put in place."""
    here = boot("active")
    before = here.images()
    here.machine.run("umount", "/sysroot/oem")
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status == 4
    assert "cannot write '/sysroot/oem/grubenv'" in ran.stderr
    assert here.images() == before
    settled(here)


@pytest.mark.parametrize("fell_back", [False, True])
def test_images_of_somebody_else(boot: upgrading.Boot, new: Path, newer: Path, fell_back: bool) -> None:
    """cos-toolkit's images have no identity: they are told apart by their files, counted by their slot."""
    here = boot("recovery")
    with here.machine.partition("state") as path:
        for slot in ("active", "passive"):
            native.command("debugfs", "-w", "-R", f"rm /{content.IDENTITY}", path / f"cOS/{slot}.img")
    here = boot("active")
    here.set(judged("active", GOOD), judged("passive", GOOD if fell_back else BAD))
    if fell_back:
        given_up(here, "passive")
    ran = here.run("upgrade", "--json", f"dir:{new}")
    assert ran.status == 0, ran.stderr
    assert here.values() == {
        f"tries_{ran.result['image_id']}": "3",
        "tries_passive": "3",
        "good_passive": "1",
    }
    version = "debugfs", "-R", "cat /etc/version"
    for _ in range(2):
        with here.part("state") as path:
            assert native.command(*version, path / "cOS/passive.img") == "a"
        ran = here.run("upgrade", "--json", f"dir:{newer}")
        assert ran.status == 0, ran.stderr
    here = boot("passive")
    assert here.run("rollback").status == 0
    made = ran.result["image_id"]
    assert here.values() == {f"tries_{made}": "3", "tries_active": "3", "good_active": "1"}
    with here.part("state") as path:
        assert native.command(*version, path / "cOS/active.img") == "a"


def test_a_state_yaml_of_somebody_else(boot: upgrading.Boot, new: Path, newer: Path) -> None:
    here = boot("recovery")
    with here.machine.partition("state") as path:
        (path / "state.yaml").write_text("oem: {label: COS_OEM}\nstate: {label: X, active: 7}\nfailed: x\n")
    here = boot("active")
    assert here.run("upgrade", f"dir:{new}").status == 0
    state = here.state()
    assert state["oem"] == {"label": "COS_OEM"}
    assert state["state"]["label"] == "X"
    assert state["state"]["active"]["source"] == f"dir:{new}"
    here = boot("recovery")
    with here.machine.partition("state") as path:
        (path / "state.yaml").write_text("{: [")
    here = boot("active")
    assert here.run("upgrade", f"dir:{newer}").status == 0
    assert here.state()["state"]["active"]["source"] == f"dir:{newer}"


def test_without_a_recovery_partition(boot: upgrading.Boot, new: Path) -> None:
    """What records the upgrade is less than the upgrade."""
    here = boot("active")
    here.machine.record(here.machine.part("recovery")).write_text("I:1\n")
    ran = here.run("upgrade", f"dir:{new}")
    assert ran.status == 0
    assert "warning: cannot find a filesystem labelled 'COS_RECOVERY'" in ran.stderr
    ran = here.run("upgrade", "--recovery", f"dir:{new}")
    assert ran.status == 3
    assert "cannot find a filesystem labelled 'COS_RECOVERY'" in ran.stderr


def test_a_stick_with_the_same_labels_is_left_alone(
    boot: upgrading.Boot, new: Path, tmp_path: Path, upgradable: Path
) -> None:
    stick = tmp_path / "stick"
    native.command("cp", "--sparse=always", upgradable, stick)
    here = boot("recovery")
    device = here.machine.run("losetup", "--find", "--show", "--partscan", stick).strip()
    try:
        native.command("partx", "--update", device)
        for number, name in enumerate(upgrading.SIZES_MIB, 1):
            said = native.command("blkid", "--probe", "--output", "udev", f"{device}p{number}")
            record = "".join(f"E:{line}\n" for line in said.splitlines())
            here.machine.record(f"{device}p{number}").write_text(record)
            assert name
        before = stick.read_bytes()
        ran = here.run("upgrade", f"dir:{new}")
        assert ran.status == 0, ran.stderr
        assert stick.read_bytes() == before
    finally:
        native.command("losetup", "--detach", device)


@pytest.fixture(scope="module")
def plain_new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a version that a squashfs can hold."""
    tree = upgrading.make_tree(tmp_path_factory.mktemp("plain") / "tree", "plain")
    native.command("setfacl", "--recursive", "--remove-all", "--remove-default", tree)
    return tree


@pytest.fixture(scope="module")
def booted(
    tmp_path_factory: pytest.TempPathFactory, upgradable: Path, program: list[str]
) -> Iterator[Upgradable]:
    """Boot a machine for the tests that leave it as it is, or do not care."""
    folder = tmp_path_factory.mktemp("booted")
    native.command("cp", "--sparse=always", upgradable, folder / "disk.img")
    with native.Machine(folder / "machine", folder / "disk.img") as machine:
        here = Upgradable(machine, "active", program)
        here.set(judged(here.images()["active"], GOOD))
        yield here
