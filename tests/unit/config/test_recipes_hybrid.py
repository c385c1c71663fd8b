"""The hybrid recipes: published sizes by hand, what a dry run says, and what they export to."""

import pytest
import yaml

from megarec.config.loader import load_config, validate_config
from megarec.config.schema import Config
from megarec.conversion.target import target_for_export
from megarec.errors import UserError
from megarec.models.mixers.attention import AttentionConfig
from megarec.models.mixers.mamba2 import Mamba2Config
from megarec.parallel.describe import describe


def dry_run(config: Config) -> dict[str, str]:
    """Return the lines of a dry run, by what stands before the colon; the recipe is checked too."""
    text, resolved = describe(config, 1).split("\n\n", 1)
    assert validate_config(yaml.safe_load(resolved), "dry run") == config
    return dict(line.split(": ", 1) for line in text.splitlines())


def mamba2_layer(d: int, heads: int, head_dim: int, state: int, groups: int) -> int:
    """Count in_proj, conv and its bias, A_log with D and dt_bias, gated norm, out_proj."""
    inner, streams = heads * head_dim, heads * head_dim + 2 * groups * state
    return d * (inner + streams + heads) + 5 * streams + 3 * heads + inner + inner * d


def test_nemotron_h_8b() -> None:
    config = load_config("nemotron_h_8b.yaml")
    d = 4096
    mamba = mamba2_layer(d, 128, 64, 128, 8)
    assert mamba == 109_635_968
    ffn = 2 * d * 21504
    attention = d * 128 * (32 + 8 + 8) + 32 * 128 * d
    by_hand = 24 * mamba + 24 * ffn + 4 * attention + (52 + 1) * d + 2 * 131072 * d
    lines = dry_run(config)
    assert lines["parameters"] == f"{by_hand:,}" == "8,100,852,736"
    assert by_hand == pytest.approx(8.1e9, rel=5e-3)  # published as 8B
    # In float32: memories and convolution tails, and the keys and values of 8,192 tokens.
    recurrent = 24 * (128 * 64 * 128 + 3 * (8192 + 2 * 8 * 128)) * 4
    cached = 4 * 2 * 8 * 128 * 8192 * 4
    assert lines["decoding state"] == (
        f"{(recurrent + cached + 32) / 2**20:.2f} MiB a sequence of 8,192 tokens, "
        f"{(recurrent + 32) / 2**20:.2f} MiB at its start (float32)"
    )
    assert lines["processes"] == "128 (dp_replicate 16 x dp_shard 8)"
    assert int(lines["tokens"].replace(",", "")) == pytest.approx(15e12, rel=1e-4)
    # Six FLOPs a parameter and token, without the embedding, plus attention and state updates.
    flops = float(lines["FLOPs per token"].split()[0]) * 1e9
    assert 1.0 < flops / (6 * (by_hand - 131072 * d)) < 1.07

    kinds = [type(block.mixer) for block in config.model.layers]
    assert (kinds.count(Mamba2Config), kinds.count(AttentionConfig)) == (24, 4)
    assert [i for i, kind in enumerate(kinds) if kind is AttentionConfig] == [7, 18, 29, 40]
    # A layer is a mixer or an FFN, never both.
    assert all((b.mixer is None) != (b.ffn is None) for b in config.model.layers)


def test_mamba2_2_7b() -> None:
    config = load_config("mamba2_2.7b.yaml")
    layer = mamba2_layer(2560, 80, 64, 128, 1)
    assert layer == 40_214_000
    by_hand = 64 * (layer + 2560) + 2560 + 50288 * 2560  # tied: the embedding counts once
    lines = dry_run(config)
    assert lines["parameters"] == f"{by_hand:,}" == "2,702,599,680"
    assert by_hand == pytest.approx(2.7e9, rel=2e-3)
    state = 64 * (80 * 64 * 128 + 3 * (80 * 64 + 2 * 128)) * 4
    assert lines["decoding state"] == f"{state / 2**20:.2f} MiB a sequence (float32)"
    assert int(lines["tokens"].replace(",", "")) == pytest.approx(300e9, rel=1e-4)
    assert config.model.max_seq_len is None


def test_apriel_h1_15b() -> None:
    config = load_config("apriel_h1_15b.yaml")
    d = 5120
    attention = d * 128 * (32 + 8 + 8) + 32 * 128 * d
    mamba = mamba2_layer(d, 32, 128, 128, 32)
    rest = 50 * (3 * d * 14336 + 2 * d) + d + 2 * 131072 * d
    lines = dry_run(config)
    assert lines["parameters"] == f"{20 * attention + 30 * mamba + rest:,}" == "16,553,930,560"
    teacher = load_config("apriel_h1_15b.yaml", ["model.pattern=[attention]"]).model
    assert teacher.num_params() == 50 * attention + rest == 14_974_182_400
    assert teacher.num_params() == pytest.approx(15e9, rel=2e-3)  # published as 15B

    # The inner width is that of the teacher's attention; every head has its own B and C.
    mixer = config.model.blocks["attention_mamba2"].mixer
    assert isinstance(mixer, Mamba2Config)
    assert mixer.stream_widths() == {"x": 4096, "B": 4096, "C": 4096}
    replaced = [47, 39, 24, 36, 31, 43, 32, 20, 38, 37, 30, 33, 22, 23, 40]
    replaced += [42, 44, 35, 41, 27, 21, 46, 45, 49, 25, 34, 29, 28, 19, 26]
    names = ["attention_mamba2" if i in replaced else "attention" for i in range(50)]
    assert list(config.model.pattern) == names and len(replaced) == 30
    assert config.model.max_seq_len == 65536
    assert int(lines["tokens"].replace(",", "")) == pytest.approx(76.8e9, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "model_type"),
    [
        ("nemotron_h_8b", "nemotron_h"),
        ("tiny/hybrid", "nemotron_h"),
        ("mamba2_2.7b", "mamba2"),
        ("tiny/mamba2", "mamba2"),
    ],
)
def test_which_class_of_transformers_holds_them(recipe: str, model_type: str) -> None:
    model = load_config(f"{recipe}.yaml").model
    assert target_for_export(model).model_type == model_type


def test_apriel_h1_has_no_class_in_transformers() -> None:
    with pytest.raises(UserError) as caught:
        target_for_export(load_config("apriel_h1_15b.yaml").model)
    assert any("x head_dim=128" in line and "5120" in line for line in caught.value.lines)


@pytest.mark.parametrize("recipe", ["tiny/hybrid", "tiny/mamba2"])
def test_tiny_recipes_are_tiny(recipe: str) -> None:
    lines = dry_run(load_config(f"{recipe}.yaml"))
    assert int(lines["parameters"].replace(",", "")) < 200_000
    assert lines["processes"] == "1 (dp_replicate 1 x dp_shard 1)"
