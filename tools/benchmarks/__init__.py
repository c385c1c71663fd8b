"""What tools/benchmark.py measures, and how: see protocol.py first."""
