"""A few optimizer steps of tiny models on any mesh, to be compared with one process."""

from collections.abc import Iterable
from typing import Any

import torch
from looped_models import POISSON, looped_tree
from small import layers_tree, model_tree, run_config

from megarec.checkpoint.dcp import training_tensors
from megarec.models.context import Context, Draw
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.optim.clip import gradient_norm
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh, place
from megarec.testing.distributed import run_ranks
from megarec.train.executor import Direct, Executor, MicroBatch, Pipelined
from megarec.train.objective import next_token

ROWS, TOKENS, STEPS = 8, 16, 5
CPU = torch.device("cpu")
ATTENTION = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True}
MAMBA = {"type": "mamba2", "num_heads": 4, "head_dim": 16, "state_dim": 8, "num_groups": 2}
# With gates as open as in "mlstm" the normaliser's kinks amplify rounding: sharding alone, which
# adds gradients in another order, moves the gradient norm by 1e-5 to 3e-3 within five steps.
CALM = {"type": "mlstm", "num_heads": 2, "igate_bias_init": -6.0, "chunk_size": 8}
CALM_BLOCKS = {"mlstm": {"mixer": CALM, "ffn": {"d_ff": 48}}}
EVEN: dict[str, Any] = {"vocab_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "mlstm": model_tree(num_layers=5, **EVEN),
    "calm mlstm": model_tree(num_layers=5, blocks=CALM_BLOCKS, **EVEN),
    "tied": model_tree(num_layers=3, blocks=CALM_BLOCKS, head={"tie_embeddings": True}, **EVEN),
    "looped": looped_tree(depth=POISSON, backprop=2, norm_core_output=True) | EVEN,
    "looped mlstm": looped_tree(backprop=2)
    | {"d_model": 32, "blocks": {"b": {"mixer": CALM, "ffn": {"d_ff": 24}}}}
    | EVEN,
    "hybrid": layers_tree(MAMBA, ATTENTION, MAMBA, MAMBA, MAMBA, **EVEN),
    "para_gru": layers_tree(*[{"type": "para_gru"}] * 3, **EVEN),
}
Parallel = dict[str, Any]
"""The section `parallel`; without `dp_shard` that takes the ranks that are left."""

Cases = dict[str, tuple[str, Parallel]]
"""Name -> a model's name, and its mesh."""

PRECISIONS = ("float32", "float64", "bfloat16")


class Run:
    """A model on a mesh, with its optimizer; `precision` is one of PRECISIONS.

    In float64 nothing hides behind rounding: any two layouts agree to some 1e-15.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        model: str,
        parallel: Parallel,
        precision: str = "float32",
    ) -> None:
        torch.set_default_dtype(torch.float64 if precision == "float64" else torch.float32)
        train = {"steps": 12, "seq_len": TOKENS, "global_batch_size": ROWS, "micro_batch_size": 2}
        compute = {"compute": "bfloat16" if precision == "bfloat16" else "float32"}
        config = run_config(model=MODELS[model], parallel=parallel, train=train, precision=compute)
        self.at = place(config.parallel, rank, world_size)
        self.share = ROWS // self.at.data_ranks
        # A pipeline needs some micro-batches. Without one fewer are faster, but round otherwise.
        exact = precision == "float64" and "pp" not in parallel
        self.size = min(4, self.share) if exact else 2
        mesh = build_mesh(config.parallel, world_size, "cpu")
        self.sharded = build_sharded_model(config, mesh, CPU)
        self.executor: Executor = (
            Pipelined(self.sharded, config, CPU)
            if self.sharded.stages
            else Direct(self.sharded, config, next_token)
        )
        self.optimizer = build_optimizer(self.sharded.model, config.optimizer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint has of it."""
        return training_tensors(self.sharded.model, self.optimizer)

    def gradients(self, step: int) -> float:
        """Accumulate the gradients of a step; returns this rank's part of the summed loss."""
        first = self.share * self.at.data_rank
        starts = range(first, first + self.share, self.size)
        batches = [rows(step, list(range(i, i + self.size))) for i in starts]
        scale = self.at.data_ranks / (ROWS * TOKENS)
        sums = self.executor.forward_backward(batches, scale)
        return sums["loss"].item() * self.at.counts_loss

    def step(self, step: int) -> tuple[float, float]:
        """Make an optimizer step; returns this rank's part of the loss, and the gradient norm."""
        self.sharded.model.train()
        loss = self.gradients(step)
        norm = gradient_norm(self.sharded.model, self.sharded.twins).item()
        set_learning_rate(self.optimizer, 1e-3)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def held_out_loss(self) -> float:
        """This rank's part of the summed loss of rows that are each data rank's own."""
        self.sharded.model.eval()
        first = self.share * self.at.data_rank
        batch = rows(STEPS, [first, first + 1])
        loss = self.executor.loss_sum(batch.input_ids, batch.labels, batch.ctx)
        return loss.item() * self.at.counts_loss


def rows(step: int, samples: list[int]) -> MicroBatch:
    """The rows of a step by their numbers, of documents that end somewhere."""
    ids = torch.stack(
        [
            torch.randint(61, (TOKENS,), generator=torch.Generator().manual_seed(100 * step + i))
            for i in samples
        ]
    )
    doc_ids = torch.stack([(torch.arange(TOKENS) > i).int() for i in samples])
    draw = Draw(0, step, step, torch.tensor(samples))
    ctx = Context(resets=Context.from_doc_ids(doc_ids).resets, draw=draw)
    return MicroBatch(ids, ids.roll(-1, 1), ctx)


def train(
    rank: int, world_size: int, cases: Cases, precision: str = "float32"
) -> dict[str, dict[str, Any]]:
    """Case -> loss and gradient norm of each `steps`, and a held-out loss, `valid`."""
    results = {}
    for name, (model, parallel) in cases.items():
        run = Run(rank, world_size, model, parallel, precision)
        results[name] = {
            # In float64 two steps show what five do.
            "steps": [run.step(step) for step in range(2 if precision == "float64" else STEPS)],
            "valid": run.held_out_loss(),
        }
    return results


def train_alone(models: Iterable[str], precision: str = "float32") -> dict[str, Any]:
    """Model -> what one process finds."""
    cases = {model: (model, {}) for model in models}
    return run_ranks(train, 1, cases, precision)[0]


def errors(ours: list[dict[str, Any]], alone: dict[str, Any]) -> list[float]:
    """The largest relative error of each step, of loss and gradient norm on any rank."""
    found = []
    for step, (loss, norm) in enumerate(alone["steps"]):
        losses, norms = zip(*[rank["steps"][step] for rank in ours], strict=True)
        found.append(max(abs(sum(losses) / loss - 1), *[abs(n / norm - 1) for n in norms]))
    return found
