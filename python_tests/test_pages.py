"""The code on the pages runs, block after block, on things made as a reader has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hos_ext

DOCS = Path(__file__).parent.parent / "docs"
Names = dict[str, Any]
# Blocks that are not run, by page and place, with the reason.
NOT_RUN = {
    ("models", 3): "asks the hub",
    ("names", 0): "calls with ... for arguments",
    ("training", 1): "asks the hub; test_hub has a local one",
}
# Shorter runs and smaller pictures in place of those of the page.
SHORTER = {
    "steps=4000": "steps=4",
    "steps=1000": "steps=4",
    "n_steps=100": "n_steps=5",
    "settle=100": "settle=2",
    "(64, 1, 28, 28)": "(2, 1, 28, 28)",
    "n_steps=50": "n_steps=3",
    "(4, 64, 64), rank": "(4, 8, 8), rank",
}
Makers = dict[str, Callable[[Path], Names]]


def blocks(page: str) -> list[str]:
    """The Python code of a page, one text a block."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```py(?:thon)?\n(.*?)^```", text, re.S | re.M)


def pages() -> list[str]:
    return sorted(path.stem for path in DOCS.glob("*.md") if blocks(path.stem))


def of_chains(_: Path) -> Names:
    return {"model": hos_ext.UNet((1, 28, 28), rank=2, channels=(16, 16), layers_per_block=1)}


def of_conditions(_: Path) -> Names:
    model = hos_ext.MLP((5,), 2, num_classes=10)

    def other(x: torch.Tensor, sigma: Any, text: torch.Tensor) -> Any:
        return model(x, sigma)

    return {
        "model": model,
        "x0": torch.randn(3, 5),
        "x": torch.randn(3, 5),
        "start": torch.randn(3, 5),
        "init": torch.randn(3, 5),
        "sigma": 0.5,
        "schedule": hos_ext.VE(0.1, 1.0),
        "score_fn": lambda x, label: -x / (1 + label.reshape(-1, 1)),
        "other": other,
        "embedding_of_nothing": torch.zeros(1, 4),
    }


def of_data(_: Path) -> Names:
    pairs = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.arange(64))
    return {
        "hos_ext": hos_ext,
        "model": hos_ext.MLP((6,), 2, width=16),
        "my_dataset": pairs,
        "loader": torch.utils.data.DataLoader(pairs, batch_size=16),
        "step": 0,
    }


def of_flow(_: Path) -> Names:
    return {"net": lambda x, t: 0.9 * x, "dims": (6,), "x0": torch.randn(16, 6)}


def of_instruments(_: Path) -> Names:
    """What every section begins with; a section imports what else it takes."""
    score = hos_ext.MLP((8, 8), 2, width=16, head_width=8)
    return {
        "score_fn": lambda x: score(x, 0.5).unscaled(0.5).score,
        "head": score,
        "model": hos_ext.MLP((8, 8), 2, num_classes=10),
        "x": torch.randn(2, 8, 8),
        "x0": torch.randn(2, 8, 8),
        "label": torch.tensor([3, 1]),
        "sigma": 0.5,
    }


def of_latents(folder: Path) -> Names:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    for name, part in (("vae", vae), ("unet", unet), ("scheduler", diffusers.DDPMScheduler())):
        part.save_pretrained(folder / name)
    return {
        "folder": folder,
        "pictures": torch.randn(1, 1, 8, 8),
        "sigma": 0.5,
        "text": torch.randn(1, 2, 6),
        "z": torch.randn(1, 4, 8, 8),
    }


def of_models(_: Path) -> Names:
    """Two networks in one, exact for standard normal data: eps(x, timestep) and -eps(t, x)."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = (1 - betas).cumprod(0)

    def net(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dim() == 2:
            return (1 - table[b.long()]).sqrt().to(a).reshape(-1, 1) * a
        return -hos_ext.VP().sigma(a).to(b).reshape(-1, 1) * b

    return {"alphas_cumprod": table, "net": net, "x0": torch.randn(256, 5)}


def of_training(_: Path) -> Names:
    return {}


def of_uses(_: Path) -> Names:
    from types import SimpleNamespace

    from hos_ext.schedules import from_alphas_cumprod
    from hos_ext.tweedie import score_from_eps
    from hos_ext.uncertainty import posterior_from_score

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return {
        "scheduler": SimpleNamespace(alphas_cumprod=(1 - betas).cumprod(0)),
        "from_alphas_cumprod": from_alphas_cumprod,
        "posterior_from_score": posterior_from_score,
        "score_from_eps": score_from_eps,
        "net": lambda x, t: SimpleNamespace(sample=0.5 * x),
        "x": torch.randn(2, 6),
        "t": torch.tensor(300),
    }


MAKERS: Makers = {
    "chains": of_chains,
    "conditions": of_conditions,
    "data": of_data,
    "flow": of_flow,
    "instruments": of_instruments,
    "latents": of_latents,
    "models": of_models,
    "training": of_training,
    "uses": of_uses,
}


def test_every_page_with_code_is_known() -> None:
    left_out = {page for page, _ in NOT_RUN}
    assert set(pages()) <= set(MAKERS) | left_out
    assert set(MAKERS) <= set(pages())
    for page, place in NOT_RUN:
        assert place < len(blocks(page))


@pytest.mark.parametrize("page", MAKERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = MAKERS[page](tmp_path)
    for place, code in enumerate(blocks(page)):
        if (page, place) not in NOT_RUN:
            for long, short in SHORTER.items():
                code = code.replace(long, short)
            exec(compile(code, f"{page}.md, block {place}", "exec"), names)
