"""Benchmark `dall3 batch` in a loop, with one Ray worker and on a cluster: python benchmarks/batch.py [--sections …]

same: compare the indices of all three. failures: kill nodes, actors and the driver. speed: two workers relative to one,
and Ray relative to the loop, from one run, with one thread per stage. memory: peak of the object store while 1,024
candidates per prompt pass through stages that do no work. driver: prompts per second of one driver, from the prompts to
the finished shards, with stages that return the tokens of 1,024 candidates and the files of 8 images at once.

Uses the bundled weights and coarse images; refinement would add the same time to all.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dall3.scenes import caption, random_scene

PER_SHARD = 5
COMMAND = "from dall3.cli import main; raise SystemExit(main())"
TIMED = """
import json, sys, time
from dall3.batch.store import Store
from dall3.cli import main
times, add = [time.time()], Store.add
def timed(self, *args):
    times.append(time.time())
    add(self, *args)
Store.add = timed
file = sys.argv.pop(1)
code = main()
open(file, "w").write(json.dumps([*times, time.time()]))
raise SystemExit(code)
"""
FLAKY = """
import os, random, time
from dall3.batch import ray_engine, stages
class FlakyDraw(stages.Draw):
    def work(self, row):
        chance = random.SystemRandom().random()
        if chance < 0.03:
            os._exit(1)
        if chance < 0.1:
            raise OSError("a random error of an actor")
        return super().work(row)
stages.ATTEMPTS = 20
ray_engine.STAGES = (FlakyDraw, *ray_engine.STAGES[1:])
"""
NOTHING = """
import sys, time
import numpy as np
from dall3.batch import ray_engine, stages
from dall3.batch.job import Job
class Draw(stages.Draw):
    def __init__(self, job): self.job = job
    def work(self, row):
        rng = np.random.default_rng(row["number"])
        return {"tokens": rng.integers(0, 2048, (1024, 256)).astype(np.int16).tobytes()}
class Rank(stages.Rank):
    def __init__(self, job): self.job = job
    def work(self, row):
        time.sleep(float(sys.argv[2]))
        return {"tokens": row["tokens"][: 8 * 512], "candidates": b"", "scores": b""}
class Refine(stages.Refine):
    def __init__(self, job): self.job = job
    def work(self, row): return {"files": bytes(800_000)}
ray_engine.STAGES = (Draw, Rank, Refine)
job = Job(None, "float32", 1, {}, False, 32, 256, "int16", {}, {}, {"num_candidates": 1024})
rows = [stages.first_row(stages.Prompt(i, "a cube", i)) for i in range(int(sys.argv[1]))]
one, third, none = (dict.fromkeys(("draw", "rank", "refine"), value) for value in (1, 0.3, 0))
with ray_engine.cluster("local"):
    times = [time.time() for _ in ray_engine.run_on_ray(job, rows, one, third, none)]
assert len(times) == len(rows)
print((len(times) - 1) / (times[-1] - times[0]))
"""

DRIVER = """
import json, sys, time
from pathlib import Path
from dall3.batch import generate, ray_engine, stages
from dall3.batch.store import Store
count, candidates, images, home = int(sys.argv[1]), 1024, 8, Path(sys.argv[2])
generate(["a cube"], home / "one", images, images, refine=False, progress=False)
files = (home / "one" / "pictures-000000.tar").read_bytes()
class Draw(stages.Draw):
    def __init__(self, job): self.job, self.ready = job, bytes(2 * job.tokens * candidates)
    def work(self, row): return {"tokens": self.ready}
class Rank(stages.Rank):
    def __init__(self, job): self.job = job
    def work(self, row):
        return {"tokens": row["tokens"][: 2 * self.job.tokens * images], "candidates": b"", "scores": b""}
class Refine(stages.Refine):
    def __init__(self, job): self.job = job
    def work(self, row): return {"files": files}
ray_engine.STAGES, add, writing, times = (Draw, Rank, Refine), Store.add, [], []
def timed(self, *args):
    times.append((time.perf_counter(), time.process_time()))
    add(self, *args)
    writing.append(time.perf_counter() - times[-1][0])
Store.add = timed
small = {"draw": 0.4, "rank": 0.3, "refine": 0.3}
coarse = dict(refine=False, ray="local", num_cpus=small, prompts_per_task=int(sys.argv[3]), progress=False)
generate(["a cube"] * count, home / "driver", images, candidates, **coarse)
wall, cpu = (times[-1][k] - times[0][k] for k in (0, 1))
print(json.dumps({"prompts per second": (count - 1) / wall, "writing, share of the time": sum(writing[:-1]) / wall,
    "driver's CPU seconds per second": cpu / wall, "bytes per prompt": len(files),
    "driver's peak MB": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024}))
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--sections", nargs="+", default=["same", "failures", "speed", "memory", "driver"])
parser.add_argument("--prompts", type=int, default=40)
parser.add_argument("--candidates", type=int, default=32)
parser.add_argument("--images", type=int, default=8)
parser.add_argument("--cond_scale", type=float, help="scale of classifier-free guidance (default: that of the weights)")
parser.add_argument("--driver_prompts", type=int, default=10_000)
parser.add_argument("--memory_prompts", type=int, nargs="+", default=[100, 1000])
args = parser.parse_args()
home = Path(tempfile.mkdtemp())
book = home / "book.txt"
rng = np.random.default_rng(0)
book.write_text("".join(caption(random_scene(rng), rng) + "\n" for _ in range(args.prompts)))
environment = os.environ | {f"RAY_health_check_{name}": "1000" for name in ("initial_delay_ms", "period_ms")}
environment |= {"OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


def start(name: str, *options: str, script: str = COMMAND, before: tuple[str, ...] = (), cores: int = 0):
    """Start `dall3 batch` in a process. cores: number of cores, 0 for all."""
    settings = ["--num-images", str(args.images), "--num-candidates", str(args.candidates), "--coarse"]
    settings += [] if args.cond_scale is None else ["--cond-scale", str(args.cond_scale)]
    settings += [] if "--ray" in options else ["--device", "cpu"]
    command = [sys.executable, "-c", script, *before, "batch", str(book), "--out", str(home / name)]
    allowed = sorted(os.sched_getaffinity(0))[: cores or None]
    pin = lambda: os.sched_setaffinity(0, allowed)  # noqa: E731
    return subprocess.Popen([*command, *settings, *options], env=environment, preexec_fn=pin, stderr=subprocess.DEVNULL)


def run(name: str, *options: str, **how) -> list[dict]:
    assert start(name, *options, **how).wait() == 0, f"{name} failed"
    return pq.read_table(home / name / "index.parquet").to_pylist()


def finished(name: str) -> int:
    """The number of prompts whose images are on disk."""
    beside, shards = list(home.glob(f"{name}/prompts/*.tar")), list(home.glob(f"{name}/index/*.parquet"))
    return min(len(beside) + PER_SHARD * len(shards), args.prompts)


def compare(name: str, rows: list[dict], plain: list[dict]) -> None:
    key = lambda row: (row["number"], row["place"])  # noqa: E731
    twice = len(rows) - len({key(row) for row in rows})
    lost = len({row["number"] for row in plain} - {row["number"] for row in rows})
    order = [(*key(row), row["candidate"]) for row in rows] == [(*key(row), row["candidate"]) for row in plain]
    tokens = sum(row["tokens"] == other["tokens"] for row, other in zip(rows, plain, strict=False))
    scores = max(abs(row["score"] - other["score"]) for row, other in zip(rows, plain, strict=False))
    shards = sorted(path.name for path in home.glob("plain/*.tar"))
    equal = sum((home / name / shard).read_bytes() == (home / "plain" / shard).read_bytes() for shard in shards)
    print(f"| {name} | {len(rows)} | {lost} | {twice} | {'yes' if order else 'NO'} | {tokens} | {scores:.1e} | "
          f"{equal} of {len(shards)} |", flush=True)  # fmt: skip


class Nodes:
    """A Ray cluster of three nodes with one CPU each on this machine. A killed node is replaced."""

    def __enter__(self):
        from ray.cluster_utils import Cluster

        os.environ.update(environment)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
        self.nodes = [self.add() for _ in range(2)]
        return self

    def add(self):
        return self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20)

    def kill_one(self) -> None:
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self.add())

    def __exit__(self, *error) -> None:
        self.cluster.shutdown()


def same_and_failures() -> None:
    small = ("--prompts_per_shard", str(PER_SHARD))
    plain = run("plain", *small)
    print(f"{args.prompts} prompts, the best {args.images} of {args.candidates} candidates")
    print(
        "| run | rows | prompts lost | duplicate rows | same order | same tokens "
        "| largest score difference | same shards |"
    )
    print("|---|---|---|---|---|---|---|---|")
    compare("plain", plain, plain)
    if "same" in args.sections:
        compare("one worker", run("one worker", "--ray", "local", *small), plain)
        with Nodes() as three:
            rows = run("three nodes", "--ray", three.cluster.address, "--workers", "3", "--num-cpus", "1", *small)
        compare("three nodes", rows, plain)
    if "failures" in args.sections:
        with Nodes() as three:
            options = ("--ray", three.cluster.address, "--workers", "3", "--num-cpus", "1", *small)
            flaky = FLAKY + COMMAND
            driver = start("failures", *options, script=flaky)
            for share, what in ((0.2, "node"), (0.45, "driver"), (0.7, "node")):
                while finished("failures") < share * args.prompts:
                    assert driver.poll() is None, "the driver ended early"
                    time.sleep(0.1)
                before = finished("failures")
                if what == "node":
                    three.kill_one()
                else:
                    driver.kill()
                    driver.wait()
                    driver = start("failures", *options, script=flaky)
                print(f"<!-- {what} killed with {before} of {args.prompts} prompts done -->", flush=True)
            assert driver.wait() == 0
        rows = pq.read_table(home / "failures" / "index.parquet").to_pylist()
        compare("failures", rows, plain)


def speed() -> None:
    ray_options = ("--ray", "local", "--num-cpus", "1", "--workers")
    runs = {
        "the loop, 1 core": ((), 1),
        "Ray, 1 worker, 1 core": ((*ray_options, "1"), 1),
        "the loop, 2 cores": ((), 2),
        "Ray, 1 worker, 2 cores": ((*ray_options, "1"), 2),
        "Ray, 2 workers, 2 cores": ((*ray_options, "2"), 2),
    }
    seconds = {}
    skip = min(4, args.prompts // 2)  # exclude the start of the actors from the measurement
    print("\n| run | s per prompt, after the start | s in total |\n|---|---|---|")
    for i, (name, (options, cores)) in enumerate(runs.items()):
        file = home / f"times-{i}.json"
        assert start(f"speed-{i}", *options, script=TIMED, before=(str(file),), cores=cores).wait() == 0
        begin, *done, end = json.loads(file.read_text())
        seconds[name] = (done[-1] - done[skip - 1]) / (len(done) - skip)
        print(f"| {name} | {seconds[name]:.2f} | {end - begin:.1f} |", flush=True)
    one, two = seconds["Ray, 1 worker, 1 core"], seconds["Ray, 2 workers, 2 cores"]
    print(f"\ntwo workers on two cores, relative to one on one: {one / two:.2f} times the throughput")
    print(f"Ray, relative to the loop on the same core: {one / seconds['the loop, 1 core']:.3f} times the time")


def nothing(count: int, sleep: float) -> float:
    """Prompts per second through stages that do no work. sleep: seconds that ranking waits per prompt."""
    command = [sys.executable, "-c", NOTHING, str(count), str(sleep)]
    return float(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


@contextmanager
def object_store():
    """Measure the peak of the object store: yields a list whose only number is the peak in bytes, at the end."""
    used = lambda: (found := os.statvfs("/dev/shm")).f_frsize * (found.f_blocks - found.f_bfree)  # noqa: E731
    base, most, ended = used(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            most[0] = max(most[0], used() - base)  # used pages are not returned, so this is the peak

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def memory() -> None:
    print("\n| prompts of 1,024 candidates | passed through, MB | peak of the object store, MB |\n|---|---|---|")
    for count in args.memory_prompts:
        with object_store() as most:
            nothing(count, 0.05)  # slower than drawing, so that drawn prompts have to wait
        passed = count * (1024 * 512 + 800_000 + 8 * 512)
        print(f"| {count} | {passed / 1e6:.0f} | {most[0] / 1e6:.0f} |", flush=True)


def driver() -> None:
    rows = []
    for per_task in (1, 8, 32):
        with tempfile.TemporaryDirectory(dir=home) as folder, object_store() as most:
            command = [sys.executable, "-c", DRIVER, str(args.driver_prompts), folder, str(per_task)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"prompts": args.driver_prompts, "prompts per task": per_task})
        rows[-1] |= json.loads(done.stdout.splitlines()[-1]) | {"peak of the object store, MB": most[0] / 1e6}
        print(f"\n{rows[-1]}", flush=True)
    results = Path(__file__).with_name("results") / "batch.json"
    results.write_text(json.dumps({"driver": rows}, indent=2) + "\n", encoding="utf-8")


try:
    if {"same", "failures"} & set(args.sections):
        same_and_failures()
    if "speed" in args.sections:
        speed()
    if "memory" in args.sections:
        memory()
    if "driver" in args.sections:
        driver()
finally:
    shutil.rmtree(home)
