"""The options of a training, each described once.

A field says its name, its kind, its default, what it is and what it must be. The table of a run's
options (`hos_ext.app.options`), and with it the command line and run.json, is made from these
fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np

from ...checks import check, check_count, check_flag, check_int, check_number, one_of
from ...losses.score_matching import RECOMMENDED, Objective
from .devices import check_device
from .trackers import check_tracker

Check = Callable[[str, str, Any], object]

OBJECTIVE: dict[str, Any] = dict(RECOMMENDED)


def _about(help: str, check: Check | None = None, *, decides: bool = False) -> dict[str, Any]:
    """What a field is.

    Args:
        help: one line, for `--help` too.
        check: raises for a value that will not do.
        decides: whether what a step computes depends on it.
    """
    return {"help": help, "check": check, "decides": decides}


def _check_rate(where: str, name: str, value: Any) -> None:
    number = check_number(where, name, value, positive=False)
    check(where, number < 1, f"{name} must be in [0, 1)", f"{number:g}")


def _check_average(where: str, name: str, value: Any) -> None:
    number = check_number(where, name, value, positive=False)
    check(where, number < 1, f"{name} must be below 1", f"{number:g}")


def _check_range(where: str, name: str, value: Any) -> None:
    try:
        low, high = value
        good = 0 < low <= high < math.inf
    except (TypeError, ValueError):
        good = False
    check(where, good, f"{name} must be (low, high) with 0 < low <= high", value)


def _check_objective(where: str, name: str, value: Any) -> None:
    """Options of `score_matching_loss` by name; the flags among them are True or False."""
    check(where, isinstance(value, Mapping), f"{name} must be a mapping", repr(value), TypeError)
    known = Objective.__annotations__.keys() - {"reduction"}
    unknown = sorted(map(str, value.keys() - known))
    rule = f"{name} must hold options of score_matching_loss ({', '.join(sorted(known))})"
    check(where, not unknown, rule, ", ".join(unknown))
    flags = known - {"gamma", "first_order"}
    check_flag(where, **{f"{name}[{k!r}]": v for k, v in value.items() if k in flags})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a training does. Checked when it is made.

    A run goes on from a checkpoint with the same options, but for those of devices and files
    (accumulate, device, timeout, save_every, keep, log_every, tracker). With decay "constant",
    steps may become more.

    Raises:
        ValueError: an option out of range.
        TypeError: an option of the wrong kind.

    Attributes:
    """

    steps: int = field(metadata=_about("Optimiser steps.", check_count, decides=True))
    batch_size: int = field(
        default=128,
        metadata=_about("Samples in a step, all processes together.", check_count, decides=True),
    )
    accumulate: int = field(
        default=1, metadata=_about("Parts a batch is cut into, for less memory.", check_count)
    )
    learning_rate: float = field(
        default=4e-3, metadata=_about("After the warm-up.", check_number, decides=True)
    )
    decay: str = field(
        default="cosine",
        metadata=_about(
            "Of the learning rate: cosine (to zero at the last step) or constant (steps can be "
            "added).",
            partial(one_of, known=("cosine", "constant")),
            decides=True,
        ),
    )
    weight_decay: float = field(
        default=0.1,
        metadata=_about(
            "Of the weight matrices.", partial(check_number, positive=False), decides=True
        ),
    )
    # Where steps may be added later the rate does not depend on them.
    warm_up: int = field(
        default=300,
        metadata=_about(
            "Steps; with a cosine at most a tenth of all.",
            partial(check_count, least=0),
            decides=True,
        ),
    )
    max_grad_norm: float = field(
        default=5.0,
        metadata=_about("Longer gradients are scaled down to it.", check_number, decides=True),
    )
    # Early on it is lowered to (1 + t) / (10 + t).
    ema_decay: float = field(
        default=0.998,
        metadata=_about("Of the moving average of the weights.", _check_average, decides=True),
    )
    sigma_range: tuple[float, float] = field(
        default=(0.1, 1.2),
        metadata=_about(
            "Smallest and largest noise level, data units.", _check_range, decides=True
        ),
    )
    objective: Mapping[str, Any] = field(
        default_factory=OBJECTIVE.copy,
        metadata=_about("Options of `score_matching_loss`.", decides=True),
    )
    augment: str = field(
        default="none",
        metadata=_about(
            "none, flip (left and right), or distort (rotate, shear, scale, shift half of a "
            "batch).",
            partial(one_of, known=("none", "flip", "distort")),
            decides=True,
        ),
    )
    # The score without a class is learned beside: guidance needs it, and so does data without one.
    condition_dropout: float = field(
        default=0.1,
        metadata=_about(
            "Part of the labels that a step leaves out, of data with labels (for guidance).",
            _check_rate,
            decides=True,
        ),
    )
    seed: int = field(
        default=0,
        metadata=_about("Of every random choice.", partial(check_int, limit=2**63), decides=True),
    )
    # The network under autocast, the loss in float32. fp16 is not offered: its loss scaling skips
    # steps.
    mixed_precision: str = field(
        default="no",
        metadata=_about("no or bf16.", partial(one_of, known=("no", "bf16")), decides=True),
    )
    device: str = field(
        default="auto",
        metadata=_about("auto (a GPU if there is one), cpu, cuda or cuda:N.", check_device),
    )
    # accelerate's own default is half an hour for gloo. The first process measures the curve and
    # writes checkpoints while the others wait: seconds, on the disks and networks that were tried.
    timeout: int = field(
        default=600,
        metadata=_about("Seconds that a process waits for the others; then it stops.", check_count),
    )
    save_every: int = field(default=500, metadata=_about("Steps between checkpoints.", check_count))
    keep: int = field(default=3, metadata=_about("Checkpoints kept.", check_count))
    log_every: int | None = field(
        default=None,
        metadata=_about("Steps between rows of the history; None: about 50 rows.", check_count),
    )
    tracker: str = field(
        default="none",
        metadata=_about("tensorboard (RUN/logs), none, or another of accelerate.", check_tracker),
    )

    def __post_init__(self) -> None:
        check_options(vars(self))
        _check_objective("train", "objective", self.objective)
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # JSON has no numbers of numpy
                object.__setattr__(self, name, value.item())

    def deciding(self) -> dict[str, Any]:
        """The options that decide what a step computes, as plain JSON has them."""
        return {
            each.name: getattr(self, each.name) for each in fields(self) if each.metadata["decides"]
        } | {"sigma_range": list(self.sigma_range), "objective": OBJECTIVE | dict(self.objective)}


if TrainingOptions.__doc__ is not None:  # python -OO has none
    TrainingOptions.__doc__ = TrainingOptions.__doc__.rstrip() + "".join(
        f"\n        {each.name}: {each.metadata['help']}" for each in fields(TrainingOptions)
    )


def check_options(values: Mapping[str, Any]) -> None:
    """Refuses options of a training that will not do; names of other options are passed over.

    Raises:
        ValueError: an option out of range, or batch_size that accumulate does not divide.
        TypeError: an option of the wrong kind.
    """
    for each in fields(TrainingOptions):
        rule: Check | None = each.metadata["check"]
        value = values.get(each.name, each.default)
        if rule is not None and value is not each.default:
            rule("train", each.name, value)
    rows, parts = values.get("batch_size", 0), values.get("accumulate", 1)
    check("train", rows % parts == 0, f"accumulate must divide batch_size {rows}", parts)
