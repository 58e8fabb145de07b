"""What a teacher is: the same for the same model, another for any change."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

from tests.conftest import Encoder, adaptor, seed_all
from textbrewer.teacher_cache.fingerprint import of_function, of_model

transformers = pytest.importorskip("transformers")


def bert(**settings):
    seed_all(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    config = transformers.BertConfig(**{**sizes, "max_position_embeddings": 16, "num_labels": 2, **settings})
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def model():
    return bert()


def reloaded(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = bert(initializer_range=0.02)
    other.load_state_dict(torch.load(buffer))
    return other


def moved(model):
    """Each weight elsewhere in memory, some of them not contiguous."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        wide = torch.empty(*parameter.shape, 2)
        wide[..., 0] = parameter.data
        parameter.data = wide[..., 0]
    return other


def used(model):
    """After forward passes with labels, in which transformers notes the kind of problem in the configuration."""
    other = copy.deepcopy(model)
    other(input_ids=torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    assert other.config.problem_type == "single_label_classification"
    return other


def renamed(model):
    other = copy.deepcopy(model)
    other.config.id2label = {0: "bad", 1: "good"}
    other.config._name_or_path = "somewhere"
    return other


@pytest.mark.parametrize("change", [copy.deepcopy, reloaded, moved, used, renamed, lambda model: bert()])
def test_the_same_model(model, change):
    assert of_model(change(model)) == of_model(model)


def with_(change):
    def make(model):
        other = copy.deepcopy(model)
        change(other)
        return other

    return make


def one_weight(model):
    weight = model.bert.encoder.layer[1].output.dense.weight.data
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))


def a_buffer(model):
    model.register_buffer("more", torch.zeros(1))


@pytest.mark.parametrize(
    "change",
    [
        with_(one_weight),
        with_(a_buffer),
        with_(lambda model: model.half()),
        with_(lambda model: setattr(model.config, "num_attention_heads", 2)),
        with_(lambda model: setattr(model.config, "layer_norm_eps", 1e-6)),
        with_(lambda model: setattr(model, "dropout", nn.Identity())),
        with_(lambda model: setattr(model.bert.pooler, "activation", nn.ReLU())),
        lambda model: bert(num_attention_heads=2),
        lambda model: bert(hidden_act="relu"),
        lambda model: bert(num_hidden_layers=1),
        lambda model: bert(num_labels=3),
        lambda model: type("Other", (type(model),), {})(model.config),
    ],
)
def test_another_model(model, change):
    seed_all(0)
    assert of_model(change(model)) != of_model(model)


def test_swapped_weights_are_another_model():
    """Of one shape and with one sum."""
    first = Encoder(seed=3)
    other = copy.deepcopy(first)
    a, b = other.layers[0].query.weight, other.layers[0].key.weight
    a.data, b.data = b.data.clone(), a.data.clone()
    assert of_model(first) == of_model(copy.deepcopy(first)) != of_model(other)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.complex64]
)
def test_weights_of_any_type(dtype):
    def make(last):
        model = nn.Module()
        model.register_buffer("empty", torch.zeros(0, dtype=dtype))
        model.register_buffer("number", torch.zeros((), dtype=dtype))
        model.register_buffer("values", torch.tensor([1, 0, last]).to(dtype))
        return model

    assert of_model(make(0)) == of_model(make(0)) != of_model(make(1))


# ---- functions -----------------------------------------------------------------------------------------------------


def closing_over(*values):
    def function(batch, outputs):
        return {"logits": outputs, "extra": values}

    return function


def with_default(value):
    def function(batch, outputs, more=value):
        return {"logits": outputs * more}

    return function


def with_keyword(value):
    def function(batch, outputs, *, more=value):
        return {"logits": outputs * more}

    return function


class Called:
    def __init__(self, value):
        self.value = value

    def __call__(self, batch, outputs):
        return {"logits": outputs * self.value}

    def method(self, batch, outputs):
        return {"logits": outputs * self.value}

    def other_method(self, batch, outputs):
        return {"logits": outputs + self.value}

    @classmethod
    def of_class(cls, batch, outputs):
        return {"logits": outputs}


def scaled(batch, outputs, factor=1, more=()):
    return {"logits": outputs * factor, "more": more}


def outer(value):
    def inner(outputs):
        return outputs * value

    def function(batch, outputs):
        return {"logits": inner(outputs)}

    return function


MAKERS = {
    "closure": closing_over,
    "default": with_default,
    "keyword default": with_keyword,
    "callable object": Called,
    "bound method": lambda value: Called(value).method,
    "partial": lambda value: functools.partial(scaled, factor=value),
    "partial of a partial": lambda value: functools.partial(functools.partial(scaled, factor=value), more=(1,)),
    "partial with arguments": lambda value: functools.partial(scaled, None, value),
    "partial of a bound method": lambda value: functools.partial(Called(value).method),
    "function within": outer,
}
VALUES = {
    "numbers": (1, 2),
    "kinds of numbers": (1, 1.0),
    "texts": ("hidden", "attention"),
    "none": (None, 0),
    "lists": ([0, 3, 6], [0, 3, 7]),
    "dicts": ({"a": 1}, {"a": 2}),
    "keys": ({"a": 1}, {"b": 1}),
    "sets": ({1, 2}, {1, 3}),
    "within": ({"a": [1, {"b": (2, 3)}]}, {"a": [1, {"b": (2, 4)}]}),
    "tensors": (torch.arange(3), torch.arange(3) + 1),
    "classes": (nn.Linear, nn.Conv1d),
    "functions of C": (torch.softmax, torch.sigmoid),
    "functions": (lambda x: x + 1, lambda x: x + 2),
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("maker", MAKERS)
def test_what_a_function_works_with_counts(maker, values):
    first, second = VALUES[values]
    make = MAKERS[maker]
    assert of_function(make(first)) == of_function(make(copy.deepcopy(first))) != of_function(make(second))


@pytest.mark.parametrize(
    "others",
    [
        (lambda b, o: {"logits": o[0]}, lambda b, o: {"logits": o[1]}),
        (lambda b, o: {"logits": o}, lambda b, o: {"hidden": o}),
        (lambda b, o: o - b, lambda b, o: b - o),
        (lambda b, o: o.logits, lambda b, o: o.scores),
        (lambda b, o: o in {1, 2}, lambda b, o: o in {1, 3}),
        (lambda b, o: [x + 1 for x in o], lambda b, o: [x + 2 for x in o]),
        (Called(1).method, Called(1).other_method),
        (Called(1).method, Called(1)),
        (Called.of_class, Called(1).method),
        (functools.partial(scaled, more=(1,)), functools.partial(scaled, factor=(1,))),
        (scaled, functools.partial(scaled, factor=1)),
        (adaptor, scaled),
    ],
)
def test_another_code_is_another_function(others):
    first, second = map(of_function, others)
    assert first != second


def test_the_same_code_twice_is_the_same_function():
    source = "def function(batch, outputs):\n    return {'logits': outputs['logits'], 'hidden': [h for h in outputs]}"
    made = []
    for _ in range(2):
        scope = {}
        exec(source, scope)
        made.append(of_function(scope["function"]))
    assert made[0] == made[1]


SOURCE = """
LAYERS = {layers}
class Kept:
    pass
def pick(states):
    return [states[layer] for layer in LAYERS{more}]
def function(batch, outputs):
    return {{"hidden": list(pick(state) for state in outputs), "logits": helper(outputs)}}
def helper(outputs):
    return outputs
def again(count):
    return again(count - 1) if count else 0
"""


@pytest.mark.parametrize("changed", [{"layers": [0, 3]}, {"more": "[1:]"}])
def test_values_and_functions_of_the_same_module_count(changed):
    made = []
    for settings in ({}, {}, changed):
        scope = {"__name__": "a_script"}
        exec(SOURCE.format(**{"layers": [0, 2], "more": "", **settings}), scope)
        made.append(of_function(scope["function"]))
        assert of_function(scope["again"])
    assert made[0] == made[1] != made[2]


def test_an_object_that_holds_itself():
    first, second = Called(1), Called(1)
    first.me, second.me = first, second
    assert of_function(first) == of_function(second)


class Scaled(nn.Module):
    """A module of the user's own: a setting that is in no configuration, and a buffer that is not saved."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale, self.calls, self._seen = scale, [], 0
        self.register_buffer("shift", torch.tensor(shift), persistent=False)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        self.calls.append(1)
        self._seen += 1
        return self.linear(x) * self.scale + self.shift


class Shifted(Scaled):
    def forward(self, x):
        return self.linear(x) + self.scale


def test_settings_and_code_of_own_modules_count():
    prints = [of_model(model) for model in (Scaled(), Scaled(scale=2.0), Scaled(shift=1.0), Shifted())]
    assert len(set(prints)) == 4
    same = type(
        "Scaled", (Scaled,), {"forward": Shifted.forward, "__module__": Scaled.__module__, "__qualname__": "Scaled"}
    )
    assert of_model(same()) != prints[0]


def test_what_a_module_notes_of_its_calls_does_not_count():
    model = Scaled()
    before = of_model(model)
    model(torch.ones(1, 2))
    model.eval()
    assert of_model(model) == before
