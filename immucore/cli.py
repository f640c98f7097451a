"""The command line tools: what `immucore` says about a boot, on the machine itself or from files."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

from immucore import __version__, cmdline, layouts, observe, report
from immucore.boot import INITRD_RELEASE, fstab_plan, image_of
from immucore.devices import BOOTDISK, Device, Devices
from immucore.errors import CmdlineError, ImmucoreError, Interrupted
from immucore.execute import SUCCEEDED
from immucore.plan import REQUIRED, SYSROOT, Missing, Plan, as_booted, is_below
from immucore.self_test import self_test

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

LSBLK = (
    "lsblk --bytes --pairs --output PATH,KNAME,PKNAME,TYPE,SIZE,FSTYPE,LABEL,UUID,PARTLABEL,PARTUUID,"
    "MODEL,SERIAL,TRAN,RM"
)
CMDLINE = "/proc/cmdline"
_DESCRIPTION = "The early-boot agent of image-based Linux: from a disk with images to a running system."
_SOURCES = "By default it looks at this machine: /proc/cmdline, the udev database, the image that is booted."
_STATE = "`immucore state [PATH]` is short for `immucore state show [PATH]`."
_EVIDENCE = (
    "what failed, what to do about it, at which step, which devices were seen, where the evidence is."
)


def devices_from(text: str, name: str, boot: str = "auto") -> Devices:
    """Read the devices from the output of LSBLK, which can be taken on any machine. Raises CmdlineError.

    A device that lies on several has a line for each.
    """
    rows: dict[str, dict[str, str]] = {}
    beneath: dict[str, list[str]] = {}  # KNAME → the KNAMEs of what it lies on
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = [word.partition("=") for word in shlex.split(line, comments=True)]
            if not all(separator for _, separator, _ in words):
                raise ValueError('it has to be KEY="value" pairs')
            row = {key: observe.decode(value) for key, _, value in words}
            if row:
                int(row.get("SIZE") or 0)
                kname = row.get("KNAME") or row["PATH"].rpartition("/")[2]
                rows[kname] = row
                beneath.setdefault(kname, []).extend([row["PKNAME"]] if row.get("PKNAME") else [])
        except (KeyError, ValueError) as error:
            raise CmdlineError(
                f"cannot read line {number} of '{name}': {error}", hint=f"make the file with: {LSBLK}"
            ) from None
    found = [_device(kname, rows, beneath) for kname in rows]
    return Devices(
        all=tuple(found),
        boot="" if boot == "auto" else boot,
        boot_origin="" if boot == "auto" else BOOTDISK,
    )


def _device(kname: str, rows: dict[str, dict[str, str]], beneath: dict[str, list[str]]) -> Device:
    row = rows[kname]
    part = _is_part(kname, rows, beneath)
    disks = sorted(_disks(kname, rows, beneath))
    wholes = [rows[disk] for disk in disks]
    return Device(
        path=row["PATH"],
        fstype=row.get("FSTYPE", ""),
        label=row.get("LABEL", ""),
        uuid=row.get("UUID", ""),
        partlabel=row.get("PARTLABEL", ""),
        partuuid=row.get("PARTUUID", ""),
        disks=tuple(whole["PATH"] for whole in wholes),
        parent=rows[beneath[kname][0]]["PATH"] if part and beneath[kname][0] in rows else "",
        holders=tuple(
            rows[other]["PATH"]
            for other in rows
            if kname in beneath[other] and not _is_part(other, rows, beneath)
        ),
        size_bytes=int(row.get("SIZE") or 0),
        model=wholes[0].get("MODEL", "").strip() if len(wholes) == 1 else "",
        serial=wholes[0].get("SERIAL", "").strip() if len(wholes) == 1 else "",
        bus=wholes[0].get("TRAN", "") if len(wholes) == 1 else "",
        removable=any(whole.get("RM") == "1" or whole.get("TRAN") == "usb" for whole in wholes),
    )


def _is_part(kname: str, rows: dict[str, dict[str, str]], beneath: dict[str, list[str]]) -> bool:
    """Tell partitions from mappings; a file without TYPE has only partitions and what is in /dev/mapper."""
    kind = rows[kname].get("TYPE", "")
    return kind == "part" if kind else bool(beneath[kname]) and "/mapper/" not in rows[kname]["PATH"]


def _disks(
    kname: str, rows: dict[str, dict[str, str]], beneath: dict[str, list[str]], above: tuple[str, ...] = ()
) -> set[str]:
    below = [
        each for each in beneath[kname] if each in rows and each not in above
    ]  # the file can be anything
    return {disk for each in below for disk in _disks(each, rows, beneath, (*above, kname))} or {kname}


def planned(asked: cmdline.Cmdline, devices: Devices, root: str, run: str) -> Plan:
    """Plan the boot that `asked` describes, with the layout of the system at `root`.

    Raises ImmucoreError.
    """
    if not asked.engaged:
        return Plan(
            operations=layouts.select(asked).sentinels(asked).operations if asked.bystander else (),
            notes=("nothing is mounted: no cos-img/filename= here, or rd.cos.disable, or root=live:",),
            warnings=asked.warnings,
        )
    layout = layouts.select(asked)
    image = image_of(layout, asked, root, run)
    mounts: Plan = layout.root(asked, devices) + layout.state(asked, devices, image)
    whole: Plan = mounts + fstab_plan([*mounts], image.fstab, asked) + layout.sentinels(asked)
    return whole


def _booted(asked: cmdline.Cmdline) -> cmdline.Cmdline:
    """Return what this machine has booted: where that could not be, not what was asked for (contract §7)."""
    try:
        with open(f"{report.DIRECTORY}/steps.json", encoding="utf-8") as file:
            steps = json.load(file)["steps"]
    except OSError:  # it has not booted with the agent, or not that far
        return asked
    images = [
        step["operation"]["source"]
        for step in steps
        if step["operation"]["kind"] == "loop" and step["outcome"] in SUCCEEDED
    ]
    others = [slot for slot in layouts.select(asked).attempts(asked) if slot.instead_of]
    return next((slot for slot in others if any(path.endswith(slot.image) for path in images)), asked)


def _sources(arguments: argparse.Namespace) -> Plan:
    with open(arguments.cmdline, "rb") as file:
        asked = cmdline.parse(file.read())
    if arguments.devices:
        with open(arguments.devices, encoding="utf-8", errors="surrogateescape") as file:
            devices = devices_from(file.read(), arguments.devices, asked.boot_disk)
    else:
        devices = observe.devices(asked.boot_disk)
    if arguments.root:
        return planned(asked, devices, arguments.root, os.path.join(arguments.root, "run/cos"))
    if arguments.cmdline == CMDLINE and asked.engaged:
        asked = _booted(asked)
    return planned(asked, devices, SYSROOT if os.path.exists(INITRD_RELEASE) else "/", observe.RUN)


def _plan(arguments: argparse.Namespace) -> int:
    plan = _sources(arguments)
    if arguments.json:
        print(json.dumps(report.plan(plan), indent=2))
        return 0
    for operation in plan:
        print(operation)
    _remarks(plan)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    plan = _sources(arguments)
    chosen = [each for each in plan if not arguments.path or _concerns(arguments.path, each.target)]
    if arguments.json:
        print(json.dumps(report.plan(plan.replace(operations=tuple(chosen))), indent=2))
        return 0
    for operation in chosen:
        print(f"{operation}\n    because {operation.why}; {operation.criticality}")
    if arguments.path and not chosen:
        print(f"nothing is done for {arguments.path}: it is what the image has, read-only")
    if not arguments.path:
        _remarks(plan)
    return 0


def _concerns(path: str, target: str) -> bool:
    """Tell whether an operation on `target` decides what `path` of the booted system shows."""
    return is_below(os.path.normpath(path), as_booted(target))


def _remarks(plan: Plan) -> None:
    for each in plan:
        if isinstance(each, Missing) and each.criticality == REQUIRED:
            print(f"warning: this boot will fail: {each.reason}\n  hint: {each.hint}")
    for note in plan.notes:
        print(f"note: {note}")
    for warning in plan.warnings:
        print(f"warning: {warning}")


def _doctor(arguments: argparse.Namespace) -> int:
    from immucore import doctor

    if os.geteuid():
        print("immucore: what failed boots have left is for root alone to read", file=sys.stderr)
    found = doctor.examine(arguments.directory)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for line in doctor.report_of(found):
        print(line)
    return 0


def _state(arguments: argparse.Namespace) -> int:
    from immucore import state, state_diff, state_reset

    run = {"show": state.show, "diff": state_diff.diff, "reset": state_reset.reset}[arguments.action]
    try:
        return run(arguments)
    except KeyboardInterrupt:
        raise Interrupted("stopped: what is listed is done, and nothing else") from None


def _self_test(_: argparse.Namespace) -> int:
    problems = self_test()
    for problem in problems:
        print(f"immucore: {problem}", file=sys.stderr)
    print("self-test: failed" if problems else "self-test: every module and library loads")
    return 1 if problems else 0


def _parser() -> tuple[argparse.ArgumentParser, Commands]:
    parser = argparse.ArgumentParser(prog="immucore", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"immucore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("boot", help="what the initramfs runs: mount the system below /sysroot")
    for name, run, text in (
        ("plan", _plan, "list what a boot does, in order"),
        ("explain", _explain, "say for each operation which setting asked for it"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}. {_SOURCES}")
        command.set_defaults(run=run)
        command.add_argument("--cmdline", metavar="FILE", default=CMDLINE, help="a kernel command line")
        command.add_argument("--devices", metavar="FILE", help=f"the output of: {LSBLK}")
        command.add_argument("--root", metavar="DIR", help="where the image is mounted or unpacked")
        command.add_argument("--json", action="store_true", help="for programs")
        if name == "explain":
            command.add_argument("path", nargs="?", metavar="PATH", help="only what decides about this path")
    text = "say what became of this boot, and of the last one that went wrong"
    command = commands.add_parser("doctor", help=text, description=f"{text.capitalize()}: {_EVIDENCE}")
    command.set_defaults(run=_doctor)
    command.add_argument("--json", action="store_true", help="for programs")
    command.add_argument("directory", nargs="?", metavar="DIR", default="", help="only what lies here")
    _state_parsers(commands)
    test = commands.add_parser(
        "self-test", help="import every module and open every library of this program"
    )
    test.set_defaults(run=_self_test)
    return parser, commands


def _state_parsers(commands: Commands) -> None:
    text = "say what was changed in the persistent paths, and give the image's version back"
    state = commands.add_parser("state", help=text, description=f"{text.capitalize()}. {_STATE}")
    state.set_defaults(run=_state)
    actions = state.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("show", "list the persistent paths, or what was changed in one of them; the word can be left out"),
        ("diff", "show how a file differs from the image's version"),
        ("reset", "give the image's version of files back, or of a whole persistent path"),
    ):
        command = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        command.add_argument("--root", metavar="DIR", help="where the booted system is mounted")
        if name == "show":
            command.add_argument("--json", action="store_true", help="for programs")
            command.add_argument("path", nargs="?", metavar="PATH", help="a persistent path")
        elif name == "diff":
            command.add_argument("file", metavar="FILE", help="as the booted system calls it")
        else:
            command.add_argument("--yes", action="store_true", help="reset a whole path and do not ask")
            command.add_argument("path", metavar="PATH", help="a persistent path")
            command.add_argument("files", nargs="*", metavar="FILE", help="in it; none: all of it")


def _with_action(arguments: Sequence[str]) -> list[str]:
    """Put the word in that can be left out: `immucore state /etc` is `immucore state show /etc`."""
    words = [*arguments]
    if words[:1] == ["state"] and words[1:2] not in (["show"], ["diff"], ["reset"], ["-h"], ["--help"]):
        words.insert(1, "show")
    return words


def main(arguments: Sequence[str], add: Callable[[Commands], None] | None = None) -> int:
    """Run one of the tools; the exit status is that of contract §9. `add` adds the booted system's."""
    parser, commands = _parser()
    if add is not None:
        add(commands)
    parsed = parser.parse_args(_with_action(arguments))
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()  # where it is known what to do when that fails
    except ImmucoreError as error:
        print(f"immucore: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("immucore: stopped", file=sys.stderr)
        return Interrupted.exit_status
    except OSError as error:
        if error.filename:
            print(f"immucore: cannot read '{error.filename}': {error.strerror}", file=sys.stderr)
            return 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter tries once more at its end
        if isinstance(error, BrokenPipeError):  # `immucore plan | head`: nobody reads on
            return 0
        print(f"immucore: cannot go on: {error.strerror}", file=sys.stderr)
        return 2
    return status
