"""Checks of what a mixer declares: sizes, costs, plans, names, seeds, and its weights in files."""

from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megarec.checkpoint import dcp
from megarec.config.mixer import MixerConfig
from megarec.config.model import ModelConfig
from megarec.config.schema import SAVED_OPS
from megarec.errors import UserError
from megarec.models.backbone import Backbone, build_model
from megarec.models.context import Context
from megarec.models.mixer import Mixer
from megarec.models.recompute import find_ops
from megarec.parallel.tensor import divided_dim
from megarec.testing.case import NUM_ROWS, NUM_TOKENS, Case, close, kernels, require
from megarec.testing.memory import LiveBytes

PLAN_STYLES = ("column", "row", "head", "replicate")
FLOP_LENGTHS = (8, 32)
"""Powers of 2, as chunks are: others are cut into chunks more evenly than an estimate knows."""

LEFT_OUT = 0.3
"""Share of the work inside chunks that an estimate may leave out: sums of gates, a normaliser, and
whether a triangle of L x L has half as many elements or L / 2 more."""

KEPT = 0.1
"""By what share an estimate of activations may be off: it leaves out a mask of attention, what is
padded, and numbers of which there are a few a token."""


@torch.no_grad()
def sizes(case: Case) -> None:
    """`num_params` and `state_bytes` equal what is built, at several lengths."""
    config, model = case.config, case.model()
    _equal("num_params", config.num_params(), sum(p.numel() for p in model.parameters()))
    for mixer in _different_mixers(config):
        built = sum(p.numel() for p in mixer.build(config.d_model).parameters())
        _equal(f"{mixer.type}: num_params", mixer.num_params(config.d_model), built)
    for num_tokens in (1, 6, NUM_TOKENS):
        _, state = model(case.ids(1, num_tokens), return_state=True)
        built = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        _equal(f"state_bytes after {num_tokens} tokens", config.state_bytes(num_tokens), built)


@torch.no_grad()
def flops(case: Case) -> None:
    """`flops_per_token` equals the matmuls that run, at two lengths and two widths.

    Two kinds of mixers are told apart by whether a step costs more as its memory grows. If so, the
    estimate is the mean cost of a step, exactly. If not, the sequence is computed in chunks: what
    the first token costs, and half of what the cost grows by with length, since a causal kernel
    skips the other half of each chunk (the eager one masks it).
    """
    for width in (case.config.d_model, 2 * case.config.d_model):
        config = case.config.model_copy(update={"d_model": width})
        for mixer in _different_mixers(config):
            _check_mixer_flops(mixer, width)
        # What is left is the FFNs, the stack and the head: plain matmuls.
        length = FLOP_LENGTHS[0]
        claimed = config.flops_per_token(length) / 3
        real = _flops(partial(build_model(config).eval(), case.ids(1, length))) / length
        for mixer in [block.mixer for block in config.runs if block.mixer is not None]:
            claimed -= mixer.flops_per_token(width, length)
            real -= _forward_flops(mixer.build(width), width, length)
        _equal(f"d_model={width}: FLOPs per token outside the mixers", claimed, real)


def _check_mixer_flops(config: MixerConfig, d_model: int) -> None:
    mixer = config.build(d_model)
    first, second = (_forward_flops(mixer, d_model, length) for length in (1, 2))
    grows = _step_flops(mixer, d_model, 2) > _step_flops(mixer, d_model, 1)
    claimed_first = config.flops_per_token(d_model, 1)
    for length in (1, *FLOP_LENGTHS):
        claimed = config.flops_per_token(d_model, length)
        where = f"{config.type}: flops_per_token(d_model={d_model}, seq_len={length})"
        if grows:
            _equal(where, claimed, _step_flops(mixer, d_model, length))
        elif length == 1:
            _between(where, claimed, first - (second - first), first)
        else:
            growth = (_forward_flops(mixer, d_model, length) - first) / 2
            where = f"{where}, what it adds to seq_len=1"
            _between(where, claimed - claimed_first, (1 - LEFT_OUT) * growth, growth)


def _forward_flops(mixer: Mixer, d_model: int, num_tokens: int) -> float:
    x_BTD = torch.zeros(1, num_tokens, d_model)
    return _flops(lambda: mixer(x_BTD, Context())) / num_tokens


def _step_flops(mixer: Mixer, d_model: int, num_tokens: int) -> float:
    def loop() -> None:
        state = mixer.init_state(1, torch.device("cpu"))
        for _ in range(num_tokens):
            _, state = mixer.step(torch.zeros(1, d_model), state)

    return _flops(loop) / num_tokens


def _flops(function: Callable[[], object]) -> int:
    # Fused attention is not counted on CPU, nor is baddbmm in place.
    rules = {torch.ops.aten.baddbmm_: _baddbmm_flops}
    with (
        kernels("eager"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=rules) as counter,
    ):
        function()
    return counter.get_total_flops()


def _baddbmm_flops(_: object, a: tuple[int, ...], b: tuple[int, ...], **kwargs: object) -> int:
    num_matrices, rows, inner = a
    return 2 * num_matrices * rows * inner * b[2]


def activations(case: Case) -> None:
    """`activations` of each block is what its forward pass keeps, all of it and under `selective`.

    In float32 and bfloat16, on packed documents.
    """
    config = case.config
    for model in (case.model(), case.narrow_model()):
        dtype = model.embedding.weight.dtype
        width = dtype.itemsize
        for name in dict.fromkeys(config.pattern):
            block = model.block(config.pattern.index(name))
            needs = config.blocks[name].activations(config.d_model, NUM_TOKENS)
            shape = NUM_ROWS, NUM_TOKENS, config.d_model
            x_BTD = torch.randn(shape, dtype=dtype, requires_grad=True)
            saved = width * config.d_model + needs.saved.bytes(width)
            for how, claimed in (("none", needs.kept.bytes(width)), ("selective", saved)):
                block.recompute = how == "selective"
                block.saved_ops = find_ops(SAVED_OPS)
                with kernels("eager"), LiveBytes() as live:
                    y_BTD = block(x_BTD.clone(), case.packed())[0]
                    kept = live.bytes() - y_BTD.untyped_storage().nbytes()
                where = f"block {name}: activations, {width} bytes a number, {how}: bytes a token"
                real = kept / (NUM_ROWS * NUM_TOKENS)
                _between(where, claimed, (1 - KEPT) * real, (1 + KEPT) * real)


def declarations(case: Case) -> None:
    """`tp_plan` and `hf_names` cover every parameter; `float32_modules` exist.

    A plan covers each exactly once, with a style of PLAN_STYLES, and no glob of it is useless.
    """
    for config in _different_mixers(case.config):
        with torch.device("meta"):
            mixer = config.build(case.config.d_model)
        kind, plan = type(mixer).__name__, mixer.tp_plan()
        names = [name for name, _ in mixer.named_parameters()]
        for name in names:
            globs = [glob for glob in plan if fnmatch(name, glob)]
            require(len(globs) == 1, f"{kind}.tp_plan: {name} is covered by {globs}, expected one")
        for glob, style in plan.items():
            useful = any(fnmatch(name, glob) for name in names)
            require(useful, f"{kind}.tp_plan: '{glob}' fits no parameter")
            known = f"expected one of {', '.join(PLAN_STYLES)}"
            require(style in PLAN_STYLES, f"{kind}.tp_plan: '{glob}' is '{style}', {known}")
        named = mixer.hf_names()
        differing = sorted(set(names) ^ set(named))
        require(not differing, f"{kind}.hf_names: not the parameters: {', '.join(differing)}")
        modules = dict(mixer.named_modules())
        for name in mixer.float32_modules:
            kept = name in modules and any(True for _ in modules[name].parameters())
            require(kept, f"{kind}.float32_modules: no module with parameters is called '{name}'")


@torch.no_grad()
def division(case: Case) -> None:
    """What two ranks of tensor parallelism make of a mixer, by `tp_plan`, adds up to the whole.

    A mixer whose `tp_sizes` are None, or that two do not divide, is left out.
    """
    layers = zip(case.model().double().layers(), case.config.layers, strict=True)
    for (_, block), config in layers:
        mixer, sizes = block.mixer, None if config.mixer is None else config.mixer.tp_sizes()
        if mixer is None or sizes is None or any(size % 2 for size in sizes.values()):
            continue
        generator = torch.Generator().manual_seed(0)
        shape = NUM_ROWS, NUM_TOKENS, case.config.d_model
        x_BTD = torch.randn(shape, dtype=torch.float64, generator=generator)
        whole, _ = mixer(x_BTD, case.packed())
        parts = torch.zeros_like(whole)
        for rank in range(2):
            parameters = {
                name: p if dim is None else p.chunk(2, dim)[rank]
                for name, p in mixer.named_parameters()
                for dim in [divided_dim(name, p, mixer.tp_plan())]
            }
            parts += functional_call(mixer, parameters, (x_BTD, case.packed()))[0]
        case.close(f"{type(mixer).__name__}: the sum of two parts", parts, whole, 1e-10)


def seeds(case: Case) -> None:
    """The same seed gives the same weights, another one others, and no two layers are alike."""
    first, again, other = (build_model(case.config, seed=seed).state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        close(f"seed 1 twice: {name}", again[name], tensor, 0)
    # Constants, such as the scale of a norm, do not depend on the seed.
    drawn = {name for name, tensor in first.items() if not torch.equal(tensor, other[name])}
    require("embedding.weight" in drawn, "the embedding does not depend on the seed")
    drawn_in: list[set[str]] = []
    for i, block in enumerate(case.config.layers):
        prefix = f"blocks.{i}."
        leaves = {name.removeprefix(prefix) for name in drawn if name.startswith(prefix)}
        for part in ("mixer", "ffn"):
            found = any(leaf.startswith(f"{part}.") for leaf in leaves)
            needed = getattr(block, part) is not None
            require(found or not needed, f"nothing in {prefix}{part} depends on the seed")
        for earlier, others in enumerate(drawn_in):
            for leaf in leaves & others:
                alike = torch.equal(first[f"blocks.{earlier}.{leaf}"], first[prefix + leaf])
                require(not alike, f"{leaf} is the same in blocks {earlier} and {i}")
        drawn_in.append(leaves)


def checkpoint(case: Case) -> None:
    """A checkpoint that is written and read into another model restores every bit."""
    model, other = case.model(seed=0), case.model(seed=1)
    with TemporaryDirectory() as folder:
        dcp.write(Path(folder), dcp.model_tensors(model))
        dcp.read(Path(folder), dcp.model_tensors(other))
    _same_weights("checkpoint", other.state_dict(), model.state_dict())


@torch.no_grad()
def export(case: Case) -> None:
    """An export to Hugging Face format that is imported again restores every bit.

    Where no architecture of transformers represents the model, the export is refused: each line
    says to what, and why, and nothing is written.
    """
    from megarec.conversion import export_hf, import_hf

    model = case.model()
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "export"
        try:
            export_hf(model, folder)
        except UserError as error:
            for line in error.lines:
                reason = line.startswith("export to ") and line.count(": ") > 0
                require(reason, f"a refused export says '{line}', expected 'export to X: reason'")
            require(not any(Path(parent).iterdir()), "a refused export left files behind")
            return
        config, tensors = import_hf(folder)
        imported = Backbone(config).eval()
        imported.load_state_dict(tensors)
    _same_weights("export and import", imported.state_dict(), model.state_dict())
    logits = imported.double()(case.ids())
    case.close("logits after export and import", logits, model.double()(case.ids()), 1e-10)


def _same_weights(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        require(name in found, f"{what}: {name} is missing")
        close(f"{what}: {name}", found[name], tensor, 0)


def _different_mixers(config: ModelConfig) -> list[MixerConfig]:
    blocks = [config.blocks[name] for name in dict.fromkeys(config.pattern)]
    return [block.mixer for block in blocks if block.mixer is not None]


def _equal(what: str, claimed: float, real: float) -> None:
    require(abs(claimed - real) <= 1e-9 * real, f"{what}: {claimed:,}, but it is {real:,}")


def _between(what: str, claimed: float, low: float, high: float) -> None:
    holds = low * (1 - 1e-9) <= claimed <= high * (1 + 1e-9)
    require(holds, f"{what}: {claimed:,}, but it is between {low:,} and {high:,}")
