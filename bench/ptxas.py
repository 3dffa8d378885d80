"""What ptxas says of the CUDA kernels: `python -m bench.ptxas`, or make ptxas; needs nvcc, no GPU.

Registers of a thread, static shared memory and stack of each kernel and architecture, to
results/ptxas.csv. Fails where a kernel spills or the compiler warns. Dynamic shared memory is the
host's to choose: the plans in csrc/*/*_cuda.cu.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .rows import RESULTS, ROOT

CSRC = ROOT / "csrc"
ARCHS = ("80", "90", "100", "120")
COLUMNS = ("file", "kernel", "arch", "registers", "shared", "stack", "spill_stores", "spill_loads")
# As CMakeLists.txt sets them.
_FAST = ["-prec-div=false", "-prec-sqrt=false"]
OPTIONS = {"noise_cuda": _FAST, "step_cuda": _FAST}

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_\d+'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(text: str) -> Iterator[dict[str, str]]:
    """A row for each kernel in the output of nvcc -Xptxas -v, without its file and architecture."""
    row: dict[str, str] = {}
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            row = {"kernel": found[1]}
        elif found := _STACK.search(line):
            row |= dict(zip(("stack", "spill_stores", "spill_loads"), found.groups(), strict=True))
        elif found := _USED.search(line):
            shared = _SHARED.search(line)
            yield row | {"registers": found[1], "shared": shared[1] if shared else "0"}


def readable(names: Sequence[str]) -> list[str]:
    """C++ names without their namespaces and arguments."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    plain = re.compile(r"hos::|\w+::|\(anonymous namespace\)::|^void ")
    return [plain.sub("", line).split("(")[0] for line in done.stdout.splitlines()]


def compile_file(source: Path, arch: str, nvcc: str) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of one file, and the lines in which the compiler complains."""
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-DHOS_ISA=cuda", "-Xptxas", "-v"]
    command += [f"-I{CSRC}", "-Xcompiler=-Wall,-Wextra", *OPTIONS.get(source.stem, [])]
    command += ["-cubin", "-o", "/dev/null", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(text)
    rows = list(parse(text))
    names = readable([row["kernel"] for row in rows])
    known = {"file": str(source.relative_to(CSRC)), "arch": arch}
    rows = [row | known | {"kernel": name} for row, name in zip(rows, names, strict=True)]
    return rows, [line for line in text.splitlines() if "warning" in line.lower()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.ptxas", description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=ARCHS)
    parser.add_argument("--out", type=Path, default=RESULTS / "ptxas.csv")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        parser.error("needs nvcc, and none is on PATH")
    rows, complaints = [], []
    for source in sorted(CSRC.rglob("*.cu")):
        for arch in options.archs:
            found, warnings = compile_file(source, arch, nvcc)
            rows += found
            complaints += warnings
    spilled = [row for row in rows if row["spill_stores"] != "0" or row["spill_loads"] != "0"]
    complaints += [f"{row['kernel']} spills on sm_{row['arch']}" for row in spilled]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["file"], row["kernel"], row["arch"])))
    print("\n".join([*complaints, f"{len(rows)} kernels in {options.out}"]))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
