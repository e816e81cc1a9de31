"""Converters for VAEs: VQGANs of taming-transformers, DALLE-pytorch's DiscreteVAE, OpenAI's dVAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dall3.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig, OpenAIDiscreteVAE, OpenAIDiscreteVAEConfig
from dall3.models.vqgan import GumbelVQ, VQGANConfig, VQModel
from dall3.weights.archive import CheckpointError, file_error, read_archive
from dall3.weights.convert.rudalle import without_dwt_names
from dall3.weights.convert.state import (
    DETOKER,
    DVAE,
    OPENAI_DVAE,
    VQGAN,
    FoundState,
    Settings,
    State,
    checked,
    choose_network,
    count,
    deepspeed_file,
    find_networks,
    load_tensors,
    read_settings,
    read_state,
    values_of,
    without_weights,
)
from dall3.weights.registry import PathLike, read_settings_text

MAX_YAML = 1 << 16  # upper bound on the characters of a model.yaml; taming's have about 1,500


@checked
def load_vqgan(checkpoint: PathLike, config: PathLike | None = None, unit_range: bool = False) -> VQModel:
    """Load a VQGAN of taming-transformers as a GumbelVQ or VQModel, in float32 on the CPU.

    checkpoint: a checkpoint of taming-transformers, a DALLE-pytorch checkpoint that contains a VQGAN, DALL·E Mini's
    `detoker.pt`, or ruDALL-E's VQGAN with or without the Haar transform. The architecture is inferred from the tensors.
    config: taming's YAML file, optional; it is compared with the tensors. unit_range: the network works on pixels in
    [0, 1], as taming's f16 checkpoint for DALL·E Mini; always True for `detoker.pt`.

    Raises CheckpointError for a file of another kind, and for a config that contradicts the tensors.

    >>> vqgan = load_vqgan("vqgan.gumbelf8.ckpt", "vqgan.gumbelf8.yaml")  # doctest: +SKIP
    >>> images = vqgan.decode(tokens)  # doctest: +SKIP
    """
    return vqgan_of(read_state(checkpoint, VQGAN, DETOKER), checkpoint, config, unit_range)


def vqgan_of(network: FoundState, checkpoint: PathLike, config: PathLike | None, unit_range: bool = False) -> VQModel:
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    tensors, decodes_only = without_dwt_names(network.tensors), network.kind == DETOKER
    if decodes_only and "embedding.weight" in tensors:  # min-dalle's name
        tensors = tensors | {"quantize.embedding.weight": tensors["embedding.weight"]}
    state = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    gumbel = "quantize.proj.weight" in state
    n_embed, embed_dim = state[f"quantize.{'embed' if gumbel else 'embedding'}.weight"].shape
    levels = count(state, r"decoder\.up\.(\d+)\.")
    widths = [len(state[f"decoder.up.{i}.block.0.conv1.weight"]) for i in range(levels)]
    ch = widths[0] if decodes_only else len(state["encoder.conv_in.weight"])
    outputs = len(state["decoder.conv_out.weight"])
    found = VQGANConfig(
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=count(state, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        attn_levels=tuple(i for i in range(levels) if f"decoder.up.{i}.attn.0.q.weight" in state),
        z_channels=state["decoder.conv_in.weight"].shape[1],
        embed_dim=embed_dim,
        n_embed=n_embed,
        has_encoder=not decodes_only,
        unit_range=unit_range or decodes_only,
        dwt=outputs == 12,
    )
    if config is not None:
        check_vqgan_config(found, config, checkpoint)
    with without_weights():
        model = GumbelVQ(found) if gumbel else VQModel(found)
    return load_tensors(model, state, checkpoint)


def read_taming_config(path: PathLike) -> dict[str, Any]:
    """Read the `params` of taming's model.yaml; numbers stay text. Raises CheckpointError for another file."""
    import yaml

    # BaseLoader keeps scalars as text: parsing YAML 1.1's base-60 numbers can take minutes, and integer keys can have
    # colliding hashes.
    class Loader(yaml.BaseLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of aliases can expand to an exponentially large tree
                raise yaml.YAMLError("it has aliases")
            return super().compose_node(parent, index)

    try:
        text = read_settings_text(path)
        if len(text) > MAX_YAML:
            raise ValueError(f"it has {len(text):,} characters; expected at most {MAX_YAML:,}")
        params = yaml.load(text, Loader)["model"]["params"]
        if isinstance(params, dict):
            return params
        problem: object = "its params are not a mapping"
    except (KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise file_error(path, f"not a taming-transformers model.yaml ({problem})")


def check_vqgan_config(found: VQGANConfig, config: PathLike, checkpoint: PathLike) -> None:
    """Raise CheckpointError if taming's YAML file contradicts the tensors of the checkpoint."""
    params = read_taming_config(config)
    try:
        values: dict[str, Any] = {name: int(params[name]) for name in ("embed_dim", "n_embed")}
        values |= {name: int(params["ddconfig"][name]) for name in ("ch", "z_channels")}
        values["ch_mult"] = tuple(int(factor) for factor in params["ddconfig"]["ch_mult"])
    except (KeyError, TypeError, ValueError) as error:
        raise file_error(config, f"not a taming-transformers model.yaml ({type(error).__name__}: {error})") from None
    for name, value in values.items():
        if value != getattr(found, name):
            raise CheckpointError(f"{config} says {name}={value}, but {checkpoint} has {getattr(found, name)}")


@checked
def load_discrete_vae(path: PathLike, hparams: Settings | None = None) -> DiscreteVAE:
    """Load DALLE-pytorch's DiscreteVAE in float32 on the CPU.

    path: its checkpoint, or a DALLE-pytorch checkpoint that contains one. hparams: the hyper-parameters of the
    training, a dictionary or a JSON file, if the file has none or to override them: the tensors do not determine
    `image_size` and `normalization`.

    Raises CheckpointError for a file of another kind, for hparams that contradict the tensors, and if `hparams` are
    needed.

    >>> vae = load_discrete_vae("vae.pt")  # doctest: +SKIP
    >>> images = vae.decode(tokens)  # doctest: +SKIP
    """
    return discrete_vae_of(read_state(path, DVAE), path, hparams)


def discrete_vae_of(network: FoundState, path: PathLike, given: Settings | None) -> DiscreteVAE:
    state, context = dict(network.tensors), network.context
    # In a checkpoint with a transformer, 'hparams' belong to the transformer.
    hparams = values_of(context["vae_params"] if "vae_params" in context else context.get("hparams"))
    hparams |= read_settings(given, "DALLE-pytorch's hyper-parameters")
    if not hparams:
        raise file_error(
            path,
            "a DiscreteVAE without 'hparams', which the tensors do not determine; pass hparams, a dictionary or a JSON "
            "file with image_size and normalization",
        )
    state["codebook_embedding.weight"] = state.pop("codebook.weight")
    num_tokens, codebook_dim = state["codebook_embedding.weight"].shape
    hidden_dim, channels = state["encoder.0.0.weight"].shape[:2]
    normalization = hparams.get("normalization", ((0.5,) * 3, (0.5,) * 3))
    if normalization is not None:
        mean, std = (tuple(float(number) for number in part) for part in normalization)
    config = DiscreteVAEConfig(
        image_size=int(hparams.get("image_size", 256)),
        num_tokens=num_tokens,
        codebook_dim=codebook_dim,
        num_layers=count(state, r"encoder\.(\d+)\.0\.weight"),
        num_resnet_blocks=count(state, r"encoder\.(\d+)\.net\."),
        hidden_dim=hidden_dim,
        channels=channels,
        normalization=None if normalization is None else (mean, std),
    )
    for name in ("num_layers", "num_resnet_blocks"):
        if hparams.get(name, getattr(config, name)) != getattr(config, name):
            raise file_error(path, f"its hparams say {name}={hparams[name]}, its tensors {getattr(config, name)}")
    with without_weights():
        model = DiscreteVAE(config)
    return load_tensors(model, state, path)


@checked
def load_openai_dvae(encoder: PathLike, decoder: PathLike) -> OpenAIDiscreteVAE:
    """Load OpenAI's dVAE from its two files, encoder.pkl and decoder.pkl, in float32 on the CPU.

    The pickled modules are read without executing code. Raises CheckpointError for files of another kind.
    """
    halves = {"encoder": read_state(encoder, OPENAI_DVAE).tensors, "decoder": read_state(decoder, OPENAI_DVAE).tensors}
    return openai_dvae_of(halves, f"{encoder}, {decoder}")


def openai_dvae_of(halves: dict[str, State], path: object) -> OpenAIDiscreteVAE:
    config = OpenAIDiscreteVAEConfig(
        n_hid=len(halves["encoder"]["blocks.input.w"]),
        n_init=len(halves["decoder"]["blocks.input.w"]),
        n_blk_per_group=count(halves["encoder"], r"blocks\.group_1\.block_(\d+)\."),
        vocab_size=len(halves["encoder"]["blocks.output.conv.w"]),
        group_count=count(halves["encoder"], r"blocks\.group_(\d+)\."),
    )
    with without_weights():
        model = OpenAIDiscreteVAE(config)
    state: State = {}
    for half, tensors in halves.items():
        # Both sides list the same convolutions in the same order, weight before bias.
        names = [name for name in model.state_dict() if name.startswith(half)]
        state |= dict(zip(names, tensors.values(), strict=False))
    return load_tensors(model, state, path)


VAE = VQModel | DiscreteVAE | OpenAIDiscreteVAE


def load_vae(
    path: PathLike | tuple[PathLike, PathLike] | None, config: Settings | None = None, dalle: PathLike | None = None
) -> VAE | None:
    """Load a VAE of any kind: a VQGAN, a DiscreteVAE, or the pair (encoder.pkl, decoder.pkl) of OpenAI's dVAE.

    config: taming's YAML file for a VQGAN, or the hyper-parameters of a DiscreteVAE. dalle: a DALLE-pytorch checkpoint
    whose VAE is loaded if `path` is None. Returns None if neither has a VAE. Raises CheckpointError as `load_vqgan` and
    `load_discrete_vae` do.
    """
    if isinstance(path, tuple | list):
        return load_openai_dvae(*path)
    if path is not None:
        return load_one_vae(path, config)
    return None if dalle is None else load_vae_inside(dalle)


@checked
def load_one_vae(path: PathLike, config: Settings | None) -> VAE:
    network = read_state(path, VQGAN, DVAE, DETOKER)
    if network.kind == DVAE:
        return discrete_vae_of(network, path, config)
    if config is not None and not isinstance(config, PathLike):
        raise file_error(path, "is a VQGAN; expected the path of its YAML file as config")
    return vqgan_of(network, path, config)


@checked
def load_vae_inside(dalle: PathLike) -> VAE | None:
    """Load the VAE in a DALLE-pytorch checkpoint; None if it has none. Its kind is recognised from the tensors, because
    `vae_params` may be outdated.
    """
    path = deepspeed_file(Path(dalle))
    archive = read_archive(path)
    if networks := find_networks(archive, VQGAN):
        return vqgan_of(choose_network(networks, path), path, None)
    if networks := find_networks(archive, DVAE):
        return discrete_vae_of(choose_network(networks, path), path, None)
    halves = {
        network.place.rpartition("/")[2].rpartition(".")[2]: network.tensors
        for network in find_networks(archive, OPENAI_DVAE)
    }
    if halves.keys() == {"enc", "dec"}:
        return openai_dvae_of({"encoder": halves["enc"], "decoder": halves["dec"]}, path)
    return None
