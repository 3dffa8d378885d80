"""Score networks: scaled outputs, covariance by construction, memory layout, and every error."""

import math
import re
import sys

import pytest
import torch

from hos_ext.losses import score_matching_loss
from hos_ext.models import MLP, UNet

SIGMAS = (1e-3, 0.05, 1.0, 7.0, 1e2)


def unet(dims=(2, 5, 7), rank=3, **options):
    pytest.importorskip("diffusers", reason="UNet needs hos_ext[app]")
    options = {"channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4} | options
    return UNet(dims, rank, **options)


def mlp(dims=(3, 4), rank=3, **options):
    return MLP(dims, rank, **({"width": 16, "head_width": 8} | options))


def shared(dims=(3, 4), rank=3, **options):
    return mlp(dims, rank, trunk="shared", **options)


BUILDERS = [mlp, shared, unet]


def randomised(model, scale=1.0):
    """The model with every parameter drawn afresh: no output layer at zero any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def inputs(model, batch, sigma):
    """Noisy samples of data with the standard deviation that the model expects."""
    torch.manual_seed(2)
    dtype = next(model.parameters()).dtype
    return math.hypot(model.sigma_data, sigma) * torch.randn(batch, *model.dims, dtype=dtype)


def exactly(message):
    """A pattern for `pytest.raises` that only the whole message matches."""
    return f"^{re.escape(message)}$"


def matrix(scores):
    """kappa = diag(c) + U U^T, dense."""
    return torch.diag_embed(scores.c.flatten(1)) + scores.factor @ scores.factor.mT


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_returns_the_contract_shapes_and_dtype(build, rank, dtype):
    model = build(rank=rank).to(dtype)
    x = inputs(model, 4, 0.3)
    scores = model(x, 0.3)
    assert scores.score.shape == scores.c.shape == x.shape
    assert scores.score.dtype == scores.c.dtype == dtype
    assert scores.sign is None
    if rank == 0:
        assert scores.factor is None
    else:
        assert scores.factor.shape == (4, x[0].numel(), rank)
        assert scores.factor.dtype == dtype


@pytest.mark.parametrize("build", [mlp, shared])  # the attention of diffusers refuses B = 0
@pytest.mark.parametrize("rank", [0, 3])
def test_mlp_accepts_an_empty_batch(build, rank):
    scores = build(rank=rank)(torch.zeros(0, 3, 4), torch.ones(0))
    assert scores.score.shape == scores.c.shape == (0, 3, 4)
    assert rank == 0 or scores.factor.shape == (0, 12, rank)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("constrained", [True, False])
def test_model_starts_at_the_scores_of_gaussian_data(build, sigma, constrained):
    sd, c_min = 0.7, 0.01
    model = build(sigma_data=sd, c_min=c_min, constrained=constrained).double()
    x = inputs(model, 3, sigma)
    scores = model(x, sigma)
    variance = sd**2 + sigma**2  # of x; s1 = -x / variance, s2 = -I / variance
    torch.testing.assert_close(scores.score, sigma * -x / variance, rtol=1e-12, atol=1e-15)
    c = 1 - sigma**2 / variance + (c_min if constrained else 0)
    torch.testing.assert_close(scores.c, torch.full_like(x, c), rtol=1e-9, atol=1e-12)
    low_rank = scores.factor.norm(dim=1) / (sd / variance**0.5)
    assert low_rank.min() > 0.02
    assert low_rank.max() < 2.0


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_model_outputs_stay_of_order_one_at_every_noise_level(build, sigma):
    model = randomised(build())
    x = inputs(model, 16, sigma)
    scores = model(x, sigma)
    for value in scores[:3]:
        assert value.isfinite().all()
        assert value.square().mean().sqrt() < 20
    # the exact score of pure noise is -z / sigma: what is learned must fade as 1 / sigma
    if sigma == 1e2:
        assert (scores.score + x / sigma).abs().max() < 0.5


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_constrained_head_is_positive_definite_for_any_parameters(build, sigma):
    model = randomised(build(c_min=0.02), scale=30.0).double()
    scores = model(inputs(model, 8, sigma), sigma)
    assert scores.c.min() >= 0.02
    # eigvalsh errs by rounding times the largest eigenvalue, far above c_min here: scale it out
    scale = scores.c.flatten(1).rsqrt()
    white = scale.unsqueeze(-1) * matrix(scores) * scale.unsqueeze(-2)
    assert torch.linalg.eigvalsh(white).min() > 1 - 1e-9 * white.abs().max()


@pytest.mark.parametrize("build", BUILDERS)
def test_free_head_can_leave_the_positive_cone(build):
    model = randomised(build(constrained=False), scale=3.0).double()
    assert model(inputs(model, 8, 0.3), 0.3).c.min() < 0


@pytest.mark.parametrize("build", BUILDERS)
def test_model_gives_each_row_its_value_in_any_batch(build):
    model = randomised(build()).double()
    x = inputs(model, 5, 1.0)
    sigma = torch.tensor([0.01, 0.1, 0.5, 2.0, 30.0], dtype=torch.float64)
    whole = model(x, sigma)
    for b in range(5):
        for one in (sigma[b].item(), sigma[b], sigma[b : b + 1]):
            row = model(x[b : b + 1], one)
            for part, all_rows in zip(row[:3], whole[:3], strict=True):
                torch.testing.assert_close(part[0], all_rows[b], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", BUILDERS)
def test_model_tells_noise_levels_apart(build):
    model = randomised(build()).double()
    x = torch.zeros(len(SIGMAS), *model.dims, dtype=torch.float64)  # the same input at each level
    factor = model(x, torch.tensor(SIGMAS)).factor.flatten(1)
    direction = factor / factor.norm(dim=1, keepdim=True)
    gram = direction @ direction.mT - torch.eye(len(SIGMAS))
    assert gram.max() < 1 - 1e-5  # 1 if sigma were ignored


def test_mlp_factor_is_the_last_layers_output_without_a_copy():
    model = mlp(rank=4)
    seen = []
    model.factor.register_forward_hook(lambda module, args, out: seen.append(out))
    factor = model(inputs(model, 3, 0.3), 0.3).factor
    assert factor.data_ptr() == seen[0].data_ptr()
    assert factor.stride() == (48, 4, 1)  # r fastest


@pytest.mark.parametrize("dims", [(2, 8, 12), (2, 5, 7)])  # divisible by 4, and not
def test_unet_factor_is_a_view_of_the_channels_in_row_major_order(dims):
    model = randomised(unet(dims, 3))
    seen = []
    model.linear.register_forward_hook(lambda module, args, out: seen.append(out))
    x = inputs(model, 3, 0.3)
    factor = model(x, 0.3).factor
    size = math.prod(dims)
    assert factor.data_ptr() == seen[0].data_ptr() + size * 4  # after the score's channels
    assert factor.stride() == (4 * size, 1, size)  # D fastest
    column = factor[1, :, 2].reshape(dims)  # (C, H, W) of column 2
    torch.testing.assert_close(column, seen[0][1, 2 * 3 : 2 * 4], rtol=0, atol=0)


def test_unet_crops_where_it_padded():
    model = randomised(unet((2, 5, 10), 1))
    seen = {}
    model.unet.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out.sample))
    model.c.register_forward_hook(lambda m, args, out: seen.update(features=args[0]))
    x = inputs(model, 2, 0.3)
    model(x, 0.3)
    assert seen["x"].shape == (2, 2, 8, 12)  # multiples of 4: rows 1 + 5 + 2, columns 1 + 10 + 1
    torch.testing.assert_close(seen["x"][:, :, 1:6, 1:11], x / math.hypot(1.0, 0.3))
    assert seen["x"].count_nonzero() == x.numel()
    assert torch.equal(seen["features"], seen["out"][:, :, 1:6, 1:11])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_networks_see_inputs_of_order_one(build, sigma):
    model = build(sigma_data=0.2)
    seen = []
    inner = [model.unet] if build is unet else model.bodies
    for module in inner:
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(inputs(model, 50, sigma), sigma)
    assert len(seen) == len(inner)
    for value in seen:
        kept = value[value != 0]  # zeros are padding
        assert 0.9 < kept.square().mean().sqrt() < 1.1


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("constrained", [True, False])
def test_every_parameter_learns(build, constrained):
    model = randomised(build(constrained=constrained))
    loss = score_matching_loss(model, inputs(model, 8, 0.1), 0.3, seed=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("build", BUILDERS)
def test_factor_starts_off_its_saddle_point(build):
    model = build()
    layer = model.linear.weight if build is unet else model.factor.weight
    x = inputs(model, 8, 0.1)
    score_matching_loss(model, x, 0.3, seed=0).backward()
    rows = layer.grad[model.dims[0] :] if build is unet else layer.grad
    assert rows.abs().max() > 0
    with torch.no_grad():  # at U = 0 its gradient 4 R U is zero: nothing would ever move
        layer.zero_()
    model.zero_grad()
    score_matching_loss(model, x, 0.3, seed=0).backward()
    rows = layer.grad[model.dims[0] :] if build is unet else layer.grad
    assert rows.abs().max() == 0


def test_mlp_works_under_torch_func():
    model = randomised(mlp()).double()
    x = inputs(model, 3, 0.5)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row[None], 0.5).score[0]))(x)
    assert jacobian.shape == (3, 3, 4, 3, 4)
    step = 1e-6 * torch.randn_like(x)
    change = (model(x + step, 0.5).score - model(x - step, 0.5).score) / 2
    torch.testing.assert_close(
        torch.einsum("bijkl,bkl->bij", jacobian, step), change, rtol=1e-5, atol=1e-11
    )


def test_mlp_defaults_are_the_papers_widths():
    model = MLP((100,), 20)
    widths = [[layer.out_features for layer in body.layers] for body in model.bodies]
    assert widths == [[128] * 3, [32] * 3, [32] * 3]
    assert model.bodies[0].activation is torch.tanh


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": ()}, "MLP: dims must be positive sizes, got ()"),
        ({"dims": (3, 0)}, "MLP: dims must be positive sizes, got (3, 0)"),
        ({"rank": -1}, "MLP: rank must be at least 0, got -1"),
        ({"width": 0}, "MLP: width must be at least 1, got 0"),
        ({"depth": 0}, "MLP: depth must be at least 1, got 0"),
        ({"head_width": 0}, "MLP: head_width must be at least 1, got 0"),
        ({"head_depth": 0}, "MLP: head_depth must be at least 1, got 0"),
        ({"trunk": "both"}, "MLP: trunk must be 'separate' or 'shared', got 'both'"),
        ({"sigma_data": 0.0}, "MLP: sigma_data must be positive and finite, got 0.0"),
        ({"sigma_data": math.inf}, "MLP: sigma_data must be positive and finite, got inf"),
        ({"c_min": -1.0}, "MLP: c_min must be at least 0 and finite, got -1.0"),
        ({"c_min": math.nan}, "MLP: c_min must be at least 0 and finite, got nan"),
    ],
)
def test_mlp_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=exactly(message)):
        MLP(**({"dims": (3,), "rank": 1} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 2}, "MLP: dims must be a sequence of sizes, got 2"),
        ({"dims": (2.5,)}, "MLP: dims must be an int, got 2.5"),
        ({"rank": 1.5}, "MLP: rank must be an int, got 1.5"),
        ({"width": 3.5}, "MLP: width must be an int, got 3.5"),
        ({"head_depth": True}, "MLP: head_depth must be an int, got True"),
    ],
)
def test_mlp_refuses_options_of_another_kind(options, message):
    with pytest.raises(TypeError, match=exactly(message)):
        MLP(**({"dims": (3,), "rank": 1} | options))


@pytest.mark.parametrize("build", [mlp, unet])
def test_model_refuses_another_dtype_than_its_parameters(build):
    model = build()
    name = type(model).__name__
    x = torch.zeros(5, *model.dims, dtype=torch.float64)
    message = f"{name}: x must be torch.float32 like the parameters, got torch.float64"
    with pytest.raises(ValueError, match=exactly(message)):
        model(x, 0.1)
    with pytest.raises(TypeError, match=exactly(f"{name}: x must be a tensor, got [1.0]")):
        model([1.0], 0.1)


def test_mlp_leaves_dtypes_to_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp()(torch.zeros(5, 3, 4, dtype=torch.bfloat16), 0.1).score.shape == (5, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (3, 4)}, "UNet: dims must be (C, H, W), got (3, 4)"),
        ({"rank": -1}, "UNet: rank must be at least 0, got -1"),
        (
            {"channels": (8, 10)},
            "UNet: channels must be multiples of norm_num_groups = 4, the first even, got (8, 10)",
        ),
        (
            {"channels": (3,), "norm_num_groups": 3},
            "UNet: channels must be multiples of norm_num_groups = 3, the first even, got (3,)",
        ),
        (
            {"channels": ()},
            "UNet: channels must be multiples of norm_num_groups = 4, the first even, got ()",
        ),
        (
            {"dropout": 0.1},
            (
                "UNet: dropout must be 0 (its masks differ between the points of a "
                "variance-reduced loss), got 0.1"
            ),
        ),
        (
            {"time_embedding_type": "fourier"},
            "UNet: time_embedding_type is set by the adapter, got 'fourier'",
        ),
        ({"in_channels": 3}, "UNet: in_channels is set by the adapter, got 3"),
    ],
)
def test_unet_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=exactly(message)):
        unet(**options)


def test_unet_names_the_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = r"^UNet: diffusers must be installed \(pip install hos_ext\[app\]\), got: "
    with pytest.raises(RuntimeError, match=message):
        UNet((1, 8, 8), 2)


@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        ((5, 4, 3), 0.1, "MLP: x must have shape (B, 3, 4), got (5, 4, 3)"),
        ((3, 4), 0.1, "MLP: x must have shape (B, 3, 4), got (3, 4)"),
        ((), 0.1, "MLP: x must have shape (B, 3, 4), got ()"),
        ((5, 3, 4), 0.0, "MLP: sigma must be positive and finite, got 0.0"),
        ((5, 3, 4), -1, "MLP: sigma must be positive and finite, got -1"),
        ((5, 3, 4), math.nan, "MLP: sigma must be positive and finite, got nan"),
        (
            (5, 3, 4),
            torch.ones(4),
            "MLP: sigma must be a float or have shape (5,), got shape (4,)",
        ),
        (
            (5, 3, 4),
            torch.ones(5, device="meta"),
            "MLP: sigma must be on cpu like x, got meta",
        ),
    ],
)
def test_model_refuses_bad_input(x, sigma, message):
    with pytest.raises(ValueError, match=exactly(message)):
        mlp()(torch.zeros(x), sigma)
