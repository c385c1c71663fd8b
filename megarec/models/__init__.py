"""Models: one backbone, blocks in a pattern, mixers as plug-ins. Nothing here knows of ranks."""

from megarec.models.backbone import Backbone, build_model

__all__ = ["Backbone", "build_model"]
