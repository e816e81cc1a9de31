"""Options that several commands share, and the conversion of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

WHICH_WEIGHTS = "a set's name, a folder, or owner/name on the Hugging Face hub"


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def add_placement(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="cuda, cpu, … (default: cuda if available, else cpu)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")


def add_sampling(parser: argparse.ArgumentParser, or_else: str = "none") -> None:
    """Add the options of token sampling. or_else: the top_p that applies if neither options nor weights set one."""
    add = parser.add_argument
    add("--top_k", type=count_or_share, help="codes to keep, such as 256; or fraction of the vocabulary to drop, < 1")
    own = f"default: the weights' own, or {or_else} if --top_k is not given"
    add("--top_p", type=float, help=f"nucleus sampling: probability mass to keep, in (0, 1] ({own})")
    add("--temperature", type=float, help="default: the weights' own, or 1")
    add("--cond_scale", type=float, help="classifier-free guidance scale (default: the weights' own, or 1: off)")


def count_or_share(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def add_diffusion(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clip_guidance", action="store_true", help="guide the diffusion with CLIP")
    add("--clip_guidance_scale", type=float, help="CLIP guidance scale (default: the weights' own, or 1000)")
    add("--guidance_share", type=float, help="fraction of the steps, from the first, that are guided (default: 1)")
    add("--tv_scale", type=float, help="weight of the total variation loss: smoothness (default: 0)")
    add("--range_scale", type=float, help="weight of the loss on values out of range (default: 0)")
    add("--cutn", type=int, help="number of cut-outs that CLIP scores (default: 16)")
    add(
        "--timestep_respacing",
        "--num_inference_steps",
        help="denoising steps: 25, '10,10,5' or ddim25 (default: the weights' own, or 25)",
    )
    add("--scheduler", help="ddim, ddpm (ancestral, upstream's) or dpm-solver++ (default: the weights' own, or ddim)")
    add("--strength", type=float, help="how much noise is added to the coarse picture, in (0, 1]")


def add_refinement(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that load a UNet and a CLIP from files."""
    add = parser.add_argument
    add("--model_config", metavar="JSON", help="guided-diffusion's flags, for a UNet of an unusual size")
    add("--clip_path", default="ViT-B-16/openai", help="CLIP: a file, or an open_clip name (default: %(default)s)")
    add_diffusion(parser)
    add_seed(parser)
    add_placement(parser)
    add("--overwrite", action="store_true", help="replace files of an earlier run")


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options among `names` that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `add_sampling` that were given. The others come from the weights' defaults."""
    return given(args, "temperature", "top_k", "top_p", "cond_scale")


def refinement(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The settings of `add_diffusion` that were given. The others come from the weights' defaults."""
    steps = args.timestep_respacing
    if steps is not None:
        more["num_inference_steps"] = int(steps) if steps.isdecimal() else steps
    if not args.clip_guidance:
        more["clip_guidance_scale"] = 0
    elif args.clip_guidance_scale is not None:
        more["clip_guidance_scale"] = args.clip_guidance_scale
    return given(args, "guidance_share", "tv_scale", "range_scale", "cutn", "scheduler", "strength") | more


def placement(args: argparse.Namespace) -> tuple[Any, Any]:
    """The device and the dtype. Raises an error for an unavailable device, before loading."""
    import torch

    device = "cpu" if getattr(args, "cpu", False) else args.device
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.empty(1, device=device)
    return device, getattr(torch, args.dtype)


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

    from dall3.images import read_picture

    if path.startswith(("http://", "https://")):
        with urllib.request.urlopen(path, timeout=60) as response:
            return read_picture(response.read(), path)
    return read_picture(path)


def with_dashes(add: Callable[..., Any]) -> Callable[..., Any]:
    """`add_argument` that accepts --some-name where --some_name is declared."""

    def add_both(*names: str, **how: Any) -> Any:
        dashed = (name.replace("_", "-") for name in names if name.startswith("--"))
        return add(*dict.fromkeys([*names, *dashed]), **how)

    return add_both
