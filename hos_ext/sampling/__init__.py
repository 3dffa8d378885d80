"""Chains: the driver, the steps, step sizes, diagnostics, many processes.

`sample` runs chains. `methods` has one class a step; `register_step` adds one from outside.
"""

from .arguments import ChainState
from .chains import ChainOptions, Chains, sample
from .diagnostics import LawError, ess, ess_rate, law_error, min_ess, mode_jumps, r_hat
from .distributed import sample_sharded, shard
from .methods import (
    BoundWarning,
    Metropolis,
    NormalLaw,
    NormalStep,
    PlainStep,
    Point,
    SmoothBound,
    Step,
    StepOptions,
    SupportBound,
    TwoCoin,
    diagonal_law,
    make_step,
    method_names,
    register_step,
    spectral_law,
    step_noise,
    step_size_column,
    unregister_step,
)
from .step_size import StepSizeAdaptation, StepSizeSearch, adapt_step_size, search_step_size
from .watch import RunawayWarning

__all__ = [
    "BoundWarning",
    "ChainOptions",
    "ChainState",
    "Chains",
    "LawError",
    "Metropolis",
    "NormalLaw",
    "NormalStep",
    "PlainStep",
    "Point",
    "RunawayWarning",
    "SmoothBound",
    "Step",
    "StepOptions",
    "StepSizeAdaptation",
    "StepSizeSearch",
    "SupportBound",
    "TwoCoin",
    "adapt_step_size",
    "diagonal_law",
    "ess",
    "ess_rate",
    "law_error",
    "make_step",
    "method_names",
    "min_ess",
    "mode_jumps",
    "r_hat",
    "register_step",
    "sample",
    "sample_sharded",
    "search_step_size",
    "shard",
    "spectral_law",
    "step_noise",
    "step_size_column",
    "unregister_step",
]
