"""The boot: observe, plan, execute, record. What was done is recorded whatever happens."""

from __future__ import annotations

# The signal module imports enum, which would cost a boot 4 ms; this is what it wraps.
import _signal
import faulthandler
import os
import time

from immucore import cmdline, ending, fstab, layouts, linux, log, observe, report
from immucore.devices import Devices
from immucore.errors import (
    AmbiguousError,
    CmdlineError,
    DeviceError,
    ImmucoreError,
    Interrupted,
    KernelMismatchError,
    LayoutError,
    MountError,
)
from immucore.execute import SUCCEEDED, Step, execute
from immucore.plan import SYSROOT, Bind, Loop, Mount, Operation, Overlay, Plan, WriteFile, as_booted

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from types import ModuleType

    from immucore.cmdline import Cmdline
    from immucore.devices import Wanted
    from immucore.image import Image

FSTAB = "/etc/fstab"
INITRD_RELEASE = "/etc/initrd-release"  # what tells an initramfs from a system: os-release(5)
REFUSAL = f"""\
immucore: cannot boot a system that is running: there is no {INITRD_RELEASE}
  hint: `immucore plan` lists what a boot does, and changes nothing
"""
OUR_FSTAB = f"{report.DIRECTORY}/fstab"


class Boot:
    """One run of the agent, and what has become of it so far."""

    def __init__(self) -> None:
        self.started_usec = time.monotonic_ns() // 1000
        self.log = log.start()
        self.kernel = linux.Kernel(log=self.log)
        self.cmdline = cmdline.Cmdline()
        self.slot = self.cmdline  # the same, or what is booted instead
        self.mode = ""
        self.failures: list[report.Failure] = []  # of the slots that could not be booted
        self.next_entry = ""  # what the boot loader has been told to boot, because this boot cannot
        self.devices = Devices()
        self.plan = Plan()
        self.record: list[Step] = []
        self.earlier: list[Step] = []  # of the slots that could not be booted
        self.waits: list[report.Wait] = []
        self.given_up: set[str] = set()  # waited for in vain: no other slot waits for it once more
        self.early: list[str] = []  # sentinels that are there for the stages, before the boot has succeeded
        self.layouts: dict[str, str] = {}  # the layout files in /run, as they were before the stages
        self.running = True

    def interrupted(self, number: int, _frame: object) -> None:
        """Stop in the middle, as a signal handler: a boot that is half done must not go on."""
        if self.running:
            raise Interrupted(
                f"stopped by signal {number} in the middle of the boot",
                hint="see who stopped immucore.service: journalctl -b",
            )

    def run(self) -> None:
        """Bring the machine from its command line to a root that can be switched to.

        Raises ImmucoreError.
        """
        try:
            self._run()
        except BaseException:
            self._withdraw_sentinels()
            raise
        finally:
            self.running = False

    def _run(self) -> None:
        with open("/proc/cmdline", "rb") as file:
            line = file.read()
        self.slot = self.cmdline = cmdline.parse(line)
        self.log.debug_wanted = self.cmdline.debug
        self.log.debug(f"command line: {cmdline.redacted(line)}")
        shown = self.cmdline.replace(root=cmdline.shown_root(self.cmdline.root), stages=())
        self.log.debug(f"parsed: {shown}")
        if not (self.cmdline.engaged or self.cmdline.bystander):
            self.log.info("nothing to do: the kernel command line names no image (cos-img/filename=)")
            return
        layout = layouts.select(self.cmdline)
        try:
            self.mode = layout.mode(self.cmdline)
        except CmdlineError as error:
            if not self.cmdline.bystander:
                raise
            self.log.warning(f"{error.message}: the agent is switched off, and no mode is written")
            return
        if self.cmdline.engaged:
            self._mount(layout, self.cmdline)
        self._do(layout.sentinels(self.slot))

    def _mount(self, layout: ModuleType, asked: Cmdline) -> None:
        self.slot, state = self._first_that_boots(layout, layout.attempts(asked))
        self._do(state)
        done = [step.operation for step in self.record if step.outcome in SUCCEEDED]
        # Read once more: where /etc is persistent, the user's lines are in what is there now.
        self._do(fstab_plan(done, observe.image_fstab(SYSROOT), asked))
        if self.slot.instead_of:
            self._do(layout.fell_back(self.slot, report.why_not(self.failures)))
        self._stage("initramfs", layout, self.slot)

    def _first_that_boots(self, layout: ModuleType, attempts: tuple[Cmdline, ...]) -> tuple[Cmdline, Plan]:
        """Mount the root of the first slot that has one and whose layout can be read; plan its state.

        Raises the error of the slot that was asked for, with a word about the others.
        """
        for slot in attempts:
            try:
                self._do(layout.root(slot, self._devices(layout.root_devices(slot))))
                self._stage("rootfs", layout, slot)
                image = image_of(layout, slot, SYSROOT)
                devices = self._devices(layout.state_devices(slot, image))
                return slot, layout.state(slot, devices, image)
            except (CmdlineError, Interrupted):
                raise
            except (DeviceError, LayoutError, MountError, OSError) as error:
                failure = from_kernel(error) if isinstance(error, OSError) else error
                self.failures.append(report.Failure(mode=layout.mode(slot), error=failure))
                self.log.error(f"cannot boot {layout.mode(slot)}: {failure.message}")
                if isinstance(failure, LayoutError):  # somebody corrects what a stage has written of it
                    self._put_back(report.stage_marker("rootfs"), "")
                if len(attempts) > 1:
                    self.take_back()
                if isinstance(failure, AmbiguousError):
                    break  # a guess is no better in another slot
        self._tell_boot_loader(layout)
        raise report.together(self.failures)

    def _stage(self, name: str, layout: ModuleType, slot: Cmdline) -> None:
        """Do a cloud-init stage, where there are files of any, or words on the command line."""
        if slot.safe:
            return
        directories = observe.STAGES[name]
        # Words for a stage of the booted system are its agent's; those that are none have to be named.
        words = tuple(each for each in slot.stages if cmdline.stage_of(each[0]) in (name, ""))
        try:
            wanted = bool(words or observe.stage_files(SYSROOT, directories))
        except OSError:
            wanted = True  # the stage will meet it too, and tell
        if not wanted:
            return
        from immucore import stage_boot  # imports PyYAML and half the library

        # Everybody's files ask for them: [ -f /run/cos/recovery_mode ]. A boot that fails takes them back.
        try:
            for each in layout.sentinels(slot):
                self.early.append(each.target)
                self.kernel.write_file(each.target, each.content)
            if name == "rootfs":
                self.layouts = {path: observe.whole(path) for path in observe.RUN_LAYOUTS}
        except OSError as error:
            stage_boot.leave_out(self, name, error)
            return
        key = f"{layout.mode(slot)} {observe.identity(*layout.image_file(slot))}"
        state = layout.root_devices(slot)[0]
        stage_boot.run(
            self, stage_boot.Asked(stage=name, directories=directories, words=words, state=state, key=key)
        )
        if name == "rootfs" and self.devices.all:
            self.devices = observe.devices(self.cmdline.boot_disk)  # a step may have changed them

    def _withdraw_sentinels(self) -> None:
        for path in self.early:
            self._put_back(path, "")
        self.early = []

    def _restore_layouts(self) -> None:
        """Leave nothing to the next slot of what the stages of this one have written for themselves."""
        for path, content in self.layouts.items():
            self._put_back(path, content)
        self.layouts = {}

    def _put_back(self, path: str, content: str) -> None:
        """Make a file what it was; one that cannot be is no reason to give a boot up that can go on."""
        try:
            if content:
                self.kernel.write_file(path, content)
            else:
                self.kernel.remove_file(path)
        except OSError as error:
            self.log.error(f"cannot make {path} what it was before the stages: {error.strerror}")

    def _tell_boot_loader(self, layout: ModuleType) -> None:
        """Have another slot booted with its own kernel: when that is asked for, or none fits this kernel."""
        mismatched = [each for each in self.failures if isinstance(each.error, KernelMismatchError)]
        if self.cmdline.fallback == "off" or (self.cmdline.fallback == "same-boot" and not mismatched):
            return
        fitting_another = {each.mode for each in mismatched}  # recovery fails under two names, one is right
        hopeless = tuple(each.mode for each in self.failures if each.mode not in fitting_another)
        entry = layout.next_entry(self.cmdline, hopeless)
        if not entry:
            return
        try:
            self._do(layout.tell_boot_loader(self.cmdline, self.devices, entry))
        except ImmucoreError as error:
            self.log.error(f"cannot tell the boot loader to boot '{entry}': {error.message}")
        else:
            self.next_entry = entry
        finally:
            self.take_back()

    def take_back(self) -> None:
        """Unmount what a slot that cannot be booted has mounted, so that the next finds nothing there.

        Also what an earlier run had mounted of it, if its root was among that.
        """
        self._withdraw_sentinels()
        self._restore_layouts()
        for name in observe.STAGES:
            self._put_back(report.stage_marker(name), "")
        again = any(
            isinstance(step.operation, Loop) and step.outcome == linux.PRESENT for step in self.record
        )
        outcomes = (linux.DONE, linux.PRESENT) if again else (linux.DONE,)
        for number, step in reversed([*enumerate(self.record)]):
            if isinstance(step.operation, Mount | Loop | Bind | Overlay) and step.outcome in outcomes:
                try:
                    self.kernel.unmount(step.operation.target)
                except OSError as error:
                    self.log.error(f"cannot unmount {step.operation.target}: {error.strerror}")
                else:
                    self.record[number] = step.replace(outcome="undone")
        self.earlier += self.record
        self.record, self.plan, self.kernel = [], Plan(), linux.Kernel(log=self.log)

    def _devices(self, wanted: tuple[Wanted, ...]) -> Devices:
        """Return a look at the devices that shows the wanted ones; waits for what is not settled."""
        boot = self.cmdline.boot_disk
        devices = self.devices if self.devices.all else observe.devices(boot)
        absent = tuple(each for each in wanted if each.spec not in self.given_up and devices.unsettled(each))
        if absent:
            from immucore import wait  # imports pyroute2, as dear as four boots

            for each in absent:
                self.log.debug(f"{each.spec} is waited for: {devices.unsettled(each)}")
            started_usec = time.monotonic_ns() // 1000
            devices = wait.for_devices(absent, self.log, self.cmdline.fsck_repair_allowed, boot)
            missing = tuple(each.spec for each in wait.missing(absent, devices))
            self.given_up.update(each.spec for each in absent if devices.unsettled(each))
            self.waits.append(
                report.Wait(
                    specs=tuple(each.spec for each in absent),
                    missing=missing,
                    took_usec=time.monotonic_ns() // 1000 - started_usec,
                )
            )
        if self.cmdline.debug and devices != self.devices:
            for device in devices.all:
                self.log.debug(f"device: {device}")
        if self.cmdline.debug:
            for each in wanted:
                for line in devices.table(each):
                    self.log.debug(f"{each.spec}: {line}")
        self.devices = devices
        return devices

    def _do(self, plan: Plan) -> None:
        """Execute a plan and log each step of it."""
        self.plan += plan
        for note in plan.notes:
            self.log.debug(f"note: {note}")
        for warning in plan.warnings:
            self.log.warning(warning)
        for operation in plan:
            self.log.debug(f"plan: {operation}, because {operation.why}")
        before = len(self.record)
        try:
            execute(plan, self.kernel, self.record, self._pause if self.cmdline.breaks else None)
        finally:
            for step in self.record[before:]:
                self.log.debug(f"{step.outcome} in {step.took_usec} us: {step.operation}")
                if step.operation.target in self.kernel.merged:
                    self.log.debug(f"{step.operation.target} {self.kernel.merged[step.operation.target]}")
                if step.reason and step.outcome in ("degraded", "ignored", "makeshift"):
                    self.log.warning(f"{step.reason}; the boot goes on without it")
                    self.log.debug(f"hint: {step.hint}")

    def _pause(self, operation: Operation) -> None:
        """Give the operator a shell before a step that rd.cos.break names by its path."""
        if {operation.target, as_booted(operation.target)} & {*self.cmdline.breaks}:
            from immucore import process

            report.to_consoles(
                f"immucore: before this step: {operation}\n  type exit to go on (rd.cos.break)"
            )
            process.shell()


def image_of(layout: ModuleType, asked: Cmdline, root: str, run: str = observe.RUN) -> Image:
    """Look at what the image at `root` says. Raises LayoutError and MountError, but hardly in recovery."""
    lenient = layout.lenient(asked)
    image = observe.image(root, run=run, lenient=lenient)
    try:
        paths = layout.listed_paths(asked, image)
    except LayoutError as error:
        if not lenient:
            raise
        warning = f"{error.message}; this boot goes on with the default layout"
        image = image.replace(settings=(), warnings=(*image.warnings, warning))
        paths = layout.listed_paths(asked, image)
    whole: Image = image.replace(
        links=observe.links(root, paths), identity=observe.identity(*layout.image_file(asked))
    )
    return whole


def from_kernel(error: OSError) -> MountError:
    """Say what the kernel refused outside of any operation."""
    return MountError(
        f"cannot use '{error.filename or 'the machine'}': {error.strerror}",
        hint="look at what the kernel says: dmesg | tail",
    )


def fstab_plan(done: list[Operation], image_fstab: str, asked: Cmdline) -> Plan:
    """Put fstab into the new root; where /etc cannot be written, bind a file of /run over the image's."""
    target, why = SYSROOT + FSTAB, "the booted system has to know what is mounted"
    content = fstab.render(done, image_fstab)
    if asked.debug_rw or any(each.target == f"{SYSROOT}/etc" for each in done):
        return Plan(
            operations=(WriteFile(target=target, content=content, why=why, criticality="important"),)
        )
    return Plan(
        operations=(
            WriteFile(target=OUR_FSTAB, content=content, why=why, criticality="important"),
            Bind(
                source=OUR_FSTAB, target=target, why=f"{why}, and /etc is read-only", criticality="important"
            ),
        )
    )


def main() -> int:
    """Run the boot; the exit status is that of contract §9. As PID 1 it never returns."""
    if os.getpid() == 1:
        from immucore import pid1

        pid1.run()
    if not os.path.exists(INITRD_RELEASE):
        os.write(2, REFUSAL.encode())
        return CmdlineError.exit_status
    boot, error, status = once()
    if error and boot.cmdline.engaged:
        from immucore import onfail

        onfail.act(boot)
    return status


def once() -> tuple[Boot, ImmucoreError | None, int]:
    """Run the boot and end it: what became of it, what stopped it, and the exit status."""
    os.umask(0o022)
    # A crash of the interpreter is told where stderr goes, the journal or the console; /dev/kmsg would make
    # a record of each word.
    faulthandler.enable(2)
    boot = Boot()
    error: ImmucoreError | None = None
    try:
        _signal.signal(_signal.SIGTERM, boot.interrupted)
        _signal.signal(_signal.SIGINT, boot.interrupted)
        boot.run()
    except ImmucoreError as failure:
        error = failure
    except OSError as failure:
        error = from_kernel(failure)
    except Exception as failure:  # noqa: BLE001  a bug too has to be told in one sentence, without a traceback
        error = _bug(boot.log, failure)
    return boot, error, ending.finish(boot, error)


def _bug(boot_log: log.Log, failure: Exception) -> ImmucoreError:
    import traceback  # only here: it imports half the library

    boot_log.debug("".join(traceback.format_exception(failure)))
    return ImmucoreError(
        f"this is a bug in immucore: {type(failure).__name__}: {failure}",
        hint=f"report it with {report.DIRECTORY}/immucore.log, and boot another slot",
    )
