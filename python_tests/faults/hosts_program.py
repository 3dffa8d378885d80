"""Chains over hosts, as a process of torchrun: a file of the draws of every rank.

Run as `python -m torch.distributed.run ... hosts_program.py FOLDER`.
"""

import sys
from pathlib import Path

import torch
from torch import distributed as dist

from hos_ext.sampling import sample_sharded
from hos_ext.scores import UnscaledScores

METHODS = ("langevin", "ozaki", "mh_ozaki")


def well(x: torch.Tensor) -> UnscaledScores:
    """log p = sum of x^2 / 2 - x^4 / 4: no row sees the rows beside it."""
    return UnscaledScores(x - x**3, 1 - 3 * x**2)


def draws(method: str) -> torch.Tensor:
    """Of 11 chains, a number that neither two nor three hosts share evenly."""
    init = torch.linspace(-1.5, 1.5, 66).reshape(11, 6)
    return sample_sharded(well, init, method=method, step_size=0.05, n_steps=200, seed=7).draws


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {method: draws(method) for method in METHODS}
    torch.save(found, Path(sys.argv[1], f"draws-{dist.get_rank()}.pt"))
    dist.barrier()
    dist.destroy_process_group()
