"""The digits: split, dequantisation, distortion."""

import sys

import pytest
import torch

from hos_ext import data


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load_digits(seed=0)


def _rows(grey: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, grey.flatten(1).tolist()))


def test_load_digits_splits_every_digit_into_exactly_one_part(digits):
    from sklearn.datasets import load_digits

    assert [len(part) for part in digits] == [1257, 180, 360]
    everything = torch.from_numpy(load_digits().images).float()
    assert _rows(torch.cat(digits)) == _rows(everything)


def test_load_digits_split_is_fixed_by_the_seed(digits):
    again, other = data.load_digits(seed=0), data.load_digits(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(digits, again, strict=True))
    assert not torch.equal(digits.test, other.test)
    # Known answer: a split that moves would test old checkpoints on digits they were trained on.
    assert digits.test[:5].sum((1, 2)).tolist() == [315, 185, 371, 300, 365]


def test_load_digits_refuses_parts_that_leave_nothing():
    with pytest.raises(
        ValueError,
        match=r"^load_digits: validation and test must be at least 1 and "
        r"sum to less than 1797, got 0 and 360$",
    ):
        data.load_digits(validation=0)
    with pytest.raises(ValueError, match=r"got 800 and 997$"):
        data.load_digits(validation=800, test=997)


def test_load_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        RuntimeError,
        match=r"^load_digits: sklearn\.datasets must be installed "
        r"\(pip install hos_ext\[app\]\), got: ",
    ):
        data.load_digits()


def test_to_grey_inverts_dequantise(digits):
    x = data.dequantise(digits.train, seed=3)
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(data.to_grey(x), digits.train)
    assert torch.equal(
        data.to_grey(torch.tensor([-1.3, 1.0, 2.0])), torch.tensor([0.0, 16.0, 16.0])
    )


def test_dequantise_spreads_a_level_uniformly_over_its_width(digits):
    x = data.dequantise(digits.train.double(), seed=3)
    u = ((x + 1) * 17 / 2 - digits.train).flatten()
    assert u.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / len(u)) ** 0.5)
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)


def test_dequantise_is_a_function_of_seed_offset_and_row(digits):
    grey = digits.test
    whole = data.dequantise(grey, seed=3, offset=5)
    assert torch.equal(whole, data.dequantise(grey, seed=3, offset=5))
    assert torch.equal(whole[100:], data.dequantise(grey[100:], seed=3, offset=5, first=100))
    assert not torch.equal(whole, data.dequantise(grey, seed=3, offset=6))
    assert not torch.equal(whole, data.dequantise(grey, seed=4, offset=5))


def test_distort_moves_digits_a_little_and_keeps_grey_levels(digits):
    bent = data.distort(digits.train, seed=0)
    assert torch.equal(bent, bent.round())
    assert bent.min() == 0
    assert bent.max() == 16
    both = torch.stack([digits.train.flatten(1), bent.flatten(1)])
    centred = both - both.mean(-1, keepdim=True)
    alike = (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))
    assert 0.85 < alike.mean() < 0.99
    assert alike.min() > 0.3
    # No drift: averaged over all digits, the centre of mass stays where it is, in pixels.
    for axis in (1, 2):
        place = torch.arange(8.0)
        centre = [(g.sum(3 - axis) * place).sum(-1) / g.sum((1, 2)) for g in (digits.train, bent)]
        assert (centre[1] - centre[0]).mean().abs() < 0.03
        assert 0.1 < (centre[1] - centre[0]).std() < 0.4


def test_distort_is_a_function_of_seed_offset_and_row(digits):
    grey = digits.test
    whole = data.distort(grey, seed=3, offset=5)
    assert torch.equal(whole[7:], data.distort(grey[7:], seed=3, offset=5, first=7))
    assert not torch.equal(whole, data.distort(grey, seed=3, offset=6))
    assert not torch.equal(whole, data.distort(grey, seed=2, offset=5))


def test_distort_refuses_other_shapes():
    with pytest.raises(
        ValueError,
        match=r"^distort: grey must have shape \(B, height, width\), "
        r"got \(4, 64\)$",
    ):
        data.distort(torch.zeros(4, 64), seed=0)


def test_dequantise_and_distort_take_an_empty_batch():
    for function in (data.dequantise, data.distort):
        grey = torch.zeros(0, 8, 8, dtype=torch.float64)
        result = function(grey, seed=0)
        assert (result.shape, result.dtype) == (grey.shape, grey.dtype)
        assert result is not grey


@pytest.mark.parametrize("function", [data.dequantise, data.distort])
def test_dequantise_and_distort_refuse_other_kinds_under_their_own_name(function):
    name = function.__name__
    with pytest.raises(
        ValueError, match=rf"^{name}: grey must have dtype float32, float64, got torch\.int64$"
    ):
        function(torch.zeros(4, 8, 8, dtype=torch.int64), seed=0)
    with pytest.raises(TypeError, match=rf"^{name}: grey must be a Tensor, got list$"):
        function([[1.0]], seed=0)
