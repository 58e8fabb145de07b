import importlib.util
import json
import sys
import time

import pytest
import torch
from torch import nn

from tests.report.models import CLASSES, ROWS, Linear, bert, bert_batches, linear_batches
from textbrewer.report import Measured, Report, report

QUICK = {"repeats": 3, "warmup": 1}


class Sleeper(Linear):
    """Takes some seconds for each row."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds * len(x))
        return super().forward(x)


class Recorder(Linear):
    """Notes who is called with how many rows."""

    calls: list = []

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append((id(self), len(x)))
        return super().forward(x)


def small_report(**settings):
    models = {"large": Linear(8, 50), "small": Linear(8, 5)}
    return report(models, linear_batches(), **{**QUICK, **settings})


def test_sizes_and_costs_of_a_linear_layer(tmp_path):
    found = report([Linear(8, 5), Linear(8, 5, bias=False)], linear_batches((4, 2)), **QUICK)
    first, second = found.models
    assert (first.name, second.name, found.baseline) == ("Linear", "Linear 2", "Linear")
    assert (first.parameters, second.parameters) == (45, 40)
    assert first.flops == second.flops == 2 * 4 * 8 * 5  # of the first batch
    assert found.smaller("Linear 2") == first.file_bytes / second.file_bytes
    assert found.smaller("Linear") == found.faster("Linear") == 1.0
    assert [timing.batch_size for timing in first.timings] == [1, None]
    assert first.timings[1].rows == (4 + 2 + 4) / 3
    assert found["Linear 2"] is second


def test_latency_and_throughput_of_known_speed():
    found = report({"slow": Sleeper(0.06), "fast": Sleeper(0.001)}, linear_batches(), repeats=5, warmup=0)
    slow, fast = found.models
    assert slow.timings[0].ms[1] >= 60
    assert slow.timings[1].ms[1] >= 240
    assert slow.timings[1].rows_per_second[1] <= 1 / 0.06
    assert found.faster("fast", 0) > 3
    assert found.faster("fast", 1) > 3
    assert found.faster("fast") == slow.timings[0].ms[1] / fast.timings[0].ms[1]
    for timing in slow.timings + fast.timings:
        assert list(timing.ms) == sorted(timing.ms)
        assert list(timing.rows_per_second) == sorted(timing.rows_per_second)


def test_models_take_turns_in_eval_mode_and_get_their_modes_back():
    Recorder.calls = []
    one, two = Recorder().train(), Recorder().eval()
    report([one, two], linear_batches((4, 4)), batch_sizes=(1, 2, None), repeats=4, warmup=1)
    timed = Recorder.calls[-2 * 3 * 5 :]
    assert [rows for _, rows in timed] == [1] * 10 + [2] * 10 + [4] * 10
    for start in range(0, len(timed), 2):
        assert {who for who, _ in timed[start : start + 2]} == {id(one), id(two)}
    assert one.training
    assert not two.training


def test_pieces_of_a_batch_size_are_rows_of_the_data():
    seen = []

    class Keeper(Linear):
        def forward(self, x, name):
            seen.append(x)
            assert name == "same"  # what has no rows is passed on
            return super().forward(x)

    data = linear_batches((3, 2))
    report([Keeper()], [{**batch, "name": "same"} for batch in data], batch_sizes=(1,), repeats=5, warmup=0)
    rows = torch.cat([batch["x"] for batch in data])
    torch.testing.assert_close(torch.cat(seen[-5:]), rows, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda batch: batch["x"], lambda batch: (batch["x"],), lambda batch: [batch["x"]]])
def test_batches_of_other_forms(wrap):
    found = report([Linear()], [wrap(batch) for batch in linear_batches()], **QUICK)
    assert found.models[0].flops == 2 * 4 * 8 * 5
    assert found.batch == "4 x 8"


def test_a_report_on_bert_scores_and_threads():
    threads = torch.get_num_threads()
    used = []

    def score(model):
        used.append(torch.get_num_threads())
        return {
            "classes": torch.tensor(model(**bert_batches()[0]).logits.shape[-1]),
            "layers": len(list(model.bert.encoder.layer)),
        }

    models = {"teacher": bert(), "student": bert(num_hidden_layers=1)}
    found = report(models, bert_batches((ROWS, 3)), score=score, threads=2, **QUICK)
    assert [model.scores for model in found.models] == [
        {"classes": CLASSES, "layers": 2},
        {"classes": CLASSES, "layers": 1},
    ]
    assert found.models[0].score == CLASSES
    assert used == [2, 2]
    assert found.threads == 2
    assert torch.get_num_threads() == threads
    assert found.smaller("student") > 1
    assert found.environment["torch"] == torch.__version__


def test_something_that_is_no_module(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x" * 123)
    layer, given = Linear(), []
    other = Measured(lambda x: layer(x).numpy(), tmp_path / "model.onnx", "session")

    def score(model):
        given.append(model)
        return float(model(x=torch.ones(1, 8)).shape[-1])

    found = report([layer, other], linear_batches(), score=score, **QUICK)
    assert given == [layer, other]
    session = found["session"]
    assert (session.file_bytes, session.file_format, session.score) == (123, "model.onnx", 5.0)
    assert session.parameters is session.components is session.zeros is session.flops is session.peak_memory is None
    assert session.timings[0].ms[1] > 0
    assert "session" in found.to_text()


def test_a_module_with_the_file_it_is_shipped_as(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 99)
    found = report([Measured(Linear(), [tmp_path / "file"])], linear_batches(), **QUICK).models[0]
    assert (found.file_bytes, found.parameters, found.kind) == (99, 45, "Linear")


def test_zero_weights_are_shares():
    model = Linear(8, 5, bias=False)
    model.layer.weight.data[:2] = 0.0
    found = report([model], linear_batches(), **QUICK).models[0]
    assert found.sparsity == found.matrices[0].share == 2 / 5


def test_json_round_trip(tmp_path):
    found = small_report(score=lambda model: {"one": 1.5, "two": float("inf")})
    found.save_json(tmp_path / "new" / "report.json")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["models"][0]["scores"] == {"one": 1.5, "two": None}  # JSON has no infinity
    again = Report.load(tmp_path / "new" / "report.json")
    assert again.to_json() == found.to_json()
    plain = small_report()
    plain.save_json(tmp_path / "plain.json")
    assert Report.load(tmp_path / "plain.json") == plain
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"library": "textbrewer", "models": [], "format": 99}', "\x80"])
def test_what_is_no_report_is_not_read(tmp_path, content):
    (tmp_path / "file").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="report"):
        Report.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("a.html", {"a.html"}),
        ("a.json", {"a.json"}),
        ("a.MD", {"a.MD"}),
        ("a.txt", {"a.txt"}),
        ("folder", {"folder/report.html", "folder/report.json", "folder/report.md", "folder/report.png"}),
    ],
)
def test_files_are_written_by_suffix(tmp_path, path, files):
    if importlib.util.find_spec("matplotlib") is None:
        files = {name for name in files if not name.endswith(".png")}
    small_report(path=tmp_path / path)
    written = {str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*") if found.is_file()}
    assert written == files


@pytest.mark.parametrize("scored", [True, False])
def test_plot_is_a_picture(tmp_path, scored):
    pytest.importorskip("matplotlib")
    small_report(score=(lambda model: 1.0) if scored else None).plot(tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert (width > 2 * height) == scored  # two panels, or one


def test_a_file_is_not_half_written(tmp_path, monkeypatch):
    found = small_report()
    found.save_html(tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()

    def full(self, content):
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        found.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    called = []
    with pytest.raises(ImportError, match=r"pip install 'textbrewer\[plot\]'"):
        report([Linear()], called, path=tmp_path / "plot.png")  # before anything is measured
    with pytest.raises(ImportError, match=r"pip install 'textbrewer\[plot\]'"):
        small_report().plot(tmp_path / "plot.png")
    small_report(path=tmp_path / "report.html")


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("wrong width")


@pytest.mark.parametrize(
    ("models", "data", "settings", "error", "message"),
    [
        ([], linear_batches(), {}, ValueError, "models must hold at least one model"),
        (Linear(), linear_batches(), {}, TypeError, "models must be a list of models"),
        ([print], linear_batches(), {}, TypeError, r"must be a torch module or Measured\(call"),
        ([Linear()], [], {}, ValueError, "data must yield at least one batch"),
        ([Linear()], linear_batches()[0], {}, TypeError, r"data must be an iterable .* give one batch as \[batch\]"),
        ([Linear()], [{"x": torch.ones(0, 8)}], {}, ValueError, "at least one row, got x 0 x 8"),
        ([Linear()], ["text"], {}, TypeError, "batches with tensors of rows"),
        ([Linear()], [{"y": torch.ones(2, 8)}], {}, ValueError, "'Linear' failed on a batch of y 2 x 8: TypeError"),
        ({"a": Linear(), "b": Broken()}, linear_batches(), {}, ValueError, "'b' failed .*RuntimeError: wrong width"),
        ([Linear()], linear_batches(), {"batch_sizes": (5,)}, ValueError, "at most the rows of the data's batches, 4"),
        ([Linear()], linear_batches(), {"batch_sizes": ()}, ValueError, "batch_sizes must be different"),
        ([Linear()], linear_batches(), {"batch_sizes": (0,)}, ValueError, "batch_sizes must be at least 1"),
        ([Linear()], linear_batches(), {"baseline": "Linnear"}, KeyError, "unknown model 'Linnear'; did you mean 'Lin"),
        ([Linear()], linear_batches(), {"names": ["a", "b"]}, ValueError, "names must be as many as the models, 1"),
        ([Linear(), Linear()], linear_batches(), {"names": ["a", "a"]}, ValueError, "names must be different"),
        ({"a": Linear()}, linear_batches(), {"names": ["b"]}, ValueError, "names must be left out"),
        ([Linear()], linear_batches(), {"threads": 0}, ValueError, "threads must be at least 1"),
        ([Linear()], linear_batches(), {"repeats": 0}, ValueError, "repeats must be at least 1"),
        ([Linear()], linear_batches(), {"path": "report.pdf"}, ValueError, "path must end in one of .html"),
        ([Linear()], linear_batches(), {"score": lambda m: "good"}, TypeError, "score of 'Linear', 'score' must be"),
        ([Linear()], linear_batches(), {"score": lambda m: {}}, ValueError, "score must return at least one number"),
    ],
)
def test_bad_input(models, data, settings, error, message):
    with pytest.raises(error, match=message):
        report(models, data, **{"repeats": 1, "warmup": 0, **settings})


def test_bad_measured(tmp_path):
    with pytest.raises(FileNotFoundError, match="file must be there"):
        Measured(print, tmp_path / "none.onnx")
    with pytest.raises(TypeError, match="call must be"):
        Measured("model.onnx")


def test_an_unknown_model_of_a_report():
    with pytest.raises(KeyError, match="unknown model 'smal'; did you mean 'small'"):
        small_report()["smal"]
