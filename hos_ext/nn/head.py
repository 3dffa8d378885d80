"""A second-order head on a first-order model that stays as it is: uncertainty for a model one has.

Everything is trained in variance-exploding coordinates, x = x0 + sigma z. A variance-preserving
network knows alpha x instead, with alpha = 1 / sqrt(1 + sigma^2), at the time t whose noise is
alpha sigma: there sigma(t) / alpha(t) = sigma. Scaled quantities do not change from x to alpha x:
the score of the density of alpha x is s1(x) / alpha, so (alpha sigma) (s1 / alpha) = sigma s1, and
likewise c and sigma U.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_like, positive
from ..integrations.diffusers import DiffusersScore, as_list, from_diffusers
from ..ops._operator import functorch_active
from ..scores import Scores
from ..storage import write_folder
from .base import load_network, saved_config
from .weights import read_weights, write_weights

ScoreModel = Callable[[Tensor, Tensor | float], Tensor | Scores]
_FOLDER = "first_order"


class SecondOrderHead(nn.Module):
    """`model(x, sigma) -> Scores`: the score of a model that stays as it is, c and factor learned.

    `score_matching_loss` trains it: its second-order term moves the head, its first-order term is a
    constant. The score sees no training mode and its parameters ask for no gradient: give an
    optimiser `[p for p in model.parameters() if p.requires_grad]`, which are the head's.

    In a variance-preserving chain x_t = alpha x0 + sigma z the same model serves:
    `posterior(x_t, model(x_t / alpha, sigma / alpha), sigma, alpha)`.

    Args:
        score: `score(x, sigma)` -> sigma * s1 as x, for x = x0 + sigma z, or -> `Scores`, of which
            the score counts: a `DiffusersScore`, a model of ours, any function. Smooth in x where
            variance is reduced. A module is frozen in place.
        head: `head(x, sigma, score) -> Scores`: an `MLP` or `UNet` made with given_score=True.
        scaled: False: score returns s1 itself.

    Attributes:
        gradient_checkpointing: that of the head.

    Raises:
        TypeError: score is not callable, or head not a module.
        ValueError: head was made without given_score=True.
    """

    def __init__(self, score: ScoreModel, head: nn.Module, *, scaled: bool = True) -> None:
        super().__init__()
        where = "SecondOrderHead"
        if not callable(score):
            raise TypeError(f"{where}: score must be callable, got {type(score).__name__}")
        if not isinstance(head, nn.Module):
            raise TypeError(f"{where}: head must be a module, got {type(head).__name__}")
        if not getattr(head, "given_score", True):
            raise ValueError(
                f"{where}: head must be made with given_score=True, got {type(head).__name__} "
                "without it"
            )
        if isinstance(score, nn.Module):
            score.requires_grad_(False).eval()
        self.first_order = score
        self.head = head
        self.scaled = scaled

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

    def forward(self, x: Tensor, sigma: Tensor | float) -> Scores:
        """Scaled scores at noise level sigma.

        Args:
            x: noisy samples x0 + sigma z. Shape (B, *dims). Data units.
            sigma: noise standard deviation, > 0. Float or shape (B,). Data units.

        Returns:
            Scores. Where x asks for a gradient it goes through the first-order model too.

        Raises:
            TypeError, ValueError: what the score and the head raise, or the score does not fit x.
        """
        where = "SecondOrderHead"
        # Not under autocast: it stays as it is, and the head learns beside the score it will see.
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.set_grad_enabled(
                torch.is_grad_enabled() and (x.requires_grad or functorch_active())
            ),
        ):
            first = self.first_order(x, sigma)
            if isinstance(first, Scores):
                first = first.scaled_score
            elif not self.scaled and isinstance(first, Tensor):
                first = positive(where, "sigma", sigma, x) * first
        check_like(where, "score from the first-order model", first, x)
        second = self.head(x, sigma, first)
        if not isinstance(second, Scores):
            raise TypeError(f"{where}: head must return Scores, got {type(second).__name__}")
        return second._replace(scaled_score=first)

    @property
    def config(self) -> dict[str, Any]:
        """Plain JSON: the head's config, and what identifies the diffusers network, if it is one.

        Raises:
            TypeError, ValueError: the head is none that can be saved.
        """
        network = None
        score: Any = self.first_order
        if _can_be_saved(score):
            dtype = next(score.parameters()).dtype
            network = {"dtype": str(dtype).removeprefix("torch."), "sha256": _digest(score)}
        return {
            "_class_name": "SecondOrderHead",
            "scaled": self.scaled,
            "head": saved_config(self.head),
            "first_order": network,
        }

    def save_pretrained(self, folder: Path | str, **extra: Any) -> str:
        """The head as config.json and model.safetensors (see `weights`).

        A diffusers network goes to first_order/unet and first_order/scheduler, in the format of
        diffusers and with a manifest each, if it is not there yet. Any other score is not saved.

        Raises:
            ValueError: the folder holds another first-order model. Likewise what `save_model`
                raises.
        """
        config = self.config
        if config["first_order"] is not None:
            _save_first_order(Path(folder) / _FOLDER, self.first_order, config["first_order"])
        write_weights(folder, config, self.head.state_dict(), extra)
        return str(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        score: ScoreModel | None = None,
        device: torch.device | str = "cpu",
    ) -> SecondOrderHead:
        """Reads what `save_pretrained` wrote. The model is in eval mode.

        Args:
            folder: as given to `save_pretrained`.
            score: the score that the head was trained with, if it was no diffusers network.
            device: for the head, and for a diffusers network.

        Raises:
            ValueError: the folder holds no such model or another first-order model than the head
                was trained with, or score is missing or given where the folder has one.
            RuntimeError: safetensors or diffusers is missing.
        """
        config, state = read_weights(folder)
        return load_head(folder, config, state, score=score, device=device)


def load_head(
    folder: Path | str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    *,
    score: ScoreModel | None = None,
    device: torch.device | str = "cpu",
) -> SecondOrderHead:
    """The `SecondOrderHead` of a config and of the weights of its head."""
    where = "SecondOrderHead.from_pretrained"
    if config["_class_name"] != "SecondOrderHead":
        raise ValueError(
            f"{where}: folder must hold SecondOrderHead, got {config['_class_name']} in {folder}"
        )
    network = config.get("first_order")
    if network is None:
        if score is None:
            raise ValueError(
                f"{where}: score must be given (the head was trained with one that is not saved), "
                f"got None for {folder}"
            )
    else:
        if score is not None:
            raise ValueError(
                f"{where}: score must be None where the folder has its own, got one for {folder}"
            )
        place = Path(folder) / _FOLDER
        score = from_diffusers(place, device=device, dtype=getattr(torch, network["dtype"]))
        if _digest(score) != network["sha256"]:
            raise ValueError(
                f"{where}: folder must hold the first-order model that the head was trained with, "
                f"got another one in {place}"
            )
    head = load_network(folder, config["head"], state, device=device)
    return SecondOrderHead(score, head, scaled=config["scaled"]).eval()


# ------------------------------------------------------------------------ the files of diffusers


def _can_be_saved(score: object) -> bool:
    """Whether diffusers can write the network and its scheduler."""
    return isinstance(score, DiffusersScore) and all(
        hasattr(part, "save_pretrained") for part in (score.unet, score.scheduler)
    )


def _save_first_order(folder: Path, score: Any, network: dict[str, str]) -> None:
    for name in ("unet", "scheduler"):
        if (folder / name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as work:
            getattr(score, name).save_pretrained(work)
            files = sorted(Path(work).iterdir())
            write_folder(folder / name, {f.name: partial(shutil.copyfile, f) for f in files})
    there = from_diffusers(folder, dtype=getattr(torch, network["dtype"]))
    if _digest(there) != network["sha256"]:
        raise ValueError(
            f"save_pretrained: folder must not hold another first-order model, got one in {folder}"
        )


def _digest(score: Any) -> str:
    """Of what the score depends on: network, weights, noise levels, kind of prediction."""
    # What has its default is left out: later versions of diffusers have more of it.
    known = inspect.signature(type(score.unet)).parameters
    config = {
        k: v
        for k, v in score.unet.config.items()
        if not k.startswith("_") and not (k in known and as_list(known[k].default) == as_list(v))
    }
    mark = hashlib.sha256(json.dumps([score.prediction, config], sort_keys=True).encode())
    tensors = score.unet.state_dict() | {"alphas_cumprod": score.schedule.alphas_cumprod}
    for name, value in sorted(tensors.items()):
        mark.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        mark.update(value.detach().cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()
