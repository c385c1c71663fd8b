"""Huginn's modeling file: transformers runs it and computes what megarec and the release do."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion.huginn_files import LOGITS, change_tensors, golden_arrays, released
from conversion.own_exports import LONGEST, PROMPTS, edited, load_trusted, padded
from conversion.test_huginn_layout import ATTENTION, BLOCK, huginn_config
from conversion.tiny_models import assert_same_weights, random_model
from conversion.with_transformers import (
    assert_same_as_transformers,
    cached_logits,
    generate,
    some_ids,
)

import megarec.generation
from megarec.config.loader import load_config
from megarec.conversion import export_hf, load_model
from megarec.conversion.target import target_for_export
from megarec.data.tokenizer import load_tokenizer
from megarec.models import Backbone

ARCHITECTURE = "RavenForCausalLM"
FILE = "modeling_huginn.py"
AUTO_MAP = {
    "AutoConfig": "modeling_huginn.RavenConfig",
    "AutoModelForCausalLM": f"modeling_huginn.{ARCHITECTURE}",
}
UNUSUAL = {"blocks": {"b": BLOCK | {"mixer": ATTENTION | {"qk_bias": False}}}, "head": {}}


@pytest.fixture(scope="module")
def model() -> Backbone:
    return random_model(huginn_config())


@pytest.fixture(scope="module")
def export(model: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export_hf(model, folder, load_tokenizer("byte"))
    return folder


@pytest.fixture(scope="module")
def theirs(export: Path) -> Any:
    return load_trusted(export)


def greedy(model: Backbone, ids_BT: torch.Tensor, num_tokens: int, r: int) -> list[list[int]]:
    """Decode with the state of r recurrences; returns the new tokens."""
    state = model.init_state(len(ids_BT), num_recurrences=r)
    logits_BTV, state = model(ids_BT, state=state, return_state=True, num_recurrences=r)
    new = [logits_BTV[:, -1].argmax(-1)]
    for _ in range(num_tokens - 1):
        logits_BV, state = model.step(new[-1], state, num_recurrences=r)
        new.append(logits_BV.argmax(-1))
    return torch.stack(new, 1).tolist()


def test_transformers_computes_the_same(model: Backbone, export: Path) -> None:
    theirs = assert_same_as_transformers(model, export, ARCHITECTURE, trust_remote_code=True)
    assert theirs.config.use_cache is theirs.generation_config.use_cache is True
    assert theirs.config.tie_word_embeddings is True
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    # A slot a run of a block: so many layers has a cache that transformers makes of the config.
    assert theirs.config.num_hidden_layers == len(model.config.runs) == 8


@pytest.mark.parametrize("stack", [{"prelude": 0, "core": 1, "coda": 2}, {"coda": 0}])
@torch.no_grad()
def test_untied_without_biases_or_parts(tmp_path: Path, stack: dict[str, Any]) -> None:
    model = random_model(huginn_config(stack, **UNUSUAL))
    export_hf(model, tmp_path / "out")
    theirs = assert_same_as_transformers(
        model, tmp_path / "out", ARCHITECTURE, trust_remote_code=True
    )
    assert theirs.lm_head.weight is not theirs.transformer.wte.weight


@pytest.mark.parametrize("r", [1, 2, 7])
@torch.no_grad()
def test_any_number_of_steps(model: Backbone, theirs: Any, r: int) -> None:
    ids = some_ids()
    ours = model(ids, num_recurrences=r)
    torch.testing.assert_close(theirs(ids, num_steps=r).logits, ours, rtol=0, atol=1e-4)
    expected = greedy(model, ids, 8, r)
    for use_cache in (True, False):
        new = generate(theirs, ids, num_steps=r, use_cache=use_cache)
        assert new[:, ids.shape[1] :].tolist() == expected
    default = theirs(ids).logits
    assert (default - ours).abs().max() > 1e-2  # Depth matters in this model.
    torch.testing.assert_close(default, theirs(ids, num_steps=3).logits, rtol=0, atol=0)


@torch.no_grad()
def test_token_by_token(model: Backbone, theirs: Any) -> None:
    ids = some_ids()
    torch.testing.assert_close(cached_logits(theirs, ids, 2), model(ids), rtol=0, atol=1e-4)


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
    mask = torch.cat([mask, torch.tensor([[0, 1, 1]] * 3)], 1)
    more = torch.tensor([[3, 8, 9]] * 3)
    after = theirs(more, attention_mask=mask, past_key_values=outputs.past_key_values)
    for row, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([[*prompt, 8, 9]]))[0, -1]
        torch.testing.assert_close(after.logits[row, -1], alone, rtol=0, atol=1e-4)


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
                num_steps=2,
                **options,
            )
            results.append(new.tolist())
        assert results[0] == results[1]


@torch.no_grad()
def test_a_cache_can_be_continued_twice(theirs: Any) -> None:
    from transformers import DynamicCache

    ids = some_ids()
    whole = theirs(ids).logits[:, 9:]
    for start in (None, DynamicCache(config=theirs.config)):
        outputs = theirs(ids[:, :9], use_cache=True, past_key_values=start)
        cache = outputs.past_key_values
        assert len(cache.layers) == theirs.config.num_hidden_layers
        for past in (copy.deepcopy(cache), cache):
            again = theirs(ids[:, 9:], past_key_values=past).logits
            torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)
    outputs = theirs(ids, use_cache=False, return_dict=False, logits_to_keep=1)
    assert len(outputs) == 1 and outputs[0].shape == (2, 1, 257)


@torch.no_grad()
def test_bad_calls_say_what_was_expected(theirs: Any) -> None:
    ids = some_ids(5)
    cache = theirs(ids, use_cache=True).past_key_values
    mask = torch.ones_like(ids)
    for options, message in (
        ({"num_steps": 0}, "num_steps=0: expected at least 1"),
        (
            {"num_steps": 5, "past_key_values": cache},
            "num_steps=5: needs a cache of 12 layers, this one has 8; go on with as many steps",
        ),
        ({"attention_mask": mask[:, :2]}, "attention_mask: got shape (2, 2), expected (2, 5)"),
        (
            {"attention_mask": mask, "past_key_values": cache},
            "attention_mask: got shape (2, 5), expected (2, 10): one number for each token",
        ),
        (
            {"input_states": torch.zeros(2, 4, 32)},
            "input_states: got shape (2, 4, 32), expected (2, 5, 32)",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            theirs(ids, **options)


def test_every_token_sees_something(theirs: Any) -> None:
    # Not all kernels of attention return numbers where nothing is to be seen.
    real_BS = padded(left=True)[1] != 0
    code = sys.modules[type(theirs).__module__]
    assert code.Tokens(theirs.config, real_BS, LONGEST, None).mask.any(-1).all()


def test_loss_and_gradient_are_ours(model: Backbone, theirs: Any) -> None:
    ids = some_ids()
    labels = ids.clone()
    labels[0, 4:9] = -100
    # megarec's labels are shifted, those of transformers are not.
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss_sum, num_tokens = model(ids, labels=shifted)
    loss = theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, loss_sum / num_tokens, rtol=1e-5, atol=0)
    loss.backward()
    (loss_sum / num_tokens).backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = target_for_export(model.config).export_tensors(model.config, own)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
    model.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
def test_bfloat16(model: Backbone, export: Path) -> None:
    theirs = load_trusted(export, dtype=torch.bfloat16)
    half = copy.deepcopy(model).bfloat16()
    ids = some_ids()
    exact, rounded = model(ids), half(ids)
    error = (rounded - exact).abs().max()
    assert 0 < (theirs(ids).logits - exact).abs().max() < 1.5 * error
    assert all(p.dtype == torch.bfloat16 for p in theirs.parameters())
    assert generate(theirs, ids, attention_mask=torch.ones_like(ids)).shape == (2, 29)


def test_transformers_can_save_it_again(model: Backbone, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "again")
    imported, _ = load_model(tmp_path / "again")
    assert imported.config == load_model(Path(theirs.config.name_or_path))[0].config
    assert_same_weights(imported, model)
    assert_same_as_transformers(model, tmp_path / "again", ARCHITECTURE, trust_remote_code=True)


@pytest.mark.parametrize("r", LOGITS)
@torch.no_grad()
def test_the_released_layout_loads(tmp_path: Path, r: int) -> None:
    arrays = golden_arrays()
    folder = released(tmp_path / "in", auto_map=AUTO_MAP, num_attention_heads=4)
    modeling = Path(megarec.__file__).parent / "conversion/modeling" / FILE
    (folder / FILE).write_bytes(modeling.read_bytes())
    theirs = load_trusted(folder)
    outputs = theirs(arrays["input_ids"], num_steps=r, input_states=arrays["s0"])
    torch.testing.assert_close(outputs.logits, arrays[f"r{r}_logits"], rtol=0, atol=LOGITS[r])
    # Neither is the table missed, nor is it used.
    change_tensors(folder, freqs_cis=None)
    again = load_trusted(folder)(arrays["input_ids"], num_steps=r, input_states=arrays["s0"])
    assert torch.equal(again.logits, outputs.logits)


def test_the_published_size(export: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = load_config("huginn_3.5b.yaml").model
    target = target_for_export(config)
    hf = target.export_config(config)
    folder = edited(export, tmp_path / "published", **hf)
    theirs_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert theirs_config.num_hidden_layers == 132
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(theirs_config, trust_remote_code=True)
    assert sum(p.numel() for p in theirs.parameters()) == 3_564_976_800
    tied = {"lm_head.weight"}
    assert theirs.state_dict().keys() - tied == set(target.names(config).values())


def test_readme_shows_how_to_load(export: Path) -> None:
    text = (export / "README.md").read_text()
    assert f"`trust_remote_code=True` runs `{FILE}`" in text and "pad them on the left" in text
    assert "`num_steps=...`" in text and "by default 3 times" in text


ALONE = """
import json, sys
sys.modules["megarec"] = sys.modules["megarec_kernels"] = None
import torch
from transformers import AutoModelForCausalLM

folder, prompts, mask = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = model.generate(
    torch.tensor(json.loads(prompts)), attention_mask=torch.tensor(json.loads(mask)),
    max_new_tokens=8, do_sample=False, eos_token_id=None, num_steps=3,
)
print(json.dumps(ids.tolist()))
"""


def test_transformers_alone(
    model: Backbone, export: Path, tmp_path: Path, code_cache: Path
) -> None:
    ids, mask = padded(left=True)
    arguments = [str(export), json.dumps(ids.tolist()), json.dumps(mask.tolist())]
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(code_cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = megarec.generation.generate(model, PROMPTS, max_new_tokens=8)
    assert [row[LONGEST:] for row in json.loads(done.stdout)] == expected
    # The table among the weights is no surprise.
    assert "freqs_cis" not in done.stderr
