"""Pretrained networks of diffusers as scores: from pipelines, folders or the hub, and back."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import WIDE, check, check_kind, device_of, dtype_of, path_of, require, said_by
from ..nn.model_check import check_model, warn_of
from ..nn.model_score import Call, ModelScore
from ..schedules import DiscreteVP
from ..storage import write_folder
from .schedulers import plan_of

# The classes of diffusers whose call is known: they take the timesteps of their scheduler, or t.
_TIMESTEPS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "UNet3DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "HunyuanDiT2DModel",
    "SD3Transformer2DModel",
)
_UNIT_TIMES = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "ChromaTransformer2DModel",
    "QwenImageTransformer2DModel",
)
_PARTS = ("unet", "transformer")  # of a pipeline: its network
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.json", *(f"{part}/*.safetensors" for part in _PARTS), "*.safetensors"]
_NOT_FILES = ["*.bin", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.*", "*.bf16.*", "*.non_ema*"]


class DiffusersScore(ModelScore):
    """The scaled score sigma * s1 of a diffusers network, in variance-exploding coordinates.

    A `ModelScore` whose schedule, prediction and times are those of a scheduler.

    Args:
        net: a network of diffusers: `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`,
            `PixArtTransformer2DModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel` and their
            kin; or any module that is called as `net(x_t, t)` with the timesteps of the scheduler,
            which are not whole numbers. float32 or float64. Its conditions, such as class_labels or
            encoder_hidden_states, are given by name at the call: `score(x, sigma, class_labels=y)`.
        scheduler: that it was trained with. With a table: `alphas_cumprod`, and
            `config.prediction_type` "epsilon", "sample" or "v_prediction". Of flow matching:
            `FlowMatchEulerDiscreteScheduler`. Of EDM: `EDMEulerScheduler` and its kin. It is only
            read.
        call: how a network of another class is called: `call(net, x_t, time, **model_kwargs)`,
            time being the timestep of the scheduler.
        check: as of `ModelScore`.

    Attributes:
        net: the network.
        scheduler: the scheduler.
        sigma_range: least and greatest sigma that the scheduler has. Units of the data, which for
            diffusers' images is [-1, 1], and for latents those that the network sees (scaled).

    Raises:
        TypeError, ValueError: net or scheduler is of another kind.

    References:
        Ho et al. 2020, arXiv:2006.11239 (epsilon); Salimans and Ho 2022, arXiv:2202.00512 (v);
        Esser et al. 2024, arXiv:2403.03206 (flow); Karras et al. 2022, arXiv:2206.00364 (EDM).

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

    def __init__(
        self,
        net: nn.Module,
        scheduler: Any,
        *,
        call: Call | None = None,
        check: Tensor | tuple[int, ...] | None = None,
    ) -> None:
        where = type(self).__name__
        check_kind(where, "net", net, nn.Module)
        plan = plan_of(where, scheduler)
        time = _check_network(where, net, plan.prediction, call is not None)
        super().__init__(
            net,
            plan.schedule,
            plan.prediction,
            time=time,
            call=call,
            num_timesteps=plan.num_timesteps if time == "timestep" else None,
            sigma_data=plan.sigma_data,
        )
        self.reading = replace(self.reading, sign=plan.sign)
        self.scheduler, self.plan = scheduler, plan
        if check is not None:
            with said_by(where, "check_model", data="check"):
                warn_of(where, check_model(self, check))

    def fingerprint(self) -> dict[str, str] | None:
        """What identifies the score: its dtype, and a hash of all that it depends on.

        Network, weights, noise levels and the kind of prediction are hashed. None where diffusers
        cannot write the network or the scheduler, or where `call` says how it is called.
        """
        net: Any = self.net
        if self.call is not None:
            return None
        if not all(hasattr(part, "save_pretrained") for part in (net, self.scheduler)):
            return None
        # What has its default is left out: later versions of diffusers have more of it.
        known = inspect.signature(type(net)).parameters
        config = {
            k: v
            for k, v in net.config.items()
            if not k.startswith("_")
            and not (k in known and _as_list(known[k].default) == _as_list(v))
        }
        told: list[Any] = [self.plan.kind, config]
        tensors = net.state_dict()
        if isinstance(self.schedule, DiscreteVP):
            tensors = tensors | {"alphas_cumprod": self.schedule.alphas_cumprod}
        else:
            told.append([repr(self.schedule), self.plan.num_timesteps, self.plan.sigma_data])
        mark = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for name, value in sorted(tensors.items()):
            mark.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            mark.update(value.detach().cpu().contiguous().numpy().tobytes())
        dtype = next(net.parameters()).dtype
        return {"dtype": str(dtype).removeprefix("torch."), "sha256": mark.hexdigest()}

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the sub-folders of the network (unet or transformer) and of the scheduler.

        Each whole, where it is not there yet, in the format of diffusers and with a manifest.
        """
        unet = "UNet" in type(self.net).__name__
        for name, part in (("unet" if unet else "transformer", self.net), ("scheduler", None)):
            saved: Any = self.scheduler if part is None else part
            if (Path(folder) / name).exists():
                continue
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as work:
                saved.save_pretrained(work)
                files = sorted(Path(work).iterdir())
                copies = {f.name: partial(shutil.copyfile, f) for f in files}
                write_folder(Path(folder) / name, copies)


def _check_network(where: str, net: Any, prediction: str, called: bool) -> Any:
    """The unit of time of a network whose call is known."""
    name = type(net).__name__
    config: Any = getattr(net, "config", None)
    config = config if isinstance(config, Mapping) else {}
    embedding = config.get("time_embedding_type", "positional")
    rule = "net must have time_embedding_type 'positional', which takes times between the whole "
    check(where, embedding == "positional", f"{rule}numbers", f"{embedding!r}")
    if called:
        unit = False
    else:
        known = (*_TIMESTEPS, *_UNIT_TIMES)
        foreign = type(net).__module__.startswith("diffusers.") and name not in known
        rule = f"net must be of a class whose call is known ({', '.join(known)}), or call be given"
        check(where, not foreign, rule, name)
        unit = name in _UNIT_TIMES
        rule = "scheduler must be of flow matching for a network that takes t in [0, 1]"
        check(where, not unit or prediction == "flow", rule, name)
    if prediction == "edm":
        return "c_noise"
    return "t" if unit else "timestep"


def from_diffusers(
    pipeline: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    call: Call | None = None,
    revision: str | None = None,
) -> DiffusersScore:
    """The score of a diffusers pipeline: of its network and its scheduler alone.

    Conditions are those of the network, not of the pipeline: a text-to-image network takes
    embeddings (`encoder_hidden_states`), not texts, and a latent one sees scaled latents.

    Args:
        pipeline: a pipeline in memory; a folder with the sub-folders unet or transformer, and
            scheduler, or with the files of both in itself, as the oldest DDPM pipelines have them;
            or the name of a model on the hub, "user/name", which huggingface_hub keeps in its
            cache. Weights as safetensors: pickles are not read.
        device: for the weights; None is the CPU. A pipeline in memory stays where it is: None.
        dtype: of the weights, float32 or float64, whatever they are stored in; None is float32.
            A pipeline in memory stays as it is: None.
        call: as of `DiffusersScore`, for classes whose call is not known.
        revision: of a model on the hub: a branch, tag or commit.

    Returns:
        `DiffusersScore`, in eval mode.

    Raises:
        ValueError: there is no such pipeline. Names what is missing.
        TypeError: pipeline is none.
        RuntimeError: diffusers or huggingface_hub is missing.

    Example:
        >>> from hos_ext.integrations import from_diffusers
        >>> score = from_diffusers("downloads/ddpm-cat-256")  # doctest: +SKIP
        >>> score = from_diffusers("google/ddpm-cat-256")  # doctest: +SKIP
    """
    where = "from_diffusers"
    if not isinstance(pipeline, (str, Path)):
        for name, value in (("device", device), ("dtype", dtype), ("revision", revision)):
            rule = f"{name} must be None for a pipeline in memory"
            check(where, value is None, rule, lambda value=value: repr(value))
        net = next((n for p in _PARTS if (n := getattr(pipeline, p, None)) is not None), None)
        scheduler, got = getattr(pipeline, "scheduler", None), type(pipeline).__name__
        rule = "pipeline must have a unet or transformer and a scheduler, or be a folder or a name"
        check(where, net is not None and scheduler is not None, rule, got, TypeError)
        with said_by(where, "DiffusersScore"):
            return DiffusersScore(net, scheduler, call=call).eval()  # type: ignore[arg-type]
    place = path_of(where, "pipeline", pipeline)
    device = device_of(where, "device", "cpu" if device is None else device)
    dtype = dtype_of(where, "dtype", torch.float32 if dtype is None else dtype, WIDE)
    local = place.exists() or isinstance(pipeline, Path) or not _ON_HUB.fullmatch(pipeline)
    rule = "revision must be None for a folder"
    check(where, revision is None or not local, rule, revision)
    folder = place if local else _from_hub(str(pipeline), revision)
    network, scheduler = _read(folder, dtype)
    with said_by(where, "DiffusersScore"):
        return DiffusersScore(network, scheduler, call=call).to(device).eval()


def read_saved(
    folder: Path | str, fingerprint: Mapping[str, str], *, device: torch.device | str = "cpu"
) -> DiffusersScore:
    """The score that `DiffusersScore.save_pretrained` wrote, in the dtype that it had."""
    dtype = getattr(torch, fingerprint["dtype"])
    return from_diffusers(Path(folder), device=device, dtype=dtype)


def _read(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Network and scheduler from a folder."""
    where = "from_diffusers"
    diffusers = require(where, "diffusers", "images")
    part = next((p for p in _PARTS if (folder / p / "config.json").is_file()), _PARTS[0])
    place = _part(folder, part, "config.json")
    plan = _part(folder, "scheduler", "scheduler_config.json")
    kinds = []
    for path, base, what in (
        (place / "config.json", diffusers.ModelMixin, "a network of diffusers"),
        (plan / "scheduler_config.json", diffusers.SchedulerMixin, "a scheduler"),
    ):
        name = _class_name(path)
        kind: Any = getattr(diffusers, str(name), None)
        fine = isinstance(kind, type) and issubclass(kind, base)
        check(where, fine, f"folder must hold {what}", f"{name!r} in {path.parent}")
        kinds.append(kind)
    try:
        network = kinds[0].from_pretrained(
            place, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
        return network, kinds[1].from_pretrained(plan, local_files_only=True)
    except Exception as error:  # diffusers raises OSError, ValueError, SafetensorError and others
        raise ValueError(
            f"{where}: folder must hold a whole pipeline, got {folder}: {_line(error)}"
        ) from None


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a model of the hub, in the cache of huggingface_hub."""
    where = "from_diffusers"
    hub = require(where, "huggingface_hub", "hub")
    try:
        return Path(
            hub.snapshot_download(
                name, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT_FILES
            )
        )
    except Exception as error:  # of the network, of the hub, of the disk
        rule = "pipeline must be a folder, or a model of the hub that is in the cache or in reach"
        raise ValueError(f"{where}: {rule}, got {name!r}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


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
