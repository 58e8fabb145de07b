"""What the examples compute by themselves: readers, rows, scores."""

import random

import pytest

from tests.example_files import data_folder, load

sentences, wikiann, squad = load("classification", "sentences"), load("ner", "wikiann"), load("span_qa", "squad")
pairs = load("sentence_pairs", "pairs")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda folder: sentences.read("sst2", folder), r"train\.tsv.*SST-2.*gluebenchmark"),
        (lambda folder: sentences.read("trec", folder), r"train\.txt.*TREC.*cogcomp"),
        (lambda folder: pairs.read("mrpc", folder), r"msr_paraphrase_train\.txt.*MRPC.*gluebenchmark"),
        (lambda folder: pairs.read("rte", folder), r"train\.tsv.*RTE.*gluebenchmark"),
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
    rows = sentences.read(dataset, data_folder(folder))
    assert tuple(map(len, rows)) == counts
    assert {label for _, label in rows[0]} == set(range(len(sentences.CLASSES[dataset])))


@pytest.mark.parametrize(
    ("dataset", "names", "header", "yes", "no"),
    [
        (
            "mrpc",
            ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"),
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            "1\t7\t8\t{}\t{}",
            "0\t7\t8\t{}\t{}",
        ),
        (
            "rte",
            ("train.tsv", "dev.tsv"),
            "index\tsentence1\tsentence2\tlabel",
            "0\t{}\t{}\tentailment",
            "1\t{}\t{}\tnot_entailment",
        ),
    ],
)
def test_read_pairs_takes_quotes_as_text(dataset, names, header, yes, no, tmp_path):
    lines = [header, yes.format('a " lone quote', '" quoted " '), no.format("it's", "so")]
    for name in names:
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    expected = [(('a " lone quote', '" quoted "'), 1), (("it's", "so"), 0)]
    assert pairs.read(dataset, tmp_path) == (expected, expected)


@pytest.mark.parametrize(
    ("dataset", "folder", "counts"), [("mrpc", "glue_mrpc", (4076, 1725)), ("rte", "glue_rte", (2490, 277))]
)
def test_real_pairs_are_all_read(dataset, folder, counts):
    """The numbers of rows that the datasets' authors give; no sentence is empty or runs on into the next line."""
    rows = pairs.read(dataset, data_folder(folder))
    assert tuple(map(len, rows)) == counts
    assert {label for _, label in rows[0]} == {0, 1}
    assert all(text and "\t" not in text and "\n" not in text for part in rows for pair, _ in part for text in pair)


def test_read_wikiann_keeps_colons(tmp_path):
    (tmp_path / "train").write_text("en:Rome\tB-LOC\nen::\tO\n\nen:a:b\tB-ORG\n\n", encoding="utf-8")
    assert wikiann.read(tmp_path / "train") == [(["Rome", ":"], ["B-LOC", "O"]), (["a:b"], ["B-ORG"])]


def test_real_wikiann_is_all_read():
    train, test = (wikiann.read(data_folder("wikiann_en") / name) for name in ("train", "test"))
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


@pytest.mark.parametrize("seed", range(10))
def test_f1_is_that_of_seqeval(seed):
    """On tags at random, most of them no well-formed BIO: an ``I`` that continues nothing, or another type."""
    metrics = pytest.importorskip("seqeval.metrics")
    generator = random.Random(seed)
    gold = [generator.choices(wikiann.TAGS, k=generator.randint(1, 12)) for _ in range(50)]
    predicted = [[tag if generator.random() < 0.7 else generator.choice(wikiann.TAGS) for tag in tags] for tags in gold]
    assert 20 < wikiann.f1(gold, predicted) < 90
    assert wikiann.f1(gold, predicted) == pytest.approx(100 * metrics.f1_score(gold, predicted))


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
    distill, passage = load("span_qa", "distill"), "".join(map(chr, range(0x4E00, 0x4E00 + 600)))
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
    read = squad.read(data_folder(folder) / file, folder)
    assert len(read) == questions
    answers = [(item.passage, *answer) for item in read for answer in item.answers]
    assert sum(passage[start:].startswith(text) is False for passage, text, start in answers) == misaligned
    for item in read:
        place = squad.span(item)
        wrong = all(not item.passage.startswith(text, start) for text, start in item.answers)
        assert (place is None) == wrong
        assert place is None or item.passage[place[0] : place[1] + 1] in {text for text, _ in item.answers}
