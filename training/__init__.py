"""How the small model that ships with the package is made: corpus, tokenizer, batches, training, measuring."""
