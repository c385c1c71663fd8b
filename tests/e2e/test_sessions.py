"""Whole sessions on one and two ranks: equal losses, exact resume, signals, non-finite steps."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from e2e_runs import STOP_STEP, held_out, losses, session, status
from safetensors.torch import load_file
from small import model_tree

from megarec.conversion.load import load_model
from megarec.errors import EXIT_PREEMPTED, RunError, UserError
from megarec.testing.distributed import run_ranks
from megarec.train.hooks.jsonl import read_metrics

HYBRID = {
    "blocks": {
        "M": {"mixer": {"type": "mamba2", "num_heads": 4, "head_dim": 16, "state_dim": 8}},
        "*": {"mixer": {"type": "attention", "num_heads": 4, "num_kv_heads": 2}},
        "-": {"ffn": {"type": "squared_relu", "d_ff": 48}},
    },
    "pattern": "M-*-",
    "num_layers": 4,
}
PARA = {
    "blocks": {
        "L": {"mixer": {"type": "para_lstm"}, "ffn": {"d_ff": 48}, "learned_skip": True},
        "G": {"mixer": {"type": "para_gru"}, "ffn": {"d_ff": 48}, "learned_skip": True},
    },
    "pattern": "LG",
}
SKIP = {"nonfinite": {"policy": "skip", "max_consecutive": 1}}
WORLDS = ("one", "two")


def both_worlds(rank: int, world_size: int, runs: str) -> dict[str, int]:
    """Run everything that one launch can hold; returns exit codes."""
    folder = Path(runs)
    codes = {"golden": session(folder, "golden")}
    codes["stopped"] = session(folder, "resumed", hooks=["e2e_runs:StopOneRank"])
    if rank == 0:
        shutil.copytree(folder / "resumed", folder / "stopped")
    # The hook is no part of what is trained, but the config differs: force says it is meant.
    codes["resumed"] = session(folder, "resumed", force=True)
    os.environ["MEGAREC_FAULT"] = f"after_backward:4:{world_size - 1}:nan"
    codes["skipped"] = session(folder, "skipped", train=SKIP)
    del os.environ["MEGAREC_FAULT"]
    tied = {"head": {"tie_embeddings": True, "soft_cap": 30.0}}
    codes["tied"] = session(folder, "tied", model=tied, train={"steps": 4})
    recompute = {"activation_checkpointing": "full", "reshard_after_forward": False}
    codes["recomputed"] = session(folder, "recomputed", parallel=recompute)
    bfloat16 = {"compute": "bfloat16"}
    codes["bfloat16"] = session(folder, "bfloat16", precision=bfloat16, train={"steps": 4})
    codes["hybrid"] = session(folder, "hybrid", model=HYBRID, precision=bfloat16)
    codes["para"] = session(folder, "para", model=PARA)
    codes["para stopped"] = session(
        folder, "para_resumed", model=PARA, hooks=["e2e_runs:StopOneRank"]
    )
    codes["para resumed"] = session(folder, "para_resumed", model=PARA, force=True)
    # A teacher of this very folder, sharded like the student, whose embedding does not train.
    codes["distilled"] = session(
        folder,
        "distilled",
        model=HYBRID,
        distill={"teacher": str(folder / "golden"), "ce_weight": 0.5},
        optimizer={"lr_scale": {"embedding.*": 0.0, "blocks.0.*": 0.5}},
        train={"steps": 6},
    )
    codes["asynchronous"] = session(folder, "asynchronous", checkpoint={"asynchronous": True})
    return codes


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the runs folder of the same sessions on one and on two ranks."""
    folders = {}
    for name, world_size in zip(WORLDS, (1, 2), strict=True):
        folders[name] = tmp_path_factory.mktemp(name)
        for codes in run_ranks(both_worlds, world_size, str(folders[name])):
            assert codes.pop("stopped") == codes.pop("para stopped") == EXIT_PREEMPTED
            assert set(codes.values()) == {0}
    return folders


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_learns_and_leaves_what_it_should(worlds: dict[str, Path], world: str) -> None:
    runs = worlds[world]
    assert len(losses(runs, "golden")) == 12
    before, after = held_out(runs, "golden")
    assert after < before - 0.5
    assert status(runs, "golden")["state"] == "done"
    run = runs / "golden"
    assert (run / "checkpoints/latest").read_text().strip() == "step_00000012"
    kept = sorted(p.name for p in (run / "checkpoints").glob("step_*"))
    assert kept == ["step_00000008", "step_00000012"]
    info = json.loads((run / "run.json").read_text())
    assert info["versions"]["torch"] and info["world_size"] == (2 if world == "two" else 1)
    assert not (run / "lock").exists()


def test_two_ranks_equal_one(worlds: dict[str, Path]) -> None:
    for run in ("golden", "tied", "distilled", "para"):
        one, two = losses(worlds["one"], run), losses(worlds["two"], run)
        assert two[0] == pytest.approx(one[0], rel=1e-6)
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_student_learns_from_its_teacher(worlds: dict[str, Path], world: str) -> None:
    records = list(read_metrics(worlds[world] / "distilled/metrics.jsonl"))
    steps = [record for record in records if "loss" in record]
    assert steps[-1]["divergence"] < 0.9 * steps[0]["divergence"]
    for step in steps:
        expected = step["divergence"] + 0.5 * step["cross_entropy"]
        assert step["loss"] == pytest.approx(expected, rel=1e-5)
    weights = [
        load_model(worlds[world] / "distilled/checkpoints" / step)[0].embedding.weight
        for step in ("step_00000004", "step_00000006")
    ]
    assert torch.equal(*weights)


@pytest.mark.parametrize("world", WORLDS)
def test_a_hybrid_learns_in_bfloat16(worlds: dict[str, Path], world: str) -> None:
    before, after = held_out(worlds[world], "hybrid")
    assert after < before - 0.3


@pytest.mark.parametrize("world", WORLDS)
def test_a_signal_to_one_rank_stops_all_and_resume_is_bitwise(
    worlds: dict[str, Path], world: str
) -> None:
    runs = worlds[world]
    # The flag travels with the counts of a step's batch: that step is still made.
    stopped = status(runs, "stopped")
    assert stopped["state"] == "preempted"
    assert STOP_STEP < stopped["step"] <= STOP_STEP + 2
    assert losses(runs, "stopped") == losses(runs, "golden")[: stopped["step"]]
    for whole, again in (("golden", "resumed"), ("para", "para_resumed")):
        assert losses(runs, again) == losses(runs, whole)
        assert held_out(runs, again) == held_out(runs, whole)
        for shard in (runs / whole / "checkpoints/step_00000012").glob("*.safetensors"):
            golden = load_file(shard)
            resumed = load_file(runs / again / shard.relative_to(runs / whole))
            assert golden.keys() == resumed.keys()
            assert all(torch.equal(golden[key], resumed[key]) for key in golden)


@pytest.mark.parametrize("world", WORLDS)
def test_nonlinear_recurrences_learn(worlds: dict[str, Path], world: str) -> None:
    before, after = held_out(worlds[world], "para")
    assert after < before - 0.5
    steps = [r for r in read_metrics(worlds[world] / "para/metrics.jsonl") if "loss" in r]
    assert all(step["newton/residual"] < 1e-3 and step["newton/fallbacks"] == 0 for step in steps)


@pytest.mark.parametrize("world", WORLDS)
def test_memory_savers_change_nothing_and_bfloat16_little(
    worlds: dict[str, Path], world: str
) -> None:
    golden = losses(worlds[world], "golden")
    assert losses(worlds[world], "recomputed") == golden
    rounded = losses(worlds[world], "bfloat16")
    assert rounded != golden[:4] and rounded == pytest.approx(golden[:4], rel=0.01)


@pytest.mark.parametrize("world", WORLDS)
def test_asynchronous_checkpoints_hold_the_step_they_name(
    worlds: dict[str, Path], world: str
) -> None:
    for step in ("step_00000008", "step_00000012"):
        golden, background = (
            sorted((worlds[world] / name / "checkpoints" / step).glob("*.safetensors"))
            for name in ("golden", "asynchronous")
        )
        assert len(golden) == len(background) > 0
        for one, other in zip(golden, background, strict=True):
            tensors, copies = load_file(one), load_file(other)
            assert all(torch.equal(tensors[key], copies[key]) for key in tensors)


def resume_elsewhere(rank: int, world_size: int, runs: str) -> int:
    return session(Path(runs), "elsewhere", force=True)


@pytest.mark.parametrize(("world", "other"), [("one", 2), ("two", 1)])
def test_resume_on_another_world_size(worlds: dict[str, Path], world: str, other: int) -> None:
    runs = worlds[world]
    shutil.copytree(runs / "stopped", runs / "elsewhere")
    assert set(run_ranks(resume_elsewhere, other, str(runs))) == {0}
    assert losses(runs, "elsewhere") == pytest.approx(losses(runs, "golden"), rel=1e-6)


def pipeline(rank: int, world_size: int, runs: str) -> list[int]:
    model = model_tree(num_layers=4)
    stages = {"pp": 2, "pp_schedule": "interleaved_1f1b"}
    first = session(Path(runs), "run", model=model, parallel=stages)
    if rank == 0:
        shutil.copytree(Path(runs) / "run", Path(runs) / "again")
    dist.barrier()
    step = Path(runs) / "again" / "checkpoints" / "step_00000008"
    return [first, session(Path(runs), "again", model=model, resume=step, force=True)]


def one_process(rank: int, world_size: int, runs: str) -> list[int]:
    return [session(Path(runs), "run", model=model_tree(num_layers=4))]


def test_a_pipeline_equals_one_process_and_is_resumed_without(tmp_path: Path) -> None:
    piped, whole = tmp_path / "piped", tmp_path / "whole"
    assert run_ranks(pipeline, 2, str(piped)) == [[0, 0]] * 2
    assert run_ranks(one_process, 1, str(whole)) == [[0]]
    for name in ("run", "again"):
        assert losses(piped, name) == pytest.approx(losses(whole, "run"), rel=1e-5)
        assert held_out(piped, name)[-1] == pytest.approx(held_out(whole, "run")[-1], rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_nan_on_one_rank_skips_the_step_on_all(worlds: dict[str, Path], world: str) -> None:
    skipped, golden = losses(worlds[world], "skipped"), losses(worlds[world], "golden")
    # Steps 0 to 4 are as they were; step 5 sees the weights of step 4 and the next data.
    assert skipped[:5] == golden[:5]
    assert skipped[5] != golden[5]
    last = json.loads((worlds[world] / "skipped/metrics.jsonl").read_text().splitlines()[-2])
    assert last["skipped"] == 1


def test_policy_stop_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAREC_FAULT", "after_backward:5:0:nan")
    with pytest.raises(RunError, match=r"step 5: gradients not finite .* samples 40 to 47"):
        session(tmp_path, "stop")
    assert status(tmp_path, "stop")["state"] == "failed"
    assert (tmp_path / "stop/checkpoints/latest").read_text().strip() == "step_00000004"
    monkeypatch.delenv("MEGAREC_FAULT")
    assert session(tmp_path, "stop") == 0


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEGAREC_FAULT", "ckpt_before_manifest:8:0:enospc")
    with pytest.raises(UserError, match="checkpoint of step 8 .* was not saved: .*No space left"):
        session(tmp_path, "stop")
    assert (tmp_path / "stop/checkpoints/latest").read_text().strip() == "step_00000004"
    with caplog.at_level(logging.WARNING):
        going_on = {"on_save_error": "continue"}
        assert session(tmp_path, "goes_on", checkpoint=going_on) == 0
    assert "training goes on without this checkpoint" in caplog.text
    assert status(tmp_path, "goes_on")["state"] == "done"


def test_accumulation_equals_one_micro_batch(tmp_path: Path) -> None:
    session(tmp_path, "1x4", train={"micro_batch_size": 8, "steps": 5})
    session(tmp_path, "4x1", train={"micro_batch_size": 2, "steps": 5})
    assert losses(tmp_path, "1x4") == pytest.approx(losses(tmp_path, "4x1"), rel=1e-6)


def test_a_changed_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    short = {"steps": 2}
    assert session(tmp_path, "run", train=short) == 0
    with pytest.raises(UserError, match=r"optimizer.lr: 0.003 -> 0.1"):
        session(tmp_path, "run", train=short, optimizer={"lr": 0.1})


def test_keys_that_megarec_did_not_have_back_then_change_nothing(tmp_path: Path) -> None:
    short = {"steps": 2}
    assert session(tmp_path, "run", train=short) == 0
    config = tmp_path / "run/config.yaml"
    tree = yaml.safe_load(config.read_text())
    del tree["imports"], tree["model"]["embedding_scale"]
    config.write_text(yaml.safe_dump(tree))
    assert session(tmp_path, "run", train=short) == 0
    with pytest.raises(UserError, match=r"model.embedding_scale: 1.0 -> 2.0"):
        session(tmp_path, "run", train=short, model={"embedding_scale": 2.0})


def test_other_data_and_another_model_are_refused(tmp_path: Path) -> None:
    short = {"steps": 2}
    assert session(tmp_path, "run", train=short) == 0
    step = tmp_path / "run/checkpoints/step_00000002"
    longer = {"steps": 3, "seq_len": 16}
    with pytest.raises(UserError, match="was trained on other data"):
        session(tmp_path, "other", train=longer, resume=step)
    with pytest.raises(UserError) as caught:
        session(tmp_path, "wide", train=short, resume=step, model={"d_model": 64})
    assert 2 <= len(caught.value.lines) <= 11
    assert any("shape [32], expected [64]" in x for x in caught.value.lines)


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dp_replicate=1 x dp_shard=3 = 3"):
        session(tmp_path, "run", parallel={"dp_shard": 3})
    with pytest.raises(UserError, match="unknown hook 'progres'"):
        session(tmp_path, "run", hooks=["progres"])
    with pytest.raises(UserError, match=r"optimizer.lr_scale: 'blocks.9.\*' matches no parameter"):
        session(tmp_path, "run", optimizer={"lr_scale": {"blocks.9.*": 0.1}})
    with pytest.raises(UserError, match="nowhere: expected a run folder"):
        session(tmp_path, "run", distill={"teacher": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="data.train.text"):
        session(tmp_path, "run", data={"train": {"text": {"path": "nowhere"}}})
    assert not list(tmp_path.iterdir())


def test_trackers_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    logging_section = {"wandb": {"project": "test", "mode": "offline"}, "tensorboard": True}
    hooks = ["progress", "plot"]
    assert session(tmp_path, "run", logging=logging_section, hooks=hooks, train={"steps": 3}) == 0
    run = tmp_path / "run"
    assert list((run / "logs/tensorboard").glob("events*"))
    assert list((run / "logs/wandb").glob("offline-run-*"))
    assert (run / "plots/loss.png").stat().st_size > 10_000
