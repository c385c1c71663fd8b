"""The training loop: one optimizer step after another, with hooks at named events."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from megarec.checkpoint.dcp import training_tensors
from megarec.checkpoint.manager import CheckpointManager
from megarec.config.schema import Config
from megarec.data.build import Dataset
from megarec.data.loader import Batch, EvalLoader, TrainLoader
from megarec.device import peak_flops, peak_memory_bytes, synchronize
from megarec.errors import RunError
from megarec.evaluation.loss import evaluate_loss
from megarec.models.context import Context, Draw
from megarec.optim.build import build_optimizer, set_learning_rate
from megarec.optim.clip import clip_gradients, gradient_norm
from megarec.optim.schedule import learning_rate
from megarec.parallel.apply import Sharded
from megarec.parallel.mesh import place
from megarec.train.environment import Environment
from megarec.train.executor import Direct, Executor, MicroBatch, Pipelined
from megarec.train.faults import fault
from megarec.train.hooks import Hook
from megarec.train.metrics import Largest
from megarec.train.objective import CROSS_ENTROPY, Objective, next_token
from megarec.train.run_folder import RunFolder
from megarec.train.signals import StopSignal
from megarec.train.state import TrainState
from megarec.train.watchdog import Watchdog

log = logging.getLogger(__name__)

Outcome = Literal["done", "preempted", "failed"]


class Trainer:
    """Trains a (sharded) model; everything that is saved hangs here.

    Attributes:
        state: the counters.
        folder: where the run lives.
        place: where this rank stands.
        sharded, model, optimizer: what this rank holds of the model, and its optimizer.
        executor: runs micro-batches.
    """

    def __init__(
        self,
        config: Config,
        env: Environment,
        folder: RunFolder,
        sharded: Sharded,
        dataset: Dataset,
        evaluation: EvalLoader | None,
        checkpoints: CheckpointManager,
        hooks: Sequence[Hook],
        objective: Objective = next_token,
    ) -> None:
        self.config = config
        self.env = env
        self.folder = folder
        self.place = place(config.parallel, env.rank, env.world_size)
        self.sharded = sharded
        self.model = sharded.model
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.executor: Executor = (
            Pipelined(sharded, config, env.device)
            if sharded.stages
            else Direct(sharded, config, objective)
        )
        self.dataset = dataset
        self.evaluation = evaluation
        self.checkpoints = checkpoints
        self.hooks = [hook for hook in hooks if env.is_main or not hook.main_only]
        self.state = TrainState()
        self.loader = TrainLoader(
            dataset,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_rank=self.place.data_rank,
            data_ranks=self.place.data_ranks,
        )
        peak = peak_flops(env.device)
        self._peak_flops = peak and peak * env.world_size
        self._largest = Largest(env)
        self._saved_step: int | None = None

    def fit(self) -> Outcome:
        """Train to the last step, or until a signal asks to save and stop.

        Raises:
            RunError: the loss or the gradients were not finite and the policy says stop.
        """
        num_steps = self.config.train.steps
        timeout = self.config.train.step_timeout_seconds
        outcome: Outcome = "failed"
        with StopSignal() as signal, Watchdog(timeout) as watchdog:
            try:
                self.emit("on_start")
                stop = False
                while self.state.step < num_steps and not stop:
                    watchdog.arm()
                    record, stop = self.train_step(signal)
                    watchdog.disarm()
                    self.emit("on_step", record)
                self.save()
                self.checkpoints.wait()
                outcome = "done" if self.state.step == num_steps else "preempted"
            finally:
                watchdog.disarm()
                self.loader.close()
                self.emit("on_end", outcome)
        return outcome

    def emit(self, event: str, *details: Any) -> None:
        """Call the method of this name on every hook, in order."""
        for hook in self.hooks:
            getattr(hook, event)(self, *details)

    def train_step(self, signal: StopSignal) -> tuple[dict[str, Any], bool]:
        """Make one optimizer step; returns its metrics, and whether any rank was asked to stop."""
        config, state = self.config, self.state
        began = time.perf_counter()
        fault("step_begin", state.step)
        batches = self.loader.micro_batches(state.samples)
        fault("data_next", state.step)
        # The number of tokens must be known on all ranks before the first backward.
        local_tokens = sum(batch.num_tokens for batch in batches) if self.place.counts_data else 0
        tokens, stop_requests = self.env.sum([local_tokens, signal.received is not None])

        local = self._forward_backward(batches, tokens)
        if fault("after_backward", state.step):
            self._poison_gradients()
        terms = dict(zip(local, self.env.sum(list(local.values())), strict=True))
        loss = terms.pop("loss")
        metrics = self._largest.over_ranks(self.model.metrics())
        norm = gradient_norm(self.model, self.sharded.twins).item()
        fault("before_optim", state.step)
        lr = learning_rate(config.schedule, config.optimizer.lr, state.step, config.train.steps)
        # Loss and norm are the same numbers on all ranks, so all decide alike.
        if math.isfinite(loss) and math.isfinite(norm):
            self._update(norm, lr)
        else:
            self._skip_or_stop(loss, norm, self.env.ranks_where(not math.isfinite(local["loss"])))
        self.optimizer.zero_grad(set_to_none=True)

        state.step += 1
        state.samples += config.train.global_batch_size
        state.tokens += int(tokens)
        synchronize(self.env.device)
        seconds = time.perf_counter() - began
        cross_entropy = terms.get(CROSS_ENTROPY, loss)
        flops_per_token = config.model.flops_per_token(
            config.train.seq_len, metrics.get("loop/recurrences")
        )
        record = {
            "step": state.step,
            "loss": loss,
            **terms,
            **metrics,
            "bits_per_byte": cross_entropy / math.log(2) / self.dataset.bytes_per_token
            if self.dataset.bytes_per_token
            else None,
            "lr": lr,
            "grad_norm": norm,
            "tokens": state.tokens,
            "skipped": state.skipped,
            "tokens_per_second": tokens / seconds,
            "mfu": self._peak_flops and tokens / seconds * flops_per_token / self._peak_flops,
            "step_seconds": seconds,
            "memory_bytes": peak_memory_bytes(self.env.device),
        }
        return record, stop_requests > 0

    def _forward_backward(self, batches: list[Batch], tokens: float) -> dict[str, float]:
        """Accumulate gradients of the mean loss over the global batch of `tokens` tokens.

        Returns this rank's part of that `loss` and of the objective's terms: the parts of all
        ranks add up to them.
        """
        self.model.train()
        step, device = self.state.step, self.env.device
        micro_batches = []
        for i, batch in enumerate(batches):
            draw = Draw(
                self.config.seed,
                step,
                step * len(batches) + i,
                torch.arange(batch.first, batch.first + len(batch.input_ids), device=device),
            )
            ctx = replace(Context.from_doc_ids(batch.doc_ids).to(device), draw=draw)
            micro_batches.append(
                MicroBatch(batch.input_ids.to(device), batch.labels.to(device), ctx)
            )
        # Data parallelism averages gradients over ranks: undo that, divide by all tokens.
        scale = self.place.data_ranks / max(tokens, 1)
        sums = self.executor.forward_backward(micro_batches, scale)
        counts = self.place.counts_loss
        return {name: counts * total.item() / max(tokens, 1) for name, total in sums.items()}

    def _update(self, norm: float, lr: float) -> None:
        if self.config.optimizer.grad_clip is not None:
            clip_gradients(self.model, norm, self.config.optimizer.grad_clip)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.model.constrain_()
        self.state.skipped_in_a_row = 0

    def _skip_or_stop(self, loss: float, norm: float, ranks: list[int]) -> None:
        config, state = self.config.train, self.state
        where = f"loss not finite on ranks {ranks}" if ranks else "gradients not finite"
        what = (
            f"step {state.step}: {where} (loss {loss}, gradient norm {norm}, samples "
            f"{state.samples} to {state.samples + config.global_batch_size - 1})"
        )
        policy = config.nonfinite
        if policy.policy == "stop":
            raise RunError(f"{what}; train.nonfinite.policy is stop: the update was not made")
        if state.skipped_in_a_row == policy.max_consecutive:
            raise RunError(f"{what}; {policy.max_consecutive} steps in a row were skipped already")
        state.skipped += 1
        state.skipped_in_a_row += 1
        log.warning("%s; update skipped", what)

    def _poison_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(math.nan)

    def evaluate(self) -> None:
        """Measure the loss on held-out data and tell the hooks."""
        if self.evaluation is None:
            return
        record: dict[str, Any] = {"step": self.state.step}
        for num_recurrences in (None, *self.config.evaluation.num_recurrences):
            results = evaluate_loss(
                self.model,
                self.evaluation,
                self.env.device,
                self.env.sum,
                num_recurrences,
                self.executor.loss_sum,
                self.place,
            )
            for name, result in results.items():
                if num_recurrences is not None:
                    record[f"valid/{name}/loss_r{num_recurrences}"] = result.loss
                    continue
                record[f"valid/{name}/loss"] = result.loss
                record[f"valid/{name}/bits_per_byte"] = result.bits_per_byte
        self.emit("on_evaluation", record)

    def save(self) -> None:
        """Publish a checkpoint of this step, unless there is one (collective)."""
        if self._saved_step == self.state.step:
            return
        self.checkpoints.save(
            self.state.step,
            training_tensors(self.model, self.optimizer),
            {"train": self.state.to_json(), "data": self.dataset.fingerprint},
        )
        self._saved_step = self.state.step
        self.emit("on_checkpoint")

    def restore(self, folder: Path) -> dict[str, Any]:
        """Take everything from a step folder (collective); returns what else it says."""
        saved = self.checkpoints.load(folder, training_tensors(self.model, self.optimizer))
        self.state = TrainState.from_json(saved["train"])
        self._saved_step = self.state.step
        return saved
