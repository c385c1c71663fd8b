"""Conversion to and from Hugging Face format, and model weights from any folder that has them."""

from megarec.conversion.hf import export_hf, import_hf
from megarec.conversion.load import load_initial_weights, load_model

__all__ = ["export_hf", "import_hf", "load_initial_weights", "load_model"]
