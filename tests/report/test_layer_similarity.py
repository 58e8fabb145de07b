import sys

import numpy as np
import pytest
import torch
from torch import nn

from tests.students.models import LENGTH, VOCABULARY, make
from textbrewer.report import LayerSimilarity, layer_similarity, plot_layer_similarity
from textbrewer.students import init_student_from_teacher


class States(nn.Module):
    """Gives back tensors of its batch as hidden states, slightly changed in training mode."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.noise = names, nn.Dropout(0.5)

    def forward(self, **batch):
        return [self.noise(batch[name]) for name in self.names]


def adaptor(batch, outputs):
    return {"hidden": outputs, "inputs_mask": batch.get("mask")}


def cka(x, y):
    """Linear CKA of two matrices of all positions, as the formula says."""
    x, y = (np.asarray(matrix, dtype=np.float64) for matrix in (x, y))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def random_batches(sizes, widths, mean=0.0, length=5):
    torch.manual_seed(0)
    batches = []
    for size in sizes:
        batch = {name: torch.randn(size, length, width) + mean for name, width in widths.items()}
        batch["mask"] = (torch.arange(length) < torch.randint(1, length + 1, (size, 1))).long()
        batch["b"][..., :2] += batch["a"][..., :2]
        batches.append(batch)
    return batches


WIDTHS = {"a": 7, "b": 4, "c": 6, "d": 3}


def positions(batches, name, rows=None):
    states = torch.cat([batch[name] for batch in batches])[:rows]
    return states[torch.cat([batch["mask"] for batch in batches])[:rows].bool()]


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("rows", [None, 1000, 11, 4])
def test_values_are_those_of_the_formula(mean, rows):
    batches = random_batches([4, 6, 3], WIDTHS, mean)
    teacher, student = States("a", "b"), States("c", "d", "b")
    result = layer_similarity(teacher, student, batches, adaptor, adaptor, max_rows=rows)
    for i, one in enumerate(teacher.names):
        for j, other in enumerate(student.names):
            expected = cka(positions(batches, one, rows), positions(batches, other, rows))
            assert float(result.values[i, j]) == pytest.approx(expected, rel=1e-4)
    assert result.values.shape == (2, 3)
    assert result.positions == len(positions(batches, "a", rows))
    assert float(result.values[1, 2]) == pytest.approx(1)
    assert teacher.training
    assert student.noise.training


def test_rotation_scale_and_shift_change_nothing():
    batches = random_batches([4, 6], WIDTHS)
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    for batch in batches:
        batch["turned"] = 3 * batch["a"] @ rotation + 2
    result = layer_similarity(States("a"), States("turned", "c"), batches, adaptor, adaptor)
    assert float(result.values[0, 0]) == pytest.approx(1, rel=1e-5)
    assert float(result.values[0, 1]) < 0.9


def test_states_without_positions_and_a_mask_on_one_side_only():
    batches = random_batches([8, 9], WIDTHS)
    for batch in batches:
        batch["flat"] = batch["a"][:, 0]

    def without_mask(batch, outputs):
        return {"hidden": outputs}

    flat = layer_similarity(States("flat"), States("flat"), batches, adaptor, without_mask)
    assert flat.positions == 17
    one = layer_similarity(States("a"), States("c"), batches, adaptor, without_mask)
    other = layer_similarity(States("a"), States("c"), batches, without_mask, adaptor)
    both = layer_similarity(States("a"), States("c"), batches, adaptor, adaptor)
    neither = layer_similarity(States("a"), States("c"), batches, without_mask, without_mask)
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.values, both.values)
    assert neither.positions == 17 * 5


def test_a_batch_with_a_part_for_each_side():
    batches = random_batches([8], WIDTHS)
    parts = [{"teacher": batch, "student": {"x": batch["c"], "mask": batch["mask"]}} for batch in batches]
    result = layer_similarity(States("a"), States("x"), parts, adaptor, adaptor)
    expected = layer_similarity(States("a"), States("c"), batches, adaptor, adaptor)
    assert torch.equal(result.values, expected.values)


def test_a_state_that_never_changes_has_no_similarity():
    batches = [{"a": torch.randn(6, 3), "same": torch.ones(6, 2)}]
    result = layer_similarity(States("a", "same"), States("a", "same"), batches, adaptor, adaptor)
    assert torch.equal(result.values.isnan(), torch.tensor([[False, True], [True, True]]))
    assert result.best_student == [0, 0]


def test_the_best_match_of_rows_and_columns():
    result = LayerSimilarity(torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.4]]), positions=5)
    assert result.best_student == [0, 0]
    assert result.best_teacher == [0, 1, 1]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_transformers_models(kind):
    teacher = make("bert-classifier").to(kind)
    student = init_student_from_teacher(teacher, 2)
    torch.manual_seed(3)
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [6]])).long()
    batch = {"input_ids": torch.randint(0, VOCABULARY, (3, LENGTH)), "attention_mask": mask}
    result = layer_similarity(teacher, student, [batch])
    with torch.no_grad():
        mine, theirs = (
            [state[mask.bool()].float() for state in model.eval()(**batch, output_hidden_states=True).hidden_states]
            for model in (teacher, student)
        )
    for i, x in enumerate(mine):
        for j, y in enumerate(theirs):
            assert float(result.values[i, j]) == pytest.approx(cka(x, y), rel=1e-4)
    assert result.values.shape == (5, 3)
    assert float(result.values[0, 0]) == pytest.approx(1)  # the same embeddings


@pytest.mark.parametrize(
    ("batches", "sides", "error", "message"),
    [
        ([], ("a", "b"), ValueError, "at least one position"),
        ([{"a": torch.ones(2, 3, 4), "b": torch.ones(2, 2, 4)}], ("a", "b"), ValueError, "same positions"),
        ([{"a": torch.ones(2, 3, 4, 4)}], ("a", "a"), ValueError, r"\(batch, length, width\) or \(batch, width\)"),
        ([{"a": torch.ones(2, 3, 4), "mask": torch.ones(2, 2)}], ("a", "a"), ValueError, "same mask"),
        ([{"a": torch.ones(2, 3), "mask": None}], (), KeyError, "adaptor_T must return the hidden states"),
    ],
)
def test_what_cannot_be_compared(batches, sides, error, message):
    teacher, student = (States(side) for side in sides) if sides else (States(), States())
    with pytest.raises(error, match=message):
        layer_similarity(teacher, student, batches, adaptor, adaptor)


def test_masks_that_differ():
    def other_adaptor(batch, outputs):
        return {"hidden": outputs, "inputs_mask": 1 - batch["mask"]}

    with pytest.raises(ValueError, match="same mask"):
        layer_similarity(States("a"), States("a"), random_batches([3], WIDTHS), adaptor, other_adaptor)


def test_a_number_of_states_that_changes():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, **batch):
            self.calls += 1
            return [batch["a"]] * self.calls

    with pytest.raises(ValueError, match="as many hidden states, got 2 and 1 after 1 and 1"):
        layer_similarity(Growing(), States("a"), random_batches([3, 3], WIDTHS), adaptor, adaptor)


def test_max_rows_is_checked():
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        layer_similarity(States("a"), States("a"), [], adaptor, adaptor, max_rows=0)


def test_the_picture(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    values = torch.tensor([[0.91, 0.25, 0.3], [0.5, 0.625, float("nan")]])
    plot_layer_similarity(LayerSimilarity(values, positions=1234), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "0.91", (1, 0): "0.25", (2, 0): "0.30", (0, 1): "0.50", (1, 1): "0.62", (2, 1): "?"}
    frames = []
    for frame in axes.patches:
        (left, top), width, height = frame.get_xy(), frame.get_width(), frame.get_height()
        frames.append((round(left + width / 2), round(top + height / 2)))
    assert frames == [(0, 0), (1, 1)]
    assert "1,234 positions" in drawn[0].get_supxlabel()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'textbrewer\[plot\]'"):
        plot_layer_similarity(LayerSimilarity(torch.ones(1, 1), positions=1), tmp_path / "map.png")
