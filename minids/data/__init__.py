"""Training data: tokenizers, corpora with domain labels, and packed batches with a position for checkpoints.

Read in this order: `tokenizer`, `corpus` (with `standard_library`, text from the Python installation), `batches`.
"""
