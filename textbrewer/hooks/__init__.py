"""Features of models that do not return them, captured by module name."""

from textbrewer.hooks.attention import attention_maps, attention_scores, capture_qkv
from textbrewer.hooks.modules import Capture, Tap, capture, first_tensor, resolve
from textbrewer.hooks.self_attention import attention_modules

__all__ = [
    "Capture",
    "Tap",
    "attention_maps",
    "attention_modules",
    "attention_scores",
    "capture",
    "capture_qkv",
    "first_tensor",
    "resolve",
]
