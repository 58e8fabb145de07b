"""Small made-up data in the real files' formats: what a few steps can learn, one word giving each class away."""

import itertools
import random

NAMES = ["the old tower", "a copper wire", "the third train", "our yellow door", "a small engine", "the long street"]
QUESTIONS = {
    "NUM:count": "How many parts has {} ?",
    "LOC:other": "Where can one see {} ?",
    "HUM:ind": "Who painted {} ?",
    "DESC:def": "What is {} ?",
}
ENTITIES = {
    "PER": ["Anna Smith", "John Miller", "Mary Johnson", "Peter Brown"],
    "ORG": ["Acme Corporation", "Microsoft Corporation", "General Motors Corporation", "Sony Corporation"],
    "LOC": ["Paris", "Lake Michigan", "London", "Lake Victoria"],
}


def write_trec(folder, train=192, test=48):
    """Write TREC's files: lines ``COARSE:fine text``."""
    for name, count in (("train.txt", train), ("test.txt", test)):
        lines = [
            f"{label} {text.format(thing)}"
            for (label, text), thing in _drawn(itertools.product(QUESTIONS.items(), NAMES), count, name)
        ]
        _write(folder / name, lines, "latin-1")
    return folder


def write_sst2(folder, train=128, dev=32):
    """Write SST-2's files: ``sentence<TAB>label`` below a header, with a lone quote here and there."""
    verdicts = [("a lovely and charming", 1), ('a " wonderful', 1), ("a boring and awful", 0), ('a " terrible', 0)]
    for name, count in (("train.tsv", train), ("dev.tsv", dev)):
        rows = _drawn(itertools.product(verdicts, ["film", "story", "comedy", "cast"]), count, name)
        _write(folder / name, ["sentence\tlabel", *(f"{text} {thing} \t{label}" for (text, label), thing in rows)])
    return folder


def write_mrpc(folder, train=192, test=48):
    """Write MRPC's files: a byte order mark, a header, quotes as text."""
    for name, count in (("msr_paraphrase_train.txt", train), ("msr_paraphrase_test.txt", test)):
        rows = _drawn(itertools.product([1, 0], NAMES), count, name)
        lines = [
            f'{label}\t{row}\t{row}\tI saw " {thing} .\t{_second(label, thing)}'
            for row, (label, thing) in enumerate(rows)
        ]
        _write(folder / name, ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *lines], "utf-8-sig")
    return folder


def write_rte(folder, train=192, dev=32):
    """Write RTE's files: four columns below a header."""
    classes = {1: "entailment", 0: "not_entailment"}
    for name, count in (("train.tsv", train), ("dev.tsv", dev)):
        rows = _drawn(itertools.product([1, 0], NAMES), count, name)
        lines = [
            f'{row}\tI saw " {thing}.\t{_second(label, thing)}\t{classes[label]}'
            for row, (label, thing) in enumerate(rows)
        ]
        _write(folder / name, ["index\tsentence1\tsentence2\tlabel", *lines])
    return folder


def write_wikiann(folder, train=192, test=48):
    """Write WikiANN's files: ``en:word<TAB>tag``, with an empty line between sentences of one or two entities."""
    for name, count in (("train", train), ("test", test)):
        generator, blocks = random.Random(name), []
        for _ in range(count):
            lines = []
            for label in generator.sample(sorted(ENTITIES), generator.choice([1, 2])):
                words = generator.choice(ENTITIES[label]).split()
                lines += [f"en:{word}\t{'I' if place else 'B'}-{label}" for place, word in enumerate(words)]
                lines.append("en::\tO")
            blocks.append("\n".join(lines))
        _write(folder / name, ["\n\n".join(blocks)])
    return folder


def _second(label, thing):
    return f"I looked at {thing} ." if label else f"Nobody ever sold {thing} ."


def _drawn(items, count, seed):
    """Return ``count`` of the items, all as often as can be, in an order of the seed's."""
    drawn = list(itertools.islice(itertools.cycle(items), count))
    random.Random(seed).shuffle(drawn)
    return drawn


def _write(path, lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
