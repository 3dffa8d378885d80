"""Pretrained networks of diffusers as scores, from their folders and back."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import WIDE, check, check_tensor, one_of, positive, require, said_by
from ..schedules import from_alphas_cumprod
from ..storage import write_folder

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
# Entries of a diffusers config that ask for more than a sample and a time.
_CONDITIONS = ("class_embed_type", "num_class_embeds", "cross_attention_dim", "encoder_hid_dim")


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

    References:
        Ho et al. 2020, arXiv:2006.11239 (epsilon); Salimans and Ho 2022, arXiv:2202.00512 (v).

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from hos_ext.integrations import DiffusersScore
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32,)}
        >>> score = DiffusersScore(UNet2DModel(**blocks, **sizes), DDPMScheduler())
        >>> score(torch.zeros(2, 1, 4, 4), 0.5).shape
        torch.Size([2, 1, 4, 4])
    """

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        where = "DiffusersScore"
        got = type(unet).__name__
        check(where, isinstance(unet, nn.Module), "unet must be a module", got, TypeError)
        table: Any = getattr(scheduler, "alphas_cumprod", None)
        got = type(scheduler).__name__
        check(where, table is not None, "scheduler must have alphas_cumprod", got)
        many = getattr(table, "ndim", 0) == 1 and len(table) > 0
        rule = "scheduler.alphas_cumprod must have shape (N,)"
        check(where, many, rule, type(table).__name__)
        kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
        self.prediction = one_of(where, "scheduler.config.prediction_type", kind, _PREDICTIONS)
        config: Any = getattr(unet, "config", None)
        config = config if isinstance(config, Mapping) else {}
        for name in _CONDITIONS:
            value = config.get(name)
            check(where, value is None, "unet must be unconditional", f"{name} = {value!r}")
        embedding = config.get("time_embedding_type", "positional")
        rule = (
            "unet must have time_embedding_type 'positional', which takes times between the whole "
            "numbers"
        )
        check(where, embedding == "positional", rule, f"{embedding!r}")
        for dtype in {p.dtype for p in unet.parameters()}:
            check(where, dtype in WIDE, "unet must be float32 or float64", dtype)
        # No signal, hence no score, at the last time; Euler's scheduler puts 2^-24 there.
        if table[-1] == 0 or (len(table) > 1 and table[-1] == 2**-24 > table[-2]):
            table = table[:-1]
        self.unet, self.scheduler = unet, scheduler
        with said_by(where, "from_alphas_cumprod", alphas_cumprod="scheduler.alphas_cumprod"):
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
        check(where, x.dim() > 1, "x must have shape (B, C, ...)", tuple(x.shape))
        level = positive(where, "sigma", sigma, x)
        # On the CPU: the bisection for t is hundreds of tiny operations.
        ratio = level.flatten().cpu()
        # Not new_tensor: torch cannot make one like a view with its negative bit set.
        low, high = torch.tensor(self.sigma_range, dtype=ratio.dtype)
        bad = (ratio < low) | (ratio > high)
        if bool(bad.any()):
            rule = f"sigma must be in [{low:g}, {high:g}], the noise levels of the scheduler"
            raise ValueError(f"{where}: {rule}, got {ratio[bad][0]:g}")
        t = self.schedule.t_of_ratio(ratio).to(x.device).expand(len(x))
        alpha = (1 + level.square()).rsqrt()
        x_t = alpha * x
        dtype = next((p.dtype for p in self.unet.parameters()), x.dtype)
        output = getattr(self.unet(x_t.to(dtype), t), "sample", None)
        if not isinstance(output, Tensor):
            rule = "unet must return an object with a Tensor 'sample'"
            raise TypeError(f"{where}: {rule}, got {type(output).__name__}")
        if output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        rule, got = f"unet must return shape {tuple(x.shape)}", tuple(output.shape)
        check(where, output.shape == x.shape, rule, got)
        output = output.to(x.dtype)
        # With alpha^2 + (alpha sigma)^2 = 1, z = (x - x0) / sigma = alpha sigma x_t + alpha v.
        if self.prediction == "epsilon":
            return -output
        if self.prediction == "sample":
            return (output - x) / level
        return -alpha * (level * x_t + output)

    def fingerprint(self) -> dict[str, str] | None:
        """What identifies the score: its dtype, and a hash of all that it depends on.

        Network, weights, noise levels and the kind of prediction are hashed. None where diffusers
        cannot write the network or the scheduler.
        """
        if not all(hasattr(part, "save_pretrained") for part in (self.unet, self.scheduler)):
            return None
        # What has its default is left out: later versions of diffusers have more of it.
        known = inspect.signature(type(self.unet)).parameters
        unet: Any = self.unet
        config = {
            k: v
            for k, v in unet.config.items()
            if not k.startswith("_")
            and not (k in known and _as_list(known[k].default) == _as_list(v))
        }
        mark = hashlib.sha256(json.dumps([self.prediction, config], sort_keys=True).encode())
        tensors = self.unet.state_dict() | {"alphas_cumprod": self.schedule.alphas_cumprod}
        for name, value in sorted(tensors.items()):
            mark.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            mark.update(value.detach().cpu().contiguous().numpy().tobytes())
        dtype = next(self.unet.parameters()).dtype
        return {"dtype": str(dtype).removeprefix("torch."), "sha256": mark.hexdigest()}

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the sub-folders unet and scheduler, each whole, where they are not there yet.

        They are in the format of diffusers, with a manifest each.
        """
        for name in ("unet", "scheduler"):
            if (Path(folder) / name).exists():
                continue
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as work:
                getattr(self, name).save_pretrained(work)
                files = sorted(Path(work).iterdir())
                copies = {f.name: partial(shutil.copyfile, f) for f in files}
                write_folder(Path(folder) / name, copies)


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

    Example:
        >>> from hos_ext.integrations import from_diffusers
        >>> score = from_diffusers("downloads/ddpm-cat-256")  # doctest: +SKIP
    """
    where = "from_diffusers"
    diffusers = require(where, "diffusers")
    unet = _part(folder, "unet", "config.json")
    name = _class_name(unet / "config.json")
    rule = "folder must hold a UNet2DModel"
    check(where, name == "UNet2DModel", rule, f"{name!r} in {unet}")
    scheduler = _part(folder, "scheduler", "scheduler_config.json")
    name = _class_name(scheduler / "scheduler_config.json")
    kind: Any = getattr(diffusers, str(name), None)
    fine = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    check(where, fine, "folder must hold a scheduler", f"{name!r} in {scheduler}")
    try:
        network = diffusers.UNet2DModel.from_pretrained(
            unet, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
        plan = kind.from_pretrained(scheduler, local_files_only=True)
    except Exception as error:  # diffusers raises OSError, ValueError, SafetensorError and others
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: folder must hold a whole pipeline, got {folder}: {reason}"
        ) from None
    return DiffusersScore(network, plan).to(device).eval()


def read_saved(
    folder: Path | str, fingerprint: Mapping[str, str], *, device: torch.device | str = "cpu"
) -> DiffusersScore:
    """The score that `DiffusersScore.save_pretrained` wrote, in the dtype that it had."""
    return from_diffusers(folder, device=device, dtype=getattr(torch, fingerprint["dtype"]))


def _part(folder: Path | str, name: str, config: str) -> Path:
    """The sub-folder of a pipeline's part, or the folder itself."""
    for place in (Path(folder) / name, Path(folder)):
        if (place / config).is_file():
            return place
    raise ValueError(f"from_diffusers: folder must hold {name}/{config}, got {folder} without it")


def _as_list(value: object) -> object:
    """JSON makes lists of tuples."""
    return list(value) if isinstance(value, tuple) else value


def _class_name(path: Path) -> str | None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(
            f"from_diffusers: folder must hold JSON in {path.name}, got {path}"
        ) from None
    return content.get("_class_name") if isinstance(content, dict) else None
