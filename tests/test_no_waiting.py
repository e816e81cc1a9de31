"""What would make a GPU wait: both loops run on the meta device, where no value can be read and none is computed.

A value that is read back there (`item`, `tolist`, `nonzero`, a branch on a tensor) is an error; a tensor that is made
elsewhere than on the device shows up as an operation whose result lies on the CPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dall3.diffusion import denoising as diffusion
from dall3.diffusion import guidance
from dall3.diffusion.denoising import Denoising, denoising_steps
from dall3.diffusion.guidance import clip_loss, guided
from dall3.diffusion.schedule import GaussianDiffusion
from dall3.models.transformer import DalleTransformer, TransformerConfig
from dall3.models.unet import UNet, UNetConfig
from dall3.tokens.decoding import image_token_steps
from dall3.tokens.sampling import Sampling


class Elsewhere(TorchDispatchMode):
    """Collects the names of operations, while it is `on`, whose results do not lie on the meta device."""

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
def test_the_token_loop_reads_nothing_back_and_makes_nothing_elsewhere(settings):
    config = TransformerConfig(50, 40, 8, 32, 2, heads=2, dim_head=16, grid_size=4, attn_types=("full", "axial_row"))
    transformer = DalleTransformer(config).to("meta")
    text, uniforms = torch.zeros(8, dtype=torch.int64, device="meta"), torch.zeros(3, 16, device="meta")
    kept = torch.zeros(16, dtype=torch.int64, device="meta")
    with Elsewhere() as elsewhere:
        for _, _, count in image_token_steps(transformer, text, uniforms, Sampling(**settings), 2, kept):  # noqa: B007
            elsewhere.on = True
    assert count == 16 and elsewhere.found == []


class LookingGlass(torch.nn.Module):
    """A CLIP as guidance sees it."""

    image_size = 16

    def embed_images(self, images):
        return images.flatten(1)[:, :8]


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
def test_the_denoising_loop_reads_nothing_back_and_makes_nothing_elsewhere(monkeypatch, scheduler, is_guided):
    config = UNetConfig(32, (1, 2), 1, (1,), 32, num_heads=2, embedding_dims=(6, 32))
    unet = UNet(config).to("meta").requires_grad_(False)
    real_randn, real_rand = torch.randn, torch.rand
    # There are no random numbers on the meta device: what asks for some with a generator gets none.
    generator = type("Generator", (), {"device": torch.device("meta")})()
    for module in (diffusion, guidance):
        assert module.torch is torch
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None, device=None: real_randn(*shape, device=device))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None, device=None: real_rand(*shape, device=device))
    embeddings = torch.zeros(2, 6, 32, 32, device="meta")

    def guide(predict, diffusion, lowest):
        targets, weights = torch.zeros(1, 8, device="meta"), torch.zeros(1, device="meta")
        pull = clip_loss(LookingGlass(), targets, weights, 1000.0, 4, generator)
        return guided(predict, diffusion, lowest, pull)

    settings = Denoising(num_inference_steps=5, scheduler=scheduler, clip_guidance_scale=1000.0 * is_guided)
    conditioning = {"image_embeds": embeddings}
    steps = denoising_steps(
        unet, (3, 32, 32), [generator] * 2, conditioning, settings, None, guide if is_guided else None
    )
    with torch.no_grad(), Elsewhere() as elsewhere:
        for step in steps:  # noqa: B007  the noise schedule goes to the device with the first
            elsewhere.on = True
    assert step.number == 4 and elsewhere.found == []


def test_the_token_step_is_one_graph_and_the_same_for_every_token():
    torch._dynamo.reset()
    config = TransformerConfig(50, 40, 8, 32, 2, heads=2, dim_head=16, grid_size=4)
    transformer, graphs = DalleTransformer(config).eval().requires_grad_(False), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(token, place, position):
        x = transformer.embed_image(token, place)
        return transformer.image_logits(transformer.run(x, position, None, caches))

    caches, index = transformer.make_caches(), torch.arange(config.seq_len)
    text = transformer.embed_text(torch.zeros(2, 8, dtype=torch.int64))
    compiled = torch.compile(step, fullgraph=True, backend=count)
    with torch.no_grad():
        transformer.run(text, index[: config.text_length], None, caches)
        drawn = torch.randint(40, (2, 15), generator=torch.Generator().manual_seed(0))
        logits = [
            compiled(drawn[:, i : i + 1], index[i : i + 1], index[config.text_length + i :][:1]) for i in range(15)
        ]
        expected = transformer(torch.zeros(2, 8, dtype=torch.int64), drawn)[:, -15:, -40:]
    assert len(graphs) == 1
    assert torch.allclose(torch.cat(logits, dim=1), expected, atol=1e-4)


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
