"""Your data set, your loop: a torch DataLoader with ScoreMatchingLoss, and with train().

A Dataset of one's own gives 8x8 digits with their labels, each moved by a pixel at random. First a
plain loop of torch over a DataLoader, where `hos_ext.ScoreMatchingLoss` is the objective and
nothing else is ours. Then `train()` on the same Dataset, stopped half-way and taken up again: it
holds rows out, averages weights, measures a curve, and goes on exactly where it was stopped. Both
models denoise digits that neither has seen. The error says how well; the ratio says whether the
posterior variance is honest (1 is). Run: python examples/dataloader_loop.py
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep

import argparse
import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hos_ext
from hos_ext.app import training

LOW, HIGH = 0.2, 1.0  # noise levels, in the units of the data: here grey values in [-1, 1]


class Digits(Dataset):
    """Pairs (picture, label): float32 in [-1, 1], shape (1, 8, 8), moved at random if wanted."""

    def __init__(self, rows: slice, *, moved: bool) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        self.pictures = torch.from_numpy(found.images[rows]).float().unsqueeze(1) / 8 - 1
        self.labels, self.moved = found.target[rows], moved

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = self.pictures[i]
        if self.moved:
            picture = picture.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (1, 2))
        return picture, int(self.labels[i])


def network() -> nn.Module:
    torch.manual_seed(0)
    return hos_ext.MLP((1, 8, 8), rank=8, activation="silu", width=256, head_width=128)


def own_loop(digits: Dataset, steps: int) -> nn.Module:
    """A loop of torch as it has always been."""
    model = network()
    # Noise levels are drawn from (LOW, HIGH), noise from (seed, step): a loop can be repeated.
    objective = hos_ext.ScoreMatchingLoss((LOW, HIGH), gamma=64.0, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(digits, batch_size=64, shuffle=True, drop_last=True)
    step = 0
    while step < steps:
        for pictures, _labels in loader:
            loss = objective(model, pictures, step=step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            step += 1
            if step == steps:
                break
    return model.eval()


def by_train(digits: Dataset, steps: int) -> nn.Module:
    """The same data in the training engine, stopped half-way and taken up again."""
    given = {"batch_size": 64, "sigma_range": (LOW, HIGH), "device": "cpu", "learning_rate": 2e-3}
    given |= {"objective": training.OBJECTIVE | {"gamma": 64.0}, "decay": "constant"}
    with tempfile.TemporaryDirectory() as out:
        half = training.TrainingOptions(steps=steps // 2, **given)
        training.train(network(), digits, half, out=out)
        full = training.TrainingOptions(steps=steps, **given)
        return training.train(network(), digits, full, out=out, resume=True).model


@torch.no_grad()
def report(name: str, model: nn.Module, clean: Tensor, sigma: float = 0.5) -> None:
    """Error of the denoised pictures, and their errors over what the posterior expects."""
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    found = hos_ext.posterior(noisy, model(noisy, sigma), sigma)
    error = (found.mean - clean).square().mean().item()
    expected = found.std.square().mean().item()
    ratio = error / expected
    print(f"{name:8s} error {error:.4f} (noisy {sigma**2:.2f})  error / variance {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps")
    steps = 200 if parser.parse_args().quick else 1000
    digits = Digits(slice(0, 1500), moved=True)
    clean = Digits(slice(1500, None), moved=False).pictures
    report("own loop", own_loop(digits, steps), clean)
    report("train()", by_train(digits, steps), clean)


if __name__ == "__main__":
    main()
