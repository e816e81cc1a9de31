"""`dall3 train family`: train all parts from nothing, from one recipe and within a given time.

Each part trains in its own process, within its window of the total time (`[family.windows]`), and waits for the parts
that it needs. The processes share one device, or are distributed over several. If a part fails, the others continue.
Images are rendered on the training device. The state of a run is in `runs/<part>`; the result is a pipeline folder.

`python -m dall3.training.family JOB` trains one part in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.scenes.emoji import fetch_emoji
from dall3.scenes.render import CHUNK
from dall3.scenes.world import World
from dall3.text import Tokenizer, load_tokenizer
from dall3.training.config import TrainingConfig
from dall3.training.loop import fit
from dall3.training.part import Part
from dall3.training.pool import Pool, PoolConfig
from dall3.training.processes import Processes
from dall3.training.recipe import PARTS, make_part, read_training_recipe
from dall3.training.tokenizer import TokenizerConfig, write_tokenizer
from dall3.weights.folder import DEFAULTS, TOKENIZER, Origin, from_json, load_part, model_card

NEEDS_CODES = ("transformer", "upsampler")  # parts that need the trained VQGAN
WHOLE = (0.0, 1.0)  # the window of a part that the recipe gives none
# Time that a part may take after its window, to write its files: a fraction of the whole time, and seconds. On a CPU
# the parts start slowly and compete for the cores.
LATE, LATE_SECONDS, LATE_SECONDS_ON_CPU = 0.05, 10, 120


@dataclass(frozen=True)
class Job:
    """The arguments of the process that trains one part.

    until: end of the part's window, as `time.time()`. late: number of seconds that it may exceed its window by. parent:
    process id of `train_family`; the part stops when that process has ended. 0 for none.
    """

    part: str
    config: str
    out: str
    emoji: str
    device: str
    until: float
    tiny: bool
    late: float = 0.0
    parent: int = 0


def wait_for(out: Path, part: str, until: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait until a part is finished, calling `meanwhile` repeatedly. Raises RuntimeError if it failed or is late."""
    while not (out / "runs" / part / "finished").exists():
        if (out / "runs" / part / "failed").exists():
            raise RuntimeError(f"{part} failed, and this part needs it")
        if time.time() > until:
            raise RuntimeError(f"{part} was not finished in time")
        meanwhile()
        time.sleep(0.2)


def mark(out: Path, part: str, what: str) -> None:
    """Create the file "finished" or "failed" in the folder of a part's run, for processes that wait for it."""
    run = out / "runs" / part
    run.mkdir(parents=True, exist_ok=True)
    (run / what).write_text("")


def make_tokenizer(recipe: dict[str, Any], out: Path, emoji: str) -> None:
    """Train the tokenizer on the recipe's captions, and write it with the list of their words."""
    config, world = from_json(TokenizerConfig, recipe["tokenizer"]), World("cpu", emoji=emoji or None, side=16)
    captions = world.plan(range(config.captions), recipe["family"]["seed"] + 1, config.kinds).captions
    # Training reads more captions than these, and every name and tag of the emoji occurs in some.
    names = [text.lower() for drawing in world.emoji for text in (drawing.name, *drawing.tags)]
    write_tokenizer(out, captions, config, names)


def make_untrained(job: Job, recipe: dict[str, Any], processes: Processes) -> Part:
    """Create the part with untrained weights. Parts that read text wait for the tokenizer."""
    out = Path(job.out)

    def tokenizer() -> Tokenizer:
        wait_for(out, "tokenizer", job.until + job.late)
        return load_tokenizer(out / TOKENIZER)

    def vqgan() -> VQModel | None:  # its weights are loaded when it is finished
        wanted = job.part in NEEDS_CODES
        return GumbelVQ(from_json(VQGANConfig, recipe["vqgan"]["model"])) if wanted else None

    return make_part(job.part, recipe, tokenizer, vqgan, processes)


def warm_up(part: Part, config: TrainingConfig, pool: Pool, name: str) -> None:
    """Compile the part, if enabled, and run it on a batch, so that errors occur before its window starts."""
    device, count = part.processes.device, min(config.batch_size, 256)
    rows = part.rows(pool.world.draw(range(count), pool.seed, pool.config.kinds), range(count))
    places = torch.arange(config.batch_size, device=device) % count
    rows = {name: value[places] for name, value in rows.items()}

    def once() -> None:
        for progress in (0.5, 1.0):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _ = part(rows, progress)
            loss.backward()
            part.zero_grad(set_to_none=True)

    if config.compile and device.type == "cuda":
        try:
            started = time.time()
            part.compile_parts()
            once()
            print(f"[{name}] compiled in {time.time() - started:.0f} s", flush=True)
            return
        except Exception as error:  # training continues without the compiler
            print(f"[{name}] not compiled: {error!r}"[:2000], flush=True)
            part.run_eagerly()
    once()


def train_part(job: Job) -> None:
    """Train one part in this process."""
    recipe, out, device = read_training_recipe(job.config, job.tiny), Path(job.out), torch.device(job.device)
    if job.part == "tokenizer":
        make_tokenizer(recipe, out, job.emoji)
        mark(out, "tokenizer", "finished")
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        CHUNK["cuda"] = 512  # less memory, as several parts render on the same device
    seed, tables = recipe["family"]["seed"], recipe[job.part]
    config: TrainingConfig = replace(from_json(TrainingConfig, tables["train"]), seed=seed, every=0)
    pooled: PoolConfig = from_json(PoolConfig, tables["pool"])
    if device.type == "cpu":  # small chunks are as efficient there
        pooled = replace(pooled, first=min(pooled.first, 256), chunk=min(pooled.chunk, 64))
    torch.manual_seed(seed)
    world = World(device, emoji=job.emoji or None, side=config.side)
    part = make_untrained(job, recipe, Processes(device))
    pool = Pool(world, part, pooled, seed, config.batch_size)
    if job.part in NEEDS_CODES:
        warm_up(part, config, pool, job.part)
        print(f"[{job.part}] ready", flush=True)
        wait_for(out, "vqgan", job.until + job.late, pool.prepare)
        part.frozen[0].load_state_dict(load_part(out / "vqgan").state_dict())  # type: ignore[union-attr,index]
    run, target = out / "runs" / job.part, out / job.part

    def go_on() -> bool:
        return not job.parent or os.getppid() == job.parent

    fit(part, config, pool, run, target, job.until, job.part, "lines", go_on)


def train_family(
    config: str | Path,
    out: str | Path,
    emoji: str | Path,
    minutes: float = 600.0,
    device: str | None = None,
    resume: bool = False,
    tiny: bool = False,
    commit: str | None = None,
) -> list[str]:
    """Train all parts of a family that are not finished, and return the names of those that failed.

    config: the recipe, such as settings/mini.toml. out: the pipeline folder to write. emoji: folder of the
    emoji, fetched with npm if it lacks them, or an archive. minutes: total time. device: such as "cuda", "cuda:1" or
    "cpu" (default: all GPUs, or the CPU).
    resume: continue the run in `out`, which may have been ended at any moment. tiny: train very small networks. commit:
    of this library, for the model card (default: that of its git repository, or its version).

    Raises, before any work, ValueError for settings that are unknown or out of range, and FileExistsError if `out` is
    not empty.
    """
    out, begun = Path(out), time.time()
    recipe = read_training_recipe(config, tiny)
    if not minutes > 0:
        raise ValueError(f"minutes={minutes}; expected a number above 0")
    if not resume and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; resume its run, or give another folder")
    emoji = emoji if Path(emoji).is_file() else fetch_emoji(emoji)
    out.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count() if device == "cuda" else 1
    windows, late = recipe["family"]["windows"], 60 * minutes * LATE
    late += LATE_SECONDS_ON_CPU if device == "cpu" else LATE_SECONDS
    ends = {part: begun + 60 * minutes * windows.get(part, WHOLE)[1] for part in ("tokenizer", *PARTS)}
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    with end_together(running):
        for number, part in enumerate(ends):
            if (out / "runs" / part / "finished").exists():
                continue
            (out / "runs" / part / "failed").unlink(missing_ok=True)
            where = f"cuda:{(number - 1) % count}" if device == "cuda" else device
            job = Job(part, str(config), str(out), str(emoji), where, ends[part], tiny, late, os.getpid())
            command = [sys.executable, "-m", "dall3.training.family", json.dumps(job.__dict__)]
            running[part] = subprocess.Popen(command)
        while running:
            for part, process in list(running.items()):
                if process.poll() is None and time.time() > ends[part] + late:
                    print(f"[{part}] exceeded its time; stopped", flush=True)
                    process.kill()
                    process.wait()
                if process.poll() is not None:
                    del running[part]
                    if (out / "runs" / part / "finished").exists():
                        continue
                    failed.append(part)
                    # Parts that wait for it can use its last exported weights.
                    left = (out / part).exists() and time.time() < begun + 60 * minutes
                    mark(out, part, "finished" if left else "failed")
                    print(
                        f"[{part}] failed ({process.returncode}); last exported weights available: {left}", flush=True
                    )
            time.sleep(0.2)
    describe(recipe, Path(config), out, commit or commit_of_library(), minutes, device, tiny)
    return failed


@contextmanager
def end_together(running: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Context manager that terminates the processes, which then write their files, if this one is interrupted."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def commit_of_library() -> str:
    """The commit of the git repository that tracks this file, or the version of the library."""

    def git(*command: str) -> str:
        whole = ["git", "-C", str(Path(__file__).parent), *command]
        return subprocess.run(whole, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # it may be installed inside of another repository
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return f"dall3 {version('dall3')}"


def describe(
    recipe: dict[str, Any], config: Path, out: Path, commit: str, minutes: float, device: str, tiny: bool = False
) -> None:
    """Write the model card, the default settings and the provenance of the weights."""
    (out / DEFAULTS).write_text(json.dumps(recipe["defaults"], indent=2) + "\n", encoding="utf-8")
    family = {
        "recipe": config.name,
        "recipe_sha256": sha256(config.read_bytes()).hexdigest(),
        "tiny": tiny,
        "commit": commit,
        "seed": recipe["family"]["seed"],
        "minutes": minutes,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }
    (out / "family.json").write_text(json.dumps(family, indent=2) + "\n", encoding="utf-8")
    source = f"dall3 train family, recipe {family['recipe_sha256'][:12]}, commit {commit}, seed {family['seed']}"
    found = [part for part in PARTS if (out / part).is_dir()]
    origins = {part: Origin(recipe["family"]["licence"], source) for part in found}
    (out / "README.md").write_text(model_card(out, origins), encoding="utf-8")


if __name__ == "__main__":
    train_part(Job(**json.loads(sys.argv[1])))
