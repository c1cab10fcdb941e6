"""From text to training batches: tokenizers, corpora with domain labels, packed batches with a position to save.

Read in this order: `tokenizer`, `corpus` (with `standard_library`, the text that every machine has), `batches`.
"""
