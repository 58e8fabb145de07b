"""Matches"""

import textbrewer

from .tiny import custom_match, distiller, everything, loader, logits_only, pair, sgd, watching


def squared_error(output_S, output_T, mask_S, mask_T):
    return (output_S - output_T).square().mean()


def with_custom_match(folder):
    teacher, student = pair()
    match = custom_match(module_T=teacher.second, module_S=student.second, weight=1.0, loss=squared_error)
    train_config = textbrewer.TrainingConfig(output_dir=str(folder), device="cpu")
    config = textbrewer.DistillationConfig(kd_loss_weight=0)
    trainer = textbrewer.GeneralDistiller(
        train_config, config, teacher, student, logits_only, logits_only, custom_matches=[match]
    )
    return trainer, teacher, student


def test_custom_match(tmp_path):
    """Custom matches always raise KeyError.

    With the match alone the outputs of the student's module come nearer to the teacher's.
    """
    trainer, teacher, student = with_custom_match(tmp_path)

    def distance():
        outputs = []
        for model in (teacher, student):
            handle = model.second.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
            model(next(iter(loader(8, 8)))["x"])
            handle.remove()
        return (outputs[0] - outputs[1]).square().mean().item()

    before = distance()
    trainer.train(sgd(student, 1.0), loader(), num_epochs=5)
    assert distance() < 0.5 * before


def test_custom_match_fields():
    """Custom matches hold 1-tuples."""
    teacher, student = pair()
    match = custom_match(module_T=teacher.second, module_S=student.second, weight=2.0, loss=squared_error)
    assert match.weight == 2.0, f"weight=2.0 becomes {match.weight}"
    assert match.loss is squared_error


def test_custom_match_hooks(tmp_path):
    """Custom matches leak their hooks."""
    trainer, teacher, student = with_custom_match(tmp_path)
    del trainer
    left = len(teacher.second._forward_hooks) + len(student.second._forward_hooks)
    assert left == 0, f"{left} hooks are left when the distiller is gone"
    trainer, teacher, student = with_custom_match(tmp_path)
    trainer.train(sgd(student), loader(), num_epochs=1)
    assert not teacher.second._forward_hooks
    assert not student.second._forward_hooks


def test_log_names(tmp_path):
    """Two matches with the same layers share a log name."""
    match = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    trainer = distiller(
        watching("GeneralDistiller"),
        tmp_path,
        *pair(),
        everything,
        intermediate_matches=[{**match, "proj": ["linear", 4, 4]}, match],
    )
    trainer.train(sgd(trainer.model_S), loader(), num_epochs=1)
    names = sorted(trainer.seen[0].keys() - {"total", "unweighted_kd_loss"})
    assert len(names) == 2, f"two matches are logged as {names}"


def test_activations_of_projections():
    """Projections share one activation module."""
    for name in ("relu", "tanh"):
        first, second = (textbrewer.PROJ_MAP[name](4, 5) for _ in range(2))
        assert first[1] is not second[1], "two projections hold the same module"
