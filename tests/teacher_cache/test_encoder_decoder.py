"""An encoder-decoder's rows in the cache: the decoder's positions are not those of the encoder's mask."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from textbrewer import DistillationConfig, GeneralDistiller, TeacherCache, TrainingConfig

MATCH = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}


def t5(layers, seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": layers, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def batch(sources, targets, seed, length=8):
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, 40, (len(sources), length), generator=generator) for _ in range(2))
    mask = torch.arange(length) < torch.tensor(sources)[:, None]
    labels[torch.arange(length) >= torch.tensor(targets)[:, None]] = -100
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


SHORTER, LONGER = batch([8, 6], [4, 3], 1), batch([5, 3], [7, 6], 2)
# The same sources as LONGER, and targets that differ beyond these alone.
OTHER = {**LONGER, "labels": torch.where((torch.arange(8) == 5) & (LONGER["labels"] != -100), 9, LONGER["labels"])}


@pytest.mark.parametrize("data", [[SHORTER, LONGER], [LONGER, SHORTER], [LONGER, OTHER]])
@pytest.mark.parametrize(("kd", "matches"), [(1, []), (0, [MATCH])])
def test_students_are_those_without_a_cache(data, kd, matches, tmp_path):
    found = []
    for name in ("without", "with"):
        cache = TeacherCache(tmp_path / "cache", dtype="float32") if name == "with" else None
        learn = DistillationConfig(kd_loss_weight=kd, intermediate_matches=matches)
        config = TrainingConfig(output_dir=str(tmp_path / name), progress_bar=False, device="cpu")
        student = t5(1, seed=5)
        distiller = GeneralDistiller(config, learn, t5(2, seed=9), student, "auto", "auto", teacher_cache=cache)
        distiller.train(torch.optim.SGD(student.parameters(), lr=0.1), data, num_epochs=2)
        found.append(student.state_dict())
    for tensor, value in found[0].items():
        torch.testing.assert_close(found[1][tensor], value, rtol=1e-5, atol=1e-6)
