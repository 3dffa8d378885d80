"""SIGKILL at random instants of the commands that write: what is lost must be nothing.

    python python_tests/faults/kill_trials.py --count 100 --seed 0
    make kills

Each trial runs a command in a process of its own and kills it at an instant drawn uniformly over
the time that the command takes undisturbed. Then the same command is given again (for training,
`hos-ext resume`), and the end must be that of an undisturbed run, bit for bit. Right after the
kill, each result must be absent or whole; after the end no temporary file may be left.

The processes are forks of one that has imported everything, so that the instants fall into the
work and not into the imports.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("kill_trials.json")
SMALL = ["--model=mlp", "--rank=2", "--width=16", "--head-width=16", "--tracker=none", "--steps=30"]
SMALL += ["--save-every=4", "--batch-size=16", "--keep=2"]
# What a clock has a part in.
TIMES = ("seconds", "steps_per_second", "us_per_step", "ess_per_second", "resumed_from", "out")


def in_a_process(work: Callable[[], int], kill_after: float | None = None) -> int:
    """Runs work in a fork, killed by SIGKILL after so many seconds; its exit code or -signal."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def command(*words: object) -> Callable[[], int]:
    """A command line of `hos-ext`, to be run in a fork."""
    from hos_ext.app import cli

    return lambda: cli.run([str(word) for word in words])


def content(folder: Path) -> dict[str, Any]:
    """All results in a folder by name, read whole: what cannot be read raises."""
    import numpy as np
    from PIL import Image
    from safetensors.numpy import load

    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, raw = str(path.relative_to(folder)), path.read_bytes()
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # a temporary name
        if path.suffix == ".npz":
            with np.load(io.BytesIO(raw)) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.suffix in (".png", ".tiff"):
            with Image.open(io.BytesIO(raw)) as image:
                image.load()
            found[name] = raw if path.suffix == ".tiff" else "a picture"
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(raw))
        elif path.suffix == ".safetensors":
            found[name] = {key: value.tobytes() for key, value in load(raw).items()}
        elif path.suffix == ".pt":
            zipfile.ZipFile(io.BytesIO(raw)).testzip()
            found[name] = "moments"
        elif path.suffix == ".md":
            assert raw.endswith(b"\n"), name
            found[name] = raw
    return found


def without_times(value: Any) -> Any:
    """JSON without what a clock has a part in, and without hashes of files that hold such."""
    if isinstance(value, dict):
        return {
            key: without_times(each)
            for key, each in value.items()
            if key not in TIMES and key not in ("sha256", "bytes")
        }
    if isinstance(value, list):
        return [without_times(each) for each in value]
    return value


class Trials:
    """The commands, with what each gives when nothing disturbs it."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self.folder = folder
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (80, 1, 8, 8)).astype(np.uint8)
        np.save(folder / "x.npy", images)
        self.train = ["train", "--data", f"npy:{folder / 'x.npy'}", *SMALL]
        self.run = folder / "run"
        self.undisturbed: dict[str, tuple[dict[str, Any], float]] = {}
        for kind in ("train", "denoise", "evaluate", "chains"):
            out = self.run if kind == "train" else folder / f"{kind}-undisturbed"
            start = time.monotonic()
            code = in_a_process(command(*self.words(kind, out)))
            assert code == 0, f"{kind} ended with {code}"
            self.undisturbed[kind] = content(out), time.monotonic() - start

    def words(self, kind: str, out: Path) -> list[object]:
        """The command line of a kind, which writes to out."""
        if kind == "train":
            return [*self.train, "--out", out]
        more: dict[str, list[object]] = {
            "denoise": ["--sigma=0.4", "--count=3"],
            "evaluate": ["--sigma=0.4,0.8", "--limit=3"],
            "chains": ["--sigma=0.4", "--chains=3", "--steps=60", "--burn-in=10"],
        }
        return [kind, self.run, *more[kind], "--out", out]

    def trial(self, kind: str, part: float) -> str:
        """One kill, at a part of the time that the command takes: "" or what was lost."""
        expected, seconds = self.undisturbed[kind]
        out = self.folder / "trial"
        shutil.rmtree(out, ignore_errors=True)
        killed = in_a_process(command(*self.words(kind, out)), part * seconds)
        if killed not in (-signal.SIGKILL, 0):
            return f"the command ended with {killed}"
        try:
            left = content(out) if out.exists() else {}
        except Exception as error:
            return f"a half-written file after the kill: {type(error).__name__} {error}"
        if kind != "train":
            changed = [name for name in left if left[name] != expected.get(name)]
            if changed:
                return f"other content than undisturbed: {changed}"
        again: list[object] = [*self.words(kind, out), "--force"]
        if kind == "train" and (out / "run.json").exists():
            again = ["resume", out]
        code = in_a_process(command(*again))
        if code != 0:
            return f"{again[0]} after the kill ended with {code}"
        try:
            found = content(out)
        except Exception as error:
            return f"a half-written file at the end: {type(error).__name__} {error}"
        differ = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
        if differ:
            return f"another end: {sorted(differ)}"
        temporary = [str(p.relative_to(out)) for p in out.rglob(".*.tmp")]
        return f"temporary files are left: {temporary}" if temporary else ""


def run_trials(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """So many kills, the kinds in turn: kills by kind, and what was lost."""
    trials, source = Trials(folder), random.Random(seed)
    counts: Counter[str] = Counter()
    lost = []
    for i in range(count):
        kind = ("train", "denoise", "evaluate", "chains")[i % 4]
        part = source.random()
        counts[kind] += 1
        wrong = trials.trial(kind, part)
        if wrong:
            lost.append(f"trial {i}, {kind} killed at {part:.3f} of its time: {wrong}")
            print(lost[-1], flush=True)
    return counts, lost


def prepare() -> None:
    """Imports all that the commands import, with one thread: forks must not inherit others."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import matplotlib.pyplot  # noqa: F401
    import PIL.Image  # noqa: F401
    import safetensors.torch  # noqa: F401
    import typer  # noqa: F401

    from hos_ext.app import cli, evaluation, results, runs  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write kill_trials.json")
    asked = parser.parse_args()
    prepare()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts, lost = run_trials(asked.count, asked.seed, Path(folder))
    record = {
        "command": f"kill_trials.py --count {asked.count} --seed {asked.seed}",
        "kills": dict(counts),
        "lost": lost,
        "seconds": round(time.monotonic() - start),
    }
    print(json.dumps(record, indent=2))
    if asked.record:
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return len(lost) > 0


if __name__ == "__main__":
    sys.exit(main())
