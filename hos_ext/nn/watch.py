"""A look at the first samples of a training: is the score that a head stands on one at all?

The losses of a head are finite whatever its score is, and fall. So a network that predicts eps or
x0, given as if it were sigma s1, trains silently to nonsense. But in its loss the noise is known: a
score that guesses it worse than zero does is none.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from .predictions import column

_SAMPLES, _NUMBERS, _CALLS = 64, 4096, 200  # enough: so many of both, or of calls
# What the output may be instead of sigma s1, with the noise that it then stands for.
_OTHERS = ("eps", "x0", "score")


class ScoreWatch:
    """Watches the first samples that a loss visits, and warns once.

    It keeps errors on the device until it has seen 64 samples and 4096 numbers, then reads them
    once. After that it is `done`, which is all that a step asks.
    """

    def __init__(self) -> None:
        self.done = False
        self._seen: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor | float, noise: Tensor, score: Tensor) -> None:
        """Counts samples x = alpha x0 + sigma noise with sigma s1 as it was given."""
        with torch.no_grad():
            x, z, s = (each.double().flatten(1) for each in (x, noise, score))
            level = column(torch.as_tensor(sigma), x)
            guesses = [-s, torch.zeros_like(s), s, (x - s) / level, -level * s]
            self._seen.append(torch.stack([(z - guess).square().mean(1) for guess in guesses]))
        count = sum(rows.shape[1] for rows in self._seen)
        enough = count >= _SAMPLES and count * z.shape[1] >= _NUMBERS
        if enough or len(self._seen) >= _CALLS:
            rows, self._seen, self.done = torch.cat(self._seen, 1).cpu(), [], True
            self._judge(rows)

    def _judge(self, rows: Tensor) -> None:
        given, zero, *others = rows.unbind()
        unit = float(zero.mean())
        best = min(range(len(others)), key=lambda i: float(others[i].mean()))
        # The true score is the best guess there is: as nothing else can it do better.
        named = float(others[best].mean()) < 0.8 * min(float(given.mean()), unit)
        named = named and _above(given, others[best], 0.0)
        if not (named or _above(given, zero, 0.05 * unit)):
            return
        error = f"error {float(given.mean()) / unit:.3g} of the noise's"
        also = f", {float(others[best].mean()) / unit:.3g} with prediction={_OTHERS[best]!r}"
        warnings.warn(
            "SecondOrderHead: score_model must give sigma * s1, and what it gives guesses the "
            f"noise badly ({error}, 1 is no guess{also if named else ''}; {len(zero)} training "
            "samples). hos_ext.ModelScore(net, schedule, prediction) makes a score of any network",
            stacklevel=5,
        )


def _above(rows: Tensor, other: Tensor, least: float) -> bool:
    """Whether errors are above others on the same samples by more than chance."""
    apart = rows - other
    return float(apart.mean()) > least + 5 * float(apart.std()) / math.sqrt(len(apart))
