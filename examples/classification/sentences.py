"""Reads SST-2 and TREC: sentences with the number of their class."""

import csv
from pathlib import Path

SOURCES = {
    "sst2": "train.tsv and dev.tsv of SST-2 as GLUE has it (https://gluebenchmark.com/tasks)",
    "trec": "train.txt and test.txt of TREC's questions, there named train_5500.label and TREC_10.label "
    "(https://cogcomp.seas.upenn.edu/Data/QA/QC/)",
}
CLASSES = {"sst2": ["negative", "positive"], "trec": ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]}
FILES = {"sst2": ("train.tsv", "dev.tsv"), "trec": ("train.txt", "test.txt")}
Row = tuple[str, int]


def read(dataset: str, folder: Path) -> tuple[list[Row], list[Row]]:
    """Return the training and the evaluation rows, ``(sentence, class)``.

    Raises:
        SystemExit: if the folder lacks a file; the message says where to get it.
    """
    paths = [folder / name for name in FILES[dataset]]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"no file {path}: --data must be a folder with {SOURCES[dataset]}")
    reader = read_sst2 if dataset == "sst2" else read_trec
    return reader(paths[0]), reader(paths[1])


def read_sst2(path: Path) -> list[Row]:
    """Read lines ``sentence<TAB>label`` below a header; quotes are text."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (row["sentence"].strip(), int(row["label"]))
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def read_trec(path: Path) -> list[Row]:
    """Read lines ``COARSE:fine text``; the coarse type is the class."""
    rows = []
    for line in path.read_text(encoding="latin-1").splitlines():
        label, text = line.split(" ", maxsplit=1)
        rows.append((text.strip(), CLASSES["trec"].index(label.partition(":")[0])))
    return rows
