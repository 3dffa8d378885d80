"""Raw units: what comes in is judged by its spread, what goes out keeps its digits."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from hos_ext.app import cli, data, results

PIXELS = data.Scaling(levels=256)
TABLE = data.Scaling(mean=5.0, std=2.0)


def taken(values, scaling, sigma, std=0.5, units="auto"):
    """The values in data units, as `denoise` takes them."""
    return results.to_data_units(Path("a.npy"), values, scaling, sigma=sigma, std=std, units=units)


def pictures():
    """Kinds of pictures, 16 x 16, in raw units."""
    rng = np.random.default_rng(0)
    return {
        "black": np.zeros((1, 16, 16)),
        "white": np.full((1, 16, 16), 255.0),
        "ramp": np.linspace(0, 255, 256).reshape(1, 16, 16),
        "dark": rng.integers(0, 4, (1, 16, 16)).astype(float),
    }


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("kind", list(pictures()))
def test_noisy_pictures_in_raw_units_are_taken_and_others_refused(kind, sigma):
    """[0, 1] and [-1, 1], clean and noisy: noise takes them out of their range."""
    raw = pictures()[kind]
    z = np.random.default_rng(1).normal(size=raw.shape)
    np.testing.assert_allclose(
        taken(raw + 128 * sigma * z, PIXELS, sigma), (raw - 127.5) / 128 + sigma * z, atol=1e-12
    )
    rule = r"^denoise: a\.npy must hold raw units, 0 to 255 before noise was added, got floating"
    for unit in (raw / 255, raw / 127.5 - 1):
        for noise in (0.0, sigma / 2, sigma):
            with pytest.raises(ValueError, match=rule + r".*--units raw, unit, signed or data"):
                taken(unit + noise * z, PIXELS, sigma)


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.3, 1.0])
def test_noise_given_in_the_units_of_the_pictures_is_refused_too(noise):
    """--raw-sigma 0.1 and pictures in [0, 1] or [-1, 1] with noise 0.1: less than a grey level."""
    raw, sigma = pictures()["ramp"], noise / 128
    z = np.random.default_rng(1).normal(size=raw.shape)
    for unit in (raw / 255, raw / 127.5 - 1):
        with pytest.raises(ValueError, match="with noise fit as well"):
            taken(unit + noise * z, PIXELS, sigma)
    for kind in ("white", "ramp", "dark"):
        picture = pictures()[kind] * (4 if kind == "dark" else 1)
        np.testing.assert_allclose(
            taken(picture + noise * z, PIXELS, sigma), (picture + noise * z - 127.5) / 128
        )


def test_the_user_may_say_what_the_units_are():
    raw = pictures()["ramp"]
    x = (raw - 127.5) / 128
    for units, values in (("unit", raw / 255), ("signed", raw / 127.5 - 1), ("data", x)):
        np.testing.assert_allclose(taken(values, PIXELS, 0.1, units=units), x, atol=1e-12)
    np.testing.assert_array_equal(
        taken(raw / 255, PIXELS, 0.1, units="raw"), (raw / 255 - 127.5) / 128
    )
    with pytest.raises(ValueError, match="--units unit must come with floating values"):
        taken(raw.astype(np.uint8), PIXELS, 0.1, units="unit")
    with pytest.raises(
        ValueError, match=r"--units signed must come with .* a model of whole levels"
    ):
        taken(raw, TABLE, 0.1, units="signed")
    with pytest.raises(ValueError, match="--units data must come with floating values"):
        taken(raw.astype(np.uint8), PIXELS, 0.1, units="data")


def test_tables_are_judged_by_their_spread():
    rng = np.random.default_rng(2)
    clean, z = 5 + 2 * rng.normal(size=(3, 20)), rng.normal(size=(3, 20))
    noisy = clean + 2 * 0.4 * z
    np.testing.assert_allclose(taken(noisy, TABLE, 0.4, 1.0), (noisy - 5) / 2)
    flat = np.full((3, 20), 7.0) + 2 * 0.4 * z
    np.testing.assert_allclose(taken(flat, TABLE, 0.4, 1.0), (flat - 5) / 2)
    with pytest.raises(ValueError, match=r"that spread by 0\.0.*, where noise alone is 0\.8"):
        taken(noisy / 255, TABLE, 0.4, 1.0)
    with pytest.raises(
        ValueError, match=r"mean 5 and standard deviation 2 .* the size of the data"
    ):
        taken(255 * noisy, TABLE, 0.4, 1.0)
    # A few values may lie close together by chance.
    np.testing.assert_array_equal(taken(np.full((1, 5), 5.0), TABLE, 0.4, 1.0), np.zeros((1, 5)))


def test_twice_the_usual_size_is_said():
    rng = np.random.default_rng(3)
    with pytest.warns(UserWarning, match=r"holds floating values .* times the size of the data"):
        taken(5 + 6 * rng.normal(size=(8, 20)), TABLE, 0.1, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken(5 + 3 * rng.normal(size=(8, 20)), TABLE, 0.1, 1.0)


# ------------------------------------------------------------------------------------- going out


@pytest.mark.parametrize(
    ("offset", "scale"), [(1e6, 1.0), (1.7e9 + 37, 1.0), (0.0, 1e-23), (1e30, 1e29)]
)
def test_raw_values_keep_the_digits_that_float32_loses(tmp_path, offset, scale):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", offset + scale * rng.normal(size=(60, 1, 4, 4)))
    np.save(tmp_path / "noisy.npy", offset + scale * rng.normal(size=(3, 1, 4, 4)))
    run, out = str(tmp_path / "run"), tmp_path / "out"
    small = ["--steps=2", "--model=mlp", "--rank=2", "--width=8", "--head-width=8"]
    spec = f"npy:{tmp_path / 'x.npy'}"
    assert cli.run(["train", "--data", spec, "--out", run, "--tracker=none", *small]) == 0
    arguments = ["denoise", run, str(tmp_path / "noisy.npy"), "--raw-sigma", str(0.3 * scale)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert cli.run([*arguments, "--out", str(out)]) == 0
    held = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["scaling"]
    found = np.load(out / "denoise.npz")
    mean, std, values = (found[name].astype(float) for name in ("mean", "std", "eigenvalues"))
    spread = std * held["std"]
    assert (
        np.abs(found["raw_mean"] - (mean * held["std"] + held["mean"])).max() < 1e-6 * spread.min()
    )
    np.testing.assert_allclose(found["raw_std"], spread, rtol=1e-12)
    np.testing.assert_allclose(found["raw_eigenvalues"], values * held["std"] ** 2, rtol=1e-12)
    # A .tiff is of float32: it is written where that holds the values, or a warning names it.
    for name in ("denoise-mean.tiff", "denoise-std.tiff", "denoise-components.tiff"):
        left_out = any(f"{name} is not written" in str(warning.message) for warning in said)
        assert (out / name).exists() != left_out
    assert (out / "denoise-mean.tiff").exists() == (offset in (0.0, 1e30))


def test_a_tiff_of_an_earlier_call_does_not_stay(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", 1e6 + rng.normal(size=(60, 1, 4, 4)))
    run, out = str(tmp_path / "run"), tmp_path / "out"
    small = ["--steps=2", "--model=mlp", "--rank=2", "--width=8", "--head-width=8"]
    spec = f"npy:{tmp_path / 'x.npy'}"
    assert cli.run(["train", "--data", spec, "--out", run, "--tracker=none", *small]) == 0
    out.mkdir()
    (out / "denoise-mean.tiff").write_bytes(b"of another call")
    capsys.readouterr()
    monkeypatch.setattr(
        warnings,
        "showwarning",
        lambda *said, **_: sys.stderr.write(warnings.formatwarning(*said[:4])),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.run(["denoise", run, "--count=2", "--out", str(out), "--force"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("hos-ext: warning: denoise: denoise-mean.tiff is not written: float32")
    assert said.count("\n") == 1
    assert not (out / "denoise-mean.tiff").exists()
    assert (out / "denoise-std.tiff").exists()


def test_the_inverse_of_a_scaling_is_exact_far_from_zero():
    scaling = data.Scaling(mean=1.7e9 + 37, std=1.0)
    x = torch.tensor([[-1.5, 0.25]])
    assert scaling.inverse(x).tolist() == [[1.7e9 + 35.5, 1.7e9 + 37.25]]
    tiny = data.Scaling(std=1e-43)
    assert tiny.inverse(x).tolist() == [[-1.5 * 1e-43, 0.25 * 1e-43]]
