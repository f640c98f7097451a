"""One of twenty entries of a layout fails, whatever the kernel says: the others are done all the same.

tests/integration/test_siblings.py has the same with the real kernel.
"""

from __future__ import annotations

import errno
import os

import pytest
from fakes import FakeKernel, image_of, partition

from immucore import cmdline, report
from immucore.devices import Devices
from immucore.errors import MountError
from immucore.execute import Step, execute
from immucore.layouts import cos
from immucore.plan import is_below

ASKED = cmdline.parse(b"root=LABEL=COS_STATE cos-img/filename=/cOS/active.img")
VOLUMES = {"/usr/local": "COS_PERSISTENT", "/data": "A", "/data/b": "B", "/var/lib/c": "C", "/spare": "D"}
NOFAIL = "/spare"
EPHEMERAL = ("/etc", "/home", "/opt", "/root", "/srv", "/var", "/var/log")
PERSISTENT = (
    "/etc/one",
    "/etc/two",
    "/home/one",
    "/opt/one",
    "/root/one",
    "/srv/one",
    "/var/one",
    "/var/two",
)
ENTRIES = (*VOLUMES, *EPHEMERAL, *PERSISTENT)
REQUIRED = ({*VOLUMES} - {NOFAIL}) | {"/etc", "/var"}
LABELS = ("COS_STATE", "COS_OEM", *VOLUMES.values())
DEVICES = Devices(all=tuple(partition(number, label) for number, label in enumerate(LABELS, 1)))


def layout(*, bind: bool) -> dict[str, str]:
    volumes = (f"LABEL={label}:{path}{':nofail' * (path == NOFAIL)}" for path, label in VOLUMES.items())
    return {
        "VOLUMES": " ".join(volumes),
        "RW_PATHS": " ".join(EPHEMERAL),
        "PERSISTENT_STATE_PATHS": " ".join(PERSISTENT),
        "PERSISTENT_STATE_BIND": str(bind).lower(),
    }


@pytest.mark.parametrize("bind", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.EINVAL])
@pytest.mark.parametrize("broken", ENTRIES)
def test_the_others_are_done(broken: str, number: int, bind: bool) -> None:
    assert len({*ENTRIES}) == 20
    plan = cos.state(ASKED, DEVICES, image_of(layout(bind=bind)))
    kernel = FakeKernel(broken={f"/sysroot{broken}": number})
    record: list[Step] = []
    error: MountError | None = None
    try:
        execute(plan, kernel, record)
    except MountError as failure:
        error = failure

    lost = {path for path in ENTRIES if is_below(path, broken)}
    lost |= {*PERSISTENT} if broken == "/usr/local" else set()
    done = {step.operation.target for step in record if step.outcome == "done"}
    assert {path for path in ENTRIES if f"/sysroot{path}" not in done} == lost
    assert [step.operation for step in record] == [*plan.operations]
    failing = next(step for step in record if step.operation.target == f"/sysroot{broken}")
    assert failing.reason == f"cannot {failing.operation}: {os.strerror(number)}"
    assert failing.outcome == (
        "failed" if broken in REQUIRED else "ignored" if broken == NOFAIL else "degraded"
    )
    assert (error is not None) == (broken in REQUIRED)
    if error is not None:
        assert (error.message, error.exit_status) == (failing.reason, 4)
    told = [reason.partition(": ")[0] for reason in report.degraded(record)]
    assert {*told} >= {*PERSISTENT} & lost - {broken}
    assert (broken in told) == (failing.outcome == "degraded")
