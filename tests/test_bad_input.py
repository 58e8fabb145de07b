"""Wrong input: a clear error before or at the first step, and a student left as it was.

Every message is checked for the name of what is wrong, its value, and the remedy.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import textbrewer
from tests.conftest import Encoder, Rows, adaptor, make_config, make_loader
from textbrewer import DistillationConfig
from textbrewer.engine import NonFiniteError

KINDS = ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "MultiTaskDistiller", "BasicTrainer"]
MATCH = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}


@dataclasses.dataclass
class Setting:
    """A run that would work; each test spoils one part of it."""

    folder: Path
    kind: str = "GeneralDistiller"
    teacher: nn.Module = dataclasses.field(default_factory=lambda: Encoder(layers=2, seed=1))
    student: nn.Module = dataclasses.field(default_factory=lambda: Encoder(layers=1, seed=2))
    adaptor_T: Callable = adaptor
    adaptor_S: Callable = adaptor
    data: object = dataclasses.field(default_factory=make_loader)
    optimizer: torch.optim.Optimizer | None = None
    config: dict = dataclasses.field(default_factory=dict)
    arguments: dict = dataclasses.field(default_factory=lambda: {"num_steps": 2})

    def run(self):
        kind, train_config = getattr(textbrewer, self.kind), make_config(self.folder)
        teacher, adaptor_T, adaptor_S, data = self.teacher, self.adaptor_T, self.adaptor_S, self.data
        if self.kind == "MultiTeacherDistiller":
            teacher = [teacher]
        if self.kind == "MultiTaskDistiller":
            teacher, adaptor_T, adaptor_S, data = ({"task": item} for item in (teacher, adaptor_T, adaptor_S, data))
        if self.kind == "BasicTrainer":
            trainer = kind(train_config, self.student, self.adaptor_S)
        else:
            config = DistillationConfig(**self.config)
            trainer = kind(train_config, config, teacher, self.student, adaptor_T, adaptor_S)
        optimizer = self.optimizer or torch.optim.AdamW(self.student.parameters(), lr=1e-3)
        trainer.train(optimizer, data, **self.arguments)


@pytest.fixture
def setting(tmp_path):
    """``setting(**changes)``: a run that works but for the changes."""

    def make(**changes):
        return Setting(tmp_path / "out", **changes)

    return make


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def refuses(setting, error, *words):
    """The run raises ``error`` with all the words in its message, the student is as it was, and nothing is written."""
    before, modes = state_of(setting.student), [module.training for module in setting.student.modules()]
    with pytest.raises(error) as raised:
        setting.run()
    message = str(raised.value)
    for word in words:
        assert word in message
    after = setting.student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in setting.student.modules()] == modes
    assert not setting.folder.is_dir() or not any(setting.folder.iterdir())


def changed(**views):
    """An adaptor whose dict has other entries (``None``: without)."""

    def with_changes(batch, outputs):
        result = {**adaptor(batch, outputs), **views}
        return {key: value(outputs) if callable(value) else value for key, value in result.items() if value is not None}

    return with_changes


@pytest.mark.parametrize("kind", KINDS)
def test_the_setting_works(setting, kind):
    sound = setting(kind=kind)
    before = state_of(sound.student)
    sound.run()
    assert any(not torch.equal(before[name], value) for name, value in sound.student.state_dict().items())
    assert (sound.folder / "gs2.pkl").exists()


# ---- what the adaptors return ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["adaptor_T", "adaptor_S"])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_unknown_adaptor_key(setting, kind, side):
    refuses(setting(kind=kind, **{side: changed(logit=1)}), KeyError, side, "'logit'", "did you mean 'logits'?")


def test_adaptor_of_the_trainer(setting):
    trainer = setting(kind="BasicTrainer", adaptor_S=changed(loss=1))
    refuses(trainer, KeyError, "adaptor_S", "'loss'", "did you mean 'losses'?")
    trainer = setting(kind="BasicTrainer", adaptor_S=changed(losses=None))
    refuses(trainer, KeyError, "'losses'", "return the loss under that key")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, ["must return a dict", "NoneType"]),
        ({"logits": "high"}, ["'logits' must be a tensor or a list of tensors", "str"]),
        ({"inputs_mask": [1, 1]}, ["'inputs_mask' must be a tensor (batch, length)", "list"]),
        ({"hidden": 3}, ["'hidden' must be a list of tensors, one a layer", "int"]),
    ],
    ids=["no dict", "logits", "inputs_mask", "hidden"],
)
def test_kinds_of_adaptor_entries(setting, result, words):
    refuses(setting(adaptor_S=lambda batch, outputs: result), TypeError, "adaptor_S", *words)


def test_logits_of_another_shape(setting):
    narrow = changed(logits=lambda outputs: outputs["logits"][:, :2])
    words = ["logits", "same shape", "(4, 3) and (4, 2)", "return other logits"]
    refuses(setting(adaptor_T=narrow), ValueError, *words)
    by_token = changed(logits=lambda outputs: outputs["hidden"][-1][:, :, :3])
    refuses(setting(adaptor_T=by_token), ValueError, "logits", "(4, 3) and (4, 8, 3)")


def test_another_number_of_logits(setting):
    two = changed(logits=lambda outputs: [outputs["logits"]] * 2)
    refuses(setting(adaptor_T=two), ValueError, "'logits' of student and teacher", "as many heads", "1 and 2")


@pytest.mark.parametrize(("side", "who"), [("adaptor_T", "adaptor_T"), ("adaptor_S", "adaptor_S")])
def test_logits_of_one_side_only(setting, side, who):
    words = [f"{who} returned no 'logits'", "return them on both sides, or on neither"]
    refuses(setting(**{side: changed(logits=None)}), KeyError, *words)


def test_nothing_to_optimise(setting):
    silent = changed(logits=None, losses=None)
    refuses(setting(adaptor_T=silent, adaptor_S=silent), ValueError, "nothing to optimise", "'logits'", "'losses'")


def test_masks_and_labels_of_another_number(setting):
    by_token = {"teacher": Encoder(by_token=True, seed=1), "student": Encoder(by_token=True, seed=2)}
    data = make_loader(by_token=True)
    three = setting(**by_token, data=data, adaptor_S=changed(logits_mask=lambda outputs: [torch.ones(4, 8)] * 3))
    refuses(three, ValueError, "'logits_mask' must be one mask, or one a head (1), got 3")
    short = setting(**by_token, data=data, adaptor_S=changed(logits_mask=torch.ones(4, 7)))
    refuses(short, ValueError, "logits_mask of adaptor_S", "(4, 8)", "(4, 7)")
    shift = {"config": {"probability_shift": True}}
    refuses(setting(**shift, adaptor_S=changed(labels=None)), KeyError, "probability_shift=True", "'labels'")
    several = changed(labels=lambda outputs: [torch.zeros(4, dtype=torch.long)] * 2)
    refuses(setting(**shift, adaptor_S=several), ValueError, "'labels' must be one tensor a head (1), got 2")


@pytest.mark.parametrize("side", ["adaptor_T", "adaptor_S"])
@pytest.mark.parametrize(
    ("feature", "loss", "remedy"),
    [
        ("hidden", "hidden_mse", "output_hidden_states=True"),
        ("attention", "attention_mse", "attn_implementation='eager'"),
    ],
)
@pytest.mark.parametrize("given", ["without the key", "None", "empty", "of None"])
def test_missing_feature(setting, side, feature, loss, remedy, given):
    value = {"without the key": None, "None": lambda outputs: None, "empty": (), "of None": (None, None, None)}[given]
    match = {**MATCH, "feature": feature, "loss": loss, "layer_T": 0, "layer_S": 0}
    spoilt = setting(config={"intermediate_matches": [match]}, **{side: changed(**{feature: value})})
    who = "teacher" if side == "adaptor_T" else "student"
    refuses(spoilt, KeyError, repr(feature), who, remedy)


@pytest.mark.parametrize("proj", [None, "linear", ["linear", 32, 32]], ids=["no projection", "linear", "widths"])
@pytest.mark.parametrize(
    ("name", "layer", "entries"), [("layer_T", 3, "0 to 2"), ("layer_S", 7, "0 to 1"), ("layer_S", -3, "0 to 1")]
)
def test_layer_out_of_range(setting, name, layer, entries, proj):
    spoilt = setting(config={"intermediate_matches": [{**MATCH, name: layer, "proj": proj}]})
    refuses(spoilt, IndexError, f"{name}={layer}", "'hidden'", entries)


def test_width_mismatch(setting):
    wide = Encoder(width=48, seed=1)
    spoilt = setting(teacher=wide, config={"intermediate_matches": [MATCH]})
    refuses(spoilt, ValueError, "hidden_hidden_mse_1_1", "48", "got 32", "'proj': 'linear'", "['linear', 32, 48]")
    for proj, words in (
        (["linear", 32, 40], ["48", "got 40", "['linear', 32, 40]"]),
        (["linear", 16, 48], ["['linear', 16, 48]", "the student's width 32", "got 16"]),
    ):
        spoilt = setting(teacher=wide, config={"intermediate_matches": [{**MATCH, "proj": proj}]})
        refuses(spoilt, ValueError, "hidden_hidden_mse_1_1", *words)


def test_labels_outside_the_classes(setting):
    rows = Rows()
    rows.labels = rows.labels + 2
    remedy = "(num_labels), or map the labels"
    data = DataLoader(rows, batch_size=4)
    # Read by the models' own losses: the teacher's come first.
    refuses(setting(data=data), ValueError, "labels", "4", remedy)
    refuses(setting(data=data, kind="BasicTrainer"), ValueError, "labels", "4", remedy)
    refuses(setting(data=data, config={"is_caching_logits": True}), ValueError, "labels", "4", remedy)


def test_labels_outside_the_classes_of_the_adaptor(setting):
    later = changed(labels=lambda outputs: torch.tensor([0, 1, 2, 5]))
    words = ["labels must be less than the number of classes, 3, got 5", "(num_labels), or map the labels"]
    refuses(setting(adaptor_S=later, config={"probability_shift": True}), ValueError, *words)


def test_labels_outside_the_classes_of_a_tuple_batch(setting):
    rows = [(torch.ones(8, dtype=torch.long), torch.ones(8, dtype=torch.long), torch.tensor(9))] * 4

    def by_position(batch, outputs):
        return {"logits": outputs["logits"], "losses": outputs["loss"]}

    spoilt = setting(data=DataLoader(rows, batch_size=2), adaptor_T=by_position, adaptor_S=by_position)
    refuses(spoilt, ValueError, "labels must be classes of the model", "9", "(num_labels), or map the labels")


def test_tokens_outside_the_vocabulary(setting):
    rows = Rows()
    rows.input_ids[:, 0] = 999
    refuses(setting(data=DataLoader(rows, batch_size=4)), ValueError, "input_ids from 0 to 999", "use the tokenizer")


# ---- data and steps ----------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize(
    ("kind", "caching"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in KINDS[:4])]
)
@pytest.mark.parametrize("data", ["no rows", "fewer than a batch", "stream", "generator"])
def test_empty_loader(setting, kind, data, caching):
    loaders = {
        "no rows": [],
        "fewer than a batch": make_loader(count=3, drop_last=True),
        "stream": DataLoader(Stream([]), batch_size=None),
        "generator": (batch for batch in ()),
    }
    empty = setting(kind=kind, data=loaders[data], config={"is_caching_logits": caching})
    refuses(empty, ValueError, "dataloader", "empty")


def test_loader_of_another_type(setting):
    refuses(setting(data=5), TypeError, "dataloader", "iterable of batches", "int")
    spoilt = setting(kind="MultiTaskDistiller")
    spoilt.data = None
    refuses(spoilt, TypeError, "dataloaders['task']", "NoneType")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("steps", "error", "word"),
    [
        (2.5, ValueError, "whole"),
        (0, ValueError, "at least 1"),
        (-1, ValueError, "at least 1"),
        ("2", TypeError, "'2'"),
    ],
)
def test_num_steps(setting, kind, steps, error, word):
    refuses(setting(kind=kind, arguments={"num_steps": steps}), error, "num_steps", word, str(steps))


def test_whole_num_steps_as_a_float(setting):
    sound = setting(arguments={"num_steps": 2.0})
    sound.run()
    assert (sound.folder / "gs2.pkl").exists()


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "BasicTrainer"])
def test_neither_epochs_nor_steps(setting, kind):
    refuses(setting(kind=kind, arguments={}), ValueError, "num_epochs or num_steps must be given")
    for epochs in (0, 1.5):
        refuses(setting(kind=kind, arguments={"num_epochs": epochs}), ValueError, "num_epochs", str(epochs))


class TakesAnything(Encoder):
    """As models of transformers do: what it does not know, it ignores."""

    def forward(self, *args, steps=None, **kwargs):
        self.steps = steps
        kwargs = {name: value for name, value in kwargs.items() if name in ("input_ids", "attention_mask", "labels")}
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_grad_nrom", "max_grad_norm"),
        ("schedular_class", "scheduler_class"),
        ("lr_scheduler", "scheduler"),
        ("resume", "resume_from"),
        ("callbacks", "callback"),
        ("max_steps", "num_steps"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_misspelt_arguments_of_train(setting, kind, wrong, right):
    models = {"teacher": TakesAnything(layers=2, seed=1), "student": TakesAnything(layers=1, seed=2)}
    spoilt = setting(kind=kind, **models, arguments={"num_steps": 2, wrong: 7})
    refuses(spoilt, TypeError, f"no argument {wrong!r}", "given as 7", f"did you mean {right!r}")


def test_arguments_of_other_distillers(setting):
    models = {"teacher": TakesAnything(layers=2, seed=1), "student": TakesAnything(layers=1, seed=2)}
    of_one_task = setting(kind="MultiTaskDistiller", **models, arguments={"num_steps": 2, "num_epochs": 3})
    refuses(of_one_task, TypeError, "no argument 'num_epochs', given as 3", "did you mean 'num_steps'")
    of_several = setting(**models, arguments={"num_steps": 2, "tau": 0.5})
    refuses(of_several, TypeError, "no argument 'tau', given as 0.5")


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_the_models_name_or_that_resemble_none(setting, kind):
    models = {"teacher": TakesAnything(layers=2, seed=1), "student": TakesAnything(layers=1, seed=2)}
    sound = setting(kind=kind, **models, arguments={"num_steps": 2, "steps": 7, "output_attentions": True})
    sound.run()
    assert sound.student.steps == 7


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller", "BasicTrainer"])
def test_both_epochs_and_steps(setting, kind):
    both = setting(kind=kind, arguments={"num_epochs": 5, "num_steps": 3})
    with pytest.warns(UserWarning, match="num_steps=3 and num_epochs=5 are both given: num_steps counts") as caught:
        both.run()
    assert caught[0].filename == __file__  # it points at the caller's line
    assert [path.name for path in both.folder.glob("gs*")] == ["gs3.pkl"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(setting, kind, value):
    spoil = changed(losses=lambda outputs: outputs["loss"] * value)
    spoilt = setting(kind=kind, adaptor_S=spoil, config={"hard_label_weight": 1})
    words = ["step 1", "hard_label_loss" if kind != "BasicTrainer" else "total_loss", str(value), "lower the learning"]
    refuses(spoilt, NonFiniteError, *words)


# ---- models, optimiser, folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_of_another_model(setting, kind):
    others = torch.optim.SGD(Encoder().parameters(), lr=0.1)
    remedy = "make it of model_S.parameters()"
    refuses(setting(kind=kind, optimizer=others), ValueError, "optimizer", "holds none of them", remedy)


def test_optimizer_of_another_type(setting):
    spoilt = setting()
    spoilt.optimizer = list(spoilt.student.parameters())
    refuses(spoilt, TypeError, "optimizer must be a torch optimizer", "list")


def test_frozen_student(setting):
    spoilt = setting()
    spoilt.optimizer = torch.optim.SGD(spoilt.student.parameters(), lr=0.1)
    spoilt.student.requires_grad_(False)
    refuses(spoilt, ValueError, "student", "requires_grad=True", "frozen")


@pytest.mark.parametrize("kind", KINDS[:4])
def test_student_is_the_teacher(setting, kind):
    model = Encoder()
    refuses(setting(kind=kind, teacher=model, student=model), ValueError, "model_T and model_S", "deep-copy")


@pytest.mark.parametrize("kind", KINDS)
def test_output_folder_that_is_a_file(setting, kind, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    spoilt = setting(kind=kind)
    spoilt.folder = tmp_path / "file"
    refuses(spoilt, ValueError, "output_dir", repr(str(tmp_path / "file")), "can be written to")
    spoilt.folder = tmp_path / "file" / "below"
    refuses(spoilt, ValueError, "output_dir", repr(str(tmp_path / "file" / "below")))
    assert (tmp_path / "file").read_text() == "not a folder"


def test_output_folder_without_permission(setting, monkeypatch):
    spoilt = setting()
    if os.geteuid() == 0:  # who is root may write anywhere, so the system's answer is imitated

        def touch(path, **options):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "touch", touch)
    else:
        spoilt.folder.mkdir(mode=0o500)
    refuses(spoilt, ValueError, "output_dir", str(spoilt.folder), "Permission denied")


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(setting):
    """The folder of a good checkpoint."""
    sound = setting()
    sound.run()
    return sound.folder / "checkpoint-2"


def truncate(path):
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    """Overwrite a file, keeping its size."""
    path.write_bytes(b"x" * path.stat().st_size)


def no_resume(setting, checkpoint, error, *words, tmp_path):
    """Resuming from the checkpoint is refused; nothing is written."""
    spoilt = setting(arguments={"num_steps": 4, "resume_from": checkpoint})
    spoilt.folder = tmp_path / "other"
    refuses(spoilt, error, *words)


def test_no_checkpoint(setting, tmp_path):
    no_resume(setting, tmp_path / "none", ValueError, "resume_from", "none", "no folder", tmp_path=tmp_path)
    spoilt = setting(arguments={"num_steps": 4, "resume_from": 5})
    refuses(spoilt, TypeError, "resume_from", "'latest' or a checkpoint's folder", "5")


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "rank-0.pt"])
@pytest.mark.parametrize("spoil", [truncate, garble, Path.unlink], ids=["truncated", "garbled", "missing"])
def test_damaged_checkpoint(setting, checkpoint, name, spoil, tmp_path):
    spoil(checkpoint / name)
    words = [str(checkpoint), "damaged", name, "resume from an older one"]
    no_resume(setting, checkpoint, ValueError, *words, tmp_path=tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "another"}', "{", None])
def test_foreign_checkpoint(setting, checkpoint, content, tmp_path):
    if content is None:
        (checkpoint / "state.json").unlink()
    else:
        (checkpoint / "state.json").write_text(content)
    words = [str(checkpoint), "not a checkpoint of this library"]
    no_resume(setting, checkpoint, ValueError, *words, tmp_path=tmp_path)


def test_checkpoint_of_a_newer_version(setting, checkpoint, tmp_path):
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "version": 99}))
    no_resume(setting, checkpoint, ValueError, str(checkpoint), "newer version", "99", tmp_path=tmp_path)


def test_checkpoint_of_another_student(setting, checkpoint, tmp_path):
    other = setting(student=Encoder(layers=2, seed=2), arguments={"num_steps": 4, "resume_from": checkpoint})
    other.folder = tmp_path / "other"
    refuses(other, ValueError, str(checkpoint), "belongs to another student")


@pytest.mark.parametrize(
    ("kind", "groups", "words"),
    [
        (torch.optim.SGD, 1, ["AdamW, not SGD"]),
        (torch.optim.AdamW, 2, ["other parameter groups", "groups of [13] parameters, this one of [2, 11]"]),
    ],
    ids=["class", "groups"],
)
def test_checkpoint_of_another_optimizer(setting, checkpoint, kind, groups, words, tmp_path):
    other = setting(arguments={"num_steps": 4, "resume_from": checkpoint})
    other.folder = tmp_path / "other"
    values = list(other.student.parameters())
    parts = [values] if groups == 1 else [values[:2], values[2:]]
    other.optimizer = kind([{"params": part} for part in parts], lr=0.1)
    refuses(other, ValueError, str(checkpoint), "another optimizer", *words)


def test_checkpoint_of_a_run_without_schedule(setting, checkpoint, tmp_path):
    arguments = {"num_steps": 4, "resume_from": checkpoint}
    schedule = {"scheduler_class": torch.optim.lr_scheduler.ConstantLR}
    other = setting(arguments={**arguments, **schedule})
    other.folder = tmp_path / "other"
    refuses(other, ValueError, str(checkpoint), "has no learning-rate schedule", "resume with the same")


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("weight", [0, 0.5])
def test_a_weight_on_labels_that_are_not_there(setting, kind, weight):
    def without(batch, outputs):
        return {name: value for name, value in adaptor(batch, outputs).items() if name != "losses"}

    run = setting(kind=kind, adaptor_S=without, config={"hard_label_weight": weight})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.run()
    told = [str(item.message) for item in found if "hard_label_weight=0.5 has no effect" in str(item.message)]
    assert len(told) == (1 if weight else 0)  # once, for the first batch


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature_scheduler": ["linear", 1.0]}, "the temperature scheduler 'linear' must know the run's length"),
        ({"kd_loss_type": "annealing"}, "kd_loss_type='annealing' must know the run's length"),
    ],
)
def test_progress_without_a_length(setting, config, message):
    class Endless(IterableDataset):
        def __iter__(self):
            yield from make_loader()

    data = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ValueError, match=f"{message}.*give num_steps"):
        setting(config=config, data=data, arguments={"num_epochs": 1}).run()
    setting(config=config, data=data, arguments={"num_steps": 2}).run()
