"""minids: a small, complete and trainable implementation of DeepSeek-V3 and R1."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minids.config import ModelConfig
    from minids.inference.generate import generate
    from minids.model.transformer import MiniDS
    from minids.training.pretrain import train

__version__ = "0.2.0"
__all__ = ["MiniDS", "ModelConfig", "__version__", "generate", "train"]

_MODULES = {
    "MiniDS": "minids.model.transformer",
    "ModelConfig": "minids.config",
    "generate": "minids.inference.generate",
    "train": "minids.training.pretrain",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts before torch is imported."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
