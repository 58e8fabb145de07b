"""A student distilled with a teacher cache is the one distilled without."""

import pytest
import torch

from tests.teacher_cache.jobs import KINDS, SAME, Job, apart, cache_at, twin


@pytest.mark.parametrize("kind", KINDS)
def test_every_distiller_trains_the_same_student(kind, tmp_path):
    plain = Job(tmp_path / "plain", kind).train()
    first = Job(tmp_path / "first", kind, cache_at(tmp_path)).train()
    again = Job(tmp_path / "again", kind, cache_at(tmp_path)).train()
    assert apart(first, plain) < SAME
    assert torch.equal(again.end, first.end)
    print(plain.calls, first.calls, again.calls, first.cache.info())
