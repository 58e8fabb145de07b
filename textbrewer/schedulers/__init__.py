"""Weight schedules, functions of the progress of training; temperature schedules, of the logits or the progress."""

from textbrewer.schedulers.by_logits import (
    LOWEST_TEMPERATURE,
    constant_temperature_scheduler,
    cwsm_temperature_scheduler_builder,
    flsw_temperature_scheduler_builder,
)
from textbrewer.schedulers.by_progress import (
    cosine_temperature_scheduler_builder,
    linear_temperature_scheduler_builder,
    warmup_temperature_scheduler_builder,
)
from textbrewer.schedulers.weights import (
    cosine_decay_weight_scheduler,
    cosine_growth_weight_scheduler,
    linear_decay_weight_scheduler,
    linear_growth_weight_scheduler,
    piecewise_weight_scheduler_builder,
    warmup_weight_scheduler_builder,
)

__all__ = [
    "LOWEST_TEMPERATURE",
    "constant_temperature_scheduler",
    "cosine_decay_weight_scheduler",
    "cosine_growth_weight_scheduler",
    "cosine_temperature_scheduler_builder",
    "cwsm_temperature_scheduler_builder",
    "flsw_temperature_scheduler_builder",
    "linear_decay_weight_scheduler",
    "linear_growth_weight_scheduler",
    "linear_temperature_scheduler_builder",
    "piecewise_weight_scheduler_builder",
    "warmup_temperature_scheduler_builder",
    "warmup_weight_scheduler_builder",
]
