"""A teacher that stops early says the same as one that runs to its end."""

import types

import pytest
import torch
from torch import nn

from tests.conftest import CLASSES, Encoder, adaptor
from tests.distillers.setups import Setup, batches, make_student, weights
from textbrewer import CustomMatch
from textbrewer.adaptors import Views
from textbrewer.distillers.base import BaseDistiller
from textbrewer.distillers.needs import Needs
from textbrewer.distillers.teacher_forward import TeacherForward
from textbrewer.engine import Runtime
from textbrewer.hooks.stacks import find_stack

BLOCKS, WIDTH = 6, 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls, self.state = 0, None

    def forward(self, x):
        self.calls += 1
        self.state = torch.tanh(self.linear(x))
        return self.state


class Tower(nn.Module):
    """Blocks of one class; ``kind`` says what a run gives and how it depends on the blocks."""

    def __init__(self, kind="plain", blocks=BLOCKS):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.inner = nn.Module()
        self.inner.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        hidden = [] if self.kind == "no embedding" else [x]
        attention = []
        for block in self.inner.blocks:
            x = block(x)
            hidden.append(x)
            attention.append(x.unsqueeze(1) * 2)
        if self.kind == "final norm":
            x = hidden[-1] = self.norm(x)
        if self.kind == "feedback":
            hidden = [state + x.mean() for state in hidden]
        if self.kind == "needs all":
            self.inner.blocks[BLOCKS - 1].calls += 0
        return {"logits": self.head(x[:, 0]), "hidden": hidden, "attention": attention}


def by_hand(tower, x):
    """What the features are, without the module's own forward pass."""
    states = [x]
    for block in tower.inner.blocks:
        states.append(torch.tanh(states[-1] @ block.linear.weight.T + block.linear.bias))
    hidden = states[1:] if tower.kind == "no embedding" else list(states)
    if tower.kind == "final norm":
        hidden[-1] = nn.functional.layer_norm(hidden[-1], [WIDTH])
    return {"hidden": hidden, "attention": [state.unsqueeze(1) * 2 for state in states[1:]]}


def numbers(seed):
    return torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(seed))


def read(outputs):
    return Views({**outputs, "inputs_mask": torch.ones(3, 4)})


def run(tower, forward, seed):
    """The views of a batch, and how many blocks ran for it."""
    before = sum(block.calls for block in tower.inner.blocks)
    with torch.no_grad():
        views = forward.views(lambda: read(tower(numbers(seed))))
    return views, sum(block.calls for block in tower.inner.blocks) - before


def needs(**layers):
    return Needs(False, {feature: frozenset(item) for feature, item in layers.items()})


@pytest.mark.parametrize(
    ("kind", "layers", "depth"),
    [
        ("plain", {"hidden": [0, 2]}, 2),
        ("plain", {"hidden": [0]}, 0),
        ("plain", {"hidden": [-3, 1]}, 4),  # of 7, the fourth
        ("plain", {"attention": [2]}, 3),
        ("plain", {"attention": [-BLOCKS], "hidden": [2]}, 2),
        ("plain", {"attention": [3], "hidden": [2]}, 4),
        ("no embedding", {"hidden": [2]}, 3),
        ("final norm", {"hidden": [2]}, 3),  # after two, it would be normalised
        ("final norm", {"attention": [1]}, 2),
        ("plain", {"hidden": [6]}, None),
        ("final norm", {"hidden": [-1]}, None),
        ("final norm", {"hidden": [5]}, None),
        ("feedback", {"hidden": [1]}, None),
        ("needs all", {"hidden": [1]}, None),
    ],
)
def test_runs_as_far_as_needed(kind, layers, depth):
    tower = Tower(kind)
    forward = TeacherForward(tower)
    forward.narrow(needs(**layers))
    ran = []
    for seed in range(4):
        views, blocks = run(tower, forward, seed)
        ran.append(blocks)
        assert set(views) == {*layers, "inputs_mask"}
        expected = by_hand(tower, numbers(seed))
        for feature, wanted in layers.items():
            count = len(expected[feature])
            kept = {layer % count for layer in wanted}
            assert [number for number, state in enumerate(views[feature]) if state is not None] == sorted(kept)
            assert len(views[feature]) == count
            if kind != "feedback":
                for number in kept:
                    torch.testing.assert_close(views[feature][number], expected[feature][number])
    assert ran[0] == BLOCKS
    assert ran[1] >= BLOCKS  # the comparison
    assert ran[2:] == [BLOCKS if depth is None else depth] * 2
    assert forward.depth == depth


def test_a_run_to_the_end_is_pruned_and_keeps_its_logits():
    tower = Tower()
    forward = TeacherForward(tower)
    forward.narrow(Needs(True, {"hidden": frozenset([1, -1])}))
    for seed in range(3):
        views, blocks = run(tower, forward, seed)
        assert blocks == BLOCKS
        assert set(views) == {"logits", "hidden", "inputs_mask"}
        assert [state is not None for state in views["hidden"]] == [False, True, *[False] * 4, True]
    forward.narrow(None)
    assert set(run(tower, forward, 0)[0]) == {"logits", "hidden", "attention", "inputs_mask"}


def test_other_needs_are_compared_anew_and_known_ones_are_not():
    tower = Tower()
    forward = TeacherForward(tower)
    ran = []
    for layer in (1, 1, 1, 4, 4, 1, 4):
        forward.narrow(needs(hidden=[layer]))
        views, blocks = run(tower, forward, 0)
        torch.testing.assert_close(views["hidden"][layer], by_hand(tower, numbers(0))["hidden"][layer])
        ran.append(blocks)
    assert ran == [6, 1 + 2 + 3 + 6, 1, 4 + 5 + 6, 4, 1, 4]


def test_nothing_needed_nothing_run():
    tower = Tower()
    forward = TeacherForward(tower)
    forward.narrow(needs())
    assert run(tower, forward, 0)[1] == BLOCKS
    assert run(tower, forward, 1) == ({}, 0)


def test_the_model_is_left_as_it_was():
    tower = Tower()
    blocks, names = tower.inner.blocks, list(tower.state_dict())
    forward = TeacherForward(tower)
    forward.narrow(needs(hidden=[1]))
    for seed in range(3):
        run(tower, forward, seed)
    assert forward.depth == 1

    def fails():
        assert len(tower.inner.blocks) == 1
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        forward.views(fails)
    assert tower.inner.blocks is blocks
    assert len(blocks) == BLOCKS
    assert list(tower.state_dict()) == names


def test_what_blocks_leave_behind_is_not_taken_for_their_output():
    """An adaptor that reads the blocks finds there, when they did not run, what an earlier batch left."""
    tower = Tower()
    blocks = list(tower.inner.blocks)  # those that do not run, too
    forward = TeacherForward(tower)
    forward.narrow(needs(hidden=[2]))

    def stale(seed):
        def go():
            tower(numbers(seed))
            return Views({"hidden": [block.state for block in blocks]})

        return go

    for seed in range(4):
        with torch.no_grad():
            views = forward.views(stale(seed))
        torch.testing.assert_close(views["hidden"][2], by_hand(tower, numbers(seed))["hidden"][3])
    assert forward.depth == 3  # with two blocks, the third's state is the one of the batch before


# ---- where the blocks are ----------------------------------------------------------------------------------------


def lists(**sizes):
    model = nn.Module()
    for name, size in sizes.items():
        setattr(model, name, nn.ModuleList(nn.Linear(2, 2) for _ in range(size)))
    return model


def test_find_stack():
    tower = Tower()
    assert find_stack(tower).blocks is tower.inner.blocks
    assert find_stack(lists(one=3, two=4)).blocks.__len__() == 4
    assert find_stack(lists(one=4, two=4)) is None
    assert find_stack(lists(one=1)) is None
    assert find_stack(nn.Linear(2, 2)) is None
    mixed = lists(one=3)
    mixed.one[1] = nn.Tanh()
    assert find_stack(mixed) is None
    both = lists(one=3)
    both.config = types.SimpleNamespace(is_encoder_decoder=True)
    assert find_stack(both) is None


def test_a_stack_in_two_places_is_shortened_in_both():
    model = Tower()
    model.alias = model.inner.blocks
    with find_stack(model).shortened(2):
        assert len(model.alias) == len(model.inner.blocks) == 2
        assert list(model.alias) == list(model.inner.blocks)
    assert len(model.alias) == len(model.inner.blocks) == BLOCKS


# ---- transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Bert", "Llama", "GPT2", "Albert"])
def test_transformers_models(tmp_path, family):
    """Shortened or not, what is learnt from is what the model itself says."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    if family == "GPT2":
        sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2}
    kind = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    teacher = getattr(transformers, f"{family}Model")(kind(vocab_size=40, **sizes)).eval()
    count = {"Bert": 2, "Llama": 3, "GPT2": 3, "Albert": None}[family]
    forward = TeacherForward(teacher)
    forward.narrow(needs(hidden=[2]))
    for batch in batches():
        del batch["labels"]

        def go(batch=batch):
            return Views({"hidden": teacher(**batch, output_hidden_states=True).hidden_states})

        with torch.no_grad():
            views, expected = forward.views(go), go()
        assert len(views["hidden"]) == len(expected["hidden"]) == 5
        torch.testing.assert_close(views["hidden"][2], expected["hidden"][2], rtol=1e-5, atol=1e-6)
    assert forward.depth == count


# ---- in training -------------------------------------------------------------------------------------------------


def match(**more):
    return {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1, **more}


def watched(teacher):
    """How often each of the teacher's layers ran, by batch."""
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(0))

    def count(*_):
        calls[-1] += 1

    for layer in teacher.layers:
        layer.register_forward_hook(count)
    return calls


def everything(results_S, results_T, distiller):
    return BaseDistiller.compute_loss(distiller, results_S, results_T)


def trained(folder, whole=False, teacher=None, **options):
    """The student's weights after training, and how many layers each pass of the teacher had."""
    teacher = Encoder(layers=5, width=32, seed=1) if teacher is None else teacher
    calls = watched(teacher)
    config = {
        "kd_loss_weight": 0,
        "hard_label_weight": 0,
        "intermediate_matches": [match()],
        **options.pop("config", {}),
    }
    setup = Setup(folder, teachers=[teacher], config=config, **options)
    if whole:
        setup.distiller.compute_loss = lambda *views: everything(*views, setup.distiller)
    setup.train()
    return weights(setup.student), calls


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [5, 1, 2, 3, 5, 1, 1, 1, 1]),
        ({"intermediate_matches": [match(layer_T=-3)]}, [5, 3, 4, 5, 3, 3, 3, 3]),
        ({"hard_label_weight": 1, "intermediate_matches": []}, [5]),
        ({"hard_label_weight": 1, "intermediate_matches": [match(weight=0)]}, [5]),
        ({"intermediate_matches": [match(), match(layer_T=5, weight=0)]}, [5, 1, 2, 3, 5, 1, 1, 1, 1]),
        ({"kd_loss_weight": 1}, [5] * 6),
        ({"kd_loss_weight": 1, "kd_loss_weight_scheduler": "linear_growth"}, [5] * 6),
        ({"hard_label_weight": 1, "hard_label_weight_scheduler": "linear_decay", "intermediate_matches": []}, [5] * 6),
    ],
)
def test_students_are_the_same(tmp_path, config, expected):
    short, calls = trained(tmp_path / "short", config=config)
    whole, all_calls = trained(tmp_path / "whole", whole=True, config=config)
    assert calls == expected
    assert all_calls == [5] * 6
    assert torch.equal(short, whole)
    assert not torch.equal(short, weights(make_student()))


@pytest.mark.parametrize("matches", [[match()], []])
@pytest.mark.parametrize(("module", "expected"), [("layers.4", 5), ("layers.0", 1), ("embedding", None)])
def test_custom_matches_are_heard(tmp_path, matches, module, expected):
    """A custom match on a deep module keeps the teacher running as far; one on an early module does not."""
    teacher = Encoder(layers=5, width=32, seed=1)
    calls, seen = watched(teacher), []
    config = {"kd_loss_weight": 0, "hard_label_weight": 0, "intermediate_matches": matches}
    setup = Setup(tmp_path, teachers=[teacher], config=config)

    def loss(output_S, output_T, mask_S, mask_T):
        seen.append(output_T)
        return (output_S - output_T).square().mean()

    old, custom = setup.distiller, [CustomMatch(module, "layers.0", 1.0, loss)]
    setup.distiller = type(old)(
        old.t_config, old.d_config, teacher, setup.student, adaptor, adaptor, custom_matches=custom
    )
    setup.train()
    assert calls[0] == 5
    assert calls[-1] == (len(matches) if expected is None else expected)
    captured = []
    teacher.get_submodule(module).register_forward_hook(
        lambda _, inputs, output: captured.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        teacher.eval()(**batches()[5])
    torch.testing.assert_close(seen[5], captured[0])


def test_several_teachers_share_one_batch_on_the_device(tmp_path, monkeypatch):
    setup = Setup(tmp_path, kind="MultiTeacherDistiller")
    moved, seen = [], []
    original = Runtime.to_device

    def to_device(self, batch):
        moved.append(batch)
        return original(self, batch)

    monkeypatch.setattr(Runtime, "to_device", to_device)
    for teacher in setup.teachers:
        teacher.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(id(kwargs["input_ids"])), with_kwargs=True
        )
    setup.train(num_steps=3)
    # Once for both teachers and once for the student, which has its own part of the batch where there is one.
    assert len(moved) == 2 * 3
    assert len(seen) == 2 * 3
    assert seen[0::2] == seen[1::2]
