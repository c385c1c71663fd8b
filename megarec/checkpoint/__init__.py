"""Checkpoints: safetensors shards and JSON, verified, published by rename."""
