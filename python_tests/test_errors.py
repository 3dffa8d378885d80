"""Every error of the operators, word for word: the argument, the rule, and what came."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import hos_ext
from hos_ext.ops import _native as native
from hos_ext.ops._native import has_kernels

X = torch.linspace(-1, 1, 12).reshape(3, 4)
D = torch.linspace(1, 2, 12).reshape(3, 4)
U = torch.linspace(-1, 1, 24).reshape(3, 4, 2)
X2, X3, U3 = torch.stack([X] * 2), torch.stack([X] * 3), torch.stack([U] * 3)
META = torch.empty(3, 4, device="meta")
NAN, INF = math.nan, math.inf

STEPS = {
    "langevin_step": lambda x=X, score=X, step_size=0.1, **k: hos_ext.langevin_step(
        x, score, step_size, **k
    ),
    "ozaki_step": lambda x=X, score=X, diag=D, step_size=0.1, **k: hos_ext.ozaki_step(
        x, score, diag, step_size, **k
    ),
}
LOSSES = {
    "dsm_loss": lambda score=X, noise=X, sigma=0.5, **k: hos_ext.dsm_loss(score, noise, sigma, **k),
    "dsm_vr_loss": lambda score=X2, noise=X, sigma=0.5, **k: hos_ext.dsm_vr_loss(
        score, noise, sigma, **k
    ),
    "d2sm_loss": lambda score=X, diag=D, factor=U, noise=X, sigma=0.5, **k: hos_ext.d2sm_loss(
        score, diag, factor, noise, sigma, **k
    ),
    "d2sm_vr_loss": lambda score=X3, diag=X3, factor=U3, noise=X, sigma=0.5, **k: (
        hos_ext.d2sm_vr_loss(score, diag, factor, noise, sigma, **k)
    ),
    "d2sm_diag_loss": lambda score=X, diag=D, noise=X, sigma=0.5, **k: hos_ext.d2sm_diag_loss(
        score, diag, noise, sigma, **k
    ),
    "d2sm_diag_vr_loss": lambda score=X3, diag=X3, noise=X, sigma=0.5, **k: (
        hos_ext.d2sm_diag_vr_loss(score, diag, noise, sigma, **k)
    ),
}
HESSIANS = {
    "assemble_hessian": lambda diag=D, factor=U, **k: hos_ext.assemble_hessian(diag, factor, **k),
    "hessian_matvec": lambda diag=D, factor=U, v=X, **k: hos_ext.hessian_matvec(
        diag, factor, v, **k
    ),
}
DRAWS = {
    "normal": lambda shape=(3, 4), seed=0, **k: hos_ext.normal(shape, seed=seed, **k),
    "uniform": lambda shape=(3, 4), seed=0, **k: hos_ext.uniform(shape, seed=seed, **k),
}
SHARED = torch.zeros(3, 4, 4)
CALLS = STEPS | LOSSES | HESSIANS | DRAWS


def refuses(names, kind, message, **arguments):
    """One case for each operator: its arguments, the error, and the text after the name."""
    return [pytest.param(name, arguments, kind, message, id=f"{name}-{message}") for name in names]


def check(name, arguments, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(f'{name}: {message}')}$"):
        CALLS[name](**arguments)


def grad(t):
    return t.clone().requires_grad_()


def overlapping():
    """Two views of one buffer that share some entries."""
    buffer = torch.zeros(3, 8)
    return buffer[:, :4], buffer[:, 2:6]


def shifted():
    buffer = torch.zeros(16)
    return buffer[:12].view(3, 4), buffer[4:].view(3, 4)


ALL_STEPS, ALL_LOSSES, PLAIN = list(STEPS), list(LOSSES), ["d2sm_loss", "d2sm_diag_loss"]
LOW_RANK, SECOND = ["d2sm_loss", "d2sm_vr_loss"], ["d2sm_diag_loss", "d2sm_diag_vr_loss"]
REDUCED = ["d2sm_vr_loss", "d2sm_diag_vr_loss"]
FLOATS = "float32, float64, float16, bfloat16"
WIDE = "float32, float64"

WRONG_KIND = [
    *refuses(ALL_STEPS, TypeError, "x must be a Tensor, got list", x=[[1.0]]),
    *refuses(ALL_STEPS, TypeError, "score must be a Tensor, got float", score=1.0),
    *refuses(ALL_STEPS, TypeError, "score must be a Tensor, got NoneType", score=None),
    *refuses(["ozaki_step"], TypeError, "diag must be a Tensor, got NoneType", diag=None),
    *refuses(["ozaki_step"], TypeError, "diag must be a Tensor, got float", diag=-1.0),
    *refuses(ALL_STEPS, TypeError, "noise must be a Tensor, got float", noise=0.0),
    *refuses([*ALL_STEPS, "assemble_hessian"], TypeError, "out must be a Tensor, got list", out=[]),
    *refuses(ALL_STEPS, TypeError, "step_size must be a float or a Tensor, got str", step_size="a"),
    *refuses(
        ALL_STEPS, TypeError, "step_size must be a float or a Tensor, got bool", step_size=True
    ),
    *refuses(
        ALL_STEPS, TypeError, "step_size must be a float or a Tensor, got NoneType", step_size=None
    ),
    *refuses(ALL_STEPS, TypeError, "first must be an int, got float", first=1.0),
    *refuses(ALL_STEPS, TypeError, "first must be an int, got bool", first=True),
    *refuses(ALL_STEPS, TypeError, "offset must be an int, got float", offset=1.0),
    *refuses(ALL_STEPS, TypeError, "seed must be an int, got str", seed="a"),
    *refuses(ALL_LOSSES, TypeError, "noise must be a Tensor, got NoneType", noise=None),
    *refuses(ALL_LOSSES, TypeError, "score must be a Tensor, got NoneType", score=None),
    *refuses(LOW_RANK + SECOND, TypeError, "diag must be a Tensor, got NoneType", diag=None),
    *refuses(LOW_RANK, TypeError, "factor must be a Tensor, got int", factor=3),
    *refuses(LOW_RANK, TypeError, "sign must be a Tensor, got list", sign=[1.0, 1.0]),
    *refuses(ALL_LOSSES, TypeError, "sigma must be a float or a Tensor, got list", sigma=[0.5]),
    *refuses(ALL_LOSSES, TypeError, "sigma must be a float or a Tensor, got bool", sigma=True),
    *refuses(HESSIANS, TypeError, "diag must be a Tensor, got NoneType", diag=None),
    *refuses(HESSIANS, TypeError, "factor must be a Tensor, got float", factor=1.0),
    *refuses(HESSIANS, TypeError, "sign must be a Tensor, got float", sign=1.0),
    *refuses(["hessian_matvec"], TypeError, "v must be a Tensor, got NoneType", v=None),
    *refuses(DRAWS, TypeError, "seed must be an int, got float", seed=0.0),
    *refuses(DRAWS, TypeError, "seed must be an int, got NoneType", seed=None),
    *refuses(DRAWS, TypeError, "offset must be an int, got str", offset="a"),
    *refuses(DRAWS, TypeError, "first must be an int, got Tensor", first=torch.tensor(1)),
    *refuses(DRAWS, TypeError, "stream must be an int, got float", stream=1.0),
    *refuses(DRAWS, TypeError, "shape must be a sequence of ints, got 5", shape=5),
    *refuses(DRAWS, TypeError, "shape must be a sequence of ints, got (2.5,)", shape=(2.5,)),
]

INT, HALF, DOUBLE = X.int(), X.half(), X.double()
WRONG_DTYPE = [
    *refuses(ALL_STEPS, ValueError, f"x must have dtype {FLOATS}, got torch.int32", x=INT),
    *refuses(ALL_STEPS, ValueError, f"x must have dtype {FLOATS}, got torch.complex64", x=X + 0j),
    *refuses(
        ALL_STEPS,
        ValueError,
        "score must have dtype torch.float32 like x, got torch.float64",
        score=DOUBLE,
    ),
    *refuses(
        ["ozaki_step"],
        ValueError,
        "diag must have dtype torch.float32 like x, got torch.float16",
        diag=HALF,
    ),
    *refuses(
        ALL_STEPS,
        ValueError,
        "noise must have dtype torch.float32 like x, got torch.float64",
        noise=DOUBLE,
    ),
    *refuses(
        ALL_STEPS,
        ValueError,
        "out must have dtype torch.float32, got torch.float64",
        out=torch.empty(3, 4).double(),
    ),
    *refuses(
        ALL_STEPS,
        ValueError,
        "step_size must be floating, got torch.int64",
        step_size=INT.long()[:, 0],
    ),
    *refuses(ALL_LOSSES, ValueError, f"noise must have dtype {WIDE}, got torch.int32", noise=INT),
    *refuses(
        ALL_LOSSES,
        ValueError,
        "score must have dtype torch.float64 like noise, got torch.float32",
        noise=DOUBLE,
    ),
    *refuses(
        PLAIN,
        ValueError,
        "diag must have dtype torch.float32 like noise, got torch.float64",
        diag=DOUBLE,
    ),
    *refuses(
        ["d2sm_loss"],
        ValueError,
        "factor must have dtype torch.float32 like noise, got torch.float64",
        factor=U.double(),
    ),
    *refuses(
        [*LOW_RANK, *HESSIANS],
        ValueError,
        "sign must have dtype torch.float32 (one for each column), got torch.float64",
        sign=torch.ones(2).double(),
    ),
    *refuses(
        [*LOW_RANK, *HESSIANS],
        ValueError,
        f"sign must have dtype {WIDE}, got torch.int64",
        sign=torch.ones(2).long(),
    ),
    *refuses(
        ALL_LOSSES, ValueError, "sigma must be floating, got torch.int64", sigma=torch.tensor(1)
    ),
    *refuses(
        ["dsm_loss", *PLAIN],
        ValueError,
        f"score must have dtype {WIDE}, got torch.float16",
        score=HALF,
    ),
    *refuses(
        ["dsm_loss", *PLAIN],
        ValueError,
        f"noise must have dtype {WIDE}, got torch.bfloat16",
        noise=X.bfloat16(),
    ),
    *refuses(
        ["dsm_vr_loss", *REDUCED],
        ValueError,
        f"inputs must have dtype {WIDE} (a second difference divided by sigma^2 does not survive"
        " half precision), got torch.float16",
        noise=HALF,
    ),
    *refuses(HESSIANS, ValueError, f"diag must have dtype {WIDE}, got torch.float16", diag=HALF),
    *refuses(
        HESSIANS,
        ValueError,
        "factor must have dtype torch.float32 like diag, got torch.float64",
        factor=U.double(),
    ),
    *refuses(
        ["hessian_matvec"],
        ValueError,
        "v must have dtype torch.float32 like diag, got torch.float64",
        v=DOUBLE,
    ),
    *refuses(
        DRAWS,
        ValueError,
        "dtype must be float32, float64, float16, bfloat16, got torch.int64",
        dtype=torch.int64,
    ),
    *refuses(
        [*DRAWS, *STEPS],
        ValueError,
        "seed must be an int or a 0-d int64 tensor, got shape () torch.int32 on cpu",
        seed=torch.tensor(1, dtype=torch.int32),
    ),
    *refuses(
        [*DRAWS, *STEPS],
        ValueError,
        "offset must be an int or a 0-d int64 tensor, got shape (1,) torch.int64 on cpu",
        offset=torch.tensor([1]),
    ),
]

WRONG_DEVICE = [
    *refuses(ALL_STEPS, ValueError, "score must be on cpu like x, got meta", score=META),
    *refuses(["ozaki_step"], ValueError, "diag must be on cpu like x, got meta", diag=META),
    *refuses(ALL_STEPS, ValueError, "noise must be on cpu like x, got meta", noise=META),
    *refuses(ALL_STEPS, ValueError, "out must be on cpu, got meta", out=META),
    *refuses(ALL_STEPS, ValueError, "step_size must be on cpu, got meta", step_size=META[:, 0]),
    *refuses(
        [*STEPS, *DRAWS],
        ValueError,
        "seed must be on cpu, got meta",
        seed=torch.empty((), dtype=torch.int64, device="meta"),
    ),
    *refuses(
        [*STEPS, *DRAWS],
        ValueError,
        "offset must be on cpu, got meta",
        offset=torch.empty((), dtype=torch.int64, device="meta"),
    ),
    *refuses(ALL_LOSSES, ValueError, "score must be on meta like noise, got cpu", noise=META),
    *refuses(PLAIN, ValueError, "diag must be on cpu like noise, got meta", diag=META),
    *refuses(
        ["d2sm_loss"],
        ValueError,
        "factor must be on cpu like noise, got meta",
        factor=U.to("meta"),
    ),
    *refuses(
        [*LOW_RANK, *HESSIANS],
        ValueError,
        "sign must be on cpu (one for each column), got meta",
        sign=torch.empty(2, device="meta"),
    ),
    *refuses(ALL_LOSSES, ValueError, "sigma must be on cpu, got meta", sigma=META[:, 0]),
    *refuses(
        HESSIANS, ValueError, "factor must be on cpu like diag, got meta", factor=U.to("meta")
    ),
    *refuses(["hessian_matvec"], ValueError, "v must be on cpu like diag, got meta", v=META),
]

WRONG_SHAPE = [
    *refuses(ALL_STEPS, ValueError, "x must have shape (B, *dims), got (3,)", x=X[:, 0]),
    *refuses(
        ALL_STEPS, ValueError, "score must have shape (3, 4) like x, got (3, 3)", score=X[:, :3]
    ),
    *refuses(
        ["ozaki_step"], ValueError, "diag must have shape (3, 4) like x, got (3,)", diag=X[:, 0]
    ),
    *refuses(ALL_STEPS, ValueError, "noise must have shape (3, 4) like x, got (1, 4)", noise=X[:1]),
    *refuses(
        ALL_STEPS,
        ValueError,
        "out must have shape (3, 4), got (4, 3)",
        out=torch.empty(4, 3),
    ),
    *refuses(
        ["assemble_hessian"],
        ValueError,
        "out must have shape (3, 4, 4), got (3, 4)",
        out=torch.empty(3, 4),
    ),
    *refuses(
        ALL_STEPS,
        ValueError,
        "step_size must be a float or have shape () or (3,), got (4,)",
        step_size=torch.ones(4),
    ),
    *refuses(
        ALL_STEPS,
        ValueError,
        "step_size must be a float or have shape () or (3,), got (3, 1)",
        step_size=torch.ones(3, 1),
    ),
    *refuses(ALL_STEPS, ValueError, "x must be strided, got torch.sparse_coo", x=X.to_sparse()),
    *refuses(ALL_LOSSES, ValueError, "noise must have shape (B, *dims), got (3,)", noise=X[:, 0]),
    *refuses(
        ALL_LOSSES, ValueError, "noise must be strided, got torch.sparse_coo", noise=X.to_sparse()
    ),
    *refuses(
        ["dsm_loss", *PLAIN],
        ValueError,
        "score must have shape (3, 4), got (2, 3, 4)",
        score=X2,
    ),
    *refuses(
        ["dsm_vr_loss"], ValueError, "score must have shape (2, 3, 4), got (3, 3, 4)", score=X3
    ),
    *refuses(
        REDUCED,
        ValueError,
        "score must have shape (2, 3, 4) or (3, 3, 4), got (3, 4)",
        score=X,
    ),
    *refuses(
        PLAIN, ValueError, "diag must have shape (3, 4) like noise, got (3, 1)", diag=D[:, :1]
    ),
    *refuses(
        REDUCED, ValueError, "diag must have shape (3, 3, 4) like noise, got (2, 3, 4)", diag=X2
    ),
    *refuses(["d2sm_loss"], ValueError, "factor must have shape (3, 4, r), got (3, 4)", factor=D),
    *refuses(
        ["d2sm_loss"],
        ValueError,
        "factor must have shape (3, 4, r), got (3, 2, 4)",
        factor=U.mT,
    ),
    *refuses(
        ["d2sm_vr_loss"], ValueError, "factor must have shape (3, 3, 4, r), got (3, 4, 2)", factor=U
    ),
    *refuses(
        [*LOW_RANK, *HESSIANS],
        ValueError,
        "sign must have shape (2,) (one for each column), got (3,)",
        sign=torch.ones(3),
    ),
    *refuses(
        LOW_RANK,
        ValueError,
        "sign must have shape (0,) (one for each column), got (2,)",
        sign=torch.ones(2),
        factor=None,
    ),
    *refuses(
        ALL_LOSSES,
        ValueError,
        "sigma must be a float or have shape () or (3,), got (1,)",
        sigma=torch.ones(1),
    ),
    *refuses(HESSIANS, ValueError, "diag must have shape (B, D), got (3,)", diag=D[:, 0]),
    *refuses(HESSIANS, ValueError, "factor must have shape (3, 4, r), got (3, 4)", factor=D),
    *refuses(HESSIANS, ValueError, "factor must have shape (3, 4, r), got (3, 2, 4)", factor=U.mT),
    *refuses(["hessian_matvec"], ValueError, "v must have shape (3, 4[, k]), got (4,)", v=D[0]),
    *refuses(
        ["hessian_matvec"], ValueError, "v must have shape (3, 4[, k]), got (3, 2, 4)", v=U.mT
    ),
    *refuses(DRAWS, ValueError, "shape must not be negative, got (3, -1)", shape=(3, -1)),
]


def positive(name, value):
    """Numbers, 0-d tensors and one bad sample of three."""
    shown = float(value)
    bad = torch.tensor([1.0, shown, -5.0])
    message = f"{name} must be positive and finite, got {shown}"
    return [
        ({name: shown}, message),
        ({name: torch.tensor(shown)}, message),
        ({name: torch.tensor(shown, dtype=torch.float64)}, message),
        ({name: bad}, f"{message} for sample 1"),
        ({name: torch.stack([bad, bad], -1)[:, 0].double()}, f"{message} for sample 1"),
    ]


WRONG_VALUE = [
    pytest.param(call, arguments, ValueError, message, id=f"{call}-{message}-{i}")
    for names, argument in ((ALL_STEPS, "step_size"), (ALL_LOSSES, "sigma"))
    for call in names
    for value in (0.0, -0.5, NAN, INF)
    for i, (arguments, message) in enumerate(positive(argument, value))
]
WRONG_VALUE += [
    *refuses(ALL_STEPS, ValueError, "step_size must be positive and finite, got 0", step_size=0),
    *refuses(
        ALL_LOSSES,
        ValueError,
        "reduction must be mean, sum or none, got 'avg'",
        reduction="avg",
    ),
    *refuses(
        ALL_LOSSES, ValueError, "reduction must be mean, sum or none, got None", reduction=None
    ),
    *refuses(
        ["ozaki_step"],
        ValueError,
        "curvature must be clamp, abs or raw, got 'relu'",
        curvature="relu",
    ),
    *refuses(
        ["ozaki_step"],
        ValueError,
        "curvature must be clamp, abs or raw, got ['clamp']",
        curvature=["clamp"],
    ),
    *refuses(
        [*LOW_RANK, *HESSIANS],
        ValueError,
        "sign must hold +1 or -1, got [1.0, 0.5]",
        sign=torch.tensor([1.0, 0.5]),
    ),
    *refuses(
        [*LOW_RANK, *HESSIANS],
        ValueError,
        "sign must hold +1 or -1, got [nan, 1.0]",
        sign=torch.tensor([NAN, 1.0]),
    ),
    *refuses([*STEPS, *DRAWS], ValueError, "first must be in [0, 2**63), got -1", first=-1),
    *refuses(
        [*STEPS, *DRAWS], ValueError, f"first must be in [0, 2**63), got {2**63}", first=2**63
    ),
    *refuses(
        [*STEPS, *DRAWS],
        ValueError,
        f"first must leave room for 3 rows of 4 below 2**64, got {2**62}",
        first=2**62,
    ),
    *refuses([*STEPS, *DRAWS], ValueError, "offset must be in [0, 2**56), got -1", offset=-1),
    *refuses(
        [*STEPS, *DRAWS], ValueError, f"offset must be in [0, 2**56), got {2**56}", offset=2**56
    ),
    *refuses(
        [*STEPS, *DRAWS],
        ValueError,
        "offset must be in [0, 2**56), got -1",
        offset=torch.tensor(-1),
    ),
    *refuses(
        [*STEPS, *DRAWS],
        ValueError,
        f"offset must be in [0, 2**56), got {2**56}",
        offset=torch.tensor(2**56),
    ),
    *refuses([*STEPS, *DRAWS], ValueError, "seed must be in [0, 2**64), got -1", seed=-1),
    *refuses([*STEPS, *DRAWS], ValueError, f"seed must be in [0, 2**64), got {2**64}", seed=2**64),
    *refuses(DRAWS, ValueError, "stream must be in [0, 2**8), got 256", stream=256),
    *refuses(DRAWS, ValueError, "stream must be in [0, 2**8), got -1", stream=-1),
    *refuses(
        ALL_STEPS,
        ValueError,
        "seed must be None where noise is given, got 3",
        seed=3,
        noise=X,
    ),
]

WRONG_GRAD = [
    *refuses(
        ALL_STEPS,
        ValueError,
        "step_size must not require grad, got requires_grad=True",
        step_size=grad(torch.ones(3)),
    ),
    *refuses(
        ALL_LOSSES,
        ValueError,
        "sigma must not require grad, got requires_grad=True",
        sigma=grad(torch.tensor(1.0)),
    ),
    *refuses(
        ALL_LOSSES, ValueError, "noise must not require grad, got requires_grad=True", noise=grad(X)
    ),
    *refuses(
        [*LOW_RANK, *HESSIANS],
        ValueError,
        "sign must not require grad, got requires_grad=True",
        sign=grad(torch.ones(2)),
    ),
    *[
        case
        for argument in ("x", "score", "noise", "out")
        for case in refuses(
            ALL_STEPS,
            ValueError,
            "out must not be combined with inputs that require grad, got one",
            **({"out": torch.empty(3, 4)} | {argument: grad(X)}),
        )
    ],
    *refuses(
        ["ozaki_step"],
        ValueError,
        "out must not be combined with inputs that require grad, got one",
        out=torch.empty(3, 4),
        diag=grad(D),
    ),
    *refuses(
        ["assemble_hessian"],
        ValueError,
        "out must not be combined with inputs that require grad, got one",
        out=torch.empty(3, 4, 4),
        factor=grad(U),
    ),
]

WRONG_MEMORY = [
    *refuses(
        ["assemble_hessian"],
        ValueError,
        "out must not overlap itself, got strides (0, 4, 1)",
        out=torch.zeros(4, 4).expand(3, 4, 4),
    ),
    *[
        refuses(
            ["assemble_hessian"],
            ValueError,
            f"out must not overlap {argument}, got shared memory",
            out=SHARED,
            **{argument: part},
        )[0]
        for argument, part in (("diag", SHARED[:, 0]), ("factor", SHARED))
    ],
    *refuses(
        ALL_STEPS,
        ValueError,
        "out must not overlap itself, got strides (0, 1)",
        out=torch.zeros(1, 4).expand(3, 4),
    ),
    *refuses(
        ALL_STEPS,
        ValueError,
        "out must not overlap itself, got strides (1, 1)",
        out=torch.zeros(6).as_strided((3, 4), (1, 1)),
    ),
    *[
        case
        for pair in (overlapping(), shifted())
        for argument in ("x", "score", "noise", "diag")
        for case in refuses(
            ALL_STEPS if argument != "diag" else ["ozaki_step"],
            ValueError,
            f"out must not overlap {argument} partly, got memory shared with an offset or other"
            " strides",
            **{argument: pair[0], "out": pair[1]},
        )
    ],
]


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_KIND)
def test_wrong_kind_is_named(name, arguments, kind, message):
    check(name, arguments, kind, message)


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_DTYPE)
def test_wrong_dtype_is_named(name, arguments, kind, message):
    check(name, arguments, kind, message)


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_DEVICE)
def test_wrong_device_is_named(name, arguments, kind, message):
    check(name, arguments, kind, message)


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_SHAPE)
def test_wrong_shape_is_named(name, arguments, kind, message):
    check(name, arguments, kind, message)


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_VALUE)
def test_wrong_value_is_named(name, arguments, kind, message):
    check(name, arguments, kind, message)


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_GRAD)
def test_gradient_where_there_is_none_is_named(name, arguments, kind, message):
    check(name, arguments, kind, message)


@pytest.mark.parametrize(("name", "arguments", "kind", "message"), WRONG_MEMORY)
def test_overlapping_memory_is_named(name, arguments, kind, message):
    check(name, arguments, kind, message)


@pytest.mark.parametrize("name", STEPS)
def test_vmap_without_noise_is_refused(name):
    message = (
        f"{name}: noise must be given inside vmap, got noise=None (every lane would draw the same)"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        torch.func.vmap(STEPS[name])(X2, X2)


# ------------------------------------------------------------------------ devices without a kernel


@pytest.mark.parametrize(
    ("device", "module", "cure"),
    [
        ("mps", {}, "no native kernel exists for it: CPU and CUDA have one"),
        (
            "cuda",
            {"build_info": lambda: {"cuda_built": False, "cuda_reason": "no nvcc was found"}},
            (
                "it was built without CUDA kernels (no nvcc was found): reinstall where nvcc works "
                "(HOS_CUDA=ON makes it an error if it does not)"
            ),
        ),
        (
            "cuda",
            {"build_info": lambda: {"cuda_built": True}, "cuda_driver_too_old": lambda: 11040},
            "update the CUDA driver (11040), older than the runtime here",
        ),
    ],
)
def test_a_device_without_kernels_is_told_once_with_the_cure(monkeypatch, device, module, cure):
    monkeypatch.setattr(native, "_C", types.SimpleNamespace(**module))
    monkeypatch.setattr(native, "_warned", set())
    monkeypatch.setattr(torch.version, "hip", None)
    message = f"hos_ext: device {device} takes the plain-torch path; {cure}"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        assert not has_kernels(torch.device(device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_kernels(torch.device(device))


def test_unknown_cpu_level_is_named():
    """The module reads HOS_CPU_LEVEL when it loads; it needs no torch, so it loads alone."""
    path = importlib.util.find_spec("hos_ext._C").origin
    script = (
        "import importlib.util as u;"
        f"spec = u.spec_from_file_location('_C', {path!r});"
        "spec.loader.exec_module(u.module_from_spec(spec))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HOS_CPU_LEVEL": "avx9"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last == "ImportError: HOS_CPU_LEVEL must be baseline, x86_v3 or x86_v4, got avx9"


def test_build_info_says_what_runs():
    info = hos_ext.build_info()
    keys = "version compiler cpu_level openmp threads cuda_built cuda_archs cuda_reason torch"
    assert set(info) == set(keys.split())
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["cpu_level"] in ("baseline", "x86_v3", "x86_v4")
    assert isinstance(info["cuda_built"], bool)


NUMPY = {
    "posterior": lambda x: hos_ext.posterior(
        x, hos_ext.Scores(torch.zeros(2, 3), torch.ones(2, 3)), 0.5
    ),
    "dsm_loss": lambda x: hos_ext.dsm_loss(x, torch.zeros(2, 3), 0.5),
    "langevin_step": lambda x: hos_ext.langevin_step(torch.zeros(2, 3), x, 0.1),
    "score_matching_loss": lambda x: hos_ext.score_matching_loss(hos_ext.MLP((3,), 1), x, 0.5),
    "MLP": lambda x: hos_ext.MLP((3,), 1)(x, 0.5),
    "sample": lambda x: hos_ext.sample(lambda y: -y, x, step_size=0.1, n_steps=1),
    "Gaussian": lambda x: hos_ext.densities.Gaussian(x, torch.eye(3)),
}


@pytest.mark.parametrize("name", NUMPY)
def test_an_array_of_numpy_where_a_tensor_is_meant_names_the_way_out(name):
    way = r" must be a [Tt]ensor, got ndarray \(torch\.from_numpy makes a Tensor of it\)$"
    with pytest.raises(TypeError, match=way):
        NUMPY[name](np.zeros((2, 3), np.float32))
