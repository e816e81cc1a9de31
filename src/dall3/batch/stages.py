"""The three stages of a run: draw tokens, rank the candidates, refine and encode the best.

A row holds a prompt and its results so far, as plain values and bytes. Between drawing and ranking a candidate is its
tokens, 2 bytes each. After ranking only the best candidates remain, with their scores. Decoded images never leave a
stage.
"""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dall3.batch.job import Job, load_pipeline
from dall3.batch.prompts import Prompt
from dall3.errors import require
from dall3.generate import choose_best
from dall3.images import to_pil
from dall3.output import Dall3Output, png_bytes
from dall3.pipeline import Dall3Pipeline
from dall3.text.rules import MAX_CHARACTERS
from dall3.weights.registry import PARTS

Row = dict[str, Any]
ATTEMPTS = 4  # per stage, before a prompt is recorded as failed


def first_row(prompt: Prompt) -> Row:
    """The row of a prompt before the first stage. error: why it failed; retry: whether to try it again later."""
    return {"number": prompt.number, "prompt": prompt.text, "seed": prompt.seed, "error": "", "retry": False}


class Stage(ABC):
    """One stage, held by an actor. Called with a row, it returns the row for the next stage.

    pipe: an existing pipeline to share; None to load one with the parts of this stage only. Raises ValueError if the
    loaded weights differ from the run's.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    adds: ClassVar[tuple[str, ...]]  # columns that the stage adds to those of `first_row`

    def __init__(self, job: Job, pipe: Dall3Pipeline | None = None) -> None:
        self.job = job
        if pipe is None:
            torch.set_num_threads(job.threads)
            pipe = load_pipeline(job.weights, job.dtype, job.refine)
            for name in PARTS:
                if name not in self.parts:
                    setattr(pipe, name, None)
            pipe.clip  # noqa: B018  load it, so that it is among the fingerprints
            here, expected = pipe.fingerprints(), job.recipe["weights"]
            other = [name for name in here if here[name] != expected.get(name)]
            require(
                not other,
                f"the weights ({job.weights or 'bundled'}) on this machine differ from the run's in {', '.join(other)}",
            )
            pipe.to(job.devices[self.name])
        self.pipe = pipe

    def __call__(self, row: Row) -> Row:
        for _ in range(0 if row["error"] else ATTEMPTS):
            try:
                row = row | {"error": "", "retry": False} | self.work(row)
                break
            except Exception as error:  # of any type: the run continues with the other prompts
                row = row | {"error": f"{type(error).__name__}: {error}", "retry": True}
        kept = {name: row[name] for name in ("number", "prompt", "seed", "error", "retry")}
        return kept | {name: b"" if row["error"] else row[name] for name in self.adds}

    @abstractmethod
    def work(self, row: Row) -> Row:
        """Returns the columns to update. A column "error" is a permanent failure; an exception may be temporary."""

    def tokens(self, row: Row) -> np.ndarray:
        """The candidates' tokens, (n, image tokens)."""
        return np.frombuffer(row["tokens"], self.job.token_type).reshape(-1, self.job.tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.pipe.decode_tokens(tokens, self.job.rank_batch_size, self.job.denoising["seamless"])


class Draw(Stage):
    """Draws the candidates with the transformer."""

    name, parts, adds = "draw", ("transformer",), ("tokens",)

    def work(self, row: Row) -> Row:
        recipe = self.job.recipe
        assert self.pipe.text_encoder is not None
        if (length := len(row["prompt"])) > MAX_CHARACTERS:
            return {"error": f"ValueError: the prompt has {length:,} characters; expected at most {MAX_CHARACTERS:,}"}
        try:
            self.pipe.text_encoder(row["prompt"], recipe["truncate"])
        except ValueError as error:
            return {"error": f"ValueError: {error}"}
        how = {name: recipe[name] for name in ("batch_size", "truncate")} | self.job.sampling
        count, seed = recipe["num_candidates"], row["seed"]
        tokens = self.pipe.generate_tokens(row["prompt"], count, seed=seed, progress=False, **how)
        return {"tokens": tokens.cpu().numpy().astype(self.job.token_type).tobytes()}


class Rank(Stage):
    """Decodes and scores the candidates batch by batch, and keeps those with the highest CLIP scores."""

    name, parts, adds = "rank", ("vqgan", "clip"), ("tokens", "candidates", "scores")

    def work(self, row: Row) -> Row:
        given = torch.from_numpy(self.tokens(row).astype(np.int64)).to(self.pipe.device)
        how: dict[str, Any] = dict(batch_size=self.job.rank_batch_size, seamless=self.job.denoising["seamless"])
        best = choose_best(self.pipe, given, row["prompt"], self.job.recipe["num_images"], progress=False, **how)
        return {
            "tokens": best.tokens.cpu().numpy().astype(self.job.token_type).tobytes(),
            "candidates": best.candidates.cpu().numpy().astype(np.int32).tobytes(),
            "scores": b"" if best.scores is None else best.scores.float().cpu().numpy().tobytes(),
        }


class Refine(Stage):
    """Refines the best candidates, unless the run skips it, and packs the encoded files in a tar."""

    name, parts, adds = "refine", ("vqgan", "clip", "upsampler"), ("files",)

    def work(self, row: Row) -> Row:
        recipe, prompt, seed = self.job.recipe, row["prompt"], row["seed"]
        tokens = torch.from_numpy(self.tokens(row).astype(np.int64))
        fine = coarse = self.decode(tokens)
        if self.job.refine:
            how = dict(seed=seed, batch_size=recipe["refine_batch_size"], progress=False) | self.job.denoising
            fine = self.pipe.upsample(tokens, coarse, [(prompt, 1.0)], **how)
        coarse_images = to_pil(coarse)
        scores = torch.from_numpy(np.frombuffer(row["scores"], np.float32).copy()) if row["scores"] else None
        out = Dall3Output(
            prompt=prompt,
            images=to_pil(fine) if self.job.refine else coarse_images,
            coarse_images=coarse_images,
            tokens=tokens,
            clip_scores=scores,
            candidates=torch.from_numpy(np.frombuffer(row["candidates"], np.int32).astype(np.int64)),
            settings=recipe | {"seed": seed},
        )
        return {"files": pack(out, row["number"])}


STAGES: tuple[type[Stage], ...] = (Draw, Rank, Refine)


def pack(out: Dall3Output, number: int) -> bytes:
    """A tar of a prompt's images in webdataset's form: files of one image share a name before the first dot."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, coarse in enumerate(to_pil(out.coarse_images)):
            files = {"png": png_bytes(out.labelled(i)), "txt": out.prompt.encode()}
            if out.images is not out.coarse_images:
                files["coarse.png"] = png_bytes(coarse)
            files["json"] = json.dumps({"number": number, **out.recipe(i)}).encode()
            for kind, data in files.items():
                member = tarfile.TarInfo(f"{number:08}-{i:03}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
