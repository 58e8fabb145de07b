"""Precision, accumulation and clipping: each against the same training done by hand or in another way."""

import contextlib
import os
import sys
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from tests.conftest import Encoder, adaptor, make_loader, seed_all
from tests.engine.runs import PROJECTED, Run, distil, weights
from tests.losses.samples import PAIRS, feature_of, projection_of
from textbrewer import KD_LOSS_MAP, MATCH_LOSS_MAP, BasicTrainer, GeneralDistiller, TrainingConfig
from textbrewer.engine import Runtime
from textbrewer.losses import denominator_of

MATCHES = {"intermediate_matches": PROJECTED, "hard_label_weight": 1}


def as_loader(*sizes, **options):
    """Return a list of batches of the given sizes, cut from the same rows."""
    rows = make_loader(sum(sizes), batch_size=sum(sizes), **options)
    (whole,) = list(rows)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        {name: value[end - size : end] for name, value in whole.items()} for size, end in zip(sizes, ends, strict=True)
    ]


def movement(distiller):
    """Return how far the weights moved from where :func:`distil` starts."""
    seed_all(0)
    return weights(distiller) - weights(distil_nothing(distiller.d_config))


def distil_nothing(config):
    student, teacher = Encoder(dropout=0.0, seed=1), Encoder(width=48, seed=2)
    return GeneralDistiller(TrainingConfig(device="cpu"), config, teacher, student, adaptor, adaptor)


# Precision


def test_different_precisions_follow_each_other(tmp_path):
    """Each run is as if it were the only one of its process."""
    moved = [
        movement(
            distil(tmp_path / str(number), make_loader(24), {"num_steps": 4}, precision=precision, distill=MATCHES)
        )
        for number, precision in enumerate(["no", "bf16", "no", "bf16"])
    ]
    assert torch.equal(moved[0], moved[2])
    assert torch.equal(moved[1], moved[3])
    difference = (moved[0] - moved[1]).norm() / moved[0].norm()
    # bfloat16 has 8 bits: rounding errors of 0.4 % in every product, not all in one direction.
    assert 1e-5 < difference < 0.03


def test_an_accelerator_of_the_users_own_is_left_alone(tmp_path):
    """Accelerate has one precision a process; the run has its own, and gives back the user's."""
    expected = movement(distil(tmp_path / "a", make_loader(8), {"num_steps": 2}, precision="bf16"))
    own = Accelerator(cpu=True, mixed_precision="no")
    try:
        assert torch.equal(
            movement(distil(tmp_path / "b", make_loader(8), {"num_steps": 2}, precision="bf16")), expected
        )
        assert own.mixed_precision == Accelerator(cpu=True).mixed_precision == "no"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_is_at_work_on_both_sides_and_ends_with_the_run(tmp_path):
    seen = {}

    def note(name):
        return lambda module, inputs, output: seen.setdefault(name, set()).add(output.dtype)

    def adapt(batch, outputs):
        for entry in ("logits", "hidden"):
            value = outputs[entry] if entry == "logits" else outputs[entry][-1]
            seen.setdefault(entry, set()).add(value.dtype)
        return adaptor(batch, outputs)

    student, teacher = Encoder(dropout=0.0, seed=1), Encoder(width=48, seed=2)
    student.classifier.register_forward_hook(note("student"))
    teacher.classifier.register_forward_hook(note("teacher"))
    distiller = distil(
        tmp_path,
        make_loader(8),
        {"num_steps": 2},
        precision="bf16",
        student=student,
        teacher=teacher,
        adaptor_S=adapt,
        distill=MATCHES,
    )
    assert seen["student"] == seen["teacher"] == {torch.bfloat16}
    assert {value.dtype for value in student.state_dict().values()} == {torch.float32}
    assert {value.dtype for value in distiller.projections[0].state_dict().values()} == {torch.float32}
    batch = next(iter(make_loader(4)))
    assert student(**batch)["logits"].dtype == teacher(**batch)["logits"].dtype == torch.float32


def test_losses_are_of_full_precision_under_bf16(tmp_path, monkeypatch):
    seen = set()

    def loss(logits_S, logits_T, temperature):
        seen.update((logits_S.dtype, logits_T.dtype))
        return (logits_S - logits_T).square().mean()

    monkeypatch.setitem(KD_LOSS_MAP, "own", loss)
    distil(tmp_path, make_loader(8), {"num_steps": 1}, precision="bf16", distill={"kd_loss_type": "own"})
    assert seen == {torch.float32}


def test_the_launchers_precision_counts_where_none_is_given(tmp_path, monkeypatch):
    expected = movement(distil(tmp_path / "a", make_loader(8), {"num_steps": 2}, precision="bf16"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert torch.equal(movement(distil(tmp_path / "b", make_loader(8), {"num_steps": 2})), expected)


@pytest.mark.parametrize("settings", [{"fp16": True}, {"precision": "fp16"}])
def test_fp16_on_a_cpu_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match=r"needs a GPU.*use precision='bf16'"):
        distil(tmp_path, make_loader(8), {"num_steps": 1}, **settings)


def test_apex_that_is_missing_is_named(tmp_path):
    with pytest.raises(ImportError, match=r"NVIDIA Apex, which is not installed; precision='fp16'"):
        distil(tmp_path, make_loader(8), {"num_steps": 1}, precision="apex")


class FakeApex:
    """Stands in for ``apex.amp``: scales by 1024 and keeps master gradients by unscaling them."""

    def __init__(self):
        self.calls = []

    def initialize(self, models, optimizer, opt_level):
        self.calls.append(("initialize", len(models), opt_level))
        return models, optimizer

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizer):
        self.calls.append(("scale_loss", type(optimizer).__name__))
        yield loss * 1024
        for parameter in self.master_params(optimizer, note=False):
            if parameter.grad is not None:
                parameter.grad /= 1024

    def master_params(self, optimizer, note=True):
        if note:
            self.calls.append(("master_params", type(optimizer).__name__))
        return (parameter for group in optimizer.param_groups for parameter in group["params"])


def test_apex_is_used_when_it_is_there(tmp_path, monkeypatch):
    amp, package, part = FakeApex(), ModuleType("apex"), ModuleType("apex.amp")
    part.initialize, part.scale_loss, part.master_params = amp.initialize, amp.scale_loss, amp.master_params
    package.amp = part
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.amp", part)
    settings = {"distill": MATCHES, "train": {"max_grad_norm": 0.5}}
    expected = movement(distil(tmp_path / "a", make_loader(8), {"num_steps": 2}, **settings))
    moved = movement(
        distil(tmp_path / "b", make_loader(8), {"num_steps": 2}, precision="apex", fp16_opt_level="O2", **settings)
    )
    assert torch.allclose(moved, expected, rtol=1e-5, atol=1e-7)
    # Student and teacher; then, of each step, the loss and the clipping.
    assert amp.calls == [("initialize", 2, "O2"), *[("scale_loss", "SGD"), ("master_params", "SGD")] * 2]


def test_data_parallel_without_several_gpus_changes_nothing(tmp_path):
    expected = movement(distil(tmp_path / "a", make_loader(8), {"num_steps": 2}))
    with pytest.warns(UserWarning, match="data_parallel=True splits batches over several GPUs, but this run has 0"):
        run = distil(tmp_path / "b", make_loader(8), {"num_steps": 2}, data_parallel=True)
    assert torch.equal(movement(run), expected)


def test_a_local_rank_outside_of_a_launch_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"local_rank=0, but this process belongs to no distributed training.*torchrun"
    ):
        distil(tmp_path, make_loader(8), {"num_steps": 1}, local_rank=0)


def test_the_environment_is_left_as_it_was(tmp_path):
    before = dict(os.environ)
    distil(tmp_path, make_loader(8), {"num_steps": 1}, precision="bf16")
    assert dict(os.environ) == before


def test_a_student_that_was_prepared_by_another_run_trains_again(tmp_path):
    """One student, two runs, as two stages do it: the second is as with a fresh copy of the student."""
    student = Encoder(dropout=0.0, seed=1)
    distil(tmp_path / "a", make_loader(8), {"num_steps": 2}, student=student, precision="bf16")
    copy = Encoder(dropout=0.0)
    copy.load_state_dict(student.state_dict())
    ends = [
        weights(distil(tmp_path / name, make_loader(8), {"num_steps": 2}, student=model))
        for name, model in (("b", student), ("c", copy))
    ]
    assert torch.equal(*ends)


# Accumulation


@pytest.mark.parametrize(
    ("micro", "accumulation", "large"),
    [
        ([2, 2, 2, 2], 4, [8]),
        ([2, 2, 2, 2, 2], 4, [8, 2]),
        ([2, 2, 2], 10, [6]),
        ([1, 1, 1, 1, 1, 1, 1], 3, [3, 3, 1]),
    ],
)
def test_micro_batches_are_one_large_batch(micro, accumulation, large, tmp_path):
    """Rows of one length, so that the mean over the micro-batches is that over the rows; windows end with a pass."""
    accumulated = distil(
        tmp_path / "micro",
        as_loader(*micro, full=True),
        {"num_epochs": 2},
        gradient_accumulation_steps=accumulation,
        distill=MATCHES,
    )
    expected = movement(distil(tmp_path / "large", as_loader(*large, full=True), {"num_epochs": 2}, distill=MATCHES))
    assert expected.abs().max() > 0.01
    assert torch.allclose(movement(accumulated), expected, rtol=0, atol=1e-6)


def test_with_num_steps_windows_go_on_over_the_end_of_a_pass(tmp_path):
    micro = as_loader(2, 2, 2, full=True)
    accumulated = distil(tmp_path / "micro", micro, {"num_steps": 2}, gradient_accumulation_steps=4, distill=MATCHES)
    windows = [micro[0], micro[1], micro[2], micro[0]], [micro[1], micro[2], micro[0], micro[1]]
    large = [{name: torch.cat([batch[name] for batch in window]) for name in micro[0]} for window in windows]
    expected = movement(distil(tmp_path / "large", large, {"num_steps": 2}, distill=MATCHES))
    assert expected.abs().max() > 0.01
    assert torch.allclose(movement(accumulated), expected, rtol=0, atol=1e-6)


def stale(model):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)


@pytest.mark.parametrize("length", [{"num_steps": 2}, {"num_epochs": 1}])
def test_stale_gradients_do_not_enter(length, tmp_path):
    moved = []
    for name in ("clean", "stale"):
        student = Encoder(dropout=0.0, seed=1)
        student.classifier.requires_grad_(False)
        if name == "stale":
            stale(student)
        train = {"max_grad_norm": 0.1}
        moved.append(
            weights(distil(tmp_path / name, make_loader(8), length, student=student, train=train, distill=MATCHES))
        )
    assert torch.equal(*moved)


def test_parameters_outside_the_optimizer_do_not_add_up_in_the_norm(tmp_path):
    """They count for the norm, as in TextBrewer, but each step with its own gradient only."""

    def halves(seed):
        model = Encoder(dropout=0.0, seed=seed)
        return model, torch.optim.SGD(list(model.layers.parameters()), lr=0.1)

    loader = list(make_loader(20))
    model, optimizer = halves(3)
    config = Run("trainer", tmp_path).config
    BasicTrainer(config, model, adaptor).train(optimizer, loader, num_epochs=1, max_grad_norm=0.05)
    by_hand, optimizer = halves(3)
    for batch in loader:
        by_hand.zero_grad()
        by_hand(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05)
        optimizer.step()
    for own, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(own, expected, rtol=0, atol=1e-7)


# Exact accumulation: micro-batches with different numbers of positions

RAGGED = [2, 2, 1, 3]
SEVERAL = {"layer_S": [1, 2], "layer_T": [1, 2], "proj": None}


def match(loss):
    layers = [1, 2] if loss in PAIRS else 1
    feature, proj = feature_of(loss), projection_of(loss)
    return {"layer_T": layers, "layer_S": layers, "feature": feature, "loss": loss, "weight": 1, "proj": proj}


def with_heads(batch, outputs):
    """The adaptor of all tests, with the states as the values of a single head."""
    heads = [state.unsqueeze(1) for state in outputs["hidden"]]
    return {**adaptor(batch, outputs), "value": heads, "scores": outputs["attention"]}


CASES = {
    **{f"kd {name}": {"kd_loss_type": name, "temperature": 2} for name in KD_LOSS_MAP},
    **{name: {"kd_loss_weight": 0, "intermediate_matches": [match(name)]} for name in MATCH_LOSS_MAP},
    "hard labels": {"kd_loss_weight": 0, "hard_label_weight": 1},
    "all together": {
        "hard_label_weight": 1,
        "intermediate_matches": [match(name) for name in ("hidden_mse", "cos", "attention_ce", "pkd", "nst")],
    },
}

BY_BATCH = [f"kd {name}" for name in KD_LOSS_MAP if denominator_of(KD_LOSS_MAP[name]) == "batch"]
BY_BATCH += [name for name in MATCH_LOSS_MAP if denominator_of(MATCH_LOSS_MAP[name]) == "batch"]


def by_token(folder, loader, name, **settings):
    """A distillation with one of the cases."""
    settings["student"] = Encoder(dropout=0.0, by_token=True, seed=1)
    settings["teacher"] = Encoder(width=48, by_token=True, seed=2)
    adaptors = {"adaptor_T": with_heads, "adaptor_S": with_heads}
    return distil(folder, loader, {"num_epochs": 1}, distill=CASES[name], **adaptors, **settings)


@pytest.mark.parametrize("name", BY_BATCH)
def test_losses_between_the_rows_of_a_batch_have_no_parts(name, tmp_path):
    with pytest.raises(ValueError, match=r"accumulation_weighting='positions' cannot weigh.*use 'micro_batch'"):
        by_token(tmp_path, as_loader(*RAGGED, by_token=True), name, accumulation_weighting="positions")


@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_BATCH])
def test_positions_weigh_alike_in_a_window(name, tmp_path):
    """Two windows of micro-batches with different numbers of rows, positions and labels are two large batches."""

    def moved(folder, loader, **settings):
        return weights(by_token(tmp_path / folder, loader, name, **settings))

    batches = as_loader(*RAGGED, *RAGGED, by_token=True)
    positions = [int(batch["attention_mask"].sum()) / len(batch["labels"]) for batch in batches[:4]]
    labels = [int((batch["labels"] >= 0).sum()) / int(batch["attention_mask"].sum()) for batch in batches[:4]]
    assert min(len(set(positions)), len(set(labels))) > 2
    settings = {"gradient_accumulation_steps": 4}
    exact = moved("exact", batches, accumulation_weighting="positions", **settings)
    large = moved("large", as_loader(8, 8, by_token=True))
    plain = moved("plain", batches, **settings)
    start = moved("start", as_loader(8, by_token=True), lr=1e-9)
    assert torch.allclose(exact, large, rtol=0, atol=1e-5)
    assert (exact - large).norm() < 1e-3 * (large - start).norm()
    assert (plain - large).norm() > 1e-2 * (large - start).norm(), "the plain mean would do as well"


def test_positions_need_a_loss_that_tells_its_average(tmp_path, monkeypatch):
    monkeypatch.setitem(
        MATCH_LOSS_MAP, "own", lambda state_S, state_T, mask=None: (state_S.mean() - state_T.mean()) ** 2
    )
    with pytest.raises(ValueError, match=r"cannot weigh 'hidden_own_1_1'.*averaged_over, or use 'micro_batch'"):
        distil(
            tmp_path,
            make_loader(8),
            {"num_steps": 1},
            accumulation_weighting="positions",
            distill={"intermediate_matches": [{**match("cos"), "loss": "own", "proj": None}]},
            teacher=Encoder(seed=2),
        )


def with_rows_without_label(loader):
    """Every third row has none, and so no part in a loss that reads labels."""
    batches = [dict(batch) for batch in loader]
    rows = 0
    for batch in batches:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][[number for number in range(len(batch["labels"])) if (rows + number) % 3 == 0]] = -100
        rows += len(batch["labels"])
    return batches


def with_labels(batch, outputs):
    return {name: value for name, value in adaptor(batch, outputs).items() if name != "losses"} | {
        "labels": batch["labels"]
    }


@pytest.mark.parametrize("name", ["dkd", "nkd", "wsld"])
def test_losses_that_read_labels_weigh_rows_that_have_one(name, tmp_path):
    def moved(folder, loader, **settings):
        models = {"student": Encoder(dropout=0.0, seed=1), "teacher": Encoder(width=48, seed=2)}
        learn = {"kd_loss_type": name, "temperature": 2}
        adaptors = {"adaptor_T": adaptor, "adaptor_S": with_labels}
        return weights(
            distil(tmp_path / folder, loader, {"num_epochs": 1}, distill=learn, **models, **adaptors, **settings)
        )

    batches = with_rows_without_label(as_loader(*RAGGED))
    labelled = [int((batch["labels"] >= 0).sum()) / len(batch["labels"]) for batch in batches]
    assert len(set(labelled)) > 2
    exact = moved("exact", batches, gradient_accumulation_steps=4, accumulation_weighting="positions")
    large = moved("large", with_rows_without_label(as_loader(8)))
    assert torch.allclose(exact, large, rtol=0, atol=1e-6)
    assert not torch.allclose(moved("plain", batches, gradient_accumulation_steps=4), large, rtol=0, atol=1e-5)


def test_labels_that_the_batch_does_not_count(tmp_path):
    def adapt(batch, outputs):
        return with_labels(batch, outputs) | {"labels": torch.full_like(batch["labels"], -100)}

    settings = {"accumulation_weighting": "positions", "adaptor_S": adapt, "distill": {"kd_loss_type": "dkd"}}
    with pytest.raises(ValueError, match=r"'labels' picks 0 positions, the batch was counted to have \d+"):
        distil(tmp_path, as_loader(*RAGGED), {"num_steps": 1}, **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature_scheduler": ["flsw", 1, 1]}, "kd_loss"),
        ({"temperature_scheduler": ["cwsm", 1]}, "kd_loss"),
        *(
            ({"intermediate_matches": [{**match("hidden_mse"), **SEVERAL, "strategy": strategy}]}, strategy)
            for strategy in ("emd", "ordered", "nearest")
        ),
    ],
)
def test_what_depends_on_the_whole_batch_has_no_parts(settings, name, tmp_path):
    models = {"teacher": Encoder(seed=2), "student": Encoder(seed=1)}
    exact = {"distill": settings, "accumulation_weighting": "positions"}
    with pytest.raises(ValueError, match=rf"cannot weigh '\w*{name}': it depends on the batch as a whole"):
        distil(tmp_path, as_loader(*RAGGED), {"num_steps": 1}, **exact, **models)


@pytest.mark.parametrize("strategy", ["pairwise", "random", "attention"])
def test_strategies_that_have_parts(strategy, tmp_path):
    learn = {"kd_loss_weight": 0, "intermediate_matches": [{**match("hidden_mse"), **SEVERAL, "strategy": strategy}]}

    def moved(folder, loader, **settings):
        models = {"student": Encoder(dropout=0.0, seed=1), "teacher": Encoder(seed=2)}
        return weights(distil(tmp_path / folder, loader, {"num_epochs": 1}, distill=learn, **models, **settings))

    exact = moved("exact", as_loader(*RAGGED), gradient_accumulation_steps=4, accumulation_weighting="positions")
    assert torch.allclose(exact, moved("large", as_loader(8)), rtol=0, atol=1e-6)


def test_positions_need_the_batchs_masks(tmp_path):
    """The adaptor masks more than the batch's own mask tells."""

    def adapt(batch, outputs):
        views = adaptor(batch, outputs)
        return {**views, "inputs_mask": views["inputs_mask"] * (batch["input_ids"] % 2)}

    with pytest.raises(
        ValueError, match=r"'inputs_mask' picks \d+ positions.*override the distiller's count_positions"
    ):
        distil(tmp_path, make_loader(8), {"num_steps": 1}, accumulation_weighting="positions", adaptor_S=adapt)


# Clipping


@pytest.mark.parametrize("share", [0.3, 2.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_clipping_is_over_student_and_projections_together(share, accumulation, tmp_path):
    """One step of plain descent moves by the gradient; clipped, it moves less by one factor for all."""
    settings = {
        "lr": 1.0,
        "gradient_accumulation_steps": accumulation,
        "distill": {"intermediate_matches": [{**PROJECTED[0], "weight": 100}]},
    }
    gradient = movement(distil(tmp_path / "free", make_loader(8), {"num_steps": 1}, **settings))
    norm = gradient.norm().item()
    limit = share * norm
    moved = movement(
        distil(tmp_path / "clipped", make_loader(8), {"num_steps": 1}, train={"max_grad_norm": limit}, **settings)
    )
    factor = min(1.0, limit / (norm + 1e-6))
    assert torch.allclose(moved, gradient * factor, rtol=1e-4, atol=1e-6)
    projected = 32 * 48 + 48
    assert gradient[-projected:].norm() > 0.1 * norm, "the projections matter for the norm"


def test_gradient_norm_counts_only_what_has_a_gradient(tmp_path):
    config = Run("trainer", tmp_path).config
    with Runtime(config) as runtime:
        used, unused = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(2))
        used.grad = torch.tensor([6.0, 8.0])
        optimizer = torch.optim.SGD([used, unused], lr=1.0)
        assert runtime.gradient_norm([used, unused], optimizer, -1.0).item() == 10
        assert used.grad.tolist() == [6, 8]
        assert runtime.gradient_norm([used, unused], optimizer, 5.0).item() == 10
        assert torch.allclose(used.grad, torch.tensor([3.0, 4.0]))
