"""Waiting for devices by uevents.

Imported only when something is missing: pyroute2 costs as much as four boots.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time

from pyroute2.netlink.uevent import MONITOR_GROUP_KERNEL, MONITOR_GROUP_UDEV, UeventSocket

from immucore import assemble, fsck, observe
from immucore.devices import Device, Devices, Wanted, describe

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from immucore.log import Log

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; a storm of events must not overrun the buffer
RCVBUF_BYTES = 16 << 20
LOOK_SEC = 1.0  # a look without an event, in case one was lost; contract §6 forbids a shorter one
SAY_SEC = 10.0
ELSEWHERE_SEC = 10.0  # for a file system whose partition is there, and cannot be read
GRACE_SEC = 10  # from the start of the initramfs: what is there is taken when nothing better has come
SETTLE_SEC = 3.0  # while wanted devices appear, others of the same disk are about to


def missing(wanted: tuple[Wanted, ...], devices: Devices) -> tuple[Wanted, ...]:
    """List what no device answers to; several candidates are an answer."""
    return tuple(each for each in wanted if not devices.answers(each))


def for_devices(wanted: tuple[Wanted, ...], log: Log, repair: str, boot: str = "auto") -> Devices:
    """Wait until the answer to each wanted device is settled or its time is over; return the last look.

    Subscribes first and then looks, so that no event falls between. Events only wake: what counts is the
    look. A time that is over is prolonged while other wanted devices appear. An answer that may change still
    (Devices.unsettled) is waited on for GRACE_SEC only. A superblock that is so broken that a wanted file
    system is not seen is repaired as `repair` (preen, yes or no) allows. `boot` is as for observe.devices().
    """
    started = time.monotonic()
    origin = initramfs_start(started)
    told = -SAY_SEC  # the first time at once
    # However late it is, udev gets the time to look at the disk that has brought us here.
    deadlines = {each: _deadline(each.timeout_sec, origin, started) for each in wanted}
    grace, taken = _deadline(GRACE_SEC, origin, started), dict[Wanted, float]()
    events = UeventSocket()
    events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RCVBUF_BYTES)
    events.bind(groups=MONITOR_GROUP_KERNEL | MONITOR_GROUP_UDEV)
    poll = select.poll()
    poll.register(events.fileno(), select.POLLIN)
    absent = wanted
    broken: dict[str, str] = {}
    assembler = assemble.Assembler(log)
    try:
        while True:
            devices = observe.devices(boot)
            still = tuple(each for each in absent if devices.unsettled(each))
            now = time.monotonic()
            if len(still) < len(absent):
                deadlines = {each: max(deadlines[each], now + SETTLE_SEC) for each in still}
            absent = still
            for each in absent:
                if devices.answers(each):
                    taken.setdefault(each, max(grace, now + SETTLE_SEC))
                else:
                    taken.pop(each, None)
            ends = {each: min(deadlines[each], taken.get(each, deadlines[each])) for each in absent}
            pending = [each for each in absent if ends[each] > now]
            if not pending:
                return devices.replace(broken=tuple(broken.items()))  # type: ignore[no-any-return]
            tried = fsck.rescue(pending, devices, repair, log)
            if tried:
                now = time.monotonic()
                broken |= {spec: failure for spec, failure in tried.items() if failure}
                deadlines = {
                    each: _after_rescue(deadline, now, tried.get(each.spec))
                    for each, deadline in deadlines.items()
                }
                continue
            assembler.look(devices, tuple(pending), now)
            if now - told >= SAY_SEC:
                log.info(_progress(pending, ends, devices, now))
                told = now
            until = min(now + LOOK_SEC, *(ends[each] for each in pending))
            poll.poll(max(0.0, until - now) * 1000 + 1)
            _drain(events)
    finally:
        assembler.close()
        events.close()


def _after_rescue(deadline: float, now: float, failure: str | None) -> float:
    """Give udev the time to look again at what was repaired; what cannot be repaired is hardly elsewhere."""
    if failure:
        return min(deadline, now + ELSEWHERE_SEC)
    return max(deadline, now + SETTLE_SEC)


def _deadline(timeout_sec: int, origin: float, now: float) -> float:
    if not timeout_sec:
        return float("inf")
    return max(origin + timeout_sec, now + min(SETTLE_SEC, timeout_sec))


def initramfs_start(now: float) -> float:
    """Tell when the initramfs started, by CLOCK_MONOTONIC.

    When the kernel said that it runs init; else `now`.
    """
    try:
        kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return now
    try:
        while True:
            line = os.read(kmsg, 8192)
            if not line:
                return now
            prefix, _, message = line.partition(b";")
            if message.startswith(b"Run /") and b" as init process" in message:
                return int(prefix.split(b",")[2]) / 1e6
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EPIPE):
            raise
        return now
    finally:
        os.close(kmsg)


def _drain(events: UeventSocket) -> None:
    """Take every event that has come. ENOBUFS, events lost, means look again, which is done anyway."""
    while True:
        try:
            events.asyncore.recv(65536, socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                continue
            if error.errno in (errno.EAGAIN, errno.EINTR):
                return
            raise


def _progress(pending: list[Wanted], ends: dict[Wanted, float], devices: Devices, now: float) -> str:
    parts = []
    for each in pending:
        left = ends[each] - now
        time_left = "for ever" if left == float("inf") else f"{left:.0f} s more"
        why = f", because {devices.unsettled(each)}" if devices.answers(each) else ""
        parts.append(f"{describe(each.spec)} ({time_left}{why})")
    seen = ", ".join(f"{device.path}{_named(device)}" for device in devices.all) or "no disk at all"
    return f"waiting for {' and '.join(parts)}; seen: {seen}"


def _named(device: Device) -> str:
    return f" {device.label}" if device.label else f" ({device.fstype})" if device.fstype else ""
