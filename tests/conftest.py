"""Without a GPU, Triton kernels run in its interpreter: it reads this before its first import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
