"""The posterior behind a decoder, against closed forms of linear and quadratic decoders."""

import pytest
import torch
from torch import nn

from hos_ext import DPLR, EDM, MLP, Posterior, SecondOrderHead, UNet, posterior, score_matching_loss
from hos_ext.nn import ModelScore
from hos_ext.schedules import from_alphas_cumprod
from hos_ext.uncertainty import decode_posterior

# torch's own use of torch.jit, at the first forward derivative of a process.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

F64 = torch.float64
FIELDS = ("mean", "std", "std_error", "linear_error")
ROWS, DIMS, PIXELS, RANK = 3, (2, 3), (4, 2), 2


def rand(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def latent(size=1.0, sign=None):
    diag = size**2 * (0.2 + rand(ROWS, 6, seed=1).square())
    return Posterior(
        rand(ROWS, *DIMS, seed=2), DPLR(diag, size * rand(ROWS, 6, RANK, seed=3), sign)
    )


MATRIX, BEND = rand(8, 6, seed=4), rand(8, 6, 6, seed=5)
BEND = BEND + BEND.mT


def linear(z):
    return (1 + z.flatten(1) @ MATRIX.T).unflatten(1, PIXELS)


def quadratic(z):
    z = z.flatten(1)
    return (z @ MATRIX.T + torch.einsum("pij,bi,bj->bp", BEND, z, z) / 2).unflatten(1, PIXELS)


def law_of_quadratic(given):
    """Mean, variance and the variance of the tangent, by the moments of a Gaussian."""
    m, c = given.mean.flatten(1), given.covariance.dense()
    slope = MATRIX + torch.einsum("pij,bj->bpi", BEND, m)
    tangent = torch.einsum("bpi,bij,bpj->bp", slope, c, slope)
    bent = torch.einsum("pij,bjk->bpik", BEND, c)
    mean = quadratic(given.mean).flatten(1) + bent.diagonal(dim1=-2, dim2=-1).sum(-1) / 2
    both = tangent + (bent @ bent).diagonal(dim1=-2, dim2=-1).sum(-1) / 2
    return [each.unflatten(1, PIXELS) for each in (mean, both, tangent)]


@pytest.mark.parametrize("sign", [None, torch.tensor([1.0, -1.0], dtype=F64)])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
def test_a_linear_decoder_is_exact(sign, chunk_size):
    given = latent(sign=sign)
    given = given.replace(covariance=given.covariance + (0.0 if sign is None else 20.0))
    found = decode_posterior(linear, given, n_probes=None, n_pairs=3, seed=0, chunk_size=chunk_size)
    want = torch.einsum("pi,bij,pj->bp", MATRIX, given.covariance.dense(), MATRIX).sqrt()
    torch.testing.assert_close(found.mean, linear(given.mean))
    torch.testing.assert_close(found.std, want.unflatten(1, PIXELS), rtol=1e-12, atol=0)
    assert not found.std_error.any()
    torch.testing.assert_close(found.linear_error, torch.zeros_like(found.std), rtol=0, atol=1e-12)


def test_probes_have_the_error_that_is_stated():
    given, want = latent(), None
    want = decode_posterior(linear, given, n_probes=None, n_pairs=0).std
    scores = []
    for seed in range(30):
        found = decode_posterior(linear, given, n_probes=64, n_pairs=0, seed=seed, chunk_size=200)
        assert found.linear_error is None
        scores.append((found.std - want) / found.std_error)
    rms = torch.stack(scores).square().mean().sqrt()
    assert 0.85 < rms < 1.2


def test_factor_alone_needs_no_probe():
    given = latent()
    given = Posterior(given.mean, DPLR(torch.zeros(ROWS, 6, dtype=F64), given.covariance.factor))
    found = decode_posterior(linear, given, n_probes=2, n_pairs=0, seed=0)
    want = decode_posterior(linear, given, n_probes=None, n_pairs=0, seed=0)
    torch.testing.assert_close(found.std, want.std)
    assert not found.std_error.any()


def test_what_linearisation_lacks_is_what_a_quadratic_decoder_has():
    given = latent(0.3)
    _, both, tangent = law_of_quadratic(given)
    found = decode_posterior(quadratic, given, n_probes=None, n_pairs=8000, seed=0, chunk_size=3000)
    torch.testing.assert_close(found.std, tangent.sqrt(), rtol=1e-10, atol=0)
    gap = both.sqrt() - tangent.sqrt()
    assert gap.max() > 0.2 * tangent.sqrt().min()  # it matters here
    torch.testing.assert_close(found.linear_error, gap, rtol=0.1, atol=0.03)
    few = decode_posterior(quadratic, given, n_probes=None, n_pairs=100, seed=1)
    assert (few.linear_error - gap).abs().mean() < 0.3 * gap.mean()


def test_what_linearisation_lacks_of_a_cube():
    """The odd part beyond the tangent: Var z^3 = 9 m^4 s^2 + 36 m^2 s^4 + 15 s^6."""
    m, s = torch.full((2, 6), 0.5, dtype=F64), 0.4
    given = Posterior(m, DPLR(torch.full_like(m, s**2)))
    found = decode_posterior(
        lambda z: z**3, given, n_probes=2, n_pairs=8000, seed=0, chunk_size=3000
    )
    torch.testing.assert_close(found.std, torch.full_like(m, 3 * 0.25 * s))
    want = (9 * 0.5**4 * s**2 + 36 * 0.5**2 * s**4 + 15 * s**6) ** 0.5 - 3 * 0.25 * s
    assert float(found.linear_error.mean()) == pytest.approx(want, rel=0.05)


def test_the_error_of_samples_far_from_the_decoded_mean():
    """z^2 at m = 0 with s = 1: variance 2, fourth central moment 60, mean 1 and not 0."""
    given = Posterior(torch.zeros(2, 300, dtype=F64), DPLR(torch.ones(2, 300, dtype=F64)))
    options = {"method": "samples", "n_draws": 4000, "seed": 0, "chunk_size": 2000}
    found = decode_posterior(lambda z: z**2, given, **options)
    want = (56 / 4000) ** 0.5 / (2 * 2**0.5)
    assert float(found.std_error.square().mean().sqrt()) == pytest.approx(want, rel=0.03)
    assert float(found.mean.mean()) == pytest.approx(1, abs=0.01)


def test_samples_have_the_moments_of_a_quadratic_decoder_and_their_error():
    given = latent(0.4)
    mean, both, _ = law_of_quadratic(given)
    scores, far = [], []
    for seed in range(12):
        found = decode_posterior(
            quadratic, given, method="samples", n_draws=2000, seed=seed, chunk_size=3000
        )
        assert found.linear_error is None
        scores.append((found.std - both.sqrt()) / found.std_error)
        far.append((found.mean - mean) / (found.std / 2000**0.5))
    for each in (scores, far):
        assert 0.85 < torch.stack(each).square().mean().sqrt() < 1.2


@pytest.mark.parametrize("method", ["linear", "samples"])
def test_a_part_of_the_batch_and_any_chunks_give_the_same(method):
    given = latent()
    calls = []

    def decoder(z):
        calls.append(len(z))
        return quadratic(z)

    options = {"method": method, "n_probes": 5, "n_pairs": 3, "n_draws": 7, "seed": 4}
    whole = decode_posterior(decoder, given, chunk_size=3, **options)
    assert max(calls) == 3
    for chunk_size in (1, 2, 50):
        calls.clear()
        other = decode_posterior(decoder, given, chunk_size=chunk_size, **options)
        assert max(calls) <= chunk_size
        for name in FIELDS:
            torch.testing.assert_close(getattr(whole, name), getattr(other, name))
    part = Posterior(given.mean[1:], given.covariance.rows(slice(1, None)))
    part = decode_posterior(decoder, part, first=1, **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(whole[1:], name), getattr(part, name))


@pytest.mark.parametrize("method", ["linear", "samples"])
def test_conditions_reach_the_decoder_row_by_row(method):
    given = latent()
    gain = torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def decoder(z, gain, times):
        return gain[:, None, None] * times * linear(z)

    for chunk_size in (2, 50):
        options = {"method": method, "seed": 0, "n_draws": 5, "chunk_size": chunk_size}
        plain = decode_posterior(linear, given, **options)
        found = decode_posterior(
            decoder, given, model_kwargs={"gain": gain, "times": 2.0}, **options
        )
        torch.testing.assert_close(found.std, 2 * gain[:, None, None] * plain.std)


class Unsmooth(torch.autograd.Function):
    """Has no forward derivative."""

    @staticmethod
    def forward(ctx, z):
        return z * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_what_does_not_fit_is_refused_and_named():
    given, where = latent(), "decode_posterior: "
    bad = Posterior(given.mean, DPLR(given.covariance.diag - 5.0))
    for change, error, message in [
        ({"decoder": 3}, TypeError, "decoder must be callable"),
        ({"posterior": bad}, ValueError, "the diagonal part of posterior.covariance must be at"),
        ({"method": "exact"}, ValueError, "method must be one of"),
        ({"n_probes": 1}, ValueError, "n_probes must be at least 2"),
        ({"n_pairs": 1}, ValueError, "n_pairs must be 0 or at least 2"),
        ({"n_draws": 1}, ValueError, "n_draws must be at least 2"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be"),
        (
            {"decoder": lambda z: z[:1]},
            ValueError,
            "decoder must return 3 rows",
        ),
        ({"decoder": lambda z: {"sample": z}}, TypeError, "decoder must return a Tensor"),
        ({"decoder": lambda z: z.float()}, ValueError, "decoder"),
        ({"model_kwargs": {"label": torch.zeros(2)}}, ValueError, "must have 3 rows like"),
        ({"decoder": Unsmooth.apply}, RuntimeError, "method='samples' does without"),
    ]:
        arguments = {"decoder": linear, "posterior": given, **change}
        with pytest.raises(error) as raised:
            decode_posterior(**arguments)
        assert str(raised.value).startswith(where)
        assert message in str(raised.value)
    found = decode_posterior(Unsmooth.apply, given, method="samples", seed=0)
    assert found.std.shape == given.mean.shape


# ------------------------------------------------------------------------------- diffusers' models


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A tiny random latent model, saved and read in diffusers' own format."""
    diffusers = pytest.importorskip("diffusers", reason="latent models need hos_ext[images]")
    folder = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).save_pretrained(folder / "vae")
    diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    return vae, unet, from_alphas_cumprod(scheduler.alphas_cumprod)


def test_a_head_on_latents_of_a_text_conditioned_model_gives_pixels(stable):
    vae, unet, schedule = stable

    def call(net, x, time, text):
        return net(x, time, encoder_hidden_states=text).sample

    score = ModelScore(unet, schedule, "eps", time="timestep", call=call)
    network = UNet((4, 8, 8), 1, channels=(16, 16), given_score=True, add_attention=False)
    model = SecondOrderHead(score, network)
    pictures, text = torch.randn(4, 3, 16, 16), torch.randn(4, 5, 6)
    latents = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        loss = score_matching_loss(
            model, latents, 0.5, centred=True, seed=0, offset=step, model_kwargs={"text": text}
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < sum(losses[:3])

    noisy = latents[:2] + 0.5 * torch.randn_like(latents[:2])
    with torch.no_grad():
        wide = posterior(noisy, model(noisy, 0.5, text=text[:2]), 0.5)
    found = wide.recalibrated(1e-3)  # so narrow that a random decoder is nearly straight

    def decoder(z):
        return vae.decode(z / vae.config.scaling_factor).sample

    exact = decode_posterior(decoder, found, n_probes=None, n_pairs=16, seed=0, chunk_size=64)
    drawn = decode_posterior(decoder, found, method="samples", n_draws=400, seed=1, chunk_size=50)
    assert exact.std.shape == (2, 3, 16, 16)
    for std in (exact.std, exact.std + exact.linear_error):
        assert ((std - drawn.std) / drawn.std).abs().mean() < 0.1
    bent = decode_posterior(decoder, wide, n_probes=64, n_pairs=16, seed=0, chunk_size=64)
    assert bent.linear_error.abs().mean() > 0.2 * bent.std.mean()  # here samples are the way
    probed = decode_posterior(decoder, found, n_probes=64, n_pairs=0, seed=0)
    z = (probed.std - exact.std) / probed.std_error
    assert 0.7 < z.square().mean().sqrt() < 1.4


def test_the_scaling_of_the_latents_is_the_decoders(stable):
    vae = stable[0]
    given = Posterior(torch.randn(1, 4, 8, 8), DPLR(torch.full((1, 256), 0.01)))
    plain = Posterior(given.mean / 0.5, given.covariance.scale(4.0))
    one, two = (
        decode_posterior(lambda z, k=k: vae.decode(z / k).sample, law, n_pairs=0, seed=0).std
        for law, k in ((given, vae.config.scaling_factor), (plain, 1.0))
    )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_an_mlp_decoder_of_a_learned_posterior():
    """Any module will do, in float32."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 7))
    x = torch.randn(5, 4)
    with torch.no_grad():
        found = posterior(x, MLP((4,), 2)(x, 0.1), 0.1)
    one = decode_posterior(decoder, found, n_probes=None, seed=0)
    two = decode_posterior(decoder, found, method="samples", n_draws=4000, seed=0, chunk_size=500)
    torch.testing.assert_close(one.std, two.std, rtol=0.1, atol=0)


def test_latents_of_the_usual_size():
    torch.manual_seed(0)
    score = ModelScore(lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2), EDM(), "x0")
    network = UNet((4, 64, 64), 2, channels=(16, 16), given_score=True, add_attention=False)
    model = SecondOrderHead(score, network)
    z = torch.randn(1, 4, 64, 64)
    score_matching_loss(model, z, 0.5, centred=True, seed=0).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    with torch.no_grad():
        found = posterior(z, model(z, 0.5), 0.5)
    decoder = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=2.0))
    one = decode_posterior(decoder, found, n_probes=400, n_pairs=2, seed=0, chunk_size=100)
    two = decode_posterior(decoder, found, method="samples", n_draws=400, seed=0, chunk_size=100)
    assert one.std.shape == (1, 3, 128, 128)
    assert abs(float((one.std / two.std).mean()) - 1) < 0.01
    assert one.linear_error.abs().max() < 1e-3
