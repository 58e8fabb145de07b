"""What a teacher is: the same for the same model, another for any change."""

import copy
import functools
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Encoder, adaptor, seed_all
from textbrewer import DistillationConfig, GeneralDistiller, TeacherCache, TrainingConfig
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


OWN = """
import functools, torch
from torch import nn
class Block(nn.Module):
    power = {power}
    @staticmethod
    def raised(x):
        return x ** Block.power + {static}
    @functools.cached_property
    def offset(self):
        return {cached}
    @property
    def shift(self):
        return {got}
class Net(Block):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.used, self.pair, self.table, self.nothing = {used}, {pair}, {table}, {nothing}
        self._scale, self.tensor, self.many = {scale}, torch.tensor({tensor}), {many}
        self.calls, self.seen, self.store, self.last, self._count = [], 0, {{}}, None, 0
        self.sums = {{"sum": 0}}
    def scaled(self, x):
        return x * {factor} + self.deep(x)
    def deep(self, x):
        self.note(x)
        return x * self._scale
    def note(self, x):
        self.calls.append(len(x))
        self.seen += 1
        self._count += 1
        self.store[len(self.store) + self.used[0]] = self.store.get("sum", 0)
        self.store["sum"] = 1
        self.sums["sum"] += 1
        self.store.setdefault("all", []).append(1)
        self.last = x.detach()
    def forward(self, x):
        y = self.scaled(self.linear(x)) * sum(self.used) + self.offset + self.shift + self.raised(x[:, :3])
        y[self.pair[0]] = self.table["a"][1]
        return y * self.tensor
"""
PLAIN = {
    "power": 2, "static": 1, "cached": 3, "got": 4, "used": [1, 2], "pair": (0, 1), "table": {"a": [1, 2]},
    "nothing": None, "scale": 2.0, "tensor": [1.0, 2.0, 3.0], "many": {"a", "bb", "ccc", "dddd"}, "factor": 1,
}  # fmt: skip
CHANGED = {
    "power": 3, "static": 2, "cached": 4, "got": 5, "used": [1, 3], "pair": (1, 1), "table": {"a": [1, 3]},
    "nothing": 0, "scale": 2.5, "tensor": [1.0, 2.0, 4.0], "many": {"a", "bb", "ccc"}, "factor": 2,
}  # fmt: skip


def own_net(**settings):
    scope = {"__name__": "own_net"}
    exec(OWN.format(**{**PLAIN, **settings}), scope)
    seed_all(0)
    return scope["Net"]().eval()


@pytest.mark.parametrize("name", CHANGED)
def test_functions_and_settings_of_own_classes_count(name):
    assert of_model(own_net()) == of_model(own_net()) != of_model(own_net(**{name: CHANGED[name]}))


def test_lists_and_tuples_are_told_apart():
    nested = [[[1], [2]], [[1, 2]], [1, 2], (1, 2), [1, [2]], None, [], [None]]
    assert len({of_model(own_net(nothing=value)) for value in nested}) == len(nested)


def test_the_heads_of_torchs_attention_count():
    """They are in no weight and no text."""
    models = []
    for heads in (2, 4):
        seed_all(0)
        models.append(nn.TransformerEncoderLayer(16, heads))
    assert repr(models[0]) == repr(models[1])
    assert of_model(models[0]) != of_model(models[1])


IDS = torch.ones(2, 3, dtype=torch.long)


def gpt2():
    seed_all(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def t5():
    seed_all(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def vit():
    seed_all(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


class OwnBert(transformers.BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.layers, self.names, self.seen = [1, 2], {"a", "bb", "ccc", "dddd"}, []

    def forward(self, **batch):
        self.seen.append(1)
        return super().forward(**batch)


def own_bert():
    return OwnBert(bert().config)


CALLS = {
    bert: {"input_ids": IDS, "labels": IDS[:, 0]},
    gpt2: {"input_ids": IDS, "labels": IDS},
    t5: {"input_ids": IDS, "labels": IDS},
    vit: {"pixel_values": torch.ones(2, 3, 16, 16)},
    own_bert: {"input_ids": IDS, "labels": IDS[:, 0]},
    own_net: {"x": torch.ones(3, 4)},
}


@pytest.mark.parametrize("make", CALLS)
def test_use_changes_nothing(make):
    """Forward passes, hooks, and the mode."""
    model = make()
    before = of_model(model)
    for mode in (False, True):
        model.train(mode)
        hook = model.register_forward_hook(lambda module, arguments, outputs: None)
        model(**CALLS[make])
        assert of_model(model) == before
        hook.remove()
    assert of_model(model) == before


def test_another_process_finds_the_same():
    """With another order of sets."""
    code = """
        from tests.teacher_cache.test_fingerprint import *
        print(*[of_model(make()) for make in CALLS])
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [of_model(make()) for make in CALLS]


@pytest.mark.parametrize("change", [{"factor": 2}, {"used": [2, 2]}])
def test_no_row_of_a_changed_teacher_is_read(change, tmp_path):
    """The logits that the losses get are those of the teacher as it is."""

    class Watched(GeneralDistiller):
        def compute_loss(self, results_S, results_T):
            found.append(results_T["logits"][0])
            return super().compute_loss(results_S, results_T)

    batch = torch.randn(8, 4)
    for number, settings in enumerate(({}, change)):
        found = []
        student, teacher = nn.Linear(4, 3), own_net(**settings)
        config = TrainingConfig(output_dir=str(tmp_path / str(number)), progress_bar=False, device="cpu")
        cache = TeacherCache(tmp_path / "cache", dtype="float32")
        adaptors = [lambda batch, outputs: {"logits": outputs}] * 2
        distiller = Watched(config, DistillationConfig(), teacher, student, *adaptors, teacher_cache=cache)
        distiller.train(torch.optim.SGD(student.parameters(), lr=0.1), [batch], num_epochs=1)
        with torch.no_grad():
            torch.testing.assert_close(found[0], teacher(batch))


def test_what_a_module_notes_of_its_calls_does_not_count():
    model = Scaled()
    before = of_model(model)
    model(torch.ones(1, 2))
    model.eval()
    assert of_model(model) == before
