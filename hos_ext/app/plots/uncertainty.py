"""The same samples at several noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...checks import check, check_count
from . import samples
from .style import BESIDE, BLUE, array, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation import Denoised


def uncertainty_figure(results: Sequence[Denoised], *, rows: int = 3) -> Figure:
    """The same samples at several noise levels: where the doubt is, and in which directions.

    Above, noisy sample and standard deviation (the root of the covariance's diagonal) at each
    level, on one scale; below, the eigenvectors at the middle one of the levels. Meng et al. 2021
    show these of MNIST as Figs. 3 and 4. Signals: left the standard deviation at all levels, right
    the eigenvectors.

    Args:
        results: `denoise` of the same samples, one for each level, in the order shown; at most 4.
        rows: samples shown, the first ones.

    Returns:
        Figure.

    Raises:
        ValueError: no results, more than 4, or rows out of range.
    """
    where = "uncertainty_figure"
    rows = check_count(where, "rows", rows)
    check(where, 1 <= len(results) <= 4, "results must be 1 to 4 levels", len(results))
    rows = min(rows, *(len(result.x) for result in results))
    middle = results[len(results) // 2]
    known = middle.posterior.mean if middle.x0 is None else middle.x0
    scale = samples.scale_of(known[:rows])
    if scale.kind == "lines":
        return _lines(results, rows)
    return _images(results, rows, scale)


def _images(results: Sequence[Denoised], rows: int, scale: samples.Scale) -> Figure:
    """`uncertainty_figure` for images."""
    middle = results[len(results) // 2]
    columns = max(1 + 2 * len(results), 5)
    share, vectors = samples.components(middle, rows, columns - 1)
    cell = samples.cell_height(middle.x.shape[1:], columns)
    block = rows * cell + (rows - 1) * 0.06
    lower = rows * (cell + 0.17)
    height = 0.24 + block + 0.36 + lower + 0.5
    figure = new_figure(height, layout=None)

    def grid(bottom: float, tall: float, gap: float, used: int) -> Any:
        """Axes in a block between these inches; those right of the columns used are blank."""
        axes = figure.add_gridspec(
            rows,
            columns,
            left=0.01,
            right=0.99,
            bottom=bottom / height,
            top=(bottom + tall) / height,
            wspace=0.1,
            hspace=gap / cell,
        ).subplots(squeeze=False)
        for ax in axes[:, used:].flatten():
            ax.axis("off")
        return axes

    upper = grid(0.5 + lower + 0.36, block, 0.06, 1 + 2 * len(results))
    under = grid(0.5 + 0.17, lower - 0.17, 0.17, 1 + share.shape[1])
    image = _levels(upper, results, scale)
    for i, line in enumerate(under):
        samples.show(line[0], middle.posterior.mean[i], scale)
        for ax, vector, part in zip(line[1:], vectors[i].unbind(-1), share[i], strict=False):
            samples.show_vector(ax, vector, part, scale)
    under[0, 0].set_title("denoised", fontsize=7.5, pad=3)
    under[0, 1].set_title(
        f"eigenvectors at sigma {middle.sigma:g}, share of the variance",
        fontsize=7.5,
        pad=3,
        loc="left",
    )
    samples.std_bar(figure, image, height, scale)
    return figure


def _levels(axes: Any, results: Sequence[Denoised], scale: samples.Scale) -> Any:
    """The upper block: the samples, and at each level noisy and std. Returns an image of std."""
    rows, middle = len(axes), results[len(results) // 2]
    known = middle.posterior.mean if middle.x0 is None else middle.x0
    top = max(samples.top_std(result.posterior.std[:rows]) for result in results)
    image: Any = None
    for i, line in enumerate(axes):
        samples.show(line[0], known[i], scale)
        for noisy, std, result in zip(line[1::2], line[2::2], results, strict=False):
            samples.show(noisy, result.x[i], scale)
            law = result.posterior
            image = samples.show_std(std, law.std[i], top, law.mean[i], scale)
    left = "denoised" if middle.x0 is None else "true"
    axes[0, 0].set_title(left, fontsize=7.5, pad=3)
    for ax, result in zip(axes[0, 1::2], results, strict=False):
        # One title over both columns of the level.
        title = f"sigma {result.sigma:g}" + (": noisy, std" if len(results) <= 3 else "")
        ax.set_title(title, fontsize=7.5, pad=3, x=1.05)
    return image


def _lines(results: Sequence[Denoised], rows: int) -> Figure:
    """`uncertainty_figure` for signals and vectors."""
    middle = results[len(results) // 2]
    share, vectors = samples.components(middle, rows, samples.COMPONENTS)
    stds: list[Tensor] = [result.posterior.std for result in results]
    figure = new_figure(0.35 + 1.15 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    mark = samples.point_mark(middle.x[0].numel())
    for i, (ax, right) in enumerate(axes):
        for j, (result, std) in enumerate(zip(results, stds, strict=True)):
            shade = 0.3 + 0.7 * (j + 1) / len(results)
            label = f"sigma {result.sigma:g}"
            values = array(std[i].flatten())
            ax.plot(values, color=BLUE, alpha=shade, lw=1.1, marker=mark, ms=2.5, label=label)
        samples.vector_lines(right, vectors[i], share[i], mark)
        ax.set_ylim(bottom=0.0)
        for each in (ax, right):
            each.tick_params(labelsize=7)
            each.legend(**BESIDE)
    axes[0, 0].set_title("std", fontsize=7.5, pad=4)
    axes[0, 1].set_title(f"eigenvectors at sigma {middle.sigma:g}", fontsize=7.5, pad=4)
    samples.name_entries(axes)
    return figure
