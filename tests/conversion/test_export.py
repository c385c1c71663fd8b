"""Exports load with plain transformers and compute the same; they appear whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conversion.tiny_models import random_model, tiny_config
from conversion.with_transformers import assert_same_as_transformers, load_with_transformers
from safetensors.torch import load_file

from megarec.config.loader import load_config
from megarec.conversion import export_hf, import_hf
from megarec.conversion.target import target_for_export, target_for_import
from megarec.data.tokenizer import load_tokenizer
from megarec.errors import UserError
from megarec.models import Backbone


@pytest.fixture(scope="module")
def model() -> Backbone:
    return random_model(tiny_config())


XLSTM = "xLSTMForCausalLM"


def test_transformers_computes_the_same(model: Backbone, tmp_path: Path) -> None:
    export_hf(model, tmp_path / "out", load_tokenizer("byte"))
    theirs = assert_same_as_transformers(model, tmp_path / "out", XLSTM)
    assert theirs.dtype == torch.float32
    assert theirs.config.use_cache is theirs.generation_config.use_cache is True
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    assert ids.items() <= theirs.config.to_dict().items()
    assert ids.items() <= theirs.generation_config.to_dict().items()


@pytest.mark.parametrize("d_model", [96, 80])
def test_widths_that_the_cache_cannot_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, d_model: int
) -> None:
    model = random_model(tiny_config(d_model=d_model))
    export_hf(model, tmp_path / "out", load_tokenizer("byte"))
    assert len(caplog.messages) == 1 and "use_cache=false" in caplog.messages[0]
    theirs = assert_same_as_transformers(model, tmp_path / "out", XLSTM)
    assert theirs.config.use_cache is theirs.generation_config.use_cache is False
    assert "`use_cache` is off" in (tmp_path / "out/README.md").read_text()


def test_tied_embeddings_become_a_head(tmp_path: Path) -> None:
    model = random_model(tiny_config(head={"soft_cap": 30.0, "tie_embeddings": True}))
    export_hf(model, tmp_path / "out")
    assert_same_as_transformers(model, tmp_path / "out", XLSTM)
    config, tensors = import_hf(tmp_path / "out")
    assert not config.head.tie_embeddings
    assert torch.equal(tensors["head.weight"], model.embedding.weight)


@pytest.mark.parametrize("d_ff", [64, 97, 192, 1000])
def test_ffn_width_is_exact(tmp_path: Path, d_ff: int) -> None:
    block = {"mixer": {"type": "mlstm", "num_heads": 2}, "ffn": {"d_ff": d_ff}}
    export_hf(random_model(tiny_config(blocks={"mlstm": block})), tmp_path / "out")
    assert import_hf(tmp_path / "out")[0].blocks["mlstm"].ffn.d_ff == d_ff
    assert load_with_transformers(tmp_path / "out").backbone.blocks[0].ffn.up_proj_dim == d_ff


def test_the_released_size_exports(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = load_config("xlstm_7b.yaml").model
    tree = target_for_export(config).export_config(config)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.qk_head_dim, theirs.v_head_dim, theirs.num_blocks) == (256, 512, 32)
    assert theirs.use_cache
    assert target_for_import("xlstm", "").import_config(tree).num_params() == 6_865_424_896


def test_own_round_trip_is_bitwise(model: Backbone, tmp_path: Path) -> None:
    export_hf(model, tmp_path / "out")
    config, tensors = import_hf(tmp_path / "out")
    own = model.state_dict()
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    assert config == model.config


def test_foreign_round_trip_is_bitwise(golden: Path, tmp_path: Path) -> None:
    config, tensors = import_hf(golden)
    model = Backbone(config)
    model.load_state_dict(tensors)
    export_hf(model, tmp_path / "out")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (golden, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old = json.loads((golden / "config.json").read_text())
    new = json.loads((tmp_path / "out/config.json").read_text())
    tokens = {"bos_token_id", "pad_token_id", "transformers_version"}
    assert {key: value for key, value in old.items() if key not in tokens}.items() <= new.items()


def test_shards(model: Backbone, tmp_path: Path) -> None:
    export_hf(model, tmp_path / "out", max_shard_size="400KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "out/model.safetensors").exists()
    own, tensors = model.state_dict(), import_hf(tmp_path / "out")[1]
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    assert_same_as_transformers(model, tmp_path / "out", XLSTM)


@pytest.mark.parametrize("missing", ["tokens", "nothing"])
def test_readme_shows_how_to_load(
    model: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    tokenizer = None if missing == "tokens" else load_tokenizer("byte")
    export_hf(model, tmp_path / "tiny", tokenizer, license="apache-2.0")
    _, front, text = (tmp_path / "tiny/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megarec", "xlstm"],
    }
    assert "# tiny" in text and f"{model.config.num_params():,}" in text
    assert "document_reset: exact" in text
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "tiny")
    scope: dict[str, Any] = {}
    exec(code.replace("=100", "=4"), scope)
    assert type(scope["model"]).__name__ == XLSTM
    if tokenizer is not None:
        assert "Once upon a time" in capsys.readouterr().out


def test_everything_that_cannot_be_represented_is_named(tmp_path: Path) -> None:
    first = {"type": "mlstm", "num_heads": 2, "norm_eps": 1e-5}
    blocks = {"a": {"mixer": first}, "b": {"mixer": first, "ffn": {"d_ff": 64}}}
    config = tiny_config(blocks=blocks, pattern=["a", "b"], head={"soft_cap": None})
    with pytest.raises(UserError) as caught:
        export_hf(random_model(config), tmp_path / "out")
    for problem in (
        "blocks.a.mixer.norm_eps",
        "blocks.a.ffn",
        "blocks.b.mixer.norm_eps",
        "soft_cap",
    ):
        assert any(f"xlstm: {problem}" in line or problem in line for line in caught.value.lines)
    assert len(caught.value.lines) == 4
    assert not list(tmp_path.iterdir())


def test_layers_of_several_shapes_are_refused(tmp_path: Path) -> None:
    mixer = {"type": "mlstm", "num_heads": 2}
    blocks = {name: {"mixer": mixer, "ffn": {"d_ff": 64 * n}} for n, name in enumerate("ab", 1)}
    with pytest.raises(UserError, match="blocks a, b differ in"):
        export_hf(random_model(tiny_config(blocks=blocks, pattern=["a", "b"])), tmp_path / "out")


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="257 tokens, but the model has vocab_size=256"):
        model = random_model(tiny_config(vocab_size=256))
        export_hf(model, tmp_path / "out", load_tokenizer("byte"))


def test_overwrite_replaces_exports_only(model: Backbone, tmp_path: Path) -> None:
    export_hf(model, tmp_path / "out", load_tokenizer("byte"))
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        export_hf(model, tmp_path / "out")
    export_hf(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/tokenizer.json").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").touch()
    with pytest.raises(UserError, match="no export; it is not replaced"):
        export_hf(model, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis/chapter").exists()


def test_interrupted_export_leaves_nothing(
    model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    export_hf(model, tmp_path / "old")
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    monkeypatch.setattr("megarec.conversion.hf.write_model_card", interrupt)
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            export_hf(model, tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
