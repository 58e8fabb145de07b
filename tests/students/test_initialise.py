"""Students of fewer layers, and what holds for every student."""

import copy

import pytest
import torch
import transformers
from torch import nn

from tests.students.models import HIDDEN, LAYERS, MODELS, UNITS, batch_for, make, outputs_of, same
from textbrewer.students import Family, InnerWidth, LayerStack, families, init_student_from_teacher, register_family

HALF = {"layers": 2, "hidden": HIDDEN // 2}
STACKS = {
    "bert": ["encoder.layer"],
    "roberta": ["encoder.layer"],
    "camembert": ["encoder.layer"],
    "xlm-roberta": ["encoder.layer"],
    "electra": ["encoder.layer"],
    "distilbert": ["transformer.layer"],
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "mistral": ["model.layers"],
    "qwen2": ["model.layers"],
    "bart": ["encoder.layers", "decoder.layers"],
    "mbart": ["encoder.layers", "decoder.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "mt5": ["encoder.block", "decoder.block"],
    "vit": ["layers"],
    "deit": ["layers"],
}
every_model = pytest.mark.parametrize("name", MODELS)


def stacks_of(model):
    """Return the lists of layers of a model, by their dotted names."""
    ends = tuple(STACKS[model.config.model_type])
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


@every_model
def test_all_layers_give_the_teachers_outputs(name):
    teacher = make(name)
    same(outputs_of(init_student_from_teacher(teacher)), outputs_of(teacher))
    same(outputs_of(init_student_from_teacher(teacher, hidden=HIDDEN)), outputs_of(teacher))


@every_model
def test_picked_layers_work_as_in_the_teacher(name):
    teacher = make(name)
    student = init_student_from_teacher(teacher, [0, 2])
    short = copy.deepcopy(teacher)
    for blocks in stacks_of(short).values():
        del blocks[3], blocks[1]
    for config in [module.config for module in short.modules() if hasattr(module, "config")]:
        config.use_cache = False  # the cache counts the layers
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention", "sliding_attention"]
        for field in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers"):
            if hasattr(config, field):
                setattr(config, field, 2)
    expected = outputs_of(short)
    received = {key: value for key, value in outputs_of(student).items() if key in expected}
    same(received, expected)


@every_model
def test_picked_layers_have_the_teachers_tensors(name):
    teacher = make(name)
    picked = [3, 1]
    student = init_student_from_teacher(teacher, picked)
    stacks, mine = stacks_of(teacher), teacher.state_dict()
    assert [len(blocks) for blocks in stacks_of(student).values()] == [2] * len(stacks)
    checked = 0
    for key, tensor in student.state_dict().items():
        source = key
        for path in stacks:
            for number, original in enumerate(picked):
                if key.startswith(f"{path}.{number}.") and "relative_attention_bias" not in key:
                    source = key.replace(f"{path}.{number}.", f"{path}.{original}.")
                    checked += 1
        assert torch.equal(tensor, mine[source]), key
    assert checked > 10


def test_both_stacks_by_a_tuple():
    teacher = make("t5")
    student = init_student_from_teacher(teacher, (1, [0, 1, 3]))
    assert (student.config.num_layers, student.config.num_decoder_layers) == (1, 3)
    assert (len(student.encoder.block), len(student.decoder.block)) == (1, 3)
    expected = teacher.decoder.block[3].layer[1].EncDecAttention.q.weight
    assert torch.equal(student.decoder.block[2].layer[1].EncDecAttention.q.weight, expected)
    assert torch.equal(
        student.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        teacher.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
    )


def test_what_a_config_says_of_each_layer_is_picked_too():
    teacher = make("qwen2")
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    student = init_student_from_teacher(teacher, [3, 0, 1])
    assert student.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]


@every_model
def test_saved_and_loaded(name, tmp_path):
    student = init_student_from_teacher(make(name), **HALF, dropout=0.0)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    same(outputs_of(loaded), outputs_of(student))


@every_model
def test_forward_and_backward(name):
    teacher = make(name)
    student = init_student_from_teacher(teacher, **HALF)
    assert student.training
    assert type(student) is type(teacher)

    def with_gradient(model):
        outputs = model(**batch_for(model))
        sum(value.float().square().sum() for value in outputs.values() if isinstance(value, torch.Tensor)).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        return {key for key, parameter in model.named_parameters() if parameter.grad is not None}

    theirs = with_gradient(student)
    assert theirs == {key for key in with_gradient(copy.deepcopy(teacher)) if key in dict(student.named_parameters())}
    assert theirs


@every_model
@pytest.mark.parametrize("with_data", [False, True])
def test_the_teacher_is_untouched(name, with_data):
    teacher = make(name).train()
    for number, parameter in enumerate(teacher.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    submodule = next(iter(stacks_of(teacher).values()))[0].eval()
    before = copy.deepcopy(teacher)
    state = torch.random.get_rng_state()
    data = [batch_for(teacher)]
    torch.random.set_rng_state(state)
    student = init_student_from_teacher(teacher, **HALF, dropout=0.5, dataloader=data if with_data else None)
    assert torch.equal(torch.random.get_rng_state(), state)
    same(dict(teacher.state_dict()), dict(before.state_dict()))
    assert [p.requires_grad for p in teacher.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert teacher.config.to_dict() == before.config.to_dict()
    assert [m.training for m in teacher.modules()] == [m.training for m in before.modules()]
    assert not submodule.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in submodule.modules())
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert not shared
    assert student.config is not teacher.config


@every_model
def test_tied_weights_stay_tied(name):
    teacher = make(name)
    student = init_student_from_teacher(teacher, **HALF)

    def ties(model):
        names = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(key)
        return sorted(keys for keys in names.values() if len(keys) > 1)

    assert ties(student) == ties(teacher)
    if name in ("bert-lm", "gpt2", "bart", "t5", "mistral"):
        assert ties(student)


@every_model
def test_buffers_are_right(name):
    teacher = make(name)
    student = init_student_from_teacher(teacher, **HALF)
    mine, theirs = dict(teacher.named_buffers()), dict(student.named_buffers())
    assert mine.keys() == theirs.keys()
    for key, buffer in theirs.items():
        assert torch.equal(buffer, mine[key]), key


@every_model
def test_dropout_of_all_kinds_is_set(name):
    teacher = make(name)
    student = init_student_from_teacher(teacher, 2, dropout=0.0)
    batch = batch_for(student)
    with torch.no_grad():
        one, other = student(**batch), student(**batch)
    for first, second in zip(one.to_tuple(), other.to_tuple()):
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second)
    assert all(module.p == 0 for module in student.modules() if isinstance(module, nn.Dropout))
    wet = init_student_from_teacher(teacher, 2, dropout=0.25)
    rates = {module.p for module in wet.modules() if isinstance(module, nn.Dropout)}
    assert rates <= {0.25}
    fields = [key for key, value in wet.config.to_dict().items() if value == 0.25]
    assert fields
    assert not any("layerdrop" in key for key in fields)


def test_dropout_is_otherwise_the_teachers():
    teacher = make("bert-classifier", hidden_dropout_prob=0.3)
    student = init_student_from_teacher(teacher, 2)
    assert student.config.hidden_dropout_prob == 0.3
    assert student.bert.encoder.layer[0].output.dropout.p == 0.3


@pytest.mark.parametrize("name", ["bert-lm", "gpt2", "t5", "vit"])
def test_dtype_and_attention_of_the_teacher(name):
    teacher = make(name, attn_implementation="eager").to(torch.bfloat16)
    student = init_student_from_teacher(teacher, **HALF)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config._attn_implementation == "eager"
    outputs = student(**batch_for(student), output_attentions=True)
    assert len(outputs.get("attentions", outputs.get("encoder_attentions"))) == 2


def test_each_tensor_keeps_its_own_dtype():
    teacher = make("bert-lm").to(torch.bfloat16)
    teacher.bert.embeddings.LayerNorm.float()
    student = init_student_from_teacher(teacher, **HALF)
    for key, tensor in student.state_dict().items():
        assert tensor.dtype == teacher.state_dict()[key].dtype


def test_the_generation_config_is_kept():
    teacher = make("gpt2")
    teacher.generation_config.max_new_tokens = 7
    student = init_student_from_teacher(teacher, **HALF)
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config
    assert student.eval().generate(torch.tensor([[5, 6]]), do_sample=False).shape == (1, 9)


def test_a_teacher_made_without_pooler():
    teacher = transformers.BertModel(make("bert-lm").config, add_pooling_layer=False).eval()
    student = init_student_from_teacher(teacher, 2)
    assert student.pooler is None
    assert outputs_of(student).keys() == {"last_hidden_state"}


def test_a_grown_vocabulary_is_kept():
    teacher = make("bert-lm")
    teacher.resize_token_embeddings(50)
    student = init_student_from_teacher(teacher, **HALF)
    assert student.get_input_embeddings().weight.shape == (50, HIDDEN // 2)
    assert student.config.vocab_size == 50


# Errors


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bert-lm", {"hidden": 30}, "multiple of the width of a head, 4.*pass hidden=28 or 32"),
        ("bert-lm", {"hidden": 64}, "hidden must be at most the teacher's 32, got 64"),
        ("bert-lm", {"hidden": 0}, "hidden must be at least 1"),
        ("bert-lm", {"heads": 4}, "heads must be hidden / width of a head = 32 / 4 = 8.*pass hidden=16"),
        ("bert-lm", {"intermediate": 31}, "intermediate must be at most the teacher's 30"),
        ("bert-lm", {"dataloader": []}, "dataloader must be None where no width changes"),
        ("bert-lm", {"hidden": 16, "dataloader": []}, "at least one batch"),
        ("bert-lm", {"dropout": 1.5}, "dropout must be less than 1"),
        ("bert-lm", {"dropout": -1}, "dropout must be at least 0"),
        ("bert-lm", {"layers": (1, 2)}, "name layers in a list"),
        ("llama", {"hidden": 18}, "whole number of the teacher's 8 heads.*pass heads="),
        ("llama", {"hidden": 20}, "heads must be a multiple of 2, .*got 5; pass heads=6"),
        ("t5", {"heads": 9}, "heads must be at most the teacher's 8"),
        ("electra", {"hidden": 10, "heads": 2}, "multiple of the width of a head"),
        ("gpt2", {"layers": 9}, "at most the teacher's 4"),
    ],
)
def test_what_does_not_fit(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        init_student_from_teacher(make(name), **arguments)


def test_an_embedding_projection_that_would_vanish():
    teacher = make("electra", embedding_size=16)
    with pytest.raises(ValueError, match=r"the student has no 'electra\.embeddings_project"):
        init_student_from_teacher(teacher, hidden=16)


def test_layers_that_compute_by_their_place():
    teacher = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    same(outputs_of(init_student_from_teacher(teacher)), outputs_of(teacher))
    assert init_student_from_teacher(teacher, [0, 1]).config.n_layer == 2
    with pytest.raises(ValueError, match=r"scale_attn_by_inverse_layer_idx is set.*got \[1, 3\]"):
        init_student_from_teacher(teacher, 2)


def test_an_unknown_family_says_how_to_make_it_known():
    teacher = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match=r"got 'clip_text_model'.*known: bert, .*register_family\('clip_text_model'"):
        init_student_from_teacher(teacher, 1)


def test_a_model_that_is_not_made_of_its_config():
    class Wrapped(nn.Module):
        def __init__(self, model, more):
            super().__init__()
            self.model, self.config = model, model.config

    with pytest.raises(TypeError, match=r"Wrapped must be made from its config alone"):
        init_student_from_teacher(Wrapped(make("bert-lm"), 1), 2)
    with pytest.raises(TypeError, match=r"teacher must be a torch\.nn\.Module"):
        init_student_from_teacher("bert-base-cased", 2)


# Families of the user's own


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own_model"

    def __init__(self, width=8, depth=3, heads=2, inner=6, **others):
        self.width, self.depth, self.heads, self.inner = width, depth, heads, inner
        super().__init__(**others)


class OwnLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.qkv = config.heads, nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.up, self.down = nn.Linear(config.width, config.inner), nn.Linear(config.inner, config.width)

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        x = x + self.out(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


class OwnModel(transformers.PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(11, config.width)
        self.blocks = nn.ModuleList(OwnLayer(config) for _ in range(config.depth))
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def own_family():
    register_family(
        "own_model",
        Family(
            hidden="width",
            stacks=(LayerStack(("blocks",), "depth", "heads", "inner"),),
            attentions=(InnerWidth(("qkv",), ("out",)),),
            feed_forwards=(InnerWidth(("up",), ("down",)),),
        ),
    )
    yield
    del families.FAMILIES["own_model"]


def test_a_family_of_ones_own(own_family):
    torch.manual_seed(0)
    teacher = OwnModel(OwnConfig())
    tokens = torch.arange(6).reshape(2, 3)
    assert torch.equal(init_student_from_teacher(teacher)(tokens), teacher(tokens))
    student = init_student_from_teacher(teacher, 1, hidden=4)
    assert (student.config.width, student.config.depth, student.config.heads, student.config.inner) == (4, 1, 1, 3)
    assert student(tokens).shape == (2, 3, 4)
    assert student.blocks[0].qkv.weight.shape == (12, 4)


def test_a_family_that_forgets_a_module(own_family):
    families.FAMILIES["own_model"] = Family(
        hidden="width",
        stacks=(LayerStack(("blocks",), "depth", "heads", "inner"),),
        attentions=(InnerWidth((), ("out",)),),
        feed_forwards=(InnerWidth(("up",), ("down",)),),
    )
    with pytest.raises(ValueError, match=r"axis 0 of 'blocks\.0\.qkv\.weight' has 24 features"):
        init_student_from_teacher(OwnModel(OwnConfig()), hidden=4)


def test_shared_keys_in_one_projection_with_the_queries(own_family):
    families.FAMILIES["own_model"] = Family(
        hidden="width",
        stacks=(LayerStack(("blocks",), "depth", "heads", "inner", key_value_heads="groups"),),
        attentions=(InnerWidth(("qkv",), ("out",)),),
        feed_forwards=(InnerWidth(("up",), ("down",)),),
    )
    with pytest.raises(ValueError, match=r"projections of their own .* got 'blocks\.0\.qkv'"):
        init_student_from_teacher(OwnModel(OwnConfig(groups=1)), intermediate=4)


def test_registering(own_family):
    register_family("own_model", families.FAMILIES["own_model"])  # once more: as in a notebook run again
    with pytest.raises(ValueError, match="registered already"):
        register_family("own_model", "bert")
    with pytest.raises(KeyError, match="unknown family 'brt'; did you mean 'bert'"):
        register_family("mine", "brt")
    with pytest.raises(TypeError, match="must be a Family"):
        register_family("mine", {})


# Models without a config


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def forward(self, x):
        x = self.start(x)
        for block in self.blocks:
            x = block(x).tanh()
        return [head(x) for head in self.heads]


def test_a_model_of_ones_own():
    teacher = Tower().eval().requires_grad_(False)
    student = init_student_from_teacher(teacher, 3)
    x = torch.randn(2, 4)
    expected = teacher.start(x)
    for number in (1, 3, 5):
        expected = teacher.blocks[number](expected).tanh()
    assert torch.equal(student(x)[1], teacher.heads[1](expected))
    assert len(teacher.blocks) == 6
    assert student.training
    assert not teacher.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert list(student.state_dict())[2:8:2] == ["blocks.0.weight", "blocks.1.weight", "blocks.2.weight"]


def test_what_is_frozen_in_a_teacher_that_trains_stays_frozen():
    teacher = Tower()
    teacher.start.requires_grad_(False)
    student = init_student_from_teacher(teacher, [0])
    assert not student.start.weight.requires_grad
    assert student.blocks[0].weight.requires_grad


def test_a_transformers_model_inside_ones_own():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"encoder": make("llama-classifier")})
            self.head = nn.Linear(2, 5)

        def forward(self, tokens):
            return self.head(self.model["encoder"](tokens).logits)

    teacher = Classifier()
    student = init_student_from_teacher(teacher, 2, dropout=0.2)
    encoder = student.model["encoder"]
    assert encoder.config.num_hidden_layers == 2
    assert encoder.config.attention_dropout == 0.2
    assert teacher.model["encoder"].config.num_hidden_layers == LAYERS
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert student(torch.ones(1, 3, dtype=torch.long)).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 3, "hidden": 2}, "hidden, heads and intermediate must be None for Tower"),
        ({"layers": 3, "dropout": 0.1}, "dropout must be None for Tower"),
        ({"layers": (1, 2)}, "a number or a list for Tower"),
        ({"layers": 7}, "at most the teacher's 6"),
    ],
)
def test_what_a_model_of_ones_own_cannot(arguments, message):
    with pytest.raises(ValueError, match=message):
        init_student_from_teacher(Tower(), **arguments)


def test_a_model_of_ones_own_without_a_stack():
    with pytest.raises(ValueError, match=r"Sequential must have one nn\.ModuleList of layers"):
        init_student_from_teacher(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 1)


def test_units_of_the_teacher_are_counted_not_read():
    teacher = make("gpt2", n_inner=None)
    assert init_student_from_teacher(teacher, hidden=16).transformer.h[0].mlp.c_fc.nf == 2 * HIDDEN
    assert init_student_from_teacher(make("gpt2"), hidden=16).config.n_inner == UNITS // 2
