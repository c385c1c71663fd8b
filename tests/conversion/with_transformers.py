"""Compare models with what plain transformers makes of their exports."""

import os
from pathlib import Path
from typing import Any

import torch

from megarec.models import Backbone


def load_with_transformers(folder: Path, **options: Any) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def some_ids(length: int = 21, vocab_size: int = 256) -> torch.Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def greedy(model: Backbone, ids_BT: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Generate without a state: each token from the whole text."""
    for _ in range(num_tokens):
        ids_BT = torch.cat([ids_BT, model(ids_BT)[:, -1:].argmax(-1)], dim=1)
    return ids_BT


def generate(theirs: Any, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
    return theirs.generate(
        ids_BT, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )


@torch.no_grad()
def assert_same_as_transformers(
    model: Backbone, folder: Path, architecture: str, **options: Any
) -> Any:
    """Compare logits and generated tokens; returns the model of transformers."""
    ids = some_ids()
    theirs = load_with_transformers(folder, **options)
    assert type(theirs).__name__ == architecture
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    expected = greedy(model, ids, 8)
    assert torch.equal(generate(theirs, ids), expected)
    assert torch.equal(generate(theirs, ids, use_cache=False), expected)
    return theirs


@torch.no_grad()
def cached_logits(theirs: Any, ids_BT: torch.Tensor, num_read: int) -> torch.Tensor:
    """Return the logits of transformers that reads some tokens at once and then one by one."""
    outputs = theirs(ids_BT[:, :num_read], use_cache=True)
    name = "cache_params" if "cache_params" in outputs else "past_key_values"
    logits = [outputs.logits]
    for t in range(num_read, ids_BT.shape[1]):
        outputs = theirs(ids_BT[:, t : t + 1], use_cache=True, **{name: outputs[name]})
        logits.append(outputs.logits)
    return torch.cat(logits, 1)
