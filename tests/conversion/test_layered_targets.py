"""Hybrids, Mamba-2 and transformers: exports load with transformers, and its models load here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.tiny_models import (
    ATTENTION,
    EPS,
    LAYERED,
    MAMBA2,
    SWIGLU,
    change_mixers,
    layered_config,
    random_model,
    randomize,
)
from conversion.with_transformers import (
    assert_same_as_transformers,
    cached_logits,
    load_with_transformers,
    some_ids,
)
from safetensors.torch import load_file

from megarec.config.model import ModelConfig
from megarec.conversion import export_hf, import_hf, load_model

ARCHITECTURES = {
    "nemotron_h": "NemotronHForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
TIED = {"tie_embeddings": True}
GELU = {
    "m": {"mixer": MAMBA2 | {"num_groups": 1, "conv_kernel": 3}},
    "a": {"mixer": ATTENTION | {"rope": None}},
    "f": {"ffn": {"type": "gelu", "d_ff": 40}},
}
CASES = {name: layered_config(name) for name in LAYERED} | {
    "granitemoehybrid, rope, tied": layered_config(
        "granitemoehybrid",
        blocks={
            "m": {"mixer": MAMBA2 | {"num_heads": 16, "num_groups": 4}, "ffn": SWIGLU},
            "a": {"mixer": ATTENTION, "ffn": SWIGLU},
        },
        head=TIED,
    ),
    "granitemoehybrid, attention only": layered_config(
        "llama", blocks={"a": {"mixer": ATTENTION | {"rope": None}, "ffn": SWIGLU}}
    ),
    "nemotron_h, one group, gelu, tied": layered_config("nemotron_h", blocks=GELU, head=TIED),
    "nemotron_h, no mamba": layered_config(
        "nemotron_h", blocks={"a": {"mixer": ATTENTION | {"rope": None}}}, pattern="a"
    ),
    "mamba2, tied, 8 groups": layered_config(
        "mamba2", blocks={"m": {"mixer": MAMBA2 | {"num_groups": 8}}}, head=TIED
    ),
    "llama, tied": layered_config("llama", head=TIED),
    "mistral, no window": change_mixers("llama", num_heads=3, num_kv_heads=1, head_dim=10),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(tmp_path: Path, case: str) -> None:
    model = random_model(CASES[case])
    export_hf(model, tmp_path / "out")
    architecture = ARCHITECTURES[case.partition(",")[0]]
    theirs = assert_same_as_transformers(model, tmp_path / "out", architecture)
    assert theirs.config.use_cache is theirs.generation_config.use_cache is True
    # Steps smaller than transformers' default lower bound: its cache must not see others.
    ids = some_ids()
    cached = cached_logits(theirs, ids, 9)
    torch.testing.assert_close(cached, model(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_own_round_trip_is_bitwise(tmp_path: Path, case: str) -> None:
    model = random_model(CASES[case])
    export_hf(model, tmp_path / "out")
    config, tensors = import_hf(tmp_path / "out")
    own = model.state_dict()
    if "head.weight" not in own and config.head != model.config.head:
        own["head.weight"] = own["embedding.weight"]
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    again, _ = load_model(tmp_path / "out")
    export_hf(again, tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "again" / name).read_text()


@pytest.mark.parametrize("name", ["nemotron_h", "granitemoehybrid"])
def test_hybrids_without_attention_are_written_without_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = random_model(layered_config(name, pattern="mm" if name != "nemotron_h" else "mf"))
    export_hf(model, tmp_path / "out")
    assert "needs a layer of attention" in caplog.text
    theirs = assert_same_as_transformers(model, tmp_path / "out", ARCHITECTURES[name])
    assert theirs.config.use_cache is theirs.generation_config.use_cache is False
    assert "`use_cache` is off" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid"])
@pytest.mark.parametrize("limit", [(0.01, 0.2), (0.0, 0.2), (0.01, float("inf"))])
def test_limits_of_step_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, limit: tuple[float, float]
) -> None:
    blocks = dict(LAYERED[name]["blocks"])
    blocks["m"] = blocks["m"] | {"mixer": blocks["m"]["mixer"] | {"dt_limit": limit}}
    model = random_model(layered_config(name, blocks=blocks))
    unlimited = random_model(layered_config(name))
    ids = some_ids()
    assert (model(ids) - unlimited(ids)).abs().max() > 0.01
    export_hf(model, tmp_path / "out")
    assert "ignores time_step_limit" in caplog.text
    theirs = assert_same_as_transformers(model, tmp_path / "out", ARCHITECTURES[name])
    assert theirs.config.use_cache is False
    assert import_hf(tmp_path / "out")[0].layers[0].mixer.dt_limit == limit


def foreign_config(name: str, **changes: Any) -> Any:
    """A tiny config of transformers' own."""
    import transformers

    common = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    common |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    common |= {"rms_norm_eps": EPS}
    mamba = {"chunk_size": 8, "n_groups": 2, "layer_norm_epsilon": EPS}
    match name:
        case "nemotron_h":
            layers = ["linear_attention", "mlp", "full_attention", "linear_attention"]
            common |= mamba | {"mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 8}
            common |= {"layers_block_type": layers, "head_dim": 16, "time_step_min": 1e-12}
            kind = transformers.NemotronHConfig
        case "granitemoehybrid":
            common |= {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 2}
            common |= {"mamba_chunk_size": 8, "shared_intermediate_size": 24}
            common |= {"num_local_experts": 0, "num_hidden_layers": 3, "logits_scaling": 6.0}
            common |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
            common |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
            common |= {"attention_multiplier": 0.25, "position_embedding_type": "rope"}
            kind = transformers.GraniteMoeHybridConfig
        case "mamba2":
            common |= mamba | {"num_heads": 8, "head_dim": 8, "state_size": 8}
            kind = transformers.Mamba2Config
        case "llama":
            kind = transformers.LlamaConfig
        case "mistral":
            common |= {"sliding_window": 6, "head_dim": 12}
            kind = transformers.MistralConfig
    return kind(**common | changes)


def foreign_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return randomize(AutoModelForCausalLM.from_config(config))


FOREIGN = [
    *((name, {}) for name in ARCHITECTURES),
    *((name, {"tie_word_embeddings": True}) for name in ARCHITECTURES if name != "nemotron_h"),
    ("granitemoehybrid", {"position_embedding_type": None, "head_dim": 12}),
    ("granitemoehybrid", {"layer_types": ["full_attention"] * 3}),
    ("mamba2", {"use_conv_bias": False, "time_step_limit": (0.01, 0.5)}),
    ("mamba2", {"residual_in_fp32": False, "n_groups": 1}),
    ("nemotron_h", {"mlp_hidden_act": "gelu", "n_groups": 3}),
    ("mistral", {"sliding_window": None, "head_dim": None}),
]


@pytest.mark.parametrize(("name", "changes"), FOREIGN)
@torch.no_grad()
def test_foreign_round_trip(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    theirs = foreign_model(foreign_config(name, **changes))
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs")
    ids = some_ids(vocab_size=96)
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    export_hf(model, tmp_path / "ours", model_type=name)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # The config says the same, too: transformers computes bitwise what it computed.
    again = load_with_transformers(tmp_path / "ours")
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert again.config.tie_word_embeddings == theirs.config.tie_word_embeddings


def test_both_spellings_of_nemotron_h(tmp_path: Path) -> None:
    import json

    theirs = foreign_model(foreign_config("nemotron_h"))
    theirs.save_pretrained(tmp_path)
    expected: ModelConfig = import_hf(tmp_path)[0]
    hf = json.loads((tmp_path / "config.json").read_text())
    for layers in (
        {"layers_block_type": ["mamba", "mlp", "attention", "mamba"]},
        {"hybrid_override_pattern": "M-*M", "num_hidden_layers": 4},
        {"layers_block_type": hf["layers_block_type"], "hybrid_override_pattern": "M-*M"},
    ):
        kept = {key: value for key, value in hf.items() if key != "layers_block_type"}
        (tmp_path / "config.json").write_text(json.dumps(kept | layers))
        assert import_hf(tmp_path)[0] == expected
    assert expected.pattern == tuple("M-*M")
