"""What cannot work with a teacher cache is refused before the first update, with the remedy."""

import pytest
import torch
from torch import nn

from tests import processes
from tests.conftest import CLASSES, Encoder, adaptor, make_loader
from tests.teacher_cache.jobs import KINDS, Job, cache_at
from textbrewer import DistillationConfig, TeacherCache
from textbrewer.teacher_cache import CacheError


@pytest.mark.parametrize("kind", KINDS)
def test_two_caches(kind, tmp_path):
    with pytest.raises(ValueError, match=r"teacher_cache=.* and DistillationConfig\(teacher_cache=.*were both given"):
        Job(tmp_path, kind, cache_at(tmp_path), config={"teacher_cache": str(tmp_path)})


@pytest.mark.parametrize("named", [True, False])
def test_a_cache_and_one_in_memory(named, tmp_path):
    folder = str(tmp_path / "cache")
    config = {"is_caching_logits": True, **({"teacher_cache": folder} if named else {})}
    with pytest.raises(ValueError, match="teacher_cache and is_caching_logits=True exclude each other"):
        Job(tmp_path, cache=None if named else folder, config=config)


@pytest.mark.parametrize("cache", [3, True, ["folder"]])
def test_what_is_no_cache(cache, tmp_path):
    with pytest.raises(TypeError, match="teacher_cache must be a TeacherCache or a folder, got"):
        Job(tmp_path, cache=cache)
    with pytest.raises(TypeError, match="teacher_cache must be a folder, got"):
        DistillationConfig(teacher_cache=cache)


def refused(tmp_path, error, match, data=None, cache=None, **options):
    """The training is refused, and the student is what it was."""
    job = Job(tmp_path / "job", cache=cache_at(tmp_path) if cache is None else cache, **options)
    with pytest.raises(error, match=match):
        job.train(data)
    assert torch.equal(job.end[: len(job.start)], job.start)
    return job


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "cache").write_text("mine")
    refused(tmp_path, CacheError, "a teacher cache is a folder, .* is a file; name another path")
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    refused(tmp_path, CacheError, "is no teacher cache, it holds notes.txt; name a new or empty folder")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["notes.txt"]


def train_on_a_short_file(folder, plain):
    """A lost page is found to be one when it is read, if ever; nothing wrong is read in its place."""
    job = Job(folder / "job", cache=cache_at(folder))
    try:
        job.train(make_loader(96, 4), num_epochs=1)
    except CacheError as error:
        assert "cannot be read, its file is damaged" in str(error)  # noqa: PT017
    else:
        assert torch.allclose(job.end, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pages", [1, 2, 5, 12, 20])
def test_a_file_that_lacks_its_last_pages(pages, tmp_path):
    """In a process of its own, since to read a file beyond its end kills."""
    first = Job(tmp_path / "first", cache=cache_at(tmp_path)).train(make_loader(96, 4), num_epochs=1)
    file = tmp_path / "cache" / "data.mdb"
    file.write_bytes(file.read_bytes()[: -4096 * pages])
    assert processes.run(train_on_a_short_file, tmp_path, first.end) == 0


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6])
def test_a_file_cut_short(kept, tmp_path):
    Job(tmp_path / "first", cache=cache_at(tmp_path)).train(make_loader(96, 4), num_epochs=1)
    file = tmp_path / "cache" / "data.mdb"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    if kept == 0.0:
        # An empty file is a new one.
        job = Job(tmp_path / "job", cache=cache_at(tmp_path)).train(make_loader(96, 4), num_epochs=1)
        assert job.rows == 96
        return
    refused(tmp_path, CacheError, "cannot be read, its file is damaged .*; delete the folder, and")


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data.mdb").write_bytes(b"something else" * 4096)
    refused(tmp_path, CacheError, "cannot be read, its file is damaged or of another program")


def test_batches_without_rows(tmp_path):
    class Texts(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.linear = nn.Linear(1, CLASSES)

        def forward(self, texts):
            return self.linear(torch.tensor([[float(len(text))] for text in texts]))

    refused(
        tmp_path, TypeError, "a teacher cache needs batches of tensors with one row an example.*train without",
        data=[{"texts": ["a", "bc"]}] * 3, teachers=[Texts(1)], student=Texts(2), config={"intermediate_matches": []},
        adaptor_T=lambda batch, outputs: {"logits": outputs}, adaptor_S=lambda batch, outputs: {"logits": outputs},
    )  # fmt: skip


def test_a_mask_that_is_not_there(tmp_path):
    cache = cache_at(tmp_path, mask="mask")
    refused(tmp_path, KeyError, "mask 'mask' of the teacher cache is not in the batch; it has: input_ids", cache=cache)


def test_a_layer_that_is_not_there(tmp_path):
    """The message is that of a training without a cache."""
    config = {"intermediate_matches": [{"layer_T": 7, "layer_S": 1, "feature": "hidden", "loss": "pkd", "weight": 1}]}
    refused(tmp_path, IndexError, "layer_T=7 is out of range: 'hidden' of the teacher has 3 entries", config=config)


def test_widths_that_differ(tmp_path):
    config = {
        "intermediate_matches": [{"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}]
    }
    refused(tmp_path, ValueError, "the student's width must be the teacher's, 48, got 32; add 'proj'", config=config)


def test_masks_that_differ(tmp_path):
    """A product over the positions is stored under the teacher's mask, or not at all."""
    matches = [{"layer_T": [0, 2], "layer_S": [0, 1], "feature": "hidden", "loss": "fsp", "weight": 1}]

    def other(batch, outputs):
        mask = batch["attention_mask"].clone()
        mask[:, 0] = 0
        return {**adaptor(batch, outputs), "inputs_mask": mask}

    options = {"config": {"intermediate_matches": matches}, "adaptor_S": other}
    options["teachers"] = [Encoder(2, 32, seed=1)]
    Job(tmp_path / "plain", **options).train()
    options["teachers"] = [Encoder(2, 32, seed=1)]
    job = Job(tmp_path / "job", cache=cache_at(tmp_path), **options)
    job.train()
    assert job.rows == 24


def test_what_the_cache_is_given(tmp_path):
    with pytest.raises(ValueError, match="dtype of a teacher cache must be one of the known names, got 'float8'"):
        TeacherCache(tmp_path, dtype="float8")
    with pytest.raises(ValueError, match="max_bytes must be a number of bytes, or a text such as '500MB'"):
        TeacherCache(tmp_path, max_bytes="20 apples")
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        TeacherCache(tmp_path, max_bytes=0)
    with pytest.raises(ValueError, match="top_k of a teacher cache must be at least 1, got 0"):
        TeacherCache(tmp_path, top_k=0)
    with pytest.raises(TypeError, match="keep_padding must be True, False or None, got 1"):
        TeacherCache(tmp_path, keep_padding=1)
    with pytest.raises(TypeError, match="mask of a teacher cache must be a key or number"):
        TeacherCache(tmp_path, mask=1.5)
