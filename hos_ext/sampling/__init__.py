"""Chains: the driver, step sizes, diagnostics, many processes."""

from .chains import Chains, ChainState, sample
from .diagnostics import ess, ess_rate, min_ess, mode_jumps, r_hat
from .distributed import sample_sharded, shard
from .step_size import adapt_step_size, search_step_size

__all__ = [
    "ChainState",
    "Chains",
    "adapt_step_size",
    "ess",
    "ess_rate",
    "min_ess",
    "mode_jumps",
    "r_hat",
    "sample",
    "sample_sharded",
    "search_step_size",
    "shard",
]
