"""BERT-of-Theseus: a model made half as deep by replacing its layers one after the other, with no teacher's loss.

    python examples/by_feature/theseus.py

A small BERT of 6 layers learns to tell whether a sentence has more words of the vocabulary's upper half. Its successor
has 3 layers, each in place of two; in every step, chance decides which of them run.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

from textbrewer import BasicTrainer, TrainingConfig
from textbrewer.distillers import TheseusDistiller

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 6}


def sentences(count, seed):
    """Return rows of 12 tokens; label 1: more of them are of the vocabulary's upper half."""
    tokens = torch.randint(0, 100, (count, 12), generator=torch.Generator().manual_seed(seed))
    return tokens, (tokens >= 50).sum(dim=1).gt(6).long()


def batches(seed):
    tokens, labels = sentences(1024, seed)
    pairs = zip(tokens.split(32), labels.split(32), strict=True)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": own} for ids, own in pairs]


@torch.no_grad()
def accuracy(model):
    tokens, labels = sentences(1000, seed=1)
    return 100 * (model.eval()(tokens).logits.argmax(dim=1) == labels).float().mean().item()


torch.manual_seed(0)
predecessor = BertForSequenceClassification(BertConfig(vocab_size=100, **SIZES))
with tempfile.TemporaryDirectory() as folder:
    trainer = BasicTrainer(TrainingConfig(output_dir=f"{folder}/predecessor", progress_bar=False), predecessor, "auto")
    trainer.train(torch.optim.AdamW(predecessor.parameters(), lr=2e-3), batches(seed=2), num_epochs=4)

    config = TrainingConfig(output_dir=f"{folder}/successor", progress_bar=False)
    distiller = TheseusDistiller(config, predecessor, successor_layers=3, full_at=0.7)
    before = accuracy(distiller.successor)

    def callback(model, step):
        rate = distiller.rate.at(step, total_steps=4 * 32)
        print(f"  step {step}: replacing rate {rate:.2f}, successor alone {accuracy(model):.1f}% right")

    with distiller:
        print("with the predecessor's layers, ever more seldom")
        optimizer = torch.optim.AdamW(distiller.trainable_parameters(), lr=2e-3)
        distiller.train(optimizer, batches(seed=2), num_epochs=4, callback=callback)
        print("alone")
        optimizer = torch.optim.AdamW(distiller.trainable_parameters(), lr=1e-3)
        distiller.finetune(optimizer, batches(seed=2), num_epochs=1)

    distiller.successor.save_pretrained(f"{folder}/model")  # an ordinary BERT of 3 layers
    model = BertForSequenceClassification.from_pretrained(f"{folder}/model")
print(f"predecessor, {predecessor.config.num_hidden_layers} layers: {accuracy(predecessor):.1f}%")
print(f"half of its layers, untrained: {before:.1f}%")
print(f"successor, {model.config.num_hidden_layers} layers: {accuracy(model):.1f}%")
