"""Uncertainty of a latent diffusion model, from its latents to the pixels.

Trains, small and offline, what a latent model of diffusers consists of: an autoencoder of digits
(`AutoencoderKL`) and a network of its latents that is told the class through cross-attention
(`UNet2DConditionModel`). Both are saved and read again in diffusers' own format, as a downloaded
model would be. Then, which is the point:

1. the network becomes a score by `ModelScore`, with `call` for its signature;
2. a `SecondOrderHead` is trained on latents, with the classes beside them;
3. `decode_posterior` takes the posterior of the latents to mean and standard deviation of pixels.

The last lines compare with the errors that are made on new digits: the trace ratio is the squared
error over the variance, and 1 is right. Run: python examples/latents.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from hos_ext import ModelScore, SecondOrderHead, UNet, posterior, score_matching_loss
from hos_ext.schedules import from_alphas_cumprod
from hos_ext.uncertainty import decode_posterior

SIGMAS = (0.2, 0.5, 1.0)  # of the noise in the latents, whose standard deviation is 1
CLASSES = torch.eye(10).unsqueeze(1)  # what cross-attention is told: (10, 1, 10), one token a class
SEED = 0


class Digits(NamedTuple):
    """Pictures (n, 1, 16, 16) in [-1, 1], and what they show."""

    pictures: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits]:
    """To train on, and new ones."""
    found = load_digits()
    pictures = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    pictures = functional.interpolate(pictures, (16, 16), mode="bilinear")
    labels = torch.from_numpy(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    train, test = order[:1500], order[1500:]
    return Digits(pictures[train], labels[train]), Digits(pictures[test], labels[test])


def fit(net: nn.Module, loss: Callable[[int, Tensor], Tensor], steps: int, count: int) -> None:
    """Adam with a falling rate; `loss(step, rows)` of a batch of 64 rows."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(SEED)
    began = time.perf_counter()
    for step in range(steps):
        value = loss(step, torch.randint(count, (64,), generator=generator))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    print(f"{type(net).__name__}: {steps} steps, {seconds:.0f} s, loss {float(value.detach()):.4g}")
    net.eval()


def make_latent_model(folder: Path, data: Digits, steps: int) -> None:
    """What others would have trained: an autoencoder, a network of latents and its scheduler."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )

    def of_pictures(step: int, rows: Tensor) -> Tensor:
        x = data.pictures[rows]
        code = vae.encode(x).latent_dist
        apart = (vae.decode(code.sample()).sample - x).square().mean()
        return apart + 1e-4 * code.kl().mean() / 64

    fit(vae, of_pictures, steps, len(data.pictures))
    with torch.no_grad():
        latents = vae.encode(data.pictures).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    latents = latents * vae.config.scaling_factor

    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=10,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler()

    def of_latents(step: int, rows: Tensor) -> Tensor:
        noise = torch.randn(len(rows), 4, 4, 4)
        t = torch.randint(1000, (len(rows),))
        noisy = scheduler.add_noise(latents[rows], noise, t)
        return (unet(noisy, t, CLASSES[data.labels[rows]]).sample - noise).square().mean()

    fit(unet, of_latents, steps, len(latents))
    for name, part in (("vae", vae), ("unet", unet), ("scheduler", scheduler)):
        part.save_pretrained(folder / name)


def read_latent_model(folder: Path) -> tuple[AutoencoderKL, ModelScore]:
    """The parts of a latent model on the disk; the network as a score of latents."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    table = DDPMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod

    def call(net: nn.Module, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        found: Tensor = net(x, time, encoder_hidden_states=text).sample
        return found

    return vae, ModelScore(unet, from_alphas_cumprod(table), "eps", time="timestep", call=call)


def train_head(score: ModelScore, latents: Tensor, labels: Tensor, steps: int) -> SecondOrderHead:
    """c and the factor of the latents' posterior, at all levels between the ends of `SIGMAS`."""
    torch.manual_seed(SEED)
    network = UNet((4, 4, 4), 4, channels=(32, 64), layers_per_block=1, given_score=True)
    model = SecondOrderHead(score, network)
    low, high = math.log(SIGMAS[0]), math.log(SIGMAS[-1])

    def loss(step: int, rows: Tensor) -> Tensor:
        sigma = (low + (high - low) * torch.rand(len(rows))).exp()
        return score_matching_loss(
            model,
            latents[rows],
            sigma,
            gamma=0.0,  # the score stays as it is
            variance_reduction=False,
            first_order="plain",
            centred=True,
            seed=SEED,
            offset=step,
            model_kwargs={"text": CLASSES[labels[rows]]},
        )

    fit(model, loss, steps, len(latents))
    return model


@torch.no_grad()
def compare(model: SecondOrderHead, vae: AutoencoderKL, test: Digits, few: bool) -> None:
    """Errors on new digits, in latents and in pixels, against what was expected."""

    def encoder(x: Tensor) -> Tensor:
        latents: Tensor = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
        return latents

    def decoder(z: Tensor) -> Tensor:
        pictures: Tensor = vae.decode(z / vae.config.scaling_factor).sample
        return pictures

    latents = encoder(test.pictures)
    for sigma in SIGMAS:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED + 1))
        noisy = latents + sigma * noise
        scores = model(noisy, sigma, text=CLASSES[test.labels])
        law = posterior(noisy, scores, sigma)
        ratio = (law.mean - latents).square().mean() / law.std.square().mean()
        print(f"sigma {sigma:g}: latents, trace ratio {ratio:.3f}")
        settings = {
            "linear": {"n_probes": 4 if few else 16, "n_pairs": 2 if few else 4},
            "samples": {"n_draws": 4 if few else 32},
        }
        for method, options in settings.items():
            began = time.perf_counter()
            found = decode_posterior(
                decoder, law, method=method, seed=SEED, chunk_size=512, **options
            )
            seconds = time.perf_counter() - began
            error = (found.mean - decoder(latents)).square()
            print(
                f"  pixels, {method:8}: std {found.std.mean():.4f} +- {found.std_error.mean():.4f}"
                f"  trace ratio {error.mean() / found.std.square().mean():.3f}"
                f"  {seconds:.1f} s"
            )
            if found.linear_error is not None:
                lacks = found.linear_error.mean() / found.std.mean()
                print(f"  what linearisation lacks: {lacks:+.1%} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps: no result")
    parser.add_argument("--folder", type=Path, help="where the latent model goes, and is found")
    arguments = parser.parse_args()
    steps = 8 if arguments.quick else 240
    train, test = digits()
    few = 16 if arguments.quick else 128
    test = Digits(test.pictures[:few], test.labels[:few])
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if not (folder / "unet").exists():
            make_latent_model(folder, train, steps)
        vae, score = read_latent_model(folder)
    with torch.no_grad():
        latents = vae.encode(train.pictures).latent_dist.mode() * vae.config.scaling_factor
    model = train_head(score, latents, train.labels, steps)
    compare(model, vae, test, arguments.quick)


if __name__ == "__main__":
    main()
