"""Turn attention layers of a transformer into Mamba-2 layers, as Apriel-H1 was grown.

The mixers are initialised from the attention they replace (MIL: arXiv 2511.02651; the Mamba-2 form
is that of arXiv 2408.15237): values become inputs, keys B, queries C. All else stays as it is.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from megarec.checkpoint.mismatch import mismatches
from megarec.config.model import BlockConfig, ModelConfig
from megarec.errors import UserError
from megarec.models.backbone import Backbone
from megarec.models.init import Initializer, assign_whole
from megarec.models.mixers.attention import AttentionConfig
from megarec.models.mixers.mamba2 import Mamba2Config

ATTENTION, MAMBA2 = "*", "M"
"""The letters of a layout, those of Nemotron-H's patterns."""


def parse_layout(layout: str, num_layers: int) -> list[int]:
    """Return the layers to replace, in ascending order.

    Args:
        layout: a letter a layer, `M` to replace it and `*` to keep it; or the numbers of the
            layers to replace, from 0, with commas between; or `none`.
        num_layers: of the model.

    Raises:
        UserError: another letter or number of letters, or a layer that is not there.
    """
    if layout == "none":
        return []
    if set(layout) <= {ATTENTION, MAMBA2}:
        if len(layout) != num_layers:
            raise UserError(f"--layout {layout}: {len(layout)} letters, but {num_layers} layers")
        return [layer for layer, letter in enumerate(layout) if letter == MAMBA2]
    numbers = layout.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise UserError(
            f"--layout {layout}: expected a letter a layer ({MAMBA2} replaces it, {ATTENTION} "
            "keeps it), layer numbers with commas between, or none"
        )
    layers = sorted({int(number) for number in numbers})
    if layers[-1] >= num_layers:
        raise UserError(f"--layout {layout}: no layer {layers[-1]}; they are 0 to {num_layers - 1}")
    return layers


def hybridize(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    layers: Collection[int],
    *,
    seed: int = 0,
    from_attention: bool = True,
    previous: tuple[ModelConfig, Mapping[str, Tensor]] | None = None,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Replace the attention of some layers by Mamba-2; with no layer, nothing changes.

    A layer of H heads of width K becomes one of H heads of width K in H groups, with a state of
    K x K a head. Grouped keys and values are repeated for the heads that they serve.

    Args:
        config: model section of the transformer.
        tensors: its parameters, whole.
        layers: numbers of the layers to replace.
        seed: of what attention has no counterpart of (gate, step sizes, decay, convolution).
        from_attention: False leaves the new mixers at their random initialisation.
        previous: an earlier hybrid of the same transformer, with fewer layers replaced: what it
            has trained is taken over, so that only newly replaced layers start from attention.

    Returns:
        The model section, with a pattern that lists every layer, and the parameters.

    Raises:
        UserError: a layer without attention, or a previous hybrid that is not of this transformer.
    """
    hybrid_config = _replace(config, layers)
    hybrid = {name: tensor for name, tensor in tensors.items() if not _is_replaced(name, layers)}
    hybrid |= _fresh_mixers(hybrid_config, layers, seed)
    if from_attention:
        for layer in layers:
            attention = config.layers[layer].mixer
            assert isinstance(attention, AttentionConfig)
            hybrid |= _mil(f"blocks.{layer}.mixer.", attention, tensors)
    if previous is not None:
        hybrid |= _trained(hybrid_config, hybrid, previous)
    return hybrid_config, hybrid


def _replace(config: ModelConfig, layers: Collection[int]) -> ModelConfig:
    """Return the config with Mamba-2 in some layers, each kind of block under a name of its own."""
    if not layers:
        return config
    names = [config.pattern[i % len(config.pattern)] for i in range(config.num_layers)]
    wrong = [
        layer for layer in layers if not isinstance(config.layers[layer].mixer, AttentionConfig)
    ]
    if wrong:
        raise UserError(
            *(f"--layout: layer {i} ({names[i]}) has no attention to replace" for i in wrong)
        )
    blocks: dict[str, Any] = dict(config.blocks)
    for layer in layers:
        name, block = names[layer], config.layers[layer]
        names[layer] = f"{name}_mamba2"
        blocks[names[layer]] = block.model_copy(update={"mixer": _mamba2_like(block, config)})
    tree = config.model_dump(mode="json")
    tree["blocks"] = {name: blocks[name].model_dump(mode="json") for name in dict.fromkeys(names)}
    tree["pattern"] = names
    return ModelConfig.model_validate(tree)


def _mamba2_like(block: BlockConfig, config: ModelConfig) -> Mamba2Config:
    attention = block.mixer
    assert isinstance(attention, AttentionConfig)
    head_dim = attention.head_width(config.d_model)
    return Mamba2Config(
        num_heads=attention.num_heads,
        head_dim=head_dim,
        state_dim=head_dim,
        num_groups=attention.num_heads,
        norm_eps=config.norm.eps,
    )


def _is_replaced(name: str, layers: Collection[int]) -> bool:
    return any(name.startswith(f"blocks.{layer}.mixer.") for layer in layers)


@torch.no_grad()
def _fresh_mixers(config: ModelConfig, layers: Collection[int], seed: int) -> dict[str, Tensor]:
    """Return the initial parameters of the mixers of some layers; only they take memory."""
    with torch.device("meta"):
        model = Backbone(config)
    mixers = [block.mixer for name, block in model.layers() if int(name) in layers]
    for mixer in mixers:
        assert mixer is not None
        mixer.to_empty(device="cpu")
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    init = Initializer(config, names, seed, assign_whole)
    for mixer in mixers:
        assert mixer is not None
        mixer.init_weights(init)
    return {name: p.detach() for p, name in names.items() if _is_replaced(name, layers)}


def _mil(
    prefix: str, attention: AttentionConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the projections of a Mamba-2 mixer that do what those of its attention did."""
    repeats = attention.num_heads // attention.kv_heads()

    def per_head(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (attention.kv_heads(), -1))
        return heads.repeat_interleave(repeats, 0).flatten(0, 1)

    return {
        f"{prefix}x.weight": per_head(tensors[f"{prefix}v.weight"]),
        f"{prefix}B.weight": per_head(tensors[f"{prefix}k.weight"]),
        f"{prefix}C.weight": tensors[f"{prefix}q.weight"].clone(),
        f"{prefix}out_proj.weight": tensors[f"{prefix}out_proj.weight"].clone(),
    }


def _trained(
    config: ModelConfig,
    hybrid: Mapping[str, Tensor],
    previous: tuple[ModelConfig, Mapping[str, Tensor]],
) -> Mapping[str, Tensor]:
    """Return what an earlier hybrid has for this one: all but the mixers replaced since."""
    old_config, old = previous
    if len(old_config.layers) != len(config.layers):
        raise UserError(f"--previous: {len(old_config.layers)} layers, here {len(config.layers)}")
    since = []
    for layer, (block, old_block) in enumerate(zip(config.layers, old_config.layers, strict=True)):
        if block.mixer == old_block.mixer:
            continue
        if isinstance(old_block.mixer, Mamba2Config):
            raise UserError(f"--previous: layer {layer} is Mamba-2 there; replace it here too")
        since.append(layer)
    kept = {name: tensor for name, tensor in old.items() if not _is_replaced(name, since)}
    problems = mismatches(
        "--previous",
        {name: tensor.shape for name, tensor in kept.items()},
        {name: t.shape for name, t in hybrid.items() if not _is_replaced(name, since)},
    )
    if problems:
        raise UserError(*problems)
    return kept
