"""The executor, with a kernel that breaks where it is told to."""

from __future__ import annotations

import errno

import pytest
from fakes import FakeKernel
from hypothesis import given
from hypothesis import strategies as st

from immucore import report
from immucore.errors import DeviceError, Interrupted, MakeshiftError, MountError
from immucore.execute import SUCCEEDED, Step, execute
from immucore.plan import (
    IMPORTANT,
    OPTIONAL,
    REQUIRED,
    Bind,
    Check,
    Extensions,
    Grow,
    Loop,
    MachineId,
    MakeDirectory,
    Missing,
    Mount,
    Operation,
    Overlay,
    Plan,
    Seed,
    Stage,
    TellBootLoader,
    WriteFile,
    is_below,
)


def mount(target: str, criticality: str = REQUIRED) -> Mount:
    return Mount(source="/dev/a", target=target, fstype="ext4", why="test", criticality=criticality)


def run(kernel: FakeKernel, *operations: Operation) -> list[Step]:
    record: list[Step] = []
    execute(Plan(operations=operations), kernel, record)
    return record


EVERY_KIND: tuple[tuple[Operation, str], ...] = (
    (Check(target="/dev/a", fstype="ext4", mode="force", why="x"), "check /dev/a ext4 force preen"),
    (Grow(source="/dev/a", target="/m", why="x"), "grow /dev/a /m"),
    (
        Mount(source="/dev/a", target="/m", fstype="ext4", options=("ro", "noatime"), why="x"),
        "mount /dev/a /m ext4 ro,noatime",
    ),
    (Loop(source="/i/a.img", target="/sysroot", why="x"), "loop /i/a.img /sysroot ro "),
    (TellBootLoader(target="/g", entry="fallback", why="x"), "tell_boot_loader /g fallback"),
    (Overlay(target="/sysroot/etc", backing="/run/o", why="x"), "overlay /sysroot/etc /run/o"),
    (Seed(source="/sysroot/etc", target="/s/etc.bind", why="x"), "seed /sysroot/etc /s/etc.bind"),
    (
        Seed(source="/sysroot/etc", target="/s/etc.bind", image="ab", why="x"),
        "seed /sysroot/etc /s/etc.bind ab",
    ),
    (MakeDirectory(target="/a", mode=0o700, why="x"), "make /a 700"),
    (MachineId(target="/a", source="/b", why="x"), "machine_id /a /b"),
    (
        Extensions(target="/run", source="/a", sets=("active", "common"), spared=("/etc",), why="x"),
        "extensions /run /a active,common /etc",
    ),
    (Bind(source="/s/etc.bind", target="/sysroot/etc", why="x"), "bind /s/etc.bind /sysroot/etc"),
    (WriteFile(target="/run/f", content="1", why="x"), "write /run/f 1"),
)


@pytest.mark.parametrize(("operation", "call"), EVERY_KIND)
def test_every_kind_is_one_call(operation: Operation, call: str) -> None:
    kernel = FakeKernel()
    (step,) = run(kernel, operation)
    assert kernel.calls == [call]
    assert (step.operation, step.outcome, step.reason, step.hint) == (operation, "done", "", "")


def test_no_kind_is_forgotten() -> None:
    """A step of a stage is done by stage_boot, in another process, and only recorded like an operation."""
    kinds = {type(operation) for operation, _ in EVERY_KIND} | {Missing, Stage}
    assert set(Operation.__subclasses__()) == kinds


def test_an_operation_without_a_call_is_a_bug() -> None:
    with pytest.raises(TypeError, match="no kernel call for Operation"):
        run(FakeKernel(), Operation(target="/x", why="test"))


def test_what_is_there_already_is_present() -> None:
    steps = run(FakeKernel(present=("/a",)), mount("/a"), mount("/a/b"))
    assert [step.outcome for step in steps] == ["present", "done"]


def test_a_failed_check_loses_the_mount_and_what_lies_below_it() -> None:
    kernel = FakeKernel(broken={"/dev/a": MountError("cannot repair '/dev/a': x", hint="type e2fsck")})
    check = Check(target="/dev/a", fstype="ext4", why="test", criticality=IMPORTANT)

    steps = run(kernel, check, mount("/a", IMPORTANT), mount("/a/b", IMPORTANT))

    assert kernel.calls == ["check /dev/a ext4 auto preen"]
    assert [step.outcome for step in steps] == ["degraded", "skipped", "skipped"]
    assert steps[1].reason == "cannot mount /dev/a on /a (ext4): /dev/a has failed its check"


def test_what_cannot_grow_is_there_nevertheless() -> None:
    kernel = FakeKernel(broken={"grow /a": errno.EPERM})
    grow = Grow(source="/dev/a", target="/a", why="test", criticality=OPTIONAL)

    steps = run(kernel, mount("/a"), grow, mount("/a/b"))
    execute(Plan(operations=(mount("/a/c"),)), kernel, steps)

    assert [step.outcome for step in steps] == ["done", "ignored", "done", "done"]
    assert steps[1].reason == "cannot grow /a to the size of /dev/a: Operation not permitted"


def test_what_is_there_in_part_loses_nothing_and_is_degraded() -> None:
    """Also where it is required: a full disk must not stop a boot."""
    kernel = FakeKernel(
        broken={"/a": MakeshiftError("cannot keep what changes in '/a': x", hint="free space")}
    )

    steps = run(kernel, mount("/a"), mount("/a/b"))
    execute(Plan(operations=(mount("/a/c"),)), kernel, steps)

    assert [step.outcome for step in steps] == ["makeshift", "done", "done"]
    assert report.degraded(steps) == ["/a: cannot keep what changes in '/a': x"]
    assert steps[0].hint == "free space"


def test_the_record_has_times() -> None:
    first, second = run(FakeKernel(), mount("/a"), mount("/b"))
    assert 0 < first.started_usec <= first.started_usec + first.took_usec <= second.started_usec
    assert second.took_usec >= 0


@pytest.mark.parametrize(("criticality", "outcome"), [(IMPORTANT, "degraded"), (OPTIONAL, "ignored")])
def test_the_boot_goes_on_without_what_is_not_required(criticality: str, outcome: str) -> None:
    kernel = FakeKernel(broken={"/a": errno.EIO})
    steps = run(kernel, mount("/a", criticality), mount("/b"))
    assert [step.outcome for step in steps] == [outcome, "done"]
    assert steps[0].reason == "cannot mount /dev/a on /a (ext4): Input/output error"
    assert steps[0].hint == "look at what the kernel says: dmesg | tail"


def test_what_is_required_stops_the_boot_and_its_siblings_are_done() -> None:
    kernel = FakeKernel(broken={"/a": errno.EIO})
    record: list[Step] = []
    with pytest.raises(MountError, match="cannot mount /dev/a on /a") as caught:
        execute(Plan(operations=(mount("/a"), mount("/b"), mount("/a/c"))), kernel, record)
    assert caught.value.exit_status == 4
    assert kernel.calls == ["mount /dev/a /a ext4 ", "mount /dev/a /b ext4 "]
    assert [(step.outcome, step.reason) for step in record] == [
        ("failed", caught.value.message),
        ("done", ""),
        ("failed", "cannot mount /dev/a on /a/c (ext4): /a is not there"),
    ]


def test_pauses_before_what_is_tried() -> None:
    paused: list[str] = []
    kernel = FakeKernel(broken={"/a": errno.EIO})
    plan = Plan(operations=(mount("/a", OPTIONAL), mount("/a/b", OPTIONAL), mount("/c")))
    execute(plan, kernel, [], lambda operation: paused.append(operation.target))
    assert paused == ["/a", "/c"]


def test_skips_what_lies_below_a_lost_mount() -> None:
    """No persistent partition: its binds must not hide the image's own directories."""
    kernel = FakeKernel(broken={"/sysroot/usr/local": errno.ENXIO})
    steps = run(
        kernel,
        mount("/sysroot/usr/local", OPTIONAL),
        Seed(
            source="/sysroot/home",
            target="/sysroot/usr/local/.state/home.bind",
            why="x",
            criticality=IMPORTANT,
        ),
        Bind(
            source="/sysroot/usr/local/.state/home.bind",
            target="/sysroot/home",
            why="x",
            criticality=IMPORTANT,
        ),
        Overlay(
            target="/sysroot/opt", backing="/sysroot/usr/local/.state/opt", why="x", criticality=IMPORTANT
        ),
        mount("/sysroot/usr/local-data"),
        mount("/sysroot/usr"),
    )
    assert kernel.calls == [
        "mount /dev/a /sysroot/usr/local ext4 ",
        "mount /dev/a /sysroot/usr/local-data ext4 ",
        "mount /dev/a /sysroot/usr ext4 ",
    ]
    assert [step.outcome for step in steps] == ["ignored", "skipped", "skipped", "skipped", "done", "done"]
    assert steps[1].reason.endswith(": /usr/local is not there")


def test_a_required_operation_below_a_lost_mount_stops_the_boot() -> None:
    """Without its writable /var half a system would be booted (contract §7)."""
    kernel = FakeKernel(broken={"/sysroot/oem": errno.EIO})
    record: list[Step] = []
    plan = (
        mount("/sysroot/oem", IMPORTANT),
        Overlay(target="/sysroot/var", backing="/sysroot/oem/v", why="x"),
    )
    with pytest.raises(MountError, match=r"cannot overlay on /sysroot/var .*: /oem is not there"):
        execute(Plan(operations=plan), kernel, record)
    assert [step.outcome for step in record] == ["degraded", "failed"]


def test_what_is_skipped_is_lost_too() -> None:
    kernel = FakeKernel(broken={"/a": errno.EIO})
    bind = Bind(source="/a/b", target="/c", why="x", criticality=IMPORTANT)
    steps = run(kernel, mount("/a", OPTIONAL), bind, mount("/c/d", OPTIONAL))
    assert [step.outcome for step in steps] == ["ignored", "skipped", "skipped"]
    assert steps[2].reason.endswith("/c is not there")


def test_lost_in_an_earlier_plan_is_lost_in_this_one() -> None:
    record: list[Step] = []
    execute(Plan(operations=(mount("/a", IMPORTANT),)), FakeKernel(broken={"/a": errno.EIO}), record)
    kernel = FakeKernel()
    execute(Plan(operations=(mount("/a/b", OPTIONAL), mount("/c"))), kernel, record)
    assert kernel.calls == ["mount /dev/a /c ext4 "]
    assert [step.outcome for step in record] == ["degraded", "skipped", "done"]


@pytest.mark.parametrize(("criticality", "outcome"), [(IMPORTANT, "degraded"), (OPTIONAL, "ignored")])
def test_a_missing_device_is_told_and_nothing_is_called(criticality: str, outcome: str) -> None:
    kernel = FakeKernel()
    missing = Missing(
        spec="LABEL=X", target="/x", reason="cannot find X", hint="add it", why="x", criticality=criticality
    )
    steps = run(kernel, missing, mount("/x/y", OPTIONAL))
    assert kernel.calls == []
    assert [step.outcome for step in steps] == [outcome, "skipped"]
    assert steps[0].reason == "cannot find X"
    assert steps[1].reason.endswith("/x is not there")
    assert steps[0].hint == "add it"


def test_a_required_missing_device_stops_the_boot() -> None:
    with pytest.raises(DeviceError, match="cannot find X") as caught:
        run(
            FakeKernel(),
            Missing(spec="LABEL=X", target="/x", reason="cannot find X", hint="add it", why="x"),
        )
    assert (caught.value.exit_status, caught.value.hint) == (3, "add it")


@pytest.mark.parametrize("criticality", [REQUIRED, IMPORTANT, OPTIONAL])
def test_an_interruption_stops_the_boot_whatever_it_interrupts(criticality: str) -> None:
    stopped = Interrupted("stopped by signal 15 in the middle of the boot")
    kernel = FakeKernel(broken={"/a": stopped})
    record: list[Step] = []
    with pytest.raises(Interrupted):
        execute(Plan(operations=(mount("/a", criticality), mount("/b"))), kernel, record)
    assert [step.outcome for step in record] == ["failed"]


def test_an_error_of_ours_keeps_its_words() -> None:
    ours = MountError("cannot find the image '/i'", hint="boot another slot")
    (step,) = run(FakeKernel(broken={"/a": ours}), mount("/a", IMPORTANT))
    assert (step.outcome, step.reason, step.hint) == ("degraded", ours.message, ours.hint)


@pytest.mark.parametrize(
    ("number", "words", "hint"),
    [
        (
            errno.EROFS,
            "Read-only file system",
            "create /etc/x in the image, or list its parent in RW_PATHS",
        ),
        (errno.ENOSPC, "No space left on device", "free space on the file system that holds it"),
        (
            errno.ENODEV,
            "No such device",
            "the kernel or the initramfs lacks this file system: compare /proc/filesystems",
        ),
        (errno.EUCLEAN, "Structure needs cleaning", "the file system is damaged: check it with fsck"),
        (errno.EINVAL, "Invalid argument", "look at what the kernel says: dmesg | tail"),
    ],
)
def test_the_kernels_words_and_what_to_do(number: int, words: str, hint: str) -> None:
    (step,) = run(FakeKernel(broken={"/sysroot/etc/x": number}), mount("/sysroot/etc/x", IMPORTANT))
    assert step.reason == f"cannot mount /dev/a on /sysroot/etc/x (ext4): {words}"
    assert step.hint == hint


def test_a_path_with_braces_is_no_format() -> None:
    kernel = FakeKernel(broken={"/sysroot/{x}": errno.EROFS})
    (step,) = run(kernel, mount("/sysroot/{x}", IMPORTANT))
    assert step.hint == "create /{x} in the image, or list its parent in RW_PATHS"


TARGETS = st.sampled_from(["/a", "/a/b", "/a/b/c", "/ab", "/d", "/d/e"])


@given(
    operations=st.lists(st.builds(mount, TARGETS, st.sampled_from([IMPORTANT, OPTIONAL])), max_size=8),
    broken=st.dictionaries(TARGETS, st.sampled_from([errno.EIO, errno.ENOENT])),
)
def test_a_step_each_and_nothing_below_what_is_lost(operations: list[Mount], broken: dict[str, int]) -> None:
    kernel = FakeKernel(broken=broken)
    steps = run(kernel, *operations)
    assert [step.operation for step in steps] == operations
    lost: list[str] = []
    for step in steps:
        below = any(is_below(step.operation.target, path) for path in lost)
        assert (step.outcome == "skipped") == below
        assert bool(step.reason) == (step.outcome not in SUCCEEDED)
        if step.outcome not in SUCCEEDED:
            lost.append(step.operation.target)
    assert len(kernel.calls) == sum(step.outcome != "skipped" for step in steps)
