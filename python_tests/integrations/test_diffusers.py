"""Pipelines of diffusers as scores: tiny random ones, in its own format, read from the disk."""

import re
import warnings

import pytest
import torch

from hos_ext.integrations import DiffusersScore, from_diffusers
from hos_ext.losses import score_matching_loss
from hos_ext.nn import SecondOrderHead, UNet, load_model, save_model
from hos_ext.schedules import EDM, Rectified

diffusers = pytest.importorskip("diffusers", reason="diffusers' models need hos_ext[images]")

B, TEXT = 3, 8
SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
PLAIN = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def unconditional():
    return diffusers.UNet2DModel(in_channels=1, out_channels=1, **SMALL, **PLAIN)


def class_conditional():
    return diffusers.UNet2DModel(
        in_channels=1, out_channels=1, num_class_embeds=5, **SMALL, **PLAIN
    )


def text_conditional():
    return diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **SMALL,
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,  # a learned variance
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT,
        out_channels=4,
        pos_embed_max_size=8,
    )


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )


def text():
    return torch.randn(B, 2, TEXT)


def conditions():
    """Of each network: what it is given by name."""
    return {
        unconditional: {},
        class_conditional: {"class_labels": torch.tensor([0, 3, 4])},
        text_conditional: {"encoder_hidden_states": text()},
        dit: {"class_labels": torch.tensor([0, 3, 9])},
        sd3: {"encoder_hidden_states": text(), "pooled_projections": torch.randn(B, TEXT)},
    }


OF_TABLES = [unconditional, class_conditional, text_conditional, dit]


def made(make, seed=0):
    """The network with weights that leave no output at zero."""
    torch.manual_seed(seed)
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def written(folder, net, scheduler):
    """A pipeline as diffusers lays it out: a part in each sub-folder."""
    part = "unet" if "UNet" in type(net).__name__ else "transformer"
    net.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def sample(net):
    torch.manual_seed(7)
    return torch.randn(B, net.config.in_channels, 8, 8)


@pytest.mark.parametrize("make", OF_TABLES, ids=lambda make: make.__name__)
def test_pipelines_with_a_table_give_what_their_scheduler_makes_of_them(make, tmp_path):
    """E[x0 | x] = x + sigma (sigma s1) is the scheduler's own pred_original_sample."""
    net = made(make)
    scheduler = diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    score = from_diffusers(written(tmp_path, net, scheduler))
    assert not score.training
    x_t, kwargs = sample(net), conditions()[make]
    abar = scheduler.alphas_cumprod[400].double()
    alpha, sigma = float(abar.sqrt()), float(((1 - abar) / abar).sqrt())
    with torch.no_grad():
        value = score(x_t / alpha, sigma, **kwargs)
        out = net(x_t, timestep=torch.full((B,), 400), **kwargs).sample
    clean = scheduler.step(out[:, : x_t.shape[1]], 400, x_t).pred_original_sample
    torch.testing.assert_close(x_t / alpha + sigma * value, clean, rtol=1e-3, atol=1e-3)
    assert float(value.std()) > 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_pipeline_is_read_by_its_path_and_its_timesteps(shift, tmp_path):
    net = made(sd3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    score = from_diffusers(written(tmp_path, net, scheduler))
    assert score.schedule == Rectified(shift=shift)
    x_t, kwargs = sample(net), conditions()[sd3]
    t = float(scheduler.sigmas[300])
    with torch.no_grad():
        value = score(x_t / (1 - t), t / (1 - t), **kwargs)
        v = net(x_t, timestep=scheduler.timesteps[300].expand(B), **kwargs).sample
    # Euler down to t = 0 in one step is the denoised sample: x_t - t v.
    mean = x_t / (1 - t) + t / (1 - t) * value
    torch.testing.assert_close(mean, x_t - t * v, rtol=1e-3, atol=1e-4)
    scheduler.set_timesteps(
        timesteps=None, sigmas=[t] if shift == 1 else None, num_inference_steps=1
    )
    if shift == 1:
        step = scheduler.step(v, scheduler.timesteps[0], x_t).prev_sample
        torch.testing.assert_close(mean, step, rtol=1e-3, atol=1e-3)


def test_flux_takes_its_time_in_the_unit_interval():
    net = made(flux)
    score = DiffusersScore(net, diffusers.FlowMatchEulerDiscreteScheduler())
    assert score.reading.time == "t"
    torch.manual_seed(0)
    x_t = torch.randn(B, 6, 4)
    kwargs = {"encoder_hidden_states": text(), "pooled_projections": torch.randn(B, TEXT)}
    kwargs |= {"img_ids": torch.zeros(B, 6, 3)[0], "txt_ids": torch.zeros(2, 3)}

    def call(net, x, t, **rest):  # its ids are of all samples alike
        return net(x, timestep=t, img_ids=kwargs["img_ids"], txt_ids=kwargs["txt_ids"], **rest)

    called = DiffusersScore(
        net,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        call=lambda net, x, t, **rest: call(net, x, t / 1000, **rest),
    )
    rest = {k: v for k, v in kwargs.items() if "ids" not in k}
    t = 0.3
    with torch.no_grad():
        v = net(x_t, timestep=torch.full((B,), t), **kwargs).sample
        value = called(x_t / (1 - t), t / (1 - t), **rest)
    torch.testing.assert_close(
        x_t / (1 - t) + t / (1 - t) * value, x_t - t * v, rtol=1e-3, atol=1e-4
    )
    rule = "DiffusersScore: scheduler must be of flow matching for a network that takes t in [0, 1]"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        DiffusersScore(net, diffusers.DDPMScheduler())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_schedulers_precondition_as_they_do(name, kind, tmp_path):
    net = made(unconditional)
    scheduler = getattr(diffusers, name)(prediction_type=kind, sigma_data=0.7, sigma_max=40.0)
    score = from_diffusers(written(tmp_path, net, scheduler))
    assert score.schedule == EDM(0.002, 40.0, 7.0)
    x, sigma = sample(net), 0.9
    with torch.no_grad():
        value = score(x, sigma)
        time = scheduler.precondition_noise(torch.tensor(sigma))
        out = net(scheduler.precondition_inputs(x, sigma), time.expand(B)).sample
    denoised = scheduler.precondition_outputs(x, out, sigma)
    torch.testing.assert_close(x + sigma * value, denoised, rtol=1e-4, atol=1e-5)


def test_a_pipeline_in_memory_stays_as_it_is():
    pipeline = diffusers.DDPMPipeline(made(unconditional), diffusers.DDPMScheduler())
    score = from_diffusers(pipeline)
    assert score.net is pipeline.unet
    assert score.scheduler is pipeline.scheduler
    for name, value in (("device", "cpu"), ("dtype", torch.float32), ("revision", "main")):
        rule = f"^from_diffusers: {name} must be None for a pipeline in memory, got"
        with pytest.raises(ValueError, match=rule):
            from_diffusers(pipeline, **{name: value})
    pipeline.unet.half()
    with pytest.raises(ValueError, match=r"^from_diffusers: net must be float32 or float64, got"):
        from_diffusers(pipeline)
    with pytest.raises(TypeError, match=r"^from_diffusers: pipeline must have a unet or .*int$"):
        from_diffusers(3)


HEADS = {
    "class": (class_conditional, (1, 8, 8), diffusers.DDPMScheduler),
    "flow": (sd3, (4, 8, 8), diffusers.FlowMatchEulerDiscreteScheduler),
    "edm": (unconditional, (1, 8, 8), diffusers.EDMEulerScheduler),
}


@pytest.mark.filterwarnings("ignore:SecondOrderHead. score_model must give:UserWarning")
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_learns_on_it_and_comes_back_with_it(kind, tmp_path):
    make, dims, scheduler = HEADS[kind]
    score = from_diffusers(written(tmp_path / "given", made(make), scheduler()))
    sizes = {"channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    torch.manual_seed(0)
    model = SecondOrderHead(score, UNet(dims, 1, given_score=True, **sizes))
    x, kwargs = torch.randn(B, *dims), conditions()[make]
    score_matching_loss(model, x, 0.5, model_kwargs=kwargs, seed=0).backward()
    model.eval()
    save_model(model, tmp_path / "head")
    parts = {path.name for path in (tmp_path / "head" / "first_order").iterdir()}
    assert parts == {"scheduler", "transformer" if make is sd3 else "unet"}
    again, config = load_model(tmp_path / "head")
    assert config["first_order"] == score.fingerprint()
    with torch.no_grad():
        got, want = again(x, 0.5, **kwargs), model(x, 0.5, **kwargs)
    assert torch.equal(got.scaled_score, want.scaled_score)
    assert torch.equal(got.c, want.c)


def test_fingerprints_tell_schedulers_apart_where_there_is_no_table():
    net = made(unconditional)
    flows = [diffusers.FlowMatchEulerDiscreteScheduler(shift=s) for s in (1.0, 1.0, 3.0)]
    others = [diffusers.EDMEulerScheduler(sigma_data=s) for s in (0.5, 0.6)]
    others.append(diffusers.EDMEulerScheduler(prediction_type="v_prediction"))
    marks = [DiffusersScore(net, s).fingerprint()["sha256"] for s in (*flows, *others)]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 5
    called = DiffusersScore(net, flows[0], call=lambda net, x, t: net(x, t))
    assert called.fingerprint() is None


def test_its_check_reads_the_network_as_the_scheduler_says():
    class Best(torch.nn.Module):  # of N(0, I), as a table of v
        def forward(self, x, t):
            return 0 * x

    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    data = torch.randn(256, 1, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusersScore(Best(), scheduler, check=data)
    scheduler = diffusers.DDPMScheduler(prediction_type="epsilon")
    with pytest.warns(UserWarning, match=r"^DiffusersScore: the network denoises worse than its"):
        DiffusersScore(Best(), scheduler, check=data)


def test_classes_and_schedulers_that_are_not_known_are_refused():
    lumina = type("Lumina2Transformer2DModel", (torch.nn.Linear,), {"__module__": "diffusers.x"})
    rule = r"^DiffusersScore: net must be of a class whose call is known \(UNet2DModel, .* got Lum"
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=rule):
        DiffusersScore(lumina(8, 8), flow)
    score = DiffusersScore(lumina(8, 8), flow, call=lambda net, x, t: -net(x))
    assert score(torch.randn(B, 8), 0.5).shape == (B, 8)
    net = unconditional()
    with pytest.raises(ValueError, match=r"alphas_cumprod, or be of flow matching or EDM, got Sco"):
        DiffusersScore(net, diffusers.ScoreSdeVeScheduler())
    with pytest.raises(ValueError, match=r"timestep_type must be 'discrete', got 'continuous'$"):
        DiffusersScore(net, diffusers.EulerDiscreteScheduler(timestep_type="continuous"))
    inverted = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match=r"config.invert_sigmas must be False .*, got True$"):
        DiffusersScore(net, inverted)


def test_conditions_that_are_missing_or_do_not_fit_are_named():
    score = DiffusersScore(made(text_conditional), diffusers.DDPMScheduler())
    x = torch.randn(B, 4, 8, 8)
    with pytest.raises(TypeError, match=r"^DiffusersScore: net must take \(x, time\).*encoder_hid"):
        score(x, 0.5)
    rule = r"^DiffusersScore: model_kwargs\['encoder_hidden_states'\] must have 3 rows like x, got"
    with pytest.raises(ValueError, match=rule):
        score(x, 0.5, encoder_hidden_states=text()[:2])


# ------------------------------------------------------------------------------------------ the hub


def cached(cache, net, scheduler, commit="0123456789abcdef0123456789abcdef01234567"):
    """A model of the hub, as huggingface_hub keeps it."""
    place = cache / "models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return written(place / "snapshots" / commit, net, scheduler)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub out of reach, its cache in a folder of the test."""
    hub = pytest.importorskip("huggingface_hub", reason="needs hos_ext[hub]")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    download = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *a, **k: download(*a, cache_dir=tmp_path, **k)
    )
    return tmp_path


def test_a_model_of_the_hub_comes_from_the_cache(hub):
    net = made(unconditional)
    cached(hub, net, diffusers.DDPMScheduler())
    score = from_diffusers("someone/tiny")
    assert torch.equal(next(score.net.parameters()), next(net.parameters()))


def test_a_hub_out_of_reach_is_one_clear_error(hub, tmp_path):
    start = (
        "from_diffusers: pipeline must be a folder, or a model of the hub that is in the cache or "
        "in reach, got 'someone/other': "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(start)}[^\n]*$"):
        from_diffusers("someone/other")
    with pytest.raises(ValueError, match=r"^from_diffusers: folder must hold unet/config.json"):
        from_diffusers(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"^from_diffusers: revision must be None for a folder"):
        from_diffusers(tmp_path, revision="main")
