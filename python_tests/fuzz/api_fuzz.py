"""Wrong calls of the public API, without end: each is a right result or a clear refusal.

    python python_tests/fuzz/api_fuzz.py                      10 minutes, from where the record ends
    python python_tests/fuzz/api_fuzz.py --calls 1000 --from 0
    python python_tests/fuzz/api_fuzz.py --repeat 4711        one call, with its traceback

A seed makes a call: it picks an entry of `entries.py`, builds its valid arguments, and replaces one
or several of them by values of `values.py`. Clear is a ValueError, TypeError or RuntimeError that
reads `function: argument rule, got value`; "inner" counts those that name the public function
which the entry called, instead of itself; "user" those of a function that was given and takes other
arguments. Everything else is unclear: another error, one that
names neither, a result where the annotation rules the value out, another result for a value that
means the same, a broadcast, a crash, memory above a bound, no end. Calls run in a worker process,
which is started anew after a crash or when it does not answer.

`api_fuzz.json` keeps the counts of all runs; the next run goes on from its last seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from entries import Entry, entries, invoke, valid_call  # noqa: E402
from values import Changed, change, excluded  # noqa: E402
from workers import Record, Worker, answers  # noqa: E402

from hos_ext import DPLR, records  # noqa: E402
from hos_ext.scores import SymmetricOperator  # noqa: E402

RECORD = Record(HERE / "api_fuzz.json", "calls", {})
SECONDS = 5.0  # of the processor, for one call
WAIT = 120.0  # by the clock: the machine may have other work
MEMORY = 3 << 30  # beyond what torch takes to begin with

CLEAR = (ValueError, TypeError, RuntimeError)
BAD = ("unclear", "silent", "differs", "broadcast", "memory", "hang", "crash", "machine")
# One tensor for all rows where a call takes one a row, and k vectors where it takes one.
ONE_FOR_ALL = {"sigma", "alpha", "step_size", "a", "scale", "t", "ratio", "noise_std", "cost"}
MANY = {"v", "b", "directions", "other", "y", "inside", "outside", "draws", "modes", "sigmas"}


class Call(NamedTuple):
    """One call: the entry, its valid arguments, and what became of some of them."""

    entry: Entry
    valid: dict[str, Any]
    changed: dict[str, Changed]

    @property
    def given(self) -> dict[str, Any]:
        return self.valid | {name: c.value for name, c in self.changed.items()}

    def __str__(self) -> str:
        parts = [f"{name} <- {c.done}" for name, c in self.changed.items()]
        left = [name for name in self.valid if name not in self.changed]
        return f"{self.entry.name}({', '.join(left)}; {', '.join(parts)})"


def make_call(seed: int) -> Call:
    """The call of a seed."""
    rng = random.Random(seed)
    entry = rng.choice(list(entries().values()))
    valid = valid_call(entry, seed)
    names = [n for n in entry.kinds if n != "self" or isinstance(valid["self"], records.Record)]
    count = min(len(names), rng.choices([1, 2, 3], [70, 20, 10])[0])
    changed: dict[str, Changed] = {}
    for name in rng.sample(names, count) if names else []:
        new = change(valid.get(name), rng)
        if name == "self" and type(new.value) is not type(valid["self"]):
            continue  # a method of one class is not called on another
        changed[name] = new
    return Call(entry, valid, changed)


# ----------------------------------------------------------------------------------- the judgement


def judge(call: Call, seed: int) -> tuple[str, str]:
    """The kind of the outcome, and what was said."""
    torch.manual_seed(seed)
    try:
        result = invoke(call.entry, call.given)
    except MemoryError as error:
        return "memory", repr(error)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if "DefaultCPUAllocator" in text:
            return "memory", text[:300]
        return _clarity(call, error), text[:400]
    for name, new in call.changed.items():
        if excluded(call.entry.kinds[name], new.value):
            return "silent", f"{name} taken, against {call.entry.kinds[name]}"
    for name, new in call.changed.items():
        if new.done.startswith("broadcast") and _broadcasts(call, name):
            return "broadcast", f"{name} {new.done} gave {_short(result)}"
    if call.changed and all(c.same for c in call.changed.values()):
        # The arguments are made again: what a call writes into belongs to it alone.
        torch.manual_seed(seed)
        wanted = invoke(call.entry, valid_call(call.entry, seed))
        if not _alike(result, wanted):
            return "differs", f"{_short(result)} where the valid call gives {_short(wanted)}"
    return "right", ""


def _clarity(call: Call, error: Exception) -> str:
    """Whether an error names the function and an argument, as `function: argument rule, got`.

    "inner" where it names another public function that the entry calls, and the argument by the
    name that was changed.
    """
    if not isinstance(error, CLEAR) or isinstance(error, NotImplementedError):
        return "unclear"
    text = str(error)
    if text.startswith("unsupported operand type"):
        return "refused"
    if re.search(r"takes (no|\d+ positional) arguments?", text):
        return "user"  # a function that was given takes other arguments: Python names it
    prefix, _, rest = text.partition(": ")
    said = set(re.findall(r"\w+", rest))
    if prefix in call.entry.prefixes:
        return "refused" if said & {*call.entry.kinds, *_parts(call)} else "unclear"
    known = prefix in {p for e in entries().values() for p in e.prefixes}
    return "inner" if known and said & set(call.changed) else "unclear"


def _parts(call: Call) -> set[str]:
    """The fields of the records among the arguments, by which a message may name them."""
    found = {"matrix"} if "self" in call.entry.kinds else set()
    for value in call.valid.values():
        found |= {*getattr(value, "__dataclass_fields__", getattr(value, "_fields", ()))}
        if hasattr(value, "covariance") or isinstance(value, DPLR):
            found |= {"diag", "factor", "sign"}
    return found


def _broadcasts(call: Call, name: str) -> bool:
    """Whether another tensor of the call has rows that this one no longer fits."""
    if name == "factor" and call.changed[name].done.endswith("last axis of 1"):
        return False  # another rank
    if name in ONE_FOR_ALL | MANY or not isinstance(call.valid.get(name), torch.Tensor):
        return False
    others = [v for n, v in call.given.items() if n != name and n not in ONE_FOR_ALL]
    return any(isinstance(v, torch.Tensor) and v.dim() > 0 for v in others)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """The numbers of a result, in order."""
    if isinstance(result, torch.Tensor):
        yield result.detach()
    elif isinstance(result, (bool, int, float)):
        yield torch.tensor(float(result))
    elif isinstance(result, DPLR):
        yield from _tensors(list(result.parts))
    elif isinstance(result, SymmetricOperator):
        yield result.dense().detach()
    elif isinstance(result, records.Record):
        yield from _tensors([getattr(result, name) for name in result.__dataclass_fields__])
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _tensors(part)
    elif isinstance(result, dict):
        for name, part in result.items():
            if "seconds" not in str(name):
                yield from _tensors(part)


def _alike(a: Any, b: Any) -> bool:
    """Equal but for rounding, in number, shape, dtype and device."""
    one, two = list(_tensors(a)), list(_tensors(b))
    if len(one) != len(two):
        return False
    for x, y in zip(one, two, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            return False
        if not torch.allclose(x.double(), y.double(), rtol=1e-3, atol=1e-4, equal_nan=True):
            return False
    return True


def _short(result: Any) -> str:
    return re.sub(r"\s+", " ", repr(result))[:160]


# -------------------------------------------------------------------------------------- the worker


def work() -> None:
    """Reads seeds, one a line, and answers each by a line of JSON."""
    out = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what calls print belongs to nobody
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entries()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    bound = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seed = int(line)
        text = ""
        try:
            call = make_call(seed)
            text = str(call)
            kind, said = judge(call, seed)
        except Exception:  # of this file, not of the call
            kind, said = "machine", traceback.format_exc()
        answer = {"seed": seed, "kind": kind, "call": text, "said": said}
        print(json.dumps(answer), file=out, flush=True)


def run(seeds: Iterable[int], until: float = float("inf")) -> Iterator[dict[str, Any]]:
    """The outcomes of some seeds, until a time of the clock."""
    with tempfile.TemporaryDirectory(prefix="hos_api_fuzz_") as folder:

        def start() -> Worker:
            program, env = ("api_fuzz.py", "--worker"), {"TMPDIR": folder}
            return Worker(*program, seconds=SECONDS, wait=WAIT, cwd=folder, env=env)

        for answer in answers(seeds, start, until=until):
            if "call" not in answer:  # the worker is gone
                answer["call"] = str(make_call(answer["seed"]))
            yield answer


# ------------------------------------------------------------------------------------- the command


def repeat(seed: int) -> int:
    """One call here, told in full."""
    warnings.simplefilter("ignore")
    call = make_call(seed)
    print(call)
    for name, value in call.given.items():
        mark = "*" if name in call.changed else " "
        print(f"  {mark} {name} = {_short(value)}")
    kind, said = judge(call, seed)
    print(f"{kind}: {said}")
    if kind not in ("right", "refused"):
        torch.manual_seed(seed)
        try:
            invoke(make_call(seed).entry, make_call(seed).given)
        except Exception:
            traceback.print_exc()
    return kind in BAD


def check_valid() -> int:
    """Every entry takes its valid calls: else a refusal proves nothing. Prints how many do."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="hos_api_fuzz_") as folder:
        tempfile.tempdir = folder
        for entry in entries().values():
            for seed in range(3):
                try:
                    invoke(entry, valid_call(entry, seed))
                except Exception as error:
                    failed += 1
                    print(f"{entry.name} (seed {seed}): {type(error).__name__}: {error}")
        tempfile.tempdir = None
    print(f"{len(entries())} entries, {failed} valid calls refused")
    return failed > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--calls", type=int, help="this many instead of some minutes")
    parser.add_argument("--from", dest="first", type=int, help="the first seed; not recorded")
    parser.add_argument("--repeat", type=int, metavar="SEED", help="one call, told in full")
    parser.add_argument("--inner", action="store_true", help="also print what is said by others")
    parser.add_argument("--valid", action="store_true", help="the valid calls alone")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work()
        return 0
    if asked.valid:
        return check_valid()
    if asked.repeat is not None:
        return repeat(asked.repeat)
    first = RECORD.read()["next_seed"] if asked.first is None else asked.first
    until = float("inf") if asked.calls else time.monotonic() + 60 * asked.minutes
    seeds = range(first, first + (asked.calls or 10**9))
    counts: Counter[str] = Counter()
    unclear: list[int] = []
    for answer in run(seeds, until):
        counts[answer["kind"]] += 1
        if answer["kind"] in BAD or (asked.inner and answer["kind"] == "inner"):
            unclear.append(answer["seed"])
            line = f"--repeat {answer['seed']}  {answer['kind']}  {answer['call']}"
            print(f"{line}\n    {answer['said']}", flush=True)
    if asked.first is None:
        RECORD.keep(first, counts, {"unclear_seeds": unclear[:200]} if unclear else {})
    RECORD.tell(first, counts)
    return any(counts[kind] for kind in BAD)


if __name__ == "__main__":
    sys.exit(main())
