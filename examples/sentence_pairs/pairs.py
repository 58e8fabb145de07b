"""Reads MRPC and RTE: pairs of sentences with the number of their class."""

import csv
from pathlib import Path

SOURCES = {
    "mrpc": "msr_paraphrase_train.txt and msr_paraphrase_test.txt of MRPC (https://gluebenchmark.com/tasks says where)",
    "rte": "train.tsv and dev.tsv of RTE as GLUE has it (https://gluebenchmark.com/tasks)",
}
CLASSES = {"mrpc": ["0", "1"], "rte": ["not_entailment", "entailment"]}  # as the files call no and yes
FILES = {"mrpc": ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"), "rte": ("train.tsv", "dev.tsv")}
COLUMNS = {"mrpc": ("#1 String", "#2 String", "Quality"), "rte": ("sentence1", "sentence2", "label")}
Row = tuple[tuple[str, str], int]


def read(dataset: str, folder: Path) -> tuple[list[Row], list[Row]]:
    """Return the training and the evaluation rows, ``((sentence, sentence), class)``; class 1 is yes.

    Raises:
        SystemExit: if the folder lacks a file; the message says where to get it.
    """
    paths = [folder / name for name in FILES[dataset]]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"no file {path}: --data must be a folder with {SOURCES[dataset]}")
    train, held_out = (read_table(path, *COLUMNS[dataset], CLASSES[dataset]) for path in paths)
    return train, held_out


def read_table(path: Path, first: str, second: str, label: str, classes: list[str]) -> list[Row]:
    """Read lines with tabs between their columns, below a header that names them; quotes are text."""
    with path.open(encoding="utf-8-sig", newline="") as file:  # MRPC's files begin with a byte order mark
        return [
            ((row[first].strip(), row[second].strip()), classes.index(row[label]))
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
