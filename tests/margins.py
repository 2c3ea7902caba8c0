"""How close the numeric tests come to their bounds, with each instruction set of this processor.

    python tests/margins.py [--sets aten-default,mkl-sse4.2] [pytest's arguments; default: what is not slow]

Prints, as Markdown, the comparisons with a margin (bound / error) below 3, then the smallest margin of each file by
set. MKL respects its variables only on Intel processors; elsewhere, if there is a C compiler, it is made to see one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENOUGH = 3
FOLDER = "tests/trainer/"
NUMERIC = re.compile(r"assert_close|assert_allclose|approx\(|below\(|optim_ranks")
# The processor features that a set needs, and the set.
SETS = {
    "as found": ("", {}),
    "aten-default": ("", {"ATEN_CPU_CAPABILITY": "default"}),
    "aten-avx2": ("avx2", {"ATEN_CPU_CAPABILITY": "avx2"}),
    "aten-avx512": ("avx512f", {"ATEN_CPU_CAPABILITY": "avx512"}),
    "mkl-compatible": ("", {"MKL_CBWR": "COMPATIBLE"}),
    "mkl-sse4.2": ("sse4_2", {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    "mkl-avx2": ("avx2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "mkl-avx512": ("avx512f", {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}),
    "onednn-sse4.1": ("sse4_1", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "onednn-avx2": ("avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "onednn-avx512": ("avx512f", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
}
# The bits of one result of each library; a set that changes none of them is not run.
FINGERPRINT = """
import hashlib, torch
torch.manual_seed(0)
a, b, c, d = torch.randn(96, 130), torch.randn(130, 70), torch.randn(2, 16, 40), torch.randn(16, 1, 3)
found = [a, a @ b, a.double() @ b.double(), a.exp(), a.sum(1), a.softmax(1), a.bfloat16() @ b.bfloat16(),
         torch.nn.functional.conv1d(c, d, groups=16), torch.linalg.svdvals(a)]
print(hashlib.sha256(b"".join(x.double().numpy().tobytes() for x in found)).hexdigest())
"""
INTEL = "int mkl_serv_intel_cpu(void) { return 1; }\nint mkl_serv_intel_cpu_true(void) { return 1; }\n"


def runnable(directory: Path) -> dict[str, dict[str, str]]:
    """The sets that this processor supports and that give different numbers, with their environments."""
    about = Path("/proc/cpuinfo").read_text()
    pretend = {}
    if "GenuineIntel" not in about and (compiler := shutil.which("cc")):
        (directory / "intel.c").write_text(INTEL)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", "intel.so", "intel.c"], cwd=directory, check=True)
        pretend = {"LD_PRELOAD": str(directory / "intel.so")}
    found: dict[str, dict[str, str]] = {}
    seen: dict[str, str] = {}
    for name, (flag, variables) in SETS.items():
        if flag and f" {flag} " not in about:
            print(f"{name}: not on this processor")
            continue
        environment = variables | (pretend if "MKL_ENABLE_INSTRUCTIONS" in variables else {})
        command = [sys.executable, "-c", FINGERPRINT]
        bits = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True).stdout
        if bits in seen:
            print(f"{name}: the same numbers as {seen[bits]}")
        else:
            seen[bits] = name
            found[name] = environment
    return found


def measure(files: list[str], arguments: list[str], environment: dict[str, str], out: Path) -> list[dict]:
    """Run the tests; returns how close each place of each test comes to its bound."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=0", "--tb=line", *arguments, *files]
    # inductor's graph cache ignores the instruction set: entries for AVX2 fail without it.
    places = {"MARGINS": str(out), "TORCHINDUCTOR_CACHE_DIR": f"{out}-generated"}
    subprocess.run(command, cwd=ROOT, env=os.environ | environment | places)
    nearest: dict[tuple[str, str], dict] = {}
    for line in out.read_text().splitlines():
        found = json.loads(line)
        key = found["test"], found["place"]
        if key not in nearest or found["margin"] < nearest[key]["margin"]:
            nearest[key] = found
    return list(nearest.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="")
    options, arguments = parser.parse_known_args()
    files = [argument for argument in arguments if ".py" in argument]
    arguments = [argument for argument in arguments if argument not in files] or ["-m", "not slow and not gpu"]
    files = files or sorted(str(f) for f in (ROOT / FOLDER).glob("test_*.py") if NUMERIC.search(f.read_text()))
    table: dict[str, dict[str, float]] = defaultdict(dict)
    near: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as directory:
        sets = runnable(Path(directory))
        ran = [name for name in sets if not options.sets or name in options.sets.split(",")]
        for name in ran:
            compared = measure(files, arguments, sets[name], Path(directory) / name)
            files = sorted({found["test"] for found in compared})  # of the first set on, only what compares numbers
            for found in compared:
                file = found["test"].partition("::")[0].removeprefix(FOLDER)
                table[file][name] = min(found["margin"], table[file].get(name, float("inf")))
                near[found["test"], found["place"]][name] = found
    heads = ("test", "place", "set", "error", "bound", "margin", "all margins")
    rows = [heads, ("---",) * len(heads)]
    for (test, place), found in sorted(near.items(), key=lambda item: min(f["margin"] for f in item[1].values())):
        name, worst = min(found.items(), key=lambda item: item[1]["margin"])
        same = len(found) > 1 and len({f["measured"] for f in found.values()}) == 1  # no matter of the processor
        if worst["margin"] < ENOUGH and not same:
            figures = [f"{worst[key]:.2e}" for key in ("measured", "bound")] + [f"{worst['margin']:.2f}"]
            margins = sorted(f["margin"] for f in found.values())
            rows.append((test.removeprefix(FOLDER), place, name, *figures, f"{margins[0]:.2f} to {margins[-1]:.2f}"))
    show(f"Margins below {ENOUGH}", rows)
    rows = [("file", *ran), ("---",) * (1 + len(ran))]
    for file, least in sorted(table.items()):
        rows.append((file, *(f"{least[name]:.1f}" if name in least else "" for name in ran)))
    show("Least margin of each file", rows)


def show(title: str, rows: list[tuple[str, ...]]) -> None:
    print(f"\n## {title}\n")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
