"""A second-order head on a first-order model that stays as it is: uncertainty for a model one has.

Everything is trained in variance-exploding coordinates, x = x0 + sigma z. A variance-preserving
network knows alpha x instead, with alpha = 1 / sqrt(1 + sigma^2), at the time t whose noise is
alpha sigma: there sigma(t) / alpha(t) = sigma. Scaled quantities do not change from x to alpha x:
the score of the density of alpha x is s1(x) / alpha, so (alpha sigma) (s1 / alpha) = sigma s1, and
likewise c and sigma U.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..checks import (
    check,
    check_callable,
    check_flag,
    check_kind,
    check_like,
    check_samples,
    check_shape,
    device_of,
    kind_name,
    path_of,
    positive,
    said_by,
)
from ..conditions import check_conditions
from ..ops._operator import functorch_active
from ..scores import ScoreModel, Scores, UnscaledScores
from .base import Network
from .hub import Download, OnHub, local_folder
from .mlp import MLP
from .unet import UNet
from .unet3d import UNet3d
from .watch import ScoreWatch
from .weights import WEIGHTS, check_folder, read_weights, write_weights

_HEADS: dict[str, type[Network]] = {"MLP": MLP, "UNet": UNet, "UNet3d": UNet3d}
_SCORE_FOLDER = "first_order"  # of the first-order model, in the folder of a saved head

# Who reads the first-order model of a saved head: by its kind, "module:function". The module is
# imported when a folder asks for it. `hos_ext` enters the readers of the package.
_READERS: dict[str, str] = {}


@runtime_checkable
class SavableScore(Protocol):
    """A first-order model that a `SecondOrderHead` keeps beside itself in its folder."""

    def fingerprint(self) -> Mapping[str, str] | None:
        """Plain JSON by which the model is known again; None where it cannot be saved.

        Its entry "kind" names the reader (see `register_score_reader`). Without one it is
        "diffusers".
        """

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes what the reader needs; leaves what is there already."""


def register_score_reader(kind: str, reader: str) -> None:
    """Makes a kind of first-order model one that `load_model` can read beside its head.

    Args:
        kind: the entry "kind" of the model's fingerprint (see `SavableScore`).
        reader: "module:function". The module is imported when a folder asks for the kind. The
            function is called as function(folder, fingerprint, device=device) and returns the
            model.

    Raises:
        ValueError: reader is not of this form.

    Example:
        >>> from hos_ext.nn import register_score_reader
        >>> register_score_reader("mine", "my_package.scores:read")
    """
    where = "register_score_reader"
    check_kind(where, "kind", kind, str)
    module, _, function = check_kind(where, "reader", reader, str).partition(":")
    rule = "reader must be 'module:function'"
    check(where, module and function, rule, f"{reader!r}")
    _READERS[kind] = reader


class SecondOrderHead(OnHub, nn.Module):
    """`model(x, sigma) -> Scores`: the score of a model that stays as it is, c and factor learned.

    `score_matching_loss` trains it: its second-order term moves the head, its first-order term is a
    constant. The score stays in eval mode and its parameters ask for no gradient. So give an
    optimiser `[p for p in model.parameters() if p.requires_grad]`, which are the head's.

    In a variance-preserving chain x_t = alpha x0 + sigma z the same model serves:
    `posterior(x_t, model(x_t / alpha, sigma / alpha), sigma, alpha)`.

    Args:
        score_model: the first-order model. `score_model(x, sigma)` -> sigma * s1 as x, for
            x = x0 + sigma z, or -> `Scores`, of which scaled_score counts: a `ModelScore` (of a
            network that predicts anything else), a model of ours, any function. The losses look at
            it on the first samples, and warn once if it predicts the noise worse than zero. Smooth
            in x where variance is reduced. A module is frozen in place.
        head: `head(x, sigma, scaled_score) -> Scores`: an `MLP` or `UNet` made with
            given_score=True. Of the conditions of score_model it gets those that its attribute
            `conditions` names: "label" where it was made with num_classes.
        scaled: False: score_model returns s1 itself.

    Attributes:
        score_model: the first-order model, as it was given.
        head: the second-order head.
        conditions: names of the conditions that the head takes.
        gradient_checkpointing: that of the head.

    Raises:
        TypeError: score_model is not callable, or head not a module.
        ValueError: head was made without given_score=True.

    Example:
        >>> import hos_ext, torch
        >>> score_model = lambda x, sigma: -sigma * x / (1 + sigma**2)  # for data from N(0, I)
        >>> model = hos_ext.SecondOrderHead(score_model, hos_ext.MLP((2,), 1, given_score=True))
        >>> scores = model(torch.ones(1, 2), 0.5)
        >>> scores.scaled_score, scores.factor.shape
        (tensor([[-0.4000, -0.4000]]), torch.Size([1, 2, 1]))
    """

    def __init__(self, score_model: ScoreModel, head: nn.Module, *, scaled: bool = True) -> None:
        super().__init__()
        where = "SecondOrderHead"
        check_flag(where, scaled=scaled)
        check_callable(where, "score_model", score_model)
        got = type(head).__name__
        check(where, isinstance(head, nn.Module), "head must be a module", got, TypeError)
        given = getattr(head, "given_score", True)
        check(where, given, "head must be made with given_score=True", f"{got} without it")
        if isinstance(score_model, nn.Module):
            score_model.requires_grad_(False).eval()
        # Its name in the weights of a checkpoint, which `score_model` shows under the package's.
        self.first_order = score_model
        self.head = head
        self.scaled = scaled
        self.watch = ScoreWatch()  # asked by `score_matching_loss`

    @property
    def score_model(self) -> ScoreModel:
        """The first-order model, as it was given."""
        return self.first_order

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(getattr(self.head, "conditions", ()))

    @property
    def gradient_checkpointing(self) -> bool:
        return bool(getattr(self.head, "gradient_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        head: Any = self.head
        head.gradient_checkpointing = value

    def train(self, mode: bool = True) -> SecondOrderHead:
        """The mode of the head; the first-order model stays in eval mode."""
        super().train(mode)
        if isinstance(self.first_order, nn.Module):
            self.first_order.eval()
        return self

    def forward(self, x: Tensor, sigma: Tensor | float, **model_kwargs: Any) -> Scores:
        """Scaled scores at noise level sigma.

        Args:
            x: noisy samples x0 + sigma z. Shape (B, *dims). Data units.
            sigma: noise standard deviation, > 0. Float or shape (B,). Data units.
            model_kwargs: conditions, such as class labels: all go to score_model, and to the head
                those of its attribute `conditions`. Each tensor has one row for each sample.

        Returns:
            Scores. Where x asks for a gradient it goes through the first-order model too.

        Raises:
            TypeError, ValueError: what score_model and the head raise, or the score does not fit x.
        """
        where = "SecondOrderHead"
        check_samples(where, "x", x)
        if isinstance(sigma, Tensor):
            check_shape(where, "sigma", sigma, (), tuple(x.shape[:1]))
        conditions = check_conditions(where, model_kwargs, len(x))
        known = {name: conditions[name] for name in self.conditions if name in conditions}
        # Not under autocast: it stays as it is, and the head learns beside the score it will see.
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.set_grad_enabled(
                torch.is_grad_enabled() and (x.requires_grad or functorch_active())
            ),
        ):
            scaled_score: Any = self.score_model(x, sigma, **conditions)
            if isinstance(scaled_score, Scores):
                scaled_score = scaled_score.scaled_score
            elif not self.scaled and isinstance(scaled_score, UnscaledScores):
                scaled_score = positive(where, "sigma", sigma, x) * scaled_score.score
            elif not self.scaled and isinstance(scaled_score, Tensor):
                scaled_score = positive(where, "sigma", sigma, x) * scaled_score
        check_like(where, "score from score_model", scaled_score, x)
        scores = self.head(x, sigma, scaled_score, **known)
        if not isinstance(scores, Scores):
            raise TypeError(f"{where}: head must return Scores, got {kind_name(scores)}")
        return Scores(scaled_score, scores.c, scores.factor, scores.sign)

    @property
    def config(self) -> dict[str, Any]:
        """Plain JSON: the config of the head, and the fingerprint of a score_model that can be
        saved.

        Raises:
            TypeError, ValueError: the head is none that can be saved.
        """
        if not isinstance(self.head, Network):
            got = type(self.head).__name__
            raise TypeError(f"save_model: model must be MLP, UNet or UNet3d (unwrapped), got {got}")
        model = self.first_order
        fingerprint = model.fingerprint() if isinstance(model, SavableScore) else None
        return {
            "_class_name": "SecondOrderHead",
            "scaled": self.scaled,
            "head": self.head.saved_config(),
            "first_order": None if fingerprint is None else dict(fingerprint),
        }

    def save_pretrained(self, folder: Path | str, **extra: Any) -> str:
        """Writes the head as config.json and model.safetensors. Returns the folder.

        A diffusers network goes to first_order/unet and first_order/scheduler, in the format of
        diffusers and with a manifest each, if it is not there yet. So does any `SavableScore`, to
        the files of its own. Any other first-order model is not saved.

        Raises:
            ValueError: the folder holds another first-order model. Likewise what `save_model`
                raises.
        """
        folder = path_of("SecondOrderHead.save_pretrained", "folder", folder)
        config = self.config
        fingerprint, place = config["first_order"], folder / _SCORE_FOLDER
        if fingerprint is not None:
            score_model: Any = self.first_order
            read = _reader(place, fingerprint)
            score_model.save_pretrained(place)
            same = read(place, fingerprint, device="cpu").fingerprint() == fingerprint
            rule = "folder must not hold another first-order model"
            check("save_pretrained", same, rule, f"one in {place}")
        write_weights(folder, config, self.head.state_dict(), extra)
        return str(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        score_model: ScoreModel | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
    ) -> SecondOrderHead:
        """Reads what `save_pretrained` or `push_to_hub` wrote. The model is in eval mode.

        Args:
            folder: as given to `save_pretrained`, or user/name of the hub, as in `load_model`.
            score_model: the first-order model that the head was trained with, if it was not saved.
            device: for the head, and for a first-order model that was saved.
            revision, token, cache_dir, local_files_only: as in `load_model`.

        Raises:
            ValueError: the folder holds no such model or another first-order model than the head
                was trained with, or score_model is missing or given where the folder has one.
            RuntimeError: safetensors, diffusers or huggingface_hub is missing; the hub does not
                answer.
        """
        where = "SecondOrderHead.from_pretrained"
        device = device_of(where, "device", device)
        folder = local_folder(where, folder, Download(revision, token, cache_dir, local_files_only))
        if score_model is not None:
            check_callable(where, "score_model", score_model)
        with said_by(where, "load_model"):
            config, state = read_weights(folder)
        return cls.from_weights(folder, config, state, score_model=score_model, device=device)

    @classmethod
    def from_weights(
        cls,
        folder: Path | str,
        config: dict[str, Any],
        state: dict[str, Tensor],
        *,
        score_model: ScoreModel | None = None,
        device: torch.device | str,
    ) -> SecondOrderHead:
        """The model of a config and of the weights of its head. In eval mode.

        `folder` is where both were read, and where the first-order model is if it was saved.
        """
        where, got = "SecondOrderHead.from_pretrained", config["_class_name"]
        rule = "folder must hold SecondOrderHead"
        check(where, got == "SecondOrderHead", rule, f"{got} in {folder}")
        fingerprint, place = config.get("first_order"), Path(folder) / _SCORE_FOLDER
        if fingerprint is not None:
            rule = "score_model must be None where the folder has its own"
            check(where, score_model is None, rule, f"one for {folder}")
            score_model = saved = _reader(place, fingerprint)(place, fingerprint, device=device)
            rule = "folder must hold the first-order model that the head was trained with"
            check(where, saved.fingerprint() == fingerprint, rule, f"another one in {place}")
        if score_model is None:
            rule = "score_model must be given (the head was trained with one that is not saved)"
            raise ValueError(f"{where}: {rule}, got None for {folder}")
        name, rule = config["head"].get("_class_name"), f"a head of class {', '.join(_HEADS)}"
        check_folder(name in _HEADS, rule, f"{name!r} in {Path(folder) / WEIGHTS}")
        head = _HEADS[name].from_weights(folder, config["head"], state, device=device)
        return cls(score_model, head, scaled=config["scaled"]).eval()


def _reader(place: Path, fingerprint: Mapping[str, str]) -> Callable[..., Any]:
    """What reads the first-order model of a saved head, by its kind."""
    kind = fingerprint.get("kind", "diffusers")
    rule = f"a first-order model of a known kind ({', '.join(_READERS)}; register_score_reader"
    check_folder(kind in _READERS, f"{rule} adds one)", f"{kind!r} for {place}")
    module, _, function = _READERS[kind].partition(":")
    reader: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return reader
