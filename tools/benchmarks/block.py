"""A slice of xLSTM 7B with its embedding and head: a training step, and what it is made of."""

from collections.abc import Iterator

import torch
from megarec_kernels.check import Tensors
from megarec_kernels.gated_linear_attention import gated_linear_attention
from torch.nn import functional as F

from benchmarks.gpu_forms import Sizes
from benchmarks.protocol import Clock, Form, forward_backward
from benchmarks.race import timed
from benchmarks.report import Quantity
from megarec.config.loader import load_config
from megarec.config.schema import Config
from megarec.device import peak_flops, peak_memory_bytes
from megarec.models import Backbone
from megarec.optim.build import build_optimizer
from megarec.optim.clip import clip_gradients, gradient_norm
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.train.environment import Environment

PART = "block"
RECIPE = "xlstm_7b.yaml"
ONE_PROCESS = (
    *("parallel.dp_replicate=1", "parallel.dp_shard=1", "parallel.activation_checkpointing=none"),
    *("train.global_batch_size=1", "train.micro_batch_size=1"),
)


def block_slice(sizes: Sizes, clock: Clock) -> Iterator[Quantity]:
    """Yield tokens/s, MFU, and the time of matmuls, cell, optimizer and all else.

    Parameters are sharded over the one process as in training: float32, gathered in bfloat16.
    """
    config = load_config(RECIPE, [*ONE_PROCESS, *sizes.block])
    with Environment.start(clock.device.type, 600.0):
        mesh = build_mesh(config.parallel, 1, clock.device.type)
        sharded = build_sharded_model(config, mesh, clock.device)
        yield from _measure(config, sharded.model.train(), sizes, clock)


def _measure(config: Config, model: Backbone, sizes: Sizes, clock: Clock) -> Iterator[Quantity]:
    tokens, device = sizes.block_tokens, clock.device
    optimizer = build_optimizer(model, config.optimizer)
    ids = torch.randint(config.model.vocab_size, (1, tokens + 1), device=device)

    def step() -> None:
        loss_sum, num_tokens = model(ids[:, :-1], ids[:, 1:].contiguous())
        (loss_sum / num_tokens).backward()
        clip_gradients(model, gradient_norm(model).item(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if not clock.on_cpu:
        torch.accelerator.reset_peak_memory_stats()
    total = timed(step, clock, sizes.rounds).median
    memory = peak_memory_bytes(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update = timed(optimizer.step, clock, sizes.rounds).median
    optimizer.zero_grad()
    matmuls = _matmul_seconds(model, sizes, clock)
    cell = config.model.num_layers * _cell_seconds(config, sizes, clock)

    what = f"{config.model.num_layers} blocks and head of xLSTM 7B, T {tokens}"
    rate = tokens / total
    yield Quantity(PART, f"{what}: speed", rate, "tokens/s")
    flops, peak = rate * config.model.flops_per_token(tokens), peak_flops(device)
    if peak is not None:
        name = f"{what}: MFU, of the data sheet's {peak / 1e12:.0f} TFLOP/s"
        yield Quantity(PART, name, flops / peak, "", at_least=0.5)
    M, K, N = sizes.matmuls[-1]
    measured = 2 * M * K * N / linear_seconds(M, K, N, sizes, clock)
    name = f"{what}: MFU, of {measured / 1e12:.3g} TFLOP/s measured for {M} x {K} x {N}"
    yield Quantity(PART, name, flops / measured, "")
    yield Quantity(PART, f"{what}: peak memory", memory / 1e9, "GB")
    for name, seconds in (
        ("step", total),
        ("matmuls of linear layers and head", matmuls),
        ("cell", cell),
        ("optimizer", update),
        ("the rest: norms, gates, loss, casts, launches", total - update - matmuls - cell),
    ):
        yield Quantity(PART, f"{what}: {name}", 1e3 * seconds, "ms")


def linear_seconds(M: int, K: int, N: int, sizes: Sizes, clock: Clock) -> float:
    """Return the seconds of a matmul (M, K) x (N, K)^T, as a linear layer has it."""
    a, b = (torch.randn(n, K, device=clock.device, dtype=sizes.dtype) for n in (M, N))
    return timed(lambda: F.linear(a, b), clock, sizes.rounds).median


def _matmul_seconds(model: Backbone, sizes: Sizes, clock: Clock) -> float:
    """Return the seconds of all linear layers' three matmuls each, by themselves."""
    wide = {
        module
        for _, layer in model.layers()
        for part in layer.float32_modules()
        for module in part.modules()
    }
    shapes = [
        tuple(module.weight.shape)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module not in wide
    ]
    shapes.append((model.config.vocab_size, model.config.d_model))
    T, seconds = sizes.block_tokens, {}
    for N, K in set(shapes):
        # Forward, and the gradients of the layer's input and weight.
        parts = ((T, K, N), (T, N, K), (N, T, K))
        seconds[N, K] = sum(linear_seconds(*part, sizes, clock) for part in parts)
    return sum(seconds[shape] for shape in shapes)


def _cell_seconds(config: Config, sizes: Sizes, clock: Clock) -> float:
    """Return the seconds of one layer's cell, forward and backward, by itself."""
    mixer, d_model = config.model.mixers[0], config.model.d_model
    H, shape = mixer.num_heads, (1, sizes.block_tokens, mixer.num_heads)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=clock.device, dtype=sizes.dtype)

    def run(f: torch.Tensor, i: torch.Tensor, **qkv: torch.Tensor) -> Tensors:
        gates = {"log_f": F.logsigmoid(f.float()), "log_i": i.float()}
        options = {"gate": "exp", "normalize": True, "chunk_size": mixer.chunk_size}
        return {"y": gated_linear_attention(**qkv, **gates, **options)[0]}

    qk, v = mixer.qk_dim(d_model) // H, mixer.v_dim(d_model) // H
    inputs = {"q": draw(*shape, qk), "k": draw(*shape, qk), "v": draw(*shape, v)}
    inputs |= {"f": draw(*shape) + 3, "i": draw(*shape)}
    return timed(forward_backward(Form("cell", run), inputs), clock, sizes.rounds).median
