"""Accuracy on synthetic tasks, by length: what a model computes, and how far it extrapolates."""

from dataclasses import dataclass

import torch

from megarec.data.loader import collate
from megarec.data.sample import IGNORED
from megarec.data.synthetic import Task
from megarec.data.synthetic.source import draw_sample
from megarec.errors import UserError
from megarec.models.backbone import Backbone


@dataclass(frozen=True)
class TaskResult:
    """Share of the answers that are right at one length, and of sequences without an error.

    `num_recurrences` is that of a looped stack; None: as its config says.
    """

    length: int
    accuracy: float
    sequence_accuracy: float
    num_sequences: int
    num_recurrences: int | None = None


@torch.no_grad()
def task_accuracy(
    model: Backbone,
    task: Task,
    length: int,
    *,
    num_sequences: int = 256,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    num_recurrences: int | None = None,
) -> TaskResult:
    """Let a model answer sequences that no training saw (the task's test split).

    Args:
        model: in eval mode; the answer is its most likely token at each labelled position.
        task: with no more ids than the model's vocabulary.
        length: of the sequences, in tokens.
        num_sequences: the first so many of the split.
        batch_size: sequences at once.
        device: of the model.
        num_recurrences: of a looped stack; None as its config says.

    Raises:
        UserError: sequences of this length cannot be made.
    """
    problems = task.problems(length)
    if problems:
        raise UserError(*(f"{task.type}: {line}" for line in problems))
    right = asked = whole = 0
    for start in range(0, num_sequences, batch_size):
        seeds = range(start, min(start + batch_size, num_sequences))
        batch = collate([draw_sample(task, seed, "test", length) for seed in seeds])
        input_ids = batch.input_ids.to(device)
        answers_BT = model(input_ids, num_recurrences=num_recurrences).argmax(-1).cpu()
        kept_BT = batch.labels != IGNORED
        right_BT = (answers_BT == batch.labels) & kept_BT
        right += int(right_BT.sum())
        asked += int(kept_BT.sum())
        whole += int((right_BT == kept_BT).all(1).sum())
    share = right / asked, whole / num_sequences
    return TaskResult(length, *share, num_sequences, num_recurrences)
