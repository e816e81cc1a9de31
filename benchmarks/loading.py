"""Measure time and memory of loading a large UNet: as in 2021, from a checkpoint, and from a pipeline folder.

python benchmarks/loading.py

Creates a UNet of guided-diffusion's 256 px configuration with half the channels (138 M parameters, 0.55 GB) in a
temporary folder. "As in 2021" builds the network, calls torch.load and copies the weights. The figures are
medians of three processes with the files in the page cache: the seconds of loading, without imports, and the peak
memory relative to the weights' size in float32.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dall3.models.unet import UNet, UNetConfig
from dall3.weights.folder import save_part

CONFIG = UNetConfig(128, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 256, num_head_channels=64)
PRELUDE = """
import sys, time, torch
from dall3.weights import load_unet
from dall3.models.unet import UNet, UNetConfig
from dall3.weights.folder import BUNDLED, load_part
load_part(BUNDLED / "vqgan")  # imports the libraries

def peak_memory():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")  # reset the peak
path, before, start = sys.argv[1], peak_memory(), time.perf_counter()
"""
WAYS = {
    "as in 2021": f"model = UNet({CONFIG}); model.load_state_dict(torch.load(path, map_location='cpu'))",
    "from_checkpoints": "model = load_unet(path)",
    "from_pretrained": "model = load_part(path)",
    "from_pretrained, half precision": "model = load_part(path)",
}
REPORT = """
seconds = time.perf_counter() - start
sum(float(p.detach().sum()) for p in model.parameters())  # reads memory-mapped weights
print(seconds, (peak_memory() - before) / sum(4 * p.numel() for p in model.parameters()))
"""

with tempfile.TemporaryDirectory() as folder:
    torch.manual_seed(0)
    model = UNet(CONFIG)
    file, full, half = (Path(folder) / name for name in ("model.pt", "full", "half"))
    torch.save(model.state_dict(), file)
    save_part(model, full, None)
    save_part(model, half)
    found: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for _ in range(3):
        for (name, code), path in zip(WAYS.items(), (file, file, full, half), strict=True):
            line = subprocess.run(
                [sys.executable, "-c", "from dall3.models.unet import DiffusionConfig" + PRELUDE + code + REPORT, path],
                capture_output=True,
                text=True,
                check=True,
            )
            found[name].append([float(word) for word in line.stdout.split()])
print("| way | seconds | relative to 2021 | peak memory / weights |\n|---|---|---|---|")
first = statistics.median(seconds for seconds, _ in found["as in 2021"])
for name, runs in found.items():
    seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"| {name} | {seconds:.2f} | {seconds / first:.2f} | {memory:.2f} |")
