"""Building datasets from a config: all problems at once, fingerprints, mixtures of kinds."""

import re

import pytest

from megarec.config.schema import DataConfig
from megarec.data.build import Dataset, build_eval_sources, build_train_dataset
from megarec.data.loader import EvalLoader
from megarec.data.tokenizer import Tokenizer
from megarec.errors import UserError

DOCUMENTS = [list(range(30)), list(range(30, 50)), [1, 2]]


@pytest.fixture
def build(tokenizer: Tokenizer):
    def make(
        train: dict, *, seq_len: int = 8, seed: int = 0, vocab_size: int = 257, **rest
    ) -> Dataset:
        data = DataConfig.model_validate({"train": train, **rest})
        return build_train_dataset(
            data, seq_len=seq_len, seed=seed, vocab_size=vocab_size, tokenizer=tokenizer
        )

    return make


def test_mixture_of_text_and_a_task(build, make_shards) -> None:
    text = {"path": str(make_shards(DOCUMENTS).path), "weight": 0.5}
    task = {"synthetic": "group", "args": {"group": "s3"}, "weight": 0.5}
    dataset = build({"text": text, "task": task})
    samples = [dataset.sample(i) for i in range(32)]
    assert sum((sample.labels < 6).all() and -100 not in sample.labels for sample in samples) == 16
    assert dataset.bytes_per_token is None
    # The order of sources in a file does not matter.
    again = build({"task": task, "text": text})
    assert [again.sample(i).labels.tolist() for i in range(32)] == [
        sample.labels.tolist() for sample in samples
    ]


def test_fingerprint_follows_content_not_place(build, make_shards) -> None:
    one = {"a": {"path": str(make_shards(DOCUMENTS, "one").path)}}
    base = build(one)
    copy = build({"a": {"path": str(make_shards(DOCUMENTS, "copy").path)}})
    assert copy.fingerprint == base.fingerprint
    assert base.bytes_per_token == 52 / 55
    grown = {"a": {"path": str(make_shards([*DOCUMENTS, [3]], "grown").path)}}
    edited = {"a": {"path": str(make_shards([*DOCUMENTS[:-1], [1, 3]], "edited").path)}}
    half = {"a": one["a"] | {"weight": 0.5}, "b": one["a"] | {"weight": 0.5}}
    others = [
        build(grown),
        build(edited),
        build(half),
        build({"z": one["a"]}),
        build(one, seed=1),
        build(one, seq_len=9),
        build(one, shuffle="samples"),
        build(one, bos="eod"),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 9


def test_all_problems_at_once(build, make_shards, tmp_path, monkeypatch) -> None:
    small = str(make_shards([[1, 2]], "small").path)
    empty = str(make_shards([], "empty").path)
    monkeypatch.setattr(Tokenizer, "hash", "another")
    train = {
        "gone": {"path": str(tmp_path / "gone")},
        "small": {"path": small},
        "empty": {"path": empty},
        "typo": {"synthetic": "mqra"},
        "sizes": {"synthetic": "mqar", "args": {"pairs": 4, "num_pairs": "x"}},
        "length": {"synthetic": "mqar", "args": {"vocab_size": 400, "num_pairs": 4}},
    }
    with pytest.raises(UserError) as caught:
        build({k: v | {"weight": 1 / 6} for k, v in train.items()}, vocab_size=256)
    wanted = [
        "data.train.gone: .*gone: no manifest.json",
        "data.train.small: .*1 documents, 3 tokens; one sample needs .* = 9",
        "data.train.small: .*token id 256 is not below model.vocab_size=256",
        "data.train.small: .*made with tokenizer 'byte' .* the run has 'byte' .another.",
        "data.train.empty: .*0 documents, 0 tokens",
        "data.train.empty: .*made with tokenizer",
        "data.train.typo: synthetic: unknown .* 'mqra'; expected one of: copy, ",
        "data.train.sizes: synthetic.num_pairs: .* got 'x'",
        "data.train.sizes: synthetic.pairs: unknown; 'mqar' has: dense, num_pairs",
        "data.train.length: synthetic.length 8: num_pairs=4 needs an even length of at least 16",
        "data.train.length: synthetic: 'mqar' needs 400 ids, model.vocab_size=256",
    ]
    assert len(caught.value.lines) == len(wanted)
    for line, pattern in zip(caught.value.lines, wanted, strict=True):
        assert re.match(pattern, line), (line, pattern)


def test_eval_sources(make_shards, tokenizer: Tokenizer) -> None:
    text = str(make_shards(DOCUMENTS).path)
    data = DataConfig.model_validate(
        {
            "train": {"a": {"path": text}},
            "valid": {"text": {"path": text}, "parity": {"synthetic": "parity"}},
        }
    )
    sources = build_eval_sources(
        data.valid, bos=data.bos, seq_len=8, vocab_size=257, tokenizer=tokenizer
    )
    totals = {"text": 0, "parity": 0}
    for name, batch in EvalLoader(sources, micro_batch_size=4, data_rank=0, data_ranks=1):
        totals[name] += batch.num_tokens
    # Every token of the text but the first of each of its 3 documents.
    assert totals == {"text": 55 - 3, "parity": 256 * 8}
    with pytest.raises(UserError, match="data.valid.text: .*vocab_size=200"):
        build_eval_sources(data.valid, bos=data.bos, seq_len=8, vocab_size=200, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "train",
    [
        {"a": {"path": "x", "weight": 0.5}},
        {"a": {"path": "x", "weight": -0.5}, "b": {"path": "x", "weight": 1.5}},
        {"a": {"path": "x", "synthetic": "copy"}},
        {"a": {}},
    ],
)
def test_config_refuses_bad_mixtures(train: dict) -> None:
    with pytest.raises(ValueError):
        DataConfig.model_validate({"train": train})
