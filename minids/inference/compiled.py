"""The fused step compiled ahead of time, kept in the user's cache folder; decoding a batch with it.

Notable choices: the weights are not part of the compiled package, which so serves all weights of a config; the number
of slots is not fixed in it, so that one package serves every length; it is written atomically, and loaded without the
compiler in milliseconds. A package is a library of machine code: the folder is to be as trusted as the program itself.
"""

import inspect
import json
import os
import platform
import warnings
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from minids.inference import fused
from minids.inference.fused import FusedStep, check_model
from minids.model import moe
from minids.model.kv_cache import KVCache
from minids.model.transformer import MiniDS

BATCHES = (1, 2, 4, 8, 16)  # sizes that are compiled; a batch between them is padded


class CompiledStep:
    """A fused step for `batch` sequences, compiled ahead of time, with the weights of one model."""

    def __init__(self, weights: nn.Module, batch: int, path: Path):
        """Load the package at `path`. Raises `ValueError` if it cannot be loaded."""
        self.batch, self.weights = batch, list(weights.state_dict().values())
        try:  # what torch._inductor.aoti_load_package does, without two seconds of importing the compiler
            self.runner = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be loaded: {_first_line(error)}; delete it to compile it again") from None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the step's `forward` returns."""
        return tuple(self.runner.boxed_run([*self.weights, *inputs]))


class FusedDecoder:
    """Decoding by a fused step; continues the sequences of a KV cache by up to `new_tokens` tokens each.

    The step computes `size` sequences: those of the cache, also after they were dropped, and padding.
    """

    def __init__(self, step: FusedStep | CompiledStep, size: int, cache: KVCache, new_tokens: int):
        batch, self.longest = len(cache.lengths), cache.longest
        layers = torch.stack(cache.layers)[:, :, : self.longest]
        self.cache = layers.new_zeros(max(self.longest + new_tokens, 2), len(layers), size, layers.shape[-1])
        self.cache[: self.longest, :, :batch] = rearrange(layers, "layer b slot entry -> slot layer b entry")
        self.positions = F.pad(cache.lengths, (0, size - batch))
        self.run, self.rows, self.sequences = step, torch.arange(batch), torch.arange(size)

    def step(self, tokens: Int[Tensor, "active"]) -> Float[Tensor, "active vocab"]:
        """Add one token to each active sequence; return the logits after it."""
        fed = torch.zeros_like(self.positions).index_put_((self.rows,), tokens)
        logits, entries = self.run(fed[:, None], self.positions[:, None], self.cache[: max(self.longest, 2)])
        self.cache[self.positions, :, self.sequences] = entries[:, 0].to(self.cache.dtype)
        self.positions, self.longest = self.positions + 1, self.longest + 1
        return logits[self.rows, 0]

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Keep only these of the active sequences."""
        self.rows = self.rows[rows]


@torch.inference_mode(False)  # the step outlives the call, and may be called outside of inference mode
def load_step(model: MiniDS, batch: int, kind: type[Any] = FusedStep) -> CompiledStep | None:
    """Return the compiled step for `batch` sequences, from the cache folder or newly compiled (about a minute).

    `kind` is `FusedStep`, or another module made of a model, with `example` inputs and a `longest` position.

    Without a C++ compiler it warns and returns None. Raises `ValueError` for more than 16 sequences, and for a model
    that the fused step does not cover.
    """
    check_model(model)
    if batch > BATCHES[-1]:
        raise ValueError(f"{batch} prompts: the compiled step takes at most {BATCHES[-1]}; decode without compiled")
    batch = next(size for size in BATCHES if size >= batch)
    weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
    held = _LOADED.setdefault(model, {})
    if (kind, batch) not in held or held[kind, batch][0] != weights:
        step = kind(model)
        path = package_path(model, batch, kind)
        if not path.exists():
            try:
                build_package(step, batch, path)
            except RuntimeError as error:  # no compiler, or one that fails
                reason = f"the C++ compiler failed ({_first_line(error)}); install g++ or set CXX"
                warnings.warn(f"decoding without compilation: {reason}", stacklevel=2)
                return None
        held[kind, batch] = weights, CompiledStep(step, batch, path)
    return held[kind, batch][1]


# By model, kind and batch: the state of the weights, and the step. Merging the matrices takes as long as twenty steps.
_LOADED: WeakKeyDictionary[MiniDS, dict[tuple[type, int], tuple[list, CompiledStep]]] = WeakKeyDictionary()


def package_path(model: MiniDS, batch: int, kind: type = FusedStep) -> Path:
    """Return the file of the compiled step: one for each kind, config, dtype, batch, torch, processor and source code.

    It is in $XDG_CACHE_HOME/minids, by default ~/.cache/minids, and can be deleted at any time.
    """
    sources = [Path(fused.__file__), Path(inspect.getfile(kind)), *sorted(Path(moe.__file__).parent.glob("*.py"))]
    key = {
        "kind": kind.__name__,
        "config": model.config.to_dict(),
        "weights": [f"{name}: {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters()],
        "batch": batch,
        "torch": torch.__version__,
        "processor": [platform.machine(), platform.processor(), dict(torch.cpu.get_capabilities())],
        "threads": torch.get_num_threads(),
        "sources": [sha256(source.read_bytes()).hexdigest() for source in sources],
    }
    name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minids" / f"step-{name}.pt2"


class _StepOfWeights(nn.Module):
    """The step with its weights as an input. Of constants the compiler removes those that are 0 or 1 at that moment."""

    def __init__(self, step: nn.Module):
        super().__init__()
        self.step, self.names = step, list(step.state_dict())

    def forward(self, weights: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return functional_call(self.step, dict(zip(self.names, weights, strict=True)), inputs)


@torch.no_grad()
def build_package(step: Any, batch: int, path: Path) -> None:
    """Compile the step and write the package atomically. Raises `RuntimeError` if the C++ compiler is missing or fails.

    The number of slots is left open. Indices are not checked in the compiled code: the checks would double its time.
    """
    from torch._inductor import aoti_compile_and_package, cpp_builder  # imports the compiler, two seconds

    cpp_builder.get_cpp_compiler()  # raises at once where there is none
    inputs, weights = step.example(batch), list(step.state_dict().values())
    slots = {0: torch.export.Dim("slots", min=2, max=step.longest + 8)}
    shapes = ([None] * len(weights), (*[None] * (len(inputs) - 1), slots))
    graph = torch.export.export(_StepOfWeights(step), (weights, *inputs), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one part of torch about another
        options = {"assert_indirect_indexing": False}
        built = aoti_compile_and_package(graph, package_path=f"{folder}/step.pt2", inductor_configs=options)
        os.replace(built, path)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
