"""minids: DeepSeek-V3 and R1, small enough to read and real enough to train."""

from minids.config import ModelConfig
from minids.inference.generate import generate
from minids.model.transformer import MiniDS
from minids.training.loop import train

__version__ = "0.1.0"
__all__ = ["MiniDS", "ModelConfig", "__version__", "generate", "train"]
