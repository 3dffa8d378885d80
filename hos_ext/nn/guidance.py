"""Classifier-free guidance: a conditional model pushed further towards its condition.

At each noise level, with p(x | y) and p(x) the noisy densities with and without a condition y, the
guided density is q(x) = p(x | y)^w p(x)^(1 - w) / Z. Its log is a weighted sum, and so are the
score and the Hessian of it:

    s1 = w s1(x | y) + (1 - w) s1(x),    s2 = w s2(x | y) + (1 - w) s2(x).

As w + (1 - w) = 1 the same holds of kappa = I + sigma^2 s2, so that c and the factors of the two
parts are weighted alike. For w > 1 the second part is subtracted: its columns have the sign -1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import as_float, check, check_callable, check_like, check_samples, is_number
from ..conditions import Conditions, check_conditions, move_conditions, repeat_conditions
from ..scores import ScoreModel, Scores

_WHERE = "ClassifierFree"


class ClassifierFree(nn.Module):
    """`model(x, sigma, **model_kwargs) -> Scores` of the guided density p(x | y)^w p(x)^(1 - w).

    w = 1 is the conditional model, w = 0 the unconditional one. w > 1 makes what is typical of the
    condition more so, often at the price of variety. Samplers and likelihoods take it as any model.

    What its second order means. c, factor and sign give the Hessian of log q, exactly where those
    of the model are exact. For w = 1 kappa = alpha^2 Cov[x0 | x, y] / sigma^2 is a covariance. For
    any other w it is not that of any denoiser: q at one noise level is in general no noisy version
    of q at another, so that there is no clean density behind it. For w in [0, 1] kappa is still
    positive definite. For w > 1 it is kappa_y + (w - 1) (kappa_y - kappa), which is negative along
    directions in which the condition says much (kappa_y < (1 - 1 / w) kappa). `posterior` of such
    scores gives the mean that samplers use. Its covariance is a number for the curvature of log q:
    `std` is NaN where a variance is negative, and `sample`, `log_prob` and `second_order_reverse`
    refuse it. For the uncertainty of a denoised sample use the model itself, or w = 1.

    Args:
        model: a conditional model, called twice; once where w is 0 or 1. Of first order, a
            `ModelScore` for one, it gives a tensor, and so does this.
        scale: w, finite. Others call it the guidance scale; some of them count from 0, w - 1.
        unconditional: the conditions that mean "none", such as {"label": None}, or {"text":
            embedding_of_nothing} of one row, which stands for all samples; conditions that it does
            not name stay as they are. None: the model is called without any.

    Attributes:
        model, scale, unconditional: as they were given.
        conditions: names of what the model takes, if it says so.

    Raises:
        TypeError: model is not callable, scale no number, unconditional no mapping.
        ValueError: scale is not finite; a tensor in unconditional has not one row.

    References:
        Ho and Salimans 2022, arXiv:2207.12598, Eq. 6, where scale is 1 + w.

    Example:
        >>> import hos_ext, torch
        >>> model = hos_ext.MLP((2,), rank=1, num_classes=10)
        >>> guided = hos_ext.nn.ClassifierFree(model, 3.0)
        >>> scores = guided(torch.zeros(4, 2), 0.5, label=torch.tensor([1, 2, 3, 10]))
        >>> scores.factor.shape, scores.sign
        (torch.Size([4, 2, 2]), tensor([ 1., -1.]))
    """

    def __init__(
        self, model: ScoreModel, scale: float | Tensor, unconditional: Conditions | None = None
    ) -> None:
        super().__init__()
        check_callable(_WHERE, "model", model)
        if isinstance(scale, Tensor) and scale.dim() == 0 and not scale.is_meta:
            scale = scale.item()  # as every number may come
        fine = is_number(scale)
        check(_WHERE, fine, "scale must be a number", type(scale).__name__, TypeError)
        self.scale = as_float(scale)
        check(_WHERE, math.isfinite(self.scale), "scale must be finite", scale)
        try:
            known = check_conditions(_WHERE, unconditional, 1, "a sample")
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("model_kwargs", "unconditional", 1)) from None
        self.model = model
        self.unconditional = None if unconditional is None else known

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions that the model takes, if it says so."""
        return tuple(getattr(self.model, "conditions", ()))

    def forward(self, x: Tensor, sigma: Tensor | float, **model_kwargs: Any) -> Scores | Any:
        """The scaled scores of the guided density.

        Args:
            x: noisy samples. Shape (B, *dims), as the model takes them.
            sigma: noise standard deviation, > 0. Float or shape (B,). Data units.
            model_kwargs: the condition y, each tensor of one row a sample.

        Returns:
            Scores, whose factor has the columns of both parts; of a first-order model its score.

        Raises:
            ValueError: the model's sign, rank or shapes are not the same with and without the
                condition; what the model raises.
            TypeError: the model returns neither `Scores` nor a tensor.
        """
        check_samples(_WHERE, "x", x)
        given = check_conditions(_WHERE, model_kwargs, len(x))
        if self.scale == 1:
            return self.model(x, sigma, **given)
        bare = self._bare(given, x)
        if self.scale == 0:
            return self.model(x, sigma, **bare)
        conditional = self.model(x, sigma, **given)
        return guided_scores(conditional, self.model(x, sigma, **bare), self.scale)

    def _bare(self, given: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
        """The conditions of the call without one."""
        if self.unconditional is None:
            return {}
        # No buffers, which would be in checkpoints: they go where the samples are.
        own = move_conditions(self.unconditional, x.device)
        return {**given, **repeat_conditions(own, len(x))}

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale:g}"


def guided_scores(with_condition: Any, without: Any, scale: float) -> Any:
    """w times the first plus (1 - w) times the second, which are `Scores` or tensors alike."""
    both = (with_condition, without)
    for scores in both:
        got = type(scores).__name__
        fine = isinstance(scores, (Scores, Tensor)) and isinstance(scores, type(with_condition))
        rule = "model must return Scores, or a tensor, at both calls"
        check(_WHERE, fine, rule, got, TypeError)
    if isinstance(with_condition, Tensor):
        check_like(_WHERE, "score without the condition", without, with_condition)
        return scale * with_condition + (1 - scale) * without
    first, second = both
    name = "scaled_score without the condition"
    check_like(_WHERE, name, second.scaled_score, first.scaled_score)
    score = scale * first.scaled_score + (1 - scale) * second.scaled_score
    if first.c is None or second.c is None:
        return Scores(score, None)  # type: ignore[arg-type]
    c = scale * first.c + (1 - scale) * second.c
    parts = [(weight, each) for weight, each in zip((scale, 1 - scale), both, strict=True)]
    columns = [abs(weight) ** 0.5 * each.factor for weight, each in parts if _rank(each)]
    if not columns:
        return Scores(score, c, first.factor)
    signs = [_signs(each, weight) for weight, each in parts if _rank(each)]
    return Scores(score, c, torch.cat(columns, -1), torch.cat(signs))


def _rank(scores: Scores) -> int:
    return 0 if scores.factor is None else scores.factor.shape[-1]


def _signs(scores: Scores, weight: float) -> Tensor:
    """Those of the columns, turned by a negative weight."""
    assert scores.factor is not None
    own = scores.sign
    if own is None:
        own = scores.factor.new_ones(_rank(scores))
    return own.to(scores.factor.dtype) * (1.0 if weight > 0 else -1.0)
