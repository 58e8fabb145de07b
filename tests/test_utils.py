"""Tests of display_parameters and initializer_builder: counts by plain sums over real small models."""

import math
import warnings

import pytest
import torch
from torch import nn

from textbrewer.utils import LayerNode, display_parameters, initializer_builder


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight


def plain_count(model):
    """Elements and bytes of the distinct parameters: parameters() yields a tied one once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def cells(text):
    """The table as rows of stripped cells, without the header."""
    return [[cell.strip() for cell in line.split("\t")] for line in text.splitlines()[2:]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_counts_of_a_tied_model(device, dtype):
    with torch.device(device):
        model = Tied().to(dtype)
    _, tree = display_parameters(model)
    count, size = plain_count(model)
    assert tree.value == [count, pytest.approx(size / 2**20)]
    assert isinstance(tree.value[0], int)
    assert tree["body"].value[0] == sum(p.numel() for p in model.body.parameters())
    assert tree["head"]["weight"].value == [0, 0]
    assert tree["head"]["weight"].name == "weight(shared)"
    assert tree["head"]["weight"].fullname == "head.weight(shared)"
    assert tree["head"]["bias"].value[0] == 10
    assert tree["embed"]["weight"].name == "weight"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_of_a_transformer_with_tied_embeddings(device):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with torch.device(device):
        model = transformers.BertForMaskedLM(config)
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    _, tree = display_parameters(model)
    assert tree.value == [plain_count(model)[0], pytest.approx(plain_count(model)[1] / 2**20)]
    layers = tree["bert"]["encoder"]["layer"]
    assert set(layers.children_name) == {"0", "1"}
    assert layers.value[0] == sum(p.numel() for p in model.bert.encoder.parameters())
    assert "decoder" in tree["cls"]["predictions"]


# Printed by TextBrewer 0.2.1.post1 for this model, by max_level.
ORIGINAL = {
    None: (
        "\nLAYER NAME           \t        #PARAMS\t     RATIO\t MEM(MB)\n"
        "--model:             \t             60\t   100.00%\t    0.00\n"
        "  --0                \n"
        "    --weight:        \t             40\t    66.67%\t    0.00\n"
        "  --1                \n"
        "    --0:             \t             20\t    33.33%\t    0.00\n"
        "      --weight:      \t             16\t    26.67%\t    0.00\n"
        "      --bias:        \t              4\t     6.67%\t    0.00\n"
        "  --2                \n"
        "    --weight(shared):\t              0\t     0.00%\t    0.00\n"
    ),
    1: (
        "\nLAYER NAME\t        #PARAMS\t     RATIO\t MEM(MB)\n"
        "--model:\t             60\t   100.00%\t    0.00\n"
        "  --0:  \t             40\t    66.67%\t    0.00\n"
        "  --1:  \t             20\t    33.33%\t    0.00\n"
        "  --2:  \t              0\t     0.00%\t    0.00\n"
    ),
    0: ("\nLAYER NAME\t        #PARAMS\t     RATIO\t MEM(MB)\n--model:\t             60\t   100.00%\t    0.00\n"),
}


@pytest.mark.parametrize("max_level", [None, 1, 0])
@pytest.mark.parametrize("as_dict", [False, True])
def test_table_of_the_original(max_level, as_dict):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    text, _ = display_parameters(model.state_dict() if as_dict else model, max_level=max_level)
    assert text == ORIGINAL[max_level]


def distinct_elements(tensors):
    """Addresses of all elements, one by one."""
    addresses = set()
    for tensor in tensors:
        places = [range(size) for size in tensor.shape]
        for place in torch.cartesian_prod(*map(torch.tensor, places)).reshape(-1, tensor.dim()).tolist():
            step = sum(index * stride for index, stride in zip(place, tensor.stride()))
            addresses.add(tensor.storage_offset() + step)
    return len(addresses)


def views(base):
    """Lists of views of a 6 x 8 tensor."""
    return {
        "disjoint rows": [base[:2], base[2:5]],
        "overlapping rows": [base[:3], base[2:5]],
        "columns": [base[:, :3], base[:, 3:]],
        "columns and rows": [base[:, :3], base[1:3]],
        "every second": [base.view(-1)[::2], base.view(-1)[::3]],
        "transposed": [base.t(), base],
        "inner block": [base[1:3, 2:5], base[2:4, 4:8], base],
        "expanded": [base[:1].expand(5, 8), base[:2]],
        "unfolded": [base[0].unfold(0, 4, 2), base[1].unfold(0, 2, 1)],
        "three dimensions": [base.view(2, 3, 8)[:, 1:, ::2], base.view(2, 3, 8)[:, :2]],
        "shifted": [base.view(-1)[1:9], base.view(-1)[0:8], base.view(-1)[9:12]],
        "single": [base[0, 0].view(1), base[0, :1]],
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", views(torch.empty(6, 8)))
@pytest.mark.parametrize("order", [1, -1])
def test_views_of_one_storage(name, device, order):
    tensors = views(torch.empty(6, 8, device=device, dtype=torch.float64))[name][::order]
    _, tree = display_parameters({f"part.{number}": tensor for number, tensor in enumerate(tensors)})
    expected = distinct_elements(tensors)
    assert tree.value == [expected, pytest.approx(expected * 8 / 2**20)]
    before = 0
    for number, tensor in enumerate(tensors):
        now, own = distinct_elements(tensors[: number + 1]), distinct_elements([tensor])
        node = tree["part"][str(number)]
        assert node.value[0] == now - before
        mark = "" if now - before == own else "(partly shared)" if now > before else "(shared)"
        assert node.name == f"{number}{mark}"
        before = now


def test_views_as_parameters_of_a_module():
    fused = torch.randn(6, 4)
    model = nn.Module()
    model.q, model.k = nn.Parameter(fused[:3]), nn.Parameter(fused[3:])
    model.all = nn.Parameter(fused)
    _, tree = display_parameters(model)
    assert {name: node.value[0] for name, node in tree.children_name.items()} == {"q": 12, "k": 12, "all": 0}
    assert tree["all"].name == "all(shared)"


def test_a_view_as_another_dtype_shares_its_bytes():
    base = torch.zeros(8, dtype=torch.float32)
    _, tree = display_parameters({"bytes": base.view(torch.uint8)[:8], "floats": base})
    assert tree["bytes"].value[0] == 8
    assert tree["floats"].value == [6, 6 * 4 / 2**20]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_elements_are_not_shared(device):
    _, tree = display_parameters({"a": torch.empty(0, 3, device=device), "b": torch.empty(0, device=device)})
    assert [(node.name, node.value) for node in tree.children_name.values()] == [("a", [0, 0]), ("b", [0, 0])]


def test_buffers_that_are_saved_are_counted_and_marked():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].register_buffer("unsaved", torch.zeros(100), persistent=False)
    text, tree = display_parameters(model)
    assert tree.value[0] == sum(value.numel() for value in model.state_dict().values())
    # Two linear tensors, two of the norm, then mean and variance (2 each) and the number of batches (1).
    assert tree.value[0] == 6 + 2 + 2 + 2 + 2 + 2 + 1
    assert tree.value[1] == pytest.approx((16 * 4 + 8) / 2**20)
    assert tree["1"]["running_mean"].name == "running_mean(buffer)"
    assert tree["1"]["weight"].name == "weight"
    assert "unsaved" not in tree["1"]
    assert "unsaved" not in text


@pytest.mark.parametrize("model", [nn.Module(), nn.ReLU(), nn.Sequential(), {}])
def test_nothing_to_count(model):
    text, tree = display_parameters(model)
    assert tree.value == [0, 0]
    assert cells(text) == [["--model:", "0", "0.00%", "0.00"]]


def test_sparse_and_quantised_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation notices of torch
        packed = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)
    sparse = torch.eye(3).to_sparse()
    state = {"sparse": sparse, "again": sparse, "packed": (packed, torch.zeros(3)), "packed_dtype": torch.qint8}
    _, tree = display_parameters(state)
    assert {name: node.value[0] for name, node in tree.children_name.items()} == {"sparse": 9, "again": 0, "packed": 15}
    assert tree["packed"].value[1] == pytest.approx((12 * 1 + 3 * 4) / 2**20)


def test_a_sparse_tensor_under_two_names_of_a_module():
    model, sparse = nn.Module(), torch.eye(3).to_sparse()
    model.register_buffer("a", sparse)
    model.register_buffer("b", sparse)
    _, tree = display_parameters(model)
    assert [(node.name, node.value[0]) for node in tree.children_name.values()] == [
        ("a(buffer)", 9),
        ("b(buffer)(shared)", 0),
    ]


def test_ratios_and_rows_add_up():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    text, tree = display_parameters(model)
    total = plain_count(model)[0]
    rows = {name.strip(": -"): (count, ratio) for name, count, ratio, _ in cells(text) if count}
    assert rows["in_proj_weight"] == (f"{48 * 16:,}", f"{48 * 16 / total:.2%}")
    for _, node in tree.rows():
        if node.children_name:
            assert node.value[0] == sum(child.value[0] for child in node.children_name.values())
            assert math.isclose(node.value[1], sum(child.value[1] for child in node.children_name.values()))


def test_memory_column_is_in_mebibytes():
    text, _ = display_parameters({"weight": torch.empty(1024, 512, dtype=torch.float32, device="meta")}, max_level=0)
    assert cells(text) == [["--model:", f"{1024 * 512:,}", "100.00%", "2.00"]]


def test_tree_navigation():
    _, tree = display_parameters(Tied())
    assert isinstance(tree, LayerNode)
    assert tree.parent is None
    assert tree["body"]["0"].parent is tree["body"]
    assert tree["body"]["0"]["bias"].fullname == "body.0.bias"
    assert "missing" not in tree
    assert "embed" in tree
    assert (tree.name, tree.fullname) == ("model", "model")


def test_a_name_that_is_a_tensor_and_a_module():
    _, tree = display_parameters({"a.b": torch.zeros(2), "a": torch.zeros(3), "a.c": torch.zeros(4)})
    assert tree["a"].value[0] == tree.value[0] == 9


@pytest.mark.parametrize("model", [[], "model", None, {"model": {"a": torch.zeros(1)}}, {0: torch.zeros(1)}, {"a": 1}])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"model must be a module or a state dict|a state dict must be a mapping"):
        display_parameters(model)


@pytest.mark.parametrize("max_level", [-1, 0.5])
def test_max_level_out_of_range(max_level):
    with pytest.raises(ValueError, match="max_level must be"):
        display_parameters(nn.Linear(1, 1), max_level)


def test_initializer():
    model = nn.Sequential(nn.Embedding(200, 50), nn.Linear(50, 200), nn.Linear(3, 3, bias=False), nn.LayerNorm(200))
    nn.init.constant_(model[3].weight, 7.0)
    torch.manual_seed(0)
    model.apply(initializer_builder(0.5))
    # What the original does: normal_ on each weight in turn, on the global generator.
    torch.manual_seed(0)
    for module in (model[0], model[1], model[2]):
        torch.testing.assert_close(module.weight, torch.empty_like(module.weight).normal_(0, 0.5), rtol=0, atol=0)
    assert model[0].weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert not model[1].bias.any()
    assert (model[3].weight == 7).all()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("std", [-0.1, float("nan")])
def test_initializer_refuses(std):
    with pytest.raises(ValueError, match="std must be"):
        initializer_builder(std)
