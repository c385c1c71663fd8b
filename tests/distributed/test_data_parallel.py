"""FSDP2 and HSDP: the same initial weights on any mesh, and what stays in float32."""

from typing import Any

import torch
from small import run_config
from torch.distributed.tensor import DTensor

from megarec.models import build_model
from megarec.parallel.apply import build_sharded_model
from megarec.parallel.mesh import build_mesh
from megarec.testing.distributed import run_ranks

MESHES = {"sharded": {"dp_shard": 2}, "replicated": {"dp_replicate": 2, "dp_shard": 1}}
CPU = torch.device("cpu")


def cases(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, parallel in MESHES.items():
        config = run_config(parallel=parallel)
        model = build_sharded_model(
            config, build_mesh(config.parallel, world_size, "cpu"), CPU
        ).model
        weights = {}
        for key, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            weights[key] = parameter.full_tensor().detach()
        results[name] = weights

    config = run_config(precision={"compute": "bfloat16"})
    model = build_sharded_model(config, build_mesh(config.parallel, world_size, "cpu"), CPU).model
    seen: dict[str, list[str]] = {}

    def record(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            weight = next(module.parameters())
            seen[name] = [str(weight.dtype), str(output.dtype)]

        return hook

    mixer = model.blocks["0"].mixer
    for name in ("q", "gates.igate"):
        mixer.get_submodule(name).register_forward_hook(record(name))
    ids = torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids)[0].backward()
    results["computed in"] = seen
    results["kept in"] = sorted({str(p.dtype) for p in model.parameters()})
    results["gradients in"] = sorted({str(p.grad.dtype) for p in model.parameters()})
    return results


def test_data_parallel() -> None:
    whole = dict(build_model(run_config().model, seed=run_config().seed).named_parameters())
    for result in run_ranks(cases, 2):
        for mesh in MESHES:
            assert result[mesh].keys() == whole.keys()
            assert all(torch.equal(result[mesh][key], whole[key]) for key in whole)
        assert result["computed in"] == {
            "q": ["torch.bfloat16", "torch.bfloat16"],
            "gates.igate": ["torch.float32", "torch.float32"],
        }
        assert result["kept in"] == result["gradients in"] == ["torch.float32"]
