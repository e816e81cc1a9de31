"""The function `predict(x, i)` that runs the UNet for the samplers. On CUDA it replays CUDA graphs.

A step of a UNet launches up to a thousand kernels. For small images or networks, running them takes a GPU less time
than launching them one by one takes Python. The graphs are kept with the UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dall3.diffusion.guidance import GuidanceLoss, GuidedPredict, add_gradient
from dall3.diffusion.samplers import Predict
from dall3.diffusion.schedule import GaussianDiffusion, Prediction
from dall3.models.interface import kept_bytes
from dall3.models.unet import UNet
from dall3.tokens.cuda_graph import CudaGraph

KEPT_GRAPHS = 2  # number of graphs that a UNet keeps between calls, such as a guided and an unguided step


def with_circular_padding(unet: UNet) -> Callable[..., Tensor]:
    """Wrap a UNet for seamless images: pad the inputs circularly and crop the output."""

    def run(x: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        side, margin = x.shape[-1], unet.config.downsampling

        def pad(tensor: Tensor) -> Tensor:
            return F.pad(tensor, [margin * tensor.shape[-1] // side] * 4, mode="circular")

        padded = {name: pad(tensor) for name, tensor in conditioning.items()}
        out: Tensor = unet(pad(x), timesteps, **padded)
        return out[..., margin : margin + side, margin : margin + side]

    return run


def unet_predict(
    unet: UNet, diffusion: GaussianDiffusion, conditioning: dict[str, Tensor], seamless: bool = False
) -> Callable[[Tensor, float | Tensor], Prediction]:
    """Wrap a UNet as `predict(x, i)`. It runs in the dtype of its weights; the diffusion statistics are float32.

    i: the step, a number; or a tensor (batch,), which a CUDA graph needs to run other steps than the captured one.
    """
    dtype, run = next(unet.parameters()).dtype, with_circular_padding(unet) if seamless else unet

    def predict(x: Tensor, i: float | Tensor) -> Prediction:
        timestep = diffusion.at("timestep", i)
        timesteps = timestep if isinstance(timestep, Tensor) else torch.full((len(x),), timestep, device=x.device)
        return diffusion.predict(run(x.to(dtype), timesteps, **conditioning).float(), x, i)

    return predict


@contextmanager
def captured_on_cuda(
    predict: Predict,
    unguided: Predict,
    unet: UNet,
    diffusion: GaussianDiffusion,
    conditioning: dict[str, Tensor],
    seamless: bool,
    device: torch.device,
) -> Iterator[Predict]:
    """On CUDA: `predict` as a `CapturedPredict`, whose graphs the UNet keeps afterwards. Elsewhere: `predict` itself.

    predict: `unguided`, or the result of `guided` for it; other wrappers are not captured. unguided: the result of
    `unet_predict`. unet, diffusion, conditioning, seamless: the arguments of `unet_predict`.
    """
    guide = predict if isinstance(predict, GuidedPredict) and isinstance(predict.loss, GuidanceLoss) else None
    inner = predict if guide is None else guide.predict
    if device.type != "cuda" or inner is not unguided:
        yield predict
        return
    captured = CapturedPredict(predict, guide, unet, diffusion, conditioning, seamless, device)
    try:
        yield captured
    finally:
        captured.release()


class CapturedPredict:
    """`predict(x, i)` that replays CUDA graphs, one for guided steps and one for unguided ones.

    A graph is captured at its first use for the shapes and settings of this call, or taken from `unet.graphs`, so that
    no other call uses it at the same time. `release` gives it back.
    """

    def __init__(
        self,
        predict: Predict,
        guide: GuidedPredict | None,
        unet: UNet,
        diffusion: GaussianDiffusion,
        conditioning: dict[str, Tensor],
        seamless: bool,
        device: torch.device,
    ) -> None:
        self.predict, self.guide = predict, guide  # without graphs; guide: `predict` if it is guided
        self.unet, self.diffusion, self.conditioning, self.seamless = unet, diffusion, conditioning, seamless
        self.device = device
        self.graphs: dict[Any, CudaGraph] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, i: float) -> Prediction:
        loss = self.guide.loss if self.guide is not None and i >= self.guide.guide_from else None
        assert loss is None or isinstance(loss, GuidanceLoss)
        # The graph holds the tables of all training steps, so that it serves any number of steps.
        step = self.diffusion.timestep_map[i] if isinstance(i, int) else i
        inputs = {"x": x, "step": torch.full((len(x),), float(step), device=x.device)} | self.conditioning
        inputs |= {} if loss is None else loss.sample_inputs(x.shape[-1])
        modules: list[nn.Module] = [self.unet] if loss is None or loss.clip is None else [self.unet, loss.clip]
        key = self.key(inputs, loss)
        if key not in self.graphs:
            graph = self.unet.graphs.pop(key, None)
            if graph is None or not graph.reads(modules):
                del graph
                graph = self.capture(inputs, loss, modules)
            self.graphs[key] = graph
        # Copies, because the next step overwrites the outputs.
        found = {name: tensor.clone() for name, tensor in self.graphs[key](*inputs.values()).items()}
        return Prediction(self.diffusion, x, i, **found)

    def key(self, inputs: dict[str, Tensor], loss: GuidanceLoss | None) -> Any:
        """What a graph depends on besides the weights and the values of `inputs`."""
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items())
        settings = None if loss is None else (id(loss.clip), loss.scale, loss.cutn, loss.tv_scale, loss.range_scale)
        modes = self.unet.gradient_checkpointing, torch.is_autocast_enabled("cuda")
        return shapes, self.seamless, settings, modes

    def capture(self, inputs: dict[str, Tensor], loss: GuidanceLoss | None, modules: list[nn.Module]) -> CudaGraph:
        """Capture a step. If memory runs out, free the graphs that the UNet keeps and capture again."""
        tables = GaussianDiffusion(self.unet.config.diffusion)
        function = make_step(self.unet, tables, list(inputs), self.seamless, loss)
        options: dict[str, Any] = dict(device=self.device, modules=modules, keep=tables)
        try:
            return CudaGraph(function, *inputs.values(), **options)
        except torch.cuda.OutOfMemoryError:
            if not self.unet.graphs:
                raise
        self.unet.free_graphs()
        torch.cuda.empty_cache()
        return CudaGraph(function, *inputs.values(), **options)

    def release(self) -> None:
        """Return the graphs to the UNet for the next call. Graphs above `kept_bytes` are freed instead."""
        small = {key: graph for key, graph in self.graphs.items() if graph.bytes <= kept_bytes(self.device)}
        self.unet.graphs = dict([*(self.unet.graphs | small).items()][-KEPT_GRAPHS:])
        self.graphs = {}


def make_step(
    unet: UNet, diffusion: GaussianDiffusion, names: list[str], seamless: bool, loss: GuidanceLoss | None
) -> Callable[..., dict[str, Tensor]]:
    """A denoising step as a function of tensors. It returns the tensors of a `Prediction` by name.

    diffusion: with all training steps. names: the names of its arguments: "x", "step" (float32 (batch,), an index of
    the tables), the UNet's conditioning, and the inputs of the loss.
    """

    def step(*tensors: Tensor) -> dict[str, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        x, i = given.pop("x"), given.pop("step")
        for_loss = {name: given.pop(name) for name in ("cutouts", "targets", "weights") if name in given}
        predict = unet_predict(unet, diffusion, given, seamless)
        if loss is None:
            prediction = predict(x, i)
        else:
            prediction = add_gradient(predict, diffusion, partial(loss.of, **for_loss), x, i)
        found = {name: getattr(prediction, name) for name in ("pred_xstart", "variance_share", "gradient")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return step
