"""A training run from config to exit code: check, assemble, resume, train, report how it ended."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarec.checkpoint.manager import CheckpointManager
from megarec.checkpoint.manifest import hash_config
from megarec.checkpoint.ranks import Ranks
from megarec.config.model import ModelConfig
from megarec.config.schema import Config
from megarec.data.build import Dataset, build_eval_sources, build_train_dataset
from megarec.data.loader import EvalLoader
from megarec.data.tokenizer import load_tokenizer
from megarec.device import device_name
from megarec.errors import EXIT_PREEMPTED, RunError, UserError
from megarec.models.backbone import Backbone
from megarec.optim.build import learning_rate_scales
from megarec.parallel.apply import build_frozen_model, build_sharded_model
from megarec.parallel.mesh import build_mesh, place
from megarec.parallel.plan import plan
from megarec.train.environment import Environment
from megarec.train.hooks import Hook, build_hooks
from megarec.train.objective import Distillation, Objective, check_teacher, next_token
from megarec.train.run_folder import RunFolder
from megarec.train.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the command line says beside the config.

    Attributes:
        runs: the folder of run folders.
        resume: a step folder to resume from; None takes the newest of the run folder, if any.
        force: go on although the config or the data differ from those of the run folder.
    """

    runs: Path = Path("runs")
    resume: Path | None = None
    force: bool = False


def run(config: Config, options: Options) -> int:
    """Train; returns the exit code: 0 when done, 75 when preempted (saved, to be requeued).

    Raises:
        UserError: bad input, found before anything is written, the same on every rank.
        RunError: training cannot go on.
    """
    with Environment.start(config.device, config.train.step_timeout_seconds) as env:
        ranks = Ranks()
        sizes = plan(config, env.world_size)
        dataset, evaluation = ranks.together(lambda: _open_data(config, env))
        hooks = ranks.together(lambda: build_hooks(config))
        teacher = ranks.together(lambda: _check_model(config))
        folder = RunFolder(options.runs / config.name)
        with _locked(folder, ranks), _logging(folder, env):
            plain = config.model_dump(mode="json")
            ranks.first(lambda: folder.write_config(plain, force=options.force))
            ranks.first(
                lambda: folder.write_info(
                    device=device_name(env.device),
                    world_size=env.world_size,
                    num_params=sizes.num_params,
                    tokens_per_step=sizes.tokens_per_step,
                )
            )
            trainer = _assemble(config, env, folder, dataset, evaluation, hooks, teacher)
            _restore(trainer, options)
            return _train(trainer, ranks)


def _check_model(config: Config) -> ModelConfig | None:
    """Find bad input that only shows beside a model; returns the teacher's config, if any."""
    with torch.device("meta"):
        model = Backbone(config.model)
    learning_rate_scales([name for name, _ in model.named_parameters()], config.optimizer)
    if config.distill is None:
        return None
    from megarec.conversion.load import read_model_config

    teacher = read_model_config(config.distill.teacher)
    check_teacher(teacher, config.model, config.distill)
    return teacher


def _open_data(config: Config, env: Environment) -> tuple[Dataset, EvalLoader | None]:
    tokenizer = load_tokenizer(config.tokenizer.path)
    common: dict[str, Any] = {
        "seq_len": config.train.seq_len,
        "vocab_size": config.model.vocab_size,
        "tokenizer": tokenizer,
    }
    dataset = build_train_dataset(config.data, seed=config.seed, **common)
    if not config.data.valid:
        return dataset, None
    at = place(config.parallel, env.rank, env.world_size)
    evaluation = EvalLoader(
        build_eval_sources(config.data.valid, bos=config.data.bos, **common),
        micro_batch_size=config.train.micro_batch_size,
        max_samples=config.evaluation.max_samples,
        data_rank=at.data_rank,
        data_ranks=at.data_ranks,
    )
    return dataset, evaluation


@contextmanager
def _locked(folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    ranks.first(folder.acquire)
    try:
        yield
    finally:
        if ranks.rank == 0:
            folder.release()


@contextmanager
def _logging(folder: RunFolder, env: Environment) -> Iterator[None]:
    """Log INFO and above to logs/rank<k>.log; the user sees the warnings of rank 0."""
    folder.logs.mkdir(exist_ok=True)
    to_file = logging.FileHandler(folder.logs / f"rank{env.rank}.log", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [to_file]
    if env.is_main:
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setLevel(logging.WARNING)
        to_terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        handlers.append(to_terminal)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _assemble(
    config: Config,
    env: Environment,
    folder: RunFolder,
    dataset: Dataset,
    evaluation: EvalLoader | None,
    hooks: Sequence[Hook],
    teacher_config: ModelConfig | None,
) -> Trainer:
    mesh = build_mesh(config.parallel, env.world_size, env.device.type)
    sharded = build_sharded_model(config, mesh, env.device)
    objective: Objective = next_token
    if config.distill is not None and teacher_config is not None:
        from megarec.conversion.load import load_initial_weights

        teacher = build_frozen_model(config, teacher_config, mesh, env.device)
        load_initial_weights(teacher, Path(config.distill.teacher))
        objective = Distillation(teacher, config.distill)
    checkpoints = CheckpointManager(
        folder.checkpoints,
        config.checkpoint,
        config_hash=hash_config(config.model_dump(mode="json")),
    )
    return Trainer(config, env, folder, sharded, dataset, evaluation, checkpoints, hooks, objective)


def _restore(trainer: Trainer, options: Options) -> None:
    """Resume from the newest checkpoint, or start from other weights where the config says so."""
    found = options.resume or trainer.checkpoints.latest()
    if found is None:
        if trainer.config.train.init_from is not None:
            from megarec.conversion.load import load_initial_weights

            load_initial_weights(trainer.model, Path(trainer.config.train.init_from))
        return
    saved = trainer.restore(found)
    if saved["data"] != trainer.dataset.fingerprint and not options.force:
        raise UserError(
            f"{found}: was trained on other data (fingerprint {saved['data']}, now "
            f"{trainer.dataset.fingerprint}); restore the data, or pass --force to go on with it"
        )
    log.info("resumed from %s", found)


def _train(trainer: Trainer, ranks: Ranks) -> int:
    def report(state: Any) -> None:
        if ranks.rank == 0:
            trainer.folder.write_status(state, trainer.state.step)

    report("running")
    try:
        outcome = trainer.fit()
    except RunError:
        # All ranks have decided alike: a save in the background can still end well.
        trainer.checkpoints.wait()
        report("failed")
        raise
    except BaseException:
        # The other ranks may be gone: no collective here.
        report("failed")
        raise
    report(outcome)
    return 0 if outcome == "done" else EXIT_PREEMPTED
