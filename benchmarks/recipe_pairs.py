"""BERT that reads the two sentences of a pair apart and classifies their cosine: for small sets of pairs.

RTE's 2,490 rows do not teach MiniLM-L6 to compare sentences that it reads together; what it brings along is that
sentences of like meaning have like means of their last states, for which it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own abbreviation)
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

ENOUGH = 100
"""Iterations of the logistic regression: one weight and one bias a class."""


class PairByCosine(BertForSequenceClassification):
    """BERT with the cosine of the two sentences' mean states as the only input of its classifier.

    Both sentences are in one row, told apart by ``token_type_ids``, as for BERT; but no piece sees the other sentence,
    positions begin anew and all pieces have type 0. So hidden states and masks are like any BERT's. The comparison is
    that of Sentence-BERT (Reimers and Gurevych, 2019) with a classifier on top.

    Args:
        config: BERT's.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(1, config.num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Any = None, **asked: Any
    ) -> Any:
        """Return the loss where ``labels`` are given, the logits ``(batch, classes)``, and what is asked for."""
        states = self.states(input_ids, attention_mask, token_type_ids, **asked)
        logits = self.classified(self.cosine(states.last_hidden_state, attention_mask, token_type_ids))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=states.hidden_states, attentions=states.attentions
        )

    def states(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, **asked: Any) -> Any:
        """Return the encoder's output, each sentence read apart."""
        places = torch.arange(token_type_ids.shape[1], device=token_type_ids.device).expand_as(token_type_ids)
        first = ((token_type_ids == 0) & attention_mask.bool()).sum(dim=1, keepdim=True)
        places = torch.where(token_type_ids == 1, places - first + 1, places)  # 0 is the [CLS] that only the first has
        same = token_type_ids[:, :, None] == token_type_ids[:, None, :]
        seen = same & attention_mask.bool()[:, None, :]
        seen |= torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)  # padding sees itself, not nothing
        hidden = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        hidden.masked_fill_(~seen, torch.finfo(self.dtype).min)  # "eager" attention adds what it is given
        return self.bert(
            input_ids,
            attention_mask=hidden[:, None],
            token_type_ids=torch.zeros_like(token_type_ids),
            position_ids=places,
            **asked,
        )

    def cosine(self, states: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return the cosine ``(batch,)`` of the mean states of both sentences, in float32."""
        means = []
        for sentence in (0, 1):
            pieces = ((token_type_ids == sentence) & attention_mask.bool())[..., None].float()
            means.append((states.float() * pieces).sum(dim=1) / pieces.sum(dim=1).clamp(min=1))
        return F.cosine_similarity(*means, dim=-1)

    def classified(self, cosine: Tensor) -> Tensor:
        """Return the logits; by hand, as a linear map would be rounded to bfloat16, which has three digits."""
        return cosine[:, None] * self.classifier.weight[:, 0] + self.classifier.bias

    @torch.no_grad()
    def fit_classifier(self, batches: Sequence[Any]) -> None:
        """Set the classifier to what logistic regression finds on labelled rows: the small rates never got it there.

        Args:
            batches: with ``labels``.
        """
        training = self.training
        self.eval()
        cosines, labels = [], []
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
            with torch.autocast("cpu", torch.bfloat16):
                states = self.states(**inputs).last_hidden_state
            cosines.append(self.cosine(states, inputs["attention_mask"], inputs["token_type_ids"]))
            labels.append(batch["labels"])
        self.train(training)
        every, truth = torch.cat(cosines), torch.cat(labels)
        parameters = list(self.classifier.parameters())
        optimizer = torch.optim.LBFGS(parameters, max_iter=ENOUGH, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.classified(every), truth)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        with torch.enable_grad():
            optimizer.step(closure)
        optimizer.zero_grad()


def fit_classifier(model: Any, batches: Sequence[Any]) -> Any:
    """Return the model, the classifier of one for pairs set to what the batches say."""
    if isinstance(model, PairByCosine):
        model.fit_classifier(batches)
    return model
