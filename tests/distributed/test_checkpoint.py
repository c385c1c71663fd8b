"""Checkpoints on several ranks: bitwise, on any number of ranks, all or nothing."""

import os
import resource
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megarec.checkpoint import dcp
from megarec.checkpoint.manager import CheckpointError, CheckpointManager
from megarec.config.schema import CheckpointConfig
from megarec.errors import UserError
from megarec.testing.distributed import RankFailed, run_ranks


class Net(nn.Module):
    """Shapes that do not divide by two, a scalar parameter, a buffer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 5)
        self.out = nn.Linear(5, 6, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.out(torch.tanh(self.hidden(self.embed(ids_BT)))) * self.gain
        return self.head(x_BTD)


def build(seed: int, sharding: tuple[int, int] | None):
    torch.manual_seed(seed)
    model = Net()
    if sharding is not None:
        mesh = init_device_mesh("cpu", sharding, mesh_dim_names=("dp_replicate", "dp_shard"))
        fully_shard(model.hidden, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps: int) -> None:
    # Every rank sees the same batch: the number of ranks then changes no value.
    ids = torch.arange(8).reshape(2, 4) % 7
    for _ in range(steps):
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for name, t in tensors.items()
    }


def assert_bitwise(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def save(rank: int, world_size: int, folder: str, sharding: tuple[int, int], asynchronous: bool):
    config = CheckpointConfig(asynchronous=asynchronous)
    manager = CheckpointManager(Path(folder), config)
    model, optimizer = build(0, sharding)
    train(model, optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.save(2, dcp.training_tensors(model, optimizer), {"step": 2, "third": 1 / 3})
    saved = whole(dcp.training_tensors(model, optimizer))
    # An asynchronous save writes its copies while training goes on.
    train(model, optimizer, 1)
    manager.wait()
    continued = whole(dcp.training_tensors(model, optimizer))
    assert not torch.equal(continued["model.out.weight"], saved["model.out.weight"])
    return saved, continued


def load(rank: int, world_size: int, folder: str, sharding: tuple[int, int]):
    manager = CheckpointManager(Path(folder), CheckpointConfig())
    model, optimizer = build(rank + 10, sharding)
    with torch.no_grad():
        # Parameters gathered by an evaluation, which is when some runs load.
        model(torch.zeros(1, 1, dtype=torch.long))
    latest = manager.latest()
    state = manager.load(latest, dcp.training_tensors(model, optimizer))
    assert state == {"step": 2, "third": 1 / 3}
    restored = whole(dcp.training_tensors(model, optimizer))
    train(model, optimizer, 1)
    return restored, whole(dcp.training_tensors(model, optimizer))


MESHES = {"sharded": (2, (1, 2)), "replicated": (2, (2, 1)), "one rank": (1, (1, 1))}


@pytest.mark.parametrize(
    ("source", "asynchronous"),
    [("sharded", False), ("sharded", True), ("replicated", False), ("one rank", False)],
)
def test_round_trip_is_bitwise_on_any_mesh(source: str, asynchronous: bool, tmp_path: Path):
    ranks, sharding = MESHES[source]
    saved, continued = run_ranks(save, ranks, str(tmp_path), sharding, asynchronous)[0]
    assert "model.head.weight" not in saved  # tied: under its first name only
    assert saved["optimizer.gain.step"] == 2
    for target in ("sharded", "one rank") if asynchronous else MESHES:
        ranks, sharding = MESHES[target]
        for restored, resumed in run_ranks(load, ranks, str(tmp_path), sharding):
            assert_bitwise(restored, saved)
            if target == source:
                assert_bitwise(resumed, continued)


def test_a_plain_process_reads_only_the_model_from_a_sharded_checkpoint(tmp_path: Path):
    saved, _ = run_ranks(save, 2, str(tmp_path), (1, 2), False)[0]
    model, _ = build(5, None)
    tensors = dcp.model_tensors(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcp.read(tmp_path / "step_00000002", tensors, partial=True)
    assert_bitwise(tensors, {k: v for k, v in saved.items() if k.startswith("model.")})
    assert torch.equal(model.head.weight, saved["model.embed.weight"])


def test_reading_state_before_the_first_update_changes_nothing():
    model, optimizer = build(0, None)
    dcp.training_tensors(model, optimizer)
    train(model, optimizer, 3)
    reference, reference_optimizer = build(0, None)
    train(reference, reference_optimizer, 3)
    assert_bitwise(
        dcp.training_tensors(model, optimizer),
        dcp.training_tensors(reference, reference_optimizer),
    )


def failing_save(rank: int, world_size: int, folder: str, how: str, asynchronous: bool):
    manager = CheckpointManager(Path(folder), CheckpointConfig(asynchronous=asynchronous))
    model, optimizer = build(0, (1, 2))
    tensors = dcp.training_tensors(model, optimizer)
    manager.save(1, tensors, {})
    manager.wait()
    if how == "file size limit" and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    if how == "no permission" and rank == 0:
        Path(folder).chmod(0o500)
        if os.geteuid() == 0:
            os.seteuid(65534)
    message = ""
    try:
        manager.save(2, tensors, {})
        manager.wait()
    except CheckpointError as error:
        message = str(error)
    if how == "no permission" and rank == 0:
        os.seteuid(os.getuid())
    elif how == "file size limit" and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    latest = manager.latest()
    return [message, latest.name, sorted(path.name for path in Path(folder).iterdir())]


FAILURES = {
    "full disk, one rank": ("ckpt_shard_written:2:1:enospc", "rank 1: [Errno 28] No space left"),
    "full disk, manifest": ("ckpt_before_rename:2:0:enospc", "rank 0: [Errno 28] No space left"),
    "raised": ("ckpt_before_manifest:2:1:raise", "rank 1: injected fault"),
    "file size limit": (None, "rank 1: [Errno 27] File too large"),
    "no permission": (None, "rank 0: [Errno 13] Permission denied"),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("how", FAILURES)
def test_one_failed_rank_aborts_the_save_on_all(
    how: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fault, expected = FAILURES[how]
    if fault is not None:
        monkeypatch.setenv("MEGAREC_FAULT", fault)
    replies = run_ranks(failing_save, 2, str(tmp_path), how, asynchronous)
    tmp_path.chmod(0o700)
    for message, latest, names in replies:
        assert "checkpoint of step 2" in message and expected in message
        assert len(message.splitlines()) == 1
        assert latest == "step_00000001"
        assert names == ["latest", "step_00000001"]


def killed_save(rank: int, world_size: int, folder: str, asynchronous: bool):
    manager = CheckpointManager(Path(folder), CheckpointConfig(asynchronous=asynchronous))
    for step in (1, 2):
        manager.save(step, {"x": torch.full((3,), float(step))}, {"step": step})
    manager.wait()


@pytest.mark.parametrize(
    ("point", "survivor", "asynchronous"),
    [
        ("ckpt_shard_written", 1, False),
        ("ckpt_before_manifest", 1, False),
        ("ckpt_before_rename", 1, False),
        ("ckpt_before_rename", 1, True),
        ("ckpt_after_rename", 2, False),
    ],
)
def test_kill_9_leaves_a_usable_checkpoint(
    point: str,
    survivor: int,
    asynchronous: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MEGAREC_FAULT", f"{point}:2:0:kill9")
    with pytest.raises(RankFailed, match="rank 0 died with exit code -9"):
        run_ranks(killed_save, 2, str(tmp_path), asynchronous, timeout=20)
    monkeypatch.delenv("MEGAREC_FAULT")
    left = [path.name for path in tmp_path.glob("*.tmp-*")]
    assert bool(left) == (survivor == 1)
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    assert not list(tmp_path.glob("*.tmp-*"))
    tensors = {"x": torch.zeros(3)}
    assert manager.load(manager.latest(), tensors) == {"step": survivor}
    assert tensors["x"].tolist() == [survivor] * 3
    manager.save(2, tensors, {"step": 2})
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def refused_load(rank: int, world_size: int, folder: str):
    manager = CheckpointManager(Path(folder), CheckpointConfig())
    tensors = {"x": torch.ones(3)}
    manager.save(1, tensors, {})
    if rank == 0:
        manifest = Path(folder) / "step_00000001" / "manifest.json"
        manifest.write_text(manifest.read_text()[:50])
    fresh = CheckpointManager(Path(folder), CheckpointConfig())
    messages = []
    for attempt in (fresh.latest, lambda: fresh.load(Path(folder) / "step_00000001", tensors)):
        with pytest.raises(UserError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_a_damaged_checkpoint_is_refused_on_all_ranks(tmp_path: Path):
    for messages in run_ranks(refused_load, 2, str(tmp_path)):
        assert all("manifest.json: not a readable manifest" in message for message in messages)
