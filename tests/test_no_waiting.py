"""Neither loop synchronises with a GPU: both run on the meta device, where no value can be read.

Reading a value back (`item`, `tolist`, `nonzero`, a branch on a tensor) raises an error there. A tensor that is created
outside of the device shows up as an operation with a result on the CPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dall3.diffusion import denoising as diffusion
from dall3.diffusion import guidance
from dall3.diffusion.captured import make_step
from dall3.diffusion.denoising import Denoising, denoising_steps
from dall3.diffusion.guidance import GuidanceLoss, clip_loss, guided
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import UNet, UNetConfig
from dall3.tokens.decoding import image_token_steps
from dall3.tokens.sampling import Sampling


class OffDevice(TorchDispatchMode):
    """While `on` is True, collects the names of operations whose results are not on the meta device."""

    def __init__(self):
        super().__init__()
        self.on, self.found = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.on and any(isinstance(leaf, torch.Tensor) and not leaf.is_meta for leaf in tree_leaves(result)):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.9}, {"top_k": 0.9}, {"top_p": 0.9, "cond_scale": 3.0}],
    ids=["plain", "top_p", "top_k", "cond_scale"],
)
def test_the_token_loop_neither_reads_back_nor_leaves_the_device(settings):
    config = TransformerConfig(50, 40, 8, 32, 2, heads=2, dim_head=16, grid_size=4, attn_types=("full", "axial_row"))
    transformer = DalleTransformer(config).to("meta")
    text, uniforms = torch.zeros(8, dtype=torch.int64, device="meta"), torch.zeros(3, 16, device="meta")
    kept = torch.zeros(16, dtype=torch.int64, device="meta")
    with OffDevice() as off_device:
        for _, _, count in image_token_steps(transformer, text, uniforms, Sampling(**settings), 2, kept):  # noqa: B007
            off_device.on = True
    assert count == 16 and off_device.found == []


class MetaCLIP(torch.nn.Module):
    """A minimal CLIP for guidance."""

    image_size = 16

    def embed_images(self, images):
        return images.flatten(1)[:, :8]


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
def test_the_denoising_loop_neither_reads_back_nor_leaves_the_device(monkeypatch, scheduler, is_guided):
    config = UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2, embedding_dims=(6, 32))
    unet = UNet(config).to("meta").requires_grad_(False)
    real_randn, real_rand = torch.randn, torch.rand
    # The meta device has no generators: functions that take one get None.
    generator = type("Generator", (), {"device": torch.device("meta")})()
    for module in (diffusion, guidance):
        assert module.torch is torch
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None, device=None: real_randn(*shape, device=device))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None, device=None: real_rand(*shape, device=device))
    embeddings = torch.zeros(2, 6, 32, 32, device="meta")

    def guide(predict, diffusion, lowest):
        targets, weights = torch.zeros(1, 8, device="meta"), torch.zeros(1, device="meta")
        pull = clip_loss(MetaCLIP(), targets, weights, 1000.0, 4, generator)
        return guided(predict, diffusion, lowest, pull)

    settings = Denoising(num_inference_steps=5, scheduler=scheduler, clip_guidance_scale=1000.0 * is_guided)
    conditioning = {"image_embeds": embeddings}
    steps = denoising_steps(
        unet, (3, 32, 32), [generator] * 2, conditioning, settings, None, guide if is_guided else None
    )
    with torch.no_grad(), OffDevice() as off_device:
        for step in steps:  # noqa: B007  the noise schedule goes to the device with the first
            off_device.on = True
    assert step.number == 4 and off_device.found == []


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
def test_the_captured_denoising_step_neither_reads_back_nor_leaves_the_device(is_guided):
    config = UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2, embedding_dims=(6, 32))
    unet = UNet(config).to("meta").requires_grad_(False)
    loss = GuidanceLoss(MetaCLIP(), scale=1000.0, cutn=4, tv_scale=1.0, range_scale=1.0)
    inputs = {"x": torch.zeros(2, 3, 32, 32), "step": torch.zeros(2), "image_embeds": torch.zeros(2, 6, 32, 32)}
    if is_guided:
        inputs |= dict(cutouts=torch.zeros(4, 3, dtype=torch.int64), targets=torch.zeros(1, 8), weights=torch.zeros(1))
    tensors = [tensor.to("meta") for tensor in inputs.values()]
    tables = GaussianDiffusion(config.diffusion)
    step = make_step(unet, tables, list(inputs), False, loss if is_guided else None)
    with torch.no_grad(), OffDevice() as off_device:
        step(*tensors)  # the noise schedule goes to the device in the first warm-up run
        off_device.on = True
        found = step(*tensors)
    assert found["pred_xstart"].shape == (2, 3, 32, 32) and ("gradient" in found) == is_guided
    assert off_device.found == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.9, "cond_scale": 3.0}, {"top_k": 0.9}, {"top_k": 8, "top_p": 0.9, "temperature": 0.7}],
    ids=["plain", "top_p", "top_k", "codes"],
)
def test_the_token_step_is_one_graph_and_the_same_for_every_token(settings):
    """The step as `image_token_steps` compiles it: a graph of the network, and one of the sampling."""
    torch._dynamo.reset()
    config = TransformerConfig(50, 40, 8, 32, 2, heads=2, dim_head=16, grid_size=4, attn_types=("full", "axial_row"))
    transformer, graphs = DalleTransformer(config).double().eval().requires_grad_(False), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    text, uniforms = torch.arange(8), torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    kept = torch.full((16,), -1)
    kept[5] = 7
    *_, (expected, _, _) = image_token_steps(transformer, text, uniforms, Sampling(**settings), kept=kept)
    transformer.compile(backend=count)
    *_, (drawn, _, _) = image_token_steps(transformer, text, uniforms, Sampling(**settings), kept=kept)
    assert len(graphs) == 2
    list(image_token_steps(transformer, text, uniforms, Sampling(**settings | {"temperature": 0.5})))
    assert len(graphs) == 3  # other settings compile the sampling only
    assert torch.equal(drawn, expected) and (drawn[:, 5] == 7).all() and len(drawn.unique()) > 3


def test_modes_of_torch_compile_that_capture_graphs_are_left_to_the_loops(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    config = TransformerConfig(50, 40, 8, 32, 2, heads=2, dim_head=16, grid_size=2)
    for mode in ("reduce-overhead", "max-autotune", "default"):
        transformer, unet = DalleTransformer(config), UNet(UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2))
        transformer.compile(mode=mode)
        for _ in image_token_steps(transformer, torch.arange(8), torch.zeros(1, 4), Sampling()):
            pass
        unet.compile(mode=mode, dynamic=None)
    of_step, of_sampling, of_unet = seen[::3], seen[1::3], seen[2::3]
    assert [options["mode"] for options in of_step] == [None, "max-autotune-no-cudagraphs", "default"]
    assert of_step[0] == of_sampling[0] == dict(fullgraph=True, dynamic=False, mode=None)
    assert of_unet[0] == dict(fullgraph=True, dynamic=None, mode=None)


def test_a_compiled_step_takes_more_shapes_than_torch_compile_does_by_default():
    torch._dynamo.reset()
    transformer = DalleTransformer(TransformerConfig(9, 8, 4, 8, 1, heads=1, dim_head=16, grid_size=2))
    transformer.requires_grad_(False).compile(backend="eager")
    for count in range(1, 12):
        list(image_token_steps(transformer, torch.arange(4), torch.zeros(count, 4), Sampling()))


def test_the_denoising_step_is_one_graph():
    torch._dynamo.reset()
    unet = UNet(UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2, embedding_dims=(6, 32))).eval().requires_grad_(False)
    graphs, schedule = [], GaussianDiffusion(unet.config.diffusion, 5)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    embeddings, x = torch.rand(1, 6, 32, 32), torch.rand(1, 3, 32, 32)
    compiled = torch.compile(unet.forward, fullgraph=True, backend=count)
    with torch.no_grad():
        for i in range(4, -1, -1):
            time = schedule.at("timestep", torch.tensor([i]))
            same = torch.allclose(compiled(x, time, image_embeds=embeddings), unet(x, time, image_embeds=embeddings))
            assert same
    assert len(graphs) == 1
