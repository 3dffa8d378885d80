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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_like, check_tensor, one_of, positive, require
from .doors import functorch_active
from .models import load_network, saved_config
from .schedules import from_alphas_cumprod
from .storage import write_folder
from .tweedie import Scores
from .weights import read_weights, write_weights

ScoreModel = Callable[[Tensor, Tensor | float], Tensor | Scores]

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
# Entries of a diffusers config that ask for more than a sample and a time.
_CONDITIONS = ("class_embed_type", "num_class_embeds", "cross_attention_dim", "encoder_hid_dim")
_FOLDER = "first_order"


class DiffusersScore(nn.Module):
    """The scaled score sigma * s1 of a diffusers network, in variance-exploding coordinates.

    Args:
        unet: `unet(x_t, t).sample` for x_t (B, C, ...) and times (B,), which are not whole numbers:
            a `UNet2DModel` with positional embeddings, or any module with this call. float32 or
            float64. With 2 C channels out (a learned variance) the first C count. Not conditional.
        scheduler: that it was trained with: `alphas_cumprod`, and `config.prediction_type`
            "epsilon", "sample" or "v_prediction". Only these two are used.

    Attributes:
        sigma_range: least and greatest sigma that the scheduler has. Units of the data, which for
            diffusers' images is [-1, 1].

    Raises:
        TypeError, ValueError: unet or scheduler is of another kind.

    Reference:
        Ho et al. 2020, arXiv:2006.11239 (epsilon); Salimans and Ho 2022, arXiv:2202.00512 (v).
    """

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        where = "DiffusersScore"
        if not isinstance(unet, nn.Module):
            raise TypeError(f"{where}: unet must be a module, got {type(unet).__name__}")
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is None:
            raise ValueError(
                f"{where}: scheduler must have alphas_cumprod, got {type(scheduler).__name__}"
            )
        kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
        self.prediction = one_of(where, "scheduler.config.prediction_type", kind, _PREDICTIONS)
        config = getattr(unet, "config", None)
        config = config if isinstance(config, Mapping) else {}
        for name in _CONDITIONS:
            if config.get(name) is not None:
                raise ValueError(
                    f"{where}: unet must be unconditional, got {name} = {config[name]!r}"
                )
        embedding = config.get("time_embedding_type", "positional")
        if embedding != "positional":
            raise ValueError(
                f"{where}: unet must have time_embedding_type 'positional', which takes times "
                f"between the whole numbers, got {embedding!r}"
            )
        for dtype in {p.dtype for p in unet.parameters()}:
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{where}: unet must be float32 or float64, got {dtype}")
        # No signal, hence no score, at the last time; Euler's scheduler puts 2^-24 there.
        if table[-1] == 0 or (len(table) > 1 and table[-1] == 2**-24 > table[-2]):
            table = table[:-1]
        self.unet, self.scheduler = unet, scheduler
        self.schedule = from_alphas_cumprod(table)
        ends = (self.schedule.t_min, self.schedule.t_max)
        low, high = (self.schedule.sigma(t) / self.schedule.alpha(t) for t in ends)
        self.sigma_range = (low, high)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """sigma * s1 at x = x0 + sigma z.

        Args:
            x: noisy samples. Shape (B, C, ...), float32 or float64. Data units.
            sigma: noise standard deviation within `sigma_range`. Float or shape (B,). Data units.

        Returns:
            As x. No units.

        Raises:
            ValueError: x or sigma does not fit, or the network returns another shape.
            TypeError: the network does not return an object with a Tensor `sample`.
        """
        where = "DiffusersScore"
        check_tensor(where, "x", x)
        if x.dim() < 2:
            raise ValueError(f"{where}: x must have shape (B, C, ...), got {tuple(x.shape)}")
        level = positive(where, "sigma", sigma, x)
        # On the CPU: the bisection for t is hundreds of tiny operations.
        ratio = level.flatten().cpu()
        low, high = ratio.new_tensor(self.sigma_range)
        bad = (ratio < low) | (ratio > high)
        if bool(bad.any()):
            raise ValueError(
                f"{where}: sigma must be in [{low:g}, {high:g}], the noise levels of the "
                f"scheduler, got {ratio[bad][0]:g}"
            )
        t = self.schedule.t_of_ratio(ratio).to(x.device).expand(len(x))
        alpha = (1 + level.square()).rsqrt()
        x_t = alpha * x
        dtype = next((p.dtype for p in self.unet.parameters()), x.dtype)
        output = getattr(self.unet(x_t.to(dtype), t), "sample", None)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{where}: unet must return an object with a Tensor 'sample', got "
                f"{type(output).__name__}"
            )
        if output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(
                f"{where}: unet must return shape {tuple(x.shape)}, got {tuple(output.shape)}"
            )
        output = output.to(x.dtype)
        # With alpha^2 + (alpha sigma)^2 = 1, z = (x - x0) / sigma = alpha sigma x_t + alpha v.
        if self.prediction == "epsilon":
            return -output
        if self.prediction == "sample":
            return (output - x) / level
        return -alpha * (level * x_t + output)


def from_diffusers(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiffusersScore:
    """The score of an unconditional diffusers pipeline on the disk; nothing is downloaded.

    Args:
        folder: with the sub-folders unet and scheduler, or with the files of both in itself, as
            the oldest DDPM pipelines have them. Weights as safetensors: pickles are not read.
        device: for the weights.
        dtype: of the weights, float32 or float64, whatever they are stored in.

    Returns:
        `DiffusersScore`, in eval mode.

    Raises:
        ValueError: the folder holds no such pipeline. Names what is missing.
        RuntimeError: diffusers is missing.
    """
    where = "from_diffusers"
    diffusers = require(where, "diffusers")
    unet = _part(folder, "unet", "config.json")
    name = _class_name(unet / "config.json")
    if name != "UNet2DModel":
        raise ValueError(f"{where}: folder must hold a UNet2DModel, got {name!r} in {unet}")
    scheduler = _part(folder, "scheduler", "scheduler_config.json")
    name = _class_name(scheduler / "scheduler_config.json")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"{where}: folder must hold a scheduler, got {name!r} in {scheduler}")
    try:
        network = diffusers.UNet2DModel.from_pretrained(
            unet, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
        plan = kind.from_pretrained(scheduler, local_files_only=True)  # type: ignore[attr-defined]
    except Exception as error:  # diffusers raises OSError, ValueError, SafetensorError and others
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: folder must hold a whole pipeline, got {folder}: {reason}"
        ) from None
    return DiffusersScore(network, plan).to(device).eval()


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
                first = first.score
            elif not self.scaled and isinstance(first, Tensor):
                first = positive(where, "sigma", sigma, x) * first
        check_like(where, "score from the first-order model", first, x)
        second = self.head(x, sigma, first)
        if not isinstance(second, Scores):
            raise TypeError(f"{where}: head must return Scores, got {type(second).__name__}")
        return second._replace(score=first)

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
        if not k.startswith("_") and not (k in known and _as_list(known[k].default) == _as_list(v))
    }
    mark = hashlib.sha256(json.dumps([score.prediction, config], sort_keys=True).encode())
    tensors = score.unet.state_dict() | {"alphas_cumprod": score.schedule.alphas_cumprod}
    for name, value in sorted(tensors.items()):
        mark.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        mark.update(value.detach().cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()


def _as_list(value: object) -> object:
    """JSON makes lists of tuples."""
    return list(value) if isinstance(value, tuple) else value


def _part(folder: Path | str, name: str, config: str) -> Path:
    """The sub-folder of a pipeline's part, or the folder itself."""
    for place in (Path(folder) / name, Path(folder)):
        if (place / config).is_file():
            return place
    raise ValueError(f"from_diffusers: folder must hold {name}/{config}, got {folder} without it")


def _class_name(path: Path) -> str | None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(
            f"from_diffusers: folder must hold JSON in {path.name}, got {path}"
        ) from None
    return content.get("_class_name") if isinstance(content, dict) else None
