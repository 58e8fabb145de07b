"""Training with each target: what runs, what is kept in memory, what is learned, and what comes from a cache."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.conftest import LENGTH, VOCABULARY, Encoder, adaptor, make_config, seed_all
from tests.distillers.setups import batches, make_student, make_teacher, weights
from textbrewer import DistillationConfig, MultiTeacherDistiller, precompute
from textbrewer.distillers.hearing import Unheard
from textbrewer.distillers.targets import TARGETS
from textbrewer.losses import kd_ce_loss

NAMES = ["mean_logits", "mean_probs", "mean_loss", "ca_mkd", "entropy", "confidence", "uncertainty", "agree", "gate"]
PAIR = [
    {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 2, "proj": ["linear", 32, 48]},
    {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "cos", "weight": 1, "proj": "linear", "teacher": 1},
]


def make_teachers(by_token=False):
    """Two of different widths and depths."""
    return [make_teacher(1, by_token), Encoder(layers=1, width=16, by_token=by_token, seed=3)]


def make(folder, target="mean_logits", teachers=None, student=None, kind=MultiTeacherDistiller, by_token=False, **more):
    seed_all(0)
    options = {name: more.pop(name) for name in ("teacher_cache", "teacher_devices", "teacher_precisions")
               if name in more}  # fmt: skip
    adaptor_T, training = more.pop("adaptor_T", adaptor), more.pop("training", {})
    student = student or make_student(dropout=0.0, by_token=by_token)
    return kind(
        make_config(folder, **training), DistillationConfig(**more), teachers or make_teachers(by_token), student,
        adaptor_T, adaptor, target=target, **options,
    )  # fmt: skip


def train(distiller, data=None, num_steps=6, **arguments):
    """Train by plain gradient descent; return the logs of every step."""
    seed_all(0)  # the first weights of projections and gates may be drawn when the training begins
    seen, step = [], distiller.step

    def watched(module, batch, progress, share):
        loss, logs = step(module, batch, progress, share)
        seen.append({"total": loss.item(), **{name: value.item() for name, value in logs.items()}})
        return loss, logs

    distiller.step = watched
    optimizer = torch.optim.SGD(distiller.model_S.parameters(), lr=0.1)
    distiller.train(optimizer, batches() if data is None else data, num_steps=num_steps, **arguments)
    distiller.step = step
    return seen


class Own(MultiTeacherDistiller):
    """A loss of the user's own: it is handed full views of all teachers."""

    def compute_loss(self, results_S, results_T):
        assert all(views["logits"][0].device.type == "cpu" for views in results_T)
        assert all(len(views["hidden"]) > 1 for views in results_T)
        return super().compute_loss(results_S, results_T)


# ---- one after the other -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_a_user_s_own_loss_gets_the_list_and_the_same_numbers(name, by_token, tmp_path):
    """Whether the teachers are taken in one by one or handed over as a list."""
    settings = {"intermediate_matches": PAIR, "by_token": by_token, "temperature": 2}
    distillers = [make(tmp_path / str(kind.__name__), name, kind=kind, **settings) for kind in
                  (MultiTeacherDistiller, Own)]  # fmt: skip
    streamed, listed = (train(distiller, batches(by_token=by_token)) for distiller in distillers)
    assert [list(row) for row in streamed] == [list(row) for row in listed]
    for one, other in zip(streamed, listed, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert torch.allclose(weights(distillers[0].model_S), weights(distillers[1].model_S), atol=1e-6)


def alive(refs):
    return sum(ref() is not None for ref in refs)


def watching(found):
    """An adaptor that, each time a teacher speaks, counts the logits of the teachers before that are still there."""
    refs = []

    def watch(batch, outputs):
        found.append(alive(refs))
        refs.append(weakref.ref(outputs["logits"]))
        return adaptor(batch, outputs)

    return watch


@pytest.mark.parametrize("target", ["mean_logits", "mean_probs", "ca_mkd", "entropy", "confidence", "gate", "sample"])
def test_logits_of_teachers_are_let_go(target, tmp_path):
    found = []
    teachers = [make_teacher(number) for number in range(4)]
    train(make(tmp_path, target, teachers, adaptor_T=watching(found), intermediate_matches=PAIR), num_steps=3)
    assert len(found) >= 3
    # A sum of logits is, with the first teacher, just its logits.
    assert max(found) == (1 if target == "mean_logits" else 0)


def test_logits_that_are_not_let_go_are_seen(tmp_path):
    """The count above can fail: a user's own loss holds all of them."""
    found = []
    distiller = make(tmp_path, "mean_probs", [make_teacher(number) for number in range(4)], kind=Own,
                     adaptor_T=watching(found))  # fmt: skip
    train(distiller, num_steps=2)
    assert max(found) == 3


def test_a_user_s_own_target(tmp_path):
    """``kd_target`` gets the list, and what it returns is what the student learns from."""

    class Mine(MultiTeacherDistiller):
        def kd_target(self, results_T):
            assert [views["logits"][0].shape for views in results_T] == [(4, 3)] * 2
            views = super().kd_target(results_T)
            return type(views)({"logits": [logits * 2 for logits in views["logits"]]})

    teachers, student, (batch,) = make_teachers(), make_student(dropout=0.0), batches(4)
    with torch.no_grad():
        first, second = (teacher.eval()(**batch)["logits"] / 4 for teacher in teachers)
        mixed = 2 * 4 * ((first.softmax(-1) + second.softmax(-1)) / 2).log()
        expected = kd_ce_loss(student(**batch)["logits"], mixed, 4.0)
    (logs,) = train(make(tmp_path, "mean_probs", teachers, student, Mine), [batch], 1)
    assert logs["unweighted_kd_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_target_of_losses_has_no_logits(tmp_path):
    class Mine(MultiTeacherDistiller):
        def kd_target(self, results_T):
            return super().kd_target(results_T)

    with pytest.raises(ValueError, match="MeanLoss makes no logits of the teachers' views alone; override"):
        train(make(tmp_path, "mean_loss", kind=Mine), num_steps=1)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_weight_no_target_is_asked(name, tmp_path):
    """Features alone: teachers of other classes, no labels, and no target's figures in the log."""
    teachers = make_teachers()
    teachers[1].classifier = nn.Linear(16, 7)
    distiller = make(tmp_path, name, teachers, kd_loss_weight=0, intermediate_matches=PAIR)
    for batch in (data := batches()):
        del batch["labels"]
    logs = train(distiller, data)
    assert set(logs[0]) == {"total", "unweighted_hidden_hidden_mse_1_2", "unweighted_hidden_cos_1_1"}


# ---- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_teachers_of_different_widths(name, tmp_path):
    """Each match has its own teacher, map and projection; all projections are trained."""
    distiller = make(tmp_path, name, intermediate_matches=PAIR)
    (batch,) = batches(4)
    sizes, start = {}, {}

    def expected():
        found = []
        with torch.no_grad():
            state = distiller.model_S(**batch)["hidden"][1]
            for planned, teacher in zip(distiller.plan, distiller.model_T, strict=True):
                projected = distiller.projections[planned.number](state)
                target = teacher.eval()(**batch)["hidden"][planned.match.layer_T]
                kept = batch["attention_mask"].bool()
                found.append((projected[kept], target[kept]))
        (own, theirs), (own_1, theirs_1) = found
        cosine = nn.functional.cosine_similarity(own_1, theirs_1, dim=-1)
        return [(own - theirs).square().mean().item(), -cosine.mean().item(), 1 - cosine.mean().item()]

    step = distiller.step

    def watched(module, batch, progress, share):
        if not sizes:
            sizes.update({number: item.linear.weight.shape if hasattr(item, "linear") else item.weight.shape
                          for number, item in distiller.projections.items()})  # fmt: skip
            start.update({number: weights(item) for number, item in distiller.projections.items()})
            values.extend(expected())
        return step(module, batch, progress, share)

    values = []
    distiller.step = watched
    logs = train(distiller, [batch], 2)
    assert sizes == {0: (48, 32), 1: (16, 32)}
    assert logs[0]["unweighted_hidden_hidden_mse_1_2"] == pytest.approx(values[0], rel=1e-4)
    assert any(logs[0]["unweighted_hidden_cos_1_1"] == pytest.approx(value, rel=1e-4) for value in values[1:])
    for number, module in distiller.projections.items():
        assert not torch.equal(weights(module), start[number])


# ---- one teacher a batch -----------------------------------------------------------------------------------------


def counting(teachers):
    """Note in which order the teachers run, and on how many rows."""
    ran = []
    for number, teacher in enumerate(teachers):

        def note(module, args, kwargs, number=number):
            ran.append((number, len(kwargs["input_ids"])))

        teacher.register_forward_pre_hook(note, with_kwargs=True)  # fmt: skip
    return ran


@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_the_drawn_teacher_runs(accumulation, tmp_path):
    """By the documented draws: a generator of its own, seeded, one draw a micro-batch."""
    teachers = make_teachers()
    ran = counting(teachers)
    training = {"gradient_accumulation_steps": accumulation}
    target = ["sample", {"weights": [1, 3], "seed": 7}]
    distiller = make(tmp_path, target, teachers, training=training, intermediate_matches=PAIR)
    logs = train(distiller, num_steps=12 // accumulation)
    generator = torch.Generator().manual_seed(7)
    chances = torch.tensor([0.25, 0.75], dtype=torch.float64)
    drawn = [int(torch.multinomial(chances, 1, generator=generator)) for _ in range(12)]
    assert len(set(drawn)) == 2
    # The widths of the projections are asked of both teachers beforehand.
    assert [number for number, _ in ran if number == drawn[0] or len(ran) > 12][-12:] == drawn
    assert len(ran) - 12 in (0, 2)
    names = ["unweighted_hidden_hidden_mse_1_2", "unweighted_hidden_cos_1_1"]
    for number, row in zip(drawn, logs, strict=True):
        assert [name in row for name in names] == [number == 0, number == 1]


def test_the_drawn_teacher_s_loss(tmp_path):
    teachers, student, (batch,) = make_teachers(), make_student(dropout=0.0), batches(4)
    with torch.no_grad():
        losses = [kd_ce_loss(student(**batch)["logits"], item.eval()(**batch)["logits"], 4.0) for item in teachers]
    found = set()
    for seed in range(6):
        distiller = make(tmp_path / str(seed), ["sample", {"seed": seed}], teachers, make_student(dropout=0.0))
        found.add(round(train(distiller, [batch], 1)[0]["unweighted_kd_loss"], 4))
    assert found == {round(loss.item(), 4) for loss in losses}


def test_a_user_s_own_loss_with_one_teacher(tmp_path):
    """The list has a place for each teacher, empty for those that were not asked."""
    kinds = []

    class Mine(MultiTeacherDistiller):
        def compute_loss(self, results_S, results_T):
            kinds.append([isinstance(views, Unheard) for views in results_T])
            return super().compute_loss(results_S, results_T)

    logs = [train(make(tmp_path / kind.__name__, "sample", kind=kind, intermediate_matches=PAIR), num_steps=8)
            for kind in (Mine, MultiTeacherDistiller)]  # fmt: skip
    assert logs[0] == logs[1]
    assert [True, False] in kinds
    assert [False, True] in kinds


# ---- a teacher for each row --------------------------------------------------------------------------------------


def routed(column="teacher_id", **options):
    data = []
    for number, batch in enumerate(batches(**options)):
        ids = torch.tensor([(number + row) % 2 for row in range(4)]) if number else torch.zeros(4, dtype=torch.long)
        data.append({**batch, column: ids})
    return data


def two_sided(batch, where):
    rest = {name: value for name, value in batch.items() if name != "teacher_id"}
    parts = {"teacher": dict(rest), "student": dict(rest)}
    (parts if where == "beside" else parts[where])["teacher_id"] = batch["teacher_id"]
    return parts


class Strict(Encoder):
    """A model that takes no other column."""

    def forward(self, input_ids, attention_mask, labels=None):
        return super().forward(input_ids, attention_mask, labels)


@pytest.mark.parametrize("form", ["dict", "beside", "teacher", "student"])
@pytest.mark.parametrize("by_token", [False, True], ids=["rows", "tokens"])
def test_route(form, by_token, tmp_path):
    """Each row learns from its own teacher, and no model sees the column."""
    data = routed(by_token=by_token)
    teachers, student = make_teachers(by_token), Strict(1, dropout=0.0, by_token=by_token, seed=2)
    ran = counting(teachers)
    expected = []
    with torch.no_grad():
        for batch in data[:2]:
            inputs = {name: value for name, value in batch.items() if name != "teacher_id"}
            logits = [teacher.eval()(**inputs)["logits"] for teacher in teachers]
            target = torch.stack([logits[int(k)][row] for row, k in enumerate(batch["teacher_id"])])
            mask = inputs["labels"] != -100 if by_token else None
            expected.append(kd_ce_loss(student(**inputs)["logits"], target, 4.0, mask=mask).item())
    ran.clear()
    data = data if form == "dict" else [two_sided(batch, form) for batch in data]
    for batch, loss in zip(data, expected, strict=False):
        fresh = Strict(1, dropout=0.0, by_token=by_token, seed=2)
        (logs,) = train(make(tmp_path / str(len(ran)), "route", teachers, fresh), [batch], 1)
        assert logs["unweighted_kd_loss"] == pytest.approx(loss, rel=1e-5)
    assert ran == [(0, 4), (0, 2), (1, 2)]


@pytest.mark.parametrize("kind", ["cache", "memory", "own loss", "matches"])
def test_route_by_other_ways(kind, tmp_path):
    """The same where teachers see all rows: from a cache, in memory, for a loss of one's own, or for a match."""
    options = {"memory": {"is_caching_logits": True}, "matches": {"intermediate_matches": PAIR}}.get(kind, {})
    plain = make(tmp_path / "plain", "route", **({"kind": Own} if kind == "matches" else {}), **options)
    if kind == "cache":
        pytest.importorskip("lmdb")
        options = {"teacher_cache": str(tmp_path / "cache")}
    if kind == "memory":
        plain = make(tmp_path / "plain", "route")
    other = make(tmp_path / "other", "route", **({"kind": Own} if kind == "own loss" else {}), **options)
    data = [routed()[1]]
    first, second = train(plain, data, 3), train(other, data, 3)
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert torch.allclose(weights(plain.model_S), weights(other.model_S), atol=1e-6)


def test_route_reads_another_column(tmp_path):
    logs = train(make(tmp_path, ["route", {"column": "domain"}]), routed("domain"), 2)
    assert len(logs) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: {**b, "teacher_id": torch.tensor([0, 1, 2, 0])}, ValueError, "from 0 to 1, got 2 in row 2"),
        (lambda b: {**b, "teacher_id": torch.tensor([0, -1, 1, 0])}, ValueError, "from 0 to 1, got -1 in row 1"),
        (lambda b: {**b, "teacher_id": torch.tensor([0.0, 1, 1, 0])}, TypeError, "one whole number a row, got 0.0"),
        (lambda b: {**b, "teacher_id": torch.tensor([[0], [1], [1], [0]])}, TypeError, r"got \[0\] in row 0"),
        (lambda b: {**b, "teacher_id": [0, 1]}, ValueError, r"one number for each row of the batch \(4\), got 2"),
        (lambda b: {k: v for k, v in b.items() if k != "teacher_id"}, KeyError, "needs the column 'teacher_id' in"),
        (lambda b: tuple(b.values()), TypeError, "reads a column of dict batches, got a batch of type tuple"),
    ],
    ids=["too large", "negative", "real", "shape", "rows", "missing", "tuple"],
)
def test_wrong_columns(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(make(tmp_path, "route"), [change(routed()[1])], 1)


# ---- what is learned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gate", "uncertainty"])
def test_what_a_target_learns_is_optimised_and_clipped(name, tmp_path):
    distiller = make(tmp_path, name)
    optimizer = torch.optim.AdamW(distiller.model_S.parameters(), lr=0.5, weight_decay=0.1)
    distiller.train(optimizer, batches(), num_steps=2, max_grad_norm=1e-9)
    group = optimizer.param_groups[-1]
    assert {id(item) for item in group["params"]} == {id(item) for item in distiller.learner.parameters()}
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)
    gradients = [item.grad for item in distiller.learner.parameters() if item.grad is not None]
    assert all(gradient.abs().max() <= 1e-9 for gradient in gradients)
    saved = sorted((tmp_path).glob("checkpoint-*"))[-1]
    from safetensors.torch import load_file

    stored = load_file(saved / "model.safetensors")
    for key, value in distiller.learner.state_dict().items():
        assert torch.equal(stored[f"learner.{key}"], value)
    assert not any("learner" in key for key in torch.load(tmp_path / "gs2.pkl", weights_only=True))


def test_learned_variances_follow_the_losses(tmp_path):
    """With a rate high enough they reach their optimum, twice the loss with each teacher."""
    distiller = make(tmp_path, ["uncertainty", {"lr": 0.5}])
    (batch,) = batches(4)
    optimizer = torch.optim.SGD(distiller.model_S.parameters(), lr=1e-6)
    distiller.train(optimizer, [batch], num_steps=120)
    with torch.no_grad():
        logits = distiller.model_S(**batch)["logits"]
        losses = [kd_ce_loss(logits, teacher(**batch)["logits"], 4.0) for teacher in distiller.model_T]
    found = distiller.learner.log_variance.exp()
    assert found.tolist() == pytest.approx([2 * loss.item() for loss in losses], rel=1e-2)


class Points(nn.Module):
    """A small network on points of the plane."""

    def __init__(self, seed=0):
        super().__init__()
        seed_all(seed)
        self.body, self.head = nn.Sequential(nn.Linear(2, 32), nn.Tanh()), nn.Linear(32, 2)

    def forward(self, points, labels):
        hidden = self.body(points)
        return {"logits": self.head(hidden), "hidden": [hidden.unsqueeze(1)], "labels": labels}


class HalfRight(nn.Module):
    """Right on one side of the plane, and as sure, but wrong, on the other."""

    def __init__(self, sign):
        super().__init__()
        self.sign, self.unused = sign, nn.Parameter(torch.zeros(()))

    def forward(self, points, labels):
        right = (self.sign * points[:, 0] > 0).float() * 2 - 1
        truth = (points[:, 1] > 0).float() * 2 - 1
        score = 4 * right * truth
        return {"logits": torch.stack([-score, score], dim=1)}


def plane(count, seed):
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return {"points": points, "labels": (points[:, 1] > 0).long()}


def reading(batch, outputs):
    return {name: outputs[name] for name in ("logits", "hidden", "labels") if name in outputs}


def accuracy_with(folder, target, teachers):
    """Of a student that learns from the teachers alone."""
    student = Points()
    data = [plane(64, seed) for seed in range(10)]
    distiller = MultiTeacherDistiller(
        make_config(folder), DistillationConfig(temperature=1), teachers, student, reading, reading, target=target
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    distiller.train(optimizer, DataLoader(data, batch_size=None), num_steps=300)
    test = plane(2000, 99)
    with torch.no_grad():
        right = (student(**test)["logits"].argmax(-1) == test["labels"]).float().mean().item()
        views = {"hidden": student(**test)["hidden"]}
        gate = distiller.learner(views).exp() if distiller.learner is not None else None
    return right, gate, test


def test_the_gate_does_not_collapse(tmp_path):
    """Two teachers, each right in one half: the gate finds out which, and its student beats that of either."""
    teachers = [HalfRight(1), HalfRight(-1)]
    found, gate, test = accuracy_with(tmp_path / "gate", ["gate", {"lr": 0.02}], teachers)
    alone = [accuracy_with(tmp_path / str(n), "mean_logits", [item])[0] for n, item in enumerate(teachers)]
    assert max(alone) < 0.6
    assert found > 0.9
    right = test["points"][:, 0] > 0
    assert gate[right, 0].mean() > 0.8
    assert gate[~right, 1].mean() > 0.8


def test_the_gate_asks_ready_made_adaptors_for_states(tmp_path):
    """Behind ``"auto"`` the student returns hidden states, though no match needs them; else the gate reads logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        num_labels=3, max_position_embeddings=LENGTH,
    )  # fmt: skip
    models = [transformers.BertForSequenceClassification(config) for _ in range(3)]
    distiller = MultiTeacherDistiller(
        make_config(tmp_path), DistillationConfig(), models[:2], models[2], "auto", "auto", target="gate"
    )
    train(distiller, num_steps=2)
    assert distiller.learner.reader.in_features == 24
    distiller = make(tmp_path / "own", "gate", student=NoStates(1, dropout=0.0, seed=2))
    train(distiller, num_steps=2)
    assert distiller.learner.reader.in_features == 3


class NoStates(Encoder):
    def forward(self, **batch):
        return {**super().forward(**batch), "hidden": None}


def test_a_gate_that_reads_vectors_of_other_widths(tmp_path):
    """Logits as wide as the batch is long, as for questions and answers."""

    def spans(batch, outputs):
        logits = outputs["hidden"][-1][..., 0]
        return {"logits": logits, "labels": batch["labels"].clamp_max(1)}

    distiller = MultiTeacherDistiller(
        make_config(tmp_path), DistillationConfig(), make_teachers(), make_student(), spans, spans, target="gate"
    )
    first, second = batches(8)
    cut = {name: value[:, :5] if value.dim() == 2 else value for name, value in second.items()}
    with pytest.raises(ValueError, match="must read vectors of one width, got 8 and then 5; return 'hidden'"):
        train(distiller, [first, cut], 2)


# ---- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"route"}))
def test_every_target_from_a_cache(name, tmp_path):
    """The same losses from disk and from memory, at last without the teachers."""
    pytest.importorskip("lmdb")
    # Without teachers nothing tells the widths but the matches.
    settings = {"intermediate_matches": [PAIR[0], {**PAIR[1], "proj": ["linear", 32, 16]}], "hard_label_weight": 1}
    expected = train(make(tmp_path / "plain", name, **settings), num_steps=12)
    folder, teachers = str(tmp_path / "cache"), make_teachers()
    first = train(make(tmp_path / "first", name, teachers, teacher_cache=folder, **settings), num_steps=12)
    if name == "sample":
        # Only rows of teachers that were drawn are stored: the others are stored beforehand.
        for number, teacher in enumerate(teachers):
            precompute(teacher, batches(), adaptor, folder, DistillationConfig(**settings),
                       make_config(tmp_path), number=number)  # fmt: skip
    later = train(make(tmp_path / "later", name, [None, None], teacher_cache=folder, **settings), num_steps=12)
    for other in (first, later):
        for one, two in zip(expected, other, strict=True):
            # Rows are stored in half the precision, features too.
            assert one == pytest.approx(two, rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_every_target_from_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr("random.shuffle", lambda items: None)
    expected = train(make(tmp_path / "plain", name, intermediate_matches=PAIR), num_steps=12)
    found = train(make(tmp_path / "memory", name, intermediate_matches=PAIR, is_caching_logits=True), num_steps=12)
    for one, two in zip(expected, found, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_exact_accumulation(name, tmp_path):
    """Two micro-batches of other sizes are one batch, whatever the target; its weights are those of each row."""
    if name == "agree":
        pytest.skip("its weights are those of a micro-batch")
    training = {"gradient_accumulation_steps": 2, "accumulation_weighting": "positions"}
    (whole,) = batches(6, 6)
    parts = [{key: value[:2] for key, value in whole.items()}, {key: value[2:] for key, value in whole.items()}]
    models = []
    for folder, data, settings in (("whole", [whole], {}), ("parts", parts, training)):
        distiller = make(tmp_path / folder, name, training=settings)
        train(distiller, data, 1)
        models.append(distiller)
    assert torch.allclose(*(weights(item.model_S) for item in models), atol=1e-6)
    if models[0].learner is not None:
        assert torch.allclose(*(weights(item.learner) for item in models), atol=1e-6)


# ---- devices and precisions --------------------------------------------------------------------------------------


def test_a_precision_for_each_teacher(tmp_path):
    """One teacher in bf16: its logits are rounded, the other's are not; outputs are float32."""
    seen = {}

    def note(number):
        def read(batch, outputs):
            seen[number] = outputs["logits"]
            return adaptor(batch, outputs)

        return read

    teachers, (batch,) = make_teachers(), batches(4)
    with torch.no_grad():
        plain = [teacher.eval()(**batch)["logits"] for teacher in teachers]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = teachers[1](**batch)["logits"].float()
    options = {"adaptor_T": [note(0), note(1)], "teacher_precisions": [None, "bf16"]}
    train(make(tmp_path, "mean_probs", teachers, **options), [batch], 1)
    assert all(item.dtype == torch.float32 for item in seen.values())
    assert torch.equal(seen[0], plain[0])
    assert torch.equal(seen[1], rounded)
    assert not torch.equal(seen[1], plain[1])


def test_int8_for_one_teacher(tmp_path):
    kinds = []

    class Watched(Encoder):
        def forward(self, **batch):
            kinds.append((self.number, type(self.classifier)))
            return super().forward(**batch)

    teachers = [Watched(seed=1), Watched(seed=3)]
    for number, teacher in enumerate(teachers):
        teacher.number = number
    train(make(tmp_path, teachers=teachers, teacher_precisions=["int8", "no"]), num_steps=2)
    assert {kind for number, kind in kinds if number == 1} == {nn.Linear}
    assert nn.Linear not in {kind for number, kind in kinds if number == 0}
    assert all(type(teacher.classifier) is nn.Linear for teacher in teachers)


def test_the_teachers_devices(tmp_path):
    """A device that is not the run's: the teacher is moved there, and cannot say anything that has values."""
    teachers = make_teachers()
    distiller = make(tmp_path, teachers=teachers, teacher_devices=[None, "meta"])
    with pytest.raises(NotImplementedError, match="meta"):
        train(distiller, num_steps=1)
    assert teachers[0].classifier.weight.device.type == "cpu"
    assert teachers[1].classifier.weight.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precisions", [None, ["bf16", "bf16"]])
@pytest.mark.parametrize("run", ["cpu", "cuda"])
def test_teachers_on_other_devices(run, precisions, tmp_path):
    """One on the GPU and one on the CPU, the student on either: the losses of a run on one device."""
    expected = train(make(tmp_path / "plain", "ca_mkd", intermediate_matches=PAIR), num_steps=4)
    distiller = make(
        tmp_path / "out", "ca_mkd", intermediate_matches=PAIR, teacher_devices=["cuda", "cpu"],
        teacher_precisions=precisions,
    )  # fmt: skip
    distiller.t_config.device = run
    found = train(distiller, num_steps=4)
    for one, two in zip(expected, found, strict=True):
        assert one == pytest.approx(two, rel=1e-3 if precisions is None else 5e-2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher_devices": "cuda"}, TypeError, "teacher_devices must be a list of one a teacher, got 'cuda'"),
        ({"teacher_devices": ["cpu"]}, ValueError, r"teacher_devices must have one entry a teacher \(2\), got 1"),
        ({"teacher_precisions": ["no"] * 3}, ValueError, r"one entry a teacher \(2\), got 3"),
        ({"teacher_precisions": ["no", "fp8"]}, ValueError, r"teacher_precisions\[1\] must be one of"),
        ({"teacher_precisions": ["fp16", None]}, ValueError, r"teacher_precisions\[0\]='fp16' needs a GPU"),
        (
            {"teacher_precisions": [None, "int8"], "teacher_devices": [None, "meta"]},
            ValueError,
            r"teacher_precisions\[1\]='int8' is for CPUs, and this teacher's device is 'meta'",
        ),
        (
            {"teacher_precisions": [None, "int8"], "training": {"compile": "teacher"}},
            ValueError,
            "a teacher in int8 cannot be compiled",
        ),
    ],
    ids=["string", "one", "three", "unknown", "fp16", "int8", "compiled"],
)
def test_wrong_devices_and_precisions(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(make(tmp_path, **options), num_steps=1)


def test_one_teacher_on_two_devices(tmp_path):
    teacher = make_teacher()
    with pytest.raises(ValueError, match="a teacher that is in model_T twice must be on one device, got cpu and meta"):
        make(tmp_path, teachers=[teacher, teacher], teacher_devices=["cpu", "meta"])
