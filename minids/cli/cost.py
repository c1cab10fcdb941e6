"""`minids cost`: print parameters, FLOPs, memory and rental cost of a config."""

from json import dumps

from tyro.conf import Positional

from minids.cli.options import call
from minids.config import ModelConfig
from minids.cost import figures, read_config


def run(command: str, arguments: list[str]) -> None:
    call(cost_report, command, arguments)


def cost_report(*configs: Positional[str], compare: tuple[str, ...] = (), json: bool = False) -> None:
    """Print parameters, FLOPs, memory and rental cost of models, one column per model.

    Args:
        configs: Presets, config.json files or their folders (DeepSeek, Llama, Mistral, Qwen2); by default v3.
        compare: Further models, named as in CONFIGS, to print beside them.
        json: Print the figures as JSON, for a program to read.
    """
    models = {name: figures(read_config(name)) for name in (*(configs or ["v3"]), *compare)}
    if json:
        print(dumps(models, indent=1))
        return
    width = max(len(name) for name in (*models, "1,000,000,000,000"))
    print(" " * 30 + "".join(f"{name:>{width + 2}}" for name in models))
    for key in figures(ModelConfig()):
        cells = (f"{value:,.0f}" if value > 10 else f"{value:.3g}" for value in (m[key] for m in models.values()))
        print(f"{key.replace('_', ' '):30}" + "".join(f"{cell:>{width + 2}}" for cell in cells))
