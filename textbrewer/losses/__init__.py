"""Losses between a student's and a teacher's logits, hidden states and attention scores.

Each is a pure function of tensors, computed in float32 or wider, finite on an empty mask, and registered by name in
:data:`textbrewer.registry.KD_LOSS_MAP` or :data:`textbrewer.registry.MATCH_LOSS_MAP`.
"""

from textbrewer.losses.attention import att_ce_loss, att_ce_mean_loss, att_mse_loss, att_mse_sum_loss
from textbrewer.losses.hidden import cos_loss, hid_mse_loss, pkd_loss
from textbrewer.losses.logits import kd_ce_loss, kd_kl_loss, kd_mse_loss, kd_sigmoid_loss
from textbrewer.losses.masking import averaged_over, denominator_of
from textbrewer.losses.relations import fsp_loss, mmd_loss

__all__ = [
    "att_ce_loss",
    "att_ce_mean_loss",
    "att_mse_loss",
    "att_mse_sum_loss",
    "averaged_over",
    "cos_loss",
    "denominator_of",
    "fsp_loss",
    "hid_mse_loss",
    "kd_ce_loss",
    "kd_kl_loss",
    "kd_mse_loss",
    "kd_sigmoid_loss",
    "mmd_loss",
    "pkd_loss",
]
