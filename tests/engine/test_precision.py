"""bfloat16 on processors that only emulate it."""

import time
import warnings

import pytest
import torch

from tests.conftest import make_loader
from tests.engine.runs import distil
from textbrewer import TrainingConfig
from textbrewer.distillers.placement import make_placement
from textbrewer.engine import Runtime, precision

EMULATED = {
    "precision": "precision='bf16' is slow here: torch emulates bfloat16 .* use precision='no'",
    "teacher_precision": "teacher_precision='bf16' is slow here: .* use teacher_precision='no'",
}


def seconds(dtype):
    """Return the least time of a product of matrices, on one thread."""
    first, second = torch.randn(512, 384).to(dtype), torch.randn(384, 384).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        first @ second
        times.append(time.perf_counter() - start)
    return min(times)


def test_emulation_is_where_products_are_slow():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)
    # 70 where they are emulated; at most 2 with AVX-512, less than 1 with products of their own.
    assert precision.emulates_bf16() == (ratio > 8)


@pytest.mark.parametrize("name", EMULATED)
def test_a_run_that_emulates_bf16_warns(name, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "emulates_bf16", lambda: True)
    with pytest.warns(UserWarning, match=EMULATED[name]) as caught:
        distil(tmp_path, make_loader(8), {"num_steps": 1}, **{name: "bf16"})
    assert sum("emulates" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(("emulates", "value"), [(False, "bf16"), (True, "no")])
def test_others_do_not_warn(emulates, value, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "emulates_bf16", lambda: emulates)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*emulates")
        distil(tmp_path, make_loader(8), {"num_steps": 1}, precision=value, teacher_precision=value)


def test_a_teachers_own_precision_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "emulates_bf16", lambda: True)
    placement = make_placement(None, ["no", "bf16"], [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    with pytest.warns(UserWarning, match=r"teacher_precisions\[1\]='bf16' is slow here"):
        placement.check(Runtime(TrainingConfig(device="cpu", output_dir=str(tmp_path))))


def test_a_build_that_cannot_tell_does_not_warn(monkeypatch):
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert precision.emulates_bf16() is False
