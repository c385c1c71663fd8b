"""Evaluation of models on held-out data."""
