"""What the read-ahead thread does: copying bytes, and nothing that would make torch start threads for it."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import textbrewer
from tests.conftest import make_config
from textbrewer.teacher_cache import Space

# What makes a tensor of the same memory.
FREE = {"detach", "view", "alias", "_unsafe_view", "lift_fresh"}


class Operations(TorchDispatchMode):
    """Notes the operations that torch computes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids)
        return self.head(hidden[:, 0]), hidden


def adaptor(batch, outputs):
    return {"logits": outputs[0], "hidden": [outputs[1]], "inputs_mask": batch["attention_mask"]}


def test_a_look_up_computes_nothing_with_torch(tmp_path, monkeypatch):
    """With padding, holes in the mask and every storage type, for rows that are missing and rows that are found."""
    ids = torch.arange(12).reshape(3, 4) % 9
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]])
    matches = [{"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1}]
    seen, looked_up = [], Space.lookup

    def watched(self, *arguments):
        with Operations() as operations:
            found = looked_up(self, *arguments)
        seen.append((found.gathered is not None, operations.names))
        return found

    monkeypatch.setattr(Space, "lookup", watched)
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        student = Model()
        distiller = textbrewer.GeneralDistiller(
            make_config(tmp_path / dtype),
            textbrewer.DistillationConfig(intermediate_matches=matches),
            Model(),
            student,
            adaptor,
            adaptor,
            teacher_cache=textbrewer.TeacherCache(tmp_path / f"cache-{dtype}", dtype=dtype),
        )
        batch = {"input_ids": ids, "attention_mask": mask}
        distiller.train(torch.optim.SGD(student.parameters(), lr=0.1), [batch], num_epochs=2)
    assert {found for found, _ in seen} == {True, False}
    assert set().union(*(names for _, names in seen)) <= FREE
