"""`hos-ext demo --quick`: the files, the numbers twice, the report and what it tells to do next."""

import json
import math
import re
import shlex

import pytest

from hos_ext.app import cli, report, runs
from hos_ext.app.report import _meaning, _number, _verdict

SCHEMA = {
    "denoise": {"sigma", "mse_noisy", "mse_denoised"},
    "calibration": {
        "sigma",
        "mahalanobis",
        "trace_ratio",
        "mahalanobis_recalibrated",
        "trace_ratio_recalibrated",
        "predictive",
        "predictive_recalibrated",
        "n",
    },
    "sampling": {
        "method",
        "step_size",
        "min_ess",
        "us_per_step",
        "spread",
        "energy_distance",
    },
}
TIMES = ("us_per_step", "seconds", "steps_per_second", "total_seconds")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(["demo", "--quick", "--seed", "3"]) == 0
    return folder / "demo"


@pytest.fixture(scope="module")
def metrics(demo):
    return json.loads((demo / "metrics.json").read_text())


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def test_demo_writes_report_metrics_figures_and_the_run(demo):
    assert sorted(path.name for path in demo.iterdir()) == [
        "calibration.png",
        "chains.png",
        "denoise-0.2.png",
        "denoise-0.4.png",
        "denoise-0.8.png",
        "metrics.json",
        "report.html",
        "run",
        "spread.png",
        "training.png",
    ]
    assert runs.load_run(demo / "run")[1]["options"]["seed"] == 3
    assert (demo / "training.png").read_bytes() == (demo / "run" / "training.png").read_bytes()


def test_demo_metrics_have_exactly_the_documented_keys(metrics):
    assert set(metrics) == {*SCHEMA, "train"}
    for name, keys in SCHEMA.items():
        assert all(set(row) == keys for row in metrics[name])
    assert [row["sigma"] for row in metrics["denoise"]] == [0.2, 0.4, 0.8]
    assert [row["sigma"] for row in metrics["calibration"]] == [0.2, 0.4, 0.8]
    assert {row["method"] for row in metrics["sampling"]} == {"langevin", "ozaki"}
    assert metrics["calibration"][0]["n"] == metrics["train"]["n_test"] == 360
    assert metrics["train"]["rank"] == 16


def test_demo_with_the_same_seed_gives_the_same_numbers(metrics, tmp_path):
    assert cli.run(["demo", "--quick", "--seed", "3", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert _without_times(again) == _without_times(metrics)


def test_report_is_self_contained_and_readable_on_a_phone(demo):
    page = (demo / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    assert "url(" not in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert str(demo.parent) not in page


def test_report_shows_the_numbers_of_the_metrics(demo, metrics):
    page = (demo / "report.html").read_text()
    shown = [row[key] for name, keys in SCHEMA.items() for row in metrics[name] for key in keys]
    for value in shown:
        text = _number(value) if isinstance(value, float) else str(value)
        assert text in page
    assert f"{metrics['train']['recalibration']:.3f}" in page


def test_report_says_whether_the_posteriors_are_calibrated():
    good = [{"predictive_recalibrated": 1.0}, {"predictive_recalibrated": 1.24}]
    text = " ".join(_verdict(good).split())
    assert "Yes: the recalibrated predictive figure lies within 0.8 to 1.25 at every" in text
    for bad in (0.79, 1.26, float("nan")):
        assert "Not yet" in _verdict([*good, {"predictive_recalibrated": bad}])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.01235"), (9876.5, "9876"), (12345.6, "12346"), (-2e4, "-20000")],
)
def test_report_writes_numbers_without_exponents(value, text):
    assert _number(value) == text


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ((0.9, 1.1), "0.90 to 1.10: C is about right"),
        ((0.9, 1.6), "0.90 to 1.60: in directions that C calls nearly certain, errors are larger"),
        ((0.5, 1.1), "0.50 to 1.10: C is too wide"),
    ],
)
def test_report_says_what_the_raw_figures_mean(figures, text):
    assert text in _meaning([{"mahalanobis": value} for value in figures])


def _row(method, step_size, ess, spread):
    law = {"spread": spread, "energy_distance": abs(spread - 1) / 10}
    return {"method": method, "step_size": step_size, "min_ess": ess, "us_per_step": 100.0, **law}


def test_a_large_ess_of_a_wrong_law_is_not_said_to_win():
    rows = [_row("langevin", 0.16, 5000.0, 1.4), _row("ozaki", 0.16, 900.0, 1.03)]
    verdict = report._chains_verdict(rows)
    assert "ozaki with h = 0.16 has the largest ESS, 900" in " ".join(verdict.split())
    assert (
        "langevin with h = 0.16 has more, 5000, but of a wrong law: its spread is 1.40" in verdict
    )
    table = report._sampling(rows)
    line = next(line for line in table.splitlines() if "langevin" in line)
    assert '<span class="bad">1.4</span>' in line
    assert "5000" in line
    assert '<span class="bad">' not in next(line for line in table.splitlines() if "ozaki" in line)
    assert "No chain here keeps the spread" in report._chains_verdict(rows[:1])
    lost = [_row("ozaki", 0.2, math.nan, math.nan), rows[1]]
    assert "ozaki with h = 0.16 has the largest ESS" in report._chains_verdict(lost)
    assert "No chain here" in report._chains_verdict(lost[:1])


def test_report_commands_and_example_work_as_printed(demo, monkeypatch, capsys):
    page = (demo / "report.html").read_text()
    commands, example = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    monkeypatch.chdir(demo.parent)
    capsys.readouterr()
    exec(compile(example.replace("&quot;", '"'), "example", "exec"), {})
    assert "torch.Size([8, 8, 8])" in capsys.readouterr().out
    assert len(example.strip().splitlines()) <= 12
    short = {
        "chains": ["--steps", "4", "--chains", "2"],
        "train": ["--steps", "2", "--width", "8", "--tracker", "none"],
        "evaluate": ["--limit", "20"],
    }
    for line in commands.splitlines():
        words = shlex.split(line)[1:]
        assert cli.run(words + short.get(words[0], [])) == 0
