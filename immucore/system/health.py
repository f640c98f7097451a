"""The health of a boot: what immucore-health.service does, from early on.

A boot has until its deadline to be healthy: boot-complete.target, the mounts of the plan, all checks. Then
its image is good and has all its tries again. One that is not starts the machine anew; the boot loader has
taken a try, and takes another slot when there is none left.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from immucore import bootcount, log, process
from immucore.bootcount import BAD, COUNTED, TRIES
from immucore.errors import ImmucoreError
from immucore.system import boot_state, booted, health_checks, health_notice, slots
from immucore.system.boot_state import MISSING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from immucore.log import Log
    from immucore.system.boot_state import BootState
    from immucore.system.health_checks import Settings

WAIT_SEC, AGAIN_SEC = 2.0, 10.0  # until the target is looked at again, until checks are run again
LATE_SEC = 60.0  # until all of that is looked at again behind the deadline of a boot that is not counted
WARNING_SEC = 60.0  # how long before a restart who sits at a console is told
# How the machine is restarted, and how long that may take before the next way is tried.
RESTARTS = (
    (("systemctl", "reboot"), 120.0),
    (("systemctl", "reboot", "--force"), 60.0),
    (("systemctl", "reboot", "--force", "--force"), 60.0),
)
_SYSTEMCTL_SEC = 30.0


def main() -> int:
    """Judge this boot, however long that takes."""
    state, log_ = boot_state.read(), log.start()
    if not state.mode:
        log_.info("there is nothing to judge: this system was not booted from an image")
        return 0
    settings, problems = health_checks.configured(state.root)
    for problem in problems:
        log_.warning(problem)
    supervisor = Supervisor(state, settings, log_)
    supervisor.prepare()
    if supervisor.wait():
        supervisor.approve()
    else:
        supervisor.restart()
    return 0


class Supervisor:
    """Waits for a boot to be healthy, and says what becomes of it."""

    def __init__(self, state: BootState, settings: Settings, log_: Log) -> None:
        self._state, self._settings, self._log = state, settings, log_
        self._reasons: list[str] = []
        self._warned = self._late = False

    def prepare(self) -> None:
        """Repair the environment block, and tell of a fallback and of images that are bad."""
        environment = self._state.environment
        if problem := environment.problem:
            self._log.warning(f"boots were not counted: {environment.path}: {problem}")
        self._try(lambda: environment.update(self._tidied))
        self._greet(console=True)

    def _tidied(self, values: dict[str, str]) -> dict[str, str]:
        """Forget images that are nowhere any more, when there are many: the block has 1024 bytes."""
        counted = [name for name in values if name.startswith(slots.TRIES_PREFIX)]
        found = self._slots(values) if len(counted) > TRIES else {}
        if not found or any(slot.problem for slot in found.values()):  # nobody knows which ones are here
            return values
        return bootcount.forgotten(values, [slot.image_id or name for name, slot in found.items()])

    def _slots(self, values: dict[str, str]) -> dict[str, slots.Slot]:
        """Look at the slots where their partition is mounted anyway, and where that is possible."""
        found: dict[str, slots.Slot] = {}
        directory = f"{booted.HOLDER}/{slots.DIRECTORY}"
        if self._state.mode in COUNTED:
            self._try(lambda: found.update(slots.survey(directory, values)))
        return found

    def _greet(self, *, console: bool = False) -> None:
        values = self._state.environment.read()
        found = self._slots(values)
        states = {name: slot.state if slot.whole else MISSING for name, slot in found.items()}
        reason = boot_state.reason(self._state, states)
        told = [each for each in (health_notice.fell_back(self._state, reason),) if each]
        told += [self._bad(slot) for name, slot in found.items() if states[name] == BAD]
        for line in told if console else ():
            self._log.warning(line)
            health_notice.to_consoles(line)
        self._try(lambda: health_notice.mark_fallback(self._state, reason))
        self._try(lambda: health_notice.greet(told))

    def _bad(self, slot: slots.Slot) -> str:
        """Say what it means for a slot that its image has no try left: the one that runs is still judged."""
        image = f"{slot.name} ({slot.image_id or 'no id'})"
        if slot.counted_as == self._state.counted_as and not slot.problem:
            return f"{image} has its last try: it is not booted again if this boot comes to no good health"
        return slot.problem or f"{image} is bad and is not booted again"

    def wait(self) -> bool:
        """Look until this boot is healthy; False at its deadline, if that restarts the machine."""
        while True:
            left_sec = self._settings.deadline - time.monotonic()
            reasons = self._unhealthy(max(left_sec, 1.0))
            if not reasons:
                return True
            self._tell(reasons)
            left_sec = self._settings.deadline - time.monotonic()
            if left_sec <= 0 and self._is_over():
                return False
            self._warn(left_sec)
            if self._late:
                time.sleep(LATE_SEC)
            else:
                waits = reasons[0].startswith(health_checks.TARGET)
                time.sleep(min(WAIT_SEC if waits else AGAIN_SEC, left_sec))

    def _unhealthy(self, left_sec: float) -> list[str]:
        """Say why this boot is not healthy."""
        if reason := health_checks.unreached():
            return [reason]
        reasons = health_checks.unmounted(self._state.root) if self._state.planned else []
        for check in health_checks.checks(self._state.root):
            limit_sec = self._settings.check_timeout
            if self._state.restarts:
                limit_sec = min(limit_sec, left_sec)
            reasons += filter(None, [health_checks.failure(check, limit_sec)])
        return reasons

    def _tell(self, reasons: list[str]) -> None:
        if reasons != self._reasons:
            self._reasons = reasons
            self._try(lambda: health_notice.write(health_notice.WAITING, reasons))
            for reason in reasons:
                self._log.info(f"not healthy yet: {reason}")

    def _is_over(self) -> bool:
        """Say once that the deadline has passed; whether the machine is to be restarted for that."""
        if not self._late:
            self._late = True
            after = (
                f"no health within {self._settings.deadline:.0f} s of the start: {'; '.join(self._reasons)}"
            )
            if self._state.restarts:
                self._log.error(f"{after}. The machine restarts.")
                health_notice.to_consoles(f"{after}. The machine restarts.")
            else:
                self._log.error(f"{after}. The machine is not restarted for that: this boot is not counted.")
        return self._state.restarts

    def _warn(self, left_sec: float) -> None:
        if self._state.restarts and not self._warned and left_sec <= WARNING_SEC:
            self._warned = True
            reasons = "; ".join(self._reasons)
            then = f"The machine restarts in {left_sec:.0f} s. To stop that: systemctl stop immucore-health"
            health_notice.to_consoles(f"this boot is not healthy: {reasons}. {then}")

    def approve(self) -> None:
        """Give the image that runs all its tries, and the reboot lock back."""
        self._state = boot_state.read()  # images may have been moved since
        image_id = self._state.counted_as
        if image_id:
            verdict = bootcount.verdict(bootcount.armed(image_id))
            self._try(
                lambda: self._state.environment.update(lambda values: bootcount.written(values, verdict))
            )
        took_sec = time.monotonic()
        self._log.info(
            f"healthy {took_sec:.0f} s after the start: {self._state.mode} ({image_id or 'not counted'})"
        )
        self._try(lambda: health_notice.write(health_notice.GOOD))
        self._greet()
        from immucore.system import reboot

        reboot.release()

    def restart(self, ways: Iterable[tuple[Sequence[str], float]] = RESTARTS) -> None:
        """Restart the machine, whatever it takes."""
        self._try(lambda: health_notice.write(health_notice.NONE, self._reasons))
        for argv, patience_sec in ways:
            try:
                process.run(argv, timeout_sec=_SYSTEMCTL_SEC)
            except OSError as error:
                self._log.error(f"{argv[0]}: {error.strerror}")
            time.sleep(patience_sec)  # a machine that goes down ends this

    def _try(self, do: Callable[[], None]) -> None:
        """Do what must not keep a boot from being judged."""
        try:
            do()
        except ImmucoreError as error:
            self._log.error(error.message)
        except OSError as error:
            self._log.error(str(error))
