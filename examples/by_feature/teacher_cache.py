"""The teacher cache: the teacher's outputs on the disk, for every later epoch, run and process; and then no teacher.

    python examples/by_feature/teacher_cache.py

The data is shuffled and padded anew in every epoch. Rows are found again all the same: the key of a row is its content.
"""

import tempfile
import time

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from textbrewer import DistillationConfig, GeneralDistiller, TeacherCache, TrainingConfig, precompute

torch.manual_seed(0)
ROWS = [torch.randint(1, 100, (length,)) for length in torch.randint(4, 17, (256,)).tolist()]
MATCHES = [
    {"layer_T": 6, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": "linear"},
    {"layer_T": [3, 6], "layer_S": [0, 1], "feature": "hidden", "loss": "nst", "weight": 1},
]
LEARN = DistillationConfig(temperature=2, intermediate_matches=MATCHES)


def model(layers, width):
    """Return a BERT with random weights."""
    config = BertConfig(
        vocab_size=100,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=4,
    )
    return BertForSequenceClassification(config)


def collate(rows):
    """Return a batch padded to its longest row."""
    ids = pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def loader():
    return DataLoader(ROWS, batch_size=16, shuffle=True, collate_fn=collate)


def train(teacher, cache, folder):
    """Return the seconds that four epochs take."""
    torch.manual_seed(1)
    student = model(layers=1, width=32)
    distiller = GeneralDistiller(
        TrainingConfig(output_dir=folder, progress_bar=False, device="cpu"),
        LEARN,
        model_T=teacher,
        model_S=student,
        adaptor_T="auto",
        adaptor_S="auto",
        teacher_cache=cache,
    )
    start = time.perf_counter()
    distiller.train(torch.optim.AdamW(student.parameters(), lr=1e-3), loader(), num_epochs=4)
    return time.perf_counter() - start


teacher = model(layers=6, width=256)
with tempfile.TemporaryDirectory() as folder:
    print(f"without a cache:       {train(teacher, None, f'{folder}/a'):5.2f} s")
    cache = TeacherCache(f"{folder}/cache")
    print(f"filled while training: {train(teacher, cache, f'{folder}/b'):5.2f} s")
    print(f"found in the cache:    {train(teacher, cache, f'{folder}/c'):5.2f} s")
    print(cache.info())

    # The teacher's machine fills a cache; the student's machine has no teacher.
    ahead = TeacherCache(f"{folder}/ahead", dtype="int8")
    precompute(teacher, loader(), "auto", ahead, LEARN, TrainingConfig(progress_bar=False, device="cpu"))
    print(f"without a teacher:     {train(None, ahead, f'{folder}/d'):5.2f} s")
