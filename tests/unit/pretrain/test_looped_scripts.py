"""generate.py and evaluate.py on a looped model: depth, halting and samplers from the shell."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from looped_models import looped_tree
from small import model_config, random_model, run_config

from megarec.conversion import load
from megarec.data.synthetic import make_task
from megarec.errors import UserError
from megarec.evaluation.task import task_accuracy

ROOT = Path(__file__).parents[3]
CONFIG = run_config(model=looped_tree() | {"vocab_size": 257})
Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return what runs a script in this process, on a random model in a checkpoint's place."""
    monkeypatch.setattr(
        load, "load_model", lambda path, device: (random_model(CONFIG.model), CONFIG)
    )

    def run(name: str, *words: object) -> None:
        argv = [name, "--checkpoint", "some", "--device", "cpu", *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        main: Callable[[], None] = runpy.run_path(str(ROOT / "pretrain" / name))["main"]
        main()

    return run


def test_evaluate_by_depth(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    def losses(*words: object) -> Any:
        script("evaluate.py", "--max-samples", 8, "--json", *words)
        return json.loads(capsys.readouterr().out)

    found = losses("--num-recurrences", 1, 4, 9)
    assert list(found) == ["1", "4", "9"]
    # The config's own depth is 4.
    assert found["4"] == losses() != found["1"]
    script("evaluate.py", "--max-samples", 8, "--num-recurrences", 1)
    assert capsys.readouterr().out.startswith(
        f"hmm, 1 recurrences: loss {found['1']['hmm']['loss']:.4f}"
    )


def test_accuracy_by_depth(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--task", "parity", "--lengths", 12, "--max-samples", 8, "--num-recurrences", 1, 5)
    script("evaluate.py", *words, "--json")
    results = json.loads(capsys.readouterr().out)["parity"]
    assert [result["num_recurrences"] for result in results] == [1, 5]
    script("evaluate.py", *words)
    assert "parity, length 12, 5 recurrences: accuracy 0." in capsys.readouterr().out


def test_accuracy_is_that_of_the_depth() -> None:
    task = make_task("parity")
    model = random_model(model_config(**looped_tree() | {"vocab_size": task.num_ids}))
    shares = []
    for depth in (1, 3):
        right, asked = 0, 0
        for seed in range(16):
            sample = task(seed, "test", 12)
            ids, labels = (torch.tensor(sample[key])[None] for key in ("input_ids", "labels"))
            answers = model(ids, num_recurrences=depth).argmax(-1)
            right += int(((answers == labels) & (labels >= 0)).sum())
            asked += int((labels >= 0).sum())
        shares.append(right / asked)
        found = task_accuracy(model, task, 12, num_sequences=16, num_recurrences=depth)
        assert (found.accuracy, found.num_recurrences) == (shares[-1], depth)
    assert shares[0] != shares[1]


@pytest.mark.parametrize(
    ("words", "mean"),
    [
        ((), 4.0),
        (("--num-recurrences", 2), 2.0),
        (("--halt", "argmax", "patience=1"), 1.0),
        (("--warm-start", "--halt", "latent", "threshold=0"), 4.0),
        # One round of each token but the last, and its last recurrence again: 5 x (4 + 1) / 6.
        (("--sampler", "diffusion_forcing", "inner_recurrence=4"), 4.17),
    ],
)
def test_generate(
    words: tuple[object, ...], mean: float, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script("generate.py", "--tokenizer", "byte", "--prompt", "A", "--max-new-tokens", 6, *words)
    output = capsys.readouterr()
    assert output.out.startswith("A")
    rate = r"[\d.]+ tokens a second, prompts included"
    assert re.fullmatch(rf"{rate}; {mean:.2f} recurrences a token\n", output.err)


def test_what_the_sampler_does_not_take(script: Script) -> None:
    base = ("--tokenizer", "byte", "--prompt", "A", "--sampler", "diffusion_forcing")
    for words in (("--prompt", "B"), ("--halt", "kl"), ("--warm-start",)):
        with pytest.raises(UserError, match="takes one --prompt, and neither --halt"):
            script("generate.py", *base, *words)
