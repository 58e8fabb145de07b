"""Transforms of both sides' logits, applied before any loss between them."""

from __future__ import annotations

from textbrewer.registry import Registry

__all__ = ["LOGIT_TRANSFORMS"]

LOGIT_TRANSFORMS = Registry("logit transform")
"""``f(logits, mask=None) -> logits`` of the same shape."""
