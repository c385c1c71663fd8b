"""Model sections that make no sense: one line a problem, with key, value and what is expected."""

from copy import deepcopy
from typing import Any

import pytest
from small import random_model

from megarec.config.loader import validate_config
from megarec.config.model import ModelConfig
from megarec.errors import UserError
from megarec.generation import generate

ATTENTION = {"type": "attention", "num_heads": 4, "max_seq_len": 64}
RECIPE: dict[str, Any] = {
    "name": "hybrid",
    "model": {
        "vocab_size": 61,
        "d_model": 32,
        "num_layers": 4,
        "blocks": {
            "M": {"mixer": {"type": "mamba2", "num_heads": 4, "head_dim": 16, "num_groups": 2}},
            "A": {"mixer": ATTENTION},
            "F": {"ffn": {"d_ff": 48}},
        },
        "pattern": "MFAF",
    },
    "data": {"train": {"hmm": {"synthetic": "hmm"}}},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 1, "seq_len": 32, "global_batch_size": 2, "micro_batch_size": 2},
}


def lines_of(changes: dict[str, Any]) -> list[str]:
    tree = deepcopy(RECIPE)
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[leaf] = value
    with pytest.raises(UserError) as caught:
        validate_config(tree, "recipe.yaml")
    return [line.removeprefix("recipe.yaml: ") for line in caught.value.lines]


M, A, F = "model.blocks.M", "model.blocks.A", "model.blocks.F"
BAD: dict[str, tuple[Any, str]] = {
    "model.pattern": (
        "MFXF",
        "model: pattern: no block is called 'X'; blocks: M, A, F; a string is one block name a "
        "character, a list takes any names",
    ),
    f"{M}.mixer.num_groups": (3, "model: blocks.M.mixer.num_groups=3 does not divide num_heads=4"),
    f"{M}.mixer.conv_kernel": (
        0,
        "model.blocks.M.mixer.conv_kernel=0: Input should be greater than or equal to 1",
    ),
    f"{M}.mixer.dt_limit": (
        [0.2, 0.1],
        "model: blocks.M.mixer.dt_limit=[0.2, 0.1]: expected a range, the lower bound first",
    ),
    f"{M}.mixer.dt_init": (
        [0.0, 0.1],
        "model: blocks.M.mixer.dt_init=[0.0, 0.1]: expected a range, the lower bound first",
    ),
    f"{M}.mixer.dt_floor": (
        0.1,
        "model.blocks.M.mixer.dt_floor=0.1: unknown key; did you mean 'dt_init_floor'?",
    ),
    f"{M}.mixer": (
        {"type": "mamba"},
        "model.blocks.M.mixer: unknown mixer type 'mamba'; expected one of: attention, mamba2",
    ),
    f"{A}.mixer.num_heads": (
        5,
        "model: blocks.A.mixer.num_heads=5 does not divide d_model=32; change it or give head_dim",
    ),
    f"{A}.mixer.num_kv_heads": (
        3,
        "model: blocks.A.mixer.num_kv_heads=3 does not divide num_heads=4",
    ),
    f"{A}.mixer.head_dim": (
        7,
        "model: blocks.A.mixer.rope.fraction: head_dim=7 x 1.0 gives 7 rotary dimensions; "
        "expected an even number of at least 2",
    ),
    f"{A}.mixer.rope": (
        {"fraction": 0.4},
        "model: blocks.A.mixer.rope.fraction: head_dim=8 x 0.4 gives 3 rotary dimensions; "
        "expected an even number of at least 2",
    ),
    f"{A}.mixer.window": (
        65,
        "model: blocks.A.mixer.window=65: the cache holds max_seq_len=64 tokens; "
        "raise it or narrow the window",
    ),
    f"{A}.mixer.max_seq_len": (
        31,
        "train.seq_len=32: max_seq_len=31 of an attention mixer is shorter; "
        "raise it or shorten the samples",
    ),
    F: ({}, "model.blocks.F: a block needs a mixer, an ffn or both"),
    f"{F}.ffn.type": (
        "relu2",
        "model.blocks.F.ffn.type='relu2': Input should be 'swiglu', 'squared_relu' or 'gelu'",
    ),
    f"{F}.residual_scale": (0.0, "model.blocks.F.residual_scale=0.0: Input should be greater"),
    "model.num_layers": (
        0,
        "model.num_layers=0: Input should be greater than or equal to 1",
    ),
    "train.seq_len": (
        65,
        "train.seq_len=65: max_seq_len=64 of an attention mixer is shorter; "
        "raise it or shorten the samples",
    ),
}
MORE = [
    (
        {"model.pattern": ["M", "mamba", "attn", "F"]},
        "model: pattern: no block is called 'mamba', 'attn'; blocks: M, A, F",
    ),
    (
        {"model.pattern": "MFA"},
        "model: pattern: 3 names do not divide num_layers=4; list as many as there are layers, "
        "or a divisor of it",
    ),
    ({"model.pattern": "MFAFM"}, "model: pattern: 5 names do not divide num_layers=4"),
    ({"model.pattern": ""}, "model.pattern='': Value should have at least 1 item"),
    (
        {"model.pattern": 4},
        "model.pattern=4: expected a list of block names, or a string of one-character names",
    ),
    (
        {"model.pattern": "attn", "model.blocks.attn": {"mixer": ATTENTION}},
        "model: pattern: 'attn' is read as 4 one-character names; write [attn]",
    ),
    ({f"{M}.mixer": {"num_heads": 4}}, "model.blocks.M.mixer: no mixer type; expected one of: "),
    ({f"{M}.mixer.dt_limit": 0.1}, "model.blocks.M.mixer.dt_limit=0.1: expected a list"),
    ({F: None}, "model.blocks.F=None: expected a section"),
    ({f"{F}.ffn": 48}, "model.blocks.F.ffn=48: expected a section"),
    ({f"{A}.mixer.rope": {"bse": 1.0}}, "model.blocks.A.mixer.rope.bse=1.0: unknown key; did you"),
    (
        {f"{A}.mixer.rope": {"scaling": {"type": "ntk"}}},
        "model.blocks.A.mixer.rope.scaling: unknown rope scaling type 'ntk'; expected one of: "
        "linear, llama3, yarn",
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [*(({path: value}, line) for path, (value, line) in BAD.items()), *MORE],
    ids=lambda x: str(x)[:60] if isinstance(x, dict) else "",
)
def test_one_readable_line(changes: dict[str, Any], expected: str) -> None:
    (line,) = lines_of(changes)
    assert line.startswith(expected)
    assert "\n" not in line and "tuple" not in line.lower()


def test_all_of_them_at_once() -> None:
    """What does not fit together, and above it what is no value at all."""
    keys = [f"{M}.mixer.num_groups", f"{A}.mixer.num_kv_heads", f"{A}.mixer.window"]
    changes = {key: BAD[key][0] for key in keys} | {"model.pattern": "MFX"}
    assert len(lines_of(changes)) == 5
    changes |= {"model.num_layers": 0, "model.d_model": -1, f"{F}.ffn.d_ff": "a"}
    assert len(lines_of(changes)) == 3


def test_generating_beyond_the_cache() -> None:
    model = random_model(ModelConfig.model_validate(RECIPE["model"]))
    assert len(generate(model, [[1] * 60], max_new_tokens=4)[0]) == 4
    with pytest.raises(UserError) as caught:
        generate(model, [[1] * 60, [1] * 61], max_new_tokens=4)
    assert caught.value.lines == (
        "prompt 1: 61 tokens and max_new_tokens=4 exceed the model's max_seq_len=64; "
        "shorten one of them",
    )
    # A recurrent model has no such bound.
    tree = RECIPE["model"] | {"pattern": "MF"}
    free = random_model(ModelConfig.model_validate(tree))
    assert len(generate(free, [[1] * 70], max_new_tokens=4)[0]) == 4
