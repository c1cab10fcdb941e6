"""Hugging Face folders, in and out: config.json and safetensors, named and laid out as DeepSeek released V3.

Notable choices:
- one table of names serves both directions; a layout that differs is read and written through a transposed view;
- names, shapes and number formats are checked from the files' headers before any memory is taken;
- each tensor goes from the memory-mapped file to its place in the model, one at a time; nothing is ever unpickled;
- an export is written beside its destination and moved there when it is complete and on disk.
Not covered: a flipped bit inside a tensor. Like every safetensors folder, this one carries no checksums.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minids.config import ModelConfig
from minids.model.transformer import MiniDS

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EXPORTED = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

TOP = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}  # fmt: skip
BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.q_proj.0.weight": "self_attn.q_a_proj.weight",
    "attention.q_proj.1.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_proj.2.weight": "self_attn.q_b_proj.weight",
    "attention.kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate_proj.weight": "mlp.gate_proj.weight",
    "ffn.up_proj.weight": "mlp.up_proj.weight",
    "ffn.down_proj.weight": "mlp.down_proj.weight",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.gate_proj.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up_proj.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down_proj.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.experts.gate_proj": "mlp.experts.{expert}.gate_proj.weight",
    "ffn.experts.up_proj": "mlp.experts.{expert}.up_proj.weight",
    "ffn.experts.down_proj": "mlp.experts.{expert}.down_proj.weight",
}
MTP = {
    "hidden_norm.weight": "hnorm.weight",
    "embedding_norm.weight": "enorm.weight",
    "proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
} | {f"block.{own}": released for own, released in BLOCK.items()}


def released_name(own: str, num_hidden_layers: int) -> str:
    """What the release calls a parameter of `MiniDS`; prediction module k is layer num_hidden_layers + k there."""
    if own in TOP:
        return TOP[own]
    room, i, rest = own.split(".", 2)
    if room == "layers":
        return f"model.layers.{i}.{BLOCK[rest]}"
    return f"model.layers.{num_hidden_layers + int(i)}.{MTP[rest]}"


def released_tensors(model: MiniDS) -> dict[str, Tensor]:
    """Every tensor of the release by name: a view of its place in the model, in the shape that the release gives it.

    The experts are stacked [expert, in, out] here and separate [out, in] there.
    """
    tensors = {}
    for own, parameter in model.named_parameters():
        name = released_name(own, model.config.num_hidden_layers)
        if parameter.ndim == 3:
            tensors |= {name.format(expert=e): weight.T for e, weight in enumerate(parameter.detach())}
        else:
            tensors[name] = parameter.detach()
    return tensors


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """The release repeats embedding and head in every prediction layer: {name of the copy: name of the original}."""
    copies = {}
    for i in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{i}.embed_tokens.weight"] = TOP["embedding.weight"]
        copies[f"model.layers.{i}.shared_head.head.weight"] = TOP["head.weight"]
    return copies


def across(name: str, tensor: Tensor) -> Tensor:
    """Carry a tensor over the border; the same in both directions.

    The MTP projection reads [hidden; embedding] here, as in the paper, and [embedding; hidden] in the release, so the
    halves of its columns change places (PITFALLS 17).
    """
    return tensor.roll(tensor.shape[1] // 2, dims=1) if name.endswith(".eh_proj.weight") else tensor


# Out.


@torch.no_grad()
def save_pretrained(model: MiniDS, directory: str | os.PathLike, *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` and `load_pretrained` read.

    Tensors keep their number format; beyond `max_shard_bytes` they are spread over several files with an index.
    `directory` may be new, empty or an earlier export; it changes only once the new one is complete. Raises
    `ValueError` for any other directory and for a model that a DeepSeek-V3 config cannot express, `OSError` where the
    disk refuses.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    fields = _config_fields(model)
    tensors = released_tensors(model)
    # A file may not hold the same memory twice, hence the clones.
    tensors |= {copy: tensors[original].clone() for copy, original in shared_copies(model.config).items()}
    shards = _shards(tensors, max_shard_bytes)
    with _complete_or_absent(Path(directory)) as folder:
        _write_json(folder / CONFIG, fields)
        for file, names in shards.items():
            shard = {name: across(name, tensors[name]).contiguous() for name in names}
            try:
                save_file(shard, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{directory}: not written: {error}") from None
            shutil.copymode(folder / CONFIG, folder / file)  # safetensors lets nobody but the owner read
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            place = {name: file for file, names in shards.items() for name in names}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": place})


def _config_fields(model: MiniDS) -> dict[str, Any]:
    """config.json: what Hugging Face knows, and under "minids" the fields that it would lose."""
    fields = model.config.to_hf()
    kept = ModelConfig.from_hf(fields).to_dict()
    return fields | {
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        # Token numbers are the tokenizer's affair; transformers would otherwise take 0 and 1.
        "bos_token_id": None,
        "eos_token_id": None,
        "minids": {name: value for name, value in model.config.to_dict().items() if value != kept[name]},
    }


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> dict[str, list[str]]:
    """Which file holds which tensors: in order, a new file where the next would exceed `max_bytes`."""
    groups, room = [[]], max_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, start=1)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _complete_or_absent(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory` that takes its place when the block succeeds, and is gone when it fails."""
    directory = directory.resolve()
    _check_replaceable(directory)
    aside = directory.with_name(f".{directory.name}.{uuid4().hex}")
    retired = aside.with_suffix(".old")
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.iterdir(), aside):
            _flush(path)
        if directory.exists():
            directory.rename(retired)
        try:
            aside.rename(directory)
        except OSError:
            if retired.exists():
                retired.rename(directory)
            raise
        _flush(directory.parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory}: is a file; an export is a directory")
    names = sorted(path.name for path in directory.iterdir())
    foreign = [name for name in names if not EXPORTED.fullmatch(name)]
    if foreign or (names and "minids" not in _read_json(directory / CONFIG)):
        raise ValueError(f"{directory}: holds {(foreign or names)[0]!r} and is no earlier export; choose another name")


def _flush(path: Path) -> None:
    """Ask for a file or folder to be on disk, not only in the system's memory."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and needs no such call
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# In.


@torch.no_grad()
def load_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    mtp: bool = True,
) -> MiniDS:
    """Read a DeepSeek-V3 or V2 folder: a release (FP8 too), one that transformers saved, or an export of this package.

    `dtype` is by default that of the stored embedding; FP8 weights are dequantised to it. Prediction modules come
    along as far as the files hold them, unless `mtp` is false. Raises one line of `ValueError` naming the file or
    tensor where something is missing, superfluous, of the wrong shape, damaged, or of another architecture.
    """
    directory = Path(directory)
    fields = _read_json(directory / CONFIG)
    config = _read_config(fields)
    with ExitStack() as stack:
        files = _open_tensors(directory, stack)
        layers = {name: int(match[1]) for name in files if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        depths = len({layer for layer in layers.values() if layer >= config.num_hidden_layers}) if mtp else 0
        if not mtp:
            files = {name: file for name, file in files.items() if layers.get(name, -1) < config.num_hidden_layers}
        with torch.device("meta"):
            model = MiniDS(config.replace(num_nextn_predict_layers=depths))
        block = _check_tensors(files, model, fields.get("quantization_config"))

        dtype = dtype or files[TOP["embedding.weight"]].get_slice(TOP["embedding.weight"])[:1].dtype
        model = model.to(dtype).to_empty(device=device)
        for name, place in released_tensors(model).items():
            place.copy_(across(name, _read(files, name, block)))
        for copy, original in shared_copies(model.config).items():
            if copy in files and not torch.equal(files[copy].get_tensor(copy), files[original].get_tensor(original)):
                raise ValueError(f"{copy}: differs from {original}, which a prediction layer must share")
    return model


def _read_config(fields: dict[str, Any]) -> ModelConfig:
    """The config of a folder; what only minids knows comes back from where `_config_fields` put it."""
    own = fields.get("minids", {})
    if not isinstance(own, dict):
        raise ValueError(f"{CONFIG}: minids={own!r}: must be an object")
    return ModelConfig.from_dict(ModelConfig.from_hf(fields).to_dict() | own)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object")
    return content


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file that holds each tensor. A single file goes before an index, as in transformers."""
    index = None
    if not (directory / SINGLE).exists():
        if not (directory / INDEX).exists():
            raise ValueError(f"{directory}: holds neither {SINGLE} nor {INDEX} (pickled weights are never read)")
        index = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) and Path(f).name == f for f in index.values()):
            raise ValueError(f"{directory / INDEX}: weight_map must give each tensor the name of a file beside it")
    files, found = {}, {}
    for file in [SINGLE] if index is None else sorted(set(index.values())):
        try:
            opened = stack.enter_context(safe_open(directory / file, "pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{directory / file}: cannot be read: {error}") from None
        found |= dict.fromkeys(opened.keys(), file)
        files |= dict.fromkeys(opened.keys(), opened)
    for name in sorted(set(index or {}) | set(found)):
        if index is not None and index.get(name) != found.get(name):
            raise ValueError(f"{name}: lies in {found.get(name)}, but {INDEX} says {index.get(name)}")
    return files


def _check_tensors(files: dict[str, Any], model: MiniDS, quantization: dict[str, Any] | None) -> tuple[int, int]:
    """Compare names, shapes and number formats with what the model needs; returns the size of an FP8 block."""
    tensors = released_tensors(model)
    wanted = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for copy, original in shared_copies(model.config).items():
        if copy in files:
            wanted[copy] = wanted[original]
    block = (0, 0)
    for name in sorted(set(tensors) & set(files)):
        if files[name].get_slice(name).get_dtype() == "F8_E4M3":
            block = _block_size(quantization)
            wanted[f"{name}_scale_inv"] = [-(-n // b) for n, b in zip(wanted[name], block, strict=True)]
    for name in sorted(set(wanted) | set(files)):
        if name not in files:
            raise ValueError(f"{name}: missing from the folder's safetensors")
        if name not in wanted:
            raise ValueError(f"{name}: does not belong to this model")
        stored = files[name].get_slice(name)
        if stored.get_shape() != wanted[name]:
            raise ValueError(f"{name}: has shape {stored.get_shape()}, must have {wanted[name]}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16", "F8_E4M3"):
            raise ValueError(f"{name}: is stored as {stored.get_dtype()}, must be floating-point or F8_E4M3")
    return block


def _block_size(quantization: dict[str, Any] | None) -> tuple[int, int]:
    ...


def _read(files: dict[str, Any], name: str, block: tuple[int, int]) -> Float[Tensor, "..."]:
    ...
