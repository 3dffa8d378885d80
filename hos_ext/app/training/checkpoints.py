"""Checkpoints of a training: written whole, found again, loaded only into what they came from."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ... import storage
from ...checks import check, require


class History(NamedTuple):
    """Means over the steps up to `step`; the EMA weights there on the validation part.

    Attributes:
        step: steps done.
        loss, first, second: the loss and its two terms, sums over the D entries of a sample.
        learning_rate: of the last step.
        validation, validation_first: loss and first term of the averaged weights.
        gradient_norm: the mean norm before clipping.
        gradient_variance: trace of the covariance of the gradient of one step, from two halves of
            one batch (None where a process has one row).
        loss_per_entry: loss / D. None, as the two below, in rows of older versions.
        error: first / D, the denoising error |x0 - m|^2 of an entry in units of sigma^2: a sample
            that is not denoised has 1.
        validation_error: likewise of the averaged weights.
    """

    step: int
    loss: float
    first: float
    second: float
    learning_rate: float
    validation: float
    validation_first: float
    gradient_norm: float
    gradient_variance: float | None
    loss_per_entry: float | None = None
    error: float | None = None
    validation_error: float | None = None


class State(NamedTuple):
    """Where a run stands.

    Attributes:
        step: steps done.
        history: its curve.
        sums: of loss, first and second term, norm of the gradient, and steps since the last row.
        kept: its newest checkpoint.
    """

    step: int
    history: list[History]
    sums: list[float]
    kept: Path | None

    @classmethod
    def fresh(cls) -> State:
        """Of a run that has not begun."""
        return cls(0, [], [0.0] * 5, None)


def list_checkpoints(out: Path | str) -> list[tuple[Path, str | None]]:
    """The checkpoints of a run, oldest first, each with what is wrong with it or None."""
    return [(path, storage.damage(path)) for path in found_checkpoints(Path(out) / "checkpoints")]


def found_checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, oldest first, damaged ones too."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Of the checkpoint after a step."""
    return folder / f"step-{step:08d}"


def named(path: Path | None) -> str:
    """A checkpoint in a message."""
    return "none was written" if path is None else f"{path} (step {int(path.name[5:])})"


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    ema: swa_utils.AveragedModel,
    optimizer: Any,
    content: dict[str, Any],
    keep: int,
    kept: Path | None,
) -> None:
    """Writes step-00000500/ whole, and only then removes all but the newest `keep` whole ones.

    Args:
        folder: checkpoints/ of the run.
        model: the weights being trained; those that are frozen are left out.
        ema: their average.
        optimizer: its moments.
        content: plain JSON: step, options, facts, history and sums.
        keep: how many whole checkpoints stay.
        kept: the checkpoint before. What lies between it and this one, or behind this one, was
            damaged when the run went on.
    """
    path = checkpoint_path(folder, content["step"])
    text = json.dumps(content, allow_nan=False) + "\n"
    if path.exists():
        shutil.rmtree(path)
    storage.write_folder(
        path,
        {
            "model.safetensors": partial(_write_weights, model),
            "ema.safetensors": partial(_write_weights, ema),
            "optimizer.pt": partial(_write_optimizer, optimizer),
            "state.json": lambda file: file.write_text(text),
        },
    )
    last = "" if kept is None else kept.name
    found = found_checkpoints(folder)
    damaged = [old for old in found if last < old.name < path.name]
    whole = [old for old in found if old.name <= path.name and old not in damaged]
    for old in [*damaged, *whole[:-keep]]:
        shutil.rmtree(old)


# As bytes and then by Python: of a full disk both libraries only say that something is wrong.
def _write_weights(module: nn.Module, file: Path) -> None:
    # Copies: safetensors refuses tensors that share memory.
    state = {name: v.to("cpu", copy=True) for name, v in _trained_state(module).items()}
    file.write_bytes(require("train", "safetensors.torch").save(state))


def _write_optimizer(optimizer: Any, file: Path) -> None:
    content = io.BytesIO()
    torch.save(optimizer.state_dict(), content)
    file.write_bytes(content.getbuffer())


def _trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers but for the parameters that are not trained."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    state = module.state_dict()
    return {name: v.contiguous() for name, v in state.items() if name not in frozen}


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    ema: swa_utils.AveragedModel,
    optimizer: Any,
    deciding: dict[str, Any],
) -> State:
    """Restores the newest whole checkpoint into model, ema and optimizer.

    Args:
        folder: checkpoints/ of the run.
        model: gets its weights.
        ema: gets its averaged weights.
        optimizer: gets its moments.
        deciding: the options that decide what a step computes, as `TrainingOptions.deciding` gives.

    Returns:
        Where the run stands; a fresh state if there is no whole checkpoint.

    Raises:
        ValueError: it is of another model or of other options.
    """
    for path in reversed(found_checkpoints(folder)):
        wrong = storage.damage(path)
        if wrong is not None:
            warnings.warn(
                f"train: {path} is damaged ({wrong}): going back to the one before", stacklevel=4
            )
            continue
        return _restored(path, model, ema, optimizer, deciding)
    return State.fresh()


def _restored(
    path: Path,
    model: nn.Module,
    ema: swa_utils.AveragedModel,
    optimizer: Any,
    deciding: dict[str, Any],
) -> State:
    """Loads a checkpoint whose files are those of its manifest, whoever wrote that."""
    load_file = require("train", "safetensors.torch").load_file
    try:
        state = json.loads((path / "state.json").read_bytes())
        before, history, sums = state["options"], state["history"], state["sums"]
        found = State(state["step"], [History(*row) for row in history], sums, path)
        weights = [load_file(path / f"{name}.safetensors") for name in ("model", "ema")]
        # On the CPU first: the device that it was saved from may be another's, or not there.
        moments = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # of json, safetensors, torch and the disk
        raise _foreign(path, error) from None
    rule, step = f"step must be that of {path}", found.step
    check("train", type(step) is int and checkpoint_path(path.parent, step) == path, rule, step)
    numbers = [*sums, *(v for row in found.history for v in row if v is not None)]
    fine = len(sums) == len(State.fresh().sums) and all(type(v) in (int, float) for v in numbers)
    check("train", fine, f"history and sums must be numbers in {path}", "others")
    _check_same(path, before, deciding)
    for module, loaded in zip((model, ema), weights, strict=True):
        wanted = _trained_state(module)
        kinds, wanted_kinds = (
            {k: (v.shape, v.dtype) for k, v in each.items()} for each in (loaded, wanted)
        )
        check("train", kinds == wanted_kinds, "model must be the one of the checkpoint", path)
    for module, loaded in zip((model, ema), weights, strict=True):
        module.load_state_dict(loaded, strict=False)
    try:
        optimizer.load_state_dict(moments)
        for weight, each in optimizer.state.items():
            for name, value in each.items():  # torch does not compare them
                if value.shape not in (weight.shape, ()):
                    raise ValueError(f"{name} of shape {tuple(value.shape)}")
    except Exception as error:  # of torch, which walks through what it was given
        raise _foreign(path, error) from None
    return found


def _foreign(path: Path, error: Exception) -> ValueError:
    line = " ".join(f"{type(error).__name__} {error}".split())[:300]
    return ValueError(f"train: checkpoint must be one of this training, got {path}: {line}")


def check_plain(objective: Mapping[str, Any], facts: dict[str, Any] | None) -> None:
    """Refuses at once what no checkpoint could hold."""
    for name, value in (("objective", dict(objective)), ("facts", facts)):
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"train: {name} must be plain JSON, got: {error}") from None
        same = name != "objective" or json.loads(text) == value  # else no run could be resumed
        check("train", same, f"{name} must be plain JSON", value, TypeError)


# What an objective that a checkpoint does not name was, before checkpoints named all of it.
_DEFAULTS = {"variance_reduction": True, "centred": False}


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses other options; with a constant learning rate there may be more steps."""
    # A checkpoint from before there were labels has none, whatever becomes of them.
    before = {"condition_dropout": now.get("condition_dropout")} | before
    if isinstance(before.get("objective"), dict):
        before = before | {"objective": _DEFAULTS | before["objective"]}
    for name, value in now.items():
        longer = name == "steps" and now["decay"] == "constant" and value >= before[name]
        rule = f"{name} must be {before[name]!r} to go on from {path}"
        check("train", before[name] == value or longer, rule, repr(value))
