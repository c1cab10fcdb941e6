"""The program of docs/COMMANDS.md for a checkpoint from elsewhere: run as it stands, on one made by transformers."""

import re
import subprocess
import sys

import pytest
import torch
from documents import COMMANDS
from foreign import END, PADDED, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from minids.interop.hf import load_pretrained


def program():
    """The only block of docs/COMMANDS.md that loads a "checkpoint"."""
    blocks = re.findall(r"^```python\n(.*?)^```", COMMANDS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if '"checkpoint"' in block]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which the program has run, and what it printed."""
    folder = tmp_path_factory.mktemp("engineer")
    save_checkpoint(folder / "checkpoint")
    done = subprocess.run([sys.executable, "-c", program()], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_is_short():
    assert sum(bool(line.strip()) for line in program().splitlines()) < 30


def test_what_is_rewarded_grows(finished):
    """By .37 to .64 over eight seeds of the checkpoint; with a learning rate of 1e-9, not at all (three seeds)."""
    before, after = map(float, re.search(r"share of vowels: (\S+) then (\S+)", finished[1]).groups())
    assert after > before + 0.15


def test_transformers_loads_the_taught_model_with_its_tokenizer(finished):
    folder, _ = finished
    taught, ours = AutoModelForCausalLM.from_pretrained(folder / "taught").eval(), load_pretrained(folder / "taught")
    tokens = torch.randint(PADDED, (2, 30))
    with torch.no_grad():
        logits = taught(tokens).logits
        untaught = AutoModelForCausalLM.from_pretrained(folder / "checkpoint").eval()(tokens).logits
        torch.testing.assert_close(ours.eval()(tokens).logits, logits, atol=1e-4, rtol=0)
    assert (logits - untaught).abs().max() > 0.1
    before, after = (AutoTokenizer.from_pretrained(folder / name) for name in ("checkpoint", "taught"))
    text = f"Größe 12 {END}"
    assert before(text).input_ids == after(text).input_ids and after.decode(after(text).input_ids) == text
    assert taught.generation_config.eos_token_id == after.eos_token_id == before.eos_token_id
