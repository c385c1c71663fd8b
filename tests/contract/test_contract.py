"""Every mixer, stack and pattern passes every check of megarec.testing.contract.

Cases are data: cases/mixers/<type>.yaml (name -> d_model and mixer, whose type is the file's name)
and cases/models/*.yaml (model sections). retention.py and minimal_gated_unit.py stand for mixers
of another package.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from megarec.config.mixer import MixerConfig
from megarec.config.model import FFNConfig, ModelConfig, StackConfig
from megarec.config.stack import LoopedConfig, UpdateConfig
from megarec.testing.contract import CHECKS, Case, small_model

CASES = Path(__file__).parent / "cases"


def read_trees() -> dict[str, dict[str, Any]]:
    """Return every case as it stands in its file; nothing is validated before a test runs."""
    trees = {}
    for path in sorted(CASES.glob("mixers/*.yaml")):
        for name, tree in yaml.safe_load(path.read_text()).items():
            mixer = {"type": path.stem} | tree.pop("mixer")
            trees[f"{path.stem}-{name}"] = tree | {"mixer": mixer}
    for path in sorted(CASES.glob("models/*.yaml")):
        trees[f"model-{path.stem}"] = {"model": yaml.safe_load(path.read_text())}
    return trees


TREES = read_trees()


def build_case(tree: dict[str, Any]) -> Case:
    tolerance = tree.get("tolerance", 0.0)
    if "model" in tree:
        return Case(ModelConfig.model_validate(tree["model"]), tolerance)
    return Case(small_model(tree["mixer"], tree["d_model"]), tolerance)


def update_rules(models: list[ModelConfig]) -> set[str]:
    """Return the types of update rules that have a case."""
    loops = [model.stack for model in models if isinstance(model.stack, LoopedConfig)]
    return {loop.update.type for loop in loops if loop.update is not None}


def missing_cases(trees: dict[str, dict[str, Any]]) -> list[str]:
    """Say of every mixer, stack, rule and FFN without a case what to add."""
    tested = {tree["mixer"]["type"] for tree in trees.values() if "mixer" in tree}
    missing = [
        f"mixer '{tag}' has no case: add tests/contract/cases/mixers/{tag}.yaml"
        for tag in sorted(set(MixerConfig.members) - tested)
    ]
    models = [build_case(tree).config for tree in trees.values() if "model" in tree]
    ffns = {block.ffn.type for model in models for block in model.layers if block.ffn is not None}
    for kind, known, found in (
        ("stack", StackConfig.members, {model.stack.type for model in models}),
        ("update rule", UpdateConfig.members, update_rules(models)),
        ("ffn", get_args(FFNConfig.model_fields["type"].annotation), ffns),
    ):
        missing += [
            f"{kind} '{tag}' has no case: add a model with it as tests/contract/cases/models/*.yaml"
            for tag in sorted(set(known) - found)
        ]
    return missing


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", TREES)
def test_contract(case: str, check: str) -> None:
    CHECKS[check](build_case(TREES[case]))


def test_every_mixer_stack_and_ffn_has_a_case() -> None:
    assert not missing_cases(TREES)


def test_a_missing_case_is_named() -> None:
    some = {name: tree for name, tree in TREES.items() if "mamba2" not in str(tree)}
    named = {
        "mixer 'mamba2' has no case: add tests/contract/cases/mixers/mamba2.yaml",
        "ffn 'squared_relu' has no case: add a model with it as tests/contract/cases/models/*.yaml",
    }
    assert named <= set(missing_cases(some))
