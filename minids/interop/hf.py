"""Import and export of DeepSeek-V3 and V3.2 checkpoints in Hugging Face's format: config.json and safetensors.

Notable choices:
- names, shapes and dtypes are checked from the files' headers before memory is allocated for the model;
- tensors are copied from the memory-mapped files into the model one at a time; nothing is unpickled;
- an export is written atomically.
Not covered: flipped bits inside a tensor, because safetensors files have no checksums.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minids.config import ModelConfig
from minids.data.tokenizer_base import Tokenizer
from minids.files import atomic_directory, save_tensors
from minids.fp8.formats import dequantize, quantize
from minids.interop.names import (
    BUFFER,
    EMBEDDING,
    across,
    is_layer_matrix,
    released_in_fp8,
    released_tensors,
    shared_copies,
)
from minids.model.transformer import MiniDS

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FP8_BLOCK = (128, 128)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*FP8_BLOCK]}
SCALES = ("F32", "BF16", "F16", "F64", "F8_E8M0")  # formats of FP8's scales; E8M0 holds powers of two
EXPORTED = re.compile(
    r"((|tokenizer_|generation_)config|tokenizer|model\.safetensors\.index)\.json|chat_template\.jinja"
    r"|model(-\d{5}-of-\d{5})?\.safetensors"
)
LOG = logging.getLogger(__name__)


@torch.no_grad()
def save_pretrained(
    model: MiniDS,
    directory: str | os.PathLike,
    *,
    fp8: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` and `load_pretrained` can read.

    Tensors keep their dtype; with `fp8` the matrices that the release has in FP8 (`released_in_fp8`) are written as
    there, in E4M3 with a float32 scale per block of 128 x 128 (FACTS.md section 5). Above `max_shard_bytes` the tensors
    are distributed over several files with an index. A `tokenizer` is written beside them.
    `directory` may be new, empty or an earlier export, which is replaced once the new one is complete. Raises
    `ValueError` for any other directory and for a model that a DeepSeek-V3 or V3.2 config cannot express, `OSError` if
    writing fails.
    """
    directory = Path(directory)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    _check_replaceable(directory)
    fields = _config_fields(model)
    tensors = {name: across(name, tensor) for name, tensor in released_tensors(model).items()}
    if fp8:
        tensors = {part: each for name, tensor in tensors.items() for part, each in _in_fp8(name, tensor).items()}
        fields["quantization_config"] = FP8
    # Cloned, because safetensors does not accept two names for the same memory.
    tensors |= {copy: tensors[original].clone() for copy, original in shared_copies(model.config).items()}
    shards = _shards(tensors, max_shard_bytes)
    with atomic_directory(directory) as folder:
        _write_json(folder / CONFIG, fields)
        if tokenizer is not None:
            tokenizer.save(folder)
        for file, names in shards.items():
            shard = {name: tensors[name].contiguous() for name in names}
            save_tensors(shard, folder / file)
            shutil.copymode(folder / CONFIG, folder / file)  # safetensors makes files readable by the owner only
        if len(shards) > 1:
            size = sum(tensor.nbytes for tensor in tensors.values())
            weight_map = {name: file for file, names in shards.items() for name in names}
            _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


@torch.no_grad()
def load_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mtp: bool = True,
) -> MiniDS:
    """Load a DeepSeek-V3, V3.2 or V2 folder: a release (also in FP8), one of transformers, or an export of minids.

    The model has the dtype of the stored embedding unless `dtype` is given; FP8 weights are dequantised to it. It has
    as many MTP modules as the files, or none if `mtp` is false; it shares embedding and head with them, so copies that
    differ are logged and ignored, as is an MTP module that does not follow the last layer. Buffers that every reader
    recomputes are ignored. Raises `ValueError` naming the file, field or tensor that is missing, unexpected, damaged,
    of another shape or dtype, or not DeepSeek's.
    """
    directory = Path(directory)
    config = read_config(directory)
    block = _fp8_block(_read_json(directory / CONFIG))
    with ExitStack() as stack:
        files = {name: file for name, file in _open_tensors(directory, stack).items() if not BUFFER.search(name)}
        least = config.num_hidden_layers + config.num_moe_layers * config.n_routed_experts
        if len(files) < least:  # a damaged config could demand a billion layers
            raise ValueError(f"{directory}: holds {len(files)} tensors, a model of its config.json at least {least}")
        files, modules = _select_mtp(files, config.num_hidden_layers, mtp)
        with torch.device("meta"):
            model = MiniDS(config.replace(num_nextn_predict_layers=modules))
        _check_tensors(files, model, block)

        model.to(dtype or files[EMBEDDING].get_slice(EMBEDDING)[:1].dtype).to_empty(device=device)
        for name, place in released_tensors(model).items():
            place.copy_(across(name, _read(files, name, block)))
    return model


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """Read the config.json of a folder that `load_pretrained` can load. Raises `ValueError` as it does."""
    fields = _read_json(Path(directory) / CONFIG)
    own = fields.get("minids", {})  # the fields of an export of minids that Hugging Face's cannot express
    if not isinstance(own, dict):
        raise ValueError(f"minids={own!r}: must be an object")
    return ModelConfig.from_dict(ModelConfig.from_hf(fields).to_dict() | own)


def _config_fields(model: MiniDS) -> dict[str, Any]:
    """Build config.json: Hugging Face's fields, and under "minids" the fields that they cannot express."""
    fields = model.config.to_hf()
    kept = ModelConfig.from_hf(fields).to_dict()
    return fields | {
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        # Special tokens are defined by the tokenizer; without these entries transformers would use 0 and 1.
        "bos_token_id": None,
        "eos_token_id": None,
        "minids": {name: value for name, value in model.config.to_dict().items() if value != kept[name]},
    }


def _fp8_block(fields: dict[str, Any]) -> tuple[int, int] | None:
    """Return the block size of an FP8 checkpoint, None without quantisation. Raises ValueError for other formats."""
    quantization = fields.get("quantization_config")
    match quantization:
        case None:
            return None
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(f"quantization_config={quantization!r}: must be fp8 with a weight_block_size of two integers")


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> dict[str, list[str]]:
    """Assign tensors to files in order; a new file starts if the next tensor would exceed `max_bytes`."""
    groups: list[list[str]] = [[]]
    free_bytes = max_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > free_bytes and groups[-1]:
            groups.append([])
            free_bytes = max_bytes
        groups[-1].append(name)
        free_bytes -= tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, start=1)}


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Open all files; map each tensor to its file. A single file takes precedence over an index, as in transformers."""
    index = None
    if not (directory / SINGLE).exists():
        if not (directory / INDEX).exists():
            raise ValueError(f"{directory}: holds neither {SINGLE} nor {INDEX} (pickled weights are never read)")
        index = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or any(not isinstance(f, str) or Path(f).name != f for f in index.values()):
            raise ValueError(f"{directory / INDEX}: weight_map must name a file beside it for each tensor")
    files: dict[str, Any] = {}
    held_by: dict[str, str] = {}
    for file in [SINGLE] if index is None else sorted(set(index.values())):
        try:
            opened = stack.enter_context(safe_open(directory / file, "pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{directory / file}: cannot be read: {_reason(directory / file, error)}") from None
        files |= dict.fromkeys(opened.keys(), opened)
        held_by |= dict.fromkeys(opened.keys(), file)
    if index is not None and index != held_by:
        name = min(name for name in index.keys() | held_by.keys() if index.get(name) != held_by.get(name))
        raise ValueError(f"{name}: {INDEX} names the file {index.get(name)}, but it is in {held_by.get(name)}")
    return files


def _reason(path: Path, error: Exception) -> str:
    """Return why a file cannot be read; a pointer of Git LFS is a small text in the place of the file."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            return "it is a Git LFS pointer: fetch the file itself with git lfs pull"
    return str(error)


def _select_mtp(files: dict[str, Any], layers: int, mtp: bool) -> tuple[dict[str, Any], int]:
    """Return the files without unused MTP modules, and the number of MTP modules in them.

    Module k is layer `layers` + k. A model that was cut to fewer layers may have kept the module of the whole model,
    under its old number: it continues a layer that is not there.
    """
    matches = {name: re.match(r"model\.layers\.(\d+)\.", name) for name in files}
    beyond = {name: int(match[1]) for name, match in matches.items() if match and int(match[1]) >= layers}
    projected = {i for name, i in beyond.items() if ".eh_proj." in name}
    following = layers
    while following in projected:
        following += 1
    stale = {i for i in projected if i >= following}
    if stale and mtp:
        LOG.warning("ignored: the MTP modules in layers %s, which do not follow layer %s", sorted(stale), layers - 1)
    used = {name: i for name, i in beyond.items() if mtp and i not in stale}
    kept = {name: file for name, file in files.items() if name not in beyond or name in used}
    return kept, len(set(used.values()))


def _check_tensors(files: dict[str, Any], model: MiniDS, block: tuple[int, int] | None) -> None:
    """Compare the files' headers with the tensors of the model; only the values of shared weights are read."""
    shapes = {name: list(tensor.shape) for name, tensor in released_tensors(model).items()}
    copies = {copy: original for copy, original in shared_copies(model.config).items() if copy in files}
    if EMBEDDING not in files and (other := [name for name in files if name.endswith(EMBEDDING)]):
        raise ValueError(f"{EMBEDDING}: is missing; the files hold {other[0]}: remove the prefix from all names")
    scales = {}
    if block is not None:
        for name in [name for name in shapes if is_layer_matrix(name) and _scale_name(name) in files]:
            rows, columns = shapes[name]
            scales[_scale_name(name)] = [ceil(rows / block[0]), ceil(columns / block[1])]
    shapes |= scales
    for name in sorted(shapes.keys() | files.keys() - copies.keys()):
        if name not in files:
            raise ValueError(f"{name}: is missing")
        if name not in shapes:
            raise ValueError(f"{name}: is not a tensor of this model")
        stored = files[name].get_slice(name)
        quantized = ("F8_E4M3",) if _scale_name(name) in scales else ("F64", "F32", "F16", "BF16")
        formats = SCALES if name in scales else quantized
        if stored.get_shape() != shapes[name]:
            raise ValueError(f"{name}: has shape {stored.get_shape()}, must have {shapes[name]}")
        if stored.get_dtype() not in formats:
            raise ValueError(f"{name}: is stored as {stored.get_dtype()}, must be one of {', '.join(formats)}")
    for copy, original in copies.items():
        if not torch.equal(files[copy].get_tensor(copy), files[original].get_tensor(original)):
            LOG.warning("ignored: %s differs from %s, which the MTP module shares here", copy, original)


def _read(files: dict[str, Any], name: str, block: tuple[int, int] | None) -> Float[Tensor, "..."]:
    """Read one tensor; FP8 tensors are dequantised block by block (PITFALLS 21)."""
    tensor = files[name].get_tensor(name)
    scale_name = _scale_name(name)
    if block is None or scale_name not in files:
        return tensor
    return dequantize(tensor, files[scale_name].get_tensor(scale_name).float(), block)


def _in_fp8(name: str, tensor: Float[Tensor, "..."]) -> dict[str, Float[Tensor, "..."]]:
    """Return the tensors of an FP8 checkpoint for `tensor`: FP8 values and their scales, or the tensor itself."""
    if not released_in_fp8(name):
        return {name: tensor}
    values, scale = quantize(tensor, FP8_BLOCK)
    return {name: values, _scale_name(name): scale}


def _scale_name(name: str) -> str:
    return f"{name}_scale_inv"


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        if directory.is_symlink():
            raise ValueError(f"{directory}: is a link that leads nowhere, must be a directory")
        above = next(parent for parent in directory.absolute().parents if parent.exists())
        if not above.is_dir():
            raise ValueError(f"{directory}: {above} is a file, must be a directory")
        return
    if not directory.is_dir():
        raise ValueError(f"{directory}: is a file, must be a directory")
    names = sorted(path.name for path in directory.iterdir())
    foreign = [name for name in names if not EXPORTED.fullmatch(name)]
    if foreign or names and not (CONFIG in names and "minids" in _read_json(directory / CONFIG)):
        raise ValueError(f"{directory}: is not an earlier export (it holds {(foreign or names)[0]!r}): choose another")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
