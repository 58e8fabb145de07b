"""Module replacement: steps by hand, what runs, what is trained, resuming, what comes out, bad input."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.conftest import Encoder, adaptor, make_config, make_loader
from tests.distillers.setups import batches
from tests.engine.test_tracking import scalars
from tests.students.models import MODELS, batch_for, make, outputs_of, same
from textbrewer import BasicTrainer, init_student_from_teacher
from textbrewer.distillers import TheseusDistiller
from textbrewer.distillers.replacement import draw

LAYERS, STEPS = 4, 6


def encoder(dropout=0.0, seed=1):
    return Encoder(layers=LAYERS, dropout=dropout, seed=seed)


def theseus(folder, predecessor=None, training=None, **settings):
    given = {"successor_layers": 2, "adaptor": adaptor, "schedule": "constant", **settings}
    predecessor = encoder() if predecessor is None else predecessor
    return TheseusDistiller(make_config(folder, **(training or {})), predecessor, **given)


def adamw(distiller, **options):
    return torch.optim.AdamW(distiller.trainable_parameters(**options), lr=1e-2)


def train(distiller, data=None, **arguments):
    distiller.train(adamw(distiller), batches() if data is None else data, **{"num_steps": STEPS, **arguments})
    return distiller


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# ---- steps by hand -----------------------------------------------------------------------------------------------


def by_hand(predecessor, first, accumulation, rate, seed):
    """Train copies of two of the predecessor's layers on y = r scc(x) + (1 - r) prd(x), and return them."""
    model = copy.deepcopy(predecessor)
    successors = nn.ModuleList(copy.deepcopy(model.layers[number]) for number in first)
    optimizer = torch.optim.AdamW(successors.parameters(), lr=1e-2)
    data = iter(batches() * 3)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro_batch in range(accumulation):
            batch = next(data)
            mask, state = batch["attention_mask"], model.embedding(batch["input_ids"])
            for number, r in enumerate(draw(seed, step, micro_batch, rate(step), 2)):
                old = state
                for layer in model.layers[2 * number : 2 * number + 2]:
                    old, _ = layer(old, mask)
                new, _ = successors[number](state, mask)
                state = float(r) * new + (1 - float(r)) * old
            pooled = (state * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            loss = F.cross_entropy(model.classifier(pooled), batch["labels"])
            (loss / accumulation).backward()
        optimizer.step()
    return successors


@pytest.mark.parametrize(
    ("settings", "accumulation", "first", "rate"),
    [
        ({"base_rate": 0.5}, 1, [1, 3], lambda step: 0.5),
        ({"base_rate": 0.5, "init": "first"}, 2, [0, 1], lambda step: 0.5),
        ({"schedule": "linear", "init": [2, 0]}, 1, [2, 0], lambda step: min(1, 0.3 + 0.7 * step / (0.7 * STEPS))),
        ({"schedule": "linear", "rate_step": 0.15, "base_rate": 0.2}, 1, [1, 3], lambda step: 0.2 + 0.15 * step),
    ],
)
def test_steps_are_those_of_the_formula(settings, accumulation, first, rate, tmp_path):
    predecessor = encoder()
    expected = by_hand(predecessor, first, accumulation, rate, seed=4)
    training = {"gradient_accumulation_steps": accumulation}
    distiller = train(theseus(tmp_path, predecessor, training, seed=4, **settings))
    for mine, theirs in zip(distiller.successor.layers.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    start = theseus(tmp_path / "start", predecessor, **settings).successor.layers
    for mine, theirs in zip(start, first, strict=True):
        same(tensors(mine), tensors(predecessor.layers[theirs]))
    assert changed(tensors(start), distiller.successor.layers) == set(start.state_dict())


def test_steps_in_which_no_successor_runs_are_steps(tmp_path):
    """Which ones, is known; their gradient is zero, so plain gradient descent leaves the successor alone."""
    distiller = theseus(tmp_path, base_rate=0.05)
    before = tensors(distiller.successor)
    assert not any(any(draw(0, step, 0, 0.05, 2)) for step in range(3))
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=1.0)
    distiller.train(optimizer, batches(), num_steps=3)
    assert not changed(before, distiller.successor)


# ---- what runs ---------------------------------------------------------------------------------------------------

BLOCKS = {
    "bart": "model.encoder.layers",
    "bart-classifier": "model.decoder.layers",
    "mbart": "model.decoder.layers",
    "t5": "encoder.block",
    "mt5": "decoder.block",
}


def counts(blocks, layers):
    """Give the layers to the stack that is meant, where there are two."""
    if blocks is None:
        return layers
    return (layers, None) if "encoder" in blocks else (None, layers)


@pytest.mark.parametrize("name", MODELS)
def test_mixtures_run_as_models_of_the_drawn_layers(name, tmp_path):
    """Caches, masks a layer and tables of positions included: all outputs, bit for bit."""
    predecessor, blocks = make(name), BLOCKS.get(name)
    distiller = theseus(tmp_path, predecessor, adaptor="auto", blocks=blocks)
    successor, drawn = distiller.successor, distiller.mixture.drawn
    before = copy.deepcopy(successor.config.to_dict())
    for choice, layers in (
        ((False, False), [0, 1, 2, 3]),
        ((True, True), [1, 3]),
        ((True, False), [1, 2, 3]),
        ((False, True), [0, 1, 3]),
    ):
        expected = outputs_of(init_student_from_teacher(predecessor, counts(blocks, layers)), batch_for(predecessor))
        with drawn(choice):
            found = outputs_of(successor, batch_for(predecessor))
        same(found, expected)
    same(
        outputs_of(successor, batch_for(predecessor)),
        outputs_of(init_student_from_teacher(predecessor, counts(blocks, 2))),
    )
    assert successor.config.to_dict() == before
    same(
        outputs_of(successor, {**batch_for(predecessor), "output_hidden_states": True}),
        outputs_of(successor, batch_for(predecessor)),
    )


def test_uneven_groups(tmp_path):
    predecessor = Encoder(layers=5, dropout=0.0)
    distiller = theseus(tmp_path, predecessor)
    assert [list(group) for group in distiller.mixture.groups] == [[0, 1, 2], [3, 4]]
    batch = {key: value for key, value in batches()[0].items() if key != "labels"}
    with distiller.mixture.drawn((True, False)):
        found = distiller.successor(**batch)["hidden"]
    # The first successor block begins as block 2, the last of its group.
    expected = copy.deepcopy(predecessor)
    expected.layers = nn.ModuleList(predecessor.layers[number] for number in (2, 3, 4))
    for mine, theirs in zip(found, expected(**batch)["hidden"], strict=True):
        assert torch.equal(mine, theirs)


def test_hidden_states_are_complete_after_a_training_that_could_not_collect_them(tmp_path):
    """transformers puts its hooks on the blocks that it finds at the first call: these must be the successor's."""
    predecessor = make("llama-classifier", pad_token_id=0, output_hidden_states=True)
    data = [{**batch_for(predecessor), "labels": torch.tensor([0, 1, 0])}]
    distiller = train(theseus(tmp_path, predecessor, adaptor="auto"), data)
    assert not any(module._forward_hooks for module in predecessor.modules())
    assert distiller.successor.config.output_hidden_states
    assert len(distiller.successor(**data[0]).hidden_states) == 3


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2-classifier"])
def test_gradient_checkpointing_changes_nothing(name, tmp_path):
    predecessor, ends = make(name), []
    data = [{**batch_for(predecessor), "labels": torch.tensor([0, 1, 0])}]
    for number, checkpointing in enumerate((False, True)):
        model = copy.deepcopy(predecessor)
        distiller = theseus(tmp_path / str(number), model, adaptor="auto")
        if checkpointing:
            for part in (model, distiller.successor):
                part.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of dropout
        ends.append(tensors(train(distiller, data).successor))
    same(*ends)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient checkpointing must be that without re-entrance"):
        train(distiller, data)


# ---- what is trained ---------------------------------------------------------------------------------------------


class Normed(Encoder):
    """An encoder with batch statistics outside its blocks and in them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.embedding = nn.Sequential(self.embedding, Norm())
        for layer in self.layers:
            layer.feed = nn.Sequential(layer.feed, Norm())


class Norm(nn.BatchNorm1d):
    def __init__(self):
        super().__init__(32)

    def forward(self, states):
        return super().forward(states.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("method", ["train", "finetune"])
def test_only_what_is_not_frozen_changes(method, freeze, tmp_path):
    predecessor = Normed(layers=LAYERS, dropout=0.1).eval()
    for number, parameter in enumerate(predecessor.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    distiller = theseus(tmp_path, predecessor, freeze=freeze)
    before, start, flags = tensors(predecessor), tensors(distiller.successor), predecessor.state_dict(keep_vars=True)
    flags = [value.requires_grad for value in flags.values()]
    optimizer = torch.optim.AdamW(distiller.successor.parameters(), lr=1e-2)
    getattr(distiller, method)(optimizer, batches(), num_steps=STEPS, callback=lambda model, step: model.eval())
    assert not changed(before, predecessor)
    assert all(parameter.grad is None for parameter in predecessor.parameters())
    assert [value.requires_grad for value in predecessor.state_dict(keep_vars=True).values()] == flags
    assert not any(module.training for module in predecessor.modules())
    assert all(parameter.requires_grad for parameter in distiller.successor.parameters())
    moved, inside = changed(start, distiller.successor), {name for name in start if name.startswith("layers.")}
    assert moved == (inside if freeze else set(start))


def test_the_predecessors_blocks_run_with_their_dropout(tmp_path):
    predecessor, modes = encoder(dropout=0.1).eval(), []
    for layer in predecessor.layers:
        layer.feed[2].register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    distiller = theseus(tmp_path, predecessor, init="first")
    modes.clear()
    train(distiller)
    assert modes
    assert all(modes)
    assert not any(module.training for module in predecessor.modules())


def test_the_successor_shares_nothing_with_the_predecessor(tmp_path):
    for name in ("bert-lm", "gpt2", None):
        predecessor = encoder() if name is None else make(name)
        distiller = theseus(tmp_path, predecessor, adaptor=adaptor if name is None else "auto")
        shared = {value.untyped_storage().data_ptr() for value in predecessor.state_dict().values()}
        assert not shared & {value.untyped_storage().data_ptr() for value in distiller.successor.state_dict().values()}
        assert all(parameter.requires_grad for parameter in distiller.successor.parameters())


def test_a_frozen_predecessor_has_a_successor_to_train(tmp_path):
    distiller = theseus(tmp_path, encoder().requires_grad_(False))
    start = tensors(distiller.successor)
    assert changed(start, train(distiller).successor)


def test_callback_and_files_are_about_the_successor_alone(tmp_path):
    predecessor, seen = encoder(), []
    distiller = theseus(tmp_path, predecessor, {"ckpt_steps": 2}, base_rate=0.2)
    data = batches()

    def callback(model, step):
        assert model is distiller.successor
        assert len(model.layers) == 2
        alone = init_student_from_teacher(predecessor, 2)
        alone.load_state_dict(torch.load(tmp_path / f"gs{step}.pkl", weights_only=True))
        assert torch.equal(model.eval()(**data[0])["logits"], alone.eval()(**data[0])["logits"])
        seen.append(step)

    train(distiller, data, callback=callback)
    assert seen == [2, 4, 6]


def test_rate_and_draws_are_logged(tmp_path):
    distiller = theseus(
        tmp_path, training={"log_dir": str(tmp_path / "log")}, schedule="linear", base_rate=0.4, full_at=0.5
    )
    train(distiller)
    found = scalars(tmp_path / "log")
    rates = [min(1, 0.4 + 0.6 * step / 3) for step in range(STEPS)]
    assert list(found["scalar/replacement_rate"].values()) == pytest.approx(rates, abs=1e-6)
    shares = [sum(draw(0, step, 0, rate, 2)) / 2 for step, rate in enumerate(rates)]
    assert list(found["scalar/replaced"].values()) == shares
    assert len(set(shares)) > 1


# ---- phases, resuming --------------------------------------------------------------------------------------------


def test_finetuning_is_the_successors_own_training(tmp_path):
    distiller = train(theseus(tmp_path / "whole", training={"log_dir": str(tmp_path / "log")}))
    alone = copy.deepcopy(distiller.successor)
    for module in (alone.embedding, alone.classifier):
        module.requires_grad_(False)
    with distiller:
        distiller.finetune(adamw(distiller), batches(), num_epochs=1)
    optimizer = torch.optim.AdamW(alone.layers.parameters(), lr=1e-2)
    BasicTrainer(make_config(tmp_path / "alone"), alone, adaptor).train(optimizer, batches(), num_epochs=1)
    same(tensors(distiller.successor), tensors(alone))
    names = {path.name for path in (tmp_path / "whole" / "finetuned").iterdir()}
    assert names == {"gs6.pkl", "checkpoint-6"}
    assert set(scalars(tmp_path / "log" / "finetuned")) == {"scalar/total_loss"}
    assert distiller.t_config.output_dir == str(tmp_path / "whole")


def both_phases(distiller, data, callback=None):
    arguments = {"callback": callback, "resume_from": "latest"}
    distiller.train(adamw(distiller), data, num_steps=6, **arguments)
    distiller.finetune(adamw(distiller), data, num_steps=4, **arguments)


@pytest.mark.parametrize("stop", [2, 4, 6, 8])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(stop, tmp_path):
    """In either phase, with dropout, and two micro-batches a step."""
    training = {"ckpt_steps": 2, "gradient_accumulation_steps": 2}

    def start(folder, seed):
        torch.manual_seed(seed)
        distiller = theseus(tmp_path / folder, encoder(dropout=0.1), training, schedule="linear")
        return distiller, make_loader(shuffle=True, generator=torch.Generator().manual_seed(seed))

    whole = start("whole", 0)
    both_phases(*whole)
    calls = []

    def interrupt(model, step):
        calls.append(step)
        if len(calls) == stop // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both_phases(*start("cut", 0), interrupt)
    again = start("cut", 9)
    for value in again[0].successor.parameters():
        value.data.zero_()
    both_phases(*again)
    same(tensors(again[0].successor), tensors(whole[0].successor))


# ---- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "gpt2", "gpt2-classifier", "vit"])
def test_the_successor_is_saved_and_loaded_as_any_model(name, tmp_path):
    predecessor = make(name)
    batch = batch_for(predecessor)
    labels = {"gpt2": batch.get("input_ids"), "roberta": torch.ones_like(batch.get("input_ids", torch.zeros(1))).long()}
    data = [{**batch, "labels": labels.get(name, torch.tensor([0, 1, 0]))}]
    distiller = train(theseus(tmp_path / "out", predecessor, adaptor="auto", schedule="linear"), data)
    distiller.successor.save_pretrained(tmp_path / "model")
    loaded = type(predecessor).from_pretrained(tmp_path / "model")
    assert loaded.config.num_hidden_layers == 2
    assert predecessor.config.num_hidden_layers == LAYERS
    found = outputs_of(distiller.successor, batch)
    same(outputs_of(loaded, batch), found)
    assert not torch.equal(found["logits"], outputs_of(init_student_from_teacher(predecessor, 2), batch)["logits"])


class Wrapped(nn.Module):
    """An own model around one of transformers, with a longer list of modules of its own."""

    def __init__(self):
        super().__init__()
        self.inner = make("bert-classifier").bert
        self.steps = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids, labels):
        state = self.inner(input_ids).pooler_output
        for step in self.steps:
            state = torch.tanh(step(state))
        logits = self.head(state)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


@pytest.mark.parametrize(("blocks", "total"), [("inner.encoder.layer", 4), ("steps", 6), (None, 6)])
def test_a_list_inside_an_own_model_by_name(blocks, total, tmp_path):
    predecessor = Wrapped()
    data = [{**batch_for(predecessor.inner), "labels": torch.tensor([0, 1, 2])}]
    own = {"adaptor": lambda batch, outputs: {"losses": outputs["loss"]}, "blocks": blocks}
    distiller = theseus(tmp_path, predecessor, **own)
    path = blocks or "steps"
    assert len(predecessor.get_submodule(path)) == total
    assert len(distiller.successor.get_submodule(path)) == 2
    assert distiller.successor.inner.config.num_hidden_layers == (2 if total == 4 else 4)
    with distiller.mixture.drawn((False, False)):
        assert torch.equal(distiller.successor.eval()(**data[0])["logits"], predecessor.eval()(**data[0])["logits"])
    start = tensors(distiller.successor)
    assert changed(start, train(distiller, data).successor) <= {name for name in start if name.startswith(path)}


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"successor_layers": 5}, ValueError, "successor_layers must be at most the predecessor's 4 blocks, got 5"),
        ({"successor_layers": 0}, ValueError, "successor_layers must be at least 1, got 0"),
        ({"successor_layers": 1.5}, ValueError, "successor_layers must be a whole number"),
        ({"blocks": "layer"}, KeyError, "no module 'layer'; did you mean 'layers'"),
        ({"blocks": "classifier"}, TypeError, "blocks must name an nn.ModuleList.*a Linear"),
        ({"blocks": 3}, TypeError, "blocks must be the dotted name"),
        ({"init": "last"}, ValueError, "init must be one of the known names, got 'last'"),
        ({"init": [1]}, ValueError, r"as many numbers as the successor has layers, 2, got \[1\]"),
        ({"init": [1, 4]}, ValueError, "at most 3, counted from 0, got 4"),
        ({"init": 2}, TypeError, "init must be 'uniform', 'first', or a list"),
        ({"schedule": "cosine"}, ValueError, "schedule must be one of"),
        ({"freeze": "head"}, TypeError, "freeze must be True or False"),
        ({"seed": 0.5}, ValueError, "seed must be a whole number"),
        ({"predecessor": "bert"}, TypeError, "predecessor must be a torch module"),
        ({"predecessor": nn.Linear(2, 2)}, ValueError, "blocks must name the nn.ModuleList whose blocks are replaced"),
    ],
)
def test_bad_input(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        theseus(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        ("t5", None, r"has encoder and decoder.*its lists: encoder.block \(4\)"),
        ("bart", "model.encoder", "blocks must name an nn.ModuleList"),
        ("t5", "encoder.block.0.layer", r"that its config counts \(encoder.block, decoder.block\)"),
    ],
)
def test_lists_that_are_no_stack_of_a_transformers_model(name, blocks, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        theseus(tmp_path, make(name), adaptor="auto", blocks=blocks)


def test_an_unknown_family_says_how_to_make_it_known(tmp_path):
    predecessor = encoder()
    predecessor.config = types.SimpleNamespace(model_type="unheard-of")
    with pytest.raises(ValueError, match=r"register_family\('unheard-of'"):
        theseus(tmp_path, predecessor)


@pytest.mark.parametrize(
    ("training", "arguments", "message"),
    [
        ({"data_parallel": True}, {}, "data_parallel must be False for module replacement"),
        ({"compile": True}, {}, "compile must be False for module replacement"),
        ({}, {"use_cache": True}, "use_cache must not be asked for"),
        ({}, {"output_hidden_states": True}, "output_hidden_states must not be asked for"),
        ({}, {"num_steps": None, "num_epochs": 1}, "must know the run's length.*give num_steps"),
    ],
)
def test_training_that_cannot_be(training, arguments, message, tmp_path):
    distiller = theseus(tmp_path, training=training)
    before = tensors(distiller.successor)
    data = batches()
    with pytest.raises(ValueError, match=message):
        train(distiller, iter_only(data) if "num_epochs" in arguments else data, **arguments)
    assert not changed(before, distiller.successor)
    assert len(distiller.successor.layers) == 2


def iter_only(data):
    """Return the batches without their number."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    return torch.utils.data.DataLoader(Endless(), batch_size=None)


def test_no_losses(tmp_path):
    distiller = theseus(tmp_path, adaptor=lambda batch, outputs: {"logits": outputs["logits"]})
    with pytest.raises(KeyError, match="TheseusDistiller optimises 'losses'"):
        train(distiller)
    assert len(distiller.successor.layers) == 2


def test_an_optimizer_of_the_predecessor(tmp_path):
    distiller = theseus(tmp_path)
    optimizer = torch.optim.SGD(distiller.predecessor.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer must hold the student's parameters"):
        distiller.train(optimizer, batches(), num_steps=1)


def test_blocks_that_the_model_calls_by_other_names(tmp_path):
    class Direct(Encoder):
        def __init__(self, **options):
            super().__init__(**options)
            self.calls = tuple(self.layers)

        def forward(self, *args, **options):
            layers, self._modules["layers"] = self.layers, self.calls
            try:
                return super().forward(*args, **options)
            finally:
                self._modules["layers"] = layers

    with pytest.raises(ValueError, match="blocks must be a list that the model's forward pass iterates over"):
        train(theseus(tmp_path, Direct(layers=4), base_rate=0.1))
