"""What a scheduler of diffusers says of the network that was trained with it."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..checks import check, check_number, one_of, said_by
from ..nn.predictions import Prediction
from ..schedules import EDM, Rectified, Schedule, from_alphas_cumprod

# prediction_type of diffusers, and what it is here. Without a table: of EDM's preconditioning.
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_EDM_SIGNS = {"epsilon": 1, "v_prediction": -1}


class Plan(NamedTuple):
    """How a network is to be read.

    Attributes:
        kind: the prediction_type of diffusers; "flow" or "edm epsilon" where there is no table.
        schedule, prediction: as `ModelScore` takes them.
        num_timesteps: timesteps in a unit of t, of flow matching.
        sigma_data: of EDM.
        sign: of the network's output.
    """

    kind: str
    schedule: Schedule
    prediction: Prediction
    num_timesteps: float | None = None
    sigma_data: float | None = None
    sign: int = 1


def plan_of(where: str, scheduler: Any) -> Plan:
    """The plan of a scheduler with a table of alphas, of flow matching, or of EDM.

    Raises:
        TypeError, ValueError: it is of another kind.
    """
    config: Any = getattr(scheduler, "config", None)
    kind = getattr(config, "prediction_type", None)
    flow = type(scheduler).__name__.startswith("FlowMatch")
    if flow or kind == "flow_prediction" or getattr(config, "use_flow_sigmas", False):
        return _flow(where, config, "shift" if flow else "flow_shift")
    if hasattr(scheduler, "precondition_outputs"):
        name = "scheduler.config.prediction_type"
        sign = _EDM_SIGNS[one_of(where, name, kind, _EDM_SIGNS)]
        with said_by(where, "EDM"):
            schedule = EDM(config.sigma_min, config.sigma_max, config.rho)
        sigma_data = check_number(where, "scheduler.config.sigma_data", config.sigma_data)
        return Plan(f"edm {kind}", schedule, "edm", sigma_data=sigma_data, sign=sign)
    table: Any = getattr(scheduler, "alphas_cumprod", None)
    got = type(scheduler).__name__
    rule = "scheduler must have alphas_cumprod, or be of flow matching or EDM"
    check(where, table is not None, rule, got)
    many = getattr(table, "ndim", 0) == 1 and len(table) > 0
    check(where, many, "scheduler.alphas_cumprod must have shape (N,)", type(table).__name__)
    one_of(where, "scheduler.config.prediction_type", kind, _PREDICTIONS)
    steps = getattr(config, "timestep_type", "discrete")
    rule = "scheduler.config.timestep_type must be 'discrete'"
    check(where, steps == "discrete", rule, repr(steps))
    # No signal, hence no score, at the last time; Euler's scheduler puts 2^-24 there.
    if table[-1] == 0 or (len(table) > 1 and table[-1] == 2**-24 > table[-2]):
        table = table[:-1]
    with said_by(where, "from_alphas_cumprod", alphas_cumprod="scheduler.alphas_cumprod"):
        return Plan(str(kind), from_alphas_cumprod(table), _PREDICTIONS[str(kind)])


def _flow(where: str, config: Any, name: str) -> Plan:
    """x_t = (1 - t) x0 + t z; timesteps are num_train_timesteps * t."""
    steps = check_number(
        where,
        "scheduler.config.num_train_timesteps",
        getattr(config, "num_train_timesteps", None),
    )
    flipped = getattr(config, "invert_sigmas", False)
    rule = "scheduler.config.invert_sigmas must be False (or call must turn time and sign)"
    check(where, not flipped, rule, flipped)
    # The shift is that of the grid and of training times; a time is a time with any of them.
    shift = check_number(where, f"scheduler.config.{name}", getattr(config, name, None) or 1.0)
    return Plan("flow", Rectified(shift=shift), "flow", num_timesteps=steps)
