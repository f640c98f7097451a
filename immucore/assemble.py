"""Assembling what wanted devices are inside of: LUKS containers, LVM volume groups, md arrays.

Imported only by a boot that waits, when its first look has missed something.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.devices import Devices, Wanted
    from immucore.log import Log


class Assembler:
    """What has been started in one wait to bring devices that were not there.

    Nothing here blocks: programs run beside the wait, and what they bring is found by its next look.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def look(self, devices: Devices, wanted: tuple[Wanted, ...], now: float) -> None:
        """Start what may bring `wanted`, which no device of `devices` answers to.

        `now` is CLOCK_MONOTONIC in seconds, as for every call. To be called after each look, at least once a
        second: it also tells how the programs have ended.
        """

    def close(self) -> None:
        """End what still asks for a passphrase; call it when the wait is over, however it ends."""
