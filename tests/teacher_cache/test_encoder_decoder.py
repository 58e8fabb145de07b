"""An encoder-decoder's rows in the cache: the decoder's positions are not those of the encoder's mask."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from textbrewer import CacheError, DistillationConfig, GeneralDistiller, TeacherCache, TrainingConfig

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


def trained(folder, cache, make, data, kd=1, matches=(), adaptor="auto"):
    """The weights of a student after two passes."""
    learn = DistillationConfig(kd_loss_weight=kd, intermediate_matches=list(matches))
    config = TrainingConfig(output_dir=str(folder), progress_bar=False, device="cpu")
    student = make(1, 5)
    distiller = GeneralDistiller(config, learn, make(2, 9), student, adaptor, adaptor, teacher_cache=cache)
    distiller.train(torch.optim.SGD(student.parameters(), lr=0.1), data, num_epochs=2)
    return student.state_dict()


def assert_as_without(tmp_path, *arguments, **options):
    plain = trained(tmp_path / "without", None, *arguments, **options)
    cached = trained(tmp_path / "with", cache_at(tmp_path), *arguments, **options)
    for tensor, value in plain.items():
        torch.testing.assert_close(cached[tensor], value, rtol=1e-5, atol=1e-6)


def cache_at(tmp_path, **options):
    return TeacherCache(tmp_path / "cache", dtype="float32", **options)


@pytest.mark.parametrize("data", [[SHORTER, LONGER], [LONGER, SHORTER], [LONGER, OTHER]])
@pytest.mark.parametrize(("kd", "matches"), [(1, []), (0, [MATCH])])
def test_students_are_those_without_a_cache(data, kd, matches, tmp_path):
    assert_as_without(tmp_path, t5, data, kd, matches)


class Within(nn.Module):
    """A T5 in a module of the user's own, which has no configuration."""

    def __init__(self, layers, seed):
        super().__init__()
        self.inner = t5(layers, seed)

    def forward(self, **batch):
        return self.inner(**batch, output_hidden_states=True)


class Own(nn.Module):
    """An encoder and a decoder, or two texts: the states of the second with what the first has on average."""

    def __init__(self, layers, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask, second, pooled=False):
        weight = attention_mask[..., None].float()
        mean = (self.embedding(input_ids) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        hidden = [self.embedding(second) + mean]
        for block in self.blocks:
            hidden.append(torch.tanh(block(hidden[-1])))
        return {"logits": self.head(hidden[-1].mean(1) if pooled else hidden[-1]), "hidden": hidden}


class OwnPooled(Own):
    def forward(self, input_ids, attention_mask, input_ids_b, attention_mask_b):
        return super().forward(input_ids, attention_mask, input_ids_b * attention_mask_b, pooled=True)


class OwnDecoder(Own):
    def forward(self, input_ids, attention_mask, decoder_input_ids):
        return super().forward(input_ids, attention_mask, decoder_input_ids)


def second_of(data):
    return data["labels"].clamp_min(0)


def two_texts(data):
    first = {name: data[name] for name in ("input_ids", "attention_mask")}
    return {**first, "input_ids_b": second_of(data), "attention_mask_b": (data["labels"] != -100).long()}


def with_decoder(data):
    return {**{name: data[name] for name in ("input_ids", "attention_mask")}, "decoder_input_ids": second_of(data)}


def without_name(data):
    return {**{name: data[name] for name in ("input_ids", "attention_mask")}, "second": second_of(data)}


def of_second(batch, outputs):
    """Reads the second sequence, whose padding is 0."""
    second = next(batch[name] for name in ("decoder_input_ids", "input_ids_b", "second") if name in batch)
    by_token = {} if outputs["logits"].dim() == 2 else {"logits_mask": second != 0}
    return {**outputs, **by_token, "inputs_mask": second != 0}


def of_inner(batch, outputs):
    mask = batch["labels"] != -100
    return {
        "logits": outputs.logits, "hidden": outputs.decoder_hidden_states, "inputs_mask": mask, "logits_mask": mask
    }  # fmt: skip


MODELS = {
    "T5 within": (Within, dict, of_inner),
    "two texts": (OwnPooled, two_texts, of_second),
    "decoder": (OwnDecoder, with_decoder, of_second),
}


@pytest.mark.parametrize("data", [[SHORTER, LONGER], [LONGER, SHORTER], [SHORTER, LONGER, OTHER]])
@pytest.mark.parametrize("kd", [1, 0])
@pytest.mark.parametrize("model", MODELS)
def test_models_of_the_users_own_with_two_sequences(model, kd, data, tmp_path):
    make, change, adaptor = MODELS[model]
    matches = [] if kd else [MATCH]
    assert_as_without(tmp_path, make, list(map(change, data)), kd=kd, matches=matches, adaptor=adaptor)


@pytest.mark.parametrize("kd", [1, 0])
def test_a_second_sequence_that_no_name_tells_of_is_refused_at_its_first_longer_row(kd, tmp_path):
    """The masks of the first batch lie within the encoder's mask, those of the second do not."""
    data = [without_name(SHORTER), without_name(LONGER)]
    options = {"kd": kd, "matches": [] if kd else [MATCH], "adaptor": of_second}
    with pytest.raises(CacheError, match=r"stored without padding.*keep_padding=True"):
        trained(tmp_path / "job", cache_at(tmp_path), Own, data, **options)
    plain = trained(tmp_path / "plain", None, Own, data, **options)
    remedy = trained(tmp_path / "remedy", cache_at(tmp_path, keep_padding=True), Own, data, **options)
    for tensor, value in plain.items():
        torch.testing.assert_close(remedy[tensor], value, rtol=1e-5, atol=1e-6)


def test_a_second_sequence_of_another_length_after_one_of_the_same_is_refused(tmp_path):
    longer = without_name(LONGER)
    data = [without_name(SHORTER), {**longer, "second": nn.functional.pad(longer["second"], (0, 2), value=3)}]
    with pytest.raises(CacheError, match=r"have other positions than the mask.*keep_padding=True"):
        trained(tmp_path / "job", cache_at(tmp_path), Own, data, kd=0, matches=[MATCH], adaptor=of_second)
