"""The configs that tests of minids.cost share: DeepSeek's presets, Qwen2.5-72B, Llama-3.1-405B and DeepSeek 67B."""

from minids import cost
from minids.config import ModelConfig

V3, V2, V2_LITE, V3_2 = (ModelConfig.preset(name) for name in ("v3", "v2", "v2_lite", "v3_2"))
NANO = ModelConfig.preset("nano")
SPARSE = NANO.replace(index_topk=4, index_n_heads=6, index_head_dim=20)
QWEN_72B = dict(
    model_type="qwen2", vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, sliding_window=131072, use_sliding_window=False,
    tie_word_embeddings=False,
)  # fmt: skip
LLAMA_405B = dict(
    model_type="llama", vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
    num_attention_heads=128, num_key_value_heads=8,
)  # fmt: skip
QWEN, LLAMA = cost.dense_config(QWEN_72B), cost.dense_config(LLAMA_405B)
LLM_67B = LLAMA.replace(num_hidden_layers=95, first_k_dense_replace=95)  # the cache alone: 8 key heads of 128


def gqa(config, kv_heads):
    return config.replace(attention="gqa", num_key_value_heads=kv_heads)
