"""How records show themselves: thumbnails in notebooks, and figures."""

import base64
import io
import logging
import re
import sys

import numpy as np
import pytest
import torch

from hos_ext import DPLR, Chains, Posterior, sample
from hos_ext.display import pixels, png
from hos_ext.uncertainty import calibration_report

pytest.importorskip("matplotlib").use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_posterior(dims, rows=12):
    mean = values(rows, *dims)
    flat = mean.flatten(1)
    return Posterior(mean, DPLR(flat.square() + 0.1, values(*flat.shape, 2, seed=1)))


def chains(dims=(1, 6, 5), n_steps=7):
    return sample(lambda x: -x, values(10, *dims), step_size=0.1, n_steps=n_steps, seed=0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def picture_of(text):
    """The pixels of the thumbnail in a page."""
    image = pytest.importorskip("PIL.Image")
    code = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    return np.asarray(image.open(io.BytesIO(base64.b64decode(code))))


# ------------------------------------------------------------------------------------ thumbnails


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels_it_was_given(channels):
    image = pytest.importorskip("PIL.Image")
    given = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    read = image.open(io.BytesIO(png(given)))
    assert read.mode == {1: "L", 3: "RGB"}[channels]
    assert np.array_equal(np.asarray(read).reshape(given.shape), given)


def test_pixels_reach_from_black_to_white_and_show_what_is_not_finite_as_black():
    given = torch.tensor([[[1.0, 3.0], [torch.nan, torch.inf]], [[2.0, 5.0], [1.0, 1.0]]])
    assert pixels(given).squeeze(-1).tolist() == [[[0.0, 0.5], [0.0, 0.0]], [[0.25, 1.0], [0, 0]]]
    assert pixels(torch.full((1, 2, 2), 7.0)).max() == 0.0
    assert pixels(torch.full((1, 2, 2), torch.nan)).max() == 0.0


@pytest.mark.parametrize("dims", [(16, 12), (1, 16, 12), (3, 16, 12)])
def test_a_posterior_of_pictures_shows_means_above_deviations(dims):
    found = a_posterior(dims)
    text = found._repr_html_()
    assert text.startswith(f"<code>Posterior(12 x {dims}, rank 2)</code>")
    picture = picture_of(text)
    assert picture.shape[:2] == (2 * 64, 8 * 48)  # four times their size, eight of them
    wanted = torch.as_tensor(pixels(found.mean[:8])[3]).squeeze(-1)
    shown = picture[2:64:4, 3 * 48 + 2 : 4 * 48 : 4] / 255
    assert np.abs(shown - wanted.numpy()).max() < 0.003
    wanted = torch.as_tensor(pixels(found.std[:8])[3]).squeeze(-1)
    assert np.abs(picture[66::4, 3 * 48 + 2 : 4 * 48 : 4] / 255 - wanted.numpy()).max() < 0.003


def test_chains_of_pictures_show_where_they_ended():
    found = chains()
    picture = picture_of(found._repr_html_())
    times = 64 // 6
    wanted = pixels(found.draws[:8, -1]).squeeze(-1)
    assert picture.shape == (6 * times, 8 * 5 * times)
    shown = picture[times // 2 :: times, times // 2 :: times] / 255
    assert np.abs(shown - np.concatenate([*wanted], 1)).max() < 0.003


@pytest.mark.parametrize(
    "record",
    [a_posterior((5,)), a_posterior((2, 8, 8)), a_posterior((8, 8)).to("meta"), chains((3,))],
)
def test_what_is_no_picture_is_said_in_words(record):
    assert record._repr_html_() == f"<code>{record!r}</code>"


def test_chains_and_batches_that_hold_nothing_are_said_in_words():
    assert "<img" not in chains(n_steps=0)._repr_html_()
    assert "<img" not in a_posterior((8, 8))[:0]._repr_html_()
    broken = a_posterior((8, 8))
    broken = broken.replace(mean=broken.mean * torch.nan)
    assert "<img" in broken._repr_html_()


# --------------------------------------------------------------------------------------- figures


def test_a_posterior_of_pictures_is_drawn_as_mean_and_deviation():
    found = a_posterior((1, 6, 5))
    ax = found.plot(row=2)
    first, second = ax.get_images()
    mean = found.mean[2, 0]
    scaled = (mean - mean.min()) / (mean.max() - mean.min())
    np.testing.assert_allclose(first.get_array(), scaled, atol=1e-6)
    assert tuple(first.get_extent()) == (0, 5, 6, 0)
    assert second.get_extent()[0] > 5
    words = [label.get_text() for label in ax.get_xticklabels()]
    assert words[0] == f"mean\n{mean.min():.3g} ... {mean.max():.3g}"
    std = found.std[2]
    assert words[1] == f"std\n{std.min():.3g} ... {std.max():.3g}"
    low, high = ax.get_xlim()
    assert low == 0
    assert high >= second.get_extent()[1]


def test_other_posteriors_are_drawn_as_a_curve_with_its_band():
    found = a_posterior((9,))
    _, given = plt.subplots()
    ax = found.plot(given, row=1, level=0.5)
    assert ax is given
    np.testing.assert_allclose(ax.lines[0].get_ydata(), found.mean[1])
    low, high = found[1].credible_interval(0.5)
    corners = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(corners[:, 1].min(), low.min(), rtol=1e-6)
    np.testing.assert_allclose(corners[:, 1].max(), high.max(), rtol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("entry", "x0 given x")
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["50% interval", "mean"]


def test_chains_are_drawn_as_traces_of_an_entry():
    found = chains()
    ax = found.plot(entry=7)
    assert len(ax.lines) == 8
    wanted = found.draws.flatten(2)[3, :, 7]
    np.testing.assert_allclose(ax.lines[3].get_ydata(), wanted, rtol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("draw", "entry 7")
    assert ax.get_xlim() == (0, 6)


def test_calibration_is_drawn_against_the_diagonal():
    x0 = values(400, 6, seed=2)
    report = calibration_report(x0, Posterior(torch.zeros(400, 6), DPLR(torch.ones(400, 6))))
    ax = report.plot()
    lines = {line.get_label(): line for line in ax.lines}
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        "nominal probability",
        "share of true values inside",
    )
    for name, rows in (("entries", report.entries), ("ellipsoid", report.ellipsoid)):
        line = next(c for c in ax.containers if c.get_label() == name)
        np.testing.assert_allclose(line.lines[0].get_xdata(), report.levels)
        np.testing.assert_allclose(line.lines[0].get_ydata(), rows[:, 0])
        bars = np.array(line.lines[2][0].get_segments())
        np.testing.assert_allclose(bars[:, :, 1], rows[:, 1:], atol=1e-12)
    assert lines["_child0"].get_color() == "grey"
    assert to_rgba("grey")
    assert len(ax.get_legend().get_texts()) == 2


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: a_posterior((9,)).plot(3),
            TypeError,
            "Posterior.plot: ax must be matplotlib Axes, got int",
        ),
        (lambda: a_posterior((9,)).plot(row=12), ValueError, "Posterior.plot: row must be a row "),
        (lambda: a_posterior((9,)).plot(level=1), ValueError, "Posterior.plot: level must be in "),
        (lambda: chains().plot(entry=30), ValueError, "Chains.plot: entry must be in 0 ... 29, "),
        (
            lambda: chains().plot("ax"),
            TypeError,
            "Chains.plot: ax must be matplotlib Axes, got str",
        ),
    ],
)
def test_bad_arguments_are_refused(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(message)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(
        RuntimeError, match=r"^Chains.plot: matplotlib.axes must be installed \(pip"
    ):
        chains().plot()
    assert isinstance(chains(), Chains)


# ------------------------------------------------------------------------------------------- logs


def test_the_library_is_silent_until_someone_listens():
    handlers = logging.getLogger("hos_ext").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)
