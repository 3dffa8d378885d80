"""Networks and densities are made where and as what they are asked to be."""

import pytest
import torch

from hos_ext import MLP, UNet
from hos_ext.densities import (
    Gaussian,
    GaussianMixture,
    JointLogisticMixture,
    ProductLogisticMixture,
)

ONE = torch.ones(2, 3)
NETWORKS = {
    "MLP": lambda **place: MLP((2,), 1, width=8, head_width=8, num_classes=3, **place),
    "UNet": lambda **place: UNet((1, 8, 8), 1, channels=(16,), **place),
}
LAWS = {
    "Gaussian(D=3": lambda **place: Gaussian(torch.zeros(3), torch.eye(3), **place),
    "GaussianMixture(2 components, D=3": lambda **place: GaussianMixture(
        torch.ones(2) / 2, ONE, torch.eye(3).expand(2, 3, 3), **place
    ),
    "JointLogisticMixture(2 components, D=3": lambda **place: JointLogisticMixture(
        torch.ones(2) / 2, ONE, ONE, **place
    ),
    "ProductLogisticMixture(3 components, D=2, noise_std 0.5": lambda **place: (
        ProductLogisticMixture(ONE / 3, ONE, ONE, noise_std=0.5, **place)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_made_in_a_dtype_and_on_a_device(name):
    if name == "UNet":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    torch.manual_seed(0)
    wide = NETWORKS[name](device="cpu", dtype=torch.float64)
    for one, other in zip(plain.parameters(), wide.parameters(), strict=True):
        assert other.dtype == torch.float64
        assert torch.equal(one.double(), other)
    assert wide.config == plain.config
    meta = NETWORKS[name](device=torch.device("meta"))
    assert all(p.is_meta and p.dtype == torch.float32 for p in meta.parameters())
    for place, kind, message in (
        ({"dtype": torch.int64}, ValueError, "dtype must be float32, float64, float16, bfloat16"),
        ({"device": 3}, TypeError, "device must be a device or its name, got 3"),
        ({"device": torch.float64}, TypeError, "device must be a device or its name, got torch."),
    ):
        with pytest.raises(kind) as error:
            NETWORKS[name](**place)
        assert str(error.value).startswith(f"{name}: {message}")


@pytest.mark.parametrize("text", LAWS)
def test_a_density_is_made_in_a_dtype_and_says_what_it_is(text):
    plain, wide = LAWS[text](), LAWS[text](device="cpu", dtype=torch.float64)
    assert repr(plain) == f"{text})"
    assert repr(wide) == f"{text}, float64)"
    x = torch.zeros(4, plain.dim)
    torch.testing.assert_close(wide.score(x.double()).float(), plain.score(x))
    for moved in (plain.to(torch.float64), plain.to("cpu", torch.float64)):
        assert torch.equal(moved.score(x.double()), wide.score(x.double()))
    name = text.partition("(")[0]
    with pytest.raises(ValueError, match=rf"^{name}: dtype must be float32, float64, got"):
        LAWS[text](dtype=torch.float16)
    with pytest.raises(TypeError, match=rf"^{name}: device must be a device or its name, got 3"):
        LAWS[text](device=3)
