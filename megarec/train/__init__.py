"""Training: the trainer, its run folder, signals, faults and hooks."""
