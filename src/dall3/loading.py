"""Load and save the parts of a pipeline: pipeline folders, upstream's checkpoints, the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dall3.errors import require
from dall3.models.clip import PromptTokenizer
from dall3.models.interface import ImageTokenTransformer
from dall3.parts import Parts
from dall3.settings import check_defaults
from dall3.text import TextEncoder, Tokenizer, load_tokenizer, text_encoder_of, tokenizer_json
from dall3.weights.archive import CheckpointError, file_error
from dall3.weights.convert.clip import load_clip
from dall3.weights.convert.guided_diffusion import load_unet
from dall3.weights.convert.upscaler import INSTALL, load_super_resolution
from dall3.weights.convert.vae import load_vae
from dall3.weights.find import fetch_set, find_weights
from dall3.weights.folder import (
    BUNDLED,
    DEFAULTS,
    Origin,
    load_files,
    load_folder,
    load_transformer_for,
    read_defaults,
    read_origins,
    save_folder,
)
from dall3.weights.progress import loading_bar
from dall3.weights.registry import PARTS, PathLike, WeightsSet

if TYPE_CHECKING:
    from typing_extensions import Self


def encoder_for(transformer: ImageTokenTransformer[Any], tokenizer: Tokenizer) -> TextEncoder:
    """The text encoder for a transformer and its tokenizer."""
    config = transformer.config
    family = getattr(config, "text_family", "dalle-pytorch")
    return text_encoder_of(family, tokenizer, config.text_seq_len, config.num_text_tokens)


class Defaults(dict[str, Any]):
    """Default settings of weights. Every assignment is validated."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().update(check_defaults({**self, name: value}))

    def update(self, *others: Any, **more: Any) -> None:
        super().update(check_defaults({**self, **dict(*others, **more)}))

    def __ior__(self, other: Any) -> Self:  # type: ignore[misc,override]
        self.update(other)
        return self


def load_defaults(folder: PathLike) -> dict[str, Any]:
    """Read the default settings of a pipeline folder; empty if it has none.

    Raises CheckpointError for a file with settings other than those of `Sampling` and `Denoising`.
    """
    try:
        return check_defaults(read_defaults(folder))
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else file_error(Path(folder) / DEFAULTS, error) from None


class LoadedParts(Parts):
    """`Parts` with methods to load and save them, and with the default settings of the loaded weights."""

    @property
    def defaults(self) -> Defaults:
        """Default settings of `Sampling` and `Denoising` for the loaded weights. Arguments of a call take precedence.

        Assigning raises ValueError for an unknown setting or a value out of range.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained()
        >>> pipe.defaults["num_inference_steps"] = 10
        >>> pipe.defaults["topp"] = 0.9
        Traceback (most recent call last):
        ValueError: unknown setting topp; expected fields of Sampling and Denoising
        """
        return self._defaults

    @defaults.setter
    def defaults(self, settings: Mapping[str, Any]) -> None:
        self._defaults = Defaults(check_defaults(settings))

    @classmethod
    def from_pretrained(
        cls,
        name: PathLike | None = None,
        *,
        registry: PathLike | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> Self:
        """Load a pipeline by name.

        name: a set in weights.toml ("mini", "dall3", …), which is downloaded, verified and cached; a folder written by
        `save_pretrained`; or "owner/name" on the Hugging Face hub. Write a folder with the name of a set as "./dall3"
        (default: the bundled small weights).
        registry: path of an additional weights.toml.
        device, dtype: device and floating point type of the weights (default: float32; but on a CPU, transformers that
        DALL·E Mini, Mega and ruDALL-E publish in float16 stay memory-mapped in float16, and compute in float32).
        progress: show progress bars for downloads, and for loading weights of more than 200 MB.

        >>> from dall3 import Dall3Pipeline
        >>> pipe = Dall3Pipeline.from_pretrained()

        Raises CheckpointError (a ValueError) for a folder without parts or with damaged ones, ValueError for an unknown
        name, and FetchError (an OSError) if weights cannot be downloaded.
        """
        found = find_weights(BUNDLED if name is None else name, registry)
        if isinstance(found, WeightsSet):
            defaults = check_defaults(found.defaults)
            settings = {part.name: part.settings for part in found.parts}
            files = fetch_set(found, progress)
            with loading_bar((path for pair in files.values() for path in pair if path is not None), progress):
                parts = load_files(files, device, dtype, settings)
            origins = {part.name: Origin(part.licence, part.source) for part in found.parts}
            left_out = {*settings} - {*parts}
        else:
            with loading_bar(Path(found).glob("*/*.safetensors"), progress):
                parts, origins = load_folder(found, device, dtype or torch.float32), read_origins(found)
            defaults = load_defaults(found)
            left_out = {*origins} - {*parts}
        words = parts.pop("words", None)
        tokenizer, transformer = parts.pop("tokenizer", None), parts.get("transformer")
        if tokenizer is not None and transformer is not None:
            parts["text_encoder"] = encoder_for(transformer, tokenizer)
            parts["text_encoder"].known_words = words
        pipe = cls(**parts)
        pipe.origins, pipe.defaults = origins, defaults
        reason = "it could not be downloaded; load the weights again" if find_spec("spandrel") else INSTALL
        pipe.left_out = dict.fromkeys(left_out, reason)
        return pipe.to(device)

    def save_pretrained(self, folder: PathLike, dtype: torch.dtype | None = None) -> Path:
        """Save all parts to a folder that `from_pretrained` reads, and return its path.

        The folder holds config.json and model.safetensors for each part, tokenizer.json, words.txt (the words in the
        training captions, if recorded), generation_config.json (the `defaults`), and a model card, README.md.
        dtype: floating point type in the files; torch.float16 halves their size (default: unchanged).

        Raises FileExistsError, before it writes, if the folder is not empty.

        >>> from dall3 import Dall3Pipeline
        >>> folder = Dall3Pipeline.from_pretrained().save_pretrained("my-weights", torch.float16)
        >>> Dall3Pipeline.from_pretrained(folder).vqgan.num_tokens
        2048
        """
        parts = {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}
        require(bool(parts), "the pipeline has no parts to save")
        words = None if self.text_encoder is None else self.text_encoder.known_words
        return save_folder(parts, self.tokenizer, folder, dtype, self.origins, dict(self.defaults), words)

    def push_to_hub(
        self, repository: str, dtype: torch.dtype | None = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload the folder that `save_pretrained` writes to "owner/name" on the Hugging Face hub.

        The repository is created if needed. dtype: as in `save_pretrained`. private: create a private repository.
        token: access token with write permission (default: the one stored by `hf auth login`). Returns the address.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="dall3")
        with tempfile.TemporaryDirectory() as folder:
            written = self.save_pretrained(Path(folder) / "weights", dtype)
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=written, commit_message="Weights for dall3")
        return str(address)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the transformer and the CLIP, None without one.

        Raises ValueError if the two have different tokenizers.

        >>> from dall3 import Dall3Pipeline
        >>> Dall3Pipeline.from_pretrained().tokenizer.vocab_size
        3072
        """
        tokenize = self.clip.tokenize if self.clip is not None else None
        found = [self.text_encoder.tokenizer] if self.text_encoder is not None else []
        found += [tokenize.tokenizer] if isinstance(tokenize, PromptTokenizer) else []
        texts = {tokenizer_json(tokenizer) for tokenizer in found}
        require(len(texts) < 2, "the transformer and the clip have different tokenizers; a folder can hold only one")
        return found[0] if found else None

    @classmethod
    def from_checkpoints(
        cls,
        dalle: PathLike | tuple[PathLike, PathLike] | None = None,
        bpe: PathLike | tuple[PathLike, PathLike] | None = None,
        vqgan: PathLike | tuple[PathLike, PathLike] | None = None,
        vqgan_config: PathLike | None = None,
        diffusion: PathLike | None = None,
        diffusion_config: PathLike | dict[str, Any] | None = None,
        clip: PathLike | None = None,
        super_resolution: PathLike | None = None,
        super_resolution_config: PathLike | dict[str, Any] | None = None,
        dalle_config: PathLike | dict[str, Any] | None = None,
        clip_config: PathLike | dict[str, Any] | None = None,
    ) -> Self:
        """Load a pipeline from upstream's checkpoints, in float32 on the CPU. Parts that are not given are None.

        dalle: path of a checkpoint of DALLE-pytorch or ru-dalle, or of the folder of a DeepSpeed checkpoint; for DALL·E
        Mini and Mega the pair (encoder.pt, decoder.pt).
        dalle_config: its hyper-parameters, a dictionary or a JSON file, if the checkpoint has none.
        bpe: its tokenizer, as in `load_tokenizer`; for DALL·E Mini (vocab.json, merges.txt) (default: CLIP's).
        vqgan: a VQGAN of taming-transformers, DALL·E Mini's detoker.pt, a DiscreteVAE, or the pair (encoder.pkl,
        decoder.pkl) of OpenAI's dVAE (default: the VAE in `dalle`, if it has one).
        vqgan_config: taming's YAML file, or the hyper-parameters of a DiscreteVAE.
        diffusion, super_resolution: checkpoints of guided-diffusion; super_resolution is also an upscaler's file, as in
        `load_upscaler`.
        diffusion_config, super_resolution_config: guided-diffusion's flags, a dictionary or a JSON file, if they are
        not upstream's.
        clip: a file, or a name of open_clip such as "ViT-B-16/openai".
        clip_config: settings that the file's tensors do not determine, as in `load_clip`.

        Raises CheckpointError (a ValueError) for a file that is damaged, of another kind, or incompatible.
        """
        vae = load_vae(vqgan, vqgan_config, dalle if isinstance(dalle, str | Path) else None)
        transformer = None if dalle is None else load_transformer_for(vae, dalle, dalle_config)
        text_encoder = None if transformer is None else encoder_for(transformer, load_tokenizer(bpe))
        return cls(
            text_encoder=text_encoder,
            transformer=transformer,
            vqgan=vae,
            clip=None if clip is None else load_clip(clip, clip_config),
            upsampler=None if diffusion is None else load_unet(diffusion, diffusion_config),
            super_resolution=None
            if super_resolution is None
            else load_super_resolution(super_resolution, super_resolution_config),
        )
