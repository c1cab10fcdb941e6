"""`minids import` and `minids export`: convert between runs and Hugging Face folders of DeepSeek models."""

from pathlib import Path

from tyro.conf import Positional

from minids.cli.options import call
from minids.data.tokenizer import ByteTokenizer, load_tokenizer
from minids.interop.hf import load_pretrained, save_pretrained
from minids.training.run import RUNS, check_new, load_run, save_imported


def run(command: str, arguments: list[str]) -> None:
    call({"import": import_command, "export": export_command}[command], command, arguments)


def export_command(run: Positional[Path], directory: Positional[Path], fp8: bool = False) -> None:
    """Write the model of a run as a Hugging Face DeepSeek-V3 folder, which transformers loads.

    Args:
        run: Folder of the run to export.
        directory: Folder to write; it must be new or empty.
        fp8: Write matrices in FP8 with one scale per block, as DeepSeek released V3, for a smaller folder.
    """
    model, tokenizer = load_run(run)
    save_pretrained(model, directory, fp8=fp8)
    tokenizer.save(directory)
    print(f"{directory} holds {model.num_parameters(mtp=True):,} parameters as DeepseekV3ForCausalLM")


def import_command(directory: Positional[Path], name: Positional[str]) -> None:
    """Convert a Hugging Face DeepSeek-V2 or V3 folder to a run, to generate text with it or to continue its training.

    Args:
        directory: Folder with config.json, safetensors, and a tokenizer.json that minids wrote.
        name: Name of the new folder under runs/.
    """
    destination = RUNS / name
    check_new(destination)
    tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").exists() else ByteTokenizer()
    model = load_pretrained(directory)
    save_imported(model, tokenizer, directory, destination)
    print(f"{destination} holds {model.num_parameters(mtp=True):,} parameters. Next:")
    print(f"    python -m minids sample {destination}")
    print(f"    python -m minids train --from {destination} --data FILES")
