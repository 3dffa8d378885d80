"""The examples run as they stand, and say what their text promises."""

import io
import json
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fused_loss_trains_the_same_network_as_the_dense_expression():
    printed = run("drop_in_loss.py", "--steps", "50")
    dense, fused, apart = (float(n) for n in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", printed))
    assert dense == fused
    assert apart < 1e-12


def test_a_loop_of_ones_own_and_train_learn_from_the_same_data_set():
    printed = run("dataloader_loop.py", "--quick")
    found = re.findall(
        r"^(.*?)\s+error (\S+) \(noisy 0.25\)  error / variance (\S+)$", printed, re.M
    )
    assert [name for name, *_ in found] == ["own loop", "train()"]
    for _, error, ratio in found:
        assert float(error) < 0.18  # noisy 0.25
        assert 0.8 < float(ratio) < 1.25


def test_readme_example_prints_the_number_beside_it():
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code, expected = re.search(r"```python\n(.*?)```.*?prints `(.*?)`", readme, re.S).groups()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_many_second_order_steps_beat_one(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("one_step_or_many.py", "--quick", "--out", str(out))
    lines = re.findall(r"^(\d+ steps?: .*?)\s{2,}(-?\d+\.\d+)", printed, re.M)
    energy = {name.strip(): float(value) for name, value in lines}
    mean, one = energy["1 step: mean"], energy["1 step: mean + covariance"]
    assert energy["5 steps: second order"] < one < mean
    assert energy["5 steps: second order"] < energy["5 steps: ancestral"]
    assert out.stat().st_size > 10_000


def numbers(printed: str, start: str) -> list[float]:
    """The numbers of the line that starts so."""
    line = next(line for line in printed.splitlines() if line.startswith(start))
    return [float(n) for n in re.findall(r"-?\d+\.\d+", line[len(start) :])]


def test_calibrated_uncertainty_recalibrates(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("calibrated_uncertainty.py", "--quick", "--out", str(out))
    for sigma in ("0.2", "0.4", "0.8"):
        before = numbers(printed, f"sigma {sigma}, as trained")[0]
        after = numbers(printed, f"sigma {sigma}, covariance times")[1]
        assert abs(after - 1) <= abs(before - 1) + 0.02
        assert 0.85 < after < 1.15
    assert out.stat().st_size > 10_000


def test_outlier_scores_are_compared_on_every_corruption(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("out_of_distribution.py", "--quick", "--out", str(out))
    rows = [re.findall(r"\d\.\d{3}", line) for line in printed.splitlines()[1:]]
    assert [len(row) for row in rows] == [4] * 18  # six corruptions at three noise levels
    assert all(0 <= float(value) <= 1 for row in rows for value in row)
    for start in ("shuffled pixels      0.2", "inversion            0.2"):
        assert min(numbers(printed, start)) > 0.9  # after a hundred steps already
    assert out.stat().st_size > 10_000


def test_outlier_example_reads_pictures_of_a_parquet_file(tmp_path):
    pytest.importorskip("matplotlib")
    pyarrow = pytest.importorskip("pyarrow")
    image = pytest.importorskip("PIL.Image")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = []
    for shade in range(5):
        file = io.BytesIO()
        image.new("RGB", (32, 32), (50 * shade, 0, 255 - 50 * shade)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    path = tmp_path / "pictures.parquet"
    parquet.write_table(pyarrow.table({"img": rows, "label": list(range(5))}), path)
    out = tmp_path / "figure.png"
    printed = run("out_of_distribution.py", "--quick", "--other", str(path), "--out", str(out))
    assert len(numbers(printed, "other pictures       0.4")) == 4


def test_any_denoiser_has_a_calibrated_posterior(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("any_denoiser.py", "--quick", "--out", str(out))
    for name in ("trace ratio", "mahalanobis"):
        value = float(re.search(rf"{name}\D*(\d+\.\d+)", printed).group(1))
        assert 0.8 < value < 1.25
    assert out.stat().st_size > 10_000


def test_guidance_beats_its_absence_on_blurred_digits(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("inverse_problems.py", "--quick", "--out", str(out))
    assert "inpainting" in printed
    blurred = printed.split("deblurring")[1]
    guided, free = (
        numbers(blurred, f"  {name}, 5 steps")[0] for name in ("learned C, functions", "unguided")
    )
    assert guided < 0.85 * free  # after 30 training steps already
    assert out.stat().st_size > 10_000


def test_likelihood_by_the_learned_trace_is_that_of_the_exact_one(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("likelihood.py", "--quick", "--out", str(out))
    learned, exact = (numbers(printed, f"  {name}")[0] for name in ("learned", "exact, D products"))
    assert learned == pytest.approx(exact, rel=1e-2)  # exact scores: the same trace
    assert out.stat().st_size > 10_000


def test_a_flow_model_has_the_covariance_of_its_posterior(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("flow_model.py", "--quick", "--out", str(out))
    for t in ("0.2", "0.4", "0.6", "0.8"):
        _, head, jacobian = numbers(printed, f"t {t}")
        assert max(head, jacobian) < 0.9  # after 300 training steps; 0.1 after 2500
    _, second, without = numbers(printed, "  8 steps")
    assert second < without / 2
    assert out.stat().st_size > 10_000


def test_a_head_on_a_pretrained_denoiser_has_no_negative_variance(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage", reason="photographs need hos_ext[photos]")
    out, told = tmp_path / "figure.png", tmp_path / "result.json"
    head = tmp_path / "head.pt"
    arguments = ("--out", str(out), "--json", str(told), "--save", str(head))
    printed = run("pretrained_denoiser.py", "--quick", *arguments)
    found = json.loads(told.read_text())
    for line in found["table"]:
        assert 30 < line["head"]["psnr"] < 38  # as published: the weights are in their places
        assert line["head"]["negative"] == 0
        assert 0.2 < line["head"]["trace_ratio"] < 5  # hardly trained
        assert line["autodiff"]["negative_by_probes"] > 0.02
        assert 0.6 < line["autodiff"]["trace_ratio"] < 2
    assert found["faster"] > 5
    assert "times faster than 16 probes" in printed
    assert out.stat().st_size > 10_000
    assert head.exists()


def test_latents_are_decoded_with_their_error():
    pytest.importorskip("diffusers")
    printed = run("latents.py", "--quick")
    for method in ("linear", "samples"):
        std, error, ratio, _ = numbers(printed, f"  pixels, {method:8}: std")
        assert 0 < error < std
        assert 0.2 < ratio < 5


@pytest.mark.slow
def test_digits_are_of_the_class_that_they_were_asked_to_be(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("class_conditional.py", "--quick", "--out", str(out))
    errors = {
        name: numbers(printed, f"  {name} label: squared error")[0]
        for name in ("right", "no", "wrong")
    }
    assert errors["right"] < errors["no"] < errors["wrong"]
    plain, _ = numbers(printed, "  scale 1: recognised")
    guided, _ = numbers(printed, "  scale 2.5: recognised")
    assert 0.2 < plain < guided
    assert numbers(printed, "  scale 1: no covariance at") == [0.0]
    assert out.stat().st_size > 3_000


def test_own_eps_network_is_read_rightly_and_gets_a_calibrated_head(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    printed = run("own_eps_network.py", "--quick", "--out", str(out))
    rightly, wrongly = printed.split("read wrongly:")
    assert rightly.rstrip().endswith("fine")
    for name in ("as x0", "as v", "as a score itself"):
        line = next(line for line in wrongly.splitlines() if line.startswith(f"  {name}:"))
        assert "is this prediction='eps'" in line
    for name in ("trace ratio", "mahalanobis"):
        for value in re.findall(rf"{name} (\d+\.\d+)", printed):
            assert 0.8 < float(value) < 1.25
    assert out.stat().st_size > 10_000


def test_rules_for_the_line_integral_leave_the_bias_that_is_promised():
    printed = run("exact_from_scores.py", "--chains", "4000", "--steps", "30")
    rows = dict(re.findall(r"^(.*?)\s+([+-]\d+\.\d)\s+0\.\d+\s+\d", printed, re.M))
    assert abs(float(rows.pop("trapezoid"))) > 5
    assert list(rows) == ["simpson", "lobatto-2", "lobatto-3", "two coins", "the density itself"]
    assert all(abs(float(error)) < 3.5 for error in rows.values())
    assert "0 scores beyond the bound" in printed


def test_causes_come_before_their_effects():
    printed = run("causal_order.py", "--quick")
    edges = int(re.search(r"12 variables, (\d+) edges", printed)[1])
    chance, ours = (int(n) for n in re.findall(r"edges turned by .*: (\d+)", printed))
    assert ours < 0.2 * edges
    assert ours < chance
