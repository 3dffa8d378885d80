"""Pictures of any size: tiles that are blended, and the files that `denoise` writes of them."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hos_ext import Scores
from hos_ext.app import cli, data, evaluation, results
from hos_ext.app.evaluation.tiles import _ramp, tile_starts
from hos_ext.app.results.files import png
from hos_ext.tweedie.posterior import posterior


class Local:
    """A model that looks two pixels far: scaled scores and variances by convolutions."""

    def __init__(self, reach: int = 2) -> None:
        size = 2 * reach + 1
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(2, 1, size, size, generator=generator).double() / size
        self.reach, self.largest, self.rows = reach, 0, 0

    def __call__(self, x: Tensor, sigma: Any) -> Scores:
        self.largest, self.rows = max(self.largest, x.numel()), self.rows + len(x)
        both = functional.conv2d(x, self.kernel.to(x), padding=self.reach)
        score, c = both[:, :1], 0.1 + both[:, 1:].sigmoid()
        return Scores(score, c, 0.1 * (score + c).flatten(1).unsqueeze(2))


def whole(model: Any, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    found = posterior(x[None], model(x[None], sigma), sigma)
    return found.mean[0], found.std[0]


def test_tiles_cover_an_axis_and_their_weights_are_above_zero_everywhere() -> None:
    for length, tile in itertools.product(range(1, 28), range(1, 11)):
        for overlap in range(min(tile, length + 1)):
            if tile > length:
                continue
            starts = tile_starts(length, tile, overlap)
            assert (starts[0], starts[-1] + tile) == (0, length)
            assert all(0 < b - a <= tile - overlap for a, b in itertools.pairwise(starts))
            total = torch.zeros(length, dtype=torch.float64)
            for start in starts:
                weight = _ramp(start, tile, length, overlap)
                assert 0 <= weight.min() <= weight.max() <= 1
                total[start : start + tile] += weight
            assert total.min() > 0


@pytest.mark.parametrize("size", [(16, 16), (50, 37), (16, 90), (23, 17)])
def test_a_large_picture_is_what_the_whole_at_once_would_be(size: tuple[int, int]) -> None:
    """Where a tile's edge has no say, and weights sum to 1: no seams, to rounding."""
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(1)).double()
    model = Local()
    mean, std = whole(model, x, 0.5)
    found = evaluation.denoise_tiled(model, x, 0.5, (16, 16), overlap=8)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.std, std, rtol=0, atol=1e-12)
    assert found.tiles == math.prod(len(tile_starts(n, 16, 8)) for n in size)
    twice = evaluation.denoise_tiled(model, x, 0.5, (16, 16), overlap=8, recalibration=4.0)
    torch.testing.assert_close(twice.std, 2 * std, rtol=0, atol=1e-12)


def test_without_overlap_only_the_edges_of_tiles_differ() -> None:
    x, model = torch.randn(1, 48, 32).double(), Local()
    rough = evaluation.denoise_tiled(model, x, 0.5, (16, 16), overlap=0)
    apart = (rough.mean - whole(model, x, 0.5)[0]).abs().reshape(3, 16, 2, 16)
    assert apart[:, 2:-2, :, 2:-2].max() < 1e-12 < apart.max()


def test_memory_is_that_of_a_few_tiles() -> None:
    x, model = torch.randn(1, 2000, 900), Local()
    found = evaluation.denoise_tiled(model, x, 0.5, (32, 32))
    assert model.rows == found.tiles > 2000
    assert model.largest <= 2**19
    assert found.mean.isfinite().all()


def test_a_smaller_picture_is_mirrored_and_said() -> None:
    x, model = torch.randn(1, 5, 40), Local()
    with pytest.warns(UserWarning, match="a picture of 5x40 is mirrored up to 16x16"):
        found = evaluation.denoise_tiled(model, x, 0.5, (16, 16))
    assert found.mean.shape == x.shape
    assert torch.equal(found.x, x)


def test_tiles_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^denoise_tiled: x must have shape \(C, height, width\)"):
        evaluation.denoise_tiled(Local(), torch.zeros(4, 4), 0.5, (4, 4))
    with pytest.raises(ValueError, match=r"^denoise_tiled: overlap must be less than the tile, 4"):
        evaluation.denoise_tiled(Local(), torch.zeros(1, 4, 4), 0.5, (4, 4), overlap=4)


# ----------------------------------------------------------------------------------- the .png files


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [17, 256, 65536])
def test_a_png_keeps_every_level(levels: int, channels: int) -> None:
    values = torch.randint(levels, (channels, 5, 7), generator=torch.Generator().manual_seed(0))
    content = png(values, levels, low=0, high=levels - 1)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        got = np.asarray(image)
    if levels == 65536 and channels == 3:  # pillow keeps the upper half
        assert content[24] == 16
        np.testing.assert_array_equal(got, values.permute(1, 2, 0).numpy() >> 8)
    else:
        expected = values[0] if channels == 1 else values.permute(1, 2, 0)
        np.testing.assert_array_equal(got, expected.numpy())
    over = torch.tensor([[-3.0, 1.4, 1e9]])
    with Image.open(io.BytesIO(png(over, 256, low=0, high=255))) as image:
        assert np.asarray(image).tolist() == [[0, 1, 255]]


# ------------------------------------------------------------------------- through the command line


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a U-Net on cuts of photographs, and the folder of these."""
    from skimage import data as pictures

    place = tmp_path_factory.mktemp("photos")
    for name in ("camera", "coins", "moon", "page"):
        Image.fromarray(getattr(pictures, name)()).convert("L").save(place / f"{name}.png")
    for i in range(8):
        Image.open(place / "camera.png").crop((8 * i, 0, 8 * i + 90, 70)).save(place / f"{i}.png")
    run = tmp_path_factory.mktemp("run")
    arguments = ["--data", f"folder:{place}", "--size", "16", "--crop", "random", "--steps", "4"]
    arguments += [
        "--model",
        "unet-small",
        "--channels",
        "16,16",
        "--batch-size",
        "8",
        "--rank",
        "2",
    ]
    arguments += ["--tracker", "none", "--device", "cpu", "--validation", "2", "--test", "2"]
    assert cli.run(["train", *arguments, "--out", str(run)]) == 0
    return run, place


def test_denoise_takes_pictures_of_any_size(
    photos: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = photos
    rng = np.random.default_rng(0)
    clean = np.asarray(Image.open(place / "coins.png"))[:70, :51].astype(float)
    noisy = (clean + 25 * rng.standard_normal(clean.shape)).clip(0, 255).astype(np.uint8)
    alpha = np.stack([noisy, np.full_like(noisy, 255)], 2)
    Image.fromarray(alpha).save(tmp_path / "a.png")
    Image.fromarray(noisy[:40]).save(tmp_path / "b c.bmp")
    np.save(tmp_path / "d.npy", noisy[None].astype(np.float32))
    files = [str(tmp_path / name) for name in ("a.png", "b c.bmp", "d.npy")]
    out = tmp_path / "out"
    command = ["denoise", str(run), *files, "--raw-sigma", "25", "--out", str(out)]
    command += ["--device", "cpu", "--units", "raw"]
    assert cli.run(command) == 2
    assert "--alpha drop, white or black" in capsys.readouterr().err
    assert cli.run([*command, "--alpha", "drop"]) == 0
    found = np.load(out / "denoise.npz")
    assert found["mean_0"].shape == found["std_0"].shape == (1, 70, 51)
    assert found["mean_1"].shape == (1, 40, 51)
    np.testing.assert_array_equal(found["mean_0"], found["mean_2"])
    raw = found["scale"] * found["mean_0"][0] + found["shift"]
    for name in ("a", "b-c", "d"):
        assert (out / f"denoise-{name}-std.png").exists()
    picture = Image.open(out / "denoise-a-mean.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), raw.round().clip(0, 255))
    with Image.open(out / "denoise-mean.tiff") as pages:
        assert [pages.n_frames, pages.size] == [3, (51, 70)]
        np.testing.assert_allclose(np.asarray(pages), raw, rtol=1e-5)
    assert "70 x 51" in (out / "denoise.md").read_text()
    assert cli.run([*command, "--alpha", "drop", "--force", "--stretch"]) == 0
    stretched = np.asarray(Image.open(out / "denoise-a-mean.png"))
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_files_of_the_size_of_the_data_have_components_and_png(
    photos: tuple[Path, Path], tmp_path: Path
) -> None:
    run, place = photos
    Image.open(place / "coins.png").crop((0, 0, 16, 16)).save(tmp_path / "tile.png")
    command = ["denoise", str(run), str(tmp_path / "tile.png"), "--raw-sigma", "25"]
    assert cli.run([*command, "--out", str(tmp_path / "o"), "--device", "cpu"]) == 0
    found = np.load(tmp_path / "o" / "denoise.npz")
    assert found["eigenvectors"].shape[0] == 1
    picture = np.asarray(Image.open(tmp_path / "o" / "denoise-tile-mean.png"))
    np.testing.assert_array_equal(picture, found["raw_mean"][0, 0].round().clip(0, 255))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "folder:x"], "FILES must come without --data, got both FILES and --data"),
        (["--test-data", "x", "--count", "2"], "FILES must come without --test-data, --count"),
        (
            ["--overlap", "99"],
            "denoise: --overlap must be less than the size of a tile, 16, got 99",
        ),
        (["--bits", "7"], "Pictures: bits must be 8 or 16, got 7"),
    ],
)
def test_what_means_nothing_beside_files_is_refused(
    photos: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    run, place = photos
    command = ["denoise", str(run), str(place / "coins.png"), "--raw-sigma", "25", "--out"]
    assert cli.run([*command, str(tmp_path / "o"), "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


def test_held_out_counts_adapt_or_name_what_there_is(
    photos: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = photos
    command = ["denoise", str(run), "--device", "cpu", "--out", str(tmp_path / "o")]
    assert cli.run(command) == 0
    assert np.load(tmp_path / "o" / "denoise.npz")["mean"].shape[0] == 2  # there are two
    assert cli.run([*command, "--count", "3", "--force"]) == 2
    assert "--count must be at most 2, the held-out samples, got 3" in capsys.readouterr().err
    chains = ["chains", *command[1:], "--dry-run"]
    assert cli.run(chains) == 0
    assert "would draw 2 chains" in capsys.readouterr().out
    assert cli.run([*chains, "--chains", "3"]) == 2
    assert "--chains must be at most 2, the held-out samples, got 3" in capsys.readouterr().err


def test_a_model_of_whole_pictures_says_that_tiles_may_differ(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), np.uint8))
    arguments = ["train", "--data", f"npy:{tmp_path / 'a.npy'}", "--model", "unet-small"]
    arguments += ["--channels", "16", "--steps", "1", "--batch-size", "4", "--tracker", "none"]
    assert cli.run([*arguments, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    np.save(tmp_path / "b.npy", np.full((1, 20, 20), 128.0) + np.arange(20.0))
    command = ["denoise", str(tmp_path / "run"), str(tmp_path / "b.npy"), "--raw-sigma", "25"]
    with pytest.warns(UserWarning, match="trained on whole pictures of that size"):
        assert cli.run([*command, "--units", "raw", "--device", "cpu"]) == 0
    assert results.picture_files(["x"], 2, 256, stretch=False)[-1] == "denoise-std.tiff"
    assert data.Pictures().given() == []
