"""Any first-order network as a score, whatever it predicts and however it tells the time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import (
    WIDE,
    check,
    check_callable,
    check_number,
    check_samples,
    one_of,
    positive,
    said_by,
)
from ..conditions import check_conditions
from ..schedules import DiscreteVP, Schedule, check_schedule
from ..scores import Scores
from .model_check import check_model, warn_of
from .predictions import PREDICTIONS, TIMES, Place, Prediction, Reading, place_of

Call = Callable[..., Any]


class ModelScore(nn.Module):
    """The scaled score sigma * s1 of any network, in variance-exploding coordinates.

    `score(x, sigma)` finds the time t of the schedule at which sigma(t) / alpha(t) is sigma, calls
    the network on x_t = alpha(t) x, and turns what it predicts into sigma * s1. That is what
    `SecondOrderHead` takes, and what all samplers of first order take after a division by sigma.

        prediction  what the network gives at x_t = alpha x0 + sigma z
        "eps"       E[z | x_t], the noise
        "x0"        E[x0 | x_t], the clean sample: denoisers, and EDM networks with their
                    preconditioning
        "v"         E[alpha z - sigma x0 | x_t] (Salimans and Ho)
        "score"     the gradient of log p_t at x_t
        "flow"      E[dx_t/dt | x_t] = E[alpha' x0 + sigma' z | x_t], the velocity of flow matching
        "edm"       F of Karras et al., without its preconditioning: the network is given
                    c_in x, and D = c_skip x + c_out F is E[x0 | x]

    Args:
        net: a module or function, called as `net(x_t, time, **model_kwargs)`, time of shape (B,).
            Where its second argument is another one and it has a `timestep`, the time is given by
            that name. It returns a tensor like x_t, an object with such a tensor as `sample`, or a
            tuple that begins with one. With twice the channels (a learned variance) the first half
            of axis 1 counts. Parameters of float32 or float64: the network works in their dtype,
            and the score has that of x. Times need not be whole numbers.
        schedule: alpha(t) and sigma(t) of the noise that the network was trained with: `EDM()` for
            plain noise x0 + sigma z, `VP()`, `from_alphas_cumprod(table)`.
        prediction: what the network predicts, from the table above.
        time: what the network is given for the time. "t": the time of the schedule; "sigma":
            sigma(t), the noise in x_t; "timestep": the index in the table of a `DiscreteVP`, and
            for other schedules num_timesteps * t; "c_noise": log(sigma(t) / alpha(t)) / 4. None is
            "c_noise" for prediction="edm", and "t" for the others.
        call: how the network is called where it has a signature of its own:
            `call(net, x_t, time, **model_kwargs)`. It may change the time or the sign as well.
        num_timesteps: for time="timestep" without a table; None is 1000.
        sigma_data: of prediction="edm", standard deviation of the data; None is 0.5.
        check: clean samples, or the shape (B, *dims) of a batch, on which the network is looked at
            once by `check_model`: what looks wrong is warned of. For a conditional network call
            `check_model(score, data, model_kwargs=...)`.

    Attributes:
        net: the network, as it was given.
        schedule: as it was given.
        sigma_range: least and greatest sigma that the schedule has. Data units.

    Raises:
        TypeError: net or call is not callable, schedule is none, an argument of another kind.
        ValueError: an unknown prediction or time; an option that the others leave no use for; a
            network of half precision.

    References:
        Ho et al. 2020, arXiv:2006.11239 (eps); Salimans and Ho 2022, arXiv:2202.00512 (v); Karras
        et al. 2022, arXiv:2206.00364 (edm, Eq. 7); Lipman et al. 2023, arXiv:2210.02747 (flow).

    Example:
        >>> import hos_ext, torch
        >>> def net(x_t, t):  # the noise in x_t, where x0 is N(0, I): a network of one's own
        ...     return hos_ext.VP().sigma(t).unsqueeze(-1) * x_t
        >>> score = hos_ext.ModelScore(net, hos_ext.VP(), "eps")
        >>> score(torch.ones(2, 3), 0.5)  # -sigma x / (1 + sigma^2)
        tensor([[-0.4000, -0.4000, -0.4000],
                [-0.4000, -0.4000, -0.4000]])
    """

    def __init__(
        self,
        net: Call,
        schedule: Schedule,
        prediction: Prediction,
        *,
        time: Literal["t", "sigma", "timestep", "c_noise"] | None = None,
        call: Call | None = None,
        num_timesteps: float | None = None,
        sigma_data: float | None = None,
        check: Tensor | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self._where = type(self).__name__
        self.reading = _reading(
            self._where, net, schedule, prediction, time, call, num_timesteps, sigma_data
        )
        self.net, self.schedule, self.call = net, schedule, call
        self._by_name = call is None and _takes_timestep_by_name(net)
        ends = (schedule.t_min, schedule.t_max)
        low, high = (schedule.sigma(t) / schedule.alpha(t) for t in ends)
        self.sigma_range = (low, high)
        if check is not None:
            with said_by(self._where, "check_model", data="check"):
                warn_of(self._where, check_model(self, check))

    def forward(self, x: Tensor, sigma: Tensor | float, **model_kwargs: Any) -> Tensor:
        """sigma * s1 at x = x0 + sigma z.

        Args:
            x: noisy samples. Shape (B, *dims), float32 or float64. Data units.
            sigma: noise standard deviation within `sigma_range`. Float or shape (B,). Data units.
            model_kwargs: conditions of the network, each tensor with B rows.

        Returns:
            As x. No units.

        Raises:
            ValueError: x, sigma or a condition does not fit, or the network returns another shape.
            TypeError: the network is called otherwise than it can be, or returns something else.
        """
        where = self._where
        check_samples(where, "x", x)
        conditions = check_conditions(where, model_kwargs, x.shape[0])
        at = self._place(positive(where, "sigma", sigma, x))
        output = self.output(self.reading.inputs(x, at), self.reading.times(at), conditions)
        return -self.reading.noise(output, x, at)

    def output(self, x_t: Tensor, time: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """What the network gives for checked arguments, like x_t. time: `()` or `(B,)`."""
        where = self._where
        weight = None
        if isinstance(self.net, nn.Module):
            weight = next((p for p in self.net.parameters() if p.dtype.is_floating_point), None)
        dtype = x_t.dtype if weight is None else weight.dtype
        if weight is not None:
            rule = f"x must be on {weight.device} like the network"
            check(where, x_t.device == weight.device, rule, x_t.device)
            check(where, dtype in WIDE, "net must be float32 or float64", dtype)
        times = time.to(dtype).to(x_t.device).expand(x_t.shape[0])
        answer = self._ask(x_t.to(dtype), times, model_kwargs)
        output = _tensor_of(where, answer)
        doubled = (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:])
        if output.shape == doubled:
            output = output[:, : x_t.shape[1]]
        rule, got = f"net must return shape {tuple(x_t.shape)}", tuple(output.shape)
        check(where, output.shape == x_t.shape, rule, got)
        return output.to(x_t.dtype)

    def _ask(self, x_t: Tensor, times: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """What the network returns."""
        net, where = self.net, self._where
        if self.call is not None:
            return self.call(net, x_t, times, **model_kwargs)
        args: tuple[Tensor, ...] = (x_t,) if self._by_name else (x_t, times)
        by_name = {"timestep": times} if self._by_name else {}
        try:
            return net(*args, **by_name, **model_kwargs)
        except TypeError as error:
            # An error of its own, or one of how it is called?
            if _fits(net, *args, **by_name, **model_kwargs):
                raise
            names = "".join(f", {name}" for name in model_kwargs)
            rule = f"net must take (x, time{names}): more goes by name, or call tells how"
            raise TypeError(f"{where}: {rule}, got: {error}") from error

    def _place(self, level: Tensor) -> Place:
        """Where a level stands in the schedule; sigma out of its range is refused."""
        # On the CPU: where t is found by bisection these are hundreds of tiny operations.
        ratio = level.flatten().cpu() if level.dim() else level.cpu()
        # Not new_tensor: torch cannot make one like a view with its negative bit set.
        low, high = torch.tensor(self.sigma_range, dtype=ratio.dtype)
        bad = (ratio < low) | (ratio > high)
        if bool(bad.any()):
            rule = f"sigma must be in [{low:g}, {high:g}], the noise levels of the schedule"
            raise ValueError(f"{self._where}: {rule}, got {ratio[bad].flatten()[0]:g}")
        return place_of(self.schedule, ratio.double().clamp(*self.sigma_range))

    def extra_repr(self) -> str:
        """What it is, beside its network."""
        return f"{self.reading.prediction!r}, time={self.reading.time!r}, {self.schedule!r}"


def _reading(
    where: str,
    net: Any,
    schedule: Schedule,
    prediction: str,
    time: str | None,
    call: Any,
    num_timesteps: float | None,
    sigma_data: float | None,
) -> Reading:
    """How a network is read, from the arguments of `ModelScore`."""
    check_callable(where, "net", net)
    check_schedule(where, schedule)
    one_of(where, "prediction", prediction, PREDICTIONS)
    if time is None:
        time = "c_noise" if prediction == "edm" else "t"
    one_of(where, "time", time, TIMES)
    if call is not None:
        check_callable(where, "call", call)
    table = isinstance(schedule, DiscreteVP)
    if num_timesteps is not None:
        num_timesteps = check_number(where, "num_timesteps", num_timesteps)
        rule = "num_timesteps must be None but for time='timestep' without a table"
        check(where, time == "timestep" and not table, rule, num_timesteps)
    if sigma_data is not None:
        sigma_data = check_number(where, "sigma_data", sigma_data)
        rule = "sigma_data must be None but for prediction='edm'"
        check(where, prediction == "edm", rule, sigma_data)
    if time == "timestep" and not table:
        rule = "time must not be 'timestep' with a schedule whose times pass 1 and are no table"
        check(where, schedule.t_max <= 1, rule, lambda: repr(schedule))
    if isinstance(net, nn.Module):
        for dtype in {p.dtype for p in net.parameters() if p.dtype.is_floating_point}:
            check(where, dtype in WIDE, "net must be float32 or float64", dtype)
    return Reading(schedule, prediction, time, num_timesteps or 1000.0, sigma_data or 0.5)


def _takes_timestep_by_name(net: Call) -> bool:
    """Whether a network has an argument `timestep` that is not the second one."""
    names = list(_parameters(net))
    return "timestep" in names and names.index("timestep") != 1


def _parameters(net: Call) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(_called(net)).parameters)
    except (TypeError, ValueError):  # a builtin
        return {}


def _called(net: Call) -> Call:
    return net.forward if isinstance(net, nn.Module) else net


def _fits(net: Call, *args: Any, **kwargs: Any) -> bool:
    """Whether the arguments are those that a network has."""
    try:
        inspect.signature(_called(net)).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _tensor_of(where: str, answer: Any) -> Tensor:
    """The tensor in what a network returns."""
    found = answer
    if not isinstance(found, (Tensor, Scores)):
        sample = getattr(found, "sample", None)
        if isinstance(sample, Tensor):
            found = sample
        elif isinstance(found, (tuple, list)) and found:
            found = found[0]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        rule = "net must return a floating Tensor, an object with one as 'sample', or a tuple of it"
        got = found.dtype if isinstance(found, Tensor) else type(answer).__name__
        raise TypeError(f"{where}: {rule}, got {got}")
    return found
