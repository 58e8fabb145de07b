"""TextBrewer's first example on today's transformers: a 12-layer BERT into one of 3 layers, on random tokens.

Nothing can be learnt from random labels: the script shows the calls, and the losses on the features fall. README.md
lists the lines that transformers made us change. Run it in this folder: ``python distill.py``.
"""

from functools import partial

import torch
from torch.optim import AdamW  # changed 1: transformers has no AdamW any more
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import textbrewer
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

device = torch.device("cpu")

# The models. A real teacher would be pretrained and fine-tuned; this one is as random as its student.
teacher_config = BertConfig.from_json_file("bert_config/bert_config.json")
student_config = BertConfig.from_json_file("bert_config/bert_config_T3.json")
teacher_config.output_hidden_states = True
student_config.output_hidden_states = True
teacher_model = BertForSequenceClassification(teacher_config)
student_model = BertForSequenceClassification(student_config)
teacher_model.to(device=device)
student_model.to(device=device)


class DictDataset(Dataset):
    """Rows as dicts, so that a batch calls the model by keywords."""

    def __init__(self, **columns):
        self.columns = columns

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def __len__(self):
        return len(self.columns["labels"])


# The data: 100 rows of 128 tokens, two classes.
input_ids = torch.randint(low=0, high=100, size=(100, 128))
labels = torch.randint(low=0, high=2, size=(100,))
dataset = DictDataset(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels)
dataloader = DataLoader(dataset, batch_size=32)

# The optimiser and the learning rate's schedule; the distiller adds the optimizer to the schedule's arguments.
num_epochs = 10
num_training_steps = len(dataloader) * num_epochs
optimizer = AdamW(student_model.parameters(), lr=1e-4, weight_decay=0.0, eps=1e-6)  # changed 1: what was its default
scheduler_class = get_linear_schedule_with_warmup
scheduler_args = {"num_warmup_steps": int(0.1 * num_training_steps), "num_training_steps": num_training_steps}

for name, model in [("teacher", teacher_model), ("student", student_model)]:
    text, _ = textbrewer.utils.display_parameters(model, max_level=3)
    print(f"Parameters of the {name}:\n{text}")


def simple_adaptor(batch, model_outputs):
    # With labels in the batch, a model's outputs are: loss, logits, hidden states.
    return {"logits": model_outputs[1], "hidden": model_outputs[2], "inputs_mask": batch["attention_mask"]}


def predict(model, eval_dataset, step, device):
    model.eval()
    right = 0
    for batch in DataLoader(eval_dataset, batch_size=32):
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with torch.no_grad():
            logits, _ = model(input_ids=ids, attention_mask=mask).to_tuple()  # changed 2: outputs are dicts now
        right += int((logits.cpu().argmax(dim=-1) == batch["labels"]).sum())
    model.train()
    print(f"step {step}: accuracy {right / len(eval_dataset):.2f} on {len(eval_dataset)} rows")


callback_fun = partial(predict, eval_dataset=dataset, device=device)

train_config = TrainingConfig(device=device)
distill_config = DistillationConfig(
    temperature=8,
    hard_label_weight=0,
    kd_loss_type="ce",
    probability_shift=False,
    intermediate_matches=[
        {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
        {"layer_T": 8, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
        {"layer_T": [0, 0], "layer_S": [0, 0], "feature": "hidden", "loss": "nst", "weight": 1},
        {"layer_T": [8, 8], "layer_S": [2, 2], "feature": "hidden", "loss": "nst", "weight": 1},
    ],
)
print(train_config)
print(distill_config)

distiller = GeneralDistiller(
    train_config=train_config,
    distill_config=distill_config,
    model_T=teacher_model,
    model_S=student_model,
    adaptor_T=simple_adaptor,
    adaptor_S=simple_adaptor,
)
with distiller:
    distiller.train(
        optimizer,
        dataloader,
        num_epochs=num_epochs,
        scheduler_class=scheduler_class,
        scheduler_args=scheduler_args,
        callback=callback_fun,
    )
