"""The reboot lock with a real etcd: machines that contend for it, die, and come back."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import etcd_server
from etcd_server import Etcd

from immucore import process
from immucore.system import commands, etcd, reboot, reboot_lock, reboot_unit, settings
from immucore.system.etcd import Access, Client, EtcdError
from immucore.system.reboot_lock import Holder, Lock, Semaphore
from immucore.system.settings import SettingsError

KEY = "immucore/reboot-lock/default"
SYSTEMCTL = """\
#!/bin/sh
[ "$1" != reboot ] || echo "down $(cat {folder}/machine-id)" >> {observer}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd_server.running(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def plain(server: Etcd) -> Etcd:
    """Give the server with no lock in it."""
    server.ctl("del", "--prefix", "immucore/")
    return server


class Machine:
    """A machine of the fleet, whose power can be cut."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.folder = fleet.folder / name
        self.name = name
        (self.folder / "bin").mkdir(parents=True)
        (self.folder / "machine-id").write_text(f"{name}\n")
        settings = {"etcd": {"endpoints": [fleet.server.endpoint]}}
        (self.folder / "upgrade.yaml").write_text(json.dumps(settings))
        for program, text in (("systemctl", SYSTEMCTL), ("systemd-run", "#!/bin/sh\n")):
            file = self.folder / "bin" / program
            file.write_text(text.format(folder=self.folder, observer=fleet.observer))
            file.chmod(0o755)
        self.process: subprocess.Popen[bytes] | None = None

    def switch_on(self, rounds: int) -> None:
        with (self.folder / "journal").open("ab") as journal:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.reboot_machine", str(self.folder), str(rounds)],
                stdout=journal,
                stderr=journal,
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )

    def cut_power(self) -> None:
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # nothing that it has started goes on either
            self.process.wait()
            self.process = None

    def journal(self) -> str:
        return (self.folder / "journal").read_text()

    def last_word(self) -> str:
        return "".join(self.journal().splitlines()[-1:])


class Fleet:
    """Three machines, and what is seen of them from outside."""

    def __init__(self, folder: Path, server: Etcd) -> None:
        self.folder = folder
        self.server = server
        self.observer = folder / "observer"
        self.observer.touch()
        self.machines = [Machine(self, name) for name in ("red", "green", "blue")]

    def seen(self) -> list[tuple[str, str]]:
        """Give what has happened, in order: who went down, who came up."""
        lines = self.observer.read_text().splitlines()
        return [(what, name) for what, name in (line.split() for line in lines)]

    def down_over_time(self) -> list[set[str]]:
        """Give which machines were down after each event; one that never came up is down for ever."""
        down: list[set[str]] = [set()]
        for what, name in self.seen():
            down.append(down[-1] | {name} if what == "down" else down[-1] - {name})
        return down

    def most_down(self) -> int:
        return max(len(each) for each in self.down_over_time())

    def down(self) -> set[str]:
        return self.down_over_time()[-1]

    def downs(self) -> int:
        return sum(what == "down" for what, _ in self.seen())

    def wait(self, what: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "\n".join(
                f"{each.name}:\n{each.journal()}" for each in self.machines
            )
            time.sleep(0.01)

    def finish(self, *machines: Machine) -> None:
        """Wait until these have lived to the end."""
        for each in machines or self.machines:
            assert each.process
            assert each.process.wait(60) == 0, each.journal()
            assert "Traceback" not in each.journal()


@pytest.fixture
def fleet(tmp_path: Path, plain: Etcd) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, plain)
    yield fleet
    for each in fleet.machines:
        each.cut_power()


@pytest.fixture
def operator(plain: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Give the commands as somebody runs them on another machine."""
    (tmp_path / "operator.yaml").write_text(json.dumps({"etcd": {"endpoints": [plain.endpoint]}}))
    (tmp_path / "operators-id").write_text("operator\n")
    monkeypatch.setattr(settings, "PATH", str(tmp_path / "operator.yaml"))
    monkeypatch.setattr(reboot_lock, "MACHINE_ID", str(tmp_path / "operators-id"))
    return lambda *words: commands.main(["reboot-lock", *words])


def lock(server: Etcd) -> Lock:
    return Lock(Access(endpoints=(server.endpoint,)))


@pytest.mark.parametrize("slots", [1, 2])
def test_machines_that_reboot_in_turns(fleet: Fleet, operator: Callable[..., int], slots: int) -> None:
    assert operator("set-max", str(slots)) == 0
    for each in fleet.machines:
        each.switch_on(rounds=4)
    fleet.finish()
    assert fleet.downs() == 12
    assert fleet.most_down() <= slots
    history = fleet.server.history(KEY)
    assert max(len(each["holders"]) for each in history) == slots
    assert history[-1] == {"max": slots, "holders": []}


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("seed", [1, 2])
def test_machines_that_die_at_any_time(
    fleet: Fleet, operator: Callable[..., int], slots: int, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311
    operator("set-max", str(slots))
    for each in fleet.machines:
        each.switch_on(rounds=100)
    fleet.wait(lambda: fleet.downs() >= 2)
    for _ in range(6):
        time.sleep(chance.uniform(0, 0.4))
        victim = chance.choice([*fleet.machines, None])
        if victim is None:
            fleet.server.kill()
            time.sleep(chance.uniform(0, 0.3))
            fleet.server.start()
            continue
        victim.cut_power()
        time.sleep(chance.uniform(0, 0.4))
        victim.switch_on(rounds=100)
    before = fleet.downs()
    fleet.wait(lambda: fleet.downs() >= before + 3)
    for each in fleet.machines:
        each.cut_power()
    assert fleet.most_down() <= slots
    assert max(len(each["holders"]) for each in fleet.server.history(KEY)) <= slots


@pytest.mark.parametrize("slots", [1, 2])
def test_a_machine_that_dies_with_a_slot_keeps_it(
    fleet: Fleet, operator: Callable[..., int], capsys: pytest.CaptureFixture[str], slots: int
) -> None:
    operator("set-max", str(slots))
    for each in fleet.machines:
        each.switch_on(rounds=1000)
    dead: list[Machine] = []
    while len(dead) < slots:  # they die on their way through a reboot
        fleet.wait(lambda: fleet.down() - {each.name for each in dead})
        for machine in fleet.machines:
            if machine.name in fleet.down() and machine not in dead:
                machine.cut_power()
                if machine.name in [each["machine"] for each in fleet.server.value(KEY)["holders"]]:
                    dead.append(machine)
                else:  # it was too late
                    machine.switch_on(rounds=1000)
    names = sorted(each.name for each in dead)
    alive = [each for each in fleet.machines if each not in dead]
    for each in alive:
        fleet.wait(lambda each=each: "all slots" in each.last_word())
    assert sorted(each["machine"] for each in fleet.server.value(KEY)["holders"]) == names

    seen = fleet.seen()
    fleet.server.kill()  # that frees nothing either
    fleet.server.start()
    time.sleep(1)
    assert fleet.seen() == seen
    assert operator("status") == 0
    shown = capsys.readouterr().out.splitlines()
    assert f"{KEY}: {slots} of {slots} slots taken" in shown
    assert sorted(line.split()[0] for line in shown[-slots:]) == names
    assert f"all slots of the reboot lock are taken ({slots} of {slots}, " in alive[0].journal()

    assert operator("release", names[0]) == 0
    fleet.wait(lambda: len(fleet.seen()) > len(seen) + 4)
    assert operator("release", names[0]) == 2
    assert f"cannot give the slot of machine '{names[0]}' back: it has taken none" in capsys.readouterr().err


def test_a_machine_that_comes_back_goes_on(fleet: Fleet) -> None:
    red, green, _ = fleet.machines
    red.switch_on(rounds=1)
    fleet.wait(lambda: ("down", "red") in fleet.seen())
    red.cut_power()
    holders = fleet.server.value(KEY)["holders"]
    green.switch_on(rounds=1)
    if holders:
        fleet.wait(lambda: green.journal().count("all slots") == 1)
    red.switch_on(rounds=1)
    fleet.finish(red, green)
    assert fleet.server.value(KEY)["holders"] == []


def test_a_machine_that_fell_back_keeps_its_slot(fleet: Fleet) -> None:
    red, green, _ = fleet.machines
    (red.folder / "upgrade_failure").write_text("active")
    lock(fleet.server).acquire(Holder(machine="red", boot="the one before"))
    red.switch_on(rounds=0)
    fleet.finish(red)
    assert "the slot stays taken: this machine had to boot another image than it was to" in red.journal()
    assert [each["machine"] for each in fleet.server.value(KEY)["holders"]] == ["red"]
    (red.folder / "upgrade_failure").unlink()
    red.switch_on(rounds=0)
    fleet.finish(red)
    assert "the slot of the reboot lock is given back" in red.journal()
    assert fleet.server.value(KEY)["holders"] == []
    (green.folder / "upgrade_failure").write_text("active")
    green.switch_on(rounds=0)
    fleet.finish(green)
    assert green.journal() == ""  # it has none that could stay


def test_no_machine_reboots_while_etcd_is_away(fleet: Fleet) -> None:
    fleet.server.kill()
    for each in fleet.machines:
        each.switch_on(rounds=2)
    for each in fleet.machines:
        fleet.wait(lambda each=each: "Connection refused" in each.journal())
    time.sleep(0.5)
    assert fleet.downs() == 0
    assert all(each.journal().count("waiting: ") == 1 for each in fleet.machines)
    fleet.server.start()
    fleet.finish()
    assert fleet.downs() == 6
    assert fleet.most_down() == 1


def test_many_at_the_same_moment(plain: Etcd) -> None:
    lock(plain).resize(2)
    for number in range(15):
        machines = [Holder(machine=f"{number}-{each}", boot="b") for each in range(8)]
        results: dict[str, Semaphore | None] = {}
        start = threading.Barrier(len(machines))

        def run(
            me: Holder,
            start: threading.Barrier = start,
            results: dict[str, Semaphore | None] = results,
        ) -> None:
            mine = lock(plain)
            start.wait()
            results[me.machine] = mine.acquire(me)

        threads = [threading.Thread(target=run, args=(each,)) for each in machines]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        got = sorted(name for name, full in results.items() if full is None)
        assert len(results) == 8
        assert len(got) == 2
        assert sorted(each["machine"] for each in plain.value(KEY)["holders"]) == got
        for name in got:
            assert lock(plain).release(name)


def test_once_more_is_the_same_slot(plain: Etcd) -> None:
    first = Holder(machine="red", boot="b", since="first")
    assert lock(plain).acquire(first) is None
    assert lock(plain).acquire(first.replace(since="second")) is None
    assert plain.value(KEY) == {"max": 1, "holders": [dict(first.items())]}
    assert len(plain.history(KEY)) == 1
    full = lock(plain).acquire(Holder(machine="blue", boot="b"))
    assert full == Semaphore(max=1, holders=(first,))


def test_a_slot_that_is_taken_in_this_boot_is_not_the_last_boots(plain: Etcd) -> None:
    mine = lock(plain)
    mine.acquire(Holder(machine="red", boot="old"))
    mine.acquire(Holder(machine="red", boot="new"))  # before the health of the new boot is known to be good
    assert not mine.release("red", not_of_boot="new")
    assert mine.look().holds(Holder(machine="red", boot="new"))
    assert not mine.release("red", of_boot="old")
    assert mine.release("red", of_boot="new")


class Lossy(Client):
    """Loses the answer of the first change that it asks for."""

    lost = False

    def swap(self, key: str, value: str, revision: int) -> bool:
        changed = super().swap(key, value, revision)
        if not self.lost:
            self.lost = True
            return super().swap(key, value, revision)  # as _call does at the next endpoint
        return changed


def test_an_answer_that_is_lost(plain: Etcd) -> None:
    me = Holder(machine="red", boot="b")
    for change, result in (
        (lambda mine: mine.acquire(me), None),
        (lambda mine: mine.release("red"), True),
        (lambda mine: mine.resize(5), 1),
    ):
        mine = lock(plain)
        mine._client = Lossy(Access(endpoints=(plain.endpoint,)))
        assert change(mine) == result
    assert plain.value(KEY) == {"max": 5, "holders": []}


def test_others_that_never_stop(plain: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reboot_lock.random, "uniform", lambda *_: 0)
    monkeypatch.setattr(Client, "swap", lambda *_: False)
    with pytest.raises(EtcdError) as caught:
        lock(plain).acquire(Holder(machine="red", boot="b"))
    assert caught.value.message == f"cannot change '{KEY}' in etcd: others do, again and again"


def test_what_somebody_else_has_put_there(
    plain: Etcd, operator: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    plain.ctl("put", KEY, "hello")
    for words in (["status"], ["release"], ["release", "red"], ["set-max", "2"]):
        assert operator(*words) == 4
        assert capsys.readouterr().err == (
            f"immucore: cannot read '{KEY}' in etcd: it is no JSON\n"
            f"  hint: when no machine is rebooting: etcdctl del {KEY}\n"
        )
    assert plain.ctl("get", "--print-value-only", KEY) == "hello\n"


def test_what_an_operator_sees(
    plain: Etcd, operator: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert operator("status") == 0
    assert capsys.readouterr().out == f"{KEY}: 0 of 1 slots taken\n"
    assert operator("set-max", "3") == 0
    assert capsys.readouterr().out == "slots: 3, before 1\n"
    lock(plain).acquire(Holder(machine="0123", boot="b", host="red", since="2026-11-28 12:00:00 UTC"))
    lock(plain).acquire(Holder(machine="4567", boot="b"))
    assert operator("status") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{KEY}: 2 of 3 slots taken",
        "0123  2026-11-28 12:00:00 UTC  red",
        "4567  since when is not known",
    ]
    assert operator("status", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["key"], shown["max"]) == (KEY, 3)
    assert [each["machine"] for each in shown["holders"]] == ["0123", "4567"]
    assert operator("release", "0123") == 0
    assert capsys.readouterr().out == "the slot of machine 0123 is given back\n"
    lock(plain).acquire(Holder(machine="operator", boot="b"))
    assert operator("release", "") == 2  # "$machine", with a variable that is empty
    assert "cannot give the slot of machine '' back: it has taken none" in capsys.readouterr().err
    assert operator("release") == 0
    assert [each["machine"] for each in plain.value(KEY)["holders"]] == ["4567"]
    assert operator("set-max", "0") == 0
    full = lock(plain).acquire(Holder(machine="red", boot="b"))
    assert full
    assert full.max == 0


def test_the_groups_are_apart(plain: Etcd) -> None:
    other = Lock(Access(endpoints=(plain.endpoint,), group="workers"))
    assert lock(plain).acquire(Holder(machine="red", boot="b")) is None
    assert other.acquire(Holder(machine="blue", boot="b")) is None
    assert [each["machine"] for each in plain.value("immucore/reboot-lock/workers")["holders"]] == ["blue"]


@pytest.fixture
def here(
    plain: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: Callable[..., int]
) -> Callable[[str], None]:
    """Make this process the machine `operator`, whose reboot is pending; give what sets its window."""
    (tmp_path / "bin").mkdir()
    machine = {"folder": tmp_path, "observer": tmp_path / "observer"}
    for name, text in (("systemctl", SYSTEMCTL.format(**machine)), ("systemd-run", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "machine-id").write_text("operator\n")
    monkeypatch.setitem(process.ENVIRONMENT, "PATH", f"{tmp_path / 'bin'}:{process.ENVIRONMENT['PATH']}")
    monkeypatch.setattr(reboot_unit, "PENDING", str(tmp_path / "run/reboot.json"))
    monkeypatch.setattr(reboot, "FIRST_PAUSE_SEC", 0.01)

    def window(when: str) -> None:
        with_window = {"etcd": {"endpoints": [plain.endpoint]}, **({"window": when} if when else {})}
        Path(settings.PATH).write_text(json.dumps(with_window))

    window("")
    assert commands.main(["reboot", "etcd-lock"]) == 0
    return window


OPEN, CLOSED = "*-*-* *:*/1d", "2199-01-01/1h"


def test_with_a_slot_it_reboots(
    here: Callable[[str], None], plain: Etcd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here(OPEN)
    assert commands.main(["reboot", "--pending"]) == 0
    assert (tmp_path / "observer").read_text() == "down operator\n"
    assert [each["machine"] for each in plain.value(KEY)["holders"]] == ["operator"]
    assert "rebooting: a slot of the reboot lock is taken\n" in capsys.readouterr().err


def test_it_waits_for_others_and_the_next_boot_gives_back(
    here: Callable[[str], None], plain: Etcd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock(plain).acquire(Holder(machine="red", boot="b"))
    threading.Timer(0.5, lambda: lock(plain).release("red")).start()
    assert commands.main(["reboot", "--pending"]) == 0
    told = capsys.readouterr().err
    assert "waiting: all slots of the reboot lock are taken (1 of 1, red since some time)" in told
    assert (tmp_path / "observer").read_text() == "down operator\n"

    assert commands.main(["reboot-lock", "release", "--after-boot"]) == 0  # it is the same boot still
    assert [each["machine"] for each in plain.value(KEY)["holders"]] == ["operator"]
    lock(plain).acquire(reboot_lock.this_machine().replace(boot="the one before"))
    assert commands.main(["reboot-lock", "release", "--after-boot"]) == 0
    assert "the slot of the reboot lock is given back" in capsys.readouterr().err
    assert plain.value(KEY)["holders"] == []


def test_a_slot_is_given_back_where_systemd_does_not_reboot(
    here: Callable[[str], None], plain: Etcd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin/systemctl"
    text = program.read_text()
    count = tmp_path / "count"
    refuse = f'[ "$1" != reboot ] || [ -e {count} ] || {{ touch {count}; echo not today; exit 1; }}'
    program.write_text(text.replace("#!/bin/sh\n", f"#!/bin/sh\n{refuse}\n"))
    assert commands.main(["reboot", "--pending"]) == 0
    assert [len(each["holders"]) for each in plain.history(KEY)] == [1, 0, 1]
    assert "waiting: cannot reboot this machine: systemctl: not today" in capsys.readouterr().err


def test_a_slot_is_not_kept_beyond_the_window(
    here: Callable[[str], None], plain: Etcd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    me = reboot_lock.this_machine()
    lock(plain).acquire(me)  # etcd's answer was lost, and the window has ended
    here(CLOSED)
    assert commands.main(["reboot", "--pending"]) == 0
    assert plain.value(KEY)["holders"] == []
    assert not (tmp_path / "observer").exists()
    assert "not rebooting: the window is closed" in capsys.readouterr().err
    lock(plain).acquire(
        me.replace(boot="an earlier one")
    )  # that is for the health of this boot to give back
    assert commands.main(["reboot", "--pending"]) == 0
    assert [each["boot"] for each in plain.value(KEY)["holders"]] == ["an earlier one"]


def test_what_is_given_up_gives_its_slot_back(
    here: Callable[[str], None], plain: Etcd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock(plain).acquire(reboot_lock.this_machine())
    program = tmp_path / "bin/systemctl"
    text = program.read_text()
    program.write_text(f"{text}echo stopping\n")  # it is too late: it goes down with its slot
    assert commands.main(["reboot", "off"]) == 0
    assert [each["machine"] for each in plain.value(KEY)["holders"]] == ["operator"]
    program.write_text(text)
    assert commands.main(["reboot", "etcd-lock"]) == 0
    assert commands.main(["reboot", "off"]) == 0
    assert plain.value(KEY)["holders"] == []
    assert "the reboot that was pending (etcd-lock) is given up" in capsys.readouterr().err


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """Give a server with TLS that asks for certificates and for passwords."""
    with etcd_server.running(tmp_path_factory.mktemp("etcd-tls"), tls=True) as server:
        users = [("fleet", "secret", "immucore/"), ("stranger", "secret", "elsewhere/")]
        server.only_users(users)
        yield server


Settings = dict[str, Any]


@pytest.fixture
def secured(guarded: Etcd, tmp_path: Path) -> Settings:
    """Give settings with which it answers."""
    assert guarded.certificates
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "password").chmod(0o600)
    cert, key = guarded.certificates.client
    return {
        "endpoints": [guarded.endpoint],
        "ca": str(guarded.certificates.ca),
        "cert": str(cert),
        "key": str(key),
        "user": "fleet",
        "password-file": str(tmp_path / "password"),
    }


def test_certificates_and_users(guarded: Etcd, secured: Settings) -> None:
    mine = Lock(etcd.access(secured))
    assert mine.acquire(Holder(machine="red", boot="b")) is None
    assert [each["machine"] for each in guarded.value(KEY)["holders"]] == ["red"]
    token = mine._client._token
    assert mine.look().holders
    assert mine._client._token == token
    guarded.kill()  # it forgets its tokens
    with pytest.raises(EtcdError, match="Connection refused"):
        mine.look()
    guarded.start()
    assert mine.release("red")
    assert mine._client._token != token


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user": "stranger"}, "etcdserver: permission denied (HTTP 403)"),
        ({"user": "nobody"}, "etcdserver: authentication failed, invalid user ID or password (HTTP 400)"),
        ({"user": None, "password-file": None}, "etcdserver: permission denied (HTTP 403)"),
        ({"cert": None, "key": None}, ""),  # an alert, or the connection ends before it is read
        ({"ca": None}, "unable to get local issuer certificate"),
        (
            {"cert": "named.crt", "key": "named.key"},
            "CommonName of client sending a request against gateway",
        ),
        ({"endpoints": "localhost"}, "Hostname mismatch, certificate is not valid for 'localhost'."),
        ({"endpoints": "http:"}, "Remote end closed connection without response"),
    ],
)
def test_what_the_server_refuses(guarded: Etcd, secured: Settings, change: Settings, reason: str) -> None:
    assert guarded.certificates
    changed = {**secured, **change}
    if change.get("cert"):
        changed |= {name: str(guarded.certificates.folder / change[name]) for name in ("cert", "key")}
    if change.get("endpoints") == "localhost":
        changed["endpoints"] = [guarded.endpoint.replace("127.0.0.1", "localhost")]
    if change.get("endpoints") == "http:":
        changed["endpoints"] = [guarded.endpoint.replace("https:", "http:")]
    with pytest.raises(EtcdError) as caught:
        Lock(etcd.access({key: value for key, value in changed.items() if value})).look()
    assert caught.value.message.startswith(f"cannot use etcd at {changed['endpoints'][0]}: ")
    assert reason in caught.value.message


def test_a_password_that_is_not_there(secured: Settings, tmp_path: Path) -> None:
    (tmp_path / "password").unlink()
    with pytest.raises(SettingsError) as caught:
        Lock(etcd.access(secured)).look()
    reason = f"cannot read '{tmp_path}/password': No such file or directory"
    assert caught.value.message == f"cannot use 'etcd' of '{settings.PATH}': {reason}"


def test_a_key_with_a_passphrase_and_one_of_another_certificate(
    guarded: Etcd, secured: Settings, tmp_path: Path
) -> None:
    assert guarded.certificates
    locked = tmp_path / "locked.key"
    words = ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", secured["key"], "-out", str(locked)]
    subprocess.run(words, check=True, capture_output=True)
    with pytest.raises(SettingsError, match=f"cannot read '.*' with '{locked}': it is encrypted$"):
        etcd.access({**secured, "key": str(locked)})
    with pytest.raises(SettingsError, match=r"key values mismatch$"):
        etcd.access({**secured, "key": str(guarded.certificates.named[1])})


def test_a_user_where_etcd_asks_for_none(plain: Etcd, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "password").chmod(0o600)
    who = {"user": "fleet", "password-file": str(tmp_path / "password")}
    with pytest.raises(EtcdError, match="authentication is not enabled"):
        Lock(etcd.access({"endpoints": [plain.endpoint], **who})).look()


def test_a_certificate_with_a_name_where_there_are_no_users(guarded: Etcd, secured: Settings) -> None:
    assert guarded.certificates
    cert, key = guarded.certificates.named
    named = {**secured, "cert": str(cert), "key": str(key)}
    guarded.ctl("auth", "disable")
    try:
        only = {name: named[name] for name in ("endpoints", "ca", "cert", "key")}
        assert Lock(etcd.access(only)).look().max == 1
    finally:
        guarded.root = ""
        guarded.ctl("auth", "enable")
        guarded.root = "root:root"
