"""Tests of resolve and capture on plain modules: what is captured is what the modules return."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from textbrewer.hooks import Capture, Tap, capture, first_tensor, resolve


class Block(nn.Module):
    """A layer that returns a tuple, as transformers' layers did."""

    def __init__(self, width=4):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        return torch.tanh(self.dense(x)), "not a tensor"


class Net(nn.Module):
    def __init__(self, depth=3, checkpointing=False):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(4, 2)
        self.checkpointing = checkpointing

    def forward(self, x, fail=False):
        for layer in self.encoder.layer:
            x = (checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x))[0]
            if fail:
                raise RuntimeError("on purpose")
        return self.head(x)


PATHS = [f"encoder.layer.{n}" for n in range(3)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def hidden_by_hand(net, x):
    states = []
    for layer in net.encoder.layer:
        x = torch.tanh(x @ layer.dense.weight.T + layer.dense.bias)
        states.append(x)
    return states


def number_of_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hidden_states_as_by_hand(net, x):
    with capture(net, {"hidden": PATHS, "logits": ["head"]}) as inner:
        logits = net(x)
    torch.testing.assert_close(inner.outputs["hidden"], hidden_by_hand(net, x))
    assert inner.outputs["logits"][0] is logits
    assert list(inner.views()) == ["hidden", "logits"]


def test_order_is_that_of_the_names_not_of_the_calls(net, x):
    with capture(net, {"hidden": PATHS[::-1]}) as inner:
        net(x)
    torch.testing.assert_close(inner.views()["hidden"], hidden_by_hand(net, x)[::-1])


def test_modules_may_be_given_themselves(net, x):
    with capture(net, {"hidden": list(net.encoder.layer), "all": [net], "same": [""]}) as inner:
        logits = net(x)
    torch.testing.assert_close(inner.views()["hidden"], hidden_by_hand(net, x))
    assert inner.views()["all"][0] is inner.views()["same"][0] is logits


def test_each_forward_pass_starts_anew(net, x):
    with capture(net, {"hidden": PATHS}) as inner:
        for batch in (x, x[:3], x[:1]):
            net(batch)
            assert [tuple(state.shape) for state in inner.outputs["hidden"]] == [(len(batch), 4)] * 3


def test_lists_given_out_do_not_change(net, x):
    with capture(net, {"hidden": PATHS}) as inner:
        net(x)
        first = inner.views()["hidden"]
        net(x[:1])
    assert [len(state) for state in first] == [5, 5, 5]


def test_gradients_flow(net, x):
    with capture(net, {"hidden": PATHS}) as inner:
        net(x)
    sum(state.square().sum() for state in inner.views()["hidden"]).backward()
    found = [layer.dense.weight.grad for layer in net.encoder.layer]
    expected = torch.autograd.grad(
        sum(state.square().sum() for state in hidden_by_hand(net, x)),
        [layer.dense.weight for layer in net.encoder.layer],
    )
    torch.testing.assert_close(found, list(expected))


def test_no_grad(net, x):
    with torch.no_grad(), capture(net, {"hidden": PATHS}) as inner:
        net(x)
    assert not any(state.requires_grad for state in inner.views()["hidden"])


@pytest.mark.parametrize("how", ["exit", "error in with", "error in forward", "detach"])
def test_no_hook_is_left(net, x, how):
    inner = capture(net, {"hidden": PATHS, "all": [""]})
    assert number_of_hooks(net) == 0
    if how == "detach":
        assert inner.attach() is inner
        assert number_of_hooks(net) == 6
        inner.attach()  # attached already
        assert number_of_hooks(net) == 6
        inner.detach()
        inner.detach()
    elif how == "exit":
        with inner:
            net(x)
    elif how == "error in forward":
        with pytest.raises(RuntimeError, match="on purpose"), inner:
            net(x, fail=True)
    else:
        with pytest.raises(ZeroDivisionError), inner:
            1 / 0
    assert number_of_hooks(net) == 0
    assert not inner.attached


def test_after_detaching_nothing_new_is_captured(net, x):
    with capture(net, {"hidden": PATHS}) as inner:
        net(x)
    net(x[:2])
    assert len(inner.outputs["hidden"][0]) == 5
    inner.clear()
    assert inner.outputs == {"hidden": []}
    inner.attach()
    net(x[:2])
    assert len(inner.outputs["hidden"][0]) == 2
    inner.detach()


def test_other_hooks_stay(net, x):
    seen = []
    net.head.register_forward_hook(lambda *call: seen.append(1))
    with capture(net, {"hidden": ["head"]}), capture(net, {"hidden": ["head"]}) as second:
        net(x)
    net(x)
    assert len(seen) == 2
    assert len(second.outputs["hidden"]) == 1


def test_several_calls_of_one_module_in_one_pass(x):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(4, 4)
            self.layers = nn.ModuleList([shared] * 3)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Recurrent()
    expected = [x]
    for _ in range(3):
        expected.append(expected[-1] @ model.layers[0].weight.T + model.layers[0].bias)
    for names in (["layers.0"], ["layers.0", "layers.1", "layers.2"]):
        with capture(model, {"hidden": names}) as inner:
            model(x)
            model(x)
        torch.testing.assert_close(inner.views()["hidden"], expected[1:])


def test_calls_outside_the_model_are_not_captured(net, x):
    with capture(net, {"hidden": PATHS}) as inner:
        net.encoder.layer[0](x)
        assert inner.outputs["hidden"] == []
        net(x)
        net.encoder.layer[0](x)
        assert len(inner.outputs["hidden"]) == 3
        with pytest.raises(RuntimeError, match="on purpose"):
            net(x, fail=True)
        net.encoder.layer[0](x)
        assert len(inner.outputs["hidden"]) == 1  # of the pass that failed


def test_gradient_checkpointing(net, x):
    checkpointed = Net(checkpointing=True)
    checkpointed.load_state_dict(net.state_dict())
    gradients = []
    for model in (net, checkpointed):
        with capture(model, {"hidden": PATHS, "doubled": PATHS}, {"doubled": lambda o: o[0] * o[0]}) as inner:
            model(x)
            parts = inner.views()
            sum(state.sin().sum() for state in parts["hidden"] + parts["doubled"]).backward()
            assert len(inner.outputs["hidden"]) == 3  # the recomputation added nothing
        gradients.append([parameter.grad for parameter in model.encoder.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_made_while_attached(net, x, way):
    with capture(net, {"hidden": PATHS}) as inner:
        net(x)
        if way == "deepcopy":
            copied = copy.deepcopy(net)
        elif way == "pickle":
            copied = pickle.loads(pickle.dumps(net))
        else:
            file = io.BytesIO()
            torch.save(net, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        before = inner.views()["hidden"]
        torch.testing.assert_close(copied(x[:2]), net.head(hidden_by_hand(net, x[:2])[-1]))
        after = inner.views()["hidden"]
    assert all(now is then for now, then in zip(after, before, strict=True))


def test_state_dict_is_unaffected(net, x):
    before = list(net.state_dict())
    with capture(net, {"hidden": PATHS}):
        net(x)
        assert list(net.state_dict()) == before
        Net().load_state_dict(net.state_dict())


def test_compiled_model(net, x):
    compiled = torch.compile(net, backend="eager")
    with capture(net, {"hidden": PATHS}) as inner:
        for batch in (x, x[:3]):
            compiled(batch)
            torch.testing.assert_close(inner.views()["hidden"], hidden_by_hand(net, batch))


def test_select(net, x):
    with capture(net, {"a": PATHS, "b": PATHS}, lambda output: output[0][:, :2]) as inner:
        net(x)
    expected = [state[:, :2] for state in hidden_by_hand(net, x)]
    torch.testing.assert_close(inner.views(), {"a": expected, "b": expected})
    with capture(net, {"a": PATHS, "b": PATHS}, {"b": lambda output: -output[0]}) as inner:
        net(x)
    torch.testing.assert_close(inner.views()["a"], hidden_by_hand(net, x))
    torch.testing.assert_close(inner.views()["b"], [-state for state in hidden_by_hand(net, x)])


def test_select_that_gives_no_tensor(net, x):
    with capture(net, {"hidden": PATHS}, lambda output: output[1]) as inner:
        net(x)
    with pytest.raises(TypeError, match=r"output of 'encoder.layer.0' must be a tensor, got 'not a tensor'"):
        inner.views()


def test_views_refuses_to_shift_layers(net, x):
    net.unused = nn.Linear(1, 1)
    inner = capture(net, {"hidden": ["encoder.layer.0", "unused"]})
    with pytest.raises(RuntimeError, match=r"nothing was captured of 'encoder.layer.0' .* not attached"):
        inner.views()
    with inner:
        net(x)
        with pytest.raises(RuntimeError, match=r"nothing was captured of 'unused' .* last forward pass"):
            inner.views()
        assert len(inner.outputs["hidden"]) == 1


def test_first_tensor():
    a, b = torch.zeros(1), torch.ones(1)
    assert first_tensor(a) is a
    assert first_tensor((None, a, b)) is a
    assert first_tensor([b, a]) is b
    assert first_tensor({"loss": None, "state": b}) is b
    with pytest.raises(TypeError, match="got str; pass select="):
        first_tensor("nothing")
    with pytest.raises(TypeError, match="got tuple"):
        first_tensor(((a,),))


def test_resolve(net):
    assert resolve(net, "encoder.layer.1.dense") is net.encoder.layer[1].dense
    assert resolve(net, "") is net
    assert resolve(net, net.head) is net.head
    net.alias = net.head  # the second name of a module
    assert resolve(net, "alias") is net.head


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.layr.1", r"has no module 'encoder.layr.1'; did you mean 'encoder.layer"),
        ("encoder.layer.7", r"did you mean 'encoder.layer"),
        ("encoder.xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", r"'encoder' has: layer"),
        ("zzz", r"'the model' has: encoder, head"),
        ("head.q", r"did you mean 'head'"),
        ("head.weight", "has no module 'head.weight'"),
    ],
)
def test_resolve_names_what_is_near(net, name, message):
    with pytest.raises(KeyError, match=message):
        resolve(net, name)
    with pytest.raises(KeyError, match=message):
        capture(net, {"hidden": ["head", name]})


def test_resolve_refuses(net):
    with pytest.raises(ValueError, match="must be inside the model, got a Linear"):
        resolve(net, nn.Linear(1, 1))
    with pytest.raises(TypeError, match="the name of a module must be"):
        resolve(net, 3)


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ({}, ValueError, "modules must name at least one"),
        ({"hidden": []}, ValueError, r"modules\['hidden'\] must name at least one"),
        ({"hidden": "head"}, TypeError, r"modules\['hidden'\] must be a list"),
        (["head"], TypeError, "modules must be a dict"),
    ],
)
def test_what_capture_refuses(net, modules, error, message):
    with pytest.raises(error, match=message):
        capture(net, modules)


def test_select_for_an_unknown_feature(net):
    with pytest.raises(KeyError, match="unknown key 'hiden'; did you mean 'hidden'"):
        capture(net, {"hidden": ["head"]}, {"hiden": first_tensor})


def test_taps_can_be_given_directly(net, x):
    with Capture(net, [Tap("weights", "head", net.head, lambda output: output.softmax(-1))]) as inner:
        logits = net(x)
    torch.testing.assert_close(inner.views()["weights"], [logits.exp() / logits.exp().sum(-1, keepdim=True)])
