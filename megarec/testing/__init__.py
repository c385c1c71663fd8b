"""Helpers for tests, and for people who add mixers."""
