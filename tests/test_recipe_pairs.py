"""The model of ``benchmarks/recipe_pairs.py``: against both sentences run by themselves, and scikit-learn's fit."""

import numpy as np
import pytest
import torch
import transformers

from tests.benchmark_files import imported
from tests.conftest import seed_all

linear_model = pytest.importorskip("sklearn.linear_model")


@pytest.fixture(scope="module")
def pairs():
    with imported("recipe_pairs") as script:
        yield script


def make(pairs, attention="sdpa"):
    seed_all(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, num_labels=2, attn_implementation=attention,
    )  # fmt: skip
    return pairs.PairByCosine(config).eval()


FIRST, SECOND = [[1, 5, 6, 7, 2], [1, 8, 2]], [[9, 10, 2], [11, 12, 13, 14, 2]]


def batch():
    rows = [[*first, *second] for first, second in zip(FIRST, SECOND, strict=True)]
    longest = max(map(len, rows)) + 1
    columns = {"input_ids": [row + [0] * (longest - len(row)) for row in rows]}
    columns["attention_mask"] = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    columns["token_type_ids"] = [
        [0] * len(first) + [1] * len(second) + [0] * (longest - len(first) - len(second))
        for first, second in zip(FIRST, SECOND, strict=True)
    ]
    return {name: torch.tensor(column) for name, column in columns.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_it_is_the_cosine_of_both_sentences_run_by_themselves(pairs, attention):
    model = make(pairs, attention)
    expected = []
    for first, second in zip(FIRST, SECOND, strict=True):
        means = []
        for start, pieces in enumerate((first, second)):  # the second has no [CLS], whose place stays empty
            places = torch.arange(start, start + len(pieces))[None]
            states = model.bert(torch.tensor([pieces]), position_ids=places).last_hidden_state
            means.append(states[0].mean(dim=0))
        cosine = means[0] @ means[1] / means[0].norm() / means[1].norm()
        expected.append(model.classifier(cosine[None]))
    eager = attention == "eager"
    found = model(**batch(), output_hidden_states=True, output_attentions=eager)
    torch.testing.assert_close(found.logits, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert [len(found.hidden_states), len(found.attentions or ())] == [3, 2 * eager]
    labels = torch.tensor([0, 1])
    loss = model(**batch(), labels=labels).loss
    torch.testing.assert_close(loss, -found.logits.log_softmax(1)[[0, 1], labels].mean())


def test_what_is_padded_changes_nothing(pairs):
    model, padded = make(pairs), batch()
    longer = {name: torch.nn.functional.pad(column, (0, 4), value=0) for name, column in padded.items()}
    longer["input_ids"][:, -3:] = 17
    torch.testing.assert_close(model(**longer).logits, model(**padded).logits)


def test_the_classifier_is_what_logistic_regression_finds(pairs):
    model, source = make(pairs), torch.Generator().manual_seed(1)
    batches = []
    for _ in range(12):
        one = batch()
        one["input_ids"] = torch.where(
            one["input_ids"] > 2, torch.randint(3, 40, one["input_ids"].shape, generator=source), one["input_ids"]
        )
        one["labels"] = torch.randint(0, 2, (2,), generator=source)
        batches.append(one)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = [model.states(*(one[name] for name in batch())).last_hidden_state for one in batches]
        cosines = [
            model.cosine(found, one["attention_mask"], one["token_type_ids"])
            for found, one in zip(states, batches, strict=True)
        ]
    column, labels = torch.cat(cosines)[:, None].double().numpy(), torch.cat([one["labels"] for one in batches])
    oracle = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(column, labels.numpy())
    assert pairs.fit_classifier(model, batches) is model
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        found = model.classified(torch.cat(cosines)).softmax(dim=1)[:, 1].double().numpy()
    np.testing.assert_allclose(found, oracle.predict_proba(column)[:, 1], atol=1e-3)


def test_other_models_stay_as_they_are(pairs):
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    assert pairs.fit_classifier(model, []) is model
    assert torch.equal(model.weight, before)
