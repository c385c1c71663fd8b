"""A transformer becomes a hybrid: what is copied, what is new, and what never changes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.test_convert_cli import convert, convert_here
from small import model_config, random_model

from megarec.config.model import ModelConfig
from megarec.conversion import export_hf
from megarec.conversion.hybridize import hybridize, parse_layout
from megarec.conversion.load import load_model
from megarec.errors import UserError
from megarec.models import Backbone

ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
IDS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(0))


def transformer(num_layers: int = 4) -> Backbone:
    blocks = {"attention": {"mixer": ATTENTION, "ffn": {"d_ff": 20}}}
    head = {"soft_cap": None}
    config = model_config(blocks=blocks, pattern=["attention"], num_layers=num_layers, head=head)
    return random_model(config)


def weights(model: Backbone) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    return model.config, dict(model.state_dict())


def build(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Backbone:
    model = Backbone(config)
    model.load_state_dict(tensors)
    return model.eval()


@pytest.mark.parametrize(
    ("layout", "layers"),
    [("*M*M", [1, 3]), ("MMMM", [0, 1, 2, 3]), ("****", []), ("3, 1", [1, 3]), ("none", [])],
)
def test_layouts(layout: str, layers: list[int]) -> None:
    assert parse_layout(layout, 4) == layers


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("*M", "2 letters, but 4 layers"),
        ("tmtm", "expected a letter a layer"),
        ("1,4", "no layer 4; they are 0 to 3"),
        ("", "0 letters, but 4 layers"),
    ],
)
def test_bad_layouts(layout: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--layout {layout}: {message}")):
        parse_layout(layout, 4)


def test_no_layer_changes_nothing() -> None:
    teacher = transformer()
    config, tensors = hybridize(*weights(teacher), [])
    assert config == teacher.config
    assert torch.equal(build(config, tensors)(IDS), teacher(IDS))


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 1, 2, 3]])
def test_new_mixers_start_from_the_attention_they_replace(layers: list[int]) -> None:
    teacher = transformer()
    config, tensors = hybridize(*weights(teacher), layers)
    hybrid = build(config, tensors)
    old = teacher.state_dict()
    for layer in range(4):
        prefix = f"blocks.{layer}.mixer."
        mixer = hybrid.blocks[str(layer)].mixer
        attention = teacher.blocks[str(layer)].mixer
        if layer not in layers:
            assert config.layers[layer] == teacher.config.layers[layer]
            continue
        # Query head h of the attention reads key and value head h // 2: so does head h here.
        for h in range(4):
            rows, shared = slice(6 * h, 6 * h + 6), slice(6 * (h // 2), 6 * (h // 2) + 6)
            assert torch.equal(mixer.C.weight[rows], attention.q.weight[rows])
            assert torch.equal(mixer.B.weight[rows], attention.k.weight[shared])
            assert torch.equal(mixer.x.weight[rows], attention.v.weight[shared])
        assert torch.equal(mixer.out_proj.weight, attention.out_proj.weight)
        assert (tensors[f"{prefix}dynamics.D"] == 1).all()
    for name, tensor in old.items():
        if not any(name.startswith(f"blocks.{layer}.mixer.") for layer in layers):
            assert torch.equal(tensors[name], tensor), name


def test_random_mixers_differ_in_the_copied_matrices_alone() -> None:
    teacher = transformer()
    _, mil = hybridize(*weights(teacher), [1])
    _, random = hybridize(*weights(teacher), [1], from_attention=False)
    differ = {name for name in mil if not torch.equal(mil[name], random[name])}
    assert differ == {f"blocks.1.mixer.{m}.weight" for m in ("x", "B", "C", "out_proj")}
    _, other = hybridize(*weights(teacher), [1], seed=1)
    assert not torch.equal(mil["blocks.1.mixer.z.weight"], other["blocks.1.mixer.z.weight"])


def test_only_newly_replaced_layers_start_from_attention() -> None:
    teacher = transformer()
    config, tensors = hybridize(*weights(teacher), [1])
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    _, fresh = hybridize(*weights(teacher), [1, 3])
    grown_config, grown = hybridize(*weights(teacher), [1, 3], previous=(config, trained))
    assert [b.mixer.type for b in grown_config.layers] == ["attention", "mamba2"] * 2
    for name, tensor in grown.items():
        expected = fresh if name.startswith("blocks.3.mixer.") else trained
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(UserError, match="layer 1 is Mamba-2 there"):
        hybridize(*weights(teacher), [3], previous=(config, trained))
    with pytest.raises(UserError, match="--previous: 2 layers, here 4"):
        hybridize(*weights(teacher), [3], previous=weights(transformer(2)))


def test_a_layer_without_attention_is_named() -> None:
    config, tensors = hybridize(*weights(transformer()), [1])
    with pytest.raises(UserError, match=r"layer 1 \(attention_mamba2\) has no attention"):
        hybridize(config, tensors, [0, 1])


def test_as_a_command(tmp_path: Path) -> None:
    teacher = transformer()
    export_hf(teacher, tmp_path / "hf")
    hf: dict[str, Any] = json.loads((tmp_path / "hf/config.json").read_text())
    assert hf["model_type"] == "llama"
    same = tmp_path / "same"
    source = ("hybridize", "--hf", tmp_path / "hf")
    convert_here(*source, "--layout", "none", "--out", same)
    assert torch.equal(load_model(same)[0](IDS), teacher(IDS))
    one, two = tmp_path / "one", tmp_path / "two"
    convert_here(*source, "--layout", "*M**", "--out", one)
    convert(*source, "--layout", "1,2", "--previous", one, "--out", two)
    model, _ = load_model(two)
    assert [block.mixer.type for block in model.config.layers] == [
        "attention",
        "mamba2",
        "mamba2",
        "attention",
    ]
    expected, _ = hybridize(*weights(teacher), [1, 2])
    assert model.config == expected
    with pytest.raises(UserError) as caught:
        convert_here(*source, "--layout", "MM", "--out", two)
    assert caught.value.lines == ("--layout MM: 2 letters, but 4 layers",)
