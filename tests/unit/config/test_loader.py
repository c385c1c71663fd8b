"""The YAML loader: overrides, safe parsing, and errors that name file, key and value."""

from pathlib import Path

import pytest

from megarec.config.loader import CONFIG_FOLDER, apply_override, load_config, read_yaml
from megarec.config.mixer import MixerConfig
from megarec.errors import UserError

RECIPES = sorted(CONFIG_FOLDER.rglob("*.yaml"))


def lines_of(*overrides: str, name: str = "xlstm_7b.yaml") -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(name, list(overrides))
    return list(caught.value.lines)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert load_config(str(path)).name


def test_overrides_are_typed_yaml() -> None:
    config = load_config(
        "xlstm_7b.yaml", ["optimizer.lr=3e-4", "model.vocab_size=50432", "hooks=[plot]"]
    )
    assert config.optimizer.lr == 3e-4
    assert config.model.vocab_size == 50432
    assert config.hooks == ("plot",)


def test_all_errors_at_once_each_with_key_value_and_hint() -> None:
    lines = lines_of(
        "optimizer.lrr=3", "model.d_model=true", "modle=1", "train.seq_len=a", "train.steps=0"
    )
    assert len(lines) == 5
    assert all(line.count("\n") == 0 and "xlstm_7b.yaml: " in line for line in lines)
    text = "\n".join(lines)
    assert "optimizer.lrr=3: unknown key; did you mean 'lr'?" in text
    assert "model.d_model=True: " in text
    assert "modle=1: unknown key; did you mean 'model'?" in text
    assert "train.seq_len='a': " in text
    assert "train.steps=0: " in text


def test_mixer_errors_keep_their_path() -> None:
    (line,) = lines_of("model.blocks.mlstm.mixer.num_headz=3")
    assert "model.blocks.mlstm.mixer.num_headz=3: unknown key; did you mean 'num_heads'?" in line
    (line,) = lines_of("model.blocks.mlstm.mixer.type=mlstn")
    assert "unknown mixer type 'mlstn'; expected one of: " in line and "mlstm" in line


def test_what_does_not_fit_together() -> None:
    lines = lines_of("model.blocks.mlstm.mixer.num_heads=7", "model.pattern=[mamba]")
    assert any("no block is called 'mamba'; blocks: mlstm" in line for line in lines)
    assert any("num_heads=7" in line and "does not divide" in line for line in lines)
    (line,) = lines_of("schedule.cooldown_steps=600000")
    assert "exceeds train.steps" in line
    (line,) = lines_of("data.train.dclm.weight=0.5")
    assert "sum to 0.5, expected 1" in line


def test_unknown_recipe_names_near_ones() -> None:
    (line,) = lines_of(name="xlstm7b.yaml")
    assert "no such file" in line and "xlstm_7b.yaml" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "line 2: key 'a' is given twice"),
        ("a:\n\t- 1\n", "cannot start any token"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("- 1\n", "expected a mapping"),
    ],
)
def test_bad_yaml_is_one_line_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad recipe \u00fc.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    (line,) = caught.value.lines
    assert str(path) in line and expected in line and "\n" not in line


def test_bad_overrides() -> None:
    for override in ("lr", "=3", "a.b.c=1"):
        with pytest.raises(UserError):
            apply_override({"a": {"b": 1}}, override)


def test_imports_register_mixers_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_mixer.py").write_text(
        "from typing import Literal\n"
        "from megarec.models.mixers.para_rnn import ParaGRUConfig\n"
        "class MyConfig(ParaGRUConfig):\n"
        "    type: Literal['mine'] = 'mine'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    block = "model.blocks.mlstm={mixer: {type: mine, num_heads: 8}}"
    try:
        config = load_config("xlstm_7b.yaml", ["imports=[my_mixer]", block])
        assert config.model.mixers[0].type == "mine"
    finally:
        MixerConfig.members.pop("mine", None)
    with pytest.raises(UserError, match="imports: cannot import my_mixr: No module named"):
        load_config("xlstm_7b.yaml", ["imports=[my_mixr]", block])
