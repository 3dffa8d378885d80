"""The paper's experiments: their data are what they say, and every item runs and resumes."""

from __future__ import annotations

import csv
import importlib
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from bench import libraries, rows
from bench.paper import __main__ as paper
from bench.paper import chains, claims, figures, images, mixing, networks, sets, table1, table2
from bench.paper.record import Folders, Record, Unfinished, mean_std
from hos_ext import UnscaledScores
from hos_ext.app.data import open_source
from hos_ext.linalg import ScoreHessian

# By torch itself, where it differentiates forward.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning",
    "ignore:.*performance drop.*:UserWarning",
    "ignore:.*use of fork.*:DeprecationWarning",
)

for _extra in ("matplotlib", "safetensors", "arviz_stats", "accelerate", "sklearn"):
    pytest.importorskip(_extra)


def test_pairs_leave_to_each_rank_what_the_paper_printed():
    hessian = -torch.linalg.inv(sets.normal("pairs").covariance)
    paper = [7.12 / 43.8, 5.24 / 43.8, 1.76 / 43.8]
    whole = float(hessian.square().sum())
    left = [table1.left_over(hessian, rank) / whole for rank in sets.RANKS]
    assert left == pytest.approx(paper, rel=0.015)
    assert table1.left_over(hessian, 35) < 1e-12 * whole


def test_least_error_is_that_of_a_known_best():
    """Two coordinates that depend on one another are a diagonal plus one column."""
    target = torch.tensor([[-2.0, 0.5, 0.0], [0.5, -1.0, 0.0], [0.0, 0.0, -3.0]]).double()
    assert table1.left_over(target, 1) < 1e-12
    # Two separate pairs with one column: the smaller off-diagonal entry stays, twice.
    pairs = torch.block_diag(target[:2, :2], target[:2, :2] * 0.4)
    assert table1.left_over(pairs, 1) == pytest.approx(2 * 0.2**2, rel=1e-5)


def test_normal_sets_are_what_they_say():
    pairs, factors, random = (sets.normal(name).covariance for name in sets.NORMALS)
    assert pairs.diagonal().eq(1).all()
    assert int((pairs != 0).sum()) == 100 + 70
    eye = torch.eye(100, dtype=torch.float64)
    assert torch.linalg.matrix_rank(factors - eye, tol=1e-9) == 35
    assert float(torch.linalg.eigvalsh(random)[0]) >= 1
    assert float(torch.linalg.inv(random).square().sum()) == pytest.approx(44.6, rel=0.05)
    # Pinned: other numbers here are other data.
    assert float(factors[0, 1]) == pytest.approx(0.2957063251, abs=1e-9)
    assert float(random[0, 1]) == pytest.approx(-0.1562797208, abs=1e-9)


@pytest.mark.parametrize(
    ("reading", "dim", "setting", "sum_of_locations"),
    [
        ("product", 50, "even", -40.15167670100117),
        ("product", 50, "uneven", 47.53652466297816),
        ("product", 50, "apart", -21.34640586532724),
        ("product", 80, "even", 86.58450912066125),
        ("product", 80, "uneven", 81.68593339148603),
        ("product", 80, "apart", -19.557019059726816),
        ("joint", 50, "even", -42.20604596910658),
        ("joint", 50, "uneven", 11.993757806611981),
        ("joint", 50, "apart", 53.35907477911641),
        ("joint", 80, "even", 38.658297846298154),
        ("joint", 80, "uneven", -68.72085636576514),
        ("joint", 80, "apart", -53.94752816782648),
    ],
)
def test_logistic_sets_are_what_they_say(reading, dim, setting, sum_of_locations):
    law = sets.logistic(reading, dim, setting)
    assert law.dim == dim
    assert law.weights.shape[-1 if reading == "product" else 0] == 20
    assert law.weights.sum(-1).sub(1).abs().max() < 1e-12
    assert float(law.locations.sum()) == pytest.approx(sum_of_locations, abs=1e-9)
    low, high = float(law.scales.min()), float(law.scales.max())
    assert (low, high) == {"even": (0.3, 0.3), "apart": (0.2, 0.2)}.get(setting, (low, high))
    assert 0.1 <= low <= high <= 0.5


def test_plane_sets_are_what_they_say():
    modes, crescent = (sets.plane(name) for name in sets.PLANE)
    assert modes.means.tolist() == [[1.1, 1.1], [-1.1, -1.1]]
    assert float(modes.covariances[0, 0, 0]) == 0.36
    draws = crescent.sample(4000, seed=0)
    assert float((draws.norm(dim=1) - 2).abs().mean()) < 0.2
    assert float(draws[:, 1].lt(-0.8).double().mean()) < 0.01
    scales = torch.linalg.eigvalsh(crescent.covariances).sqrt()
    assert scales[:, 0].tolist() == pytest.approx([0.15] * 9)
    assert scales[:, 1].tolist() == pytest.approx([0.4] * 9)
    ellipse = sets.ellipse()
    std = ellipse.covariance.diagonal().sqrt()
    assert float(ellipse.covariance[0, 1] / std.prod()) == pytest.approx(0.8)


def test_unknown_sets_are_refused():
    with pytest.raises(
        ValueError, match=r"^normal: setting must be one of pairs, factors, random,"
    ):
        sets.normal("pears")
    with pytest.raises(ValueError, match=r"^logistic: reading must be one of product, joint, got"):
        sets.logistic("both", 50, "even")
    with pytest.raises(ValueError, match=r"^logistic: setting must be one of even, uneven, apart"):
        sets.logistic("joint", 50, "odd")
    with pytest.raises(ValueError, match=r"^plane: name must be one of two modes, crescent, got"):
        sets.plane("three modes")


# ------------------------------------------------------------------------------------------ record


class Work:
    """A compute function that counts its calls and can be stopped."""

    __name__ = "work"

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[int] = []
        self.stop_at = stop_at

    def __call__(self, seed: int, steps: int) -> dict[str, float]:
        if seed == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(seed)
        return {"value": seed / steps if steps else math.inf}


SETTINGS = [{"seed": seed, "steps": 2} for seed in range(5)]


def test_a_stopped_item_goes_on_where_it_was(tmp_path):
    stopped = Work(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        Record("item", tmp_path).cells(SETTINGS, stopped)
    assert stopped.calls == [0, 1, 2]
    again = Work()
    results = Record("item", tmp_path).cells(SETTINGS, again)
    assert again.calls == [3, 4]
    assert results == [{"value": seed / 2} for seed in range(5)]
    none = Work()
    assert Record("other", tmp_path).cells(SETTINGS, none, of="item") == results
    assert none.calls == []


def test_a_torn_line_is_computed_again_and_other_settings_too(tmp_path):
    Record("item", tmp_path).cells(SETTINGS[:2], Work())
    path = tmp_path / "item.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    again = Work()
    Record("item", tmp_path).cells(SETTINGS[:2], again)
    assert again.calls == [1]
    other = Work()
    found = Record("item", tmp_path).cells([{"seed": 0, "steps": 0}], other)
    assert found == [{"value": None}]  # JSON has no infinity
    last = Work()
    Record("item", tmp_path).cells(SETTINGS[:2], last)
    assert last.calls == []


def test_processes_share_the_cells_and_do_each_once(tmp_path):
    work = [{"seed": seed, "folder": str(tmp_path)} for seed in range(8)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=share, args=(tmp_path, work)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0  # each had the results of all
    lines = (tmp_path / "item.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["settings"]["seed"] for line in lines) == list(range(8))
    assert len({json.loads(line)["result"]["process"] for line in lines}) == 3


def share(folder, work):
    assert [cell["seed"] for cell in Record("item", folder).cells(work, slow)] == list(range(8))


def slow(seed, folder):
    (Path(folder) / f"begun {seed}").touch(exist_ok=False)
    time.sleep(0.3)
    return {"seed": seed, "process": os.getpid()}


def test_a_cell_of_a_process_that_died_is_taken_over(tmp_path):
    context = multiprocessing.get_context("fork")
    work = [{"seed": seed, "folder": str(tmp_path)} for seed in range(2)]
    dying = context.Process(target=die, args=(tmp_path, work))
    dying.start()
    while not (tmp_path / "begun 0").exists():
        time.sleep(0.01)
    found = Record("item", tmp_path).cells(work, again)  # waits for what the other had in hand
    dying.join(60)
    assert dying.exitcode == 3
    assert [cell["seed"] for cell in found] == [0, 1]


def die(folder, work):
    def again(seed, folder):
        (Path(folder) / f"begun {seed}").touch(exist_ok=False)
        time.sleep(1)
        os._exit(3)

    Record("item", folder).cells(work, again)


def again(seed, folder):
    return {"seed": seed}


def test_rendering_computes_nothing(tmp_path):
    Record("item", tmp_path).cells(SETTINGS, Work())
    none = Work()
    with pytest.raises(Unfinished, match=r"^item: 1 of 6 cells are not computed yet$"):
        Record("item", tmp_path, render=True).cells([*SETTINGS, {"seed": 9, "steps": 1}], none)
    assert none.calls == []


def test_mean_and_deviation_are_those_of_the_seeds():
    assert mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_std([4.0]) == (4.0, 0.0)
    assert math.isnan(mean_std([1.0, None])[0])


# ------------------------------------------------------------------------------------------- items


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All items in their quick form."""
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "ROOT", out)
        assert paper.main(["all", "--quick", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("item", list(paper.ITEMS))
def test_every_item_leaves_its_page_table_figure_and_settings(results, item):
    page = (results / f"{item}.md").read_text()
    assert page in (results / "README.md").read_text()
    assert "A quick run" in page
    assert "the paper" in page.lower() or item.startswith("fig")
    assert (results / f"{item}.png").read_bytes().startswith(b"\x89PNG")
    assert f"({item}.png)" in page
    with (results / f"{item}.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= 2
    facts = json.loads((results / f"{item}.json").read_text())
    assert facts["quick"]
    assert facts["cells"] >= (1 if item == "table2" else 2)
    assert set(facts) >= {"seconds", "machine", "torch", "commit", "date", "settings"}


def test_nothing_is_computed_twice(results, capsys):
    assert paper.main(["fig2", "fig6", "fig8", "--quick", "--out", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" s")[0].rpartition(",")[0] for line in lines] == [
        "fig2: 0 cells computed",
        "fig6: 0 cells computed",
        "fig8: 0 cells computed",
    ]


def test_the_page_computes_nothing_and_says_what_was_not_run(results, tmp_path, capsys):
    for path in results.glob("fig[26].jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "table3.jsonl").write_bytes((results / "table3.jsonl").read_bytes()[:-200])
    assert paper.main(["page", "--quick", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    page = (tmp_path / "README.md").read_text()
    assert "| table1 | not run: " in page
    assert "cells are not computed yet | | |" in page
    assert "| [fig2](fig2.md) (quick) |" in page
    assert (tmp_path / "fig2.md").read_text() in page
    assert not (tmp_path / "table1.jsonl").exists()
    assert not (tmp_path / "fig3.jsonl").exists()


def test_the_page_puts_ours_beside_the_papers(results):
    page = (results / "README.md").read_text()
    assert "not run" not in page
    for line in ("| 1.32x |", "| 84x |", "| curves: Ozaki above Langevin |", "| pictures only |"):
        assert line in page, line


def test_committed_pages_are_what_their_cells_say(tmp_path):
    committed = rows.RESULTS / "paper"
    for path in committed.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    paper.main(["page", "--out", str(tmp_path)])
    names = {path.name for path in committed.glob("*.md")} - {"findings.md"}
    assert names == {path.name for path in tmp_path.glob("*.md")}
    for name in names | {path.name for path in committed.glob("*.csv")}:
        assert (committed / name).read_text() == (tmp_path / name).read_text(), name


def test_an_unknown_item_or_option_is_refused(capsys):
    for arguments, words in ((["table9"], "invalid choice: 'table9'"),
                             (["table1", "--fast"], "unrecognized arguments: --fast")):  # fmt: skip
        with pytest.raises(SystemExit):
            paper.main(arguments)
        assert words in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- formulas


def dense_objective(net, x, z, sigma, kind, diagonal):
    """Second-order terms by D x D matrices, and DSM-VR, mean over the batch, in float64."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)

    def outer(v):
        return v.unsqueeze(-1) * v.unsqueeze(-2)

    score, psi, hessian = [], [], []
    for point in (x + sigma * z, x - sigma * z, x):
        found = net(point)
        s2 = found.diag.diag_embed()
        if found.factor is not None:
            s2 = s2 + found.factor @ found.factor.mT
        given = found.score if kind == "published" else found.score.detach()
        score.append(found.score)
        hessian.append(s2)
        psi.append(s2 + outer(given))
    first = (score[0] + z / sigma).square() - 2 / sigma * score[2] * z - z.square() / sigma**2
    c = (eye - outer(z)) / sigma ** (1 if kind == "uncorrected" else 2)
    mask = eye if diagonal and kind != "published" else torch.ones_like(eye)
    if kind == "centred":
        second = -2 * (c * mask * hessian[2])
        for k, sign in ((0, 1), (1, -1)):
            wanted = (outer(sign * z + sigma * score[k].detach()) - eye) / sigma**2
            second = second + ((hessian[k] - wanted).square() - wanted.square()) * mask / 2
    else:
        second = (psi[0].square() + psi[1].square()) / 2 + c * (psi[0] + psi[1] - 2 * psi[2])
        second = second * mask
    weight = (1 if diagonal else 10) / sigma**2 if kind == "published" else 1
    return (second.sum((1, 2)) + weight * first.sum(1)).mean()


@pytest.mark.parametrize("kind", ["vr", "centred", *networks.PEERS])
@pytest.mark.parametrize("diagonal", [False, True])
def test_objectives_are_their_definitions(kind, diagonal):
    net = networks.Net(4, 0 if diagonal else 2, width=8, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    value = networks.objective(
        net, x, z, 0.3, first_order="vr", second_order=kind, diagonal=diagonal,
        detach=kind != "published",
    )  # fmt: skip
    wanted = dense_objective(net, x, z, 0.3, kind, diagonal)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-10)
    parameters = list(net.parameters())
    for got, want in zip(
        torch.autograd.grad(value, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("rank", "second_order"), [(3, "vr"), (0, "vr"), (3, "centred")])
def test_joint_training_gives_the_s1_that_dsm_alone_gives(rank, second_order):
    # s1 is given in the second-order term: whatever that term does, s1 learns the same.
    law, weights = sets.law("product 50 even"), []
    for own, second in ((None, "none"), (rank, second_order)):
        net = networks.Net(law.dim, own, seed=0)
        options = networks.PAPER | {"batch": 16, "second_order": second}
        networks.train_net(net, law, 0.1, steps=30, seed=0, diagonal=rank == 0, **options)
        weights.append([p.detach() for p in net.first.parameters()])
    untrained = networks.Net(law.dim, None, seed=0).first.parameters()
    for alone, joint, before in zip(*weights, untrained, strict=True):
        assert torch.allclose(alone, joint, rtol=0, atol=1e-4)
        assert not torch.allclose(alone, before, rtol=0, atol=1e-2)


def test_networks_of_single_coordinates_see_nothing_else():
    net = networks.Net(3, 0, width=8, head_width=8, alone=4, seed=0)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    parts = [(net.score, net.first, net.first_alone), (lambda x: net(x).diag, net.diag,
                                                       net.diag_alone)]  # fmt: skip
    for whole, dense, alone in parts:
        assert torch.allclose(whole(x), dense(x) + alone(x))
        assert torch.allclose(alone(x)[2], alone(x[2]), atol=1e-6)
        jacobian = torch.func.vmap(torch.func.jacrev(alone))(x)
        own = jacobian.diagonal(dim1=1, dim2=2)
        assert torch.equal(jacobian, own.diag_embed())
        assert own.abs().min() > 0
    same = networks.Net(3, 0, width=8, head_width=8, seed=0)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in same.state_dict().items())


def test_the_dense_formulation_has_our_gradients():
    found = table1.dense("normal pairs", 3, 4, 0.1, 0.001)
    assert found["largest difference of gradients"] < 1e-4
    assert found["dense / ours"] == pytest.approx(
        found["dense, microseconds"] / found["ours, microseconds"]
    )


class Constant(torch.nn.Module):
    """Exact scores of a normal law but for a factor, and one learned diagonal."""

    def __init__(self, law, sigma, wrong):
        super().__init__()
        self.law, self.wrong = law.noisy(sigma), wrong
        self.diag = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def score(self, x):
        return self.wrong * self.law.score(x)

    def second(self, x):
        return self.diag.expand_as(x), None

    def forward(self, x):
        return UnscaledScores(self.score(x), *self.second(x))


def test_centred_loss_forgives_an_error_of_s1_that_eq_33_does_not():
    # The best constant diagonal of s2 of a normal law, by each loss.
    law, sigma = sets.ellipse(), 0.1
    x = law.sample(200_000, seed=0)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    truth = law.noisy(sigma).hessian_diag(x[:1])[0]
    errors = {}
    for kind, wrong in (("centred", 1.1), ("vr", 1.1), ("vr", 1.0)):
        net = Constant(law, sigma, wrong)
        loss = networks.objective(
            net, x, z, sigma, first_order="vr", second_order=kind, diagonal=True
        )
        # Quadratic in d: one Newton step from zero, the second derivative is 2.
        (slope,) = torch.autograd.grad(loss, [net.diag])
        errors[kind, wrong] = float((-slope / 2 - truth).norm() / truth.norm())
    assert errors["centred", 1.1] == pytest.approx(0.01, abs=0.01)
    assert errors["vr", 1.1] == pytest.approx(0.21, abs=0.01)
    assert errors["vr", 1.0] == pytest.approx(0, abs=0.01)


def test_posterior_draws_have_the_exact_moments():
    law = sets.plane("crescent")
    x = torch.tensor([[0.3, 1.2], [-2.0, 0.1]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = figures.posterior_draws(law, x, 0.5, 40_000, generator)
    mean, covariance = law.posterior_mean(x, 0.5), law.posterior_covariance(x, 0.5)
    assert (draws.mean(0) - mean).abs().max() < 0.02
    centred = draws - draws.mean(0)
    found = torch.einsum("nbi,nbj->bij", centred, centred) / len(draws)
    assert (found - covariance).abs().max() < 0.02


def test_distances_between_samples():
    a = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert abs(figures.energy_distance(a, b)) < 0.005
    # E|N(0, 2) + m| twice, less 2 E|N(0, 2)|, for a shift of m = 1.
    expected = 2 * (2 * math.exp(-1 / 4) / math.sqrt(math.pi) + math.erf(0.5)) - 4 / math.sqrt(
        math.pi
    )
    assert figures.energy_distance(a, b + 1) == pytest.approx(expected, abs=0.05)
    assert mixing.kolmogorov(a[:, 0], b[:, 0]) < mixing.TOLERANCE * 1.3
    shift = math.erf(0.5 / math.sqrt(2))
    assert mixing.kolmogorov(a[:, 0], b[:, 0] + 1) == pytest.approx(shift, abs=0.03)
    small = torch.tensor([0.0, 1.0])
    assert mixing.kolmogorov(small, small) == 0
    assert mixing.kolmogorov(small, small + 5) == 1


def test_crossing_is_the_first_fall():
    assert claims.crossing([1, 10, 100, 1000], [100, 1, 100, 1], 10) == pytest.approx(10**0.5)
    assert claims.crossing([1, 10, 100], [100, 10, 1], 10) == pytest.approx(10)
    assert claims.crossing([1, 10, 100], [100, 10, 1], math.sqrt(10)) == pytest.approx(10**1.5)
    assert claims.crossing([1, 10], [100, 50], 10) is None


# ------------------------------------------------------------------------------- images and chains


def test_packed_images_come_back_to_eight_bits():
    given = torch.randn(3, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    packed = json.loads(json.dumps(images.pack(given)))
    step = float(given.max() - given.min()) / 255
    assert abs(images.unpack(packed) - given.numpy()).max() <= step / 2 * 1.001
    assert (images.unpack(images.pack(torch.zeros(2, 2))) == 0).all()


def test_missing_data_are_named(tmp_path, capsys):
    record = Record("fig3", tmp_path, folders=Folders(None, tmp_path))
    with pytest.raises(
        Unfinished,
        match=r"HOS_DATA \(or --data\) must name the folder of mnist/train.parquet, got nothing",
    ):
        paper.ITEMS["fig3"](record)
    other = Folders(tmp_path / "elsewhere", tmp_path)
    with pytest.raises(Unfinished, match=r"of cifar10/test.parquet, got .*elsewhere without it$"):
        images.data_file(other, "cifar10", "test")
    assert paper.main(["fig7", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "must name the folder of mnist/train.parquet" in capsys.readouterr().out
    assert "not run: HOS_DATA" in (tmp_path / "out" / "README.md").read_text()


def test_subspace_iteration_finds_the_eigenvectors_of_a_linear_denoiser():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(70, 70, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.linspace(0, 0.5, 70, dtype=torch.float64)
    spectrum[-3:] = torch.tensor([2.0, 4.0, 8.0])
    matrix = basis @ spectrum.diag() @ basis.mT
    x = torch.zeros(2, 70, dtype=torch.float64)
    found = images.subspace_iteration(ScoreHessian(lambda v: v @ matrix, x), 3, 30)
    assert found.products == 93
    assert torch.allclose(found.values, torch.tensor([8.0, 4.0, 2.0], dtype=torch.float64))
    lined = (found.vectors.mT @ basis[:, [69, 68, 67]]).abs()
    assert torch.allclose(lined, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-6)


def test_shifts_move_whole_images_and_fill_with_black():
    x = torch.arange(1.0, 13).reshape(1, 1, 3, 4).repeat(40, 1, 1, 1)
    moved = chains.shifted(x, 1, torch.Generator().manual_seed(0))
    offsets = set()
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1), value=-1.0)
    for image in moved:
        places = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if torch.equal(padded[0, :, i : i + 3, j : j + 4], image)
        ]
        assert len(places) == 1
        offsets.add(places[0])
    assert len(offsets) == 9


def test_classifier_learns_and_a_bad_one_is_refused(tmp_path):
    found = chains.labelled(Folders(None, tmp_path), True)
    assert len(found.train) == len(found.train_labels) == 1257
    assert len(found.test) == 360
    net = chains.train_classifier(found, 40, 0)
    assert chains.accuracy(net, found) > 0.9
    again = chains.train_classifier(found, 1, 0), chains.train_classifier(found, 1, 0)
    for one, other in zip(*(each.parameters() for each in again), strict=True):
        assert torch.equal(one, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "labelled", lambda folders, quick: found)
        with pytest.raises(RuntimeError, match=r"^classifier: accuracy on the test set must be at"):
            chains.classifier(Folders(None, tmp_path), 1, False)
    assert (tmp_path / "classifier-1.safetensors").exists()


def test_stein_ratio_is_one_for_exact_scores_of_their_law():
    law = sets.normal("factors")
    x = law.sample(20_000, seed=1)
    diag = law.hessian_diag(x)
    exact = UnscaledScores(law.score(x), diag)
    assert chains.stein_ratio(exact) == pytest.approx(1, abs=0.01)
    # The same s2 as diagonal plus a factor.
    split = UnscaledScores(exact.score, diag - 0.25, torch.full((len(x), 100, 1), 0.5).double())
    assert chains.stein_ratio(split) == pytest.approx(chains.stein_ratio(exact), rel=1e-9)
    wider = UnscaledScores(1.1 * exact.score, diag)
    assert chains.stein_ratio(wider) == pytest.approx(1.21, abs=0.015)


class Normal:
    """A model of noisy digits: an isotropic normal law about `mean`."""

    def __init__(self, mean):
        self.mean = mean

    def __call__(self, x, sigma):
        total = 0.2 + sigma**2
        return UnscaledScores((self.mean - x) / total, torch.full_like(x, -1 / total)).scaled(sigma)


@pytest.fixture
def normal_digits(monkeypatch):
    """The digits of scikit-learn with a model that knows only their mean, which is a 1."""
    source = open_source("digits")
    mean = source.scaling.forward(source.validation[:1], seed=0)
    trained = images.Trained(Normal(mean), {"recalibration": 1.0}, source)
    monkeypatch.setattr(images, "ready", lambda folders, name, quick: trained)

    def name(x):  # what is nearer the mean than half is a 1, else a 0
        near = (x.flatten(1) - mean.flatten(1)).square().mean(1) < 0.05
        return torch.nn.functional.one_hot(near.long(), 10).double()

    monkeypatch.setattr(chains, "classifier", lambda folders, epochs, quick: name)
    return Folders(None, None)


def test_search_takes_the_largest_step_that_keeps_the_law(normal_digits, monkeypatch):
    # Langevin's variance is 1 / (1 - h / (2 (0.2 + 1))) of the law's; an Ozaki step is exact.
    sizes = {"step_sizes": [0.05, 0.1, 0.2, 0.8, 1.6], "chains": 64, "iterations": 80}
    sizes["epochs"] = 1
    found = chains.search(normal_digits, "langevin", quick=True, **sizes)
    # The starts are digits, not draws of the model's law: compare with that.
    base = chains.search(normal_digits, "ozaki", quick=True, **sizes)
    for step, ratio, exact in zip(
        sizes["step_sizes"][2:], found["ratios"][2:], base["ratios"][2:], strict=True
    ):
        assert ratio / exact == pytest.approx(1 / (1 - step / 2.4), rel=0.05)
    apart = [abs(r / found["start"] - 1) for r in found["ratios"]]
    limit = sorted(apart)[2]  # three steps are within
    monkeypatch.setattr(chains, "TOLERANCE", limit)
    monkeypatch.setattr(chains, "SHIFT", 1.0)
    some = chains.search(normal_digits, "langevin", quick=True, **sizes)
    good = [s for s, a in zip(sizes["step_sizes"], apart, strict=True) if a <= limit]
    assert some["within"]
    assert len(good) == 3
    assert some["chosen"] == max(good)
    # Chains that all end as ones have changed their classes, whatever the ratio is.
    assert 0 < max(some["shifts"]) <= 1
    monkeypatch.setattr(chains, "SHIFT", min(some["shifts"]) / 2)
    assert not chains.search(normal_digits, "langevin", quick=True, **sizes)["within"]
    monkeypatch.setattr(chains, "SHIFT", 1.0)
    monkeypatch.setattr(chains, "TOLERANCE", 1e-9)
    none = chains.search(normal_digits, "langevin", quick=True, **sizes)
    assert not none["within"]
    assert none["chosen"] == 0.05


def test_chains_name_every_denoised_state(normal_digits):
    sizes = {"chains": 5, "iterations": 9, "shown": 4, "epochs": 1, "quick": True}
    found = chains.wander(normal_digits, 1, "ozaki", 50.0, **sizes)
    for key in ("changed", "moved"):
        assert len(found[key]) == 10
    # One step of this size forgets the start: states are draws, means lie at 1/6 of their noise.
    assert found["changed"][1:] == [0.0] * 9
    assert found["moved"][0] == 0
    assert found["classes"][1] == 5
    assert found["pictures"]["shape"] == [4, 8, 8]
    assert found["diverged"] == 0
    other = chains.wander(normal_digits, 0, "ozaki", 50.0, **sizes)
    assert other["changed"][-1] == 1.0


def test_recorded_rows_of_the_suite_are_table_2(tmp_path, monkeypatch):
    line = dict.fromkeys(rows.COLUMNS, "") | {
        "date": "2026-01-01", "commit": "abc", "dirty": "False", "machine": "a machine",
        "device": "cpu", "torch": "2", "threads": "2", "op": "second_order_score", "B": "10",
        "D": "100", "mode": "MLP Hessian",
    }  # fmt: skip
    measured = [
        line | {"variant": "row loop", "r": "0", "us_p50": "99"},
        line | {"variant": "row loop", "r": "0", "us_p50": "30000"},
        line | {"variant": "jacrev, 10 at once", "r": "0", "us_p50": "9000"},
        line | {"variant": "hos_ext structured, r 20", "r": "20", "us_p50": "300"},
    ]
    monkeypatch.setattr(table2.rows, "RESULTS", tmp_path)
    rows.append(tmp_path / "cpu.csv", measured)
    kept = table2.recorded()
    assert [row["us_p50"] for row in kept] == ["30000", "9000", "300"]
    record = Record("table2", tmp_path)
    table2.run(record)
    page = (tmp_path / "table2.md").read_text()
    assert "| Hessian | hos_ext structured | 20 | 0.3 | 0.38 | 84.5x | 100x | 30x (jacrev" in page
    assert record.computed == 0
    facts = json.loads((tmp_path / "table2.json").read_text())
    assert facts["compared"][0]["paper"] == "84x"
    assert facts["compared"][0]["ours"] == "100x, over the best rival 30x"


def test_chains_of_other_packages_keep_the_law():
    law = sets.plane("two modes").noisy(0.1)
    init = law.sample(400, seed=0)
    given = (law.weights, law.means, law.covariances, init)
    for package, method in mixing._PACKAGES:
        try:
            draws, facts = libraries.mixture_chains(
                package, method, *given, step_size=0.02, n_steps=60, seed=0
            )
        except libraries.NotMeasured:
            with pytest.raises(ImportError):
                importlib.import_module(package)
            continue
        assert draws.shape == (400, 60, 2)
        assert facts["seconds"] > 0
        assert ("acceptance" in facts) == (method == "mala")
        # Of a law twice as sharp it would be 1/2 more.
        ends = law.log_prob(draws[:, ::15].flatten(0, 1).double()).mean()
        wanted = law.log_prob(law.sample(20_000, seed=1)).mean()
        assert float(ends) == pytest.approx(float(wanted), abs=0.12)
        step = draws[:, 1:] - draws[:, :-1]
        moved = step[step.abs().sum(-1) > 0].square().mean()
        assert float(moved) == pytest.approx(2 * 0.02, rel=0.1)
    with pytest.raises(libraries.NotMeasured, match=r"^torchebm: not measured, it has no mala$"):
        libraries.mixture_chains("torchebm", "mala", *given, step_size=0.1, n_steps=1, seed=0)
