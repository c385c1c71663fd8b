"""The real trainer, data loader and checkpoints, on random tokens, so that no corpus is needed."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.protocol import (
    Clock,
    Comparison,
    Times,
    compare,
    load_average,
    summarize,
)
from benchmarks.report import Quantity, Result, Row
from megarec.checkpoint.dcp import training_tensors
from megarec.checkpoint.manager import CheckpointManager
from megarec.config.loader import load_config
from megarec.config.schema import CheckpointConfig, Config
from megarec.data.loader import TrainLoader
from megarec.data.shards import ShardFolder, ShardWriter
from megarec.data.sources import TokenSource
from megarec.data.tokenizer import load_tokenizer
from megarec.errors import RunError
from megarec.models import Backbone, build_model
from megarec.models.context import Context
from megarec.optim.build import build_optimizer
from megarec.train.hooks import Hook
from megarec.train.hooks.jsonl import read_metrics
from megarec.train.session import Options, run
from megarec.train.signals import StopSignal
from megarec.train.trainer import Trainer

DOCUMENT_TOKENS = 1000
"""The mean length of the random documents."""

SKIPPED_STEPS = 3
"""Steps at the start of a run that do not count: memory is fresh, kernels are compiled."""


def random_shards(folder: Path, num_tokens: int, vocab_size: int) -> None:
    """Write documents of random byte tokens, all of ids below the vocabulary's size."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, load_tokenizer("byte"))
    while num_tokens > 0:
        length = int(rng.integers(1, 2 * DOCUMENT_TOKENS))
        writer.add(rng.integers(min(256, vocab_size), size=length, dtype=np.int32), length)
        num_tokens -= length
    writer.close()


def on_random_tokens(recipe: str, shards: Path, *overrides: str) -> Config:
    """Return a recipe that trains on random shards, which it has written, and evaluates nothing."""
    # A few steps end before the recipe's schedule begins.
    common = ["schedule.warmup_steps=0", "schedule.cooldown_steps=0", "tokenizer.path=byte"]
    config = load_config(recipe, [*overrides, *common])
    num_tokens = 64 * (config.train.seq_len + 1)
    random_shards(shards, max(num_tokens, 1 << 18), config.model.vocab_size)
    data = [f"data.train={json.dumps({'random': {'path': str(shards)}})}", "data.valid={}"]
    return load_config(recipe, [*overrides, *common, *data])


class Probe(Hook):
    """Calls `work` with the trainer that a session has assembled, before its first step."""

    work: ClassVar[Callable[[Trainer], None]]

    def on_start(self, trainer: Trainer) -> None:
        """Make what steps the work wants; the session makes those that are left."""
        type(self).work(trainer)


PROBE = f"{__name__}:Probe"


def trainer_overhead(clock: Clock, rounds: int, *, small: bool) -> Iterator[Result]:
    """Yield the trainer's step (data, FSDP, hooks, log) against a bare loop on the same model."""
    recipe = "tiny/xlstm.yaml" if small else "quickstart.yaml"
    found: list[Comparison] = []
    # The difference is small: more rounds than usual.
    rounds = rounds if small else 2 * rounds
    steps = 2 * rounds + clock.warm_up

    def work(trainer: Trainer) -> None:
        bare = _bare_step(trainer, steps)
        signal = StopSignal()

        def step() -> None:
            record, _ = trainer.train_step(signal)
            trainer.emit("on_step", record)

        found.append(compare(bare, step, clock, rounds))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = on_random_tokens(
            recipe,
            folder / "shards",
            *(f"train.steps={steps}", "checkpoint.every=1000000", f"hooks=[{PROBE}]"),
        )
        Probe.work = staticmethod(work)
        run(config, Options(runs=folder / "runs"))
    tokens = config.train.global_batch_size * config.train.seq_len
    yield Row(
        "trainer",
        f"{recipe}, {config.model.num_params():,} parameters, {tokens:,} tokens a step",
        "bare loop",
        "trainer",
        comparison=found[0],
        at_most=None if small else 1.03,
    )


def _bare_step(trainer: Trainer, steps: int) -> Callable[[], None]:
    """Return a step as a script would make it: batches at hand, one model, nothing logged.

    The n-th call takes the batches of the trainer's n-th step.
    """
    config = trainer.config
    model = build_model(config.model).train()
    optimizer = build_optimizer(model, config.optimizer)
    clip = config.optimizer.grad_clip or float("inf")
    size = config.train.global_batch_size
    batches = iter([trainer.loader.micro_batches(n * size) for n in range(steps)])

    def step() -> None:
        micro_batches = next(batches)
        num_tokens = sum(batch.num_tokens for batch in micro_batches)
        for batch in micro_batches:
            ctx = Context.from_doc_ids(batch.doc_ids)
            (model(batch.input_ids, batch.labels, ctx=ctx)[0] / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def loader(rounds: int, *, small: bool) -> Iterator[Result]:
    """Yield the tokens that one core reads, packs and collates in a second."""
    seq_len, batch_size, steps = (64, 4, 2) if small else (2048, 16, 32)
    with tempfile.TemporaryDirectory() as name:
        random_shards(Path(name), 8 * seq_len * batch_size * steps // 4, 256)
        source = TokenSource(
            *(ShardFolder(name), "random"),
            **{"seq_len": seq_len, "seed": 0, "shuffle": "documents", "bos": "none"},
        )
        batches = TrainLoader(
            source,
            global_batch_size=batch_size,
            micro_batch_size=max(1, batch_size // 4),
            data_rank=0,
            data_ranks=1,
        )
        rates, load = [], load_average()
        for i in range(rounds):
            batches.micro_batches(i * steps * batch_size)  # not counted: nothing is read ahead yet
            began = time.process_time()
            for step in range(1, steps):
                batches.micro_batches((i * steps + step) * batch_size)
            seconds = time.process_time() - began
            rates.append((steps - 1) * batch_size * seq_len / seconds)
        batches.close()
    yield Quantity(
        "loader",
        f"tokens a second of processor time, samples of {seq_len}",
        statistics.median(rates),
        "tokens/s",
        at_least=None if small else 1e6,
        load=max(load, load_average()),
    )


CHECKPOINTED = {
    "vocab_size": 2048,
    "d_model": 512,
    "num_layers": 4,
    "blocks": {"m": {"mixer": {"type": "mlstm", "num_heads": 4}, "ffn": {"d_ff": 1408}}},
    "pattern": "m",
}


def checkpoints(rounds: int, *, small: bool) -> Iterator[Result]:
    """Yield how fast checkpoints are written, and what a background save costs the steps."""
    tree = CHECKPOINTED | ({"d_model": 32, "num_layers": 1} if small else {})
    config = load_config("quickstart.yaml").model.model_validate(tree)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(config.vocab_size, (2, 129), generator=torch.Generator().manual_seed(0))
    step = _step(model, optimizer, ids)
    step()
    tensors = training_tensors(model, optimizer)
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    what = f"{size / 1e6:,.0f} MB"

    load = load_average()
    with tempfile.TemporaryDirectory() as name:
        manager = CheckpointManager(Path(name), CheckpointConfig())
        seconds = [_seconds(lambda i=i: manager.save(i, tensors, {})) for i in range(rounds)]
    yield Quantity(
        "checkpoint",
        f"save, {what}, hashed and synced to disk",
        size / statistics.median(seconds) / 1e9,
        "GB/s",
        load=max(load, load_average()),
    )
    staging, before, after = _beside_saves(step, tensors, rounds)
    load = max(load, load_average())
    yield Quantity(
        "checkpoint",
        f"asynchronous save, {what}: until training goes on",
        1e3 * statistics.median(staging),
        "ms",
        load=load,
    )
    yield Row(
        "checkpoint",
        f"two steps of {config.num_params():,} parameters, 256 tokens",
        "by themselves",
        "beside a background save",
        comparison=summarize(before, after, load),
    )


Pairs = list[tuple[Times, Times]]


def _beside_saves(
    step: Callable[[], None], tensors: dict[str, Tensor], rounds: int
) -> tuple[list[float], Pairs, Pairs]:
    """Return seconds of staging, and the times of pairs of steps before and behind a save."""
    clock = Clock(torch.device("cpu"))
    staging, before, after = [], [], []
    with tempfile.TemporaryDirectory() as name:
        manager = CheckpointManager(Path(name), CheckpointConfig(asynchronous=True))
        for i in range(rounds):
            before.append((clock(step), clock(step)))
            staging.append(_seconds(lambda i=i: manager.save(i, tensors, {})))
            after.append((clock(step), clock(step)))
            manager.wait()
    return staging, before, after


def _step(model: Backbone, optimizer: torch.optim.Optimizer, ids: Tensor) -> Callable[[], None]:
    def step() -> None:
        loss_sum, num_tokens = model(ids[:, :-1], ids[:, 1:].contiguous())
        (loss_sum / num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def train(recipe: str, overrides: Sequence[str], steps: int) -> Iterator[Result]:
    """Yield tokens/s and MFU of a recipe on this machine, one process, through the real trainer."""
    load = load_average()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = on_random_tokens(
            recipe,
            folder / "shards",
            *("hooks=[]", "checkpoint.every=1000000", *overrides),
            *(f"train.steps={SKIPPED_STEPS + steps}", "logging.every=1"),
        )
        if run(config, Options(runs=folder / "runs")):
            raise RunError(f"{recipe}: was stopped")
        records = read_metrics(folder / "runs" / config.name / "metrics.jsonl")
    load, records = max(load, load_average()), records[SKIPPED_STEPS:]

    def median(key: str) -> float | None:
        values = [record[key] for record in records if record[key] is not None]
        return statistics.median(values) if values else None

    what = f"{recipe}, {config.model.num_params():,} parameters, T {config.train.seq_len}"
    figures = {
        "tokens/s": (median("tokens_per_second"), "tokens/s"),
        "step": (median("step_seconds"), "s"),
        "MFU": (median("mfu"), "of the data sheet's bf16 peak"),
        "peak memory": (median("memory_bytes"), "bytes"),
    }
    for figure, (value, unit) in figures.items():
        if value is not None:
            yield Quantity("train", f"{what}: {figure}", value, unit, load=load)
