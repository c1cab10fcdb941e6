"""Checkpoints that are either whole or absent, hold no code, and say so when they were damaged.

A checkpoint is a folder of safetensors files and one `state.json` that names them with their SHA-256. It is written
beside its final place, forced to the disk and then renamed, so that a crash at any time leaves the previous one whole.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from minids.config import ModelConfig
from minids.files import save_tensors, written_whole
from minids.model.fp8_linear import convert_to_fp8
from minids.model.transformer import MiniDS


def save_checkpoint(destination: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `tensors` (a safetensors file per key) and `state` (JSON) as the folder `destination`, or nothing.

    Raises `ValueError` where `destination` exists already, `OSError` where the disk refuses.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists already")
    with written_whole(destination) as folder:
        for name, content in tensors.items():
            content = {key: tensor.detach().contiguous().cpu() for key, tensor in content.items()}
            save_tensors(content, folder / f"{name}.safetensors")
        write_state(folder, state)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Make a checkpoint of the safetensors files in `folder`."""
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    fields = {"files": digests, "state": state}
    (folder / "state.json").write_text(json.dumps(fields | {"digest": _digest_of_fields(fields)}, indent=1))


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote. Raises `ValueError` naming the file that is missing, damaged or changed."""
    state, tensors = read_state(folder), {}
    for path in folder.glob("*.safetensors"):
        try:
            tensors[path.stem] = load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return tensors, state


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are all there as they were written; else raises `ValueError`."""
    try:
        fields = json.loads((folder / "state.json").read_text())
        intact = fields.pop("digest") == _digest_of_fields(fields)
    except FileNotFoundError:
        raise ValueError(f"{folder} is no checkpoint: it has no state.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{folder / 'state.json'} is damaged: its content is not what was saved")
    for name, digest in fields["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing from the checkpoint")
        if _digest(path) != digest:
            raise ValueError(f"{path} is damaged: its content is not what was saved")
    return fields["state"]


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step in `directory`, a folder of `step-...` folders."""
    return max(directory.glob("step-*"), default=None)


def load_model(directory: Path) -> MiniDS:
    """The model of a run's newest checkpoint. Raises `ValueError` where there is none or it is damaged."""
    newest = latest_checkpoint(directory / "checkpoints")
    if newest is None:
        raise ValueError(f"{directory} holds no checkpoint")
    tensors, state = load_checkpoint(newest)
    with torch.device("meta"):
        model = MiniDS(ModelConfig.from_dict(state["config"]))
    model.load_state_dict(tensors["model"], assign=True)
    if state.get("recipe", {}).get("precision") == "fp8":
        convert_to_fp8(model)
    return model


def optimizer_tensors(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The state of every parameter under the parameter's name: `layers.0.ffn.up_proj.weight/exp_avg`.

    A step count becomes a vector of one element, since torch's distributed writer loses scalars.
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
    """The inverse of `optimizer_tensors`."""
    owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter not in owners:
            raise ValueError(f"checkpoint holds optimizer state of {parameter_name!r}, which this model does not train")
        owners[parameter].state[parameter][key] = tensor[0].cpu() if key == "step" else tensor.to(parameter.device)


def random_states(model: torch.nn.Module) -> dict[str, Tensor]:
    """The states of the generators that a step could draw from."""
    states = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _digest_of_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
