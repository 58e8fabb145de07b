import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from textbrewer.hooks.forward import call, device_of, evaluating, on_device


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"one": 1, "two": 2}, ((), {"one": 1, "two": 2, "extra": 3})),
        ((1, 2), ((1, 2), {"extra": 3})),
        ([1, 2], ((1, 2), {"extra": 3})),
        (1, ((1,), {"extra": 3})),
    ],
)
def test_how_a_batch_is_passed(batch, expected):
    assert call(lambda *inputs, **named: (inputs, named), batch, {"extra": 3}) == expected


def test_a_packed_sequence_is_one_input():
    packed = pack_sequence([torch.ones(2), torch.ones(1)])
    assert call(lambda *inputs: inputs, packed, {}) == (packed,)


def test_modes_are_put_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[0].eval()

    def fails():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert [module.training for module in model] == [False, True]
    assert model.training


def test_the_device_of_a_model():
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_a_batch_is_moved_whole():
    packed = pack_sequence([torch.ones(2), torch.ones(1)])
    batch = {
        "x": torch.ones(2),
        "parts": (torch.ones(1), [torch.zeros(3)]),
        "packed": packed,
        "names": ["a"],
        "n": None,
    }
    moved = on_device(batch, torch.device("meta"))
    assert moved["x"].device.type == moved["parts"][0].device.type == moved["parts"][1][0].device.type == "meta"
    assert isinstance(moved["packed"], PackedSequence)
    assert (moved["names"], moved["n"]) == (["a"], None)
    assert batch["x"].device.type == "cpu"
