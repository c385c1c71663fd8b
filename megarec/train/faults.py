"""Faults on demand, for tests: ``MEGAREC_FAULT=point:step:rank:action``."""

import errno
import os
import signal
import time

import torch.distributed as dist

from megarec.errors import UserError

VARIABLE = "MEGAREC_FAULT"
POINTS = (
    "step_begin",
    "after_backward",
    "before_optim",
    "ckpt_shard_written",
    "ckpt_before_manifest",
    "ckpt_before_rename",
    "ckpt_after_rename",
    "data_next",
)
ACTIONS = ("kill9", "hang", "raise", "nan", "enospc")
HANG_SECONDS = 3600


def fault(point: str, step: int) -> bool:
    """Do what ``MEGAREC_FAULT`` asks for at this point, step and rank; else nothing.

    Returns True for the action `nan`: the caller then poisons its gradients. `enospc` raises
    OSError, `raise` RuntimeError. Raises UserError for a malformed variable.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return False
    wanted_point, wanted_step, wanted_rank, action = _parse(text)
    if (point, step, _rank()) != (wanted_point, wanted_step, wanted_rank):
        return False
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        time.sleep(HANG_SECONDS)
    elif action == "raise":
        raise RuntimeError(f"injected fault: {text}")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected fault: {text})")
    return action == "nan"


def _parse(text: str) -> tuple[str, int, int, str]:
    fields = text.split(":")
    if len(fields) == 4:
        point, step, rank, action = fields
        if point in POINTS and step.isdecimal() and rank.isdecimal() and action in ACTIONS:
            return point, int(step), int(rank), action
    raise UserError(
        f"{VARIABLE}={text}: expected point:step:rank:action with point one of "
        f"{', '.join(POINTS)} and action one of {', '.join(ACTIONS)}"
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
