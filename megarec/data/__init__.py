"""Data: tokenizers, token shards, seeded streams and mixtures, the loaders, synthetic tasks."""
