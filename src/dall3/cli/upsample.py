"""`dall3 upsample`: refine image tokens or an image, with the options of upstream's sample.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dall3.cli.options import (
    add_refinement,
    asks_for_guidance,
    check_denoising,
    decoded,
    open_image,
    placement,
    refinement,
)

MODEL_PATH, VAE_PATH = "./models/model-latest.pt", "./models/vqgan_gumbel_f8/checkpoints/last.ckpt"  # sample.py's


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, help="an image (file or URL), or a .npy file of image tokens")
    add("--weights", metavar="NAME", help="a set of weights, instead of the files below")
    add("--model_path", help=f"a checkpoint of guided-diffusion, or an upscaler's file (default: {MODEL_PATH})")
    add("--model_size", type=int, choices=(512, 256, 128, 64), help="use guided-diffusion's flags for this size")
    add("--vae_path", help=f"the VQGAN or DiscreteVAE (default: {VAE_PATH})")
    add("--vqgan_config_path", help="the VQGAN's .yaml")
    add("--dvae_mode", action="store_true", help="require a DiscreteVAE")
    add("--text", help="prompts for CLIP guidance, separated with | and optionally weighted: 'a cube:2|a cloud'")
    add("--image_prompts", help="images for CLIP guidance, separated and weighted in the same way")
    add("--num_batches", type=int, default=1, help="number of batches (default: %(default)s)")
    add("--batch_size", type=int, default=1, help="images in a batch (default: %(default)s)")
    add("--output_size", type=int, help="width and height of the result in pixels (default: the model's, or 512)")
    add("--stop_at", type=int, default=1000, help="stop after this many steps: fewer give a smoother image")
    add("--cpu", action="store_true", help="run on the CPU, as --device cpu")
    add("--outputs_dir", default=".", help="folder of the results (default: %(default)s)")
    add_refinement(parser)


def run(args: argparse.Namespace) -> None:
    from dall3.errors import require
    from dall3.images import to_pil
    from dall3.models.discrete_vae import DiscreteVAE
    from dall3.models.upscaler import Upscaler
    from dall3.output import check_free, read_tokens, write_files
    from dall3.pipeline import Dall3Pipeline
    from dall3.request import default_guidance_scale, parse_prompts
    from dall3.tokens.sampling import check_counts
    from dall3.tokens.seeds import choose_seed
    from dall3.weights.convert.clip import load_clip
    from dall3.weights.convert.upscaler import load_super_resolution
    from dall3.weights.convert.vae import load_vae

    check_counts(num_batches=args.num_batches, batch_size=args.batch_size, stop_at=args.stop_at)
    settings = refinement(args, stop_at=args.stop_at + 2)  # sample.py runs two more steps before it stops
    check_denoising(settings)
    choose_seed(args.seed, None)
    text = None if args.text is None else decoded(args.text)
    guides = asks_for_guidance(args)
    require(not guides or bool(text or args.image_prompts), "--clip_guidance needs a target: --text or --image_prompts")
    count, folder = args.num_batches * args.batch_size, Path(args.outputs_dir)
    names = [f"progress_{i:05}.png" for i in range(count)]
    check_free(folder, [] if args.overwrite else names)
    is_tokens = args.input.endswith("npy")
    tokens = read_tokens(args.input).expand(count, -1) if is_tokens else None
    image = None if is_tokens else [open_image(args.input)] * count
    image_prompts = [(open_image(path), weight) for path, weight in parse_prompts(args.image_prompts or "")]
    device, dtype = placement(args)
    if args.weights is not None:
        for name in ("model_path", "model_config", "model_size", "vae_path", "vqgan_config_path"):
            require(getattr(args, name) is None, f"--{name} and --weights exclude each other; pass one of them")
        pipe = Dall3Pipeline.from_pretrained(args.weights, device=device, dtype=dtype)
        network: Any = pipe.upsampler or pipe.super_resolution
        require(network is not None, f"{args.weights} has no upsampler")
    else:
        flags = args.model_config or ({"image_size": args.model_size} if args.model_size else None)
        network = load_super_resolution(args.model_path or MODEL_PATH, flags)
        pipe = Dall3Pipeline(clip=load_clip(args.clip_path) if guides else None)
    is_upscaler = isinstance(network, Upscaler)
    stage = "super_resolution" if is_upscaler else "upsampler"
    setattr(pipe, stage, network)
    if args.weights is None and (is_tokens or not is_upscaler and network.config.embedding_dims):
        pipe.vqgan = load_vae(args.vae_path or VAE_PATH, args.vqgan_config_path)
    given = args.weights or args.vae_path
    require(not args.dvae_mode or isinstance(pipe.vqgan, DiscreteVAE), f"--dvae_mode: {given} is not a DiscreteVAE")
    size = args.output_size
    if is_upscaler:
        unset = {"clip_guidance_scale"} | ({"stop_at"} if args.stop_at == 1000 else set())  # what was not asked for
        settings = {name: value for name, value in settings.items() if name not in unset}
    elif size is None:
        size = 512 if network.config.super_resolution else network.config.image_size
    how = dict(image_prompts=image_prompts, output_size=size, seed=args.seed, batch_size=args.batch_size, stage=stage)
    if guides:
        pipe.require("clip", "--clip_guidance")
        settings = {"clip_guidance_scale": default_guidance_scale(pipe)} | settings
    fine = pipe.to(device, dtype).upsample(tokens, image, text, **how, **settings)
    write_files(folder, dict(zip(names, to_pil(fine), strict=True)), args.overwrite)
    print(f'created {count} images at "{folder}"')
