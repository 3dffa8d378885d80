"""Files of many kinds, whole and damaged: exactly what they store, or a refusal that names them."""

import io
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hos_ext.app import data, results

SEED = 22
ORIENTED = {  # tag 274: what a viewer does to the stored rows and columns
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
WHOLE = data.Scaling(levels=256)


def _picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", _sum(kind, content))


def _sum(kind: bytes, content: bytes) -> int:
    return zlib.crc32(kind + content)


def _png(width: int, height: int, bits: int, colour: int, lines: bytes, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [_chunk(b"IHDR", head), *more, _chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + _chunk(b"IEND", b"")


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _trained_on(path: Path) -> np.ndarray:
    """What training sees of a picture."""
    return data.read_samples(f"folder:{path}")[0].numpy()


def _denoised(path: Path, like: np.ndarray, scaling: data.Scaling = WHOLE) -> np.ndarray:
    """What denoising sees of a picture, in raw units."""
    x = results.read_files([path], like.shape, scaling, sigma=0.2, units="raw").x[0]
    return (x.double() * scaling.scale + scaling.shift).numpy()


@pytest.mark.parametrize("turn", ORIENTED)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.JPG"])
def test_a_turned_picture_lies_upright_for_training_and_for_denoising(tmp_path, name, turn):
    exif, stored = Image.Exif(), _picture(4, 6, 3)
    exif[0x0112] = turn
    kind = {"a.png": "PNG", "a.tif": "TIFF", "a.webp": "WEBP", "a.JPG": "JPEG"}[name]
    options = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / name).write_bytes(_saved(Image.fromarray(stored), kind, exif=exif, **options))
    if kind == "JPEG":  # the pixels that the file stores, by way of a file without the tag
        plain = Image.open(io.BytesIO(_saved(Image.fromarray(stored), kind)))
        stored = np.asarray(plain)
    upright = ORIENTED[turn](stored).transpose(2, 0, 1)
    np.testing.assert_array_equal(_trained_on(tmp_path / name), upright)
    np.testing.assert_array_equal(np.rint(_denoised(tmp_path / name, upright)), upright)


def _tiff(values: np.ndarray, bits: int, kind: int, *more: tuple[int, int]) -> bytes:
    """One strip of grey, or of colour where the last axis has 3."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 2 if channels > 1 else 1}
    tags |= {273: 0, 277: channels, 278: height, 279: values.nbytes, 339: kind, **dict(more)}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    lines = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(lines) + bytes(4)
    return head + values.tobytes()


_WIDE = np.random.default_rng(SEED).integers(0, 2**16, (8, 8, 3)).astype(np.uint16)
_BIG = _WIDE.astype(">u2")
_LINES = b"".join(b"\0" + row.tobytes() for row in _BIG)
_GREY = _picture(8, 8)
_PLAIN = b"".join(b"\0" + row.tobytes() for row in _GREY)
NOT_EXACT = {
    "rgb16.png": (_png(8, 8, 16, 2, _LINES), "16 bits a channel"),
    "grey16.png": (_png(4, 8, 16, 0, _LINES[: 8 * 9]), "mode I;16"),
    "grey1.png": (_png(8, 8, 1, 0, bytes(16)), "mode 1"),
    "grey2.png": (_png(8, 8, 2, 0, bytes(24)), "2 bits a channel"),
    "grey4.png": (_png(8, 8, 4, 0, bytes(40)), "4 bits a channel"),
    "clear.png": (
        _png(8, 8, 8, 0, _PLAIN, _chunk(b"tRNS", b"\0\7")),
        "mode L with a transparent colour",
    ),
    "palette.png": (_saved(Image.fromarray(_GREY).convert("P"), "PNG"), "mode P"),
    "la.png": (_saved(Image.new("LA", (8, 8)), "PNG"), "mode LA"),
    "rgba.png": (_saved(Image.new("RGBA", (8, 8)), "PNG"), "mode RGBA"),
    "cmyk.jpg": (_saved(Image.new("CMYK", (8, 8)), "JPEG"), "mode CMYK"),
    "rgb16.ppm": (b"P6 8 8 65535\n" + _BIG.tobytes(), "levels 0 to 65535"),
    "grey16.pgm": (b"P5 8 8 65535\n" + _BIG[..., 0].tobytes(), "mode I"),
    "hundred.pgm": (b"P5 8 8 100\n" + bytes(64), "levels 0 to 100"),
    "fifteen.PGM": (b"P2 8 8 15\n" + b"7 " * 64, "levels 0 to 15"),
    "bits.pgm": (b"P4 8 8\n" + bytes(8), "mode 1"),
    "unit.ppm": (b"Pf 8 8 -2\n" + bytes(256), "mode F in units of 2"),
    "rgb16.tif": (_tiff(_WIDE, 16, 1), "16 bits a channel of sample format 1"),
    "grey16.tiff": (_tiff(_WIDE[..., 0], 16, 1), "mode I;16"),
    "signed.tif": (_tiff(_GREY, 8, 2), "8 bits a channel of sample format 2"),
    "more.tif": (_tiff(_picture(8, 8, 4), 8, 1, (338, 0)), "mode RGB with further channels"),
    "lab.tif": (_saved(Image.new("LAB", (8, 8)), "TIFF"), "mode LAB"),
    "int.tif": (_saved(Image.new("I", (8, 8)), "TIFF"), "mode I"),
    "fifteen.bmp": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 182, 0, 0, 54, 40, 8, 8, 1, 16, 0, 128, *[0] * 4)
        + bytes(128),
        "16 bits a pixel",
    ),
}  # fmt: skip


WAYS = {
    "--bits 8 or 16": "rgb16.png grey16.png grey1.png grey2.png grey4.png rgb16.ppm grey16.pgm",
    "--bits 8 or 16 ": "hundred.pgm fifteen.PGM bits.pgm rgb16.tif grey16.tiff fifteen.bmp",
    "--alpha drop, white or black": "clear.png la.png rgba.png",
    "--convert rgb or grey": "palette.png cmyk.jpg lab.tif",
}


@pytest.mark.parametrize("name", NOT_EXACT)
def test_a_picture_that_would_be_converted_is_refused_alike_by_training_and_denoising(
    tmp_path, name
):
    content, found = NOT_EXACT[name]
    (tmp_path / name).write_bytes(content)
    ways = (way.strip() for way, names in WAYS.items() if name in names.split())
    way = next(ways, "convert others first")
    rule = re.escape(f"must hold 8-bit grey (L), RGB or floating grey (F) images ({way}), got ")
    found = re.escape(found)
    with pytest.raises(ValueError, match=rf"^open_source: folder:.* {rule}.*{found}.* in .*{name}"):
        _trained_on(tmp_path)
    with pytest.raises(ValueError, match=rf"^denoise: .*{name} must be a whole .*{rule}.*{found}"):
        _denoised(tmp_path / name, np.zeros((1, 8, 8)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.webp", "a.PPM", "a.pgm", "a.tiff"])
def test_pictures_of_8_bits_are_read_as_they_are_stored(tmp_path, name, channels):
    stored = _picture(7, 5, 3) if channels == 3 else _picture(7, 5)
    kinds = {".pgm": "PPM", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF"}
    ending = Path(name).suffix.lower()
    options = {"lossless": True} if ending == ".webp" else {}
    if name == "a.tiff":
        options = {"compression": "tiff_lzw"}
    if ending == ".webp" and channels == 1:
        stored = np.repeat(stored[..., None], 3, 2)
    kind = kinds.get(ending, ending[1:].upper())
    (tmp_path / name).write_bytes(_saved(Image.fromarray(stored), kind, **options))
    planes = stored.transpose(2, 0, 1) if stored.ndim == 3 else stored[None]
    np.testing.assert_array_equal(_trained_on(tmp_path), planes)
    np.testing.assert_array_equal(np.rint(_denoised(tmp_path / name, planes)), planes)


def test_a_photograph_is_its_first_picture(tmp_path):
    stored = Image.fromarray(_picture(8, 8, 3))
    small = stored.resize((4, 4))
    content = _saved(stored, "MPO", save_all=True, append_images=[small])
    (tmp_path / "photo.jpg").write_bytes(content)
    first = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    np.testing.assert_array_equal(_trained_on(tmp_path), first)
    np.testing.assert_array_equal(np.rint(_denoised(tmp_path / "photo.jpg", first)), first)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.webp", "WEBP")])
def test_moving_pictures_are_refused_alike(tmp_path, name, kind):
    one, two = (Image.fromarray(_picture(8, 8, 3) // n) for n in (1, 2))
    (tmp_path / name).write_bytes(_saved(one, kind, save_all=True, append_images=[two]))
    several = r"hold single images, got 2 \(--pages first or all\)"
    with pytest.raises(ValueError, match=rf"must {several} in .*{name}$"):
        _trained_on(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"{name} must .* must {several}$",
    ):
        _denoised(tmp_path / name, np.zeros((3, 8, 8)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bomb.png", _png(60000, 60000, 8, 2, b"")),
        ("sum.png", _png(8, 8, 8, 0, _PLAIN)[:-20] + b"x" + _png(8, 8, 8, 0, _PLAIN)[-19:]),
        ("half.jpg", _saved(Image.fromarray(_picture(64, 64, 3)), "JPEG")[:900]),
        ("half.tif", _saved(Image.fromarray(_GREY), "TIFF")[:90]),
        ("array.png", b"\x93NUMPY"),
        ("gif.png", _saved(Image.fromarray(_GREY), "GIF")[:40]),
        ("empty.bmp", b""),
    ],
)
def test_a_damaged_picture_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"must hold images that can be read, got .*{name}: "):
        _trained_on(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{name} must .* must hold images that can be read, got "
    ):
        _denoised(tmp_path / name, np.zeros((1, 8, 8)))


@pytest.mark.parametrize(
    ("shape", "way"),
    [((8, 9), "only a U-Net of pictures takes other sizes"), ((8, 8, 3), "--convert rgb or grey")],
)
def test_a_picture_of_another_size_is_told_from_one_of_another_kind(tmp_path, shape, way):
    Image.fromarray(_picture(*shape)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a.png must hold samples \(1, 8, 8\), got .*\({way}"):
        results.read_files([tmp_path / "a.png"], (1, 8, 8), WHOLE, sigma=0.1)


# ------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.random.default_rng(1).normal(size=(6, 5))),
        np.random.default_rng(1).normal(size=(6, 5)).astype(">f8"),
        np.random.default_rng(1).normal(size=(6, 5)).astype(">f2"),
        np.random.default_rng(1).normal(size=(6, 5))[::-1, ::-1],
    ],
)
@pytest.mark.parametrize("kind", ["a.npy", "a.NPZ", "packed.npz", "really-npz.npy"])
def test_arrays_of_any_order_are_read_right_by_all(tmp_path, array, kind):
    path, file = tmp_path / kind, io.BytesIO()
    save = {"a.npy": np.save, "packed.npz": np.savez_compressed}.get(kind, np.savez)
    save(file, array)
    path.write_bytes(file.getvalue())
    np.testing.assert_array_equal(data.read_samples(f"npy:{path}").numpy(), array)
    scaling = data.Scaling(mean=1.0, std=2.0)
    found = results.read_files([path], (5,), scaling, sigma=0.5, units="raw").x
    np.testing.assert_allclose(found.numpy(), (array.astype(float) - 1) / 2, atol=1e-6)


def _archive(content: bytes, *, claimed: int | None = None) -> bytes:
    """An .npz of one array; `claimed` is the size that its directory tells of the array."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x.npy", content)
    whole = file.getvalue()
    return whole if claimed is None else whole.replace(*(struct.pack("<I", n) for n in (
        len(content), claimed)))  # fmt: skip


def _npy(array: np.ndarray, **header: object) -> bytes:
    file = io.BytesIO()
    if header:
        plain = {"descr": "<f4", "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, plain | header)
        return file.getvalue() + array.tobytes()
    np.save(file, array)
    return file.getvalue()


_ROWS = np.random.default_rng(SEED).normal(size=(60, 4)).astype(np.float32)
_PACKED = bytearray(_archive(_npy(_ROWS)))
_PACKED[400] ^= 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bomb.npz", _archive(_npy(_ROWS, shape=(25 * 10**9,)))),
        ("lie.npz", _archive(_npy(_ROWS), claimed=2**31)),
        ("flip.npz", bytes(_PACKED)),
        ("cut.npz", _archive(_npy(_ROWS)[:-9])),
        ("bomb.npy", _npy(_ROWS, shape=(25 * 10**9,))),
        ("fewer.npy", _npy(_ROWS, shape=(20, 4))),
        ("two.npy", _npy(_ROWS) + _npy(_ROWS)),
        ("objects.npy", _npy(np.array([[None]]))),
        ("bracket.npy", _npy(_ROWS).replace(b"}", b"(", 1)),
        ("parts.npy", _npy(_ROWS, descr=[("a", "<f4"), ("b", "<f4")], shape=(120,))),
        ("inner.npy", _npy(_ROWS, descr="(4,)f4", shape=(60,))),
        ("negative.npy", _npy(_ROWS, shape=(-60, -4))),
        ("picture.npy", _saved(Image.fromarray(_GREY), "PNG")),
        ("nothing.npz", _archive(b"")),
        ("complex.npy", _npy(_ROWS.astype(np.complex64))),
        ("wide.npy", _npy(_ROWS.astype(np.longdouble))),
        ("nan.npy", _npy(np.full_like(_ROWS, np.nan))),
        ("point.npy", _npy(_ROWS[0, 0])),
        ("none.npy", _npy(_ROWS[:0])),
        ("truth.npy", _npy(_ROWS > 0)),
    ],
)
def test_a_file_without_a_right_array_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^open_source: npy:.*{name} must "):
        data.read_samples(f"npy:{tmp_path / name}")
    with pytest.raises(ValueError, match=rf"^denoise: .*{name} must "):
        results.read_files([tmp_path / name], (4,), data.Scaling(), sigma=0.5)


def test_a_file_of_another_ending_and_a_link_to_nothing_are_named(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^denoise: .*a\.heic must end in \.png, .* \.npz, got a\.heic"
    ):
        results.read_files([tmp_path / "a.heic"], (4,), data.Scaling(), sigma=0.5)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "c.png").write_bytes(_saved(Image.fromarray(_GREY), "PNG"))
    with pytest.raises(ValueError, match=r"must hold links to files that exist, got .*b\.png$"):
        data.read_samples(f"folder:{tmp_path}")
