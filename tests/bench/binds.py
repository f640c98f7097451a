"""Plan and execute N bind paths, and print the microseconds of each part.

Run by bench.py in a mount namespace.

The whole way of a boot's second half: the layout's text, the plan, the executor, the record.
"""

from __future__ import annotations

import sys
import time

from immucore import cmdline, observe, report
from immucore.devices import Device, Devices
from immucore.execute import Step, execute
from immucore.layouts import cos
from immucore.linux import Kernel
from immucore.plan import Bind, Plan, Seed


def main(root: str, state: str, many: int) -> None:
    """Bind `many` directories of `root` from `state`, a directory of the same tmpfs."""
    paths = [f"/data/{number}" for number in range(many)]
    layout = f'VOLUMES="LABEL=A:/usr/local"\nRW_PATHS=\nPERSISTENT_STATE_PATHS="{" ".join(paths)}"\n'
    layout += "PERSISTENT_STATE_BIND=true\n"
    with open(f"{root}/etc/cos/cos-layout.env", "w", encoding="ascii") as file:
        file.write(layout)
    devices = Devices(
        all=tuple(
            Device(path=f"/dev/{name}", label=label, fstype="ext4", uuid=label, disks=("/dev/x",))
            for name, label in (("x1", "COS_STATE"), ("x2", "A"))
        )
    )
    asked = cmdline.parse(b"root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img")
    kernel = Kernel(root=root)

    started = time.monotonic_ns()
    image = observe.image(root, run="/nowhere")
    image = image.replace(links=observe.links(root, cos.listed_paths(asked, image)))
    plan = cos.state(asked, devices, image)
    planned = time.monotonic_ns()
    work = Plan(operations=tuple(moved(each, root, state) for each in plan if isinstance(each, Seed | Bind)))
    record: list[Step] = []
    begun = time.monotonic_ns()
    execute(work, kernel, record)
    executed = time.monotonic_ns()
    report.json(report.steps(record))
    ended = time.monotonic_ns()
    assert len(record) == 2 * many
    assert all(step.outcome == "done" for step in record)
    print((planned - started) // 1000, (executed - begun) // 1000, (ended - executed) // 1000)


def moved(operation: Seed | Bind, root: str, state: str) -> Seed | Bind:
    """Give the operation on the benchmark's directories instead of those of a boot."""

    def place(path: str) -> str:
        kept = "/sysroot/usr/local/.state"
        return state + path[len(kept) :] if path.startswith(kept) else root + path[len("/sysroot") :]

    where = {"source": place(operation.source), "target": place(operation.target)}
    return type(operation)(why=operation.why, **where)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
