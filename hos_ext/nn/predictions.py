"""How a network is read: what it is given, at what time, and what it predicts.

Samples come in variance-exploding coordinates, x = x0 + ratio z. A network knows
x_t = alpha x = alpha x0 + sigma z instead, at the time t of its schedule at which
sigma(t) / alpha(t) is the ratio. E[z | x] is the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..schedules import DiscreteVP, Schedule
from ..tweedie.conversions import noise_from_x0
from ..tweedie.path import Path, v_path

Prediction = Literal["score", "eps", "x0", "v", "flow", "edm"]
Time = Literal["t", "sigma", "timestep", "c_noise"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
TIMES: tuple[str, ...] = get_args(Time)


class Place(NamedTuple):
    """Where samples stand in a schedule. Each float64, `()` or `(B,)`, on the CPU.

    Attributes:
        t: time of the schedule.
        alpha: scale of x0 in x_t.
        sigma: standard deviation of the noise in x_t.
        ratio: sigma / alpha, the noise in data units.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    ratio: Tensor


def place_of(schedule: Schedule, ratio: Tensor) -> Place:
    """The place at which the noise in data units is the ratio, float64 on the CPU."""
    t = schedule.t_of_ratio(ratio)
    alpha = schedule.alpha(t)
    return Place(t, alpha, alpha * ratio, ratio)


@dataclass(frozen=True)
class Reading:
    """What a network is given and what its output means.

    Attributes:
        schedule: whose times the network knows.
        prediction: what it predicts: one of `PREDICTIONS`.
        time: what it takes for the time: one of `TIMES`, or "part" (the index in a table over the
            last one), "reversed" (1 - t, or the last index minus t) or "log_sigma".
        num_timesteps: timesteps in a unit of t, for a schedule without a table.
        sigma_data: of "edm".
        plain: it is given x itself, whatever the schedule's alpha.
        sign: -1 turns its output.
        known: False for a function that is held to be sigma s1 itself.
    """

    schedule: Schedule
    prediction: str
    time: str
    num_timesteps: float = 1000.0
    sigma_data: float = 0.5
    plain: bool = False
    sign: int = 1
    known: bool = True

    def inputs(self, x: Tensor, at: Place) -> Tensor:
        """What the network is given for samples x: alpha x, or c_in x for "edm"."""
        if self.prediction == "edm":
            return column(1 / (at.ratio.square() + self.sigma_data**2).sqrt(), x) * x
        return x if self.plain else column(at.alpha, x) * x

    def times(self, at: Place) -> Tensor:
        """What the network is given for the time, float64 as the place."""
        table = isinstance(self.schedule, DiscreteVP)
        last = self.schedule.t_max if table else 1.0
        if self.time == "timestep":
            return at.t if table else self.num_timesteps * at.t
        values = {
            "t": at.t,
            "sigma": at.ratio if self.plain else at.sigma,
            "c_noise": at.ratio.log() / 4,
            "log_sigma": at.ratio.log(),
            "part": at.t / last,
            "reversed": last - at.t,
        }
        return values[self.time]

    def noise(self, output: Tensor, x: Tensor, at: Place) -> Tensor:
        """E[z | x] from what the network gave for samples x."""
        if self.sign < 0:
            output = -output
        if self.prediction == "eps":
            return output
        ratio = column(at.ratio, x)
        if self.prediction == "edm":
            # D = c_skip x + c_out F, and (x - D) / ratio without their cancellation.
            variance = ratio.square() + self.sigma_data**2
            return ratio / variance * x - self.sigma_data * variance.rsqrt() * output
        if self.plain:
            alpha, sigma, x_t = torch.ones_like(ratio), ratio, x
        else:
            alpha, sigma = column(at.alpha, x), column(at.sigma, x)
            x_t = alpha * x
        if self.prediction == "score":
            return -sigma * output
        if self.prediction == "x0":
            return noise_from_x0(x_t, output, sigma, alpha)
        if self.prediction == "v":
            return v_path(sigma, alpha).noise(x_t, output)
        slopes = (self.schedule.alpha_slope(at.t), self.schedule.sigma_slope(at.t))
        path = Path(sigma, alpha, *(column(slope, x) for slope in slopes))
        return path.noise(x_t, output)


def column(value: Tensor, x: Tensor) -> Tensor:
    """A level in the dtype and on the device of x, shaped to broadcast against it."""
    value = value.to(x.dtype).to(x.device)
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (x.dim() - 1))
