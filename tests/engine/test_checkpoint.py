"""What a checkpoint holds, which one is taken, and what happens with one that does not fit."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.conftest import Encoder, adaptor, make_config, make_loader
from tests.engine.runs import Run, checkpoints, equal
from textbrewer import BasicTrainer
from textbrewer.engine import checkpoint
from textbrewer.engine.saving import Saver

NAME = "general, projections, accumulation"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a finished run, three checkpoints of it; not to be changed."""
    folder = tmp_path_factory.mktemp("written") / "run"
    Run(NAME, folder, every_step=False).train()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """A copy of one checkpoint, to be spoilt."""
    return shutil.copytree(written / "checkpoint-4", tmp_path / "checkpoint-4")


def resume(path, tmp_path):
    return Run(NAME, tmp_path / "resumed", every_step=False, seed=3).train(resume_from=path)


def change_state(path, **entries):
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "rank-0.pt"])
def test_truncated_files_are_refused(name, copy, tmp_path):
    file = copy / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"is damaged \({name} should have .* resume from an older one"):
        resume(copy, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "rank-0.pt"])
def test_overwritten_files_are_refused(name, copy, tmp_path):
    file = copy / name
    file.write_bytes(os.urandom(file.stat().st_size))
    with pytest.raises(ValueError, match=f"is damaged.*{name}"):
        resume(copy, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "rank-0.pt"])
def test_missing_files_are_refused(name, copy, tmp_path):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"is damaged.*{name}"):
        resume(copy, tmp_path)


def test_a_truncated_state_is_refused(copy, tmp_path):
    file = copy / "state.json"
    file.write_text(file.read_text()[:-30])
    with pytest.raises(ValueError, match="is not a checkpoint of this library"):
        resume(copy, tmp_path)


def test_foreign_folders_are_refused(copy, tmp_path):
    for content in (None, "{}", "[1]", '{"format": "another"}'):
        if content is None:
            (copy / "state.json").unlink()
        else:
            (copy / "state.json").write_text(content)
        with pytest.raises(ValueError, match="is not a checkpoint of this library"):
            resume(copy, tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be 'latest' or a checkpoint's folder.*which is no folder"):
        resume(tmp_path / "checkpoint-9", tmp_path)


def test_a_newer_version_is_refused(copy, tmp_path):
    change_state(copy, version=checkpoint.VERSION + 1)
    with pytest.raises(ValueError, match="newer version"):
        resume(copy, tmp_path)


def test_another_number_of_processes_is_refused(copy, tmp_path):
    change_state(copy, world=4)
    with pytest.raises(ValueError, match=r"written by 4 processes .* as many, got 1"):
        resume(copy, tmp_path)


def test_another_student_is_refused(written, tmp_path):
    run = Run(NAME, tmp_path / "out", every_step=False)
    run.student.classifier = nn.Linear(32, 5)
    with pytest.raises(ValueError, match="belongs to another student or other projections"):
        run.train(resume_from=written / "checkpoint-4")


def test_layers_that_compute_otherwise_are_refused(written, tmp_path):
    class Rounding(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).round()

    run = Run(NAME, tmp_path / "out", every_step=False)
    run.student.classifier.__class__ = Rounding  # with the same tensors
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"other layers: \d+ Linear, 0 Rounding; here there are \d+ Linear, 1 Rounding"
    ):
        run.train(resume_from=written / "checkpoint-4")
    assert all(torch.equal(value, before[name]) for name, value in run.student.state_dict().items())


def test_a_checkpoint_that_does_not_tell_its_layers_is_read(copy, tmp_path):
    change_state(copy, layers=None)  # as those of earlier versions
    resume(copy, tmp_path)


def test_other_projections_are_refused(written, tmp_path):
    with pytest.raises(ValueError, match="belongs to another student or other projections"):
        Run("basic, epochs, shuffled", tmp_path / "out", every_step=False).train(resume_from=written / "checkpoint-4")


def test_other_optimizer_groups_are_refused(written, tmp_path):
    run = Run(NAME, tmp_path / "out", every_step=False)
    first, *others = run.student.parameters()
    run.optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others}], lr=0.01)
    with pytest.raises(ValueError, match=r"another optimizer \(other parameter groups"):
        run.train(resume_from=written / "checkpoint-4")


def test_another_optimizer_is_refused(written, tmp_path):
    run = Run(NAME, tmp_path / "out", every_step=False)
    run.optimizer = torch.optim.SGD(run.student.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="another optimizer: AdamW, not SGD"):
        run.train(resume_from=written / "checkpoint-4")


def test_a_missing_schedule_is_refused(written, tmp_path):
    run = Run(NAME, tmp_path / "out", every_step=False)
    with pytest.raises(ValueError, match="has a learning-rate schedule"):
        run.train(resume_from=written / "checkpoint-4", scheduler_class=None, scheduler_args=None)


def test_other_tasks_are_refused(tmp_path):
    Run("multi-task", tmp_path / "out", every_step=False).train(num_steps=1)
    run = Run("multi-task", tmp_path / "out", every_step=False)
    source = run.distiller
    path = tmp_path / "out" / "checkpoint-1" / "rank-0.pt"
    place = torch.load(path, weights_only=True)
    place["place"]["tasks"]["c"] = place["place"]["tasks"].pop("b")
    torch.save(place, path)
    files = json.loads((path.parent / "state.json").read_text())["files"]
    change_state(path.parent, files={**files, "rank-0.pt": path.stat().st_size})
    with pytest.raises(ValueError, match=r"has the tasks \['a', 'c'\], this run \['a', 'b'\]"):
        source.train(run.optimizer, run.loader, num_steps=2, resume_from="latest")


def test_less_data_than_the_checkpoint_saw_is_refused(tmp_path):
    Run("basic, epochs, in order", tmp_path / "out").train()
    for loader in (make_loader(12), list(make_loader(12))):
        run = Run("basic, epochs, in order", tmp_path / "other")
        run.loader = loader
        with pytest.raises(ValueError, match=r"dataloader must yield what it did .* at least 4 batches a pass, got 3"):
            run.train(resume_from=tmp_path / "out" / "checkpoint-4")


def test_the_wrong_type_is_refused(tmp_path):
    with pytest.raises(TypeError, match="resume_from"):
        resume(4, tmp_path)


# Which checkpoint is taken


def test_latest_without_any_starts_anew(written, tmp_path):
    run = Run(NAME, tmp_path / "out", every_step=False).train(resume_from="latest")
    expected = torch.load(written / "gs6.pkl", weights_only=True)
    assert equal(run.student.state_dict(), expected)


def test_latest_is_the_newest_not_the_highest_number(tmp_path):
    folder = tmp_path / "out"
    Run("basic, steps, shuffled", folder, every_step=False).train()
    with pytest.warns(UserWarning, match="checkpoints of an earlier run"):
        Run("basic, steps, shuffled", folder, every_step=False).train(num_steps=4)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-11"]
    assert checkpoint.find_checkpoint("latest", folder).name == "checkpoint-4"
    os.utime(folder / "checkpoint-11")  # Copying or touching a folder makes it no newer.
    assert checkpoint.find_checkpoint("latest", folder).name == "checkpoint-4"


def test_latest_among_unreadable_ones_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state.json").write_text("not json")
    with pytest.raises(ValueError, match=r"\['checkpoint-3'\] in .* cannot be read as checkpoints"):
        checkpoint.find_checkpoint("latest", tmp_path)


def test_latest_leaves_unreadable_ones_out(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "out")
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "state.json").write_text("{")
    assert checkpoint.find_checkpoint("latest", folder) == folder / "checkpoint-6"


def test_a_finished_run_is_not_trained_further(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    called = []
    run = Run(NAME, folder, every_step=False, seed=3)
    run.train(resume_from="latest", callback=lambda model, step: called.append(step))
    assert equal(run.student.state_dict(), torch.load(written / "gs6.pkl", weights_only=True))
    assert not called
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before
    assert not run.loader.dataset.reads


# What is kept


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_counts_the_own_run_only(limit, tmp_path):
    folder = tmp_path / "out"
    Run("basic, steps, shuffled", folder, every_step=False).train(num_steps=2)
    (folder / "checkpoint-notes").mkdir()
    with pytest.warns(UserWarning, match="earlier run"):
        Run("basic, steps, shuffled", folder, save_total_limit=limit).train(num_steps=8)
    names = {path.name for path in folder.glob("checkpoint-*")}
    # The first run's checkpoint-2 had the second one's number and was replaced, and then dropped with it.
    assert names == {"checkpoint-notes", *(f"checkpoint-{step}" for step in range(9 - limit, 9))}
    assert {path.name for path in folder.glob("gs*.pkl")} == {f"gs{step}.pkl" for step in range(1, 9)}


def test_another_runs_checkpoints_are_left_alone(tmp_path):
    folder = tmp_path / "out"
    Run("basic, steps, shuffled", folder, every_step=False).train(num_steps=9)
    with pytest.warns(UserWarning, match="earlier run"):
        Run("basic, steps, shuffled", folder, save_total_limit=1).train(num_steps=4)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-9"]


def test_a_resumed_run_counts_its_checkpoints_from_before(tmp_path):
    folder = tmp_path / "out"
    Run("basic, steps, shuffled", folder, save_total_limit=2).train(num_steps=4)
    Run("basic, steps, shuffled", folder, save_total_limit=2).train(num_steps=5, resume_from="latest")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-5"]


def test_nothing_temporary_stays(written):
    assert not [path.name for path in written.rglob("*") if path.name.startswith(".")]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names of open files are read from /proc")
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, named = set(), []

    def flush(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def rename(source, target):
        files = [source, *source.iterdir()] if source.is_dir() else [source]
        named.append(target.name)
        missing = {str(file) for file in files} - flushed
        assert not missing
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    Run("basic, epochs, in order", tmp_path / "out", every_step=False).train(num_epochs=1)
    assert named == ["gs6.pkl", "rank-0.pt", "checkpoint-6"]


# The student's own file


def wrap_compiled(model):
    return torch.compile(model, backend="eager")


def compile_a_part(model):
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    return model


class HasModule(nn.Module):
    """A student of which a part is called as the wrappers call what they wrap."""

    def __init__(self):
        super().__init__()
        self.module = Encoder()

    def forward(self, **batch):
        return self.module(**batch)


@pytest.mark.parametrize("wrap", [None, wrap_compiled, compile_a_part, nn.DataParallel, HasModule])
def test_the_students_file_loads_into_a_plain_student(wrap, tmp_path):
    student = plain = Encoder()
    if wrap is HasModule:
        student, plain = HasModule(), HasModule()
    elif wrap is not None:
        student, plain = wrap(Encoder()), Encoder(seed=9)
    trainer = BasicTrainer(make_config(tmp_path), student, adaptor)
    trainer.train(torch.optim.SGD(student.parameters(), lr=0.1), make_loader(8), num_steps=2)
    state = torch.load(tmp_path / "gs2.pkl", weights_only=True)
    plain.load_state_dict(state)
    assert equal(list(plain.state_dict().values()), list(student.state_dict().values()))


def test_the_students_file_holds_no_projections(written):
    assert torch.load(written / "gs6.pkl", weights_only=True).keys() == Encoder().state_dict().keys()


def test_tied_weights_are_saved_and_resumed(tmp_path):
    def tied(seed):
        student = Encoder(seed=seed)
        student.layers[1].query.weight = student.layers[0].query.weight
        return student

    def train(student, steps, **arguments):
        trainer = BasicTrainer(make_config(tmp_path, ckpt_steps=2), student, adaptor)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        trainer.train(optimizer, make_loader(8), num_steps=steps, **arguments)
        return student.state_dict()

    whole = train(tied(0), 4)
    resumed = train(tied(1), 4, resume_from=tmp_path / "checkpoint-2")
    assert equal(whole, resumed)


def test_an_unwritable_folder_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("")
    student = Encoder()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = BasicTrainer(make_config(tmp_path / "file" / "out"), student, adaptor)
    with pytest.raises(ValueError, match="output_dir must be a folder that can be written to"):
        trainer.train(torch.optim.SGD(student.parameters(), lr=0.1), make_loader(8), num_steps=2)
    assert equal(before, student.state_dict())


def test_processes_must_agree_on_the_output_folder(tmp_path):
    runtime = SimpleNamespace(share=lambda folder: str(tmp_path / "other"), rank=1)
    with pytest.raises(
        ValueError, match=r"output_dir must be the same on every process.* on rank 1 .*other' on rank 0"
    ):
        Saver(tmp_path / "own", None, runtime, "run").open(None, None)
