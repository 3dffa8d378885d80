"""What the tests share: the devices, the tolerances with their reasons, the hypothesis profiles."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from hos_ext import build_info

# No deadline: the first example of a run pays for imports and caches. CI draws the same examples
# each time; elsewhere every run draws new ones and prints how to repeat a failure.
settings.register_profile("local", deadline=None, database=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# One thread where a test does not ask for more: batches of small factorisations run several times
# faster, and a parallel LU inside torch's own parallel loop has been seen to wait for ever.
torch.set_num_threads(1)

# A shell that runs the tests in the background has them ignore what Ctrl-C sends; some send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = ["cpu"]
if torch.cuda.is_available() and build_info()["cuda_built"]:
    DEVICES.append("cuda")

# Largest error, relative to the largest entry of the expected tensor.
#   float64: sums of up to 2050 x 22 terms in another order, 2^-52 each, some of them cancelling.
#   float32: the same with 2^-24; 1/sigma^2 = 4 or so in front of differences.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}
# One rounding to storage on top of float32 arithmetic: half an ulp, in units of the largest entry.
ROUNDING |= {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Normals: float32 polynomials for log, cos and sin against float64 functions, absolute.
NORMAL_ATOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# A mean of independent terms, in standard errors: 5 is passed by chance once in 2 million; what a
# wrong formula must reach, so that the test is known to see it.
WITHIN, BEYOND = 5.0, 10.0


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU always; CUDA where it is present and built."""
    return torch.device(request.param)


def assert_near(
    value: Tensor, expected: Tensor, *, times: float = 1.0, terms: Tensor | None = None
) -> None:
    """Same shape, and equal to `ROUNDING` of value's dtype (`times` that) of the largest entry.

    The largest entry of `terms` counts instead where the entries may cancel to nothing.
    """
    assert value.shape == expected.shape
    if value.numel() == 0:
        return
    wanted = expected.detach().double().cpu()
    error = (value.detach().double().cpu() - wanted).abs().max()
    largest = (wanted if terms is None else terms).abs().max()
    limit = times * ROUNDING[value.dtype] * largest
    assert error <= limit, f"largest error {error:.3g}, allowed {limit:.3g}"


def z_scores(terms: Tensor) -> Tensor:
    """Means over the first axis, in standard errors."""
    flat = terms.double().reshape(terms.shape[0], -1)
    return flat.mean(0) / (flat.std(0) / flat.shape[0] ** 0.5)
