"""Figures hold what was asked for, in the colours promised, and no text lies on another."""

import itertools
import math

import numpy as np
import pytest
import torch

from hos_ext import DPLR, ops
from hos_ext.app import plots
from hos_ext.app.evaluation import Denoised
from hos_ext.app.plots.samples import percent, scale_of
from hos_ext.tweedie.posterior import Posterior

GREY, COLOUR, SIGNAL = (6, 8), (3, 8, 8), (20,)


def _result(dims, sigma=0.4, rows=5, clean=True, scale=1.0):
    """Ink on paper for images: one entry in four is high."""
    size = math.prod(dims)
    base = ops.uniform((rows, *dims), seed=1)
    truth = scale * torch.where(base < 0.25, 0.9, -0.9)
    noisy = truth + sigma * ops.normal(truth.shape, seed=2)
    factor = 0.1 * sigma * ops.normal((rows, size, 3), seed=3)
    diag = sigma**2 * (0.1 + 0.2 * ops.uniform((rows, size), seed=4))
    law = Posterior(0.8 * truth + 0.1 * noisy, DPLR(diag, factor))
    return Denoised(sigma, truth if clean else None, noisy, law)


def _levels(dims, **options):
    return [_result(dims, sigma, **options) for sigma in (0.2, 0.4, 0.8)]


def _rows():
    return [
        {
            "sigma": sigma,
            "mahalanobis": value,
            "predictive": 0.9,
            "predictive_recalibrated": 1.1,
            "coverage": {"levels": [0.1, 0.5, 0.9], "recalibrated": [0.2, 0.6, 0.95]},
        }
        for sigma, value in ((0.2, 2.0), (0.4, None), (0.8, -1.0))
    ]


class _History:
    def __init__(self, step, norm=None, variance=None):
        self.step, self.first, self.validation_first = step, 64.0 / step, 80.0 / step
        self.loss, self.validation = 32.0 / step, -16.0 / step
        if norm is not None:
            self.gradient_norm, self.gradient_variance = norm, variance


def _texts(figure):
    """The boxes of all texts that are seen, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.majorTicks, *axis.minorTicks):
                shown = ax.axison and low <= tick.get_loc() <= high
                hidden |= set() if shown else {id(tick.label1), id(tick.label2)}
                hidden.add(id(tick.label2))  # the far side of the axes
    found = figure.findobj(lambda each: isinstance(each, Text))
    return [
        (text.get_text(), text.get_window_extent(canvas.get_renderer()))
        for text in found
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden
    ]


def _trace(dims):
    sizes = torch.rand(5, 32, dtype=torch.float64)
    sizes[2, 20:] = 1e9
    sizes[3, 30:] = torch.inf
    return plots.Trace(sizes, 1000, _result(dims).x)


FIGURES = {
    "denoise grey": lambda: plots.denoising_figure(_result(GREY)),
    "denoise one channel": lambda: plots.denoising_figure(_result((1, 7, 7)), rows=2),
    "denoise tall": lambda: plots.denoising_figure(_result((12, 5)), rows=2),
    "denoise colour": lambda: plots.denoising_figure(_result(COLOUR, clean=False)),
    "denoise signal": lambda: plots.denoising_figure(_result(SIGNAL)),
    "denoise pair": lambda: plots.denoising_figure(_result((2,), scale=30.0)),
    "uncertainty grey": lambda: plots.uncertainty_figure(_levels(GREY)),
    "uncertainty colour": lambda: plots.uncertainty_figure(_levels(COLOUR, clean=False)[:1]),
    "uncertainty four": lambda: plots.uncertainty_figure((2 * _levels(GREY))[:4], rows=1),
    "uncertainty signal": lambda: plots.uncertainty_figure(_levels(SIGNAL)),
    "calibration": lambda: plots.calibration_figure(_rows()),
    "calibration wide": lambda: plots.calibration_figure(
        [{**row, "mahalanobis": 300.0} for row in _rows()], _levels(SIGNAL), recalibration=1.2
    ),
    "chains": lambda: plots.chains_figure([("starts", _result(GREY).x)] * 3),
    "chains signal": lambda: plots.chains_figure([("ends", _result(SIGNAL).x)], columns=4),
    "chains trace": lambda: plots.chains_figure([("ends", _result(GREY).x)] * 2, _trace(GREY)),
    "chains trace signal": lambda: plots.chains_figure(
        [("ends", _result(SIGNAL).x)] * 3, _trace(SIGNAL)
    ),
    "training": lambda: plots.training_figure([_History(s) for s in range(1, 9)], size=64),
    "training gradient": lambda: plots.training_figure(
        [_History(s, 3.0 / s, 2.0) for s in range(1, 9)]
    ),
    "spread": lambda: plots.spread_figure(
        [("ozaki", 0.1, torch.rand(3, 4)), ("langevin", 0.1, torch.rand(3, 4))], torch.rand(3, 4)
    ),
}


@pytest.mark.parametrize(
    "name", [name for name in FIGURES if name.startswith(("chains", "spread"))]
)
def test_figures_of_chains_name_their_axes_and_units(name):
    figure = FIGURES[name]()
    labels = {ax.get_xlabel() for ax in figure.axes} | {ax.get_ylabel() for ax in figure.axes}
    assert any("(data units)" in label.replace("\n", " ") for label in labels)
    if "signal" in name:
        assert {"entry", "value (data units)"} <= labels
    if "trace" in name:
        assert {"step after the burn-in", "rms |x| (data units)"} <= labels
    if name == "spread":
        assert {"std of an entry, exact\n(data units)", "of the chains (data units)"} <= labels


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_on_another_or_outside(name):
    figure = FIGURES[name]()
    boxes = _texts(figure)
    assert len(boxes) >= 1
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= height + 1, text
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{one!r} on {two!r}"


@pytest.mark.parametrize(
    ("dims", "kind"),
    [
        ((8, 8), "grey"),
        ((1, 8, 8), "grey"),
        ((4, 8, 8), "grey"),
        ((3, 8, 8), "colour"),
        ((8,), "lines"),
        ((3, 8), "lines"),
        ((2, 2, 2, 2), "lines"),
    ],
)
def test_samples_are_shown_by_their_dims(dims, kind):
    assert scale_of(torch.zeros(2, *dims)).kind == kind


def test_the_range_is_that_of_8_bit_data_or_of_the_samples():
    values = torch.tensor([[-0.9, -0.8, -0.9, 0.5]] * 2).reshape(2, 2, 2).repeat(1, 2, 1)
    assert scale_of(values) == ("grey", -1.0, 1.0, "gray_r")
    assert scale_of(-values) == ("grey", -1.0, 1.0, "gray")  # no paper: light on light
    assert scale_of(10 * values)[1:3] == (pytest.approx(-9.0), pytest.approx(5.0))
    assert scale_of(torch.full((2, 4, 4), math.nan))[1:3] == (-1.0, 1.0)


def _shown(ax):
    return np.asarray(ax.images[0].get_array())


def test_images_of_digits_are_ink_on_paper_with_the_doubt_in_magma():
    result = _result(GREY)
    figure = plots.denoising_figure(result, rows=2)
    axes = figure.axes[:-1]
    titles = [ax.get_title() for ax in axes[:8]]
    assert titles == ["noisy", "denoised", "true", "std", "vector 1", "2", "3", "4"]
    assert len(axes) == 16
    for place, values in enumerate((result.x, result.posterior.mean, result.x0)):
        image = axes[8 + place].images[0]
        assert np.array_equal(_shown(axes[8 + place]), values[1].numpy())
        assert (image.get_cmap().name, image.get_clim()) == ("gray_r", (-1.0, 1.0))
    std = axes[11].images[0]
    assert np.array_equal(_shown(axes[11]), result.posterior.std[1].numpy())
    assert std.get_cmap().name == "magma"
    assert std.get_clim() == (0.0, result.posterior.std[:2].max().item())
    assert len(axes[11].collections) == 1  # the outline
    values, vectors = torch.linalg.eigh(result.posterior.covariance.dense()[1])
    first = vectors[:, -1] * vectors[vectors[:, -1].abs().argmax(), -1].sign()
    expected = (first / first.max()).reshape(GREY).numpy()
    np.testing.assert_allclose(_shown(axes[12]), expected, atol=1e-4)
    share = 100 * values[-1] / values.sum()
    assert axes[12].get_xlabel() == f"{share.item():.0f} %"
    assert figure.axes[-1].get_xlabel() == "std of a pixel (white is -1, ink 1)"


def test_images_in_colour_are_in_colour_and_their_eigenvectors_about_grey():
    result = _result(COLOUR, clean=False, scale=5.0)
    axes = plots.denoising_figure(result, rows=1).axes
    assert [ax.get_title() for ax in axes[:4]] == ["noisy", "denoised", "std", "vector 1"]
    mean = result.posterior.mean[0]
    low, high = mean.min(), mean.max()
    expected = ((mean - low) / (high - low)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(_shown(axes[1]), expected, atol=1e-6)
    assert 0 <= _shown(axes[0]).min() <= _shown(axes[0]).max() <= 1
    rms = result.posterior.std[0].square().mean(0).sqrt()
    np.testing.assert_allclose(_shown(axes[2]), rms.numpy(), rtol=1e-6)
    vector = torch.linalg.eigh(result.posterior.covariance.dense()[0])[1][:, -1]
    vector = vector / vector[vector.abs().argmax()]
    expected = ((1 + vector) / 2).reshape(COLOUR).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(_shown(axes[3]), expected, atol=1e-3)


def test_a_share_below_one_percent_is_not_zero():
    assert [percent(torch.tensor(x)) for x in (0.0712, 0.01, 0.0043)] == [
        "7 %",
        "1 %",
        "0.4 %",
    ]


def test_signals_are_lines_with_a_band():
    result = _result(SIGNAL)
    axes = plots.denoising_figure(result, rows=1).axes
    noisy, mean, true = axes[0].lines
    for line, values in (
        (noisy, result.x),
        (mean, result.posterior.mean),
        (true, result.x0),
    ):
        assert np.array_equal(line.get_ydata(), values[0].numpy())
    band = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    low, high = (result.posterior.mean[0] + k * result.posterior.std[0] for k in (-2, 2))
    assert band.min() == pytest.approx(low.min().item())
    assert band.max() == pytest.approx(high.max().item())
    assert len(axes[1].lines) == 5  # four vectors and zero


def test_uncertainty_is_shown_on_one_scale_for_all_levels():
    levels = _levels(GREY)
    axes = plots.uncertainty_figure(levels, rows=2).axes
    top = levels[2].posterior.std[:2].max().item()
    for j, result in enumerate(levels):
        assert np.array_equal(_shown(axes[7 + 1 + 2 * j]), result.x[1].numpy())
        image = axes[7 + 2 + 2 * j]
        assert np.array_equal(_shown(image), result.posterior.std[1].numpy())
        assert image.images[0].get_clim() == (0.0, pytest.approx(top))
        assert axes[1 + 2 * j].get_title() == f"sigma {result.sigma:g}: noisy, std"
    vector = torch.linalg.eigh(levels[1].posterior.covariance.dense()[0])[1][:, -1]
    vector = (vector / vector[vector.abs().argmax()]).reshape(GREY).numpy()
    np.testing.assert_allclose(_shown(axes[15]), vector, atol=1e-3)
    assert axes[15].get_title(loc="left").startswith("eigenvectors at sigma 0.4")


def test_uncertainty_grid_is_the_denoising_figure_in_pixels():
    grid = plots.uncertainty_grid(_result(GREY), rows=2)
    assert (grid.dtype, grid.shape[1:]) == (np.uint8, (920, 3))
    assert grid.min() == 0
    assert grid.max() == 255
    assert (grid[..., 0] != grid[..., 2]).any()  # colours
    assert plots.uncertainty_grid(_result(SIGNAL), rows=1).shape[1:] == (920, 3)


def test_calibration_leaves_out_what_does_not_exist_and_takes_coverage_from_either():
    axes = plots.calibration_figure(_rows()).axes
    assert [len(each.get_offsets()) for each in axes[0].collections] == [1, 3, 3]
    assert np.array_equal(axes[1].lines[1].get_ydata(), [0.2, 0.6, 0.95])
    levels = _levels(SIGNAL)
    curve = plots.calibration_figure(_rows(), levels, recalibration=1.5).axes[1].lines[1]
    probability, share = curve.get_data()
    for nominal, value in list(zip(probability, share, strict=True))[::12]:
        low, high = levels[0].posterior.recalibrated(1.5).credible_interval(nominal)
        inside = (low <= levels[0].x0) & (levels[0].x0 <= high)
        assert value == pytest.approx(inside.float().mean().item(), abs=0.011)


def test_training_curves_are_errors_of_an_entry_where_the_size_is_given():
    history = [_History(step, 3.0, 4.0) for step in range(1, 9)]
    axes = plots.training_figure(history, size=64).axes
    assert axes[0].get_ylabel() == "squared error / sigma²"
    assert axes[0].lines[0].get_ydata()[1] == pytest.approx(0.5)
    assert axes[0].lines[1].get_ydata()[1] == pytest.approx(80 / 128)
    assert axes[1].get_ylabel() == "loss / entry"
    assert [line.get_ydata()[1] for line in axes[1].lines] == [0.25, -0.125]
    assert list(axes[2].lines[0].get_ydata()) == [3.0] * 8
    assert list(axes[2].lines[1].get_ydata()) == [2.0] * 8  # the root of the variance
    axes = plots.training_figure(history).axes
    assert axes[0].get_ylabel() == "squared error / sigma², sum"
    assert axes[0].lines[0].get_ydata()[1] == 32.0
    assert axes[1].get_ylabel() == "loss, sum"
    assert axes[1].lines[0].get_ydata()[1] == 16.0
    assert len(plots.training_figure([_History(1), _History(2)]).axes) == 2
    axes = plots.training_figure([_History(1, 3.0), _History(2, 3.0)]).axes
    assert len(axes[2].lines) == 1


def test_training_curves_have_whole_steps_and_show_a_single_one():
    figure = plots.training_figure([_History(step, 3.0, 4.0) for step in (1, 2, 3)])
    single = plots.training_figure([_History(1, 3.0, 4.0)])
    for each in (figure, single):
        assert all(tick == int(tick) for tick in each.axes[-1].get_xticks())
    assert {line.get_marker() for line in single.axes[0].lines} == {"o"}
    assert {line.get_marker() for line in figure.axes[0].lines} == {"None"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plots.denoising_figure(_result(GREY), rows=0),
            r"^denoising_figure: rows must be at least 1, got 0$",
        ),
        (
            lambda: plots.uncertainty_figure(_levels(GREY), rows=0),
            r"^uncertainty_figure: rows must be at least 1, got 0$",
        ),
        (
            lambda: plots.uncertainty_figure([]),
            r"^uncertainty_figure: results must be 1 to 4 levels, got 0$",
        ),
        (
            lambda: plots.uncertainty_figure(2 * _levels(GREY)),
            r"^uncertainty_figure: results must be 1 to 4 levels, got 6$",
        ),
        (
            lambda: plots.calibration_figure(_rows(), _levels(GREY, clean=False)),
            r"^calibration_figure: results must hold the clean samples, got None$",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
