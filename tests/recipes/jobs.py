"""A tiny teacher, a tiny student and a few batches, on which every recipe runs in a second."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import textbrewer
from textbrewer import TrainingConfig

LAYERS = {"textbrewer-L3": 3, "textbrewer-L3n": 3, "textbrewer-L4t": 4, "textbrewer-L6": 6, "textbrewer-small": 12}
SETTINGS = {"minilmv2": {"relation_heads": 8}}
RECIPES = list(textbrewer.recipes.RECIPES)


def bert(layers, width=32, heads=4, seed=0, dropout=0.0, labels=3):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def layers_of(recipe):
    return LAYERS.get(recipe, 2)


def teacher_of(recipe):
    return bert(max(4, layers_of(recipe)), seed=1).eval()


def student_of(recipe, **options):
    return bert(layers_of(recipe), seed=2, **options)


def batches(count=6, rows=4, length=7):
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[1, 4:] = 0
        made.append(
            {
                "input_ids": torch.randint(1, 50, (rows, length), generator=generator) * mask,
                "attention_mask": mask,
                "labels": torch.randint(0, 3, (rows,), generator=generator),
            }
        )
    return made


def distil(recipe, folder, teacher=None, student=None, **arguments):
    """Distil the tiny student, for 12 steps of two passes over the data unless told otherwise."""
    torch.manual_seed(3)  # the first weights of projections
    given = {"dataloader": batches(), "num_epochs": 4, "learning_rate": 1e-3, **SETTINGS.get(recipe, {}), **arguments}
    return textbrewer.distill(
        teacher_of(recipe) if teacher is None else teacher,
        student_of(recipe) if student is None else student,
        recipe,
        output_dir=folder,
        train_config=TrainingConfig(progress_bar=False, device="cpu"),
        **given,
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def largest_difference(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].is_floating_point())
