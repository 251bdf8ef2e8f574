"""What the start-up hook costs a Python that never imports mergekit.

Makes three virtual environments without any library, and starts `python -c pass` in them in turn,
many times: nothing installed; our package with the hook; our package with the hook switched off.
Prints the medians side by side. Run with:

    python tests/benchmarks/startup.py [STARTS]
"""

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fisher_mergekit"
OFF_SWITCH = "FISHER_MERGEKIT_DISABLE"


def make(root: Path, with_hook: bool) -> Path:
    """Make an environment and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    (packages,) = root.glob("lib/python*/site-packages")
    if with_hook:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, packages / "fisher_mergekit", ignore=skip)
        for file in (PACKAGE / "startup_files").iterdir():
            shutil.copy(file, packages)
        compileall.compile_dir(packages, quiet=1)  # as pip does
    return root / "bin" / "python"


def seconds(interpreter: Path, environment: dict[str, str]) -> float:
    """Start Python once and return how long that took, in seconds."""
    begin = time.perf_counter()
    subprocess.run([interpreter, "-c", "pass"], env=environment, check=True)
    return time.perf_counter() - begin


def main(starts: int) -> None:
    """Measure and print one table."""
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", OFF_SWITCH)}
    with tempfile.TemporaryDirectory() as folder:
        without = make(Path(folder, "without"), with_hook=False)
        hooked = make(Path(folder, "hooked"), with_hook=True)
        cases = {
            "without the package": (without, plain),
            "without it, once more": (without, plain),  # how much of a difference is noise
            "with the hook": (hooked, plain),
            "hook switched off": (hooked, {**plain, OFF_SWITCH: "1"}),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for round_number in range(starts + 3):
            for name, case in cases.items():
                taken = seconds(*case)
                if round_number >= 3:  # the first rounds fill the file cache and __pycache__
                    times[name].append(taken)
    base = statistics.median(times["without the package"])
    print(f"python -c pass, Python {sys.version.split()[0]}, {starts} starts each, taken in turn")
    print(f"{'':24}{'median':>10}{'ratio':>8}{'quartiles':>20}{'fastest':>12}")
    for name, taken_s in times.items():
        low, middle, high = statistics.quantiles(taken_s, n=4)
        quartiles = f"{low * 1e3:.2f} … {high * 1e3:.2f}"
        fastest = min(taken_s) * 1e3
        print(
            f"{name:24}{middle * 1e3:7.2f} ms{middle / base:8.3f}{quartiles:>20}{fastest:9.2f} ms"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
