"""benchmarks/real_model.py at toy size: its rule, its masks, one update by hand, and what a run changes and stores."""

import copy
import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import real_model as benchmark
from minids.course.notebooks import ROOT

RECIPE = {"steps": 2, "prompts": 2, "group_size": 4, "learning_rate": 1e-3, "max_new_tokens": 6, "micro_batch": 3}
CHARACTERS = ["\n", *"0123456789+ =-abc"]


@pytest.fixture
def tokenizer():
    """A token is a character, as the digits of the real tokenizer are."""
    characters = Tokenizer(models.WordLevel({text: i for i, text in enumerate(CHARACTERS)}, unk_token="a"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters)


@pytest.fixture
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(CHARACTERS), num_key_value_heads=1, eos_token_id=0, bos_token_id=None, initializer_range=0.3,
        **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def digits_count(monkeypatch):
    """An untrained model is never correct: count an answer that has an even number of digits instead."""
    monkeypatch.setattr(benchmark, "is_correct", lambda _, text: float(sum(map(str.isdigit, text)) % 2 == 0))


@pytest.mark.parametrize(
    "text, correct",
    [("37", 1), ("13 + 24 = 37.", 1), ("It is 37", 1), ("37, not 38", 0), ("-37", 0), ("3 7", 0), ("137", 0)]
    + [("37\n38", 1), ("38\n37", 0)]
    + [("thirty-seven", 0), ("", 0), ("1,037", 0), ("037", 0)],
)
def test_the_last_number_of_the_text_decides(text, correct):
    assert benchmark.is_correct((13, 24), text) == correct
    assert benchmark.is_correct((999, 38), "1,037") == 1


def test_no_problem_of_training_is_held_out():
    train_set, held_out = benchmark.problems()
    assert len(train_set) + len(held_out) == 90 * 90 and len(held_out) == benchmark.HELD_OUT
    assert not set(train_set) & set(held_out) and benchmark.problems()[1] == held_out


def test_mask_ends_with_the_first_end_of_an_answer(model, tokenizer):
    asked = [(10 + i, 20) for i in range(40)]
    tokens, mask, texts = benchmark.sample(model, tokenizer, asked, 6)
    prompt = tokens.shape[1] - mask.shape[1]
    assert tokenizer.decode(tokens[3, :prompt]) == "21 + 34 = 55\n13 + 20 ="
    lengths = set()
    for new, sampled, text in zip(tokens[:, prompt:].tolist(), mask.tolist(), texts, strict=True):
        length = new.index(0) + 1 if 0 in new else len(new)
        assert sampled == [i < length for i in range(len(new))]
        assert text == "".join(CHARACTERS[token] for token in new[: len(new)])
        lengths.add(length)
    assert len(lengths) > 2  # some answers are padded


def test_log_probabilities_are_those_of_the_whole_sequence(model, tokenizer):
    tokens, mask, _ = benchmark.sample(model, tokenizer, [(10, 20)] * 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits.float()
    for row, sequence in enumerate(tokens):
        first = len(sequence) - mask.shape[1]
        expected = [logits[row, t - 1].log_softmax(-1)[sequence[t]] for t in range(first, len(sequence))]
        torch.testing.assert_close(
            benchmark.token_logps(model, tokens, mask.shape[1])[row], torch.stack(expected), rtol=0, atol=2e-2
        )


def gradient_by_hand(model, tokens, mask, rewards):
    """The gradient of GRPO's loss written out: advantage times log-probability, mean over tokens, then answers."""
    loss = 0.0
    for group in range(0, len(tokens), RECIPE["group_size"]):
        of_group = rewards[group : group + RECIPE["group_size"]]
        for row in range(group, group + RECIPE["group_size"]):
            advantage = (rewards[row] - of_group.mean()) / (of_group.std() + 1e-4)
            logp = benchmark.token_logps(model, tokens[row : row + 1], mask.shape[1])[0]
            loss = loss - advantage * logp[mask[row]].mean() / len(tokens)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_every_update_follows_the_gradient_of_grpo_by_hand(model, tokenizer, digits_count, monkeypatch):
    sampled, compared = [], []
    sample, clip = benchmark.sample, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(benchmark, "sample", lambda *args: sampled.append((args[2], *sample(*args))) or sampled[-1][1:])

    def compare(parameters, largest):
        asked, tokens, mask, texts = sampled[-1]
        rewards = torch.tensor(list(map(benchmark.is_correct, asked, texts)))
        assert 0 < rewards.mean() < 1 and asked[:4] == [asked[0]] * 4
        expected = gradient_by_hand(model, tokens, mask, rewards)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert expected.norm() > 0.1 and (found - expected).norm() < 0.02 * expected.norm()  # products in bfloat16
        compared.append(rewards)
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", compare)
    benchmark.train(model, tokenizer, benchmark.problems()[0], RECIPE, 0, "correct")
    assert len(compared) == 2


def test_two_steps_change_the_model_and_depend_on_seed_and_reward(model, tokenizer, digits_count):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = {}
    for name, seed, reward in (
        ("a", 0, "correct"), ("again", 0, "correct"), ("seed", 1, "correct"), ("control", 0, "shuffled"),
    ):  # fmt: skip
        model.load_state_dict(start)
        curve = benchmark.train(model, tokenizer, benchmark.problems()[0], RECIPE, seed, reward)
        assert len(curve) == 2 and all(0 <= step["reward"] <= 1 for step in curve)
        ends[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    initial = torch.cat([start[name].flatten() for name, _ in model.named_parameters()])
    assert not torch.equal(ends["a"], initial) and torch.equal(ends["a"], ends["again"])
    assert not torch.equal(ends["a"], ends["seed"]) and not torch.equal(ends["a"], ends["control"])


def test_a_step_without_a_useful_group_changes_nothing(model, tokenizer, monkeypatch):
    monkeypatch.setattr(benchmark, "is_correct", lambda *_: 1.0)
    before = copy.deepcopy(model.state_dict())
    curve = benchmark.train(model, tokenizer, benchmark.problems()[0], RECIPE, 0, "correct")
    assert [step["flat"] for step in curve] == [1.0, 1.0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_main_stores_each_run_once(model, tokenizer, digits_count, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "load", lambda: (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr(benchmark, "RECIPE", RECIPE)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "real_model.json")
    for reward, names in (
        ("correct", ["correct, seed 3", "correct, seed 4"]),
        ("shuffled", ["correct, seed 3", "correct, seed 4", "shuffled, seed 3", "shuffled, seed 4"]),
    ):
        monkeypatch.setattr(sys, "argv", ["real_model.py", "--seeds", "3", "4", "--reward", reward])
        benchmark.main()
        stored = json.loads(benchmark.RESULTS.read_text())
        assert list(stored["runs"]) == names
    runs = list(stored["runs"].values())
    assert all(run["before"] == runs[0]["before"] and len(run["steps"]) == 2 for run in runs)  # from one start
    assert runs[0]["after"] != runs[0]["before"]
    monkeypatch.setattr(benchmark, "train", None)  # would raise
    benchmark.main()


def test_chapter_and_table_say_what_is_stored():
    runs = json.loads(benchmark.RESULTS.read_text())["runs"]
    assert {name.split(",")[0] for name in runs} == set(benchmark.REWARDS)
    assert all(len(run["steps"]) == benchmark.RECIPE["steps"] for run in runs.values())
    (before,) = {(run["before"]["pass@1"], run["before"]["greedy pass@1"]) for run in runs.values()}
    after = {
        key: [run["after"][key] for name, run in runs.items() if "correct" in name]
        for key in ("pass@1", "greedy pass@1")
    }
    chapter = (ROOT / "chapters" / "09_r1_zero.ipynb").read_text(encoding="utf-8")
    assert f"from {before[0]:.2f} to {', '.join(f'{x:.2f}' for x in after['pass@1'])}" in chapter
    assert f"greedy from {before[1]:.2f} to {', '.join(f'{x:.2f}' for x in after['greedy pass@1'])}" in chapter
    control = runs["shuffled, seed 0"]["after"]["pass@1"]
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert (
        f"| rewarded by rule | 0 1 2 | {before[0]:.2f} | {' '.join(f'{x:.2f}' for x in after['pass@1'])} |".replace(
            "0.", "."
        )
        in table
    )
    assert f"permuted within each group | 0 | {before[0]:.2f} | {control:.2f} |".replace("0.", ".") in table
