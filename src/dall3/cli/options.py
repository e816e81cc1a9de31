"""Options that several commands share, and the conversion of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

WHICH_WEIGHTS = "the name of a set of weights, a folder, or owner/name on the Hugging Face Hub"


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def add_placement(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="device, such as cuda or cpu (default: cuda if available, else cpu)")
    dtypes = ("float32", "float16", "bfloat16")
    about = "type of the weights (default: float32; on a CPU, published float16 transformers stay float16)"
    add("--dtype", choices=dtypes, help=about)


def add_sampling(parser: argparse.ArgumentParser, top_p_default: str = "the weights' setting, or off") -> None:
    """Add the options of token sampling. None has a default here: those of the weights and of `Sampling` apply."""
    add = parser.add_argument
    add("--top_k", type=count_or_fraction, help="codes to keep, such as 256; or fraction of the vocabulary to drop, <1")
    add("--top_p", type=float, help=f"probability to keep (nucleus sampling), in (0, 1] (default: {top_p_default})")
    add("--temperature", type=float, help="divides the logits (default: the weights' setting, or 1)")
    add("--cond_scale", type=float, help="scale of classifier-free guidance (default: the weights' setting, or 1, off)")


def count_or_fraction(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def add_diffusion(parser: argparse.ArgumentParser, clip_guidance_default: str) -> None:
    """Add the options of denoising. None has a default here: those of the weights and of `Denoising` apply.

    clip_guidance_default: what applies without --clip_guidance.
    """
    add = parser.add_argument
    guide = f"guide the denoising with CLIP (default: {clip_guidance_default})"
    add("--clip_guidance", action=argparse.BooleanOptionalAction, help=guide)
    default = "default: the weights' setting, or"
    add("--clip_guidance_scale", type=float, help=f"scale of CLIP guidance ({default} 1000)")
    add("--guidance_share", type=float, help=f"fraction of the steps that are guided, from the first ({default} 1)")
    add("--tv_scale", type=float, help=f"weight of the total variation loss, which smooths ({default} 0)")
    add("--range_scale", type=float, help=f"weight of the loss on values outside of [-1, 1] ({default} 0)")
    add("--cutn", type=int, help=f"cut-outs of an image that CLIP embeds in a step ({default} 16)")
    steps = "--timestep_respacing", "--num_inference_steps"
    add(*steps, help=f"denoising steps: a number, or a respacing such as '10,10,5' or ddim25 ({default} 25)")
    add("--scheduler", help=f"ddim, ddpm (upstream's), dpm-solver++, or a name of diffusers ({default} ddim)")
    noise = "pure noise; 0.5 for an unconditional UNet"
    add("--strength", type=float, help=f"fraction of noise in the initial image, in (0, 1] ({default} {noise})")


def add_refinement(parser: argparse.ArgumentParser, clip_guidance_default: str = "off") -> None:
    """Add the options of the commands that load a UNet and a CLIP from files."""
    add = parser.add_argument
    add("--model_config", metavar="JSON", help="guided-diffusion's flags, for a UNet of an unusual size")
    add("--clip_path", default="ViT-B-16/openai", help="CLIP: a file, or an open_clip name (default: %(default)s)")
    add_diffusion(parser, clip_guidance_default)
    add_seed(parser)
    add_placement(parser)
    add("--overwrite", action="store_true", help="replace files of an earlier run")


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options among `names` that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `add_sampling` that were given. The others come from the weights' defaults."""
    return given(args, "temperature", "top_k", "top_p", "cond_scale")


def asks_for_guidance(args: argparse.Namespace) -> bool:
    """Whether the options ask for CLIP guidance: by --clip_guidance, or by a scale other than 0."""
    return bool(args.clip_guidance_scale) if args.clip_guidance is None else args.clip_guidance


def refinement(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The settings of `add_diffusion` that were given. The others come from the weights' defaults."""
    steps = args.timestep_respacing
    if steps is not None:
        more["num_inference_steps"] = int(steps) if steps.isdecimal() else steps
    if args.clip_guidance is False:
        more["clip_guidance_scale"] = 0
    elif args.clip_guidance_scale is not None:
        more["clip_guidance_scale"] = args.clip_guidance_scale
    return given(args, "guidance_share", "tv_scale", "range_scale", "cutn", "scheduler", "strength") | more


def check_denoising(settings: dict[str, Any]) -> None:
    """Raise ValueError for fields of `Denoising` out of range."""
    from dall3.diffusion.denoising import Denoising
    from dall3.settings import find_scheduler

    Denoising(**settings | {"scheduler": find_scheduler(settings.get("scheduler", Denoising.scheduler))})


def placement(args: argparse.Namespace) -> tuple[Any, Any]:
    """The device and the dtype, None if it was not given. Raises an error for an unavailable device, before loading."""
    import torch

    device = "cpu" if getattr(args, "cpu", False) else args.device
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.empty(1, device=device)
    return device, None if args.dtype is None else getattr(torch, args.dtype)


def decoded(text: str) -> str:
    """Decode text from the command line, also if Python assumed ASCII as the locale's encoding.

    In that case Python holds non-ASCII bytes as lone surrogates. Raises ValueError for bytes that are not UTF-8.

    >>> decoded(b"caf\\xc3\\xa9".decode("ascii", "surrogateescape"))
    'café'
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise ValueError(f"the prompt {ascii(text)} is not UTF-8 text") from None


def open_image(path: str) -> Image:
    """Read an image from a file or an http(s) address. Raises ValueError for a file that is not an image."""
    import urllib.request

    from dall3.images import read_rgb

    if path.startswith(("http://", "https://")):
        with urllib.request.urlopen(path, timeout=60) as response:
            return read_rgb(response.read(), path)
    return read_rgb(path)


def with_dashes(add: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `add_argument`, so that an option --some_name can also be written --some-name."""

    def add_both(*names: str, **how: Any) -> Any:
        dashed = (name.replace("_", "-") for name in names if name.startswith("--"))
        return add(*dict.fromkeys([*names, *dashed]), **how)

    return add_both
