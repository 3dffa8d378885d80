"""The paper's tables and figures: `python -m bench.paper table1 | table3 | fig1 | ... | all`.

Every item writes a page, a csv file, a figure and its settings to bench/results/paper. What is
finished is kept cell by cell: a run that was stopped goes on where it was, and items share cells.
On two cores run it twice, with --share 0/2 and --share 1/2, and then once more without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import claims, figures, mixing, table1
from .networks import ROOT
from .record import Record, Unfinished, write_page

ITEMS: dict[str, Callable[[Record], None]] = {
    "table1": table1.run,
    **mixing.ITEMS,
    **figures.ITEMS,
    **claims.ITEMS,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = f"{', '.join(ITEMS)}, or all"
    parser.add_argument("items", nargs="+", choices=[*ITEMS, "all"], metavar="item", help=known)
    parser.add_argument(
        "--quick", action="store_true", help="small settings that show that an item works"
    )
    parser.add_argument(
        "--out", type=Path, help="folder; default bench/results/paper, with --quick build/paper"
    )
    parser.add_argument(
        "--share",
        type=_share,
        default=(0, 1),
        metavar="I/N",
        help="compute every N-th missing cell, from the I-th on",
    )
    options = parser.parse_args(arguments)
    out = options.out
    if out is None:
        out = ROOT / ("build/paper" if options.quick else "bench/results/paper")
    torch.set_num_threads(1)  # the same results on any machine, and several processes side by side
    names = list(ITEMS) if "all" in options.items else list(dict.fromkeys(options.items))
    left = 0
    for name in names:
        record = Record(name, out, quick=options.quick, share=options.share)
        began = time.perf_counter()
        try:
            ITEMS[name](record)
        except Unfinished as unfinished:
            print(unfinished, flush=True)
            left += 1
            continue
        seconds = time.perf_counter() - began
        print(f"{name}: {record.computed} cells computed, {seconds:.1f} s", flush=True)
    write_page(out, list(ITEMS))
    return 1 if left else 0


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
