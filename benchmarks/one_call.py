"""Measure the time of each stage of a call, and of the whole process: python benchmarks/one_call.py FOLDER

FOLDER holds upstream's checkpoints, or those of examples/make_small_checkpoints.py. The figures are medians of three
runs.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from dall3 import Dall3Pipeline

PROMPT, STEPS, CANDIDATES, RUNS = "a cube made of cloud", 25, 4, 3
folder = Path(sys.argv[1])
seconds: dict[str, list[float]] = defaultdict(list)


def timed(name, function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, progress=False, **kwargs) if name not in ("load", "decode") else function(*args, **kwargs)
    seconds[name].append(time.perf_counter() - start)
    return result


for _ in range(RUNS):
    pipe = timed(
        "load",
        Dall3Pipeline.from_checkpoints,
        dalle=folder / "dalle-latest.pt",
        bpe=folder / "bpe.model",
        vqgan=folder / "vqgan_gumbel_f8/last.ckpt",
        diffusion=folder / "model-latest.pt",
        diffusion_config=folder / "model-latest.json",
        clip=folder / "ViT-B-16.pt",
    )
    tokens = timed("draw", pipe.generate_tokens, PROMPT, CANDIDATES, top_p=0.85, seed=0)
    coarse = timed("decode", pipe.decode_tokens, tokens)
    best = timed("rank", pipe.rank, coarse, PROMPT).indices[:1]
    how = dict(num_inference_steps=STEPS, seed=0)
    timed("refine, unguided", pipe.upsample, tokens[best], **how)
    timed("refine, guided", pipe.upsample, tokens[best], prompt=PROMPT, clip_guidance_scale=1000, **how)
    with tempfile.TemporaryDirectory() as outputs:
        script = Path(__file__).parent.parent / "examples/load_2021_checkpoints.py"
        command = [sys.executable, str(script.resolve()), str(folder.resolve()), PROMPT]
        start = time.perf_counter()
        subprocess.run(command, cwd=outputs, check=True, capture_output=True)
        seconds["examples/load_2021_checkpoints.py, whole process"].append(time.perf_counter() - start)

print(f"{CANDIDATES} candidates, 1 image, {STEPS} steps, {torch.get_num_threads()} threads, float32, CPU")
for name, runs in seconds.items():
    each = {"draw": (256, "token step"), "refine, unguided": (STEPS, "step"), "refine, guided": (STEPS, "step")}.get(
        name
    )
    median = statistics.median(runs)
    print(f"{name:36} {median:8.3f} s" + (f"  {median / each[0] * 1000:8.1f} ms per {each[1]}" if each else ""))
