"""The cost command and the config.json files it reads."""

import json

import pytest
import torch
import tyro
from cost_configs import LLAMA, LLAMA_405B, QWEN, QWEN_72B, V3

from minids import cost
from minids.cli.cost import cost_report

# Reading configs ---------------------------------------------------------------------------------------------------


def written(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_config_json_is_the_config_it_describes(tmp_path):
    assert cost.read_config("v3") == V3
    read = cost.read_config(written(tmp_path, V3.to_hf()))
    assert cost.figures(read) == cost.figures(V3)
    assert cost.read_config(written(tmp_path, QWEN_72B)) == QWEN
    wide_heads = cost.read_config(written(tmp_path, LLAMA_405B | {"model_type": "mistral", "head_dim": 256}))
    assert cost.attention_parameters(wide_heads) == 2 * cost.attention_parameters(LLAMA)
    mha = cost.dense_config(LLAMA_405B | {"num_key_value_heads": None})
    assert cost.kv_values_per_layer(mha) == 2 * 16384


def test_dense_models_count_as_transformers_builds_them():
    transformers = pytest.importorskip("transformers")
    shape = dict(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for kind, sizes in (("llama", {}), ("mistral", {"head_dim": 32, "sliding_window": None}), ("qwen2", {})):
        fields = transformers.AutoConfig.for_model(kind, **shape, **sizes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(fields)
        weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
        config = cost.dense_config(fields.to_dict())
        assert cost.num_parameters(config) == cost.num_parameters(config, active=True) == weights
        assert cost.mtp_parameters(config) == 0


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "neither a preset (nano, tiny, small, medium, v2_lite, v2, v3, v3_2) nor a config.json"),
        ("[1]", "must hold a JSON object"),
        ({"model_type": "gpt2"}, "model_type='gpt2': only deepseek_v3, deepseek_v32 and deepseek_v2"),
        ({}, "model_type=None: only"),
        (LLAMA_405B | {"hidden_size": None}, "hidden_size=None: must be a whole number, at least 1"),
        (LLAMA_405B | {"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number, at least 1"),
        (LLAMA_405B | {"num_hidden_layers": -1}, "num_hidden_layers=-1: must be"),
        (LLAMA_405B | {"num_key_value_heads": 7}, "num_key_value_heads=7: must divide"),
        (LLAMA_405B | {"head_dim": "128"}, "v_head_dim='128': must be a whole number"),
        (LLAMA_405B | {"tie_word_embeddings": True}, "tie_word_embeddings=True: tied embeddings"),
        (QWEN_72B | {"use_sliding_window": True}, "sliding_window=131072: sliding-window attention"),
        (QWEN_72B | {"model_type": "deepseek_v3"}, "config.json lacks 'kv_lora_rank'"),
    ],
)
def test_a_config_json_that_cannot_be_costed_gets_one_line(tmp_path, content, complaint):
    with pytest.raises(ValueError) as caught:
        cost.read_config(written(tmp_path, content))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


# The command -------------------------------------------------------------------------------------------------------


def report(capsys, *arguments):
    tyro.cli(cost_report, args=list(arguments))
    return capsys.readouterr().out


def test_the_report_is_a_table_of_v3(capsys):
    rows = dict(line.rsplit(maxsplit=1) for line in report(capsys).splitlines()[1:])
    assert rows["total parameters"] == "671,026,419,200"
    assert rows["training flops per token"] == "250,449,887,232"
    assert rows["kv bytes per token"] == "70,272"
    assert int(rows["gpu hours per trillion tokens"].replace(",", "")) == pytest.approx(180e3, rel=0.005)


def test_the_figures_are_those_of_the_formulas():
    figures = cost.figures(V3, context=1024, utilisation=0.5, usd=3)
    assert figures["active_parameters"] == 37_552_297_472 and figures["mtp_parameters"] == 11_610_068_224
    assert figures["training_bytes_unsharded"] == 14 * figures["total_parameters"]
    assert figures["kv_bytes_per_token_as_mha"] == 3_997_696
    assert figures["training_flops_per_token"] == cost.training_flops_per_token(V3, 1024)
    assert figures["decode_flops_per_token"] == cost.decode_flops_per_token(V3, 1024)
    hours = 1e12 * figures["training_flops_per_token"] / (0.5 * 989.5e12) / 3600
    assert figures["gpu_hours_per_trillion_tokens"] == pytest.approx(hours)
    assert figures["usd_per_trillion_tokens"] == pytest.approx(3 * hours)


def test_several_stand_side_by_side(capsys, tmp_path):
    path = written(tmp_path, LLAMA_405B)
    out = report(capsys, "v3", "v2", "--compare", "nano", path)
    header, *rows = out.splitlines()
    assert header.split() == ["v3", "v2", "nano", path]
    assert len({len(row) for row in (header, *rows)}) == 1
    (cache,) = (row for row in rows if row.startswith("kv bytes per token  "))
    assert cache.split()[-4:] == ["70,272", "69,120", "240", "516,096"]


def test_a_folder_stands_for_its_config_json(capsys, tmp_path):
    written(tmp_path, V3.to_hf())
    models = json.loads(report(capsys, str(tmp_path), "--json"))
    assert models == {str(tmp_path): cost.figures(V3)}


def test_json_holds_the_figures(capsys):
    models = json.loads(report(capsys, "v2_lite", "--compare", "v3", "--json"))
    assert list(models) == ["v2_lite", "v3"]
    assert models["v3"] == cost.figures(V3)
    parts = [count for name, count in models["v3"].items() if name.removesuffix("_parameters") in cost.parameters(V3)]
    assert sum(parts) == models["v3"]["total_parameters"] == 671_026_419_200


@pytest.mark.parametrize("name", ["v4", "", "no/such/config.json", "."])
def test_an_unknown_name_gets_one_line(name):
    with pytest.raises(ValueError) as caught:
        cost_report("v3", name)
    message = str(caught.value)
    assert message.startswith(f"{name!r}: neither a preset (nano, tiny") and "\n" not in message
