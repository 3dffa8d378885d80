"""One reader of files for all commands: exact, or refused by name."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hos_ext.app import cli, data, results

SCALING = data.Scaling(levels=256)
GREY = np.random.default_rng(0).integers(0, 256, (6, 7), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 7, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    """A pillow image, or an array, as a file of a kind."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(rows, width, bits, colour=0):
    """A PNG of any depth, written by hand from the bytes of its rows; colour 2 is RGB."""

    def part(name, content):
        head = struct.pack(">I", len(content)) + name + content
        return head + struct.pack(">I", zlib.crc32(name + content))

    size = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = part(b"IHDR", size), part(b"IDAT", packed), part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def turned(image, kind, orientation=6):
    """A file whose picture must be turned to be upright."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    back = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation]
    return encoded(Image.fromarray(image).transpose(back), kind, exif=tag)


def camera(image):
    """A camera's JPEG with a smaller picture behind the first."""
    first = Image.fromarray(image)
    rest = [first.resize((3, 3))]
    return encoded(first, "MPO", save_all=True, append_images=rest, quality=100, subsampling=0)


def both(tmp_path, name, content, shape):
    """What training and denoising read from a file: arrays, or the messages of their refusals."""
    (tmp_path / "set").mkdir(exist_ok=True)
    path = tmp_path / "set" / name
    path.write_bytes(content)
    found = []
    for read in (
        lambda: data.read_samples(f"folder:{tmp_path / 'set'}")[0].numpy(),
        lambda: results.read_files([path], shape, SCALING, sigma=0.1, units="raw").x[0].numpy(),
    ):
        try:
            found.append(read())
        except ValueError as error:
            found.append(str(error))
    path.unlink()
    return found


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.png", encoded(GREY, "PNG"), GREY[None]),
        ("a.PNG", encoded(COLOUR, "PNG"), COLOUR.transpose(2, 0, 1)),
        ("a.bmp", encoded(GREY, "BMP"), GREY[None]),
        ("a.bmp", encoded(COLOUR, "BMP"), COLOUR.transpose(2, 0, 1)),
        ("a.webp", encoded(COLOUR, "WEBP", lossless=True), COLOUR.transpose(2, 0, 1)),
        ("a.pgm", encoded(GREY, "PPM"), GREY[None]),
        ("a.ppm", encoded(COLOUR, "PPM"), COLOUR.transpose(2, 0, 1)),
        ("a.pgm", b"P2 # plain\n2 # wide\n1\n255\n 3 200\n", np.array([[[3, 200]]])),
        ("a.tiff", encoded(COLOUR, "TIFF"), COLOUR.transpose(2, 0, 1)),
        ("a.png", turned(GREY, "PNG"), GREY[None]),
        ("a.tif", turned(GREY, "TIFF", 3), GREY[None]),
        ("a.png", encoded(COLOUR, "PPM"), COLOUR.transpose(2, 0, 1)),  # the content decides
    ],
)
def test_training_and_denoising_see_the_same_numbers(tmp_path, name, content, expected):
    raw, x = both(tmp_path, name, content, expected.shape)
    np.testing.assert_array_equal(raw, expected)
    np.testing.assert_allclose(x, (expected - 127.5) / 128, rtol=1e-6)


def test_a_jpeg_of_a_camera_is_its_first_picture(tmp_path):
    content = camera(COLOUR)
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
        expected = np.asarray(image).transpose(2, 0, 1)
    raw, x = both(tmp_path, "a.jpg", content, expected.shape)
    np.testing.assert_array_equal(raw, expected)
    np.testing.assert_allclose(x, (expected - 127.5) / 128.0, rtol=1e-6)
    raw, x = both(tmp_path, "a.jpg", turned(COLOUR, "JPEG"), expected.shape)
    np.testing.assert_allclose(x, (raw - 127.5) / 128, rtol=1e-6)
    assert raw.shape == expected.shape  # upright: lying on its side it would be 7 x 6


WIDE = np.arange(1000, 1042, dtype=">u2").reshape(6, 7)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.png", png(np.repeat(WIDE, 3, 1), 7, 16, 2), "16 bits a channel"),
        ("a.png", png(WIDE, 7, 16), "mode I;16"),
        ("a.png", png(np.full((6, 2), 0b10_01_11_00, np.uint8), 7, 2), "2 bits a channel"),
        ("a.png", png(np.full((6, 4), 0b1001_0011, np.uint8), 7, 4), "4 bits a channel"),
        ("a.png", png(np.full((6, 1), 0b1001_0011, np.uint8), 7, 1), "mode 1"),
        ("a.ppm", b"P6\n7 6\n65535\n" + np.repeat(WIDE, 3, 1).tobytes(), "levels 0 to 65535"),
        ("a.pgm", b"P5\n# maximum below\n7 6 100\n" + (GREY // 3).tobytes(), "levels 0 to 100"),
        ("a.pgm", b"P5 7 6 15\n" + (GREY // 16).tobytes(), "levels 0 to 15"),
        ("a.png", encoded(Image.new("P", (7, 6)), "PNG"), "mode P"),
        ("a.png", encoded(Image.new("RGBA", (7, 6)), "PNG"), "mode RGBA"),
        ("a.png", encoded(Image.new("LA", (7, 6)), "PNG"), "mode LA"),
        ("a.png", encoded(GREY, "PNG", transparency=3), "mode L with a transparent colour"),
        ("a.jpg", encoded(Image.new("CMYK", (7, 6)), "JPEG"), "mode CMYK"),
        ("a.tif", encoded(Image.new("CMYK", (7, 6)), "TIFF"), "mode CMYK"),
        ("a.tif", encoded(Image.new("I;16", (7, 6)), "TIFF"), "mode I;16"),
        ("a.tif", encoded(Image.new("I", (7, 6)), "TIFF"), "mode I"),
    ],
)
def test_what_pillow_would_convert_is_refused_by_both(tmp_path, name, content, what):
    kinds = "8-bit grey (L), RGB or floating grey (F) images ("
    for message in both(tmp_path, name, content, (1, 6, 7)):
        assert isinstance(message, str), message
        assert name in message
        assert kinds in message
        assert f"), got {what}" in message


def test_pillow_itself_makes_24_bits_of_48():
    with Image.open(io.BytesIO(png(np.repeat(WIDE, 3, 1), 7, 16, 2))) as image:
        assert image.mode == "RGB"


def test_tiffs_of_other_depths_are_refused_by_both(tmp_path):
    """Pillow reads 16 bits a channel as 8 without a word, and spreads 4 over 0 to 255."""

    def tiff(bits, kind, samples, raw):
        photometric = 2 if samples == 3 else 1
        tags = [(256, 3, 7), (257, 3, 6), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
        tags += [(273, 4, 0), (277, 3, samples), (278, 3, 6), (279, 4, len(raw)), (339, 3, kind)]
        body, extra = b"", b""
        start = 8 + 2 + 12 * len(tags) + 4
        for tag, form, value in tags:
            count = samples if tag in (258, 339) else 1
            values = struct.pack(f"<{count}H" if form == 3 else "<I", *[value] * count)
            if tag == 273:
                values = struct.pack("<I", start + 12 * 2)
            if len(values) > 4:
                place = start + len(extra)
                extra, values = extra + values.ljust(12, b"\0"), struct.pack("<I", place)
            body += struct.pack("<HHI", tag, form, count) + values.ljust(4, b"\0")
        head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
        return head + body + bytes(4) + extra.ljust(24, b"\0") + raw

    cases = {
        "16 bits a channel of sample format 1": tiff(16, 1, 3, bytes(6 * 7 * 6)),
        "4 bits a channel of sample format 1": tiff(4, 1, 1, bytes(6 * 4)),
    }
    for what, content in cases.items():
        for message in both(tmp_path, "a.tif", content, (1, 6, 7)):
            assert isinstance(message, str), what
            assert f"got {what}" in message
    raw, x = both(tmp_path, "a.tif", tiff(8, 1, 1, GREY.tobytes()), (1, 6, 7))
    np.testing.assert_array_equal(raw, GREY[None])
    np.testing.assert_allclose(x, (GREY[None] - 127.5) / 128, rtol=1e-6)


def test_several_pages_are_samples_of_a_tiff_and_of_nothing_else(tmp_path):
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    rest = {"save_all": True, "append_images": pages[1:]}
    tiff = encoded(pages[0], "TIFF", **rest)
    (tmp_path / "a.tif").write_bytes(tiff)
    found = results.read_files([tmp_path / "a.tif"], (6, 7), SCALING, sigma=0.1)
    assert found.names == ["a.tif[0]", "a.tif[1]"]
    np.testing.assert_allclose(found.x[1], (255 - GREY - 127.5) / 128, rtol=1e-6)
    train, _ = both(tmp_path, "a.tif", tiff, (6, 7))
    assert "must hold single images, got 2 in" in train
    for message in both(tmp_path, "a.png", encoded(pages[0], "PNG", **rest), (6, 7)):
        assert "must hold single images, got 2" in message
    odd = [Image.fromarray(GREY), Image.fromarray(GREY[:4])]
    content = encoded(odd[0], "TIFF", save_all=True, append_images=odd[1:])
    _, denoise = both(tmp_path, "a.tif", content, (6, 7))
    assert "pages of one shape and kind, got (1, 4, 7) uint8 and (1, 6, 7) uint8" in denoise


# ------------------------------------------------------------------------------------------ arrays


def damaged(kind):
    """Arrays damaged in ways for which numpy and zipfile have errors of many kinds."""
    array, buffer = np.tile(np.float32([[1, 2, 3, 4]]), (40, 10)), io.BytesIO()
    if kind.endswith("npy"):
        np.save(buffer, array)
        content = bytearray(buffer.getvalue())
        if kind == "header.npy":
            content[content.find(b"}")] = ord("(")
        elif kind == "lying.npy":
            content = content.replace(b"(40, 40)", b"(10**11,)")
        elif kind == "short.npy":
            content = content[:-5]
        else:
            content = bytearray(b"")
        return bytes(content)
    np.savez_compressed(buffer, array)
    content = bytearray(buffer.getvalue())
    start = content.find(b"arr_0.npy") + 9 + 20
    if kind == "zlib.npz":
        for i in range(start, start + 14):
            content[i] ^= 0x5A
    elif kind == "truncated.npz":
        content = content[:-30]
    elif kind == "text.npz":
        content = bytearray(b"no archive")
    else:  # 100 GB claimed
        buffer = io.BytesIO()
        head = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, "
        head += b"'shape': (12500000000,), }"
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("arr_0.npy", head.ljust(127) + b"\n" + bytes(100))
        content = bytearray(buffer.getvalue())
    return bytes(content)


@pytest.mark.parametrize(
    "kind",
    [
        "header.npy",
        "lying.npy",
        "short.npy",
        "empty.npy",
        "zlib.npz",
        "truncated.npz",
        "text.npz",
        "bomb.npz",
    ],
)
def test_damaged_arrays_are_named_by_both(tmp_path, kind):
    path = tmp_path / kind
    path.write_bytes(damaged(kind))
    with pytest.raises(ValueError, match=f"^open_source: npy:{path} must hold a whole"):
        data.read_samples(f"npy:{path}")
    with pytest.raises(ValueError, match=f"^denoise: {path} must be a whole image, .npy or .npz"):
        results.read_files([path], (40,), data.Scaling(), sigma=0.1)


def test_arrays_of_any_order_are_read_right(tmp_path):
    array = np.random.default_rng(0).normal(size=(40, 4))
    kinds = {
        "big.npy": array.astype(">f8"),
        "fortran.npy": np.asfortranarray(array),
        "reversed.npy": array[::-1][::-1],
        "capital.NPY": array,
    }
    for name, values in kinds.items():
        with (tmp_path / name).open("wb") as file:
            np.save(file, values)
        np.testing.assert_array_equal(data.read_samples(f"npy:{tmp_path / name}").numpy(), array)
        found = results.read_files([tmp_path / name], (4,), data.Scaling(), sigma=0.1)
        np.testing.assert_allclose(found.x, array, rtol=1e-6)
    with (tmp_path / "a.NPZ").open("wb") as file:
        np.savez(file, left=array, right=-array)
    read = data.read_samples(f"npy:{tmp_path / 'a.NPZ'}", column="right")
    np.testing.assert_array_equal(read.numpy(), -array)
    with pytest.raises(ValueError, match=r"must hold one array, got the arrays left, right"):
        results.read_files([tmp_path / "a.NPZ"], (4,), data.Scaling(), sigma=0.1)
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"a\.txt must end in \.png, .*\.npz, got a\.txt"):
        results.read_files([tmp_path / "a.txt"], (4,), data.Scaling(), sigma=0.1)


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_channels_last_are_refused_and_channels_first_taken(tmp_path, capsys, channels, dtype):
    array = np.random.default_rng(0).integers(0, 256, (60, 8, 9, channels)).astype(dtype)
    np.save(tmp_path / "last.npy", array)
    np.save(tmp_path / "first.npy", np.moveaxis(array, -1, 1))
    options = ["--steps=1", "--model=mlp", "--rank=1", "--width=8", "--head-width=8"]
    options += ["--tracker=none", "--out", str(tmp_path / "run")]
    assert cli.run(["train", "--data", f"npy:{tmp_path / 'last.npy'}", *options]) == 2
    rule = f"must hold pictures as (n, C, height, width), got shape (60, 8, 9, {channels}) with"
    assert f"{rule} channels last (numpy.moveaxis(array, -1, 1)" in capsys.readouterr().err
    assert cli.run(["train", "--data", f"npy:{tmp_path / 'first.npy'}", *options]) == 0
    np.save(tmp_path / "noisy.npy", array[:2])
    noisy = str(tmp_path / "noisy.npy")
    assert cli.run(["denoise", str(tmp_path / "run"), noisy, "--sigma=0.4", "--units=raw"]) == 2
    assert "with channels last" in capsys.readouterr().err


def test_other_arrays_may_end_in_a_short_axis(tmp_path):
    for shape in ((60, 3, 8, 3), (60, 2, 5, 3), (60, 8, 3), (60, 8, 8, 5), (60, 1, 4, 1)):
        np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=shape))
        assert data.read_samples(f"npy:{tmp_path / 'a.npy'}").shape == shape


def test_augmenting_channels_last_is_said():
    raw = torch.zeros(4, 8, 8, 3)
    with pytest.warns(UserWarning, match="its last axis is taken for the width"):
        data.augment(raw, "flip", levels=0, seed=0, batch_size=4)
