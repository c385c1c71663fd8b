"""The folder of a run: its layout, its lock, and the small files that describe the run."""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

import megarec
from megarec.checkpoint.atomic import write_atomic
from megarec.config.loader import read_yaml, validate_config
from megarec.errors import UserError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
TAKEOVER_SECONDS = 0.5
PACKAGES = ("numpy", "pydantic", "safetensors", "transformers", "megatron-core", "triton")

State = Literal["running", "done", "preempted", "failed"]


class RunFolder:
    """``runs/<name>/`` with one writer at a time. Only rank 0 calls its methods.

    config.yaml, run.json, status.json, lock, metrics.jsonl, logs/, checkpoints/, plots/, export/.
    """

    def __init__(self, path: Path, stale_after: float = STALE_SECONDS) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.info = path / "run.json"
        self.status = path / "status.json"
        self.lock = path / "lock"
        self.metrics = path / "metrics.jsonl"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self._stale_after = stale_after
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }

    def acquire(self) -> None:
        """Create the folder and lock it, or take over the lock of a run that is dead.

        A lock is stale when its process is gone from this host, or when nobody has touched it for
        `stale_after` seconds. Raises UserError when the lock is alive or the folder is unwritable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: {error.strerror}; expected a folder to write to"
            ) from error
        self._heart.start()

    def release(self) -> None:
        """Give the lock back; nothing happens where another run has taken it over."""
        self._released.set()
        self._heart.join()
        if self._read_owner() == self._owner:
            self.lock.unlink(missing_ok=True)

    def write_config(self, config: dict[str, Any], force: bool = False) -> None:
        """Write config.yaml once. `config` holds plain YAML values.

        Raises UserError, a line for each key that differs, when the folder has another config;
        `force` replaces it.
        """
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        if self.config.exists() and not force:
            old = _flatten(self._read_config())
            new = _flatten(yaml.safe_load(text))
            differences = [
                f"{self.config}: {key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}; "
                "a run keeps its config: choose another name, or force the new config"
                for key in sorted(old | new)
                if old.get(key, "absent") != new.get(key, "absent")
            ]
            if differences:
                raise UserError(*differences)
        else:
            write_atomic(self.config, text)

    def _read_config(self) -> dict[str, Any]:
        """Return config.yaml, with the defaults of keys that megarec did not have back then."""
        tree = read_yaml(self.config)
        try:
            return validate_config(tree, str(self.config)).model_dump(mode="json")
        except UserError:
            return tree  # The keys that it has and this version does not are among the differences.

    def write_info(self, *, device: str, world_size: int, **sizes: int) -> None:
        """Write run.json: versions, machine, world size and `sizes` (parameters, say)."""
        info = {
            "versions": _versions(),
            "host": self._owner["host"],
            "slurm_job_id": self._owner["slurm_job_id"],
            "device": device,
            "world_size": world_size,
            "started": _now(),
            **sizes,
        }
        write_atomic(self.info, json.dumps(info, indent=2) + "\n")

    def write_status(self, state: State, step: int) -> None:
        """Write status.json: the state of the run, its optimizer step and the time (UTC)."""
        status = {"state": state, "step": step, "time": _now()}
        write_atomic(self.status, json.dumps(status) + "\n")

    def _lock(self) -> None:
        text = json.dumps(self._owner) + "\n"
        try:
            descriptor = os.open(self.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            owner = self._read_owner()
            age = time.time() - self.lock.stat().st_mtime
            if not self._is_stale(owner, age):
                raise self._in_use(owner, age) from None
            # Two runs may both find it stale: the last writer wins, and each looks again.
            write_atomic(self.lock, text)
            time.sleep(TAKEOVER_SECONDS)
            owner = self._read_owner()
            if owner != self._owner:
                raise self._in_use(owner, 0.0) from None
        else:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)

    def _is_stale(self, owner: dict[str, Any], age: float) -> bool:
        here = owner.get("host") == self._owner["host"]
        return age > self._stale_after or (here and not _is_alive(owner["pid"]))

    def _in_use(self, owner: dict[str, Any], age: float) -> UserError:
        return UserError(
            f"run folder {self.path}: in use by pid {owner.get('pid')} on host {owner.get('host')} "
            f"(Slurm job {owner.get('slurm_job_id')}, last seen {age:.0f} s ago); wait for it, "
            "stop it, or choose another name"
        )

    def _read_owner(self) -> dict[str, Any]:
        # A lock without text is one that its owner is writing.
        try:
            return dict(json.loads(self.lock.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def _beat(self) -> None:
        while not self._released.wait(min(HEARTBEAT_SECONDS, self._stale_after / 4)):
            # One beat may fail on a network file system; the lock is stale only after many.
            with contextlib.suppress(OSError):
                if self._read_owner() != self._owner:
                    return
                os.utime(self.lock)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "megarec": megarec.__version__,
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
