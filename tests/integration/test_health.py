"""The health of a boot, judged natively: a real disk, booted by the real agent, with a systemctl of its own.

A machine of these tests has no systemd: what is asked of it is answered by a script.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import native
import psutil
import pytest
import upgrading
from upgrading import Upgradable

from immucore import bootcount, grubenv
from immucore.bootcount import Count

COUNTED = "panic=10 rd.cos.onfail=reboot:10"
# `is-active` says yes once /run/complete is there; a reboot is written down and stops the service, as it is
# stopped at a shutdown, but with /run/refuse.
SYSTEMCTL = """#!/bin/sh
[ "$1" != is-active ] || { [ -e /run/complete ]; exit; }
echo "$@" >> /run/asked
[ ! -e /run/refuse ] || exit 1
kill $PPID
"""
RESTART = """
from immucore import log
from immucore.system import boot_state, health
from immucore.system.health_checks import Settings
supervisor = health.Supervisor(boot_state.read(), Settings(), log.start())
supervisor.restart([(way, 0.01) for way, _ in health.RESTARTS])
"""
LIMIT_SEC = 30.0


class Judged(Upgradable):
    """A machine whose boot is to be judged; files of the booted system are below /sysroot."""

    def __init__(
        self, machine: native.Machine, slot: str, program: Sequence[str], words: str, **lost: str
    ) -> None:
        with machine.partition("state") as path:
            if "damaged" in lost:
                os.truncate(path / f"cOS/{lost['damaged']}.img", 1 << 20)
            if "unreadable" in lost:
                upgrading.damage(path / f"cOS/{lost['unreadable']}.img")
        self.machine, self.slot, self._program = machine, slot, program
        booted = machine.boot(f"{upgrading.COMMANDS[slot]} {words}")
        assert booted.status == 0, booted.stderr
        self.ids = {} if "unreadable" in lost else self.images()  # e2fsck may never come to its end there
        self.deadline(600)  # the host may run for longer than that
        self.put("/machine/systemctl", SYSTEMCTL)
        machine.run("mount", "--bind", "/machine/systemctl", "/usr/bin/systemctl")
        machine.console()

    def put(self, path: str, text: str = "") -> None:
        """Write a file that can be run."""
        file = self.machine.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def text(self, path: str) -> str:
        """Read a file; one that is not there is empty."""
        file = self.machine.path(path)
        return file.read_text() if file.exists() else ""

    def complete(self) -> None:
        """Let systemd have reached its target."""
        self.put("/run/complete")

    def check(self, name: str, script: str, folder: str = "etc") -> None:
        """Give the machine a check; the image's folder is in memory here."""
        if folder == "usr/lib" and not self.machine.path("/sysroot/usr/lib/immucore").exists():
            self.machine.run("mount", "-t", "tmpfs", "none", "/sysroot/usr/lib")
        self.put(f"/sysroot/{folder}/immucore/checks.d/{name}", f"#!/bin/sh\n{script}\n")

    def deadline(self, seconds: float, check_timeout: float = 5) -> None:
        """Set how long this boot has, from now on."""
        settings = f"deadline: {time.monotonic() + seconds}\ncheck_timeout: {check_timeout}\n"
        self.put("/sysroot/etc/immucore/health.yaml", settings)

    def judge(self, *, until: str = "") -> str:
        """Run the service to its end, or until it has said something; returns all that it has said."""
        words = self.machine.inside(*self._program, "boot", "verdict")
        environment = {**upgrading.ENVIRONMENT, "JOURNAL_STREAM": "8:1"}
        service = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
        assert service.stderr
        said = ""
        deadline = time.monotonic() + LIMIT_SEC
        try:
            while line := service.stderr.readline():
                said += line
                assert time.monotonic() < deadline
                if until and until in line:
                    break
        finally:
            for process in psutil.Process(service.pid).children(recursive=True) if until else ():
                process.kill()
            _, rest = service.communicate(timeout=LIMIT_SEC)
        said += rest
        assert until or service.returncode == (-signal.SIGTERM if self.asked else 0), said
        return said

    @property
    def health(self) -> dict[str, Any]:
        """What programs are told."""
        found = json.loads(self.text("/run/immucore/health.json"))
        assert isinstance(found, dict)
        return found

    @property
    def asked(self) -> list[str]:
        """What systemctl was asked to do."""
        return self.text("/run/asked").splitlines()

    def count(self, slot: str) -> Count:
        """What the environment block says of the image in a slot."""
        image_id = self.ids[slot]
        assert image_id
        return bootcount.read(self.values(), image_id)


Boot = Callable[..., Judged]


@pytest.fixture
def boot(upgradable: Path, tmp_path: Path, source: Sequence[str]) -> Iterator[Boot]:
    disk = tmp_path / "disk.img"
    native.command("cp", "--sparse=always", upgradable, disk)
    with native.Machine(tmp_path / "machine", disk) as machine:

        def switch_on(slot: str = "active", words: str = COUNTED, **lost: str) -> Judged:
            return Judged(machine, slot, (*source[:-2], "immucore.system"), words, **lost)

        yield switch_on


def test_a_boot_that_is_healthy_has_all_its_tries_again(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.set(Count(image_id=here.ids["active"], left=1), next_entry="passive")
    said = here.judge()
    assert re.fullmatch(rf"<6>healthy \d+ s after the start: active \({here.ids['active']}\)\n", said)
    assert here.count("active") == Count(image_id=here.ids["active"], left=3, good=True)
    assert here.values()["next_entry"] == "passive"
    assert here.health == {"schema": 1, "verdict": "good", "reasons": []}
    assert here.asked == []
    assert here.machine.console() == ""
    assert not here.text("/run/motd.d/50-immucore")
    assert not here.text("/run/cos/upgrade_failure")


def test_it_waits_for_the_target(boot: Boot) -> None:
    here = boot()
    assert here.judge(until="not healthy") == "<6>not healthy yet: boot-complete.target is not reached\n"
    assert here.health == {
        "schema": 1,
        "verdict": "waiting",
        "reasons": ["boot-complete.target is not reached"],
    }
    assert here.count("active").left == 3
    assert not here.count("active").good


def test_a_boot_that_hangs_restarts_the_machine_at_its_deadline(boot: Boot) -> None:
    here = boot()
    here.deadline(3)
    said = here.judge()
    assert re.search(
        r"<3>no health within \d+ s of the start: boot-complete.target is not reached. The ", said
    )
    assert here.asked == ["reboot"]
    assert here.health["verdict"] == "none"
    assert not here.count("active").good
    console = here.machine.console()
    assert "immucore: this boot is not healthy: boot-complete.target is not reached. The machine" in console
    assert "To stop that: systemctl stop immucore-health" in console
    assert "boot-complete.target is not reached. The machine restarts.\r\n" in console


def test_a_machine_is_restarted_with_more_and_more_force(boot: Boot) -> None:
    here = boot()
    here.put("/run/refuse")
    here.machine.run(sys.executable, "-c", RESTART)
    assert here.asked == ["reboot", "reboot --force", "reboot --force --force"]
    assert here.health["verdict"] == "none"


def test_a_systemctl_that_cannot_be_run_is_told(boot: Boot) -> None:
    here = boot()
    here.machine.path("/machine/systemctl").chmod(0o644)
    said = here.judge(until="not healthy")
    assert "not healthy yet: cannot ask for boot-complete.target: systemctl: Permission denied\n" in said
    here.machine.run(sys.executable, "-c", RESTART)
    assert here.machine.kernel_log().count("<3>immucore: systemctl: Permission denied") == 3


@pytest.mark.parametrize("slot", ["passive", "recovery"])
def test_every_slot_is_judged(boot: Boot, slot: str) -> None:
    here = boot(slot)
    here.complete()
    before = here.values()
    said = here.judge()
    assert "healthy" in said
    if slot == "passive":
        assert here.count("passive") == Count(image_id=here.ids["passive"], left=3, good=True)
    else:
        assert here.values() == before
        assert "recovery (not counted)" in said


@pytest.mark.parametrize(("slot", "words"), [("active", ""), ("recovery", COUNTED)])
def test_what_is_not_counted_is_not_restarted_and_may_come_late(boot: Boot, slot: str, words: str) -> None:
    here = boot(slot, words)
    here.deadline(0.1)
    said = here.judge(until="no health within")
    assert "The machine is not restarted for that: this boot is not counted.\n" in said
    assert here.asked == []
    here.complete()
    assert "healthy" in here.judge()


def test_checks_of_vendor_and_machine(boot: Boot) -> None:
    here = boot()
    here.complete()
    for name, folder in (("10-vendor", "usr/lib"), ("20-masked", "usr/lib"), ("20-masked", "etc")):
        here.check(name, f"echo {folder} {name} >> /run/ran; env > /run/environment", folder)
    here.check("05-machine", "echo etc 05-machine >> /run/ran")
    here.check("30-masked", "exit 1", "usr/lib")
    here.machine.path("/sysroot/etc/immucore/checks.d/30-masked").symlink_to("/dev/null")
    here.check("README", "exit 1")
    here.machine.path("/sysroot/etc/immucore/checks.d/README").chmod(0o644)
    here.judge()
    assert here.text("/run/ran") == "etc 05-machine\nusr/lib 10-vendor\netc 20-masked\n"
    assert "LC_ALL=C\n" in here.text("/run/environment")
    assert here.health["verdict"] == "good"


def test_a_check_is_run_again_until_it_passes(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.deadline(60)
    here.check(
        "network", "[ -e /run/network ] || { touch /run/network; echo there is no; echo route; exit 3; }"
    )
    said = here.judge()
    assert said.startswith("<6>not healthy yet: check network has failed (3): there is no route\n<6>healthy")


def test_a_check_that_hangs_is_stopped_with_all_that_it_has_started(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.deadline(60, check_timeout=0.5)
    here.check("hangs", "sleep 4711 & sleep 4711")
    said = here.judge(until="not healthy")
    assert "check hangs is stopped: it took longer than 0.5 s" in said
    assert "sleep 4711" not in here.machine.run("ps", "-eo", "args")


def test_a_check_does_not_outlast_the_deadline(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.deadline(2, check_timeout=1000)
    here.check("hangs", "sleep 4711")
    assert "check hangs is stopped: it took longer than" in here.judge()
    assert here.asked == ["reboot"]


def test_a_check_that_is_no_program(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.put("/sysroot/etc/immucore/checks.d/broken", "#!/not/there\n")
    assert "check broken cannot be run: No such file or directory" in here.judge(until="not healthy")


def test_the_mounts_have_to_be_those_of_the_plan(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.machine.run("mount", "-t", "tmpfs", "none", "/sysroot/opt")
    here.machine.run("umount", "/sysroot/srv")
    assert here.judge(until="/sysroot/srv") == (
        "<6>not healthy yet: /sysroot/opt has something else mounted over it\n"
        "<6>not healthy yet: /sysroot/srv is no longer mounted\n"
    )


def test_a_fallback_of_the_agent_keeps_its_mark(boot: Boot) -> None:
    here = boot("active", COUNTED, damaged="active")
    here.complete()
    mark = here.text("/run/cos/upgrade_failure")
    assert mark.startswith("active: ")
    said = here.judge()
    assert said.startswith(f"<4>passive is booted instead of active: {mark}")
    assert here.text("/run/cos/upgrade_failure") == mark
    assert "passive is booted instead of active" in here.text("/run/motd.d/50-immucore")
    assert here.count("passive") == Count(image_id=here.ids["passive"], left=3, good=True)


def test_what_systemd_sysext_mounts_is_no_harm(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.machine.run("mount", "-t", "tmpfs", "confext", "/sysroot/etc")
    assert "healthy" in here.judge()


@pytest.mark.parametrize("block", [None, bytes(1024), b"short"], ids=["missing", "zeros", "short"])
def test_the_environment_block_is_repaired(boot: Boot, block: bytes | None) -> None:
    here = boot()
    file = here.machine.path("/sysroot/oem/grubenv")
    file.unlink() if block is None else file.write_bytes(block)
    said = here.judge(until="not healthy")
    assert said.startswith("<4>boots were not counted: /sysroot/oem/grubenv: it ")
    assert file.read_bytes() == grubenv.render({})


def test_images_that_are_nowhere_are_forgotten_when_there_are_many(boot: Boot) -> None:
    here = boot()
    gone = [Count(image_id=f"{number:016x}_00000000", left=0) for number in range(4)]
    kept = Count(image_id=here.ids["passive"], left=1)
    here.set(*gone, kept, extra_cmdline="x")
    here.judge(until="not healthy")
    assert here.values() == {f"tries_{kept.image_id}": "1", "extra_cmdline": "x"}


def test_nothing_is_forgotten_while_an_image_cannot_be_read(boot: Boot) -> None:
    """It may be any of those that are counted."""
    here = boot(unreadable="passive")
    here.set(*(Count(image_id=f"{number:016x}_00000000", left=0) for number in range(5)))
    before = here.values()
    said = here.judge(until="not healthy")
    assert "cannot read which image '/run/initramfs/cos-state/cOS/passive.img' is" in said
    assert here.values() == before
    assert len(before) == 5


def test_without_a_reader_of_images_a_boot_is_judged_all_the_same(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.machine.run("mount", "--bind", "/dev/null", str(shutil.which("debugfs", path="/usr/sbin:/usr/bin")))
    said = here.judge()
    assert "<3>cannot read '/run/initramfs/cos-state/cOS/active.img': there is no debugfs\n" in said
    assert here.count("active").good


def test_without_oem_a_boot_is_judged_all_the_same(boot: Boot) -> None:
    here = boot()
    here.complete()
    here.machine.run("mount", "-o", "remount,ro", "/sysroot/oem")
    before = here.values()
    said = here.judge()
    assert "<3>cannot write '/sysroot/oem/grubenv': Read-only file system\n" in said
    assert here.health["verdict"] == "good"
    assert here.values() == before


def test_after_a_fallback_of_the_boot_loader_everyone_is_told(boot: Boot) -> None:
    here = boot("passive", f"{COUNTED} upgrade_failure=active")
    here.set(bootcount.condemned(bootcount.armed(str(here.ids["active"]))))
    here.complete()
    said = here.judge()
    reason = "it is bad: no boot of it came up in good health, or it was judged so"
    fallback = f"passive is booted instead of active: {reason}"
    bad = f"active ({here.ids['active']}) is bad and is not booted again"
    assert said.startswith(f"<4>{fallback}\n<4>{bad}\n<6>healthy")
    assert f"\r\nimmucore: {fallback}\r\n" in here.machine.console()
    motd = f"immucore: {fallback}\nimmucore: {bad}\nimmucore: More: immucore boot status\n"
    assert here.text("/run/motd.d/50-immucore") == motd
    assert here.text("/run/cos/upgrade_failure") == f"active: {reason}\n"
    assert here.count("active") == Count(image_id=here.ids["active"], left=0)


def test_an_image_with_its_last_try_is_not_given_up_while_it_is_judged(boot: Boot) -> None:
    here = boot()
    image_id = str(here.ids["active"])
    here.set(Count(image_id=image_id, left=0))
    here.complete()
    said = here.judge()
    last = "has its last try: it is not booted again if this boot comes to no good health"
    assert said.startswith(f"<4>active ({image_id}) {last}\n<6>healthy")
    assert here.count("active").good
    assert here.text("/run/motd.d/50-immucore") == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "deadline: soon\n",
            "'deadline' in '/sysroot/etc/immucore/health.yaml' has to be a number of seconds",
        ),
        ("check_timeout: 0\n", "'check_timeout' in '/sysroot/etc/immucore/health.yaml' has to be a number"),
        (
            "deadline: true\n",
            "'deadline' in '/sysroot/etc/immucore/health.yaml' has to be a number of seconds",
        ),
        (
            "dead-line: 5\n",
            "'dead-line' in '/sysroot/etc/immucore/health.yaml' is not known: there are deadline,",
        ),
        ("- 5\n", "cannot read '/sysroot/etc/immucore/health.yaml': it is no mapping"),
        ("{", "cannot read '/sysroot/etc/immucore/health.yaml': "),
    ],
)
def test_settings_that_are_wrong_are_told_and_not_taken(boot: Boot, text: str, told: str) -> None:
    here = boot()
    here.complete()
    here.put("/sysroot/etc/immucore/health.yaml", text)
    said = here.judge()
    assert said.startswith(f"<4>{told}")
    assert "<6>healthy" in said
