"""Hooks: what happens beside training, at named events, one file each."""

import importlib
from typing import TYPE_CHECKING, Any

from megarec.errors import UserError

if TYPE_CHECKING:
    from megarec.config.schema import Config
    from megarec.train.trainer import Trainer


class Hook:
    """Base of all hooks: every event does nothing until a hook overrides it."""

    main_only = True
    """Called on rank 0 only; False for hooks that take part in collectives."""

    def on_start(self, trainer: "Trainer") -> None:
        """Training is about to begin, or to go on; `trainer.state` says where."""

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """An optimizer step was made; `record` holds its metrics."""

    def on_evaluation(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Held-out loss was measured; keys `valid/<source>/<metric>`."""

    def on_checkpoint(self, trainer: "Trainer") -> None:
        """A checkpoint of this step was handed to the writer."""

    def on_end(self, trainer: "Trainer", outcome: str) -> None:
        """Training is over: `done`, `preempted` or, where an error ends it, `failed`."""


def build_hooks(config: "Config") -> list[Hook]:
    """Return the hooks of a run, in the order in which events reach them.

    `hooks:` names optional ones: `progress`, `plot`, or `module:Class` for one of your own.

    Raises:
        UserError: an unknown hook, or a tracker whose package is not installed.
    """
    logging, optional = config.logging, {"progress": "progress:Progress", "plot": "plot:LossPlot"}
    unknown = [name for name in config.hooks if name not in optional and ":" not in name]
    if unknown:
        raise UserError(
            f"hooks: unknown hook '{unknown[0]}'; expected one of {', '.join(optional)}, "
            "or module:Class for your own"
        )
    own = ["jsonl:JsonlLog"]
    own += ["wandb:WandbLog"] if logging.wandb is not None else []
    own += ["tensorboard:TensorBoardLog"] if logging.tensorboard else []
    own += ["loop_monitor:LoopMonitor"] if config.model.stack.core_blocks else []
    own += [optional[name] for name in config.hooks if name in optional]
    # Those that act come last: they raise events that the others must be ready for.
    own += ["evaluation:Evaluation", "checkpoint:Checkpoint"]
    foreign = [name for name in config.hooks if name not in optional]
    return [_load(path) for path in (*(f"{__name__}.{name}" for name in own), *foreign)]


def _load(path: str) -> Hook:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"hooks: cannot load {path}: {error}") from error
