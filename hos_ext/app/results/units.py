"""Whether the numbers of a file can be in the units they are said to be in.

Noise takes data in [0, 1] out of [0, 1], so the ends of what a file holds decide nothing. What
decides is how far its values spread, beside the model's scale and the noise level that is given.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np

from ...checks import check
from .. import data

UNITS = ("auto", "raw", "unit", "signed", "data")
# Values that an estimate of a spread needs; few may lie close together by chance.
_ENOUGH = 16


def to_data_units(
    path: Path,
    values: np.ndarray,
    scaling: data.Scaling,
    *,
    sigma: float,
    std: float = 1.0,
    units: str = "auto",
) -> np.ndarray:
    """Noisy values of a file in data units, float64.

    Whole levels (uint8) are raw units. Floating values are judged where `units` is "auto", with
    s = sigma in data units, and raw units in which the noise has level s * scale:

    * For a model of 16 levels or more: if 99 of 100 values lie within 1 + 6 s of zero, they fit
      [0, 1] or [-1, 1] with noise of that scale. In raw units noise alone would take one in three
      further, unless a picture is black and the noise below half a level. They are refused.
      So they are where the noise has one level r or less, and 99 of 100 lie within 1 + 3 r: r may
      have been given in units of [0, 1]. That costs a picture with no level above 1 + 3 r.
    * 16 values or more whose standard deviation is below a quarter of the noise cannot hold it.
    * Values whose root mean square, in data units, is many times sqrt(std^2 + s^2) are of another
      scale: 3 times where data units end at 1, 10 times where they do not, more for few values.
      Of 64 values or more, twice that size is said in a warning.

    Args:
        path: of the file, for messages.
        values: uint8 or floating, finite.
        scaling: of the data that the model was trained on.
        sigma: noise level of the values. Data units.
        std: root mean square of the training data. Data units.
        units: "auto"; or what the user knows: "raw"; "unit" for [0, 1] and "signed" for [-1, 1]
            from the lowest level to the highest; "data" for data units.

    Returns:
        Shape of values.

    Raises:
        ValueError: the values may be in other units; both readings are named.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from hos_ext.app.data import Scaling
        >>> from hos_ext.app.results.units import to_data_units
        >>> white = np.ones((1, 4))
        >>> to_data_units(Path("a.npy"), white, Scaling(levels=256), sigma=0.1, units="unit")
        array([[0.99609375, 0.99609375, 0.99609375, 0.99609375]])
    """
    wide, top = values.astype(np.float64), scaling.levels - 1
    whole = values.dtype.kind == "u"
    if units in ("unit", "signed"):
        rule = f"--units {units} must come with floating values and a model of whole levels"
        check("denoise", top > 0 and not whole, rule, f"{values.dtype} in {path}")
        wide = wide * top if units == "unit" else (wide + 1) / 2 * top
    elif units == "data":
        check("denoise", not whole, "--units data must come with floating values", path)
        return wide
    x: np.ndarray = (wide - np.asarray(scaling.shift)) / np.asarray(scaling.scale)
    if units == "auto" and scaling.by_column:
        # Judged as data units are: raw ones differ from column to column.
        _judge(path, x, x, data.Scaling(), sigma, std)
    elif units == "auto" and not whole:
        _judge(path, wide, x, scaling, sigma, std)
    return x


def _judge(
    path: Path, raw: np.ndarray, x: np.ndarray, scaling: data.Scaling, sigma: float, std: float
) -> None:
    """Refuses floating values that other units fit as well as raw ones, or better."""
    got = f"floating values {raw.min():g} to {raw.max():g}"
    other, way = "units of their own", "--units raw or data says which they are"
    mean, deviation = (float(np.mean(each)) for each in (scaling.mean, scaling.std))
    rule = f"{path} must hold raw units, mean {mean:g} and standard deviation {deviation:g} "
    if scaling.levels:
        other = "[0, 1] or [-1, 1]"
        way = "--units raw, unit, signed or data says which they are"
        rule = f"{path} must hold raw units, 0 to {scaling.levels - 1} "
    rule += "before noise was added"
    noise, spread = float(sigma * np.asarray(scaling.scale)), float(raw.std())
    reach = 1 + max(6 * sigma, 3 * noise if noise <= 1 else 0)
    near = np.mean(np.abs(raw) <= reach) >= 0.99
    fits = scaling.levels < 16 or not near
    check("denoise", fits, rule, f"{got}, which {other} with noise fit as well ({way})")
    said = f"{got} that spread by {spread:.3g}, where noise alone is {noise:.3g}: {other}? ({way})"
    check("denoise", raw.size < _ENOUGH or spread >= noise / 4, rule, said)
    size, usual = float(np.sqrt(np.mean(np.square(x)))), math.sqrt(std**2 + sigma**2)
    most = (3 * max(1.0, 1 / usual) if scaling.levels else 10) * (1 + 3 / math.sqrt(raw.size))
    said = f"{got}, {size / usual:.3g} times the size of the data: other units? ({way})"
    check("denoise", size <= most * usual, rule, said)
    if raw.size >= 64 and size > 2 * usual:
        warnings.warn(f"denoise: {path} holds {said}", stacklevel=2)
