"""The paper's tables and figures: `python -m bench.paper table1 | fig1 | ... | all | page`.

Every item writes a page, a csv file, a figure and its settings to bench/results/paper. What is
finished is kept cell by cell: a run that was stopped goes on where it was, and items share cells.
One process uses one core: on two cores start the same command twice. `page` computes nothing: it
renders what the cells that are there allow.
Times (table2, costs in claims, rates in table3, milliseconds of images and chains) are worth what
the machine's other work leaves of them.

fig3, fig4 and fig7 to fig10 train on MNIST and CIFAR-10: --data, or HOS_DATA, names the folder with
mnist/train.parquet, mnist/test.parquet, cifar10/train.parquet and cifar10/test.parquet.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import chains, claims, figures, images, mixing, networks, table1, table2
from .record import Folders, Record, Unfinished, write_page

_GIVEN: dict[str, Callable[[Record], None]] = {
    "table1": table1.run,
    "table2": table2.run,
    **mixing.ITEMS,
    **figures.ITEMS,
    **images.ITEMS,
    **chains.ITEMS,
}
ITEMS = {name: _GIVEN[name] for name in sorted(_GIVEN, key=lambda n: (n[0] == "f", len(n), n))}
ITEMS |= claims.ITEMS


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = f"{', '.join(ITEMS)}, all, or page"
    parser.add_argument(
        "items", nargs="+", choices=[*ITEMS, "all", "page"], metavar="item", help=known
    )
    parser.add_argument(
        "--quick", action="store_true", help="small settings that show that an item works"
    )
    parser.add_argument(
        "--out", type=Path, help="folder; default bench/results/paper, with --quick build/paper"
    )
    parser.add_argument(
        "--data", type=Path, help="folder of MNIST and CIFAR-10; default the variable HOS_DATA"
    )
    parser.add_argument(
        "--runs", type=Path, help="folder of trained models; default runs/paper, or in OUT if quick"
    )
    options = parser.parse_args(arguments)
    out = options.out
    if out is None:
        out = networks.ROOT / ("build/paper" if options.quick else "bench/results/paper")
    data = options.data or (Path(os.environ["HOS_DATA"]) if "HOS_DATA" in os.environ else None)
    runs = options.runs or (out / "runs" if options.quick else networks.ROOT / "runs" / "paper")
    torch.set_num_threads(1)  # the same results on any machine, and several processes side by side
    page = "page" in options.items
    names = list(ITEMS) if page or "all" in options.items else list(dict.fromkeys(options.items))
    left: dict[str, str] = {}
    for name in names:
        record = Record(name, out, quick=options.quick, render=page, folders=Folders(data, runs))
        began = time.perf_counter()
        try:
            ITEMS[name](record)
        except Unfinished as unfinished:
            print(unfinished, flush=True)
            left[name] = str(unfinished).partition(": ")[2]
            continue
        seconds = time.perf_counter() - began
        print(f"{name}: {record.computed} cells computed, {seconds:.1f} s", flush=True)
    write_page(out, list(ITEMS), left)
    return 1 if left and not page else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
