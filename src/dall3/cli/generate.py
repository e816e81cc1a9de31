"""`dall3 generate`: images for prompts, with the options of upstream's generate.py."""

from __future__ import annotations

import argparse
import os
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dall3.cli.options import (
    WHICH_WEIGHTS,
    add_refinement,
    add_sampling,
    asks_for_guidance,
    check_denoising,
    decoded,
    given,
    placement,
    refinement,
)
from dall3.cli.options import sampling as given_sampling

# Options that only apply with --dalle_path.
WITH_DALLE_PATH = ("bpe_path", "vqgan_model_path", "vqgan_config_path", "openai_vae", "diffusion_path", "model_config")
# Upstream's defaults, which apply with --dalle_path. With --weights, those of the weights apply, as from Python.
UPSTREAM_TOP_P = 0.9
UPSTREAM_TEXT_TOP_K = 0.5  # for --gentxt
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)  # device names on Windows


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", help="the prompt, or several separated with |")
    add("--text", help="the prompt, as upstream's option")
    add("--weights", metavar="NAME", help=f"{WHICH_WEIGHTS} (default: the bundled weights)")
    add("--dalle_path", help="a checkpoint of DALLE-pytorch, instead of --weights")
    add("--bpe_path", help="the tokenizer of --dalle_path (default: CLIP's)")
    add("--hug", action="store_true", help="require a tokenizer in Hugging Face's JSON format")
    add("--chinese", action="store_true", help="require a tokenizer in BERT's vocab.txt format")
    add("--taming", action="store_true", help="require a VQGAN of taming-transformers")
    add("--vqgan_model_path", help="the VQGAN's .ckpt, or a DiscreteVAE's .pt")
    add("--vqgan_config_path", help="the VQGAN's .yaml")
    add("--openai_vae", nargs=2, metavar=("ENCODER", "DECODER"), help="OpenAI's encoder.pkl and decoder.pkl")
    add("--diffusion_path", help="a checkpoint of guided-diffusion, to refine the images")
    add("--output_size", type=int, help="width and height of the images in pixels; needs super-resolution")
    add("--super_resolution_path", help="an upscaler's file, or a checkpoint of guided-diffusion, for --output_size")
    add("--num_images", type=int, default=12, help="images to keep for each prompt (default: %(default)s)")
    add("--num_candidates", type=int, help="candidates to draw; CLIP keeps the best (default: num_images)")
    add("--batch_size", type=int, help="candidates drawn at a time (default: chosen from the free memory)")
    add_sampling(parser, f"the weights' setting; {UPSTREAM_TOP_P} with --dalle_path, unless --top_k is given")
    add("--wall", action="store_true", help="save all candidates on a numbered sheet, for `dall3 upsample --pick`")
    add(
        "--clip_sort",
        action="store_true",
        help="sort the images by CLIP similarity, best first, and put the score in their names",
    )
    add("--output_npy", action="store_true", help="also write the image tokens")
    add("--gentxt", action="store_true", help="first complete the prompt with the transformer")
    add("--truncate", action="store_true", help="cut a prompt that is too long")
    add("--outputs_dir", default="./outputs", help="folder of the results (default: %(default)s)")
    add_refinement(parser, "on if the weights have a CLIP and an upsampler; off with --dalle_path")


def run(args: argparse.Namespace) -> None:
    from dall3.errors import require
    from dall3.output import check_free
    from dall3.wall import MANIFEST, SHEET

    candidates = args.num_images if args.num_candidates is None else args.num_candidates
    prompts = decoded(args.text or args.prompt or "").lower().split("|")
    require(args.gentxt or all(prompt.strip() for prompt in prompts), "an empty prompt; expected text around every '|'")
    require(len(set(prompts)) == len(prompts), "the same prompt twice; increase --num_images instead")
    sampling = given_sampling(args)
    check(args, candidates, sampling)
    pipe = load(args, candidates)
    if args.dalle_path is not None and not {"top_k", "top_p"} & sampling.keys():
        sampling["top_p"] = UPSTREAM_TOP_P
    if args.gentxt:
        write = {"seed": args.seed} | ({} if args.dalle_path is None else {"top_k": UPSTREAM_TEXT_TOP_K})
        write |= given(args, "temperature", "top_k")
        prompts = [pipe.complete_text(prompt, truncate=args.truncate, **write) for prompt in prompts]
    truncate = args.truncate or args.gentxt
    for prompt in prompts:  # a prompt that cannot be encoded is an error before the first image is drawn
        pipe.text_encoder.check(prompt)
        pipe.text_encoder(prompt, truncate)
    # Encode and decode, so that the bytes are the same if Python assumes ASCII as the file system's encoding.
    folders = [Path(args.outputs_dir) / os.fsdecode(name.encode()) for name in folder_names(prompts)]
    names = ["caption.txt", "0.npy", "0.jpg", "0-fine.png"]
    if args.wall:
        folders, names = [folder / "wall" for folder in folders], [MANIFEST, SHEET]
    for folder in folders:
        check_free(folder, [] if args.overwrite else names)
    how = dict(batch_size=args.batch_size, seed=args.seed, truncate=truncate, **sampling)
    if refines(args) and not args.wall:
        how |= refinement(args)
        if args.dalle_path is not None and not asks_for_guidance(args):
            how["clip_guidance_scale"] = 0
    if args.output_size is not None:
        how["output_size"] = args.output_size
    draw(pipe, prompts, folders, candidates, how, args)


def check(args: argparse.Namespace, candidates: int, sampling: dict[str, Any]) -> None:
    """Raise ValueError for options that are out of range or conflict, before loading."""
    from dall3.errors import require
    from dall3.tokens.sampling import Sampling, check_counts
    from dall3.tokens.seeds import choose_seed

    from_folder = args.dalle_path is None
    for name in WITH_DALLE_PATH:
        alone = from_folder and getattr(args, name) is not None
        require(not alone, f"--{name} needs --dalle_path; it does not apply to --weights")
    require(from_folder or args.weights is None, "--weights and --dalle_path exclude each other; pass one of them")
    Sampling(**sampling), choose_seed(args.seed, None)
    if refines(args):
        check_denoising(refinement(args))
    check_counts(num_images=args.num_images, num_candidates=candidates, **given(args, "batch_size"))
    guidance = "--clip_guidance guides the denoising, which needs a UNet; pass --diffusion_path"
    require(refines(args) or not asks_for_guidance(args), guidance)
    require(not args.taming or bool(args.vqgan_model_path), "--taming needs --vqgan_model_path")
    for flag, begin, kind in (("hug", b"{", "tokenizers' JSON"), ("chinese", b"[PAD]", "BERT's vocab.txt")):
        valid = not getattr(args, flag) or (args.bpe_path and Path(args.bpe_path).read_bytes().startswith(begin))
        require(bool(valid), f"--{flag} needs a --bpe_path in {kind}")


def refines(args: argparse.Namespace) -> bool:
    """Whether the options allow a refinement. With --weights it also depends on the parts of the set."""
    return args.dalle_path is None or args.diffusion_path is not None


def load(args: argparse.Namespace, candidates: int) -> Any:
    """Load the pipeline from --weights or from the files. Raises ValueError if it cannot draw."""
    from dall3.errors import require
    from dall3.models.vqgan import VQModel
    from dall3.pipeline import Dall3Pipeline
    from dall3.weights.convert.upscaler import load_super_resolution

    device, dtype = placement(args)
    if args.dalle_path is None:
        pipe = Dall3Pipeline.from_pretrained(args.weights, device=device, dtype=dtype)
        require(pipe.text_encoder is not None, f"{args.weights} has no transformer with a tokenizer")
    else:
        needs_clip = args.clip_sort or asks_for_guidance(args) or candidates > args.num_images
        pipe = Dall3Pipeline.from_checkpoints(
            dalle=args.dalle_path,
            bpe=args.bpe_path,
            vqgan=args.openai_vae or args.vqgan_model_path,
            vqgan_config=args.vqgan_config_path,
            diffusion=args.diffusion_path,
            diffusion_config=args.model_config,
            clip=args.clip_path if needs_clip else None,
        )
    for option, needed in (("--clip_guidance", asks_for_guidance(args)), ("--clip_sort", args.clip_sort)):
        if needed:
            pipe.require("clip", option)
    if args.super_resolution_path is not None:
        pipe.super_resolution = load_super_resolution(args.super_resolution_path)
    missing = f"{args.dalle_path or args.weights} has no VAE; pass --vqgan_model_path or --openai_vae"
    require(pipe.vqgan is not None, missing)
    require(not args.taming or isinstance(pipe.vqgan, VQModel), f"--taming: {args.vqgan_model_path} is not a VQGAN")
    return pipe.to(device, dtype)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    folders: Sequence[Path],
    candidates: int,
    how: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Draw each prompt and write its files to its folder.

    If a file cannot be written, for example on a full disk, the files and folders of this call are removed, so that the
    command can be repeated.
    """
    from dall3.output import File, write_files

    outputs = Path(args.outputs_dir)
    fine_too = refines(args) and (args.dalle_path is not None or pipe.upsampler is not None)
    fine_too = fine_too or args.output_size is not None
    parents = [folder.parent for folder in folders if folder.parent != outputs]
    made = [folder for folder in (*folders, *parents, outputs, *outputs.parents) if not folder.exists()]
    written: list[Path] = []
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for prompt, folder in zip(prompts, folders, strict=True):
            if args.wall:
                wall = pipe.draw(prompt, candidates, **how)
                write_files(folder, wall.files(), args.overwrite)
                written += [folder / name for name in wall.files()]
                print(f'created a wall of {len(wall)} images at "{folder}"')
                continue
            out = pipe(prompt, args.num_images, candidates, **how)
            files: dict[str, File] = {} if args.clip_sort else {"caption.txt": prompt}
            scores = out.clip_scores.tolist() if args.clip_sort and out.clip_scores is not None else None
            results = zip(out.coarse_images, out.images, out.tokens.numpy(), strict=True)
            for i, (coarse, fine, tokens) in enumerate(results):
                files[f"{i}-{scores[i]}.png" if scores else f"{i}.jpg"] = coarse
                files |= {f"{i}-fine.png": fine} if fine_too else {}
                files |= {f"{i}.npy": tokens} if args.output_npy else {}
            write_files(folder, files, args.overwrite)
            written += [folder / name for name in files]
            print(f'created {len(out)} images at "{folder}"')
    except BaseException as error:
        if isinstance(error, OSError) and not args.overwrite:
            for path in written:
                path.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()
        raise


def folder_names(prompts: Sequence[str]) -> list[str]:
    """A folder name for each prompt, valid on Linux, macOS and Windows; duplicates are numbered.

    >>> folder_names(["a cube", "a/cube", "what is it?"])
    ['a_cube', 'a_cube-2', 'what_is_it_']
    """
    names: list[str] = []
    taken: set[str] = set()
    for prompt in prompts:
        wanted = name = folder_name(prompt)
        number = 1
        while (key := unicodedata.normalize("NFC", name).casefold()) in taken:  # how Windows and macOS compare names
            number += 1
            name = f"{wanted}-{number}"
        taken.add(key)
        names.append(name)
    return names


def folder_name(prompt: str) -> str:
    """Convert a prompt to a folder name. File systems allow 255 bytes; Windows forbids some characters."""
    name = re.sub(r'[\s/\\:?*"<>|\x00-\x1f\x7f]|^\.', "_", prompt)[:100].encode()[:240].decode(errors="ignore")
    name = re.sub(r"\.+$", lambda dots: "_" * len(dots[0]), name)
    return f"_{name}" if RESERVED.fullmatch(name) else name
