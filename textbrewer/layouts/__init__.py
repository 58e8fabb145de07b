"""How models are laid out: where their layers hang, and which tensors share the heads and units inside a layer."""

from textbrewer.layouts.families import FAMILIES, Family, InnerWidth, LayerStack, register_family

__all__ = ["FAMILIES", "Family", "InnerWidth", "LayerStack", "register_family"]
