"""Upscalers in the formats that `spandrel` reads: its loader gets the tensors, which `archive` reads."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dall3.models.unet import UNet
from dall3.models.upscaler import Upscaler, UpscalerConfig
from dall3.weights.archive import CheckpointError, file_error, read_archive
from dall3.weights.convert.guided_diffusion import load_unet
from dall3.weights.convert.state import (
    UNET,
    FoundState,
    Kind,
    Settings,
    State,
    WithoutInit,
    checked,
    choose_network,
    dictionaries,
    find_networks,
    keys_of,
    kind_of,
    read_settings,
)
from dall3.weights.registry import PathLike

INSTALL = "run pip install 'dall3[upscale]'"
UPSCALER = Kind("an upscaler that spandrel reads, such as Real-ESRGAN or SwinIR", "")
PREFIXES = ("module.", "netG.")  # some training scripts put one before all names


class NotInstalled(CheckpointError):
    """The weights need a package that is not installed."""


class MetaWeights(WithoutInit):
    """Create the weights of a network on the meta device, without memory. Constructors can still compute with other
    tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {}, device="meta") if func is torch.empty else kwargs
        return super().__torch_function__(func, types, args, kwargs)


@checked
def load_upscaler(path: PathLike, config: Settings | None = None) -> Upscaler:
    """Load an upscaler in any format that spandrel reads, in float32 on the CPU.

    path: a file of ESRGAN, Real-ESRGAN, SwinIR or another network that makes an RGB image larger. spandrel infers the
    architecture from the tensors. config: `tile` and `overlap` of `UpscalerConfig`, a dictionary or a JSON file.

    Raises CheckpointError for a file of another kind, and without spandrel (`pip install 'dall3[upscale]'`).

    >>> upscaler = load_upscaler("RealESRGAN_x4plus.pth", {"tile": 128})  # doctest: +SKIP
    """
    return load_from(path, config, UPSCALER)


@checked
def load_super_resolution(path: PathLike, config: Settings | None = None) -> UNet | Upscaler:
    """Load a UNet of guided-diffusion as `load_unet` does, or an upscaler as `load_upscaler` does."""
    if find_networks(read_archive(path), UNET):
        return load_unet(path, config if config is None or isinstance(config, str | Path) else dict(config))
    return load_from(path, config, UNET, UPSCALER)


def load_from(path: PathLike, config: Settings | None, *kinds: Kind) -> Upscaler:
    """Load an upscaler as `load_upscaler` does. kinds: what the file was expected to be, for the error message."""
    state = find_upscaler(path, *kinds).tensors
    settings = read_settings(config, "tile and overlap")
    if odd := sorted(settings.keys() - {"tile", "overlap"}):
        raise file_error(path, f"an upscaler has no setting {odd[0]}; expected tile and overlap")
    return upscaler_of(state, path, settings)


def check_super_resolution_file(path: PathLike) -> None:
    """Raise CheckpointError for a file that `load_super_resolution` cannot read.

    Without spandrel, a file that may be an upscaler is accepted.
    """
    with suppress(NotInstalled):
        if not find_networks(read_archive(path), UNET):
            find_upscaler(path, UNET, UPSCALER)


def find_upscaler(path: PathLike, *kinds: Kind) -> FoundState:
    """Find the tensors of an upscaler in a checkpoint; averaged (EMA) weights are preferred.

    kinds: what the file was expected to be, for the error message. Raises CheckpointError if the file has none or
    several, and NotInstalled without spandrel.
    """
    archive = read_archive(path)
    found = [
        FoundState(UPSCALER, place, without_training_prefix(state), beside)
        for place, state, beside in dictionaries(archive)
    ]
    kind = kind_of(archive)
    wrong = file_error(path, f"looks like {kind}; expected {' or '.join(map(str, kinds))}; {keys_of(archive)}")
    try:
        from spandrel import MAIN_REGISTRY
    except ImportError:
        if kind != "something else" or not found:
            raise wrong from None
        raise NotInstalled(f"{path}: an upscaler is read by spandrel, which is not installed; {INSTALL}") from None
    detectors = MAIN_REGISTRY.architectures("detection")
    known = [one for one in found if any(detector.detect(one.tensors) for detector in detectors)]
    if not known:
        raise wrong
    return choose_network(known, path)


def without_training_prefix(state: State) -> State:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def upscaler_of(state: State, path: PathLike, settings: dict[str, Any]) -> Upscaler:
    """Build an upscaler from its tensors. settings: `tile` and `overlap`.

    Raises CheckpointError for tensors that match no architecture, and for a network that is not an upscaler.
    """
    numbers = (int(number) for name in state for number in name.split(".") if number.isdecimal())
    # spandrel would build a network with this many layers before it compares the names.
    if max(numbers, default=0) > len(state):
        raise file_error(path, "its tensors are numbered beyond their count; expected the tensors of an upscaler")
    data = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > 4 * sum(data.values()):
        raise file_error(path, "its tensors share too little data; expected the tensors of an upscaler")
    read_without_weights(state)  # compares names and shapes before memory is allocated
    with WithoutInit():
        descriptor = read_by_spandrel(state)
    config = UpscalerConfig(descriptor.architecture.id, descriptor.scale, **settings)
    return Upscaler(descriptor, config)


def read_without_weights(state: State) -> Any:
    """Call `read_by_spandrel` without allocating memory for the weights."""
    with MetaWeights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter", UserWarning)
        return read_by_spandrel(state)


def read_by_spandrel(state: State) -> Any:
    """Build spandrel's descriptor of the network with these tensors.

    Raises ValueError if it is not an upscaler of RGB images.
    """
    from spandrel import MAIN_REGISTRY, ImageModelDescriptor

    found: Any = MAIN_REGISTRY.load(dict(state))
    kind = (
        f"{found.architecture.name}, {found.input_channels} to {found.output_channels} channels, factor {found.scale}"
    )
    fits = isinstance(found, ImageModelDescriptor) and found.scale > 1
    if not fits or (found.input_channels, found.output_channels) != (3, 3):
        raise ValueError(f"{kind}; expected a network that makes RGB images larger")
    return found


@checked
def load_saved_upscaler(path: PathLike, state: State, config: UpscalerConfig) -> Upscaler:
    """Build an upscaler from the state dict of an `Upscaler`.

    Raises CheckpointError if the tensors do not fit the configuration.
    """
    tensors = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    try:
        import spandrel  # noqa: F401
    except ImportError:
        raise NotInstalled(f"{path}: an upscaler is read by spandrel, which is not installed; {INSTALL}") from None
    found = upscaler_of(tensors, path, {"tile": config.tile, "overlap": config.overlap})
    if found.config != config:
        raise file_error(path, f"its tensors are of {found.config}, its config.json says {config}")
    return found


def check_can_be_saved(upscaler: Upscaler) -> None:
    """Raise ValueError for a network that spandrel cannot recognise from its state dict."""
    expected, hyperparameters = upscaler.descriptor, getattr(upscaler.network, "hyperparameters", None)
    try:
        found = read_without_weights(upscaler.network.state_dict())
        same = (found.architecture.id, found.scale) == (expected.architecture.id, expected.scale)
        same = same and getattr(found.model, "hyperparameters", None) == hyperparameters
    except Exception:  # spandrel's readers raise any exception
        same = False
    if not same:
        name = upscaler.config.architecture
        raise ValueError(f"this {name} cannot be saved: its tensors do not determine its settings; keep its file")
