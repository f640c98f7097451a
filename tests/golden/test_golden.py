"""One folder a machine: what it has, and the plan, the fstab or the refusal that it must get.

`make golden` (pytest tests/golden --rewrite) rewrites the expectations; the diff is what is reviewed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from immucore import cli, cmdline
from immucore.plan import WriteFile

HERE = Path(__file__).parent
MACHINES = sorted(path.name for path in HERE.iterdir() if (path / "cmdline").exists())
# A file of the machine → where the booted system has it.
PLACES = {
    "cos-layout.env": "etc/cos/cos-layout.env",
    "oem-layout.env": "oem/cos-layout.env",
    "run-layout.env": "run/cos/cos-layout.env",
    "extra-layout.env": "run/cos/extra-layout.env",
    "custom-layout.env": "run/cos/custom-layout.env",
    "image-fstab": "etc/fstab",
}
INPUTS = {"cmdline", "devices", "image-links", *PLACES}


def tree(machine: Path, root: Path) -> Path:
    """Lay out the image, OEM and /run of a machine as the booted system sees them."""
    for name, place in PLACES.items():
        if (machine / name).exists():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_bytes((machine / name).read_bytes())
    if (machine / "image-links").exists():  # a line is what `ln -s` takes: target, path
        for line in (machine / "image-links").read_text().splitlines():
            target, path = line.split()
            (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (root / path[1:]).symlink_to(target)
    return root


def outputs(machine: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Say everything that the agent says about a machine: file name → content."""
    line, devices = machine / "cmdline", machine / "devices"
    status = cli.main(["explain", "--cmdline", str(line), "--devices", str(devices), "--root", str(root)])
    captured = capsys.readouterr()
    if status:
        assert not captured.out
        return {"error": f"exit status {status}\n{captured.err}"}
    assert not captured.err
    asked = cmdline.parse(line.read_bytes())
    plan = cli.planned(
        asked,
        cli.devices_from(devices.read_text(), "devices", asked.boot_disk),
        str(root),
        f"{root}/run/cos",
    )
    said = {"plan": captured.out}
    for each in plan:
        if isinstance(each, WriteFile) and each.target.endswith("/fstab"):
            said["fstab"] = each.content
    return said


@pytest.mark.parametrize("name", MACHINES)
def test_machine(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    machine = HERE / name
    said = outputs(machine, tree(machine, tmp_path), capsys)
    expected = {path.name: path for path in machine.iterdir() if path.name not in INPUTS}
    if request.config.getoption("rewrite"):
        for path in expected.values():
            path.unlink()
        for file, content in said.items():
            (machine / file).write_text(content)
        return
    assert said == {file: path.read_text() for file, path in expected.items()}
