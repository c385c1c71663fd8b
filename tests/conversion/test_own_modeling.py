"""Exports with a modeling file: transformers runs it and computes the same; megarec never does."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import pytest
import torch
from conversion.own_exports import LONGEST, PROMPTS, edited, load_trusted, padded
from conversion.test_convert_cli import ROOT, convert_here
from conversion.tiny_models import (
    LAYERED,
    assert_same_weights,
    layered_config,
    random_model,
    tiny_config,
    write_run,
)
from conversion.with_transformers import (
    assert_same_as_transformers,
    cached_logits,
    generate,
    load_with_transformers,
    some_ids,
)
from megarec_kernels.newton_rnn import Cell, ParaGRUCell

import megarec.generation
from megarec.config.loader import load_config
from megarec.config.mixer import MixerConfig
from megarec.config.model import ModelConfig
from megarec.conversion import export_hf, import_hf, load_model
from megarec.conversion.target import target_for_export, target_for_import
from megarec.data.tokenizer import load_tokenizer
from megarec.errors import UserError
from megarec.models import Backbone
from megarec.models.mixers.para_rnn import NewtonMixerConfig

MODEL_TYPE = "megarec_para_rnn"
ARCHITECTURE = "ParaRNNForCausalLM"
FILE = "modeling_para_rnn.py"
EPS = 0.01
GRU = {"type": "para_gru", "num_heads": 4, "norm_eps": EPS}
LSTM = {"type": "para_lstm", "num_heads": 2, "norm_eps": 0.02, "conv_kernel": 3}
SWIGLU = {"d_ff": 48}


def para_config(**changes: Any) -> ModelConfig:
    """A model section of 32 channels; keys of `changes` replace those of the top level."""
    tree = {"vocab_size": 257, "d_model": 32, "norm": {"eps": EPS}} | changes
    return ModelConfig.model_validate({"num_layers": len(tree["pattern"])} | tree)


CASES = {
    "gru": para_config(blocks={"g": {"mixer": GRU, "ffn": SWIGLU}}, pattern="gg"),
    "lstm, as published": para_config(
        blocks={"para_lstm": {"mixer": LSTM, "ffn": SWIGLU, "learned_skip": True}},
        pattern=["para_lstm"] * 2,
        head={"z_loss": 1e-4},
    ),
    "gru and lstm, scales, tied": para_config(
        blocks={
            "g": {"mixer": GRU, "learned_skip": True, "residual_scale": 0.5},
            "l": {"mixer": LSTM, "ffn": {"type": "gelu", "d_ff": 24}, "residual_scale": 0.7},
            "f": {"ffn": {"type": "squared_relu", "d_ff": 24}},
        },
        pattern="glfg",
        embedding_scale=3.0,
        head={"tie_embeddings": True, "logit_scale": 2.0, "soft_cap": 5.0},
    ),
    "one head, no memory in the convolution": para_config(
        blocks={"g": {"mixer": GRU | {"num_heads": 1, "conv_kernel": 1, "clip": None}}},
        pattern="g",
        head={"tie_embeddings": True},
    ),
}
MIXED = "gru and lstm, scales, tied"


@pytest.fixture(scope="module")
def model() -> Backbone:
    return random_model(CASES[MIXED])


@pytest.fixture(scope="module")
def export(model: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export_hf(model, folder, load_tokenizer("byte"))
    return folder


@pytest.fixture(scope="module")
def theirs(export: Path) -> Any:
    return load_trusted(export)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path: Path, case: str) -> None:
    model = random_model(CASES[case])
    export_hf(model, tmp_path / "out")
    theirs = assert_same_as_transformers(
        model, tmp_path / "out", ARCHITECTURE, trust_remote_code=True
    )
    assert theirs.config.use_cache is theirs.generation_config.use_cache is True
    tied = CASES[case].head.tie_embeddings
    assert theirs.config.tie_word_embeddings is (theirs.head.weight is theirs.embedding.weight)
    assert theirs.config.tie_word_embeddings is tied
    ids = some_ids()
    torch.testing.assert_close(cached_logits(theirs, ids, 2), model(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_own_round_trip_is_bitwise(tmp_path: Path, case: str) -> None:
    model = random_model(CASES[case])
    export_hf(model, tmp_path / "out")
    imported, _ = load_model(tmp_path / "out")
    assert imported.config == model.config
    assert_same_weights(imported, model)


@torch.no_grad()
def test_padding_changes_nothing(model: Backbone, theirs: Any) -> None:
    for left in (True, False):
        ids, mask = padded(left)
        logits = theirs(ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(logits[row, mask[row] == 1], alone, rtol=0, atol=1e-4)
    # Padding between cached tokens and new ones, too.
    outputs = theirs(ids, attention_mask=mask, use_cache=True)
    more = torch.tensor([[3, 8, 9]] * 3)
    mask = torch.cat([mask, torch.tensor([[0, 1, 1]] * 3)], 1)
    after = theirs(more, attention_mask=mask, past_key_values=outputs.past_key_values)
    for row, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([[*prompt, 8, 9]]))[0, -1]
        torch.testing.assert_close(after.logits[row, -1], alone, rtol=0, atol=1e-4)
    for wrong, shape in ((mask[:, :2], "(3, 2)"), (mask[:1], "(1, 10)")):
        message = re.escape(f"got shape {shape}, expected (3, 3 or more)")
        with pytest.raises(ValueError, match=message):
            theirs(more, attention_mask=wrong)


def test_generation_is_ours(model: Backbone, theirs: Any) -> None:
    expected = megarec.generation.generate(model, PROMPTS, max_new_tokens=8)
    ids, mask = padded(left=True)
    for use_cache in (True, False):
        new = generate(theirs, ids, attention_mask=mask, use_cache=use_cache)
        assert new[:, LONGEST:].tolist() == expected
    for options in ({"num_beams": 3}, {"do_sample": True, "temperature": 0.7}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            new = theirs.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=8,
                eos_token_id=None,
                use_cache=use_cache,
                **options,
            )
            results.append(new.tolist())
        assert results[0] == results[1]


@torch.no_grad()
def test_a_cache_can_be_continued_twice(theirs: Any) -> None:
    ids = some_ids()
    cache = theirs(ids[:, :9], use_cache=True).past_key_values
    whole = theirs(ids).logits[:, 9:]
    for past in (copy.deepcopy(cache), cache):
        again = theirs(ids[:, 9:], past_key_values=past).logits
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)
    outputs = theirs(ids, use_cache=False, return_dict=False, logits_to_keep=1)
    assert len(outputs) == 1 and outputs[0].shape == (2, 1, 257)


def test_loss_and_gradient_are_ours(model: Backbone, theirs: Any) -> None:
    ids = some_ids()
    labels = ids.clone()
    labels[0, 4:9] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss_sum, num_tokens = model(ids, labels=shifted)
    loss = theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, loss_sum / num_tokens, rtol=1e-5, atol=0)
    loss.backward()
    (loss_sum / num_tokens).backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name], rtol=1e-4, atol=1e-5)
    model.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
def test_bfloat16_keeps_the_recurrence_in_float32(model: Backbone, export: Path) -> None:
    theirs = load_trusted(export, dtype=torch.bfloat16)
    half = copy.deepcopy(model).bfloat16()
    for name, parameter in half.named_parameters():
        if ".recurrence." in name:
            parameter.data = model.get_parameter(name).data
    for name, parameter in theirs.named_parameters():
        expected = half.get_parameter(name)
        assert parameter.dtype == expected.dtype and torch.equal(parameter, expected), name
    ids = some_ids()
    # A tenth of what bfloat16 itself changes.
    torch.testing.assert_close(theirs(ids).logits, half(ids), rtol=0, atol=1e-2)
    assert generate(theirs, ids, attention_mask=torch.ones_like(ids)).shape == (2, 29)


def test_the_file_runs_only_where_it_is_trusted(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = edited(export, tmp_path / "evil")
    (evil / FILE).write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nraise SystemExit")
    config, tensors = import_hf(evil)
    assert config == CASES[MIXED] and len(tensors) == len(import_hf(export)[1])
    load_model(evil)
    # By default transformers asks, and takes a mere return for no.
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load_with_transformers(evil, **options)
    assert not (tmp_path / "proof").exists()
    with pytest.raises(SystemExit):
        load_trusted(evil)
    assert (tmp_path / "proof").exists()


def test_transformers_can_save_it_again(model: Backbone, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "again")
    imported, _ = load_model(tmp_path / "again")
    assert imported.config == model.config
    assert_same_weights(imported, model)
    assert_same_as_transformers(model, tmp_path / "again", ARCHITECTURE, trust_remote_code=True)


def blocks_with(**changes: Any) -> dict[str, Any]:
    blocks = CASES[MIXED].model_dump(mode="json")["blocks"]
    blocks["g"]["mixer"] |= changes
    return blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": None}, "blocks: Field required"),
        ({"hidden_size": None}, "hidden_size: Field required"),
        ({"hidden_size": 33}, "num_heads=4 does not divide d_model=33"),
        ({"num_hidden_layers": 6}, "4 names do not divide num_layers=6"),
        ({"pattern": ["g", "x", "f", "g"]}, "no block is called 'x'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"tie_word_embeddings": False}, "head.weight: missing"),
        ({"head": {"soft_cap": 5.0, "bias": True}}, "head.bias=True: unknown key"),
        ({"stack": {"type": "spiral"}}, "unknown stack type 'spiral'"),
        (
            {"stack": {"type": "looped", "core": 4, "num_recurrences": 2}},
            "stack=looped: the architecture runs each layer once",
        ),
        ({"blocks": blocks_with(nonlinearity="relu")}, "nonlinearity='relu': unknown key"),
        ({"blocks": blocks_with(type="mamba3")}, "unknown mixer type 'mamba3'"),
        (
            {"blocks": blocks_with() | {"g": {"mixer": {"type": "attention", "num_heads": 4}}}},
            f"blocks.g.mixer.type=attention: {FILE} has para_gru, para_lstm only",
        ),
    ],
)
def test_edits_of_the_config_are_refused_by_name(
    export: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        import_hf(edited(export, tmp_path / "edited", **changes))
    assert all(str(tmp_path / "edited") in line for line in caught.value.lines)


def test_infinity_is_written_as_json(tmp_path: Path) -> None:
    config = para_config(blocks={"g": {"mixer": GRU | {"tolerance": float("inf")}}}, pattern="g")
    export_hf(random_model(config), tmp_path / "out")
    assert "Infinity" in (tmp_path / "out/config.json").read_text()
    json.loads((tmp_path / "out/config.json").read_text(), parse_constant=pytest.fail)
    assert import_hf(tmp_path / "out")[0] == config
    load_trusted(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert import_hf(tmp_path / "again")[0] == config


def test_what_a_modeling_file_lacks_is_named(tmp_path: Path) -> None:
    with patch.dict(MixerConfig.members):

        class OtherConfig(NewtonMixerConfig):
            type: Literal["other_cell"] = "other_cell"
            cell: ClassVar[Cell] = ParaGRUCell()

        mixers = {"a": {"type": "attention", "num_heads": 4}, "o": {"type": "other_cell"}, "g": GRU}
        blocks = {name: {"mixer": mixer} for name, mixer in mixers.items()}
        model = random_model(para_config(blocks=blocks, pattern="aog"))
    with pytest.raises(UserError) as caught:
        export_hf(model, tmp_path / "out")
    own = [line for line in caught.value.lines if f"export to {MODEL_TYPE}: " in line]
    assert own == [
        f"export to {MODEL_TYPE}: blocks.{name}.mixer.type={kind}: {FILE} has para_gru, para_lstm "
        "only"
        for name, kind in (("a", "attention"), ("o", "other_cell"))
    ]
    assert any(
        "export to nemotron_h: blocks.o.mixer.type=other_cell" in x for x in caught.value.lines
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["xlstm", *LAYERED])
def test_classes_of_transformers_have_no_learned_skip(name: str) -> None:
    config = tiny_config() if name == "xlstm" else layered_config(name)
    assert target_for_export(config).model_type == name
    tree = config.model_dump(mode="json")
    mixing = [key for key, block in tree["blocks"].items() if block["mixer"] is not None]
    for key in mixing:
        tree["blocks"][key]["learned_skip"] = True
    with pytest.raises(UserError) as caught:
        target_for_export(ModelConfig.model_validate(tree), name)
    problem = "learned_skip=true: the architecture adds to x as it is, without a weight a channel"
    assert list(caught.value.lines) == [
        f"export to {name}: blocks.{key}.{problem}" for key in mixing
    ]


def test_the_published_size(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = load_config("para_lstm_400m.yaml").model
    target = target_for_export(config)
    hf = target.export_config(config)
    assert target.model_type == MODEL_TYPE
    assert target_for_import(MODEL_TYPE, "").import_config(json.loads(json.dumps(hf))) == config
    export_hf(random_model(CASES["gru"]), tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps(hf))
    theirs_config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(theirs_config, trust_remote_code=True)
    assert sum(p.numel() for p in theirs.parameters()) == config.num_params()
    assert theirs.state_dict().keys() == set(target.names(config).values())


def test_readme_shows_how_to_load(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (export / "README.md").read_text()
    assert f"`trust_remote_code=True` runs `{FILE}`" in text and "pad them on the left" in text
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(export)
    scope: dict[str, Any] = {}
    exec(code.replace("=100", "=4"), scope)
    assert type(scope["model"]).__name__ == ARCHITECTURE
    assert "Once upon a time" in capsys.readouterr().out


ALONE = """
import json, runpy, sys
sys.modules["megarec"] = sys.modules["megarec_kernels"] = None
import torch
from transformers import AutoModelForCausalLM

script, folder, prompts, mask = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = model.generate(
    torch.tensor(json.loads(prompts)), attention_mask=torch.tensor(json.loads(mask)),
    max_new_tokens=8, do_sample=False, eos_token_id=None,
)
print(json.dumps(ids.tolist()))
sys.argv = [script, folder, "--max-new-tokens", "8"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as refusal:
    print(refusal.code)
sys.argv.append("--trust-remote-code")
runpy.run_path(script, run_name="__main__")
"""


def test_from_a_run_to_transformers_alone_and_back(
    model: Backbone, tmp_path: Path, code_cache: Path
) -> None:
    run = write_run(tmp_path / "run", model)
    convert_here("to-hf", "--checkpoint", run, "--out", tmp_path / "hf")
    assert (tmp_path / "hf" / FILE).read_text() == (
        ROOT / "megarec/conversion/modeling" / FILE
    ).read_text()
    ids, mask = padded(left=True)
    script = ROOT / "tools/try_export.py"
    arguments = [script, tmp_path / "hf", json.dumps(ids.tolist()), json.dumps(mask.tolist())]
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(code_cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    generated, refused, loaded, *_ = done.stdout.splitlines()
    expected = megarec.generation.generate(model, PROMPTS, max_new_tokens=8)
    assert [row[LONGEST:] for row in json.loads(generated)] == expected
    assert refused == "2" and f"carries a modeling file, {FILE}; read it" in done.stderr
    assert loaded.startswith(f"{ARCHITECTURE}, ")

    convert_here("from-hf", "--hf", tmp_path / "hf", "--out", tmp_path / "imported")
    imported, _ = load_model(tmp_path / "imported")
    assert imported.config == model.config
    assert_same_weights(imported, model)
