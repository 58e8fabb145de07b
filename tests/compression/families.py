"""The nine families that pruning must know, tiny and random, and what all tests of it do with them."""

import torch

from tests.students.models import VOCABULARY, batch_for, make
from textbrewer import compression

NINE = ("bert-classifier", "roberta", "distilbert", "electra", "gpt2", "llama", "qwen2", "bart", "t5", "vit")
GROUPED = ("llama", "mistral", "qwen2")

# Where the units are read, by hand: within a layer, of attentions and of feed-forward parts.
READERS = {
    "bert": (("attention.output.dense",), ("output.dense",)),
    "distilbert": (("attention.out_lin",), ("ffn.lin2",)),
    "gpt2": (("attn.c_proj",), ("mlp.c_proj",)),
    "llama": (("self_attn.o_proj",), ("mlp.down_proj",)),
    "qwen2": (("self_attn.o_proj",), ("mlp.down_proj",)),
    "bart": (("self_attn.out_proj", "encoder_attn.out_proj"), ("fc2",)),
    "vit": (("attention.o_proj",), ("mlp.fc2",)),
}


def with_labels(model, seed=0):
    """Return a batch with labels, for a loss of the model's own."""
    batch = batch_for(model, seed)
    torch.manual_seed(seed + 100)
    name = type(model).__name__
    rows = next(iter(batch.values())).shape[0]
    if "SequenceClassification" in name or "ImageClassification" in name:
        return {**batch, "labels": torch.randint(0, model.config.num_labels, (rows,))}
    if "TokenClassification" in name:
        return {**batch, "labels": torch.randint(0, model.config.num_labels, batch["input_ids"].shape)}
    target = batch.get("decoder_input_ids", batch["input_ids"])
    return {**batch, "labels": torch.randint(3, VOCABULARY, target.shape)}


def double(name, **settings):
    """Return a model in float64, whose sums do not depend on the order of their terms."""
    return make(name, **settings).double()


def mild(name, **settings):
    """Return a model with smaller weights, whose attention does not magnify the rounding of single precision."""
    model = make(name, **settings)
    for parameter in model.parameters():
        parameter.data *= 0.5
    return model


def cast(batch, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def gradients(model, batch):
    """Return the loss, and the gradients of all parameters by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def check_generation(masked):
    """What is shrunk writes what the masked model writes, with a cache and without."""
    small = masked.shrink()
    tokens = batch_for(small)["input_ids"]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        cached = small.generate(tokens, use_cache=True, **settings)
        plain = small.generate(tokens, use_cache=False, **settings)
        theirs = masked.model.generate(tokens, use_cache=True, **settings)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, theirs)


def check_training_on(small, folder):
    """A model that was saved and loaded learns as the one that was not."""
    compression.save(small, folder)
    losses = []
    for model in (small, compression.load(folder)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        values = []
        for seed in range(3):
            loss, found = gradients(model, with_labels(model, seed))
            assert any(gradient is not None for gradient in found.values())
            optimizer.step()
            values.append(float(loss))
        losses.append(values)
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
