"""The denoising process: the original's numbers, samplers on a problem with a known answer, diffusers' schedulers."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dall3.diffusion.denoising import Denoising, denoise, unet_predict
from dall3.diffusion.samplers import DIFFUSERS, sample_ddim, sample_ddpm
from dall3.diffusion.schedule import GaussianDiffusion, Prediction, space_timesteps
from dall3.models.unet import DiffusionConfig, UNet, UNetConfig
from dall3.weights import load_unet

from originals import Golden, close

CONDITIONING = {"image_embeds": "image_embeds", "low_res": "low_res", "labels": "y"}


def load_case(name: str, path) -> SimpleNamespace:
    golden = Golden(name)
    torch.save(golden.weights(), path)
    unet, expected = load_unet(path, golden.about), golden.expected
    diffusion = GaussianDiffusion(unet.config.diffusion, golden.about["timestep_respacing"])
    conditioning = {keyword: expected[stored] for keyword, stored in CONDITIONING.items() if stored in expected}

    def predict(t: Tensor):
        return diffusion.predict(unet(expected["x"], diffusion.at("timestep", t), **conditioning), expected["x"], t)

    return SimpleNamespace(
        expected=expected,
        unet=unet,
        diffusion=diffusion,
        conditioning=conditioning,
        predict=predict,
        prediction=predict(expected["t"]),
    )


@pytest.fixture(scope="module", params=["unet_embedding", "unet_unconditional", "unet_super_resolution"])
def case(request, tmp_path_factory):
    return load_case(request.param, tmp_path_factory.mktemp("unet") / "unet.pt")


@pytest.fixture(scope="module", params=["unet_class_conv", "unet_predict_xstart"])
def fixed_variance(request, tmp_path_factory):
    """UNets with a fixed variance; the original's variance is stored as one number per image."""
    return load_case(request.param, tmp_path_factory.mktemp("unet") / "unet.pt")


def clipped(prediction: Prediction) -> Prediction:
    """The original's prediction with clip_denoised."""
    return replace(prediction, pred_xstart=prediction.pred_xstart.clamp(-1, 1))


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors have the same shape and differ by at most `tolerance` of the largest value."""
    return close(actual, expected, tolerance * float(expected.abs().max()))


def test_schedule(case):
    assert case.diffusion.timestep_map == case.expected["timestep_map"].tolist()
    assert near(torch.tensor(case.diffusion.betas), case.expected["betas"], 1e-9)
    assert near(torch.tensor(case.diffusion.alphas_cumprod), case.expected["alphas_cumprod"], 1e-9)


@pytest.mark.parametrize("name", ["mean", "variance", "log_variance", "pred_xstart"])
def test_statistics_of_a_step(case, name):
    assert near(getattr(case.prediction, name), case.expected[name])


def test_clipped_picture(case):
    # At nearly pure noise, the predicted image is the small difference of values up to 478.
    assert close(clipped(case.prediction).pred_xstart, case.expected["pred_xstart_clipped"], 1e-3)


def test_add_noise(case):
    e = case.expected
    assert near(case.diffusion.add_noise(e["x"], e["t"], e["noise"]), e["q_sample"])


def test_guided_mean(case):
    guided = replace(case.prediction, gradient=case.expected["gradient"])
    assert near(case.diffusion.guided_mean(guided), case.expected["guided_mean"])
    assert torch.equal(case.diffusion.guided_mean(case.prediction), case.prediction.mean)


def test_guided_score(case):
    e = case.expected
    guided = case.diffusion.guided_score(replace(case.prediction, gradient=e["gradient"]))
    assert near(guided.pred_xstart, e["guided_score_pred_xstart"])
    assert near(guided.mean, e["guided_score_mean"])


def assert_one_ddim_step(case: SimpleNamespace, change: Callable[[Prediction], Prediction]) -> None:
    e = case.expected
    for row, t in enumerate(e["t"].tolist()):
        conditioning = {name: value[row : row + 1] for name, value in case.conditioning.items()}
        predict = unet_predict(case.unet, case.diffusion, conditioning)
        x, _ = next(
            sample_ddim(
                lambda x, i, predict=predict: change(predict(x, i)), case.diffusion, e["x"][row : row + 1], [t], None
            )
        )
        assert near(x, e["ddim_sample"][row : row + 1])


def test_one_ddim_step(case):
    assert_one_ddim_step(case, lambda prediction: prediction)


def test_one_ddim_step_of_a_unet_that_predicts_the_picture(tmp_path):
    assert_one_ddim_step(load_case("unet_predict_xstart", tmp_path / "unet.pt"), clipped)


def test_the_whole_ddim_chain(case):
    predict = unet_predict(case.unet, case.diffusion, case.conditioning)
    steps = range(len(case.diffusion) - 1, -1, -1)
    *_, (x, _) = sample_ddim(lambda x, i: clipped(predict(x, i)), case.diffusion, case.expected["noise"], steps, None)
    assert close(x, case.expected["ddim_chain"], 1e-3)


def test_statistics_with_fixed_variance(fixed_variance):
    e, prediction = fixed_variance.expected, fixed_variance.prediction
    assert near(prediction.mean, e["mean"]) and near(prediction.pred_xstart, e["pred_xstart"])
    for name in ("variance", "log_variance"):
        values = getattr(prediction, name)
        assert values.shape == e["x"].shape and near(values, e[name].view(-1, 1, 1, 1).expand_as(values))
    within = clipped(prediction)
    assert near(within.pred_xstart, e["pred_xstart_clipped"]) and near(within.mean, e["mean_clipped"])


def test_statistics_at_the_first_and_last_step(tmp_path):
    case = load_case("unet_class_conv", tmp_path / "unet.pt")
    prediction = case.predict(case.expected["t_edge"])
    assert near(prediction.mean, case.expected["mean_edge"])
    assert near(prediction.variance[:, 0, 0, 0], case.expected["variance_edge"])
    assert near(prediction.log_variance[:, 0, 0, 0], case.expected["log_variance_edge"])


@pytest.mark.parametrize(
    "spacing, words",
    [
        ("0", "cannot take 0 of 1000 steps"),
        (0, "cannot take 0 of 1000 steps"),
        ("-5", "cannot take -5 of 1000 steps"),
        ("2000", "cannot take 2000 of 1000 steps; steps must be from 1 to 1000"),
        ("10,501", "cannot take 501 of 500 steps"),
        ("abc", "'abc' not understood"),
        ("10,,5", "'10,,5' not understood"),
        ("ddim", "'ddim' not understood"),
        ("ddim300", "no integer stride takes 300 of 1000 steps; try '300'"),
        ("ddim0", "no integer stride takes 0"),
    ],
)
def test_invalid_steps_are_refused(spacing, words):
    with pytest.raises(ValueError, match=words):
        GaussianDiffusion(DiffusionConfig(), spacing)


def test_respacing():
    assert space_timesteps(1000, 1000) == list(range(1000))
    assert space_timesteps(1000, "ddim7") == list(range(0, 1000, 143))
    assert space_timesteps(10, "2,3") == [0, 4, 5, 7, 9]


def test_the_unet_gets_timesteps_on_the_scale_of_1000():
    for rescale, times in ((True, [0, 90, 180]), (False, [0, 9, 18])):
        diffusion = GaussianDiffusion(DiffusionConfig(diffusion_steps=100, rescale_timesteps=rescale), "ddim12")
        assert diffusion.at("timestep", torch.arange(3)).tolist() == times


class Toy(nn.Module):
    """The exact noise prediction for images of independent values from N(0.3, spread²), so the right result of a
    sampler is known. Timesteps are not rescaled: they are the numbers of the steps.
    """

    mean = 0.3

    def __init__(self, noise_schedule: str = "linear", spread: float = 0.2, learn_sigma: bool = False) -> None:
        super().__init__()
        diffusion = DiffusionConfig(noise_schedule=noise_schedule, learn_sigma=learn_sigma, rescale_timesteps=False)
        self.config = SimpleNamespace(diffusion=diffusion)
        self.full = GaussianDiffusion(diffusion)
        self.precision = nn.Parameter(torch.zeros(()))
        self.spread, self.calls = spread, 0

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += 1
        bar = torch.tensor([self.full.at("sqrt_bar", t) ** 2 for t in timesteps.tolist()]).view(-1, 1, 1, 1)
        noise = (1 - bar).sqrt() * (x - bar.sqrt() * self.mean) / self.variance(bar)
        output = [noise, torch.full_like(noise, 0.5)] if self.config.diffusion.learn_sigma else [noise]
        return torch.cat(output, dim=1).float()

    def variance(self, bar: Tensor) -> Tensor:
        return bar * self.spread**2 + 1 - bar

    def answer(self, x: Tensor, step: int) -> Tensor:
        """Where the deterministic process leads from x at a step: as many standard deviations from the mean as x."""
        bar = torch.tensor(self.full.alphas_cumprod[step])
        scores = (x - bar.sqrt() * self.mean) / self.variance(bar).sqrt()
        return (self.mean + self.spread * scores).float()


SHAPE = (3, 8, 8)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def refine(toy: Toy, picture: Tensor | None = None, shape: tuple[int, ...] = SHAPE, **settings) -> Tensor:
    return denoise(toy, shape, generators(0), {}, Denoising(**settings), picture)


def start(seed: int = 0) -> Tensor:
    """The noise that `refine` starts from."""
    return torch.randn(SHAPE, generator=generators(seed)[0])[None]


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++"])
def test_many_steps_converge_to_the_exact_answer(scheduler, noise_schedule):
    toy = Toy(noise_schedule)
    found = refine(toy, num_inference_steps=1000, scheduler=scheduler)
    assert close(found, toy.answer(start(), 999), 1e-2)


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spread", [0.2, 0.5])
@pytest.mark.parametrize("count, share", [(10, 1.0), (25, 0.8), (50, 0.5)])
def test_dpm_solver_is_nearer_than_ddim(count, share, spread, noise_schedule):
    toy = Toy(noise_schedule, spread)
    answer = toy.answer(start(), 999)
    dpm_solver, ddim = (
        (refine(toy, num_inference_steps=count, scheduler=name) - answer).square().mean().sqrt()
        for name in ("dpm-solver++", "ddim")
    )
    assert dpm_solver < share * ddim


def test_ancestral_sampling_finds_the_distribution():
    toy = Toy()
    found = refine(toy, shape=(3, 64, 64), num_inference_steps=1000, scheduler="ddpm")
    assert found.mean().item() == pytest.approx(toy.mean, abs=0.01)
    assert found.std().item() == pytest.approx(toy.spread, rel=0.05)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_strength_is_the_fraction_of_noise(strength):
    toy = Toy()
    picture = torch.linspace(-1, 1, 192).view(1, *SHAPE)
    found = refine(toy, picture, num_inference_steps=100, scheduler="ddim", strength=strength)
    step = space_timesteps(1000, 100)[round(100 * strength) - 1]
    noised = toy.full.add_noise(picture, torch.tensor([step]), start())
    assert close(found, toy.answer(noised, step), 0.05)
    assert toy.calls == round(100 * strength)


def test_stop_at_stops():
    toy = Toy()
    first = refine(toy, num_inference_steps=10, stop_at=1)
    t = torch.tensor([999])
    assert toy.calls == 1
    assert close(first, toy.full.x_start_from_noise(start(), t, toy(start(), t)), 1e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++"])
def test_a_picture_does_not_depend_on_its_batch(scheduler):
    settings = Denoising(num_inference_steps=10, scheduler=scheduler)
    with torch.no_grad():
        together = denoise(Toy(), SHAPE, generators(3, 4, 5), {}, settings)
        alone = denoise(Toy(), SHAPE, generators(4), {}, settings)
    assert close(together[1:2], alone, 1e-6)
    assert not close(together[:1], alone, 1e-2)


def test_the_last_ancestral_step_adds_no_noise():
    toy = Toy()
    diffusion = GaussianDiffusion(toy.config.diffusion, 10)
    predict = unet_predict(toy, diffusion, {})
    with torch.no_grad():
        x, _ = next(sample_ddpm(predict, diffusion, start(), [0], None))
        assert torch.equal(x, predict(start(), 0).mean)


@pytest.fixture(scope="module")
def diffusers():
    import diffusers

    return diffusers


# "ddim25" takes the steps of diffusers' "leading" spacing.
SAME = {"num_inference_steps": 25}
OWN = {"num_inference_steps": "ddim25"}


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_of_diffusers_is_ours(diffusers, noise_schedule, prediction_type):
    # Its own noise schedule differs and has to be replaced by that of the UNet.
    scheduler = diffusers.DDIMScheduler(
        beta_end=0.5, clip_sample=False, prediction_type=prediction_type, timestep_spacing="leading"
    )
    toy = Toy(noise_schedule)
    assert close(refine(toy, scheduler=scheduler, **SAME), refine(toy, scheduler="ddim", **OWN), 1e-4)


def test_euler_of_diffusers_is_ddim(diffusers):
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")  # the same steps in other coordinates
    assert close(refine(Toy(), scheduler=scheduler, **SAME), refine(Toy(), scheduler="ddim", **OWN), 1e-3)


@pytest.mark.parametrize("variance_type, learn_sigma", [("fixed_large", False), ("learned_range", True)])
def test_ddpm_of_diffusers_is_ours(diffusers, variance_type, learn_sigma):
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=variance_type, timestep_spacing="leading")
    toy = Toy(learn_sigma=learn_sigma)
    found, own = refine(toy, scheduler=scheduler, **SAME), refine(toy, scheduler="ddpm", **OWN)
    assert close(found, own, 1e-3)


def test_dpm_solver_of_diffusers_converges_to_the_same(diffusers):
    scheduler, toy = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"), Toy()
    answer = toy.answer(start(), 999)
    assert close(refine(toy, scheduler=scheduler, num_inference_steps=100), answer, 0.03)
    assert close(refine(toy, scheduler="dpm-solver++", num_inference_steps=100), answer, 0.03)


def test_dpm_solver_of_diffusers_on_our_steps_is_ours(diffusers):
    class Scheduler(diffusers.DPMSolverMultistepScheduler):
        def set_timesteps(self, count: int, device=None) -> None:
            super().set_timesteps(timesteps=space_timesteps(1000, count)[::-1], device=device)

    # The last step differs: ours predicts the image at step 0, diffusers' at its last timestep.
    settings = {"num_inference_steps": 20, "stop_at": 19}
    found, own = refine(Toy(), scheduler=Scheduler(), **settings), refine(Toy(), scheduler="dpm-solver++", **settings)
    assert close(found, own, 1e-3)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_strength_with_a_scheduler_of_diffusers(diffusers, name):
    extra = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler, toy = getattr(diffusers, name)(timestep_spacing="trailing", **extra), Toy()
    picture = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    found = refine(toy, picture, (3, 32, 32), num_inference_steps=250, scheduler=scheduler, strength=0.2)
    assert toy.calls == 50
    bar = toy.full.alphas_cumprod[199]
    kept = toy.spread * math.sqrt(bar / (bar * toy.spread**2 + 1 - bar))  # of the picture; the rest is noise
    noise = found - (toy.mean + kept * (picture - toy.mean))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(kept * math.sqrt(1 / bar - 1), rel=0.1)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"scheduler": "plms"}, "'plms' is not known; expected .*'ddim'"),
        ({"strength": 0.0}, "strength=0.0"),
        ({"stop_at": -1}, "stop_at=-1"),
        ({"stop_at": 0}, "stop_at=0"),
        ({"cutn": 0}, "cutn=0"),
        ({"guidance_share": 1.5}, "guidance_share=1.5"),
        ({"clip_guidance_scale": -1}, "clip_guidance_scale=-1"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Denoising(**settings)


def test_a_scheduler_of_diffusers_takes_a_number_of_steps(diffusers):
    with pytest.raises(ValueError, match="takes a number of steps, not 'ddim25'"):
        Denoising(num_inference_steps="ddim25", scheduler=diffusers.DDIMScheduler())


def test_a_scheduler_takes_the_training_steps_of_the_unet(monkeypatch):
    """With 4,000 training steps, a scheduler of diffusers begins at the noisy end, timestep 1000 of the UNet."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    config = DiffusionConfig(diffusion_steps=4000)
    channels = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=())
    unet, times = UNet(UNetConfig(**channels, image_size=32, num_heads=1, diffusion=config)).eval(), []
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda x, t: times.append(float(t[0])) or forward(x, t))
    settings = Denoising(num_inference_steps=5, scheduler=DDIMScheduler(timestep_spacing="trailing"))
    with torch.no_grad():
        denoise(unet, (3, 32, 32), [torch.Generator().manual_seed(0)], {}, settings)
    assert times[0] > 990 and len(times) == 5


def test_a_scheduler_that_cannot_take_the_unets_noise_schedule_is_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(ValueError, match="scheduler FlowMatchEulerDiscreteScheduler is not known; expected 'ddpm'"):
        Denoising(scheduler=FlowMatchEulerDiscreteScheduler())


STOCHASTIC = ("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler")
STOCHASTIC += ("KDPM2AncestralDiscreteScheduler",)


def made_schedulers():
    """Every scheduler class of diffusers that can be created here, by its name."""
    import diffusers

    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        try:
            known = inspect.signature(kind.__init__).parameters
            settings = {"clip_sample": False, "timestep_spacing": "linspace"}
            yield name, kind(**{key: value for key, value in settings.items() if key in known})
        except (ImportError, TypeError, AttributeError):  # needs another package, or arguments
            continue


def test_every_scheduler_of_diffusers_converges_or_is_refused_by_name():
    made = dict(made_schedulers())
    missing = {name for name in DIFFUSERS if name not in made}
    assert missing <= {"LMSDiscreteScheduler"}  # needs scipy
    picture, noise = torch.linspace(-1, 1, 192).view(1, *SHAPE), start()
    for name, scheduler in made.items():
        if name not in DIFFUSERS:
            with pytest.raises(ValueError, match=f"scheduler {name} is not known; expected .*DDIMScheduler"):
                Denoising(scheduler=scheduler)
            continue
        for strength, step in ((1.0, 999), (0.5, 499)):
            toy = Toy()
            found = refine(toy, picture, num_inference_steps=50, scheduler=scheduler, strength=strength)
            answer = toy.answer(toy.full.add_noise(picture, step, noise), step)
            if name in STOCHASTIC:
                assert found.mean().item() == pytest.approx(toy.mean, abs=0.06), (name, strength)
                assert found.std().item() == pytest.approx(toy.spread, abs=0.05), (name, strength)
            else:
                assert (found - answer).square().mean().sqrt() < 0.03, (name, strength)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.5, 0.3])
def test_strength_with_a_scheduler_of_second_order_begins_with_a_whole_step(diffusers, name, strength):
    toy, picture = Toy(), torch.linspace(-1, 1, 192).view(1, *SHAPE)
    refine(toy, picture, num_inference_steps=10, scheduler=getattr(diffusers, name)(), strength=strength)
    assert toy.calls == 2 * 10 * strength - 1
