"""Every example, run as a user would, in small; and what the examples compute by themselves."""

import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("TEXTBREWER_DATA", ROOT.parent / "shared" / "data"))
NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"


def _data(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set TEXTBREWER_DATA to a folder that holds {name}")
    return folder


def _run(*command, cwd):
    """Run a script in a folder of its own; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def _load(folder, name):
    """Import a module of an example, which finds its neighbours as when it is run."""
    spec = importlib.util.spec_from_file_location(f"example_{folder}_{name}", EXAMPLES / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES / folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


sentences, wikiann, squad = _load("classification", "sentences"), _load("ner", "wikiann"), _load("span_qa", "squad")


def _numbers(pattern, text):
    """Return every number that a pattern finds; ``#`` in it stands for one."""
    found = re.findall(pattern.replace("#", NUMBER), text)
    return [float(item) if isinstance(item, str) else tuple(map(float, item)) for item in found]


def _losses(done):
    """Return the losses that a run's progress bars showed, one list a bar."""
    shown = [(int(step), float(loss)) for step, loss in re.findall(rf"(\d+)/\d+ \[.*?total_loss={NUMBER}", done.stderr)]
    bars = []
    for step, loss in shown:
        if not bars or step < bars[-1][-1][0]:
            bars.append([])
        bars[-1].append((step, loss))
    return [[loss for _, loss in bar] for bar in bars]


def _last_column(done):
    """Return the last numbers of the table that ends a run: teacher, student before and after the distillation."""
    lines = done.stdout.splitlines()[-3:]
    assert [line.split()[0].rstrip(",") for line in lines] == ["teacher", "student", "student"]
    return [float(line.split()[-1]) for line in lines]


# ---- the scripts --------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize(("dataset", "folder", "chance"), [("sst2", "sst2_glue", 51), ("trec", "trec", 28)])
def test_classification_learns(dataset, folder, chance, tmp_path):
    script = EXAMPLES / "classification" / "distill.py"
    done = _run(script, "--dataset", dataset, "--data", _data(folder), "--fast", cwd=tmp_path)
    teacher, before, after = _last_column(done)
    assert teacher > chance + 15
    assert after > max(chance + 10, before)
    assert all(bar[-1] < bar[0] for bar in _losses(done))


def test_ner_learns(tmp_path):
    done = _run(EXAMPLES / "ner" / "distill.py", "--data", _data("wikiann_en"), "--fast", cwd=tmp_path)
    teacher, before, after = _last_column(done)
    assert teacher > 25  # tagging at random, or all alike, finds next to no entity
    assert after > max(20, before)
    assert all(bar[-1] < bar[0] for bar in _losses(done))


@pytest.mark.parametrize("dataset", ["cmrc2018", "drcd"])
def test_span_qa_trains(dataset, tmp_path):
    """From random weights, a few steps teach no reading: the losses fall, and the scores are in range."""
    script = EXAMPLES / "span_qa" / "distill.py"
    done = _run(script, "--dataset", dataset, "--data", _data(dataset), "--fast", cwd=tmp_path)
    scores = _numbers("(?:teacher|student), step #: EM #, F1 #", done.stdout)
    assert [step for step, *_ in scores[1:3]] == [step for step, *_ in scores[3:5]]
    assert all(0 <= exact <= f1 <= 100 for _, exact, f1 in scores)
    teacher, student = _losses(done)
    assert teacher[-1] < 0.97 * teacher[0]
    assert student[-1] < 0.97 * student[0]


def test_resumed_weights_are_the_uninterrupted_ones(tmp_path):
    done = _run(EXAMPLES / "by_feature" / "resume.py", cwd=tmp_path)
    whole, interrupted, resumed = re.split(r"interrupted\n|the same command again\n", done.stdout)
    assert _numbers("checkpoint at step #", whole) == [20, 40, 60, 80, 90]
    assert _numbers("checkpoint at step #", interrupted) == [20, 40]
    assert _numbers("checkpoint at step #", resumed) == [60, 80, 90]
    assert _numbers("largest difference of the weights: #", resumed) == [0]


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


@pytest.mark.distributed
def test_two_processes_do_as_one_with_twice_the_batch(tmp_path):
    script = EXAMPLES / "by_feature" / "distributed.py"
    two = _run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, cwd=tmp_path)
    one = _run(script, "--batch-size", 64, "--output", "alone", cwd=tmp_path)
    half = _run(script, "--batch-size", 32, "--output", "half", cwd=tmp_path)
    steps = [_numbers("step #: sum of the weights' sizes #", done.stdout) for done in (two, one, half)]
    assert [step for step, _ in steps[1]] == [20, 40, 60]
    assert [pytest.approx(pair, abs=2e-4) for pair in steps[0]] == steps[1]
    assert abs(steps[2][-1][1] - steps[1][-1][1]) > 1e-2


def test_readme_names_every_script():
    modules = {"sentences.py", "wikiann.py", "squad.py", "quickstart_data.py", "quickstart_report.py"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = [path for path in EXAMPLES.rglob("*.py") if path.name not in modules]
    assert len(scripts) >= 11
    for path in scripts:
        place = path.relative_to(ROOT).as_posix()
        assert place in readme or f"cd {path.parent.relative_to(ROOT).as_posix()} && python {path.name}" in readme, (
            place
        )


# ---- what they compute by themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda folder: sentences.read("sst2", folder), r"train\.tsv.*SST-2.*gluebenchmark"),
        (lambda folder: sentences.read("trec", folder), r"train\.txt.*TREC.*cogcomp"),
        (lambda folder: wikiann.read(folder / "train"), r"train.*WikiANN.*NER-datasets"),
        (lambda folder: squad.read(folder / "cmrc2018_dev.json", "cmrc2018"), r"cmrc2018_dev\.json.*ymcui"),
        (lambda folder: squad.read(folder / "DRCD_dev.json", "drcd"), r"DRCD_dev\.json.*DRCKnowledgeTeam"),
    ],
)
def test_missing_data_says_where_to_get_it(read, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        read(tmp_path)


def test_read_sst2_takes_quotes_as_text(tmp_path):
    (tmp_path / "train.tsv").write_text('sentence\tlabel\na " lone quote \t0\nvery good \t1\n', encoding="utf-8")
    assert sentences.read_sst2(tmp_path / "train.tsv") == [('a " lone quote', 0), ("very good", 1)]


def test_read_trec_takes_the_coarse_type(tmp_path):
    (tmp_path / "train.txt").write_bytes(
        "LOC:city Where is N\xeemes : in France ?\nNUM:dist How far ?\n".encode("latin-1")
    )
    assert sentences.read_trec(tmp_path / "train.txt") == [("Where is N\xeemes : in France ?", 4), ("How far ?", 5)]


@pytest.mark.parametrize(
    ("dataset", "folder", "counts"), [("sst2", "sst2_glue", (67349, 872)), ("trec", "trec", (5452, 500))]
)
def test_real_sentences_are_all_read(dataset, folder, counts):
    """The numbers of rows that the datasets' authors give; every class occurs."""
    rows = sentences.read(dataset, _data(folder))
    assert tuple(map(len, rows)) == counts
    assert {label for _, label in rows[0]} == set(range(len(sentences.CLASSES[dataset])))


def test_read_wikiann_keeps_colons(tmp_path):
    (tmp_path / "train").write_text("en:Rome\tB-LOC\nen::\tO\n\nen:a:b\tB-ORG\n\n", encoding="utf-8")
    assert wikiann.read(tmp_path / "train") == [(["Rome", ":"], ["B-LOC", "O"]), (["a:b"], ["B-ORG"])]


def test_real_wikiann_is_all_read():
    train, test = (wikiann.read(_data("wikiann_en") / name) for name in ("train", "test"))
    assert (len(train), len(test)) == (20_000, 10_000)
    assert {tag for _, tags in train for tag in tags} == set(wikiann.TAGS)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", set()),
        ("O O", set()),
        ("B-PER I-PER O", {("PER", 0, 2)}),
        ("O B-LOC B-LOC", {("LOC", 1, 2), ("LOC", 2, 3)}),
        ("B-PER I-ORG", {("PER", 0, 1), ("ORG", 1, 2)}),  # another type begins an entity
        ("O I-LOC I-LOC", {("LOC", 1, 3)}),  # so does an I that continues nothing
        ("B-ORG O I-ORG", {("ORG", 0, 1), ("ORG", 2, 3)}),
    ],
)
def test_entities_by_hand(tags, expected):
    assert wikiann.entities(tags.split()) == expected


@pytest.mark.parametrize("seed", range(20))
def test_entities_give_back_the_spans_that_tags_were_written_from(seed):
    generator, place, spans, tags = random.Random(seed), 0, set(), []
    while place < 30:
        kind, length = generator.choice(["PER", "ORG", "LOC", None]), generator.randint(1, 4)
        if kind is None:
            tags += ["O"] * length
        else:
            spans.add((kind, place, place + length))
            tags += [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]
        place += length
    assert wikiann.entities(tags) == spans


def test_f1_by_hand():
    """3 entities are true, 2 are found, 1 of them rightly: precision 1/2, recall 1/3, F1 0.4."""
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O"]]
    predicted = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "O"]]
    assert wikiann.f1(gold, predicted) == pytest.approx(40)
    assert wikiann.f1(gold, gold) == 100
    assert wikiann.f1([["O"]], [["O"]]) == 0


QUESTION = squad.Question("天空是蓝色的,大海也是蓝色的。", "什么是蓝色的?", [("大海", 1), ("天空", 0)])


def test_span_takes_the_first_answer_that_stands_where_it_says():
    assert squad.span(QUESTION) == (0, 1)
    assert squad.span(QUESTION._replace(answers=[("大海", 7), ("天空", 0)])) == (7, 8)
    assert squad.span(QUESTION._replace(answers=[("大海", 1)])) is None


@pytest.mark.parametrize(("length", "stride"), [(16, 3), (20, 9), (64, 20)])
def test_windows_cover_the_passage(length, stride):
    vocab = squad.vocabulary([QUESTION])
    characters = {number: character for character, number in vocab.items()}
    covered = {}
    for row in squad.windows(QUESTION, vocab, length, stride):
        tokens = [characters[number] for number in row["input_ids"]]
        assert len(tokens) == len(row["token_type_ids"]) <= length
        question = tokens[1 : row["front"] - 1]
        assert (tokens[0], tokens[row["front"] - 1], tokens[-1]) == ("[CLS]", "[SEP]", "[SEP]")
        assert QUESTION.question.startswith("".join(question))
        for place in range(row["front"], len(tokens) - 1):
            covered[row["first"] + place - row["front"]] = tokens[place]
            assert row["token_type_ids"][place] == (2 if tokens[place] in question else 1)
        assert set(row["token_type_ids"][: row["front"]]) == {0}
    assert covered == dict(enumerate(QUESTION.passage))


def test_unknown_characters_have_a_number():
    vocab = squad.vocabulary([QUESTION])
    (row,) = squad.windows(QUESTION._replace(passage="猫", question="天?"), vocab, 32, 8)
    assert row["input_ids"] == [vocab[token] for token in ("[CLS]", "天", "?", "[SEP]", "[UNK]", "[SEP]")]


def test_training_rows_point_at_the_answer():
    distill, passage = _load("span_qa", "distill"), "".join(map(chr, range(0x4E00, 0x4E00 + 600)))
    question = squad.Question(passage, "一?", [(passage[240:250], 240)])
    vocab = squad.vocabulary([question])
    rows = distill.training_rows([question], vocab)
    assert len(rows) == 2  # windows at 0 and 128; the one at 0 ends at 251, those from 256 begin too late
    for row in rows:
        answer = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        assert answer == [vocab[character] for character in question.answers[0][0]]


def test_tokens_are_characters_words_and_numbers():
    assert squad.tokens_of("《三国3》, Ω-Force 1.5") == ["三", "国", "3", "ω", "force", "1", "5"]


@pytest.mark.parametrize("seed", range(10))
def test_common_run_is_the_longest_of_all_runs(seed):
    generator = random.Random(seed)
    left, right = ("".join(generator.choices("ab", k=generator.randint(0, 9))) for _ in range(2))
    runs = {left[start:end] for start in range(len(left) + 1) for end in range(start, len(left) + 1)}
    assert squad.common_run(left, right) == max(len(run) for run in runs if run in right)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("天空", ["天空。"], (1, 1)),  # punctuation does not count
        ("蓝天空", ["天空", "大海"], (0, 4 / 5)),  # a run of 2, of 3 and 2 tokens
        ("天大空", ["天空"], (0, 2 / 5)),  # a bag of tokens would give 4/5
        ("山", ["天空"], (0, 0)),
        ("", ["天空"], (0, 0)),
    ],
)
def test_score_by_hand(prediction, answers, expected):
    assert squad.score(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("folder", "file", "questions", "misaligned"),
    [
        ("cmrc2018", "cmrc2018_dev.json", 3219, 200),
        ("cmrc2018", "cmrc2018_trial.json", 1002, 5),
        ("drcd", "DRCD_dev.json", 3524, 0),
        ("drcd", "DRCD_test.json", 3493, 0),
    ],
)
def test_real_questions_are_all_read(folder, file, questions, misaligned):
    """The numbers of questions that the datasets' authors give; a span is the text of one of its answers."""
    read = squad.read(_data(folder) / file, folder)
    assert len(read) == questions
    answers = [(item.passage, *answer) for item in read for answer in item.answers]
    assert sum(passage[start:].startswith(text) is False for passage, text, start in answers) == misaligned
    for item in read:
        place = squad.span(item)
        wrong = all(not item.passage.startswith(text, start) for text, start in item.answers)
        assert (place is None) == wrong
        assert place is None or item.passage[place[0] : place[1] + 1] in {text for text, _ in item.answers}
