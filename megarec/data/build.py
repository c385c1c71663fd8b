"""Build the training mixture and the validation sources of a config, with all problems at once."""

import json
from collections.abc import Mapping
from hashlib import blake2b

from megarec.config.schema import DataConfig, SourceConfig
from megarec.data.loader import FiniteSource
from megarec.data.mixture import Mixture
from megarec.data.sample import Bos, Sample
from megarec.data.shards import ShardFolder
from megarec.data.sources import EvalSource, Source, TokenSource
from megarec.data.synthetic import Task, make_task
from megarec.data.synthetic.source import SyntheticEvalSource, SyntheticSource
from megarec.data.tokenizer import Tokenizer
from megarec.errors import UserError

Opened = ShardFolder | Task


class Dataset:
    """The endless training data: sample i of the mixture of sources.

    ``fingerprint`` changes with anything that changes a sample; it does not depend on where the
    folders lie. ``bytes_per_token`` is the mean over text by weight, or None with synthetic data.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        *,
        seed: int,
        seq_len: int,
        fingerprint: str,
        bytes_per_token: float | None,
    ) -> None:
        # In the order of their names: the order in a YAML file carries no meaning.
        self.names = sorted(sources)
        self.seq_len = seq_len
        self.fingerprint = fingerprint
        self.bytes_per_token = bytes_per_token
        self._sources = [sources[name] for name in self.names]
        self._mixture = Mixture([weights[name] for name in self.names], seed)

    def sample(self, index: int) -> Sample:
        """Return one sample."""
        source, index_there = self._mixture.locate(index)
        return self._sources[source].sample(index_there)


def build_train_dataset(
    data: DataConfig, *, seq_len: int, seed: int, vocab_size: int, tokenizer: Tokenizer
) -> Dataset:
    """Build ``data.train``; raises UserError with a line for every problem of every source."""

    def build(name: str, opened: Opened) -> Source:
        if isinstance(opened, Task):
            return SyntheticSource(opened, seq_len=seq_len, seed=seed)
        return TokenSource(
            opened, name, seq_len=seq_len, seed=seed, shuffle=data.shuffle, bos=data.bos
        )

    opened = _open_all(data.train, "data.train", seq_len, vocab_size, tokenizer)
    weights = {name: config.weight for name, config in data.train.items()}
    settings = {"seq_len": seq_len, "seed": seed, "shuffle": data.shuffle, "bos": data.bos}
    return Dataset(
        {name: build(name, source) for name, source in opened.items()},
        weights,
        seed=seed,
        seq_len=seq_len,
        fingerprint=_fingerprint(opened, weights, settings),
        bytes_per_token=_bytes_per_token(opened, weights),
    )


def build_eval_sources(
    sources: Mapping[str, SourceConfig],
    *,
    bos: Bos,
    seq_len: int,
    vocab_size: int,
    tokenizer: Tokenizer,
) -> list[FiniteSource]:
    """Build ``data.valid``; raises UserError with a line for every problem of every source."""

    def build(name: str, opened: Opened) -> FiniteSource:
        if isinstance(opened, Task):
            return SyntheticEvalSource(opened, name, seq_len=seq_len)
        return EvalSource(opened, name, seq_len=seq_len, bos=bos)

    opened = _open_all(sources, "data.valid", seq_len, vocab_size, tokenizer)
    return [build(name, source) for name, source in opened.items()]


def _open_all(
    configs: Mapping[str, SourceConfig],
    where: str,
    seq_len: int,
    vocab_size: int,
    tokenizer: Tokenizer,
) -> dict[str, Opened]:
    opened: dict[str, Opened] = {}
    problems: list[str] = []
    for name, config in configs.items():
        try:
            if config.path is not None:
                opened[name] = _open_folder(config.path, seq_len, vocab_size, tokenizer)
            elif config.synthetic is not None:
                opened[name] = _open_task(config, seq_len, vocab_size)
        except UserError as error:
            problems += [f"{where}.{name}: {line}" for line in error.lines]
    if problems:
        raise UserError(*problems)
    return opened


def _open_folder(path: str, seq_len: int, vocab_size: int, tokenizer: Tokenizer) -> ShardFolder:
    folder = ShardFolder(path)
    manifest = folder.manifest
    problems = []
    if manifest.tokens < seq_len + 1:
        problems.append(
            f"{path}: {manifest.documents} documents, {manifest.tokens} tokens; one sample needs "
            f"train.seq_len + 1 = {seq_len + 1}"
        )
    if manifest.max_id >= vocab_size:
        problems.append(
            f"{path}: token id {manifest.max_id} is not below model.vocab_size={vocab_size}; "
            f"its tokenizer has {manifest.vocab_size} ids"
        )
    if manifest.tokenizer_hash != tokenizer.hash:
        problems.append(
            f"{path}: made with tokenizer '{manifest.tokenizer}' ({manifest.tokenizer_hash}), the "
            f"run has '{tokenizer.name}' ({tokenizer.hash}); set tokenizer.path or tokenize again"
        )
    if problems:
        raise UserError(*problems)
    return folder


def _open_task(config: SourceConfig, seq_len: int, vocab_size: int) -> Task:
    task = make_task(str(config.synthetic), **config.args)
    problems = [f"synthetic.{line}" for line in task.problems(seq_len)]
    if task.num_ids > vocab_size:
        problems.append(
            f"synthetic: '{task.type}' needs {task.num_ids} ids, model.vocab_size={vocab_size}"
        )
    if problems:
        raise UserError(*problems)
    return task


def _fingerprint(
    opened: Mapping[str, Opened], weights: Mapping[str, float], settings: Mapping[str, object]
) -> str:
    sources = {
        name: source.model_dump() if isinstance(source, Task) else source.manifest.checksum
        for name, source in opened.items()
    }
    key = {"sources": sources, "weights": dict(weights), **settings}
    return blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()


def _bytes_per_token(opened: Mapping[str, Opened], weights: Mapping[str, float]) -> float | None:
    total = 0.0
    for name, source in opened.items():
        if isinstance(source, Task):
            return None
        total += weights[name] * source.manifest.text_bytes / source.manifest.tokens
    return total
