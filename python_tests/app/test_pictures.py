"""Pictures of mixed kinds, converted where that is asked for: size, alpha, colours, bits, pages."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hos_ext import ops
from hos_ext.app import cli, data
from hos_ext.app.data import Pictures
from hos_ext.app.data.images import decode_pages

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (9, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (9, 7), dtype=np.uint16)


def saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def planes(colour: np.ndarray) -> np.ndarray:
    return colour.transpose(2, 0, 1)


def read(content: bytes, **wanted: Any) -> np.ndarray:
    (page,) = decode_pages(content, wanted=Pictures(**wanted))
    return page


RGBA = np.concatenate([COLOUR, ALPHA[..., None]], 2)


# ------------------------------------------------------------------------------------- one kind


def test_alpha_is_dropped_or_mixed_with_what_lies_behind() -> None:
    content = saved(RGBA)
    np.testing.assert_array_equal(read(content, alpha="drop"), planes(COLOUR))
    part = ALPHA / 255.0
    for behind, level in (("white", 255), ("black", 0)):
        expected = COLOUR * part[..., None] + level * (1 - part[..., None])
        got = read(content, alpha=behind)
        assert np.abs(got - planes(expected)).max() <= 1
    la = saved(np.stack([GREY, ALPHA], 2))
    np.testing.assert_array_equal(read(la, alpha="drop"), GREY[None])
    clear = saved(GREY, transparency=int(GREY[0, 0]))
    assert read(clear, alpha="white")[0, 0, 0] == 255
    assert read(clear, alpha="drop")[0, 0, 0] == GREY[0, 0]


def test_colours_become_grey_or_rgb() -> None:
    np.testing.assert_array_equal(read(saved(GREY), convert="rgb"), np.repeat(GREY[None], 3, 0))
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(saved(COLOUR), convert="grey")[0] - luma).max() <= 1
    few = Image.fromarray(COLOUR // 128 * 200)
    palette = few.convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(read(saved(palette), convert="rgb"), planes(np.asarray(few)))
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    expected = planes(np.asarray(cmyk.convert("RGB")))
    np.testing.assert_array_equal(read(saved(cmyk, "TIFF"), convert="rgb"), expected)
    both = saved(palette, transparency=0)
    with pytest.raises(
        ValueError, match=r"\(--alpha drop, white or black, --convert rgb or grey\)"
    ):
        read(both, convert="rgb")
    assert read(both, convert="rgb", alpha="white").shape == (3, 9, 7)


def test_bits_become_8_or_all_levels_are_kept() -> None:
    for kind in ("PNG", "TIFF"):
        content = saved(DEEP, kind)
        np.testing.assert_array_equal(read(content, bits=8), DEEP[None] >> 8)
        full = read(content, bits=16)
        assert full.dtype == np.float32
        np.testing.assert_array_equal(full, DEEP[None])
    np.testing.assert_array_equal(
        read(saved(DEEP), bits=16, convert="rgb"), DEEP[None].repeat(3, 0)
    )
    np.testing.assert_array_equal(read(saved(GREY), bits=16), GREY[None] * 257.0)
    black = Image.fromarray(GREY > 128)
    np.testing.assert_array_equal(read(saved(black), bits=8)[0], (GREY > 128) * 255)
    levels = b"P5 7 9 100\n" + (GREY // 3).tobytes()
    assert np.abs(read(levels, bits=8)[0] - (GREY // 3) * 2.55).max() <= 1
    wide = b"P6 7 9 65535\n" + np.repeat(DEEP, 3, 1).astype(">u2").tobytes()
    assert np.abs(read(wide, bits=8)[0].astype(int) - (DEEP >> 8)).max() <= 1  # pillow rounds
    with pytest.raises(ValueError, match=r"hold grey for 16 bits \(--bits 8, or a float32"):
        read(wide, bits=16)
    with pytest.raises(ValueError, match="hold whole levels for --bits, got floating grey"):
        read(saved(GREY.astype(np.float32), "TIFF"), bits=8)


def test_pages_are_first_or_all(tmp_path: Path) -> None:
    frames = [Image.fromarray(GREY // n) for n in (1, 2, 3)]
    for kind in ("PNG", "TIFF"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(read(content, pages="first"), GREY[None])
        found = decode_pages(content, wanted=Pictures(pages="all"))
        np.testing.assert_array_equal(np.stack(found)[:, 0], [GREY, GREY // 2, GREY // 3])
    gif = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert len(decode_pages(gif, wanted=Pictures(pages="all", convert="grey"))) == 3
    (tmp_path / "a.tif").write_bytes(content)
    (tmp_path / "b.png").write_bytes(saved(GREY // 4))
    rows = data.open_rows(f"folder:{tmp_path}", pictures=Pictures(pages="all"))
    expected = np.stack([GREY, GREY // 2, GREY // 3, GREY // 4])[:, None]
    np.testing.assert_array_equal(rows.read(torch.arange(4)).numpy(), expected)
    first = data.read_samples(f"folder:{tmp_path}", pictures=Pictures(pages="first"))
    np.testing.assert_array_equal(first.numpy(), expected[[0, 3]])
    with pytest.raises(
        ValueError, match=r"hold single images, got 3 in .*a.tif \(--pages first or"
    ):
        data.read_samples(f"folder:{tmp_path}")


# -------------------------------------------------------------------------------------- one size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs of mixed sizes, each of which tells the place of its pixels."""
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(24):
        height, width = 12 + i % 5, 10 + i % 7
        grid = np.add.outer(np.arange(height) * 16, np.arange(width)).astype(np.uint8)
        (place / f"{i:02}.png").write_bytes(saved(grid))
    return place


def test_mixed_sizes_are_refused_by_name_and_made_alike(folder: Path) -> None:
    spec = f"folder:{folder}"
    with pytest.raises(
        ValueError, match=r"one shape and kind, .*\(--size makes one size of them, "
    ):
        data.open_source(spec)
    middle = data.open_source(spec, pictures=Pictures(size=8, crop="centre"))
    assert middle.shape == (1, 8, 8)
    rows, raw = middle.batch(0, 8, seed=0)
    for i, picture in zip(rows.tolist(), raw, strict=True):
        top, left = (12 + i % 5 - 8) // 2, (10 + i % 7 - 8) // 2
        assert int(picture[0, 0, 0]) == 16 * top + left
    scaled = data.open_source(spec, pictures=Pictures(size="8x20"))
    assert scaled.shape == (1, 8, 20)
    with pytest.raises(
        ValueError, match=r"at least 8x20 \(a smaller --size; or --crop scale\), got"
    ):
        data.open_source(spec, pictures=Pictures(size=(8, 20), crop="centre"))


def test_scaling_keeps_the_aspect_and_averages(tmp_path: Path) -> None:
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 20:60] = 200
    (tmp_path / "a.png").write_bytes(saved(wide))
    whole = data.read_samples(f"folder:{tmp_path}", pictures=Pictures(size=10))
    assert (
        (whole[0, 0, 1:-1, 1:-1].float() - 200).abs() < 5
    ).all()  # the middle square of a picture twice as wide
    noise = RNG.integers(0, 256, (400, 400), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(saved(noise))
    small = data.read_samples(f"folder:{tmp_path}", pictures=Pictures(size=10)).float()
    assert (small - 127.5).abs().max() < 20  # each of 1600 pixels; one of them would be anything


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("limit", [2**20, 3000, 10])
def test_random_cuts_are_functions_of_seed_step_and_row(
    folder: Path, limit: int, streaming: bool
) -> None:
    pictures = Pictures(size=8, crop="random")
    options: dict[str, Any] = {"limit": limit, "validation": 1, "test": 1, "pictures": pictures}
    options |= {"streaming": True} if streaming else {}
    if limit < 100 and not streaming:
        with pytest.raises(ValueError, match="fit in the limit of 10 bytes"):
            data.open_source(f"folder:{folder}", **options)
        return
    source = data.open_source(f"folder:{folder}", **options)
    rows, raw = source.batch(3, 8, seed=5)
    u = ops.uniform((8, 2), seed=5, offset=4, stream=21, dtype=torch.float64)
    for k, i in enumerate(rows.tolist()):
        free = 12 + i % 5 - 8, 10 + i % 7 - 8
        top, left = (int(u[k, a] * (free[a] + 1)) for a in (0, 1))
        assert int(raw[k, 0, 0, 0]) == 16 * top + left
    again = torch.cat([source.batch(3, 8, seed=5, start=s, stop=s + 4)[1] for s in (0, 4)])
    assert torch.equal(raw, again)
    i = int(source.parts.test[0])
    assert int(source.test[0, 0, 0, 0]) == 16 * ((12 + i % 5 - 8) // 2) + (10 + i % 7 - 8) // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "8x"}, "Pictures: size must be N or HxW, whole numbers of at least 1, got '8x'"),
        ({"size": 0}, "Pictures: size must be N or HxW, whole numbers of at least 1, got 0"),
        ({"crop": "centre"}, "Pictures: size must be given with crop 'centre', got none"),
        (
            {"crop": "middle", "size": 8},
            "Pictures: crop must be one of 'scale', 'centre', 'random'",
        ),
        ({"bits": 12}, "Pictures: bits must be 8 or 16, got 12"),
        ({"alpha": "red"}, "Pictures: alpha must be one of 'drop', 'white', 'black', got 'red'"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Pictures(**options)


def test_arrays_take_no_options_of_pictures(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"must hold pictures in files, .* for --size, got arrays"):
        data.open_source(f"npy:{tmp_path / 'a.npy'}", pictures=Pictures(size=2))


# ------------------------------------------------------------------------- through the command line


@pytest.mark.slow
def test_photographs_of_mixed_kinds_are_trained_on_and_read_alike_later(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RGBA, 16 bits, CMYK and palettes among them; a resumed run cuts where the whole one did."""
    size = (16, 16)
    rgba = Image.fromarray(RNG.integers(0, 256, (*size, 4), dtype=np.uint8), "RGBA")
    (folder / "30.png").write_bytes(saved(rgba))
    (folder / "31.png").write_bytes(saved(RNG.integers(0, 65536, size, dtype=np.uint16)))
    (folder / "32.jpg").write_bytes(saved(rgba.convert("CMYK"), "JPEG"))
    (folder / "33.gif").write_bytes(saved(rgba.convert("RGB").convert("P"), "GIF"))
    train = ["train", "--data", f"folder:{folder}", "--model", "unet-small", "--channels", "16"]
    train += ["--batch-size", "4", "--tracker", "none", "--device", "cpu", "--steps", "3"]
    train += ["--validation", "4", "--test", "4", "--size", "8", "--crop", "random"]
    assert cli.run([*train, "--out", str(tmp_path / "no")]) == 2
    assert "--alpha" in capsys.readouterr().err
    train += ["--alpha", "white", "--convert", "grey", "--bits", "8", "--save-every", "1"]
    assert cli.run([*train, "--out", str(tmp_path / "run")]) == 0
    assert cli.run(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    capsys.readouterr()
    for step in (2, 3):
        for path in (tmp_path / "run" / "checkpoints" / f"step-{step:08}").glob("*"):
            path.unlink()
    (tmp_path / "run" / "metrics.json").unlink()
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert cli.run(["resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
