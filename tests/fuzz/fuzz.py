"""Run the fuzz targets under atheris (libFuzzer): `make fuzz`.

Without arguments: every target for FUZZ_SECONDS, two at a time, and a table. With the name of a target and
libFuzzer's own arguments: that target in this process, such as `fuzz.py udev build/fuzz/udev/crash-…`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/fuzz"
NAMES = sorted(path.name for path in (HERE / "corpus").iterdir())
MAX_INPUT_BYTES = 4096  # the kernel's command line is no longer; longer texts: test_fuzz_targets.py
SLOW_SEC = 10  # an input that takes longer is a fault too


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process. Never returns."""
    import atheris

    with atheris.instrument_imports(include=["immucore"]):
        from fuzz_targets import TARGETS

    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def run(name: str, seconds: int) -> tuple[str, str]:
    """Fuzz one target in a process of its own; return a line of the table, and what it found, or nothing."""
    directory = BUILD / name
    (directory / "corpus").mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, __file__, name, str(directory / "corpus"), str(HERE / "corpus" / name)),
        *(f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={SLOW_SEC}"),
        *(f"-artifact_prefix={directory}/", "-print_final_stats=1", "-rss_limit_mb=1024"),
    ]
    log = directory / "log"
    with log.open("wb") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(errors="replace")
    runs = re.findall(r"^stat::number_of_executed_units: +(\d+)", text, re.MULTILINE)
    rate = re.findall(r"^stat::average_exec_per_sec: +(\d+)", text, re.MULTILINE)
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    edges, features, corpus = covered[-1] if covered else ("?", "?", "?")
    row = [name, *(each[-1] if each else "?" for each in (runs, rate)), edges, features, corpus]
    what = (
        ""
        if status == 0 and runs
        else f"{name} ended with status {status}; see {log}\n{text[_last_word(text) :]}"
    )
    return "".join(f"{each:>12}" for each in row), what


def _last_word(text: str) -> int:
    """Find where the report of a fault begins; without one, the last lines."""
    found = [text.rfind(mark) for mark in (" === Uncaught", "ERROR: libFuzzer", "Traceback")]
    return min([position for position in found if position >= 0], default=max(len(text) - 2000, 0))


def main() -> int:
    """Run all of them; 1 if one has found something."""
    seconds = int(os.environ.get("FUZZ_SECONDS", "60"))
    print("".join(f"{each:>12}" for each in ("target", "runs", "per second", "edges", "features", "inputs")))
    failures = []
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for line, failure in pool.map(lambda name: run(name, seconds), NAMES):
            print(line, flush=True)
            failures += [failure] if failure else []
    print("".join(f"\n{failure}\n" for failure in failures), end="")
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fuzz(sys.argv[1], sys.argv[2:])
    sys.exit(main())
