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

MODEL_PATH, VAE_PATH = "./models/model-latest.pt", "./models/vqgan_gumbel_f8/checkpoints/last.ckpt"  # of sample.py
ALL_STEPS = 1000  # default of --stop_at: do not stop early


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, help="an image (file or URL), a .npy of image tokens, or a wall's folder")
    add("--pick", metavar="NUMBERS", help="refine these images of a wall of `dall3 generate --wall`, such as 3,7")
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
    add("--stop_at", type=int, default=ALL_STEPS, help="stop after this many steps: fewer give a smoother image")
    add("--cpu", action="store_true", help="run on the CPU, as --device cpu")
    add("--outputs_dir", default=".", help="folder of the results (default: %(default)s)")
    add_refinement(parser)


def run(args: argparse.Namespace) -> None:
    from dall3.errors import require
    from dall3.images import to_pil
    from dall3.models.discrete_vae import DiscreteVAE
    from dall3.models.upscaler import Upscaler
    from dall3.output import check_free, read_tokens, write_files
    from dall3.request import default_guidance_scale, parse_prompts
    from dall3.tokens.sampling import check_counts
    from dall3.tokens.seeds import choose_seed

    if args.pick is not None:
        refine_picked(args)
        return
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
    pipe = load(args, needs_vae=is_tokens)
    stage = "super_resolution" if pipe.upsampler is None else "upsampler"
    network = getattr(pipe, stage)
    is_upscaler = isinstance(network, Upscaler)
    given = args.weights or args.vae_path
    require(not args.dvae_mode or isinstance(pipe.vqgan, DiscreteVAE), f"--dvae_mode: {given} is not a DiscreteVAE")
    size = args.output_size
    if is_upscaler:
        # An upscaler refuses denoising settings. Leave out those that hold a default or switch guidance off.
        unset = {"clip_guidance_scale"} | ({"stop_at"} if args.stop_at == ALL_STEPS else set())
        settings = {name: value for name, value in settings.items() if name not in unset}
    elif size is None:
        size = 512 if network.config.super_resolution else network.config.image_size
    how = dict(image_prompts=image_prompts, output_size=size, seed=args.seed, batch_size=args.batch_size, stage=stage)
    if guides:
        pipe.require("clip", "--clip_guidance")
        settings = {"clip_guidance_scale": default_guidance_scale(pipe)} | settings
    fine = pipe.upsample(tokens, image, text, **how, **settings)
    write_files(folder, dict(zip(names, to_pil(fine), strict=True)), args.overwrite)
    print(f'created {count} images at "{folder}"')


def load(args: argparse.Namespace, needs_vae: bool, bundled: bool = False) -> Any:
    """Load the pipeline from --weights or from the files. Raises ValueError for weights without an upsampler.

    needs_vae: load a VAE even if the UNet is not conditioned on code embeddings. bundled: load the bundled weights if
    neither --weights nor files are given.
    """
    from dall3.errors import require
    from dall3.models.unet import UNet
    from dall3.pipeline import Dall3Pipeline
    from dall3.weights.convert.clip import load_clip
    from dall3.weights.convert.upscaler import load_super_resolution
    from dall3.weights.convert.vae import load_vae

    device, dtype = placement(args)
    if args.weights is not None or (bundled and args.model_path is None and args.vae_path is None):
        for name in ("model_path", "model_config", "model_size", "vae_path", "vqgan_config_path"):
            require(getattr(args, name) is None, f"--{name} and --weights exclude each other; pass one of them")
        pipe = Dall3Pipeline.from_pretrained(args.weights, device=device, dtype=dtype)
        network = pipe.upsampler or pipe.super_resolution
        require(network is not None, f"{args.weights} has no upsampler")
        if isinstance(network, UNet) and not bundled:
            pipe.upsampler = network
        return pipe
    flags = args.model_config or ({"image_size": args.model_size} if args.model_size else None)
    network = load_super_resolution(args.model_path or MODEL_PATH, flags)
    pipe = Dall3Pipeline(clip=load_clip(args.clip_path) if asks_for_guidance(args) else None)
    if isinstance(network, UNet):
        pipe.upsampler = network
    else:
        pipe.super_resolution = network
    if needs_vae or (isinstance(network, UNet) and network.config.embedding_dims):
        pipe.vqgan = load_vae(args.vae_path or VAE_PATH, args.vqgan_config_path)
    return pipe.to(device, dtype)


def refine_picked(args: argparse.Namespace) -> None:
    """Refine the images of a wall that --pick selects.

    They are the images of a `dall3 generate` call that would have chosen the same candidates.
    """
    from dall3.errors import require
    from dall3.output import File, check_free, write_files
    from dall3.tokens.sampling import check_counts
    from dall3.wall import Wall

    numbers = [text.strip() for text in args.pick.split(",")]
    require(all(text.isdecimal() for text in numbers), f"--pick {args.pick}; expected numbers on the wall, such as 3,7")
    check_counts(batch_size=args.batch_size, stop_at=args.stop_at)
    for name, default in (("image_prompts", None), ("num_batches", 1), ("dvae_mode", False)):
        require(getattr(args, name) == default, f"--{name} and --pick exclude each other; pass one of them")
    try:
        wall = Wall.load(args.input)[[int(text) for text in numbers]]
    except IndexError as error:
        raise ValueError(f"--pick {args.pick}: {error}") from None
    wall_seed = wall.settings.get("seed")
    valid = args.seed in (0, wall_seed)
    require(valid, f"--seed {args.seed} does not apply with --pick: the wall has seed {wall_seed}; leave --seed out")
    settings = refinement(args)
    settings |= {} if args.stop_at == ALL_STEPS else {"stop_at": args.stop_at + 2}
    check_denoising(settings)
    settings |= {} if args.text is None else {"guidance_prompt": decoded(args.text)}
    settings |= {} if args.output_size is None else {"output_size": args.output_size}
    settings |= {} if args.batch_size == 1 else {"refine_batch_size": args.batch_size}
    names, folder = [f"{number}-fine.png" for number in wall.numbers], Path(args.outputs_dir)
    check_free(folder, [] if args.overwrite else names)
    pipe = load(args, needs_vae=True, bundled=True)
    if pipe.clip_or_loader is None:
        require(not asks_for_guidance(args), "--clip_guidance needs a CLIP; the weights have none")
        settings["clip_guidance_scale"] = 0
    out = pipe.refine(wall, **settings)
    files: dict[str, File] = {name: out.labelled(i) for i, name in enumerate(names)}
    write_files(folder, files, args.overwrite)
    print(f'created {len(out)} images at "{folder}"')
