"""Checkpoints: written atomically, verified by checksum, without executable code.

A checkpoint is a folder of safetensors files and a `state.json` with their SHA-256 digests. It is written beside its
destination, flushed to the disk and renamed, so a crash at any time leaves the previous checkpoint intact.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from minids.config import ModelConfig
from minids.files import atomic_directory, save_tensors
from minids.fp8.linear import convert_to_fp8
from minids.model.transformer import MiniDS

LOG = logging.getLogger(__name__)
# Tensor names of version 0.1, and the names that replaced them.
OLD_NAMES = {
    "attention.q_proj.0.weight": "attention.q_down_proj.weight",
    "attention.q_proj.1.weight": "attention.q_norm.weight",
    "attention.q_proj.2.weight": "attention.q_up_proj.weight",
}


def present_name(name: str) -> str:
    """Convert the name of a stored tensor or optimizer state to the current one."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def save_checkpoint(destination: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `tensors` (one safetensors file per key) and `state` (JSON) atomically to the folder `destination`.

    Raises `ValueError` if `destination` exists, `OSError` if writing fails.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists already: checkpoints are never overwritten")
    with atomic_directory(destination) as folder:
        for name, content in tensors.items():
            content = {key: tensor.detach().contiguous().cpu() for key, tensor in content.items()}
            save_tensors(content, folder / f"{name}.safetensors")
        write_state(folder, state)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state.json`, with `state` and the digests of all files in `folder`."""
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    fields = {"files": digests, "state": state}
    (folder / "state.json").write_text(json.dumps(fields | {"digest": _digest_of_fields(fields)}, indent=1))


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint: (tensors, state). Raises `ValueError` naming a file that is missing, damaged or changed.

    Only the files that state.json names are read; others are logged and ignored.
    """
    fields = _read_fields(folder)
    tensors = {}
    if extra := sorted({path.name for path in folder.iterdir()} - fields["files"].keys() - {"state.json"}):
        LOG.warning("ignored: %s in %s, which its state.json does not name", ", ".join(extra), folder)
    for path in (folder / name for name in fields["files"] if name.endswith(".safetensors")):
        try:
            tensors[path.stem] = {present_name(name): tensor for name, tensor in load_file(path).items()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return tensors, fields["state"]


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state of a checkpoint and verify all its files. Raises `ValueError` if one is missing or damaged."""
    return dict(_read_fields(folder)["state"])


def _read_fields(folder: Path) -> dict[str, Any]:
    """Read and verify what `write_state` wrote: "files", the digests by name, and "state"."""
    try:
        return _verified_fields(folder)
    except ValueError as error:
        older = [path for path in checkpoints(folder.parent) if path < folder and _is_whole(path)]
        again = "no earlier checkpoint is whole: start the run again"
        remedy = f"delete {folder} to go on from {older[-1].name}" if older else again
        raise ValueError(f"{error}; {remedy}") from None


def _verified_fields(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / "state.json").read_text())
        intact = fields.pop("digest") == _digest_of_fields(fields)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint: it has no state.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{folder / 'state.json'} is damaged: its checksum does not match")
    for name, digest in fields["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing from the checkpoint")
        if _digest(path) != digest:
            raise ValueError(f"{path} is damaged: its checksum does not match")
    return dict(fields)


def _is_whole(folder: Path) -> bool:
    try:
        _verified_fields(folder)
    except ValueError:
        return False
    return True


def checkpoints(directory: Path) -> list[Path]:
    """Find the folders `step-<number>` in `directory`, in the order of their steps."""
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def latest_checkpoint(directory: Path) -> Path | None:
    """Find the checkpoint with the highest step in `directory`; None if there is none."""
    return max(checkpoints(directory), default=None)


def load_model(directory: Path) -> MiniDS:
    """Load the model of a run's newest checkpoint. Raises `ValueError` if there is none or it is damaged."""
    newest = latest_checkpoint(directory / "checkpoints")
    if newest is None:
        raise ValueError(
            f"{directory} holds no checkpoint" if directory.exists() else f"there is no folder {directory}"
        )
    tensors, state = load_checkpoint(newest)
    with content_of(newest):
        config, weights = ModelConfig.from_dict(state["config"]), tensors["model"]
        if len(weights) < config.num_hidden_layers:  # a changed config could demand a billion layers
            raise KeyError(f"{len(weights)} weights of a model with {config.num_hidden_layers} layers")
        if len(kinds := {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}) > 1:
            raise TypeError(f"weights of several dtypes, {', '.join(sorted(map(str, kinds)))}")
        with torch.device("meta"):
            model = MiniDS(config)
        model.load_state_dict(weights, assign=True)
        if state.get("recipe", {}).get("precision") == "fp8":
            convert_to_fp8(model)
    return model


@contextmanager
def content_of(folder: Path) -> Iterator[None]:
    """Raise `ValueError` naming a checkpoint where the block finds that its files, although intact, do not fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        if "DefaultCPUAllocator" in str(error):  # out of memory, which torch reports so on CPUs
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} does not hold a run of this model: {type(error).__name__}: {reason}") from None


def optimizer_tensors(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Collect the optimizer states of all parameters by name, as in `layers.0.ffn.up_proj.weight/exp_avg`.

    A step count becomes a vector of one element, because torch's distributed writer drops scalars.
    """
    states = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    return {
        f"{name}/{key}": torch.atleast_1d(tensor)
        for name, parameter in model.named_parameters()
        for key, tensor in states.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Load the output of `optimizer_tensors`. Raises `ValueError` for states of parameters that are not trained."""
    owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or parameter not in owners:
            raise ValueError(f"checkpoint holds optimizer state of {parameter_name!r}, which this model does not train")
        owners[parameter].state[parameter][key] = tensor[0].cpu() if key == "step" else tensor.to(parameter.device)


def random_states(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the states of the random generators that a training step could use."""
    states = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restore the output of `random_states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _digest_of_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
