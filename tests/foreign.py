"""What an engineer brings along: a tiny DeepSeek-V3 with its tokenizer, made and saved by transformers."""

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # DeepSeek's own
VOCAB, PADDED = 400, 416
TEXT = """
The model reads the text token by token. Each token looks back at the tokens before it, and the experts that the
router has chosen add what they know. A draft is verified in one pass; an answer that is better than the mean of its
group becomes likelier.
"""


def save_checkpoint(folder, seed=0):
    """Random weights; a tokenizer trained on a text of its own; the vocabulary is padded, as in the release."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=[BEGIN, END], show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BEGIN, eos_token=END).save_pretrained(folder)
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=PADDED, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=4, topk_group=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
