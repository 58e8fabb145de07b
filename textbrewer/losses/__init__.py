"""Losses between a student's and a teacher's logits, hidden states and attention scores.

Each is a pure function of tensors, computed in float32 or wider, finite on an empty mask, and registered by name in
:data:`textbrewer.registry.KD_LOSS_MAP` or :data:`textbrewer.registry.MATCH_LOSS_MAP`.
"""

from textbrewer.losses.annealing import annealing_loss
from textbrewer.losses.attention import att_ce_loss, att_ce_mean_loss, att_mse_loss, att_mse_sum_loss
from textbrewer.losses.contrastive import crd_loss
from textbrewer.losses.correlation import dist_loss
from textbrewer.losses.decoupled import dkd_loss, nkd_loss
from textbrewer.losses.divergences import (
    jsd_loss,
    reverse_kl_loss,
    skew_kl_loss,
    skew_reverse_kl_loss,
    symmetric_kl_loss,
    total_variation_loss,
)
from textbrewer.losses.embeddings import embed_distill_loss, margin_mse_loss
from textbrewer.losses.hidden import cos_loss, hid_mse_loss, pkd_loss
from textbrewer.losses.logits import kd_ce_loss, kd_kl_loss, kd_mse_loss, kd_sigmoid_loss
from textbrewer.losses.masking import averaged_over, denominator_of
from textbrewer.losses.qkv_relations import attention_kl_loss, relation_kl_loss
from textbrewer.losses.relations import fsp_loss, mmd_loss
from textbrewer.losses.scores import scores_mse_loss
from textbrewer.losses.similarity import cka_loss, linear_cka, rkd_angle_loss, rkd_distance_loss, sp_loss
from textbrewer.losses.statistics import at_loss, layer_norm_mse_loss, state_mean_loss, state_variance_loss
from textbrewer.losses.transforms import LOGIT_TRANSFORMS, standardize
from textbrewer.losses.variational import vid_loss
from textbrewer.losses.weighted import wsld_loss

__all__ = [
    "LOGIT_TRANSFORMS",
    "annealing_loss",
    "at_loss",
    "att_ce_loss",
    "att_ce_mean_loss",
    "att_mse_loss",
    "att_mse_sum_loss",
    "attention_kl_loss",
    "averaged_over",
    "cka_loss",
    "cos_loss",
    "crd_loss",
    "denominator_of",
    "dist_loss",
    "dkd_loss",
    "embed_distill_loss",
    "fsp_loss",
    "hid_mse_loss",
    "jsd_loss",
    "kd_ce_loss",
    "kd_kl_loss",
    "kd_mse_loss",
    "kd_sigmoid_loss",
    "layer_norm_mse_loss",
    "linear_cka",
    "margin_mse_loss",
    "mmd_loss",
    "nkd_loss",
    "pkd_loss",
    "relation_kl_loss",
    "reverse_kl_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "scores_mse_loss",
    "skew_kl_loss",
    "skew_reverse_kl_loss",
    "sp_loss",
    "standardize",
    "state_mean_loss",
    "state_variance_loss",
    "symmetric_kl_loss",
    "total_variation_loss",
    "vid_loss",
    "wsld_loss",
]
