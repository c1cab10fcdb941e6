"""`minids import` and `minids export`: convert between runs and Hugging Face folders of DeepSeek models."""

import shlex
from pathlib import Path

from tyro.conf import Positional

from minids import cost
from minids.cli.options import call
from minids.data.tokenizer import ByteTokenizer, load_tokenizer
from minids.data.tokenizer_base import FILE, Tokenizer
from minids.interop.hf import CONFIG, load_pretrained, read_config, save_pretrained
from minids.training.memory import check, machine_bytes
from minids.training.run import RUNS, load_run, new_run, save_imported

OTHER_TOKENIZERS = ("tiktoken.model", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def run(command: str, arguments: list[str]) -> None:
    call(import_command if command == "import" else export_command, command, arguments)


def export_command(run: Positional[Path], directory: Positional[Path], fp8: bool = False) -> None:
    """Write the model of a run as a Hugging Face DeepSeek-V3 or V3.2 folder, which transformers loads.

    Args:
        run: Folder of the run to export.
        directory: Folder to write: new, empty, or an earlier export, which is replaced when the new one is complete.
        fp8: Write matrices in FP8 with one scale per block, as DeepSeek released V3, for a smaller folder.
    """
    model, tokenizer = load_run(run)
    replaced = ", in place of an earlier export" if (directory / CONFIG).exists() else ""
    save_pretrained(model, directory, fp8=fp8, tokenizer=tokenizer)
    name = "DeepseekV3ForCausalLM" if model.config.index_topk is None else "DeepseekV32ForCausalLM"
    print(f"{directory} holds {model.num_parameters(mtp=True):,} parameters as {name}{replaced}")


def import_command(directory: Positional[Path], name: Positional[str], tokenizer: str | None = None) -> None:
    """Convert a Hugging Face DeepSeek-V2, V3 or V3.2 folder to a run, to generate text or to continue its training.

    Args:
        directory: Folder with config.json, safetensors, and tokenizer.json: a release, or an export of minids.
        name: Name of the new folder under runs/.
        tokenizer: Tokenizer of a folder without tokenizer.json: a folder or file that holds one, or bytes.
    """
    destination, quoted = new_run(name), shlex.quote(str(RUNS / name))
    config, reader = read_config(directory), _find_tokenizer(directory, tokenizer)
    if reader.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size}: the tokenizer has {reader.vocab_size} tokens")
    weights = cost.zero_bytes_per_gpu(cost.num_parameters(config), 1, 0)["weights"]  # in BF16, the least
    check(weights, f"{directory}: loading it", machine_bytes(), "use a machine with more memory")
    model = load_pretrained(directory)
    save_imported(model, reader, directory, destination)
    print(f"{destination} holds {model.num_parameters(mtp=True):,} parameters. Next:")
    print(f"    python -m minids sample {quoted}")
    print(f"    python -m minids train --from {quoted} --data FILES")


def _find_tokenizer(directory: Path, given: str | None) -> Tokenizer:
    """Load the tokenizer that an option names, or that of the folder. Raises `ValueError` if there is none."""
    if given is not None:
        return ByteTokenizer() if given == "bytes" else load_tokenizer(given)
    if (directory / FILE).exists():
        return load_tokenizer(directory)
    others = [name for name in OTHER_TOKENIZERS if (directory / name).exists()]
    raise ValueError(
        f"{directory}: holds {f'{others[0]}, which is not read, but ' if others else ''}no {FILE}: name its tokenizer "
        f"with --tokenizer PATH (transformers saves any as {FILE}), or --tokenizer bytes if its ids are bytes"
    )
