"""The `dall3` command: the seed's generate.py, sample.py and super_res.py by their own options, in one process."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


MODEL_PATH, VAE_PATH = "./models/model-latest.pt", "./models/vqgan_gumbel_f8/checkpoints/last.ckpt"  # sample.py's


def add_refinement(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_config", metavar="JSON", help="guided-diffusion's flags, for a UNet of an unusual size")
    add("--clip_path", default="ViT-B-16/openai", help="CLIP: a file, or a name of open_clip's (default: %(default)s)")
    add_diffusion(add)
    add("--overwrite", action="store_true", help="replace files of an earlier run")


def add_diffusion(add: Callable[..., Any]) -> None:
    add("--clip_guidance", action="store_true", help="let CLIP pull the picture towards the text")
    add("--clip_guidance_scale", type=float, help="how hard (default: the weights' own, or 1000)")
    add("--guidance_share", type=float, help="share of the steps that are guided, from the first on (default: 1)")
    add("--tv_scale", type=float, help="smoothness of the result (default: 0)")
    add("--range_scale", type=float, help="how strictly colours stay in range (default: 0)")
    add("--cutn", type=int, help="cut-outs that CLIP looks at (default: 16)")
    add(
        "--timestep_respacing",
        "--num_inference_steps",
        help="steps: 25, '10,10,5' or ddim25 (default: the weights' own, or 25)",
    )
    add("--scheduler", help="ddim, ddpm (ancestral, the seed's) or dpm-solver++ (default: the weights' own, or ddim)")
    add("--strength", type=float, help="how far the picture that it starts from is noised, in (0, 1]")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--device", help="cuda, cpu, … (default: cuda where there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")


def add_sampling(add: Callable[..., Any], or_else: str = "none") -> None:
    add("--top_k", type=float, help="share of the vocabulary to drop, in [0, 1)")
    own = f"default: the weights' own, or {or_else}, without --top_k"
    add("--top_p", type=float, help=f"probability to keep, in (0, 1] ({own})")
    add("--temperature", type=float, help="default: the weights' own, or 1")
    add("--cond_scale", type=float, help="classifier-free guidance (default: the weights' own, or 1, none)")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dall3", description=__doc__.partition("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)

    generate_parser = commands.add_parser("generate", help="text to pictures")
    generate_parser.set_defaults(run=generate)
    add = generate_parser.add_argument
    add("prompt", nargs="?", help="the text prompt; several separated with |")
    add("--text", help="the same")
    which = "a set's name, a folder, or owner/name of the Hugging Face hub"
    add("--weights", metavar="NAME", help=f"{which} (default: the bundled weights, without --dalle_path)")
    add("--dalle_path", help="DALLE-pytorch's checkpoint, in place of a folder of weights")
    add("--bpe_path", help="its tokenizer, of any kind (default: CLIP's)")
    add("--hug", action="store_true", help="the tokenizer must be Hugging Face's JSON")
    add("--chinese", action="store_true", help="the tokenizer must be BERT's vocab.txt")
    add("--taming", action="store_true", help="the VAE must be a VQGAN of taming-transformers")
    add("--vqgan_model_path", help="the VQGAN's .ckpt, or a DiscreteVAE's .pt")
    add("--vqgan_config_path", help="the VQGAN's .yaml")
    add("--openai_vae", nargs=2, metavar=("ENCODER", "DECODER"), help="OpenAI's encoder.pkl and decoder.pkl")
    add("--diffusion_path", help="guided-diffusion's checkpoint: go on to the fine picture")
    add("--num_images", type=int, default=12, help="pictures to keep (default: %(default)s)")
    add("--num_candidates", type=int, help="pictures to draw, of which CLIP keeps the best (default: num_images)")
    add("--batch_size", type=int, default=4, help="default: %(default)s")
    add_sampling(add, "0.9")
    add("--clip_sort", action="store_true", help="sort by CLIP's similarity, best first")
    add("--output_npy", action="store_true", help="write the image tokens too")
    add("--gentxt", action="store_true", help="let the transformer write the prompt to its end first")
    add("--truncate", action="store_true", help="cut a prompt that is too long")
    add("--outputs_dir", default="./outputs", help="default: %(default)s")
    add_refinement(generate_parser)

    batch_parser = commands.add_parser("batch", help="a book of prompts, here or on a Ray cluster")
    batch_parser.set_defaults(run=batch)
    add = with_dashes(batch_parser.add_argument)
    add("prompts", help="a .txt with a prompt a line; a .csv, .jsonl or .parquet with a column 'prompt'")
    add(
        "--out",
        required=True,
        metavar="FOLDER",
        help="for shards and index; a run there that was ended is gone on with",
    )
    add("--weights", metavar="NAME", help=f"{which} (default: the bundled weights)")
    add("--num_images", type=int, default=8, help="pictures to keep of each prompt (default: %(default)s)")
    add("--num_candidates", type=int, default=1024, help="pictures to draw for it (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="candidates drawn at a time (default: %(default)s)")
    add("--rank_batch_size", type=int, help="decoded and scored at a time (default: batch_size)")
    add("--refine_batch_size", type=int, help="pictures refined at a time (default: 1 on a CPU, 4 on a GPU)")
    add("--coarse", action="store_true", help="leave diffusion out")
    add("--truncate", action="store_true", help="cut prompts that are too long")
    add("--threads", type=int, default=1, help="torch's, in each stage (default: %(default)s)")
    add("--prompts_per_shard", type=int, default=128, help="default: %(default)s")
    add("--ray", metavar="ADDRESS", help="a cluster's (auto, host:6379), or local to start one here")
    each = "one number, or draw=N rank=N refine=N"
    add("--workers", nargs="+", default=["1"], metavar="N", help=f"on Ray, actors for each stage: {each} (default: 1)")
    share = "on Ray, for a worker, shared by its three actors; or for an actor, as draw=N rank=N refine=N"
    add("--num_cpus", nargs="+", metavar="N", help=f"{share} (default: threads)")
    add("--num_gpus", nargs="+", default=["0"], metavar="N", help=f"{share} (default: 0)")
    add_sampling(add)
    add_diffusion(add)

    weights_parser = commands.add_parser("weights", help="the sets of weights: what there is, and what of it is here")
    weights_parser.set_defaults(run=weights)
    add = weights_parser.add_argument
    add("action", choices=("list", "fetch", "verify", "where", "remove"))
    add("name", nargs="?", help="a set (fetch, remove: needed; verify, where: all that are here, if left out)")
    add("--registry", metavar="TOML", help="a weights.toml of your own, whose sets are known too")

    convert_parser = commands.add_parser("convert", help="a set or files of 2021 to a folder of safetensors")
    convert_parser.set_defaults(run=convert)
    add = convert_parser.add_argument
    add("name", nargs="?", help="a set of weights.toml, a folder, or owner/name of the Hugging Face hub")
    add("--out", required=True, metavar="FOLDER", help="a folder that is not there yet, or empty")
    add("--half", action="store_true", help="write half precision: half the size")
    add("--registry", metavar="TOML", help="a weights.toml of your own, whose sets are known too")
    add("--dalle_path", help="DALLE-pytorch's checkpoint")
    add("--bpe_path", help="its tokenizer, of any kind (default: CLIP's)")
    add("--vqgan_model_path", help="the VQGAN's .ckpt, or a DiscreteVAE's .pt")
    add("--vqgan_config_path", help="the VQGAN's .yaml")
    add("--openai_vae", nargs=2, metavar=("ENCODER", "DECODER"), help="OpenAI's encoder.pkl and decoder.pkl")
    add("--diffusion_path", help="guided-diffusion's checkpoint")
    add("--model_config", metavar="JSON", help="guided-diffusion's flags, for a UNet of an unusual size")
    add("--super_resolution_path", help="guided-diffusion's super-resolution checkpoint")
    add("--clip_path", help="CLIP: a file, or a name of open_clip's")

    train_parser = commands.add_parser("train", help="train a part of a folder of weights on pictures with captions")
    train_parser.set_defaults(run=train)
    add = train_parser.add_argument
    parts = ("tokenizer", "vqgan", "transformer", "clip", "upsampler")
    add("model", choices=(*parts, "family"), help="a part, in this order, or all of them from nothing")
    add("--out", required=True, help="the folder of weights; parts trained before are read from it")
    add("--config", metavar="TOML", help="tables model, loss and train (default: those of the bundled weights)")
    sources = "scenes, emoji[:FOLDER], folder:PATH, webdataset:PATTERN"
    add("--data", nargs="+", default=[], metavar="SOURCE[=WEIGHT]", help=f"{sources} (default: the config's)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--initial", metavar="FOLDER", help="a part's folder whose weights are started from")
    for name in ("steps", "batch_size", "workers", "seed", "every"):
        add(f"--{name}", type=int, help="in place of the config's")
    add("--minutes", type=float, default=600.0, help="family: all the time there is (default: %(default)g)")
    add(
        "--emoji", default="emoji", help="family: their folder, fetched where needed, or archive (default: %(default)s)"
    )
    add("--device", help="family: cuda, cuda:1, cpu, … (default: every GPU, or the CPU)")
    add("--tiny", action="store_true", help="family: networks of a few weights, to try the command")
    add("--commit", default="not stated", help="family: of this library, for the model card")

    web_parser = commands.add_parser("web", help="a page in the browser to draw pictures with")
    web_parser.set_defaults(run=web)
    add = web_parser.add_argument
    add("--weights", metavar="NAME", help="a set of weights, a folder, or owner/name (default: the bundled weights)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 for other machines too (default: %(default)s)",
    )
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--device", help="cuda, cpu, … (default: cuda where there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")
    for name, most in (("images", 8), ("candidates", 256), ("steps", 250)):
        add(f"--max_{name}", type=int, default=most, help=f"the most {name} of a call (default: %(default)s)")

    scenes_parser = commands.add_parser("scenes", help="the rendered world that the bundled weights were trained on")
    scenes_parser.set_defaults(run=scenes)
    add = scenes_parser.add_argument
    add("what", choices=("sheet", "render"), help="a contact sheet, or pictures with captions to train on")
    add("--out", help="the sheet's file (default: sheet.png), or a folder (default: scenes)")
    add("--count", type=int, default=1000, help="pictures to render (default: %(default)s)")
    add("--size", type=int, help="pixels a side (default: 128 for the sheet, 256 for pictures)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that render (default: one a core)")
    add("--overwrite", action="store_true", help="replace files of an earlier run")

    upsample_parser = commands.add_parser("upsample", help="tokens or a picture to a finer picture")
    upsample_parser.set_defaults(run=upsample)
    add = upsample_parser.add_argument
    add("--input", required=True, help="a picture, or a .npy of image tokens")
    add("--weights", metavar="NAME", help="a set of weights, in place of the files below")
    add("--model_path", help=f"guided-diffusion's checkpoint, of any kind (default: {MODEL_PATH})")
    add("--model_size", type=int, choices=(512, 256, 128, 64), help="whose settings, if not its own")
    add("--vae_path", help=f"the VQGAN or DiscreteVAE (default: {VAE_PATH})")
    add("--vqgan_config_path", help="the VQGAN's .yaml")
    add("--dvae_mode", action="store_true", help="the VAE must be a DiscreteVAE")
    add("--text", help="what CLIP guides to; several separated with |, weighted as in 'a cube:2|a cloud'")
    add("--image_prompts", help="pictures that CLIP guides to, likewise")
    add("--num_batches", type=int, default=1, help="default: %(default)s")
    add("--batch_size", type=int, default=1, help="default: %(default)s")
    add("--output_size", type=int, help="pixels a side, for picture input (super-resolution: 512)")
    add("--stop_at", type=int, default=1000, help="stop early for an airbrushed look")
    add("--cpu", action="store_true", help="the same as --device cpu")
    add("--outputs_dir", default=".", help="default: %(default)s")
    add_refinement(upsample_parser)
    return parser


def placement(args: argparse.Namespace) -> tuple[Any, Any]:
    """The device and the precision."""
    import torch

    device = "cpu" if getattr(args, "cpu", False) else args.device
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.empty(1, device=device)  # raises where there is no such device, before anything is loaded
    return device, getattr(torch, args.dtype)


def refinement(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The settings that were given; the weights have their own for the others."""
    steps = args.timestep_respacing
    if steps is not None:
        more["num_inference_steps"] = int(steps) if steps.isdigit() else steps
    if not args.clip_guidance:
        more["clip_guidance_scale"] = 0
    elif args.clip_guidance_scale is not None:
        more["clip_guidance_scale"] = args.clip_guidance_scale
    return given(args, "guidance_share", "tv_scale", "range_scale", "cutn", "scheduler", "strength") | more


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def folder_of(prompt: str, args: argparse.Namespace) -> Path:
    """A folder inside --outputs_dir, whatever the prompt; file systems take names of 255 bytes."""
    name = re.sub(r"[\s/\\]|^\.", "_", prompt)[:100]
    return Path(args.outputs_dir) / name.encode()[:250].decode(errors="ignore")


def generate(args: argparse.Namespace) -> None:
    from dall3.diffusion.denoising import Refinement
    from dall3.errors import require
    from dall3.models.vqgan import VQModel
    from dall3.output import File, check_free, write_files
    from dall3.pipeline import Dall3Pipeline, choose_seed
    from dall3.tokens.sampling import Sampling, check_counts

    candidates = args.num_images if args.num_candidates is None else args.num_candidates
    prompts = (args.text or args.prompt or "").lower().split("|")
    require(args.gentxt or all(prompt.strip() for prompt in prompts), "an empty prompt; give text around every '|'")
    how = given(args, "temperature", "top_k", "top_p", "cond_scale")
    from_folder = args.dalle_path is None
    for name in ("bpe_path", "vqgan_model_path", "vqgan_config_path", "openai_vae", "diffusion_path", "model_config"):
        alone = from_folder and getattr(args, name) is not None
        require(not alone, f"--{name} goes with --dalle_path; a folder of weights has its own")
    require(from_folder or args.weights is None, "--weights and --dalle_path are two places for the same; give one")
    to_refine = from_folder or args.diffusion_path is not None
    refine = refinement(args) if to_refine else {}
    Sampling(**how), Refinement(**refine), choose_seed(args.seed, None)  # said before anything is loaded
    check_counts(num_images=args.num_images, num_candidates=candidates, batch_size=args.batch_size)
    require(to_refine or not args.clip_guidance, "--clip_guidance guides diffusion; give --diffusion_path")
    require(not args.taming or bool(args.vqgan_model_path), "--taming needs --vqgan_model_path")
    for flag, begin in (("hug", b"{"), ("chinese", b"[PAD]")):
        fits = not getattr(args, flag) or (args.bpe_path and Path(args.bpe_path).read_bytes().startswith(begin))
        require(bool(fits), f"--{flag} needs a --bpe_path that begins with {begin.decode()}: JSON, or BERT's vocab.txt")
    device, dtype = placement(args)
    if from_folder:
        pipe = Dall3Pipeline.from_pretrained(args.weights, device=device, dtype=dtype)
        require(pipe.text_encoder is not None, f"{args.weights} holds no transformer with its tokenizer")
        to_refine = pipe.upsampler is not None
    else:
        pipe = Dall3Pipeline.from_checkpoints(
            dalle=args.dalle_path,
            bpe=args.bpe_path,
            vqgan=args.openai_vae or args.vqgan_model_path,
            vqgan_config=args.vqgan_config_path,
            diffusion=args.diffusion_path,
            diffusion_config=args.model_config,
            clip=args.clip_path if args.clip_sort or args.clip_guidance or candidates > args.num_images else None,
        )
    assert pipe.text_encoder is not None
    missing = f"{args.dalle_path or args.weights} holds no VAE; give --taming and --vqgan_model_path, or --openai_vae"
    require(pipe.vqgan is not None, missing)
    pipe.to(device, dtype)
    if not {"top_k", "top_p"} & {*how, *pipe.defaults}:
        how["top_p"] = 0.9
    require(not args.taming or isinstance(pipe.vqgan, VQModel), f"--taming: {args.vqgan_model_path} is no VQGAN")
    if args.gentxt:
        write = {"seed": args.seed, "top_k": 0.5} | given(args, "temperature", "top_k")
        prompts = [pipe.complete_text(prompt, truncate=args.truncate, **write) for prompt in prompts]
    truncate = args.truncate or args.gentxt
    for prompt in prompts:  # one that does not fit is said before the first is drawn
        pipe.text_encoder(prompt, truncate)
    folders = [folder_of(prompt, args) for prompt in prompts]
    require(len(set(folders)) == len(folders), "the same prompt twice; ask for more --num_images instead")
    for folder in folders:
        check_free(folder, [] if args.overwrite else ["caption.txt", "0.npy", "0.jpg", "0-fine.png"])
        folder.mkdir(parents=True, exist_ok=True)
    for prompt, folder in zip(prompts, folders, strict=True):
        settings = dict(batch_size=args.batch_size, seed=args.seed, truncate=truncate)
        out = pipe(prompt, args.num_images, candidates, **settings, **how, **refine)
        files: dict[str, File] = {} if args.clip_sort else {"caption.txt": prompt}
        scores = out.clip_scores.tolist() if args.clip_sort and out.clip_scores is not None else None
        for i, (coarse, fine, tokens) in enumerate(zip(out.coarse_images, out.images, out.tokens.numpy(), strict=True)):
            files[f"{i}-{scores[i]}.png" if scores else f"{i}.jpg"] = coarse
            files |= {f"{i}-fine.png": fine} if to_refine else {}
            files |= {f"{i}.npy": tokens} if args.output_npy else {}
        write_files(folder, files, args.overwrite)
        print(f'created {len(out)} images at "{folder}"')


def with_dashes(add: Callable[..., Any]) -> Callable[..., Any]:
    """`add_argument` for which --some_name may be written --some-name."""

    def add_both(*names: str, **how: Any) -> Any:
        dashed = (name.replace("_", "-") for name in names if name.startswith("--"))
        return add(*dict.fromkeys([*names, *dashed]), **how)

    return add_both


def numbers(name: str, words: list[str] | None, kind: Any) -> Any:
    """One number, or numbers by stage, from words. Raises ValueError for others."""
    if words is None:
        return None
    try:
        if len(words) == 1 and "=" not in words[0]:
            return kind(words[0])
        return {stage: kind(value) for stage, _, value in (word.partition("=") for word in words)}
    except ValueError:
        raise ValueError(f"--{name} {' '.join(words)}; expected a number, or draw=N rank=N refine=N") from None


def batch(args: argparse.Namespace) -> None:
    from dall3.batch import generate
    from dall3.errors import require

    require(args.ray is None or args.device is None, "--device is for the loop here; on Ray --num_gpus says it")
    device, _ = placement(args)
    names = ("num_images", "num_candidates", "weights", "seed", "batch_size", "rank_batch_size", "refine_batch_size")
    how = {name: getattr(args, name) for name in (*names, "truncate", "threads", "dtype", "prompts_per_shard", "ray")}
    how["workers"] = numbers("workers", args.workers, int)
    how |= {name: numbers(name, getattr(args, name), float) for name in ("num_cpus", "num_gpus")}
    how |= refinement(args) | given(args, "temperature", "top_k", "top_p", "cond_scale")
    report = generate(args.prompts, args.out, refine=not args.coarse, device=device, **how)
    print(f'{report.prompts} prompts, {len(report.failed)} failed; index at "{report.index}"')


def weights(args: argparse.Namespace) -> None:
    from dall3.weights.fetching import check_here, fetch_set, files_of, remove_set
    from dall3.weights.registry import find_set, read_registry

    known = read_registry(args.registry)
    chosen = list(known.values()) if args.name is None else [find_set(args.name, args.registry)]
    if args.action in ("fetch", "remove") and args.name is None:
        raise ValueError(f"`dall3 weights {args.action}` needs a name: {', '.join(known)}")
    if args.action == "list":
        print(weights_table(chosen))
    elif args.action == "fetch":
        for part, (file, _) in fetch_set(chosen[0]).items():
            print(f"{part}: {file}")
    elif args.action == "remove":
        print(f"removed {size_text(remove_set(chosen[0]))} of {args.name} from the cache")
    else:
        found = [(one, path) for one in sum(map(files_of, chosen), []) if (path := one.find()) is not None]
        if args.name is not None and not found:
            raise ValueError(f"nothing of {args.name} is here; run `dall3 weights fetch {args.name}`")
        wrong: dict[str, str] = {}
        for one, path in found:
            problem = check_here(one, path, thorough=True) if args.action == "verify" else None
            wrong |= {one.name: problem} if problem else {}
            print(f"{one.name}: {path}" if args.action == "where" else f"{one.name}: {problem or 'good'}")
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(found)} files are not what they were; remove and fetch them again")


def weights_table(sets: list[Any]) -> str:
    """A line a part: set, part, size, licence, and whether it is here."""
    from dall3.weights.fetching import files_of, home

    rows = [("set", "part", "size", "licence", "here")]
    for one in sets:
        for part in one.parts:
            files = [wanted for wanted in files_of(one) if wanted.part == part]
            paths = [wanted.find() for wanted in files]
            sizes = [
                path.stat().st_size if path else max((place.size or 0 for place in wanted.file.places), default=0)
                for wanted, path in zip(files, paths, strict=True)
            ]
            here = "yes" if all(paths) else "in part" if any(paths) else "no"
            size = size_text(sum(sizes)) if sizes[0] else "unknown"
            rows.append((one.name if part == one.parts[0] else "", part.name, size, part.licence, here))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    abouts = [f"{one.name}: {one.about}" for one in sets if one.about]
    return "\n".join([*lines, "", *abouts, "", f"cache (DALL3_HOME): {home()}"])


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def convert(args: argparse.Namespace) -> None:
    import torch

    from dall3.errors import require
    from dall3.pipeline import Dall3Pipeline
    from dall3.weights.folder import check_empty

    check_empty(Path(args.out))  # before anything is fetched or loaded
    files = {
        "dalle": args.dalle_path,
        "bpe": args.bpe_path,
        "vqgan": args.openai_vae or args.vqgan_model_path,
        "vqgan_config": args.vqgan_config_path,
        "diffusion": args.diffusion_path,
        "diffusion_config": args.model_config,
        "super_resolution": args.super_resolution_path,
        "clip": args.clip_path,
    }
    given = {name: path for name, path in files.items() if path is not None}
    require(bool(given) != (args.name is not None), "give either a name or the paths of files to convert")
    if given:
        pipe = Dall3Pipeline.from_checkpoints(**given)
    else:
        pipe = Dall3Pipeline.from_pretrained(args.name, registry=args.registry)
    print(f'wrote "{pipe.save_pretrained(args.out, torch.float16 if args.half else None)}"')


def upsample(args: argparse.Namespace) -> None:
    from dall3.diffusion.denoising import Refinement
    from dall3.errors import require
    from dall3.models.discrete_vae import DiscreteVAE
    from dall3.output import check_free, to_pil, write_files
    from dall3.pipeline import Dall3Pipeline, choose_seed, parse_prompts
    from dall3.tokens.sampling import check_counts
    from dall3.weights.checkpoints import load_vae

    check_counts(num_batches=args.num_batches, batch_size=args.batch_size, stop_at=args.stop_at)
    settings = refinement(args, stop_at=args.stop_at + 2)  # sample.py takes two more before it looks
    Refinement(**settings), choose_seed(args.seed, None)
    wanted = args.text or args.image_prompts or not args.clip_guidance
    require(bool(wanted), "--clip_guidance needs --text or --image_prompts to look for")
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
            require(getattr(args, name) is None, f"--{name} and --weights are two places for the same; give one")
        pipe = Dall3Pipeline.from_pretrained(args.weights, device=device, dtype=dtype)
        pipe.upsampler = pipe.upsampler or pipe.super_resolution
        require(pipe.upsampler is not None, f"{args.weights} holds no upsampler")
    else:
        pipe = Dall3Pipeline.from_checkpoints(
            diffusion=args.model_path or MODEL_PATH,
            diffusion_config=args.model_config or ({"image_size": args.model_size} if args.model_size else None),
            clip=args.clip_path if args.clip_guidance else None,
        )
    assert pipe.upsampler is not None
    config = pipe.upsampler.config
    if args.weights is None and (config.embedding_dims or is_tokens):
        pipe.vqgan = load_vae(args.vae_path or VAE_PATH, args.vqgan_config_path)
    given = args.weights or args.vae_path
    require(not args.dvae_mode or isinstance(pipe.vqgan, DiscreteVAE), f"--dvae_mode: {given} is no DiscreteVAE")
    size = args.output_size or (512 if config.super_resolution else config.image_size)
    how = dict(image_prompts=image_prompts, output_size=size, seed=args.seed, batch_size=args.batch_size)
    if args.clip_guidance:
        settings = {"clip_guidance_scale": pipe.defaults.get("clip_guidance_scale", 1000)} | settings
    fine = pipe.to(device, dtype).upsample(tokens, image, args.text, **how, **settings)
    write_files(folder, dict(zip(names, to_pil(fine), strict=True)), args.overwrite)
    print(f'created {count} images at "{folder}"')


def train_family(args: argparse.Namespace) -> None:
    try:
        from dall3.training import family
    except ImportError as error:
        raise ValueError(f"training needs {error.name}; run pip install 'dall3[train]'") from None
    how = {name: getattr(args, name) for name in ("minutes", "device", "resume", "tiny", "commit")}
    failed = family.train_family(args.config or family.RECIPE, args.out, args.emoji, **how)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; what the others made is in {args.out}, and --resume goes on")
    print(f'trained the family in "{args.out}"')


def train(args: argparse.Namespace) -> None:
    if args.model == "family":
        train_family(args)
        return
    try:
        from dall3.training.run import train_model
    except ImportError as error:
        raise ValueError(f"training needs {error.name}; run pip install 'dall3[train]'") from None
    overrides = given(args, "steps", "batch_size", "workers", "seed", "every")
    train_model(args.model, args.out, args.config, args.data, args.resume, args.initial, **overrides)
    print(f'trained the {args.model} in "{args.out}"')


def web(args: argparse.Namespace) -> None:
    try:
        from dall3.web import Limits, serve
    except ImportError as error:
        raise ValueError(f"dall3 web needs {error.name}; run pip install 'dall3[web]'") from None
    from dall3.pipeline import Dall3Pipeline
    from dall3.tokens.sampling import check_counts

    limits = {name: getattr(args, f"max_{name}") for name in ("images", "candidates", "steps")}
    check_counts(port=args.port, **limits)
    device, dtype = placement(args)
    pipe = Dall3Pipeline.from_pretrained(args.weights, device=device, dtype=dtype)
    serve(pipe, args.host, args.port, Limits(**limits))


def scenes(args: argparse.Namespace) -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from tqdm.auto import tqdm

    from dall3.output import check_free
    from dall3.scenes.sheet import write_contact_sheet
    from dall3.tokens.sampling import check_counts

    out, size = Path(args.out or {"sheet": "sheet.png", "render": "scenes"}[args.what]), args.size
    check_counts(count=args.count, size=128 if size is None else size)
    if args.what == "sheet":
        check_free(out.parent, [] if args.overwrite else [out.name])
        write_contact_sheet(out, args.seed, size or 128)
        print(f'drew "{out}"')
        return
    check_counts(workers=args.workers)
    check_free(out, [] if args.overwrite else [f"{i:06}.png" for i in range(args.count)])
    out.mkdir(parents=True, exist_ok=True)
    job = partial(render_scene, out=out, size=size or 256, seed=args.seed)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for _ in tqdm(pool.map(job, range(args.count), chunksize=8), total=args.count, desc="rendering"):
            pass
    print(f'rendered {args.count} pictures with captions in "{out}"')


def render_scene(index: int, out: Path, size: int, seed: int) -> None:
    """Write scene number `index` of a seed and four captions, the same whichever process does it."""
    import numpy as np
    from PIL import Image

    from dall3.scenes import caption, random_scene, render

    rng = np.random.default_rng((seed, index))
    scene = random_scene(rng)
    captions = "\n".join(caption(scene, rng) for _ in range(4))
    Image.fromarray(render(scene, size)).save(out / f"{index:06}.png")
    (out / f"{index:06}.txt").write_text(captions + "\n", encoding="utf-8")


def read_tokens(path: str) -> Any:
    """The tokens in a .npy, int64 (1, n). Raises ValueError for another file."""
    import numpy as np
    import torch

    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy of image tokens ({error})") from None
    if tokens.dtype.kind not in "iu" or tokens.size == 0 or tokens.size != tokens.shape[-1]:
        raise ValueError(f"{path}: holds {tokens.dtype} {tokens.shape}; expected int64 (256,)")
    return torch.from_numpy(tokens.astype(np.int64)).reshape(1, -1)


def open_image(path: str) -> Image:
    """A picture from a file or an address. Raises ValueError for a file that is none."""
    import urllib.request

    from PIL import Image, UnidentifiedImageError

    source: Any = path
    if path.startswith(("http://", "https://")):
        with urllib.request.urlopen(path, timeout=60) as response:
            source = io.BytesIO(response.read())
    try:
        return Image.open(source).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that Pillow can read, nor a .npy of tokens") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0, 2 after one line that says what was wrong, or 130 when interrupted."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError, AssertionError) as error:
        print(f"dall3: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
