"""Every public call of the library, and a valid call of each, built from the names it takes.

`entries()` walks the rooms by their `__all__`: functions, constructors, methods, classmethods. The
arguments of a valid call come from `MAKERS` by their name, and from `SPECIAL` where an entry means
something else by it. A public name for which there is no valid call is an error: whoever adds a
name to the library adds what it takes here, or says in `TRUSTED` why it checks nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import random
import tempfile
import types
import typing
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from typing_extensions import Unpack

import hos_ext
from hos_ext import (
    densities,
    diffusion,
    integrations,
    linalg,
    losses,
    nn,
    sampling,
    schedules,
    uncertainty,
)
from hos_ext.records import Record
from hos_ext.scores import Scores, UnscaledScores
from hos_ext.tweedie import Posterior

ROOMS = (
    "ops",
    "schedules",
    "linalg",
    "densities",
    "tweedie",
    "losses",
    "nn",
    "sampling",
    "diffusion",
    "uncertainty",
    "integrations",
)
B, D, R = 3, 4, 2  # all different, and none is 1: a wrong axis shows
NAMES_ONLY = ("where", "argument")  # what errors name


def _sum(self: Any, other: Any) -> Any:
    return self + other


def _product(self: Any, v: Any) -> Any:
    return self @ v


OPERATORS: dict[str, Any] = {"__add__": _sum, "__matmul__": _product}

STEP = "called by the driver, which has checked, at each step of a chain"
CHECKED = "its docstring asks for arguments that have been checked"
HUB = "writes to the hub; python_tests/nn/test_hub.py has a server for it"
TRUSTED = {
    "ops.Operator": "made by the authors of operators, out of functions",
    "ops.Argument": "made by the authors of operators",
    "linalg.DPLR.of": CHECKED,
    "linalg.DenseOperator.of": CHECKED,
    "tweedie.covariance_from_kappa": CHECKED,
    "tweedie.noise_covariance": CHECKED,
    "sampling.Step": STEP,
    "sampling.PlainStep": STEP,
    "sampling.NormalStep": STEP,
    "sampling.Metropolis.check": STEP,
    "sampling.Metropolis.walk": STEP,
    "sampling.TwoCoin.toss": STEP,
    "sampling.Point": STEP,
    "sampling.diagonal_law": STEP,
    "sampling.spectral_law": STEP,
    "sampling.step_noise": STEP,
    "sampling.step_size_column": STEP,
    "linalg.spectrum_apply": STEP,
    "linalg.spectrum_logdet": STEP,
    "linalg.low_rank_eigh": STEP,
    "schedules.check_schedule": "a check itself: its first argument is the name in errors",
    "linalg.hessian_of": "takes any object, and answers None for what has no Hessian",
    "sampling.sample_sharded": "needs a group of processes; it hands its arguments to `sample`",
    "sampling.register_step": "takes a class of steps, by duck typing of its attributes",
    "sampling.unregister_step": "takes a class that was registered",
    "nn.MLP.from_weights": "called by load_model with what it has read and checked",
    "nn.UNet.from_weights": "called by load_model with what it has read and checked",
    "nn.UNet3d.from_weights": "called by load_model with what it has read and checked",
    "nn.UNet3d.push_to_hub": HUB,
    "nn.ModelScore.output": CHECKED,
    "integrations.DiffusersScore.output": CHECKED,
    "nn.MLP.push_to_hub": HUB,
    "nn.UNet.push_to_hub": HUB,
    "nn.SecondOrderHead.push_to_hub": HUB,
    "nn.SecondOrderHead.from_weights": "called by load_model with what it has read and checked",
    "integrations.DiffusersScore.save_pretrained": "writes a folder as diffusers does",
    "integrations.from_diffusers": "reads a folder that diffusers wrote",
    "integrations.azula_denoiser": "needs azula, which is not among the tested dependencies",
    "integrations.to_azula": "needs azula, which is not among the tested dependencies",
    "integrations.from_azula": "needs azula, which is not among the tested dependencies",
    "integrations.from_linear_operator": "takes what another package makes",
    "integrations.from_distribution": "takes what torch.distributions makes",
    "integrations.to_distribution": "takes laws, which have checked their own parameters",
}


class Entry(NamedTuple):
    """A public callable.

    Attributes:
        name: "room.function" or "room.Class.method".
        call: what is called; a method takes its object as first argument.
        kinds: the annotation of each parameter, with those of `**options` unpacked.
        required: the parameters that have no default.
        prefixes: what an error may begin with.
    """

    name: str
    call: Callable[..., Any]
    kinds: dict[str, Any]
    required: tuple[str, ...]
    prefixes: tuple[str, ...]
    positional: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------ the walk


def _trusted(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in TRUSTED for i in range(2, len(parts) + 1))


def _hints(function: Any) -> dict[str, Any]:
    """Its annotations; a name that its module imports for the type checker alone is Any."""
    names: dict[str, Any] = {"Unpack": Unpack}
    while True:
        try:
            return typing.get_type_hints(function, localns=names)
        except NameError as error:
            names[error.name] = Any


def _entry(name: str, call: Callable[..., Any], prefixes: tuple[str, ...]) -> Entry | None:
    """None where there is nothing to pass."""
    function = call.__init__ if inspect.isclass(call) else call
    hints = _hints(getattr(function, "__func__", function))
    kinds, required, positional = {}, [], []
    for p in inspect.signature(call).parameters.values():
        kind = hints.get(p.name, Any)
        if p.kind is p.VAR_KEYWORD:
            options = typing.get_args(kind)
            if options:
                kinds |= _hints(options[0])
            continue
        if p.kind is p.VAR_POSITIONAL or (p.name in NAMES_ONLY and p.default is not p.empty):
            continue
        kinds[p.name] = kind
        if p.kind is not p.KEYWORD_ONLY:
            positional.append(p.name)
        if p.default is p.empty:
            required.append(p.name)
    if not kinds:
        return None
    named = inspect.signature(call).parameters.get("where")
    if named is not None and isinstance(named.default, str):
        prefixes = (*prefixes, named.default)
    return Entry(name, call, kinds, tuple(required), prefixes, tuple(positional))


def _class_entries(room: str, cls: type) -> list[Entry | None]:
    found: list[Entry | None] = []
    record, name = issubclass(cls, (tuple, Record)), f"{room}.{cls.__name__}"
    protocol = getattr(cls, "_is_protocol", False)
    if protocol or issubclass(cls, (dict, Exception)):
        return []
    if not record and not inspect.isabstract(cls) and cls.__init__ is not object.__init__:
        found.append(_entry(name, cls, (cls.__name__,)))
    if inspect.isabstract(cls) or (ABC in cls.__bases__ and cls.__name__ == "Density"):
        return found
    for key in dir(cls):
        static = inspect.getattr_static(cls, key)
        home = next((b for b in cls.__mro__ if key in vars(b)), object)
        if not home.__module__.startswith("hos_ext"):
            continue
        if (key.startswith("_") and key not in OPERATORS) or key == "train":
            continue
        if home is Record and key == "replace":
            continue  # takes anything for a field, as the class does
        if key in OPERATORS:
            call: Any = OPERATORS[key]
        elif isinstance(static, classmethod) or (
            inspect.isfunction(static) and not isinstance(static, staticmethod)
        ):
            call = getattr(cls, key)
        else:
            continue
        # A module's forward is called as the module, and an operator has no name in a message.
        homes = dict.fromkeys((cls.__name__, *(b.__name__.lstrip("_") for b in cls.__mro__[:-1])))
        prefixes = (*(f"{c}.{key}" for c in homes), key, *homes)
        if key == "__matmul__":
            prefixes += tuple(f"{c}.matvec" for c in homes)  # the same method under its name
        found.append(_entry(f"{name}.{key}", call, prefixes))
    return found


@functools.cache
def entries() -> dict[str, Entry]:
    """All entries by name, those of `TRUSTED` left out."""
    found: list[Entry | None] = []
    for kind in (Scores, UnscaledScores):
        found += _class_entries("scores", kind)
    found.append(_entry("random.fresh_seed", hos_ext.random.fresh_seed, ("fresh_seed",)))
    for room in ROOMS:
        module = importlib.import_module(f"hos_ext.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                found += _class_entries(room, value)
            elif inspect.isfunction(value) or isinstance(value, functools.partial):
                found.append(_entry(f"{room}.{name}", value, (name,)))
    kept = [e for e in found if e is not None and not _trusted(e.name)]
    return {e.name: e for e in sorted(kept, key=lambda e: e.name)}


# ------------------------------------------------------------------------------- what is passed


class World:
    """The things of one valid call: the same for the same seed, whatever is asked first."""

    def __init__(self, seed: int, entry: Entry) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        flat = entry.name.split(".")[0] in ("linalg", "densities") or "hessian" in entry.name
        self.dims: tuple[int, ...] = self.rng.choice([(D,), (D,), (2, 2)])
        if flat or entry.name in FLAT:
            self.dims = (D,)
        self.dtype = self.rng.choice([torch.float32, torch.float64])
        if entry.name.startswith(FLOAT32):
            self.dtype = torch.float32

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, generator=self.generator)

    def batch(self, *lead: int) -> torch.Tensor:
        return self.randn(*lead, B, *self.dims)

    def rows(self) -> torch.Tensor:
        """A positive number a row."""
        return torch.rand(B, dtype=self.dtype, generator=self.generator) + 0.5

    def level(self) -> float | torch.Tensor:
        return self.rng.choice([0.7, self.rows()])

    def diag(self, *lead: int) -> torch.Tensor:
        return -self.batch(*lead).abs() - 0.5

    def factor(self, *lead: int) -> torch.Tensor:
        return 0.3 * self.randn(*lead, B, D, R)

    def sign(self) -> torch.Tensor:
        return torch.tensor([1.0, -1.0], dtype=self.dtype)

    def dense(self) -> torch.Tensor:
        a = self.randn(B, D, D)
        return a + a.mT

    def dplr(self) -> linalg.DPLR:
        """Positive definite."""
        return linalg.DPLR(self.randn(B, D).abs() + 0.5, self.factor())

    def posterior(self) -> Posterior:
        return Posterior(self.batch(), self.dplr())

    def scores(self) -> Scores:
        c = torch.rand(B, *self.dims, dtype=self.dtype, generator=self.generator) + 0.1
        return Scores(self.batch(), c, self.factor())

    def unscaled(self) -> UnscaledScores:
        return UnscaledScores(self.batch(), self.diag(), self.factor())

    def hessian(self) -> linalg.ScoreHessian:
        return linalg.ScoreHessian(lambda x: -2 * x, self.randn(B, D), symmetrize=True)

    def covariance(self) -> linalg.ScoreHessian:
        """Positive definite, by its products."""
        return linalg.ScoreHessian(lambda x: 2 * x, self.randn(B, D), symmetrize=True)

    def schedule(self) -> Any:
        return self.rng.choice([schedules.VE(0.1, 5.0), schedules.VP(), schedules.EDM()])

    def gaussian(self) -> densities.Gaussian:
        return densities.Gaussian(torch.zeros(D, dtype=self.dtype), torch.eye(D, dtype=self.dtype))

    def weights(self) -> torch.Tensor:
        return torch.tensor([0.25, 0.75], dtype=self.dtype)

    def model(self) -> Callable[..., Scores]:
        return standard_model

    def score_fn(self) -> Callable[..., Any]:
        return standard_score

    def folder(self, name: str = "model") -> Path:
        """A place to write to."""
        return Path(tempfile.gettempdir()) / f"hos_fuzz_{self.rng.getrandbits(40):x}" / name


def standard_model(x: torch.Tensor, sigma: Any) -> Scores:
    """The scores of data from N(0, I)."""
    s = sigma if isinstance(sigma, torch.Tensor) else torch.tensor(sigma, dtype=x.dtype)
    s = s.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    c = torch.ones_like(x) / (1 + s**2)
    return Scores(-s * x * c, c, x.new_zeros(len(x), x.shape[1:].numel(), 1))


def standard_score(x: torch.Tensor) -> torch.Tensor:
    """That of N(0, I)."""
    return -x


def standard_scores(x: torch.Tensor) -> UnscaledScores:
    """Those of N(0, I)."""
    return UnscaledScores(-x, -torch.ones_like(x))


def standard_log_prob(x: torch.Tensor) -> torch.Tensor:
    """That of N(0, I), but for a constant."""
    return -x.flatten(1).square().sum(1) / 2


def matrices(x: torch.Tensor, sigma: Any = None) -> torch.Tensor:
    """A diagonal of a Hessian, as a model of order 2 gives it."""
    return -torch.ones_like(x)


def lower(x: torch.Tensor, sigma: Any = None) -> list[torch.Tensor]:
    """The scores below order 2."""
    return [-x]


def _saved(w: World) -> Path:
    """A folder with a small network."""
    folder = w.folder()
    nn.save_model(nn.MLP((D,), 1, width=8, head_width=8, depth=1, head_depth=1), folder)
    return folder


def _saved_unet(w: World) -> Path:
    folder = w.folder()
    nn.save_model(_unet(w), folder)
    return folder


def _saved_unet3d(w: World) -> Path:
    folder = w.folder()
    nn.save_model(_unet3d(w), folder)
    return folder


def _saved_head(w: World) -> Path:
    folder = w.folder()
    nn.save_model(_head(w), folder)
    return folder


class _Network(torch.nn.Module):
    """As a network of diffusers answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, t: Any) -> Any:
        return types.SimpleNamespace(sample=x * self.weight)


def _scheduler(w: World) -> Any:
    config = types.SimpleNamespace(prediction_type="epsilon")
    return types.SimpleNamespace(alphas_cumprod=torch.linspace(0.99, 0.01, 20), config=config)


def _mlp(w: World) -> nn.MLP:
    torch.manual_seed(0)
    return nn.MLP(w.dims, 1, width=8, head_width=8, depth=1, head_depth=1)


def _unet3d(w: World) -> Any:
    torch.manual_seed(0)
    return nn.UNet3d((1, 2, 4, 4), 1, channels=(8, 8), norm_num_groups=4)


def _unet(w: World) -> Any:
    torch.manual_seed(0)
    return nn.UNet((1, 4, 4), 1, channels=(8, 8), layers_per_block=1, norm_num_groups=4)


class ScoreNet(torch.nn.Module):
    """A first-order network."""

    def forward(self, x: torch.Tensor, sigma: Any) -> torch.Tensor:
        return -x


def _head(w: World) -> nn.SecondOrderHead:
    torch.manual_seed(0)
    head = nn.MLP(w.dims, 1, width=8, head_width=8, head_depth=1, depth=1, given_score=True)
    return nn.SecondOrderHead(ScoreNet(), head)


def _chains(w: World) -> Any:
    return sampling.sample(standard_score, w.batch(), step_size=0.1, n_steps=6, seed=0)


Make = Callable[[World], Any]
LEVELS: dict[str, Make] = {"sigma": World.level, "alpha": lambda w: w.rng.choice([0.9, w.rows()])}

MAKERS: dict[str, Make] = LEVELS | {
    "x": World.batch,
    "x0": World.batch,
    "score": World.batch,
    "eps": World.batch,
    "noise": World.batch,
    "init": World.batch,
    "v": World.batch,
    "diag": World.diag,
    "factor": World.factor,
    "sign": World.sign,
    "hessian": World.dense,
    "matrix": World.dense,
    "out": lambda w: torch.empty(B, *w.dims, dtype=w.dtype),
    "step_size": lambda w: w.rng.choice([0.1, 0.1 * w.rows()]),
    "seed": lambda w: w.rng.choice([0, 7, torch.tensor(3)]),
    "offset": lambda w: w.rng.choice([0, 5, torch.tensor(2)]),
    "first": lambda w: w.rng.choice([0, 11]),
    "first_chain": lambda w: w.rng.choice([0, 11]),
    "stream": lambda w: w.rng.choice([0, 64, 255]),
    "dtype": lambda w: w.rng.choice([None, torch.float32, torch.float64]),
    "device": lambda w: w.rng.choice([None, "cpu", torch.device("cpu")]),
    "shape": lambda w: (B, *w.dims),
    "curvature": lambda w: w.rng.choice(["clamp", "abs", "raw"]),
    "reduction": lambda w: w.rng.choice(["mean", "sum", "none"]),
    "n": lambda w: 5,
    "k": lambda w: 2,
    "a": lambda w: w.rng.choice([2.0, w.rows()]),
    "b": lambda w: w.randn(B, D),
    "index": lambda w: torch.tensor([0, 2]),
    "other": lambda w: w.rng.choice([2.0, w.dplr(), w.rows()]),
    "t": lambda w: w.rng.choice([0.5, w.rows().clamp_max(0.9)]),
    "ratio": lambda w: w.rng.choice([0.5, w.rows()]),
    "schedule": World.schedule,
    "model": World.model,
    "score_fn": World.score_fn,
    "score_model": lambda w: ScoreNet(),
    "log_prob": lambda w: standard_log_prob,
    "posterior": World.posterior,
    "scores": World.scores,
    "symmetrize": lambda w: True,
    "check": lambda w: w.rng.choice([True, False]),
    "chunk_size": lambda w: w.rng.choice([None, 2]),
    "largest": lambda w: w.rng.choice([True, False]),
    "tolerance": lambda w: 1e-3,
    "max_products": lambda w: w.rng.choice([None, 50]),
    "max_iterations": lambda w: w.rng.choice([None, 50]),
    "remainder": lambda w: w.rng.choice(["isotropic", "diagonal"]),
    "n_probes": lambda w: 4,
    "probes": lambda w: w.rng.choice(["signs", "lattice", "exchangeable"]),
    "deflation": World.dplr,
    "n_pairs": lambda w: 2,
    "n_draws": lambda w: 3,
    "decoder": lambda w: lambda z: 2 * z,
    "floor": lambda w: 0.05,
    "operator": lambda w: w.rng.choice([w.hessian(), w.dplr(), linalg.DenseOperator(w.dense())]),
    "values": lambda w: torch.tensor([[3.0, 2.0]], dtype=w.dtype).expand(B, 2).contiguous(),
    "vectors": lambda w: torch.eye(D, dtype=w.dtype)[:, :2].expand(B, D, 2).contiguous(),
    "rest": lambda w: torch.rand(B, D, dtype=w.dtype, generator=w.generator) + 0.1,
    "functions": lambda w: [torch.exp, torch.cos],
    "rows": lambda w: linalg.matrix_rows(w.dense()),
    "scale": lambda w: w.rng.choice([2.0, w.rows()]),
    "method": lambda w: w.rng.choice(["langevin", "mala"]),
    "n_steps": lambda w: 4,
    "burn_in": lambda w: w.rng.choice([0, 2]),
    "thin": lambda w: w.rng.choice([1, 2]),
    "progress": lambda w: False,
    "target": lambda w: 0.574,
    "draws": lambda w: w.randn(B, 16, 2),
    "cost": lambda w: w.rng.choice([1.0, 2]),
    "kind": lambda w: "bulk",
    "ess_kind": lambda w: "bulk",
    "modes": lambda w: w.rng.choice([w.randn(2, 2), lambda x: (x[..., 0] > 0).long()]),
    "step_sizes": lambda w: [0.1, 0.2],
    "adjusted": lambda w: w.rng.choice([None, True, False]),
    "rank": lambda w: 1,
    "world": lambda w: 2,
    "solver": lambda w: "euler",
    "times": lambda w: None,
    "trace": lambda w: w.rng.choice(["learned", "corrected", "hutchinson"]),
    "data_std": lambda w: 1.0,
    "log_prior": lambda w: standard_log_prob,
    "predictor": lambda w: "euler",
    "corrector": lambda w: "langevin",
    "corrector_steps": lambda w: 1,
    "corrector_step_size": lambda w: 0.1,
    "covariance_form": lambda w: w.rng.choice(["low_rank", "diagonal", "none"]),
    "noise_std": lambda w: 0.5,
    "with_covariance": lambda w: w.rng.choice([True, False]),
    "y": lambda w: w.randn(B, 2),
    "sigmas": lambda w: w.rng.choice([[2.0, 1.0, 0.5], torch.tensor([2.0, 0.5])]),
    "inside": lambda w: w.randn(8),
    "outside": lambda w: w.randn(9) + 1,
    "tau": lambda w: w.rng.choice([0.0, 0.1]),
    "levels": lambda w: (0.5, 0.9),
    "directions": lambda w: None,
    "gamma": lambda w: w.rng.choice([1.0, 0.5]),
    "variance_reduction": lambda w: w.rng.choice([True, False]),
    "first_order": lambda w: w.rng.choice(["antithetic", "vr", "plain"]),
    "diagonal": lambda w: w.rng.choice([True, False]),
    "scale_free": lambda w: w.rng.choice([True, False]),
    "detach_score": lambda w: w.rng.choice([True, False]),
    "centred": lambda w: False,
    "return_terms": lambda w: w.rng.choice([True, False]),
    "central": lambda w: w.rng.choice([True, False]),
    "prediction": lambda w: w.rng.choice(["x0", "eps"]),
    "order": lambda w: 2,
    "order_k": lambda w: 2,
    "lower_scores": lambda w: [w.batch()],
    "score_k": World.batch,
    "derivative": World.batch,
    "lower": lambda w: lower,
    "form": lambda w: "diagonal",
    "n_directions": lambda w: 1,
    "cumulants": lambda w: [w.batch(), w.batch()],
    "jacobian": World.dense,
    "level": lambda w: 0.9,
    "dims": lambda w: w.dims,
    "width": lambda w: 8,
    "depth": lambda w: 1,
    "head_width": lambda w: 8,
    "head_depth": lambda w: 1,
    "head": lambda w: nn.MLP(w.dims, 1, width=8, head_width=8, given_score=True),
    "trunk": lambda w: w.rng.choice(["separate", "shared"]),
    "activation": lambda w: w.rng.choice(["tanh", "silu", torch.tanh]),
    "sigma_data": lambda w: 1.0,
    "constrained": lambda w: w.rng.choice([True, False]),
    "c_min": lambda w: 1e-3,
    "given_score": lambda w: w.rng.choice([True, False]),
    "spatial": lambda w: 2,
    "channels": lambda w: (8, 8),
    "head_channels": lambda w: None,
    "layers_per_block": lambda w: 1,
    "norm_num_groups": lambda w: 4,
    "scaled": lambda w: True,
    "folder": World.folder,
    "reader": lambda w: "hos_ext.integrations.diffusers:read_saved",
    "mean": lambda w: w.randn(D),
    "means": lambda w: w.randn(2, D),
    "covariance": lambda w: torch.eye(D, dtype=w.dtype),
    "covariances": lambda w: torch.eye(D, dtype=w.dtype).expand(2, D, D).contiguous(),
    "weights": World.weights,
    "locations": lambda w: w.randn(2, D),
    "scales": lambda w: w.randn(2, D).abs() + 0.5,
    "proposal": lambda w: sampling.make_step("ozaki"),
    "sigma_min": lambda w: 0.02,
    "sigma_max": lambda w: 40.0,
    "rho": lambda w: 7.0,
    "p_mean": lambda w: -1.2,
    "p_std": lambda w: 1.2,
    "beta_min": lambda w: 0.1,
    "beta_max": lambda w: 20.0,
    "t_min": lambda w: 1e-3,
    "t_max": lambda w: 0.99,
    "s": lambda w: 0.008,
    "alphas_cumprod": lambda w: torch.linspace(0.99, 0.01, 20, dtype=torch.float64),
    "velocity": World.batch,
    "velocity_fn": lambda w: lambda x: -0.1 * x,
    "alpha_slope": lambda w: -0.4,
    "sigma_slope": lambda w: 1.0,
    "logit_normal": lambda w: (0.0, 1.0),
    "sigma_range": lambda w: (0.1, 2.0),
    "state": lambda w: None,
    "init_state": lambda w: None,
    "whole": World.hessian,
    "step": lambda w: w.rng.choice([None, 3]),
    "shift": lambda w: 0.5,
    "scheduler": _scheduler,
    "net": lambda w: _Network(),
    "call": lambda w: None,
    "model_kwargs": lambda w: None,
    "num_timesteps": lambda w: None,
}


def _curve_down(t: Any) -> Any:
    """The signal of a path."""
    return 1 - t**2


def _curve_up(t: Any) -> Any:
    """The noise of a path."""
    return t


SELF: dict[str, Make] = {
    "Scores": World.scores,
    "UnscaledScores": World.unscaled,
    "Posterior": World.posterior,
    "DecodedPosterior": lambda w: uncertainty.DecodedPosterior(
        w.batch(), w.batch().abs(), w.batch().abs(), w.batch()
    ),
    "DPLR": World.dplr,
    "BatchRows": lambda w: linalg.BatchRows(w.hessian(), torch.tensor([0, 1, 2])),
    "DenseOperator": lambda w: linalg.DenseOperator(w.dense()),
    "ScoreHessian": World.hessian,
    "VE": lambda w: schedules.VE(),
    "VP": lambda w: schedules.VP(),
    "EDM": lambda w: schedules.EDM(),
    "SubVP": lambda w: schedules.SubVP(),
    "CosineVP": lambda w: schedules.CosineVP(),
    "DiscreteVP": lambda w: schedules.from_alphas_cumprod(torch.linspace(0.99, 0.01, 20)),
    "Rectified": lambda w: schedules.Rectified(shift=3.0, logit_normal=(0.0, 1.0)),
    "Interpolant": lambda w: schedules.Interpolant(_curve_down, _curve_up, t_min=0.1, t_max=0.9),
    "Gaussian": World.gaussian,
    "GaussianMixture": lambda w: densities.GaussianMixture(
        w.weights(), w.randn(2, D), torch.eye(D, dtype=w.dtype).expand(2, D, D)
    ),
    "JointLogisticMixture": lambda w: densities.JointLogisticMixture(
        w.weights(), w.randn(2, D), w.randn(2, D).abs() + 0.5, noise_std=0.5
    ),
    "ProductLogisticMixture": lambda w: densities.ProductLogisticMixture(
        torch.full((D, 2), 0.5, dtype=w.dtype), w.randn(D, 2), w.randn(D, 2).abs() + 0.5
    ),
    "ScoreMatchingLoss": lambda w: losses.ScoreMatchingLoss(0.5),
    "MLP": _mlp,
    "UNet": _unet,
    "UNet3d": _unet3d,
    "SecondOrderHead": _head,
    "ClassifierFree": lambda w: nn.ClassifierFree(_mlp(w), 2.0),
    "Chains": _chains,
    "Estimate": lambda w: linalg.Estimate(w.diag(), w.diag().abs()),
    "Eigenpairs": lambda w: linalg.eigenpairs(linalg.DenseOperator(w.dense()), 2),
    "Spectrum": lambda w: linalg.spectrum.dense_spectrum(w.dense()),
    "LanczosResult": lambda w: linalg.LanczosResult(
        (w.diag(),), w.diag()[:, 0], torch.ones(B, dtype=torch.int64), torch.ones(B) > 0
    ),
    "StepSizeSearch": lambda w: sampling.StepSizeSearch(0.1, [0.1], [0.5]),
    "StepSizeAdaptation": lambda w: sampling.StepSizeAdaptation(
        0.1, [0.5], [0.1], torch.zeros(B), torch.zeros(B) > 0, _chains(w).state
    ),
    "CalibrationReport": lambda w: hos_ext.uncertainty.calibration_report(
        w.batch(), World.posterior(w), tau=0.5, levels=[0.5]
    ),
    "PosteriorMixture": lambda w: diffusion.PosteriorMixture(World.posterior(w), 1),
    "Conformal": lambda w: hos_ext.uncertainty.conformal(w.batch(), World.posterior(w), level=0.5),
    "DiffusersScore": lambda w: integrations.DiffusersScore(_Network(), _scheduler(w)),
    "ModelScore": lambda w: nn.ModelScore(_Network(), schedules.VP(), "eps"),
    "AlongSchedule": lambda w: diffusion.AlongSchedule(standard_model, schedules.Rectified()),
    "MeanDenoiser": lambda w: integrations.MeanDenoiser(standard_model),
}

SCALARS: dict[str, Make] = {"sigma": lambda w: 0.7, "alpha": lambda w: 0.9}
LIST: dict[str, Make] = {"scores": lambda w: [w.batch(), w.batch()]}
LEAD3 = {"score": lambda w: w.batch(3), "diag": lambda w: w.diag(3)}
MATRIX_AND_Y: dict[str, Make] = {"operator": lambda w: w.randn(2, D)}
UNET: dict[str, Make] = {"dims": lambda w: (1, 4, 4)}
INT_SEED: dict[str, Make] = {"seed": lambda w: w.rng.choice([0, 7]), "offset": lambda w: 0}
RUN = INT_SEED | {"times": lambda w: [0.9, 0.5, 0.2]}
BY_SEED = ("sampling.", "diffusion.", "linalg.", "uncertainty.", "densities.", "tweedie.Posterior")

FLAT = {"ops.assemble_hessian", "ops.hessian_matvec", "diffusion.condition"}
FLOAT32 = ("nn.",)

NO_STEP_SIZE_A_ROW: dict[str, Make] = {"step_size": lambda w: 0.1}
OFTEN_T: dict[str, Make] = {"sigma": lambda w: w.rng.choice([0.5, w.rows() / 2])}
SOLVERS = (
    "log_likelihood",
    "predictor_corrector",
    "probability_flow_ode",
    "reverse_sde",
    "second_order_reverse",
)
FADING = ("VP", "SubVP", "CosineVP", "DiscreteVP", "Rectified", "Interpolant")
VELOCITY = (
    "hessian_from_velocity_jacobian",
    "score_from_velocity",
    "velocity_from_score",
    "velocity_jacobian_from_hessian",
    "x0_from_velocity",
)
OF_SIGMA = ("noisy", "posterior_covariance", "posterior_mean")
DENSITY = ("Gaussian", "GaussianMixture", "JointLogisticMixture", "ProductLogisticMixture")

SPECIAL: dict[str, dict[str, Make]] = {
    **{f"densities.{c}.{m}": SCALARS for c in DENSITY for m in OF_SIGMA},
    **{f"schedules.{c}.t_of_sigma": OFTEN_T for c in FADING},
    "schedules.Interpolant": {
        "alpha": lambda w: _curve_down,
        "sigma": lambda w: _curve_up,
        "alpha_slope": lambda w: lambda t: -2 * t,
        "sigma_slope": lambda w: torch.ones_like,
    },
    "schedules.Rectified": {"shift": lambda w: 3.0},
    "diffusion.annealed_langevin": NO_STEP_SIZE_A_ROW,
    "integrations.MeanDenoiser": {"scale": lambda w: 2.0, "schedule": lambda w: None},
    "diffusion.log_likelihood": {"solver": lambda w: "heun"},
    "losses.score_matching_loss": {"diagonal": lambda w: False},
    "linalg.ScoreHessian.__add__": {"other": lambda w: w.rng.choice([2.0, w.rows()])},
    "linalg.isotropic_spectrum": {"diag": lambda w: torch.full((B, D), -0.5, dtype=w.dtype)},
    "losses.order_k_vr_loss": {
        "score_k": lambda w: w.batch(3),
        "lower_scores": lambda w: [w.batch(3)],
    },
    "nn.SecondOrderHead.from_pretrained": {"folder": _saved_head},
    "nn.UNet.from_pretrained": {"folder": _saved_unet},
    "nn.UNet3d.from_pretrained": {"folder": _saved_unet3d},
    "sampling.make_step": {
        "method": lambda w: w.rng.choice(["ozaki", "langevin"]),
        "adjusted": lambda w: w.rng.choice([None, False]),
    },
    "sampling.sample": {"method": lambda w: "mala", "log_prob": lambda w: standard_log_prob},
    "sampling.search_step_size": {"method": lambda w: "mala"},
    "sampling.Metropolis": {"rule": lambda w: w.rng.choice(["simpson", "lobatto-3"])},
    "sampling.TwoCoin": {
        "bound": lambda w: sampling.SmoothBound(third=2.0),
        "max_tosses": lambda w: 8,
    },
    "sampling.SmoothBound": {"third": lambda w: 2.0, "width": lambda w: 0.0},
    "sampling.SupportBound": {
        "sigma": lambda w: 0.5,
        "alpha": lambda w: 0.9,
        "low": lambda w: -1.0,
        "high": lambda w: 1.0,
        "radius": lambda w: 2.0,
    },
    "ops.d2sm_vr_loss": LEAD3 | {"factor": lambda w: w.factor(3)},
    "ops.d2sm_diag_vr_loss": LEAD3,
    "ops.dsm_vr_loss": {"score": lambda w: w.batch(2)},
    "ops.assemble_hessian": {"out": lambda w: torch.empty(B, D, D, dtype=w.dtype)},
    "tweedie.noise_cumulants": LIST,
    "tweedie.posterior_cumulants": LIST,
    "tweedie.posterior_moments": LIST,
    "tweedie.psi_from_scores": LIST,
    "tweedie.Posterior.correlation": {"index": lambda w: tuple(0 for _ in w.dims)},
    "losses.hermite": {"diagonal": lambda w: True},
    "losses.order_k_matching_loss": {"model": lambda w: matrices},
    "losses.ScoreMatchingLoss": SCALARS | {"seed": lambda w: 3, "sigma": lambda w: 0.5},
    "nn.UNet": UNET,
    "nn.UNet3d": {"dims": lambda w: (1, 2, 4, 4)},
    "nn.UNet3d.forward": {"x": lambda w: w.randn(B, 1, 2, 4, 4)},
    "nn.UNet.forward": {"x": lambda w: w.randn(B, 1, 4, 4)},
    "nn.load_model": {"folder": _saved},
    "nn.MLP.from_pretrained": {"folder": _saved},
    "nn.ClassifierFree": {"scale": lambda w: 2.0},
    "nn.ModelScore": {
        "time": lambda w: None,
        "sigma_data": lambda w: None,
        "check": lambda w: None,
    },
    "integrations.DiffusersScore": {"check": lambda w: None},
    "nn.check_model": {
        "data": World.batch,
        "schedule": lambda w: None,
        "seed": lambda w: 3,
        "sigmas": lambda w: (0.5, 2.0),
    },
    "nn.save_model": {"model": _mlp},
    "nn.MLP": {"activation": lambda w: w.rng.choice(["tanh", "silu"])},
    "nn.register_score_reader": {"kind": lambda w: "diffusers"},
    "diffusion.condition": MATRIX_AND_Y,
    "diffusion.condition_mean": MATRIX_AND_Y | {"max_iterations": lambda w: 50},
    "diffusion.guided": MATRIX_AND_Y | {"max_iterations": lambda w: 50},
    "diffusion.composed": {
        "observations": lambda w: w.rng.choice([{"label": torch.zeros(3, 2)}, ["label"]]),
        "unconditional": World.model,
        "widest": lambda w: w.rng.choice([None, 1.0]),
    },
    "diffusion.box_model": {
        "low": lambda w: torch.zeros(w.dims, dtype=w.dtype),
        "high": lambda w: torch.ones(w.dims, dtype=w.dtype),
    },
    "diffusion.gaussian_model": {
        "mean": lambda w: w.randn(D),
        "covariance": lambda w: w.rng.choice([torch.ones(D), torch.eye(D)]).to(w.dtype),
    },
    "tweedie.product_of_posteriors": {
        "posteriors": lambda w: [w.posterior()] * 2,
        "unconditional": World.posterior,
        "widest": lambda w: 1.0,
    },
    "diffusion.reverse_sde": RUN,
    "diffusion.probability_flow_ode": RUN,
    "diffusion.predictor_corrector": RUN,
    "diffusion.second_order_reverse": RUN,
    "sampling.adapt_step_size": {"step_size": lambda w: 0.1, "method": lambda w: "mala"},
    "sampling.shard": {"n": lambda w: 10},
    "sampling.law_error": {
        "draws": lambda w: w.randn(16, 2),
        "reference": lambda w: w.randn(12, 2),
        "limit": lambda w: 10,
    },
    "diffusion.posterior_mixture": INT_SEED | {"sigma": lambda w: 0.7, "middle": lambda w: 0.3},
    "uncertainty.conformal": {"kind": lambda w: "entry", "level": lambda w: 0.5},
    "uncertainty.leaf_order": {
        "model": lambda w: lambda x, sigma: Scores(x, x.sin()),
        "x0": lambda w: w.randn(8, D),
        "sigma": lambda w: 0.3,
        "rows": lambda w: 5,
    },
    "uncertainty.outlier_score": {"kind": lambda w: "laplacian"},
    "densities.ProductLogisticMixture": {
        "weights": lambda w: torch.full((D, 2), 0.5, dtype=w.dtype),
        "locations": lambda w: w.randn(D, 2),
        "scales": lambda w: w.randn(D, 2).abs() + 0.5,
    },
    "linalg.ScoreHessian.scale": {"a": lambda w: 2.0},
    "integrations.to_linear_operator": {"matrix": World.dplr},
    "linalg.ScoreHessian.low_rank": {"self": World.covariance},
    "uncertainty.decode_posterior": {
        "method": lambda w: w.rng.choice(["linear", "samples"]),
        "chunk_size": lambda w: 2,
    },
    "uncertainty.posterior_from_score": SCALARS,
    "uncertainty.posterior_from_velocity": {
        "schedule": lambda w: schedules.Rectified(),
        "t": lambda w: w.rng.choice([0.5, w.rows() / 2]),
    },
    "diffusion.AlongSchedule.forward": {"sigma": lambda w: w.rng.choice([0.5, w.rows() / 2])},
}
# Parameters that a valid call always gives, and those that it leaves out or that exclude others.
ALWAYS = {
    "losses.order_k_matching_loss": {"lower"},
    "sampling.sample": {"init", "method", "log_prob"},
    "losses.ScoreMatchingLoss": {"sigma"},
    "nn.SecondOrderHead.from_pretrained": {"score_model"},
    "sampling.search_step_size": {"log_prob", "method"},
    "sampling.SmoothBound": {"third"},
    "sampling.SupportBound": {"low", "high"},
    "linalg.DPLR": {"factor"},
    **{f"diffusion.{n}": {"n_steps"} for n in SOLVERS},
}
ALWAYS |= {f"tweedie.{n}": {"alpha", "alpha_slope", "sigma_slope"} for n in VELOCITY}
NETS = ("MLP", "UNet", "UNet3d", "SecondOrderHead")
LAWS = ("Gaussian", "GaussianMixture", "JointLogisticMixture", "ProductLogisticMixture")
PATHS = ("VE", "VP", "EDM", "SubVP", "CosineVP", "DiscreteVP", "Rectified", "Interpolant")
ALWAYS |= {"uncertainty.conformal": {"level"}}
# They draw by a seed or by a generator, and one is always given.
ALWAYS |= {f"densities.{n}.sample": {"seed"} for n in LAWS}
ALWAYS |= {f"schedules.{n}.sample_t": {"seed"} for n in PATHS}
ALWAYS |= {n: {"seed"} for n in ("schedules.draw_sigma", "ops.normal", "ops.uniform")}
EXCLUDES = {"noise": ("seed", "offset", "first"), "times": ("n_steps",)}
LEFT_OUT = {
    "nn.load_model": {"revision"},  # it is for models of the hub
    **{f"nn.{name}.from_pretrained": {"revision"} for name in NETS},
    "nn.MLP.forward": {"scaled_score"},
    "nn.UNet.forward": {"scaled_score"},
    "nn.UNet3d.forward": {"scaled_score"},
    "losses.ScoreMatchingLoss": {"schedule", "alpha", "detach_score"},
    "losses.order_k_vr_loss": {"derivative"},
    "sampling.search_step_size": {"thin"},  # 4 draws must be kept
}


def maker(entry: Entry, parameter: str) -> Make | None:
    """What builds a parameter of a valid call."""
    special = SPECIAL.get(entry.name, {})
    if parameter in special:
        return special[parameter]
    if parameter == "self":
        return SELF[entry.name.split(".")[1]]
    if parameter in INT_SEED and entry.name.startswith(BY_SEED):
        return INT_SEED[parameter]
    return MAKERS.get(parameter)


def valid_call(entry: Entry, seed: int) -> dict[str, Any]:
    """Arguments that the entry takes: all that it requires, and some of the others.

    Raises:
        KeyError: nothing is known for one that it requires.
    """
    world = World(seed, entry)
    chosen: dict[str, Any] = {}
    for name in entry.kinds:
        optional = name not in entry.required
        make = maker(entry, name)
        if optional and (make is None or name in LEFT_OUT.get(entry.name, ())):
            continue
        always = name in ALWAYS.get(entry.name, ())
        if optional and not always and world.rng.random() < 0.6:
            continue
        if make is None:
            raise KeyError(f"{entry.name}: a valid call must be known for {name}")
        chosen[name] = make(world)
    for name, others in EXCLUDES.items():
        if chosen.get(name) is not None:
            for other in others:
                if other not in entry.required:
                    chosen.pop(other, None)
    return chosen


def invoke(entry: Entry, chosen: dict[str, Any]) -> Any:
    """The call itself: positional parameters in place, the rest by keyword."""
    given = dict(chosen)
    args = []
    for name in entry.positional:
        if name not in given:
            break
        args.append(given.pop(name))
    return entry.call(*args, **given)
