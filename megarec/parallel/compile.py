"""torch.compile, block by block and in place."""

import torch
import torch._dynamo

from megarec.config.schema import ParallelConfig
from megarec.errors import UserError
from megarec.models.backbone import Backbone

RECOMPILE_LIMIT = 64
"""Variants of a block's code, by kind of block, gradients or none, documents or none, shapes.
torch's own limit of 8 is too few for a hybrid: it would run the rest uncompiled."""


def check_compile(parallel: ParallelConfig) -> None:
    """Raise UserError for what torch cannot do together with compiled blocks, one line each."""
    if not parallel.compile:
        return
    version = f"torch {torch.__version__}"
    problems = []
    if parallel.activation_checkpointing == "selective":
        problems.append(
            f"parallel.compile: not with activation_checkpointing=selective: {version} recomputes "
            "compiled code as one piece, of which no op can be saved; set it to full or none"
        )
    if parallel.tp > 1:
        problems.append(
            f"parallel.compile: not with tp={parallel.tp}: {version} fails on tensor-parallel "
            "modules after other compiled code in a process; set tp=1 or leave compile out"
        )
    if problems:
        raise UserError(*problems)


def compile_blocks(model: Backbone, backend: str) -> None:
    """Compile the forward pass of each block; what recomputes and what shards stays outside.

    Blocks of one kind share what is compiled. `backend` is one of torch.compile's.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for _, block in model.layers():
        block.compile_forward(backend)
