"""`dall3 batch`: a loop and a cluster write the same index, also if processes are killed."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dall3 import Dall3Output, Dall3Pipeline
from dall3.batch import generate, prompts, stages, torch_threads
from dall3.batch.prompts import prompt_seed, read_prompts
from dall3.batch.stages import first_row, pack
from dall3.cli import main
from dall3.training.files import Shards

from conftest import load_upstream_files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
store = pytest.importorskip("dall3.batch.store")

BOOK = [f"a {shape} made of {stuff}" for shape in ("cube", "cone", "ring") for stuff in ("cloud", "wood")]
BOOK[3:3] = ["", "word " * 300]  # neither prompt can be drawn
BAD = {3, 4}
PER_SHARD = 3
HOW = dict(num_images=2, num_candidates=5, batch_size=3, prompts_per_shard=PER_SHARD, progress=False)
HOW |= dict(refine=False)


@pytest.fixture(scope="module")
def weights(upstream_files, tmp_path_factory):
    return load_upstream_files(upstream_files).save_pretrained(tmp_path_factory.mktemp("batch") / "weights")


@pytest.fixture(scope="module")
def pipe(weights):
    return Dall3Pipeline.from_pretrained(weights)


@pytest.fixture(scope="module")
def plain(weights, tmp_path_factory):
    """The folder of an uninterrupted run in this process."""
    out = tmp_path_factory.mktemp("plain") / "out"
    report = generate(BOOK, out, weights=weights, **HOW)
    assert report.failed.keys() == BAD and report.prompts == len(BOOK)
    return out


def contents(folder):
    """The result of a run: the rows of the index and the bytes of the shards."""
    shards = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    return pq.read_table(folder / "index.parquet").to_pylist(), shards


def assert_same(folder, expected):
    rows, shards = contents(folder)
    expected_rows, expected_shards = contents(expected)
    assert rows == expected_rows
    assert shards == expected_shards
    assert not list(folder.rglob("*.tmp")) and not list((folder / "prompts").iterdir())


def test_the_index_holds_every_prompt_in_order_with_its_best_candidates(plain, weights):
    rows, shards = contents(plain)
    assert [row["number"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 7]
    assert sorted(shards) == [f"pictures-{i:06}.tar" for i in range(3)]
    coarse = Dall3Pipeline.from_pretrained(weights)
    coarse.upsampler = None
    for number in (0, 5, 7):
        seed = prompt_seed(0, number)
        how = dict(num_images=2, num_candidates=5, batch_size=3, seed=seed, progress=False)
        with torch_threads(1):
            out = coarse(BOOK[number], **how)
        found = [row for row in rows if row["number"] == number]
        assert [row["tokens"] for row in found] == out.tokens.tolist()
        assert [row["candidate"] for row in found] == out.candidates.tolist()
        assert np.abs(np.array([row["score"] for row in found]) - out.clip_scores.numpy()).max() < 1e-4
        assert [(row["place"], row["seed"], row["prompt"]) for row in found] == [
            (place, seed, BOOK[number]) for place in (0, 1)
        ]
        for row, picture in zip(found, out.images, strict=True):
            saved = Image.open(io.BytesIO(member(plain / row["file"], row["key"] + ".png")))
            assert np.abs(np.asarray(saved, int) - np.asarray(picture, int)).max() <= 1


def member(shard, name):
    with tarfile.open(shard) as tar:
        return tar.extractfile(name).read()


def test_a_prompt_that_cannot_be_drawn_is_recorded_with_the_reason(plain):
    rows = {row["number"]: row for row in contents(plain)[0]}
    assert "is empty" in rows[3]["error"] and "tokens" in rows[4]["error"]
    assert rows[3]["prompt"] == "" and rows[3]["place"] is None and not rows[3]["retry"]
    assert all(rows[number]["error"] is None for number in rows.keys() - BAD)


def test_a_refined_picture_carries_its_recipe_and_repeats(weights, pipe, tmp_path):
    how = dict(num_images=2, num_candidates=4, num_inference_steps=2, seed=5, weights=weights, progress=False)
    report = generate(["a cube", "a cone"], tmp_path / "out", clip_guidance_scale=100, **how)
    row = pq.read_table(report.index).to_pylist()[3]
    png = tmp_path / "one.png"
    png.write_bytes(member(tmp_path / "out" / row["file"], row["key"] + ".png"))
    assert Image.open(io.BytesIO(member(tmp_path / "out" / row["file"], row["key"] + ".coarse.png"))).size == (128, 128)
    saved, again = Dall3Output.load(png), pipe.repeat(png, progress=False)
    assert torch.equal(again.tokens, saved.tokens) and again.tokens[0].tolist() == row["tokens"]
    assert saved.settings["seed"] == row["seed"] == prompt_seed(5, 1) and saved.settings["clip_guidance_scale"] == 100
    assert np.abs(again.to_numpy().astype(int) - saved.to_numpy()).max() <= 2
    assert json.loads(row["recipe"])["settings"]["num_candidates"] == 4


def test_shards_are_read_by_webdataset_and_by_training(plain):
    wds = pytest.importorskip("webdataset")
    urls = sorted(map(str, plain.glob("*.tar")))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    rows = [row for row in contents(plain)[0] if row["error"] is None]
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    assert samples[0]["png"].size == (128, 128) and samples[0]["txt"] == BOOK[0]
    assert [sample["json"]["tokens"] for sample in samples] == [row["tokens"] for row in rows]
    picture, text = Shards(str(plain / "*.tar")).draw(0, np.random.default_rng(0), 64)
    assert picture.shape == (64, 64, 3) and text in BOOK


def test_stages_pass_tokens_and_scores_only(weights, pipe):
    job = make_job(pipe, weights)
    row = first_row(prompts.Prompt(0, "a cube", 1))
    drawn = stages.Draw(job, pipe)(row)
    assert len(drawn["tokens"]) == 5 * 256 * 2
    ranked = stages.Rank(job, pipe)(drawn)
    assert len(ranked["tokens"]) == 2 * 256 * 2 and len(ranked["scores"]) == len(ranked["candidates"]) == 2 * 4
    assert sum(len(value) for value in ranked.values() if isinstance(value, bytes)) == 2 * (512 + 4 + 4)


def test_a_prompt_of_megabytes_fails_before_it_is_tokenized(weights, pipe, monkeypatch):
    job = make_job(pipe, weights)
    monkeypatch.setattr(pipe, "text_encoder", lambda *args: pytest.fail("was tokenized"))
    row = stages.Draw(job, pipe)(first_row(prompts.Prompt(0, "x" * 10_000_000, 1)))
    assert row["error"] == "ValueError: the prompt has 10,000,000 characters; expected at most 10,000"
    assert not row["retry"]


def make_job(pipe, weights):
    from dall3.batch.job import make_job

    devices = dict.fromkeys(("draw", "rank", "refine"), "cpu")
    return make_job(pipe, weights, "float32", devices, 2, 5, 3, None, 4, False, 1, {})


def test_a_prompts_seed_follows_from_the_runs_seed_and_its_number():
    seeds = [prompt_seed(seed, number) for seed in (0, 1, 2**62) for number in range(1000)]
    assert len(set(seeds)) == 3000 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 4334430513956379144 and prompt_seed(0, 999) == seeds[999]


def test_a_prompts_pictures_do_not_depend_on_the_others(weights, plain, tmp_path):
    generate(BOOK[:1], tmp_path / "out", weights=weights, **HOW)
    assert contents(tmp_path / "out")[0] == contents(plain)[0][:2]


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_prompts_are_read_from_four_kinds_of_files(kind, tmp_path):
    path = tmp_path / f"book.{kind}"
    texts = ['a "cube", red', "", "a cône"]
    if kind == "txt":
        path.write_bytes("\r\n".join([*texts, ""]).encode())
        own = None
    elif kind == "csv":
        path.write_text('seed,prompt\n,"a ""cube"", red"\n7,\n,a cône\n', encoding="utf-8")
        own = 7
    elif kind == "jsonl":
        rows = [{"prompt": texts[0]}, {"prompt": None, "seed": 7}, {"prompt": texts[2], "seed": None}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        own = 7
    else:
        pq.write_table(pa.table({"prompt": texts, "seed": [None, 7, None]}), path)
        own = 7
    found = read_prompts(path, 3)
    assert [prompt.text for prompt in found] == texts and [prompt.number for prompt in found] == [0, 1, 2]
    assert [prompt.seed for prompt in found] == [prompt_seed(3, 0), own or prompt_seed(3, 1), prompt_seed(3, 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("book.md", b"a cube", "one of .txt, .csv, .jsonl, .parquet"),
        ("book.csv", b"text\na cube\n", "column 'prompt'.*columns are text"),
        ("book.csv", b"prompt,seed\na cube,x\n", "invalid literal"),
        ("book.jsonl", b'{"prompt": "a cube"}\n{"text": "a cone"}\n', "line 2 is not an object with a 'prompt'"),
        ("book.jsonl", b'{"prompt": 3}\n', "prompt 0: the prompt is int"),
        ("book.jsonl", b'{"prompt": "a cube", "seed": -1}\n', "prompt 0: seed=-1"),
        ("book.jsonl", b'{"prompt": "a \\ud800 cube"}\n', r"prompt 0: contains the lone surrogate '\\ud800'"),
        ("book.jsonl", b'{"prompt": ' + b"[" * 100_000, "not a .jsonl"),
        ("book.parquet", b"PAR1", "not a .parquet"),
        ("book.txt", b"", "holds no prompt"),
        ("book.txt", b"\xff\xfe", "not a .txt"),
    ],
)
def test_prompts_that_cannot_be_read_are_an_error_before_any_work(name, content, message, weights, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / name, tmp_path / "out", weights=weights, **HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_candidates": 1}, "less than num_images"),
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"threads": 0}, "threads=0"),
        ({"scheduler": "oiler"}, "oiler"),
        ({"workers": {"draw": 1}, "ray": "local"}, "workers of rank=0"),
        ({"workers": {"paint": 1}, "ray": "local"}, "unknown stage paint"),
        ({"num_gpus": 2, "ray": "local"}, "num_gpus=2; expected at most 1"),
        ({"ray": "127.0.0.1:1"}, "no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_settings_out_of_range_are_errors(change, message, weights, tmp_path):
    if "ray" in change:
        pytest.importorskip("ray")
    with pytest.raises(ValueError, match=message):
        generate(BOOK, tmp_path / "out", weights=weights, **HOW | change)


def test_options_take_one_number_or_one_per_stage(weights, tmp_path, capsys):
    pytest.importorskip("ray")
    from dall3.batch.ray_engine import per_stage

    assert per_stage("workers", 2, shared=False) == {"draw": 2, "rank": 2, "refine": 2}
    shares = per_stage("num_gpus", 1, shared=True)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9) and shares["draw"] > 0.5
    assert per_stage("num_gpus", {"draw": 1}, shared=True) == {"draw": 1, "rank": 0, "refine": 0}
    (tmp_path / "book.txt").write_text("a cube")
    command = ["batch", str(tmp_path / "book.txt"), "--out", str(tmp_path / "out"), "--ray", "local", "--workers"]
    assert main([*command, "draw=x"]) == 2
    assert "--workers draw=x; expected a number, or draw=N rank=N refine=N" in capsys.readouterr().err


def test_a_missing_library_is_named(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("dall3.batch.find_spec", lambda name: None if name == "ray" else name)
    with pytest.raises(ValueError, match=r"dall3 batch --ray needs ray; run pip install 'dall3\[ray\]'"):
        generate(BOOK, tmp_path / "out", weights=weights, ray="local", **HOW)


def test_a_run_resumes_only_with_the_same_settings_and_one_at_a_time(weights, plain, tmp_path):
    before = contents(plain)
    generate(BOOK, plain, weights=weights, **HOW)  # the run is finished
    assert contents(plain) == before
    with pytest.raises(ValueError, match="num_candidates was 5, now 6"):
        generate(BOOK, plain, weights=weights, **HOW | {"num_candidates": 6})
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        generate(BOOK, plain, weights=weights, seed=1, **HOW)
    with pytest.raises(ValueError, match="prompts_hash"):
        generate([*BOOK[:-1], "a new one"], plain, weights=weights, **HOW)
    with pytest.raises(ValueError, match="transformer"):
        generate(BOOK, plain, **HOW)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        generate(BOOK, tmp_path, weights=weights, **HOW)
    with (
        contextlib.closing(store.Store(tmp_path / "new", read_prompts(BOOK), {}, 4)),
        pytest.raises(ValueError, match="another run is using"),
    ):
        generate(BOOK, tmp_path / "new", weights=weights, **HOW)


@pytest.mark.parametrize("damage", ["gone", "cut", "index"])
def test_a_missing_or_truncated_shard_is_made_again(damage, weights, plain, tmp_path, caplog):
    out = shutil.copytree(plain, tmp_path / "out")
    shard = out / "pictures-000001.tar"
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-5000])
    else:
        (out / "index/000001.parquet").write_bytes(b"PAR1")
    assert generate(BOOK, out, weights=weights, **HOW).failed.keys() == BAD
    assert_same(out, plain)
    assert [r.message for r in caplog.records if "000001" in r.message and "again" in r.message]


def test_files_of_other_programs_are_kept_or_named(tmp_path):
    book, rows = (
        read_prompts(["a cube", "a cone"]),
        [{"files": fake_files(i), "error": "", "retry": False} for i in range(2)],
    )

    def run(*numbers):
        with contextlib.closing(store.Store(tmp_path, book, {}, 2)) as written:
            done = [number for number in range(2) if written.is_done(number)]
            for number in numbers:
                written.add(number, **rows[number])
            return done

    run(0)
    own = [tmp_path / name for name in ("manifest.json.tmp", "prompts/00000001.tar.tmp", "pictures-000000.tar.tmp")]
    others = [tmp_path / name for name in ("notes.tmp", "prompts/mine.tar.tmp", "notes/pictures-000000.tar.tmp")]
    (tmp_path / "notes").mkdir()
    (tmp_path / "x.tmp").mkdir()
    for path in [*own, *others]:
        path.write_text("mine")
    assert run() == [0]
    assert not any(path.exists() for path in own) and all(path.exists() for path in others)
    whole = (tmp_path / "prompts/00000000.tar").read_bytes()
    for damaged in (b"", whole[:700], whole[:2048], whole.rstrip(b"\0"), b"<html>" * 500):
        (tmp_path / "prompts/00000000.tar").write_bytes(damaged)
        assert run() == []
    for name in ("prompts/mine.tar", "prompts/00000009.tar", "index/mine.parquet"):
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(ValueError, match=f"{name} is not a file of this run; move it away"):
            run()
        (tmp_path / name).unlink()
    for damaged in ("", "[]", "{", "[" * 100_000):
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            run()


def test_a_run_killed_at_any_moment_resumes(weights, plain, tmp_path):
    """The process gets SIGKILL at moments that differ from run to run."""
    out, book = tmp_path / "out", tmp_path / "book.txt"
    book.write_text("\n".join(BOOK))
    options = ["--num-images", "2", "--num-candidates", "5", "--batch-size", "3", "--prompts_per_shard", str(PER_SHARD)]
    command = ["batch", str(book), "--out", str(out), "--weights", str(weights), "--coarse", "--device", "cpu"]
    script = f"from dall3.cli import main; main({[*command, *options]!r})"
    done = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while process.poll() is None and finished(out) < done + 2:
            time.sleep(0.01)
        time.sleep(random.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL)
        assert finished(out) >= done + 2
        done = finished(out)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        work = stages.Draw.work
        patch.setattr(stages.Draw, "work", lambda self, row: drawn.append(row["number"]) or work(self, row))
        assert main([*command, *options]) == 0
    assert len(drawn) == len(set(drawn)) <= len(BOOK) - done
    assert_same(out, plain)


def finished(out):
    """The number of finished prompts in a folder: in complete shards, and in files of their own."""
    shards = {int(path.stem) for path in out.glob("index/*.parquet")}
    beside = {int(path.stem) for path in out.glob("prompts/*.tar")}
    return len(beside | {number for number in set(range(len(BOOK))) - BAD if number // PER_SHARD in shards})


class Crash(BaseException):
    """Raised in place of a crash of the process."""


def test_a_crash_at_any_file_operation_neither_loses_nor_repeats_a_prompt(tmp_path, monkeypatch):
    """A run that is resumed from the folder before any single rename or removal has the same result."""
    book = read_prompts([f"prompt {i}" for i in range(5)])
    rows = [{"number": i, "files": fake_files(i), "error": "", "retry": False} for i in range(5)]
    rows[2] |= {"files": b"", "error": "OSError: away", "retry": True}
    rows[3] |= {"files": b"", "error": "ValueError: empty", "retry": False}
    rename, unlink = os.replace, store.Path.unlink

    def run(folder, rows, crash_at=None):
        steps = 0

        def step(original):
            def counted(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == crash_at:
                    raise Crash
                return original(*args, **kwargs)

            return counted

        monkeypatch.setattr(store.os, "replace", step(rename))
        monkeypatch.setattr(store.Path, "unlink", step(unlink))
        written = None
        try:
            written = store.Store(folder, book, {}, 2)
            for row in rows:
                if not written.is_done(row["number"]):
                    written.add(**row)
            written.finish()
        finally:
            monkeypatch.undo()
            if written is not None:
                written.close()
        return steps

    good = [*rows[:2], rows[2] | {"files": fake_files(2), "error": "", "retry": False}, *rows[3:]]
    first, second = run(tmp_path / "whole", rows), run(tmp_path / "whole", good)
    assert first > 10 and second > 5
    indexed = contents(tmp_path / "whole")[0]
    assert [(row["number"], row["error"]) for row in indexed] == [
        (i, rows[3]["error"] if i == 3 else None) for i in range(5)
    ]
    for which, steps in ((0, first), (1, second)):
        for crash_at in range(1, steps + 1):
            folder = tmp_path / f"{which}-{crash_at}"
            for _ in range(which):
                run(folder, rows)
            with pytest.raises(Crash):
                run(folder, good if which else rows, crash_at)
            run(folder, good)
            assert_same(folder, tmp_path / "whole")


def fake_files(number):
    image = [Image.new("RGB", (8, 8), (number, 0, 0))]
    one = torch.full((1, 4), number)
    return pack(Dall3Output("a cube", image, image, one, None, torch.arange(1), {"seed": number}), number)


def test_a_temporary_failure_is_retried_at_once_and_by_the_next_run(weights, plain, tmp_path, monkeypatch):
    attempts, rank = [], stages.Rank.work

    def work(self, row):
        attempts.append(row["number"])
        if row["number"] == 1 or (row["number"] == 0 and len(attempts) == 1):
            raise RuntimeError("the device is away")
        return rank(self, row)

    monkeypatch.setattr(stages.Rank, "work", work)
    report = generate(BOOK, tmp_path / "out", weights=weights, **HOW)
    assert report.failed.keys() == {1, *BAD} and report.failed[1] == "RuntimeError: the device is away"
    assert attempts[:2] == [0, 0] and attempts.count(1) == stages.ATTEMPTS and attempts.count(2) == 1
    monkeypatch.undo()
    assert generate(BOOK, tmp_path / "out", weights=weights, **HOW).failed.keys() == BAD
    assert_same(tmp_path / "out", plain)


def test_a_machine_with_other_weights_is_refused(pipe, weights):
    job = make_job(pipe, None)
    with pytest.raises(ValueError, match="differ from the run's in"):
        stages.Rank(job)


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of three nodes on this machine that quickly detects a lost node."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("initial_delay_ms", 1000), ("period_ms", 500), ("failure_threshold", 3)):
            patch.setenv(f"RAY_health_check_{name}", str(value))
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 waits for whatever else runs here
        head = {"num_cpus": 1, "object_store_memory": 200 << 20, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            found.add_node(num_cpus=1, object_store_memory=100 << 20)
        yield found
        found.shutdown()


def test_a_run_survives_failing_nodes_and_actors(cluster, weights, plain, tmp_path, monkeypatch):
    """Two workers, of which one drawing actor dies and one raises, and a node that is killed. The first half of the run
    was made by the loop.
    """
    from dall3.batch import ray_engine

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:  # the loop ends early
        add = store.Store.add
        counted = iter(range(100))
        patch.setattr(store.Store, "add", lambda self, *args: stop_at(2, counted) or add(self, *args))
        with pytest.raises(Crash):
            generate(BOOK, out, weights=weights, **HOW)

    class FlakyDraw(stages.Draw):
        def work(self, row):
            if self.is_first("died"):
                os._exit(1)
            if self.is_first("raised"):
                raise OSError("a passing error")
            return super().work(row)

        def is_first(self, name):
            """Whether no actor was here before."""
            with contextlib.suppress(FileExistsError), open(tmp_path / name, "x"):
                return True
            return False

    monkeypatch.setattr(ray_engine, "STAGES", (FlakyDraw, *ray_engine.STAGES[1:]))
    node, before = cluster.list_all_nodes()[-1], finished(out)

    def kill():
        while finished(out) < before + 1:
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    how = dict(weights=weights, ray=cluster.address, workers=2, num_cpus=1, prompts_per_task=2)
    assert generate(BOOK, out, **how, **HOW).failed.keys() == BAD
    killer.join(timeout=60)
    assert node not in cluster.list_all_nodes()
    assert (tmp_path / "died").exists() and (tmp_path / "raised").exists()
    assert_same(out, plain)


def stop_at(last, counted):
    if next(counted) == last:
        raise Crash
