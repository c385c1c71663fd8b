"""The device helper: the only place that speaks to torch.cuda."""

import os
import resource

import torch

from megarec.errors import UserError

# Dense bf16 tensor-core peaks, FLOP/s, from the vendors' data sheets (without sparsity).
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def select_device(wanted: str = "auto") -> torch.device:
    """Return the device of this process: cuda:LOCAL_RANK where there is one, else the CPU.

    Raises:
        UserError: `cuda` was asked for and there is no (or not this) GPU.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"device: process {index} of this machine needs GPU {index}, found {count}; "
            "start fewer processes or set device=cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def backend_for(device: torch.device) -> str:
    """Return the torch.distributed backend; gloo beside nccl serves CPU tensors."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work, so that a wall clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return a readable name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(device: torch.device) -> float | None:
    """Return the data-sheet bf16 peak in FLOP/s, or None for a device not in the table."""
    name = device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: GPU allocations, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
