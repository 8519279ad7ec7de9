"""sd_lens: find, explain and edit the high-norm tokens of language models, on TransformerLens."""
