"""Parallelism: the device mesh, and one ordered apply() for every family."""
