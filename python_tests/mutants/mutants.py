"""Mutation testing: a small fault is put into the code, and some test must fail.

    python python_tests/mutants/mutants.py                   what has no result yet, or has changed
    python python_tests/mutants/mutants.py --room sampling   one table alone
    python python_tests/mutants/mutants.py --id 3f2a91c4     one mutant, with what pytest says
    python python_tests/mutants/mutants.py --again           everything anew
    python python_tests/mutants/mutants.py --report          the counts alone

The tables lie in `tables/`, a file a room. An entry names a file, a text that stands there exactly
once, what takes its place, and the tests that must notice. `equivalent` says why a mutant changes
nothing that a user can see; such a mutant is run all the same, and may survive.

Results go to `results/`, a file a room: what became of each mutant, by which test, in what time.
A mutant is run again where its entry, its file or its tests have changed. Everything happens in a
copy of the tracked files under `build/mutants`, so the work tree stays as it is. A mutant of csrc/
is built there, on the CPU, by an incremental build.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
FIELDS = {"file", "old", "new", "tests", "equivalent"}
LIMIT = 900  # seconds for the tests of one mutant; one that makes them hang is noticed by that


@dataclass(frozen=True)
class Mutant:
    """One fault, and who must notice it."""

    room: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def id(self) -> str:
        text = "\0".join((self.file, self.old, self.new))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def stamp(self) -> str:
        """What the result depends on: the mutant, its file, and the tests that were asked."""
        files = [ROOT / self.file]
        for test in self.tests:
            path = ROOT / test.split("::")[0]
            files += sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        parts = [self.id, *self.tests, *(f.read_text(encoding="utf-8") for f in files)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def apply(self, text: str) -> str:
        """The text with the fault in it."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"mutant {self.id} ({self.room}): old must stand once in {self.file}, "
                f"got {text.count(self.old)} times: {self.old!r}"
            )
        return text.replace(self.old, self.new)


def read_tables(room: str | None = None) -> list[Mutant]:
    """All mutants, or those of one table."""
    found = []
    for path in sorted(HERE.glob("tables/*.toml")):
        if room is not None and path.stem != room:
            continue
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for entry in table["mutant"]:
            if not {"file", "old", "new"} <= entry.keys() <= FIELDS:
                raise ValueError(f"{path.name}: an entry must have {FIELDS}, got {entry}")
            tests = tuple(entry.get("tests", table["tests"]))
            said = entry.get("equivalent", "")
            texts = (entry["file"], entry["old"], entry["new"])
            found.append(Mutant(path.stem, *texts, tests, said))
    return found


# ----------------------------------------------------------------------------------- a copy of it


class Copy:
    """The tracked files in a folder of their own, and pytest there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        names = {n for n in tracked.split("\0") if n and not n.startswith("bench/results/")}
        for name in names:
            source, target = ROOT / name, folder / name
            if source.is_file() and not _same(source, target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for path in list(folder.glob("python_tests/**/*.py")) + list(
            folder.glob("hos_ext/**/*.py")
        ):
            if str(path.relative_to(folder)) not in names:
                path.unlink()
        self.built = folder / "hos_ext" / Path(_native_module()).name
        shutil.copyfile(_native_module(), self.built)

    def build(self) -> bool:
        """The native module from the copy's csrc/; whether it could be built."""
        out = self.folder / "build"
        if not (out / "build.ninja").exists():
            import pybind11

            configure = ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DHOS_CUDA=OFF"]
            configure += [
                "-DCMAKE_BUILD_TYPE=Release",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
            # Of an unknown processor: one set of kernels in place of three, a third of the time.
            tools = self.folder / "one_level.cmake"
            tools.write_text("set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR any)\n")
            configure += [f"-DCMAKE_TOOLCHAIN_FILE={tools}"]
            subprocess.run(configure, cwd=self.folder, check=True, capture_output=True)
        done = subprocess.run(["cmake", "--build", "build"], cwd=self.folder, capture_output=True)
        for module in out.glob("_C*.so") if done.returncode == 0 else ():
            shutil.copyfile(module, self.built)
        return done.returncode == 0

    def run(self, tests: tuple[str, ...]) -> tuple[str, str, str]:
        """What became of a mutant ("killed" or "survived"), who noticed, and all that was said.

        Raises:
            RuntimeError: pytest ran no test.
        """
        paths = [p for p in sys.path if "site-packages" in p]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder), *paths])}
        env |= {"CI": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        # -S keeps away the hook of an editable install, which would come before the copy.
        command = [sys.executable, "-S", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", *tests]
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return "killed", f"no end within {LIMIT} s", ""
        said = done.stdout + done.stderr
        if done.returncode == 0:
            return "survived", "", said
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        if failed is None and done.returncode in (4, 5):
            raise RuntimeError(f"no test ran for {tests}: {said[-500:]}")
        return "killed", failed[1] if failed else f"exit code {done.returncode}", said


def _same(source: Path, target: Path) -> bool:
    return target.is_file() and source.read_bytes() == target.read_bytes()


def _native_module() -> str:
    from hos_ext import _C  # type: ignore[attr-defined]

    return _C.__file__


# --------------------------------------------------------------------------------------- the runs


def try_mutant(mutant: Mutant, copy: Copy) -> dict[str, object]:
    """One mutant in the copy, which is as it was afterwards."""
    path = copy.folder / mutant.file
    text = path.read_text(encoding="utf-8")
    start, native = time.monotonic(), mutant.file.startswith("csrc/")
    path.write_text(mutant.apply(text), encoding="utf-8")
    try:
        if native and not copy.build():
            outcome, by, said = "killed", "the compiler", ""
        else:
            outcome, by, said = copy.run(mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    return {
        "outcome": outcome,
        "by": by,
        "seconds": round(time.monotonic() - start, 1),
        "stamp": mutant.stamp(),
        "said": said,
    }


Results = dict[str, dict[str, object]]


def read_results(room: str | None = None) -> Results:
    """By mutant what became of it, in all rooms or in one."""
    found: Results = {}
    for path in sorted(RESULTS.glob(f"{room or '*'}.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def keep(mutant: Mutant, result: dict[str, object]) -> None:
    """Puts a result to those of its room, of mutants that are still in the table; whole, sorted."""
    known = {m.id for m in read_tables(mutant.room)}
    results = read_results(mutant.room) | {mutant.id: result}
    lines = [f'  "{k}": {json.dumps(v)}' for k, v in sorted(results.items()) if k in known]
    RESULTS.mkdir(exist_ok=True)
    new = RESULTS / f"{mutant.room}.new"
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    new.replace(new.with_suffix(".json"))


def report(mutants: list[Mutant], results: Results) -> int:
    """Prints the counts and the survivors; how many survive that should not."""
    bad = 0
    counts: dict[str, Counter[str]] = {}
    for m in mutants:
        outcome = str(results.get(m.id, {}).get("outcome", "not run"))
        if outcome == "survived" and m.equivalent:
            outcome = "equivalent"
        counts.setdefault(m.room, Counter())[outcome] += 1
        if outcome == "survived":
            bad += 1
            print(f"survived {m.id} {m.file}: {m.old!r} -> {m.new!r}")
    for room, count in counts.items():
        print(f"{room:12}", ", ".join(f"{v} {k}" for k, v in sorted(count.items())))
    total = sum(counts.values(), Counter())
    print(f"{'all':12}", ", ".join(f"{v} {k}" for k, v in sorted(total.items())))
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", help="one table")
    parser.add_argument("--id", help="one mutant")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--minutes", type=float, default=1e9, help="start none after so many")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    asked = parser.parse_args()
    mutants = [m for m in read_tables(asked.room) if asked.id in (None, m.id)]
    if asked.report:
        return report(mutants, read_results()) > 0
    copy, start = Copy(asked.folder.resolve()), time.monotonic()
    # The compiled mutants last, side by side: one build brings the last one's file back.
    for m in sorted(mutants, key=lambda m: (m.file.startswith("csrc/"), m.file)):
        if time.monotonic() - start > 60 * asked.minutes:
            break
        before = read_results().get(m.id, {})
        if not (asked.again or asked.id) and before.get("stamp") == m.stamp():
            continue
        result = try_mutant(m, copy)
        said = str(result.pop("said"))
        line = f"{m.id} {result['outcome']:8} {result['seconds']:6} s  {m.file}  {result['by']}"
        print(line, flush=True)
        if asked.id:
            print(said)
        keep(m, result)
    return report(mutants, read_results()) > 0


if __name__ == "__main__":
    sys.exit(main())
