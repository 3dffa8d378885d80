"""python -m bench.instruments NAME: measures one instrument and keeps the numbers.

They go to bench/results/instruments/NAME.json, with the command, the machine and what was set.
With --quick everything is small, and the numbers are printed only: they mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import time
from pathlib import Path

import torch

from hos_ext.storage import write_whole

from ..rows import RESULTS, environment

NAMES = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name[0] != "_"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.instruments", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="small, and only printed")
    arguments = parser.parse_args()
    began = time.process_time()
    found = importlib.import_module(f"{__package__}.{arguments.name}").run(arguments.quick)
    about = {
        "instrument": arguments.name,
        "command": f"python -m bench.instruments {arguments.name}",
        **environment(),
        "threads": torch.get_num_threads(),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    text = json.dumps(about | found, indent=1) + "\n"
    if arguments.quick:
        print(text)
        return
    path = RESULTS / "instruments" / f"{arguments.name}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, text.encode())
    print(path)


if __name__ == "__main__":
    main()
