"""The model card of a run: what it was trained on and how, and whether its uncertainty is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import PurePath
from typing import Any

# Options whose targets may be paths of the machine that trained.
_PLACES = ("data", "test_data", "first_order")
# Columns of the table of calibration: heading, and name of the figure.
_COLUMNS = {
    "sigma": "sigma",
    "error noisy": "mse_noisy",
    "denoised": "mse_denoised",
    "Mahalanobis": "mahalanobis",
    "predictive": "predictive",
    "predictive, recalibrated": "predictive_recalibrated",
}


def without_paths(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a run without the folders of the machine that trained it.

    `parquet:/home/me/mnist/train.parquet` becomes `parquet:train.parquet`; `hf:NAME` stays.
    """
    found = deepcopy(dict(facts))
    found.pop("launch", None)
    for name in _PLACES:
        if found["options"].get(name):
            found["options"][name] = _short(found["options"][name])
    found["data"]["spec"] = _short(found["data"]["spec"])
    return found


def _short(spec: str) -> str:
    word, colon, target = spec.partition(":")
    return spec if word == "hf" or not colon else f"{word}:{PurePath(target).name}"


def card_sections(
    facts: Mapping[str, Any], report: Mapping[str, Any], figures: Sequence[str]
) -> str:
    """Data, objective and calibration, as Markdown.

    Args:
        facts: of the run, as `runs.load_run` gives them.
        report: of `evaluation.evaluate` on held-out samples.
        figures: names of pictures that lie beside the card; the first is that of the calibration.
    """
    data, options = facts["data"], facts["options"]
    low, high = options["sigma"]
    counts = [data["n_train"] or "a stream of", data["n_validation"], data["n_test"]]
    parts = "{} to train on, {} to tune on, {} to report on".format(*counts)
    levels = data["scaling"].get("levels") or 0
    units = (
        f"raw levels 0 to {levels - 1} lie in [-1, 1]" if levels else "raw numbers, standardised"
    )
    trained = [
        (
            "objective",
            f"{options['objective']}, weight of the first-order term {options['gamma']:g}",
        ),
        ("noise levels", f"sigma {low:g} to {high:g}, log-uniform, data units"),
        ("steps", f"{facts['step']:,} of {options['batch_size']} samples"),
        ("learning rate", f"{options['learning_rate']:g}, decay {options['decay']}"),
        ("average of the weights", options["ema_decay"]),
        ("precision", options["mixed_precision"]),
        ("parameters trained", f"{facts['parameters']:,}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]
    table = [
        [f"{row[key]:.4g}" if row.get(key) is not None else "-" for key in _COLUMNS.values()]
        for row in report["levels"]
    ]
    meaning = (
        f"On {report['n']} held-out samples, the same for every level. Errors are squared, of an "
        "entry, in data units. A figure of 1 is calibrated; above, errors are larger than the "
        f"covariance says. The covariance times {facts['recalibration']:.4g} is the recalibrated "
        "one."
    )
    told = [
        ("set", f"`{data['spec']}`"),
        ("samples", parts),
        ("shape", f"`{tuple(data['shape'])}`"),
        ("data units", f"{units}; standard deviation {data['std']:.4g}"),
    ]
    pictures = [f"![{name.partition('.')[0]}]({name})" for name in figures]
    paragraphs = ["## Data", _table(("data", ""), told)]
    paragraphs += ["## Objective", _table(("training", ""), trained)]
    paragraphs += ["## Calibration", meaning, _table(_COLUMNS, table), *pictures]
    return "\n\n".join(paragraphs)


def _table(header: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown."""
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
