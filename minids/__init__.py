"""minids: a small, complete and trainable implementation of DeepSeek-V3 and R1."""

from minids.config import ModelConfig
from minids.inference.generate import generate
from minids.model.transformer import MiniDS
from minids.training.pretrain import train

__version__ = "0.2.0"
__all__ = ["MiniDS", "ModelConfig", "__version__", "generate", "train"]
