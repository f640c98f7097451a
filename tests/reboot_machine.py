"""A machine of a fleet, as the test of the reboot lock runs it: it upgrades and reboots, again and again.

    python -m tests.reboot_machine FOLDER ROUNDS

It is one process, in which the real commands run, one after the other, as systemd would run them; a boot is
a new boot id. FOLDER has `machine-id` and `upgrade.yaml`. `systemctl` and `systemd-run` are programs that
the test puts into FOLDER/bin: the first writes `down <machine>` to the observer's file, which the machine
follows with `up <machine>` before it says that it is well.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from pathlib import Path

from immucore import process
from immucore.system import commands, reboot, reboot_lock, reboot_unit, settings


def note(observer: Path, line: str) -> None:
    """Add a line at the end of what all machines write."""
    file = os.open(observer, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def main(folder: Path, rounds: int) -> None:
    """Live for so many reboots."""
    name = (folder / "machine-id").read_text().strip()
    process.ENVIRONMENT["PATH"] = f"{folder / 'bin'}:{process.ENVIRONMENT['PATH']}"
    settings.PATH = str(folder / "upgrade.yaml")
    reboot.FELL_BACK = str(folder / "upgrade_failure")
    reboot.FIRST_PAUSE_SEC, reboot.LAST_PAUSE_SEC = 0.02, 0.1
    reboot_lock.MACHINE_ID = str(folder / "machine-id")
    reboot_lock.BOOT_ID = str(folder / "boot-id")
    reboot_unit.PENDING = str(folder / "run/reboot.json")
    observer = folder.parent / "observer"
    for number in range(rounds + 1):
        (folder / "boot-id").write_text(f"{uuid.uuid4()}\n")
        Path(reboot_unit.PENDING).unlink(missing_ok=True)  # /run is new
        note(observer, f"up {name}")
        assert commands.main(["reboot-lock", "release", "--after-boot"]) == 0
        if number == rounds:
            return
        assert commands.main(["reboot", "etcd-lock"]) == 0
        assert commands.main(["reboot", "--pending"]) == 0
        time.sleep(random.uniform(0, 0.2))  # noqa: S311


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
