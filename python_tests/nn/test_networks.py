"""Score networks: scaled outputs, covariance by construction, memory layout, and every error."""

import json
import math
import re
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hos_ext.losses.score_matching import score_matching_loss
from hos_ext.nn.mlp import MLP
from hos_ext.nn.unet import UNet

SIGMAS = (1e-3, 0.05, 1.0, 7.0, 1e2)


def unet(dims=(2, 5, 7), rank=3, **options):
    pytest.importorskip("diffusers", reason="UNet needs hos_ext[images]")
    options = {"channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4} | options
    return UNet(dims, rank, **options)


def mlp(dims=(3, 4), rank=3, **options):
    return MLP(dims, rank, **({"width": 16, "head_width": 8} | options))


def shared(dims=(3, 4), rank=3, **options):
    return mlp(dims, rank, trunk="shared", **options)


def two_unets(dims=(2, 5, 7), rank=3, **options):
    return unet(dims, rank, trunk="separate", head_channels=(8, 16), **options)


def signal(dims=(2, 9), rank=3, **options):
    return unet(dims, rank, spatial=1, **options)


BUILDERS = [mlp, shared, unet, two_unets, signal]
HEADS = [mlp, shared, unet, signal]  # that can be made with given_score=True


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
    assert scores.scaled_score.shape == scores.c.shape == x.shape
    assert scores.scaled_score.dtype == scores.c.dtype == dtype
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
    assert scores.scaled_score.shape == scores.c.shape == (0, 3, 4)
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
    torch.testing.assert_close(scores.scaled_score, sigma * -x / variance, rtol=1e-12, atol=1e-15)
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
    for value in (scores.scaled_score, scores.c, scores.factor):
        assert value.isfinite().all()
        assert value.square().mean().sqrt() < 20
    # the exact score of pure noise is -z / sigma: what is learned must fade as 1 / sigma
    if sigma == 1e2:
        assert (scores.scaled_score + x / sigma).abs().max() < 0.5


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
            for part, all_rows in zip(tree_leaves(row), tree_leaves(whole), strict=True):
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
    model.factor.register_forward_hook(lambda module, args, out: seen.append(out))
    x = inputs(model, 3, 0.3)
    factor = model(x, 0.3).factor
    size = math.prod(dims)
    assert factor.data_ptr() == seen[0].data_ptr()
    assert factor.stride() == (3 * size, 1, size)  # D fastest
    column = factor[1, :, 2].reshape(dims)  # (C, H, W) of column 2
    torch.testing.assert_close(column, seen[0][1, 2 * 2 : 2 * 3], rtol=0, atol=0)


def test_unet_crops_where_it_padded():
    model = randomised(unet((2, 5, 10), 1))
    seen = {}
    model.bodies[0].register_forward_hook(
        lambda m, args, out: seen.update(x=args[0], out=out.sample)
    )
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
    inner = list(model.bodies)
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
    x = inputs(model, 8, 0.1)
    score_matching_loss(model, x, 0.3, seed=0).backward()
    assert model.factor.weight.grad.abs().max() > 0
    with torch.no_grad():  # at U = 0 its gradient 4 R U is zero: nothing would ever move
        model.factor.weight.zero_()
    model.zero_grad()
    score_matching_loss(model, x, 0.3, seed=0).backward()
    assert model.factor.weight.grad.abs().max() == 0


def test_mlp_works_under_torch_func():
    model = randomised(mlp()).double()
    x = inputs(model, 3, 0.5)
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda row: model(row[None], 0.5).scaled_score[0])
    )(x)
    assert jacobian.shape == (3, 3, 4, 3, 4)
    step = 1e-6 * torch.randn_like(x)
    change = (model(x + step, 0.5).scaled_score - model(x - step, 0.5).scaled_score) / 2
    torch.testing.assert_close(
        torch.einsum("bijkl,bkl->bij", jacobian, step), change, rtol=1e-5, atol=1e-11
    )


def test_mlp_defaults_are_the_papers_widths():
    model = MLP((100,), 20)
    widths = [[layer.out_features for layer in body.layers] for body in model.bodies]
    assert widths == [[128] * 3, [32] * 3, [32] * 3]
    assert model.bodies[0].activation is torch.tanh
    assert model.config["activation"] == "tanh"


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
        ({"trunk": "both"}, "MLP: trunk must be one of 'separate', 'shared', got 'both'"),
        (
            {"activation": "relu"},
            (
                "MLP: activation must be one of 'tanh', 'silu', 'gelu', 'softplus', or a function "
                "(twice differentiable: at a kink variance reduction fails), got 'relu'"
            ),
        ),
        ({"sigma_data": 0.0}, "MLP: sigma_data must be finite and > 0, got 0"),
        ({"sigma_data": math.inf}, "MLP: sigma_data must be finite and > 0, got inf"),
        ({"c_min": -1.0}, "MLP: c_min must be finite and >= 0, got -1"),
        ({"c_min": math.nan}, "MLP: c_min must be finite and >= 0, got nan"),
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
        ({"activation": 3}, "MLP: activation must be a name or a function, got 3"),
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
    with pytest.raises(TypeError, match=exactly(f"{name}: x must be a tensor, got list")):
        model([1.0], 0.1)


def test_mlp_leaves_dtypes_to_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp()(torch.zeros(5, 3, 4, dtype=torch.bfloat16), 0.1).scaled_score.shape == (
            5,
            3,
            4,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (3,)}, "UNet: dims must be (C, H, W) or (H, W), got (3,)"),
        (
            {"dims": (1, 3, 4), "spatial": 1},
            "UNet: dims must be (C, T) or (T,) for spatial=1, got (1, 3, 4)",
        ),
        ({"spatial": 3}, "UNet: spatial must be 1 or 2, got 3"),
        ({"trunk": "both"}, "UNet: trunk must be one of 'separate', 'shared', got 'both'"),
        ({"layers_per_block": 0}, "UNet: layers_per_block must be at least 1, got 0"),
        ({"norm_num_groups": 0}, "UNet: norm_num_groups must be at least 1, got 0"),
        (
            {"act_fn": "relu"},
            (
                "UNet: act_fn must be one of 'silu', 'swish', 'mish', 'gelu' (twice "
                "differentiable: at a kink variance reduction fails), got 'relu'"
            ),
        ),
        (
            {"channels": (8, 4), "norm_num_groups": 2},
            "UNet: attention_head_dim must be at most the coarsest channels, 4, got 8",
        ),
        ({"num_class_embeds": 3}, "UNet: num_class_embeds is set by the adapter, got 3"),
        (
            {"head_channels": (8, 8)},
            (
                "UNet: head_channels must be None but with trunk='separate' and a score of its "
                "own, got (8, 8)"
            ),
        ),
        (
            {"head_channels": (7, 8), "trunk": "separate"},
            (
                "UNet: head_channels must be multiples of norm_num_groups = 4, the first even, "
                "got (7, 8)"
            ),
        ),
        (
            {
                "dims": (3, 4),
                "spatial": 1,
                "down_block_types": ("KDownBlock2D",) * 3,
            },
            (
                "UNet: blocks must be of 'DownBlock2D', 'AttnDownBlock2D', 'UpBlock2D', "
                "'AttnUpBlock2D' for spatial=1, got 'KDownBlock2D'"
            ),
        ),
        (
            {"dims": (3, 4), "spatial": 1, "upsample_type": "resnet"},
            "UNet: upsample_type must be 'conv' for spatial=1, got 'resnet'",
        ),
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
            "UNet: channels must be positive sizes, got ()",
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
    message = r"^UNet: diffusers must be installed \(pip install hos_ext\[images\]\), got: "
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


# ------------------------------------------------------------------------------- names and configs


@pytest.mark.parametrize("name", ["tanh", "silu", "gelu", "softplus"])
def test_mlp_activation_has_a_name_or_is_a_function(name):
    function = {"tanh": torch.tanh}.get(name) or getattr(torch.nn.functional, name)
    torch.manual_seed(0)
    named = mlp(activation=name)
    torch.manual_seed(0)
    given = mlp(activation=function)
    assert named.config == given.config
    assert named.config["activation"] == name
    x = inputs(named, 2, 0.3)
    assert torch.equal(named(x, 0.3).factor, given(x, 0.3).factor)
    assert torch.equal(named.bodies[0].activation(x), function(x))
    assert mlp(activation=torch.sin).config["activation"] is None


@pytest.mark.parametrize("build", BUILDERS)
def test_config_is_plain_json_that_makes_the_model_again(build):
    model = build(sigma_data=0.7, constrained=False, c_min=0.02)
    config = model.config
    assert json.loads(json.dumps(config)) == config
    assert config["_class_name"] == type(model).__name__
    arguments = {key: value for key, value in config.items() if key != "_class_name"}
    again = type(model)(**arguments)
    assert again.config == config
    again.load_state_dict(model.state_dict())
    x = inputs(model, 2, 0.3)
    assert torch.equal(again(x, 0.3).scaled_score, model(x, 0.3).scaled_score)
    assert torch.equal(again(x, 0.3).c, model(x, 0.3).c)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        ((5, 7), {}),
        ((1, 1), {}),
        ((3, 32, 32), {}),
        ((28, 28), {"trunk": "separate"}),
        ((4, 3, 6), {"channels": (8, 8, 8, 8)}),
        ((9,), {"spatial": 1}),
        ((3, 1), {"spatial": 1}),
        ((2, 30), {"spatial": 1, "trunk": "separate"}),
        (
            (2, 11),
            {
                "spatial": 1,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            },
        ),
    ],
)
def test_unet_takes_any_size(dims, options):
    model = unet(dims, 2, **options)
    x = inputs(model, 2, 0.3)
    scores = model(x, 0.3)
    assert scores.scaled_score.shape == scores.c.shape == (2, *dims)
    assert scores.factor.shape == (2, math.prod(dims), 2)
    assert all(v.isfinite().all() for v in (scores.scaled_score, scores.c, scores.factor))


def test_unet_image_of_two_sizes_is_an_image_of_one_channel():
    torch.manual_seed(0)
    flat = unet((5, 7), 3)
    torch.manual_seed(0)
    deep = unet((1, 5, 7), 3)
    randomised(flat), randomised(deep)
    x = inputs(flat, 2, 0.3)
    two, three = flat(x, 0.3), deep(x.unsqueeze(1), 0.3)
    assert torch.equal(two.scaled_score, three.scaled_score.squeeze(1))
    assert torch.equal(two.c, three.c.squeeze(1))
    assert torch.equal(two.factor, three.factor)


def test_separate_unets_share_nothing():
    model = randomised(two_unets())
    x = inputs(model, 2, 0.3)
    before = model(x, 0.3)
    with torch.no_grad():
        for parameter in model.bodies[1].parameters():
            parameter.mul_(1.1)
    after = model(x, 0.3)
    assert torch.equal(before.scaled_score, after.scaled_score)
    assert not torch.equal(before.c, after.c)
    assert not torch.equal(before.factor, after.factor)


def test_signal_unet_has_no_weights_that_only_see_padding():
    model = signal()
    kernels = {m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert kernels == {(1, 3), (1, 1)}
    strides = {m.stride for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert strides == {(1, 1), (1, 2)}
    widths = []
    for module in model.bodies[0].down_blocks:
        module.register_forward_hook(lambda m, args, out: widths.append(out[0].shape[2:]))
    model(inputs(model, 2, 0.3), 0.3)
    assert widths == [(1, 6), (1, 3), (1, 3)]  # T = 9, padded to 12
    # The variance of the first weights is that of the 3 x 3 kernels' outputs at H = 1, or more.
    torch.manual_seed(0)
    weight = UNet((64,), 0, spatial=1, channels=(64,)).bodies[0].mid_block.resnets[0].conv1.weight
    bound = (64 * 3) ** -0.5  # torch's uniform bound for 64 * 3 inputs
    assert 0.95 * bound < weight.abs().max() <= bound


def test_signal_unet_is_the_same_wherever_the_signal_lies():
    model = randomised(signal((1, 64), 1, channels=(8, 8), add_attention=False)).double()
    # By a multiple of the coarsest cell. Means over T (group norms) see the ends a little.
    x = torch.zeros(2, 1, 64, dtype=torch.float64)
    bump = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    x[0, 0, 24:27], x[1, 0, 30:33] = bump, bump
    c = model(x, 1.0).c
    torch.testing.assert_close(c[0, 0, 20:30], c[1, 0, 26:36], rtol=1e-4, atol=0.0)


# ----------------------------------------------------------------------------- second-order heads


@pytest.mark.parametrize("build", HEADS)
@pytest.mark.parametrize("rank", [0, 2])
def test_head_takes_the_score_and_uses_every_parameter(build, rank):
    model = build(rank=rank, given_score=True, sigma_data=0.7, c_min=0.01)
    assert not hasattr(model, "score")
    x = inputs(model, 4, 0.3)
    score = torch.randn_like(x)
    scores = model(x, 0.3, score)
    assert scores.scaled_score is score
    k2 = 0.7**2 / (0.7**2 + 0.3**2)
    torch.testing.assert_close(scores.c, torch.full_like(x, k2 + 0.01))
    randomised(model)

    def value(given):
        out = model(x, 0.3, given)
        return out.c.square().sum() + (0 if rank == 0 else out.factor.square().sum())

    first = value(score)
    assert value(score.flip(0)) != first  # the score is seen
    first.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("build", HEADS)
def test_head_and_whole_model_refuse_each_others_call(build):
    head, whole = build(given_score=True), build()
    name = type(head).__name__
    x = inputs(head, 2, 0.3)
    message = f"{name}: scaled_score must be given (the model has given_score=True), got None"
    with pytest.raises(ValueError, match=exactly(message)):
        head(x, 0.3)
    got = f"shape {tuple(x.shape)} torch.float32 on cpu"
    with pytest.raises(ValueError, match=exactly(f"{name}: scaled_score must be None, got {got}")):
        whole(x, 0.3, x)
    shape = tuple(x.shape)
    message = f"{name}: scaled_score must have shape {shape}, got {(1, *shape[1:])}"
    with pytest.raises(ValueError, match=exactly(message)):
        head(x, 0.3, x[:1])
    with pytest.raises(
        TypeError, match=exactly(f"{name}: scaled_score must be a Tensor, got float")
    ):
        head(x, 0.3, 0.5)


# ---------------------------------------------------------------------- memory, and half precision


def saved_bytes(model, x, **options):
    """Bytes that one loss keeps for its backward, and the gradients."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = score_matching_loss(model, x, 0.3, seed=0, **options)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    loss.backward()
    size = sum(n for place, n in kept.items() if place not in parameters)
    return size, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("build", BUILDERS)
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(build):
    options = {"depth": 6, "head_depth": 6, "width": 64, "head_width": 64}
    model = build(rank=1, **(options if build in (mlp, shared) else {"layers_per_block": 2}))
    randomised(model)
    assert model.gradient_checkpointing is False
    x = inputs(model, 16, 0.1)
    whole, gradients = saved_bytes(model, x)
    model.gradient_checkpointing = True
    less, again = saved_bytes(model, x)
    assert less < 0.7 * whole
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    with torch.no_grad():
        model(x, 0.3)
    model.gradient_checkpointing = False
    assert saved_bytes(model, x)[0] == whole
    assert "gradient_checkpointing" not in model.config
    assert not any("checkpoint" in name for name in model.state_dict())


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_model_runs_under_bfloat16_autocast(build, sigma):
    model = build()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    x = inputs(model, 4, sigma)
    exact = model(x, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, sigma)
        loss = score_matching_loss(model, x, sigma, seed=0, variance_reduction=False, centred=True)
    loss.backward()
    assert loss.isfinite()
    assert half.scaled_score.dtype == half.c.dtype == torch.float32
    for value, wanted in zip(tree_leaves(half), tree_leaves(exact), strict=True):
        error = (value.float() - wanted).norm() / wanted.norm()
        assert error < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_columns_of_a_fresh_factor_have_one_size_for_any_dimension():
    """A few tenths: the weights are divided by sqrt(D), or columns would grow with it."""
    torch.manual_seed(0)
    for size in (16, 1024):
        factor = MLP((size,), 8)(torch.randn(64, size), 0.3).factor
        assert 0.1 < factor.norm(dim=1).mean() < 0.6


def test_the_factor_has_a_bias_that_fades_with_the_noise():
    """Where the hidden layers give zeros the factor is k times the weights of the ones."""
    model = MLP((3,), 2, sigma_data=2.0)
    with torch.no_grad():
        for parameter in model.bodies.parameters():
            parameter.zero_()
    for sigma in (0.1, 5.0):
        k = 2.0 / math.hypot(sigma, 2.0)
        wanted = k * model.factor.weight[:, -1].reshape(3, 2)
        got = model(torch.randn(4, 3), sigma).factor
        torch.testing.assert_close(got, wanted.expand(4, 3, 2))
        assert got.abs().min() > 0
