"""A recipe: a published way to distil, with its stages, in one call.

    python examples/by_feature/recipe.py            # TinyBERT's two stages
    python examples/by_feature/recipe.py bert-emd   # or another

A small BERT learns to tell which half of the vocabulary a sentence is of; half of its layers, distilled, do as well.
Where it is interrupted, the same call goes on.
"""

import sys
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

import textbrewer
from textbrewer import BasicTrainer, TrainingConfig

RECIPE = sys.argv[1] if len(sys.argv) > 1 else "tinybert"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4}


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
teacher = BertForSequenceClassification(BertConfig(vocab_size=100, **SIZES))
with tempfile.TemporaryDirectory() as folder:
    quiet = TrainingConfig(output_dir=f"{folder}/teacher", progress_bar=False)
    with BasicTrainer(quiet, teacher, adaptor="auto") as trainer:
        trainer.train(torch.optim.AdamW(teacher.parameters(), lr=2e-3), batches(seed=2), num_epochs=4)

    for stage in textbrewer.recipes.get(RECIPE)(teacher, textbrewer.init_student_from_teacher(teacher, layers=2)):
        print(f"stage {stage.name}: {100 * stage.share:.0f}% of the steps")
    student = textbrewer.distill(
        teacher,
        2,  # layers
        recipe=RECIPE,
        dataloader=batches(seed=2),
        num_epochs=6,
        learning_rate=2e-3,
        output_dir=f"{folder}/student",
        train_config=quiet,
        callback=lambda model, step: print(f"  step {step}: {accuracy(model):.1f}%"),
    )
print(f"teacher, 4 layers: {accuracy(teacher):.1f}%; student, 2 layers: {accuracy(student):.1f}%")
