"""Students of smaller width: which features they keep of the teacher, found out from the values of their weights."""

import copy
import math
import re

import pytest
import torch

from tests.students.models import HEADS, HIDDEN, LENGTH, MODELS, ROWS, UNITS, VOCABULARY, batch_for, make, outputs_of
from textbrewer.students import init_student_from_teacher

WRITERS = r"\.(query|key|value|[qkv]_lin|[qkv]_proj|[qkv]|attn\.c_attn)\.(weight|bias)$"
READERS = r"\.(attention\.output\.dense|out_lin|attn\.c_proj|o_proj|out_proj|o)\.weight$"
UNIT_WRITERS = r"\.(intermediate\.dense|lin1|c_fc|gate_proj|up_proj|fc1|wi|wi_0|wi_1)\.(weight|bias)$"
UNIT_READERS = r"\d\.(output\.dense|.*lin2|mlp\.c_proj|.*down_proj|.*fc2|.*wo)\.weight$"
TABLE = r"relative_attention_bias\.weight$"
LAYER = r"(.*\.\d+)\."
every_model = pytest.mark.parametrize("name", MODELS)


def subgrid(part, whole):
    """Return, for each axis, which places of ``whole`` make up ``part``: found by value, all values being different."""
    where = {value: place for place, value in enumerate(whole.flatten().tolist())}
    assert len(where) == whole.numel()
    places = torch.tensor([where[value] for value in part.flatten().tolist()])
    grids = [axis.view(part.shape) for axis in torch.unravel_index(places, whole.shape)]
    kept = []
    for axis, grid in enumerate(grids):
        first = grid.movedim(axis, 0).reshape(grid.shape[axis], -1)
        assert bool((first == first[:, :1]).all()), "not a grid of rows and columns"
        kept.append(first[:, 0].tolist())
    return kept


def distinct(model):
    """Give every tensor values that are all different, and keep tied ones tied."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        values = torch.randperm(parameter.numel()) + 1.0
        parameter.data = (values / parameter.numel()).view_as(parameter)
    return model


def kinds(name, tensor):
    """Return, for each axis of a teacher's tensor, whether it is of hidden features, heads or units, or of none."""
    transposed = bool(re.search(r"\.(attn|mlp)\.c_", name))
    layer = re.match(LAYER, name)
    result = []
    for axis, size in enumerate(tensor.shape):
        is_output = tensor.dim() == 1 or axis == (1 if transposed else 0)
        if layer and re.search(TABLE, name):
            result.append("heads" if axis == 1 else None)
        elif layer and re.search(WRITERS if is_output else READERS, name):
            result.append("heads")
        elif layer and re.search(UNIT_WRITERS if is_output else UNIT_READERS, name):
            result.append("units")
        else:
            result.append("hidden" if size == HIDDEN else None)
    return result


@every_model
def test_the_same_features_are_kept_everywhere(name):
    teacher = distinct(make(name))
    student = init_student_from_teacher(teacher, [2, 0], hidden=HIDDEN // 2)
    theirs = teacher.state_dict()
    hidden, inner = set(), {}
    for key, tensor in student.state_dict().items():
        source = re.sub(r"\b(layers?|h|block)\.([01])\.", lambda m: f"{m[1]}.{2 - 2 * int(m[2])}.", key, count=1)
        if re.search(TABLE, key):
            source = key
        if key == "final_logits_bias":
            continue
        kept = subgrid(tensor, theirs[source])
        for places, kind, size in zip(kept, kinds(source, theirs[source]), theirs[source].shape):
            assert places == sorted(places)
            if kind is None:
                assert places == list(range(size))
            elif kind == "hidden":
                hidden.add(tuple(places))
            else:
                layer = re.match(LAYER, source)[1]
                attention = re.search(r"(encoder_attn|EncDecAttention|$)", source)[1]
                if "t5" in name and "SelfAttention" in source:
                    layer = layer.split(".block")[0]
                inner.setdefault((kind, layer, attention if kind == "heads" else ""), []).append((places, size))
    assert len(hidden) == 1
    assert len(next(iter(hidden))) == HIDDEN // 2
    for (kind, *_), found in inner.items():
        check_units(found) if kind == "units" else check_heads(found)
    assert {kind for kind, *_ in inner} == {"heads", "units"}


def check_units(found):
    assert len({tuple(places) for places, _ in found}) == 1
    assert {size for _, size in found} in ({UNITS}, {4 * HIDDEN})
    assert 2 * len(found[0][0]) == found[0][1]


def check_heads(found):
    """Check that whole heads are kept, and the same ones by all projections."""
    query_heads, groups = set(), set()
    for places, size in found:
        width = 1 if size == HEADS else HIDDEN // HEADS
        heads = [place // width for place in places[::width]]
        assert places == [head * width + offset for head in heads for offset in range(width)]
        for part in range(max(1, size // HIDDEN)):  # query, key and value may be one projection
            own = [head - part * HEADS for head in heads if head // HEADS == part]
            (groups if size == HIDDEN // 2 else query_heads).add(tuple(own))
    assert len(query_heads) == 1
    kept = next(iter(query_heads))
    assert len(kept) == HEADS // 2
    for group in groups:  # of keys and values, two query heads each
        assert kept == tuple(head for number in group for head in (2 * number, 2 * number + 1))


# Importance, recomputed with loops


def top(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def kept_of(student, teacher, key, source, axis):
    return subgrid(student.state_dict()[key], teacher.state_dict()[source])[axis]


def loud(model, seed=0):
    """Give features very different importance, and values that are all different."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        for axis in range(parameter.dim()):
            shape = [-1 if other == axis else 1 for other in range(parameter.dim())]
            parameter.data *= torch.rand(parameter.shape[axis]).view(shape) + 0.5
    return model


def test_importance_of_bert_by_its_weights():
    teacher = loud(make("bert-classifier"))
    student = init_student_from_teacher(teacher, [1, 3], hidden=12)
    state = {key: value.double() for key, value in teacher.state_dict().items()}
    embeddings = [state[f"bert.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
    norms = [state["bert.embeddings.LayerNorm.weight"]]
    for number in (1, 3):
        norms += [state[f"bert.encoder.layer.{number}.{part}output.LayerNorm.weight"] for part in ("attention.", "")]
    scores = [0.0] * HIDDEN
    for matrix in [*embeddings, *(norm[None] for norm in norms)]:
        squares = [sum(float(row[i]) ** 2 for row in matrix) for i in range(HIDDEN)]
        for i in range(HIDDEN):
            scores[i] += squares[i] / (sum(squares) / HIDDEN)
    word = "bert.embeddings.word_embeddings.weight"
    assert kept_of(student, teacher, word, word, 1) == top(scores, 12)

    layer = "bert.encoder.layer.3."
    scores = []
    for unit in range(UNITS):
        into, out = state[layer + "intermediate.dense.weight"][unit], state[layer + "output.dense.weight"][:, unit]
        scores.append(math.sqrt(sum(float(x) ** 2 for x in [*into, *out])))
    mine = "bert.encoder.layer.1.intermediate.dense.weight"
    assert kept_of(student, teacher, mine, layer + "intermediate.dense.weight", 0) == top(
        scores, round(UNITS * 12 / 32)
    )

    scores = []
    for head in range(HEADS):
        rows = slice(4 * head, 4 * head + 4)
        parts = [state[f"{layer}attention.self.{part}.weight"][rows] for part in ("query", "key", "value")]
        parts.append(state[layer + "attention.output.dense.weight"][:, rows])
        scores.append(sum(float(x) ** 2 for part in parts for x in part.flatten()))
    expected = [4 * head + offset for head in top(scores, 3) for offset in range(4)]
    mine = "bert.encoder.layer.1.attention.self.key.weight"
    assert kept_of(student, teacher, mine, layer + "attention.self.key.weight", 0) == expected


def test_importance_of_gpt2s_heads_in_one_projection():
    teacher = loud(make("gpt2"))
    student = init_student_from_teacher(teacher, [2], hidden=8)
    fused, out = (teacher.transformer.h[2].attn.get_submodule(name).weight.detach() for name in ("c_attn", "c_proj"))
    scores = []
    for head in range(HEADS):
        columns = [part * HIDDEN + 4 * head + offset for part in range(3) for offset in range(4)]
        total = sum(float(fused[row, column]) ** 2 for row in range(HIDDEN) for column in columns)
        scores.append(total + sum(float(x) ** 2 for x in out[4 * head : 4 * head + 4].flatten()))
    places = kept_of(student, teacher, "transformer.h.0.attn.c_attn.weight", "transformer.h.2.attn.c_attn.weight", 1)
    heads = top(scores, 2)
    assert places == [part * HIDDEN + 4 * head + offset for part in range(3) for head in heads for offset in range(4)]


def test_importance_of_llamas_groups():
    teacher = loud(make("llama"))
    student = init_student_from_teacher(teacher, heads=2)
    for number in range(4):
        attention = teacher.model.layers[number].self_attn.requires_grad_(False)
        scores = []
        for group in range(HEADS // 2):
            queries, keys = slice(8 * group, 8 * group + 8), slice(4 * group, 4 * group + 4)
            parts = [attention.q_proj.weight[queries], attention.o_proj.weight[:, queries]]
            parts += [attention.k_proj.weight[keys], attention.v_proj.weight[keys]]
            scores.append(sum(float(x) ** 2 for part in parts for x in part.flatten()))
        group = top(scores, 1)[0]
        key = f"model.layers.{number}.self_attn."
        queries = kept_of(student, teacher, key + "q_proj.weight", key + "q_proj.weight", 0)
        assert queries == list(range(8 * group, 8 * group + 8))
        values = kept_of(student, teacher, key + "v_proj.weight", key + "v_proj.weight", 0)
        assert values == list(range(4 * group, 4 * group + 4))


def test_equal_features_are_kept_in_their_order():
    teacher = make("bert-classifier")
    for parameter in teacher.parameters():
        parameter.data.fill_(1.0)
    for layer in teacher.bert.encoder.layer:
        layer.intermediate.dense.bias.data = torch.arange(UNITS) + 1.0
    student = init_student_from_teacher(teacher, hidden=16)
    assert student.bert.encoder.layer[0].intermediate.dense.bias.tolist() == [i + 1.0 for i in range(15)]


def test_importance_by_activations():
    teacher = loud(make("bert-classifier"))
    torch.manual_seed(1)
    batches = []
    for rows in (2, 3):
        mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (rows, 1))).long()
        batches.append({"input_ids": torch.randint(0, VOCABULARY, (rows, LENGTH)), "attention_mask": mask})
    student = init_student_from_teacher(teacher, [1, 3], hidden=12, dataloader=batches)

    seen, layer = {"heads": [], "units": []}, teacher.bert.encoder.layer[3]
    handles = [
        layer.intermediate.register_forward_hook(lambda _, __, output: seen["units"].append(output)),
        layer.attention.self.register_forward_hook(lambda _, __, output: seen["heads"].append(output[0])),
    ]
    hidden = [0.0] * HIDDEN
    places = []
    with torch.no_grad():
        for batch in batches:
            states = teacher(**batch, output_hidden_states=True).hidden_states
            places.append(batch["attention_mask"].bool())
            for number in (1, 3):
                for position in states[number + 1][places[-1]]:
                    hidden = [total + abs(float(x)) for total, x in zip(hidden, position)]
    for handle in handles:
        handle.remove()
    word = "bert.embeddings.word_embeddings.weight"
    assert kept_of(student, teacher, word, word, 1) == top(hidden, 12)

    sums = {
        kind: sum(states[mask].abs().double().sum(0) for states, mask in zip(seen[kind], places)).tolist()
        for kind in seen
    }
    mine, source = "bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.3.output.dense.weight"
    assert kept_of(student, teacher, mine, source, 1) == top(sums["units"], 11)
    heads = [sum(sums["heads"][4 * head : 4 * head + 4]) for head in range(HEADS)]
    mine, source = (f"bert.encoder.layer.{n}.attention.output.dense.weight" for n in (1, 3))
    expected = [4 * head + offset for head in top(heads, 3) for offset in range(4)]
    assert kept_of(student, teacher, mine, source, 1) == expected


@pytest.mark.parametrize(
    ("extra", "mask_of_decoder"),
    [("decoder_attention_mask", lambda kept: kept.long()), ("labels", lambda kept: torch.where(kept, 5, -100))],
)
def test_padding_of_a_decoder_does_not_count(extra, mask_of_decoder):
    teacher = loud(make("t5"))
    tokens, targets = (torch.randint(3, VOCABULARY, (ROWS, length)) for length in (LENGTH, 6))
    kept = torch.arange(6) < torch.tensor([[2], [6], [4]])
    batch = {"input_ids": tokens, "decoder_input_ids": targets, extra: mask_of_decoder(kept)}
    seen = []
    wo = teacher.decoder.block[1].layer[2].DenseReluDense.wo
    handle = wo.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        teacher(**batch)
    handle.remove()
    scores = [sum(abs(float(x)) for x in seen[0][kept][:, unit]) for unit in range(UNITS)]
    student = init_student_from_teacher(teacher, (None, [1]), intermediate=7, dataloader=[batch])
    mine, source = (f"decoder.block.{number}.layer.2.DenseReluDense.wo.weight" for number in (0, 1))
    assert kept_of(student, teacher, mine, source, 1) == top(scores, 7)


def test_data_in_another_form():
    teacher = loud(make("gpt2"))
    tokens = batch_for(teacher)["input_ids"]
    one, other = (
        init_student_from_teacher(teacher, hidden=16, dataloader=[batch]) for batch in ({"input_ids": tokens}, [tokens])
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


# Features that do nothing can be left out without a trace


def silence(model, dead_units, dead_heads=()):
    """Set to zero what some units and heads of every layer write."""
    width = HIDDEN // HEADS
    places = [head * width + offset for head in dead_heads for offset in range(width)]
    for key, parameter in model.named_parameters():
        if not re.match(LAYER, key):
            continue
        transposed = "mlp.c_" in key or "attn.c_" in key
        rows = parameter.data.T if transposed and parameter.dim() == 2 else parameter.data
        if re.search(UNIT_WRITERS, key):
            rows[dead_units] = 0
        elif re.search(UNIT_READERS, key):
            rows[:, dead_units] = 0
        elif places and re.search(READERS, key):
            rows[:, places] = 0
        elif places and re.search(WRITERS, key) and parameter.shape[0] == HIDDEN:
            rows[places] = 0
    return model


@every_model
def test_dead_units_leave_no_trace(name):
    teacher = make(name)
    units = 4 * HIDDEN if name == "gpt2-classifier" else UNITS
    dead = [0, 3, 4, units - 1]
    silence(teacher, dead)
    student = init_student_from_teacher(teacher, intermediate=units - len(dead))
    theirs, mine = outputs_of(teacher), outputs_of(student)
    for key in theirs:
        torch.testing.assert_close(mine[key], theirs[key])


@pytest.mark.parametrize("name", ["llama-classifier", "t5", "t5-encoder", "mt5"])
def test_dead_heads_leave_no_trace(name):
    teacher = make(name)
    silence(teacher, [], [0, 5, 6])
    student = init_student_from_teacher(teacher, heads=HEADS - 3)
    theirs, mine = outputs_of(teacher), outputs_of(student)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    for key in theirs.keys() & mine.keys():
        torch.testing.assert_close(mine[key], theirs[key])


def test_a_dead_group_of_grouped_queries_leaves_no_trace():
    teacher = make("llama")
    silence(teacher, [], [2, 3])
    for layer in teacher.model.layers:
        for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight.data[4:8] = 0
    student = init_student_from_teacher(teacher, heads=HEADS - 2)
    assert student.config.num_key_value_heads == HEADS // 2 - 1
    torch.testing.assert_close(outputs_of(student)["logits"], outputs_of(teacher)["logits"])


def test_dead_hidden_features_change_only_the_mean_of_a_norm():
    """Of a root mean square over fewer features, the rest being zero, the root of their ratio is left: nothing else."""
    teacher = make("llama", rms_norm_eps=1e-12)
    dead, alive = [1, 2, 9, 30], HIDDEN - 4
    for key, parameter in teacher.named_parameters():
        transposed = (
            parameter.data if parameter.dim() == 1 or not re.search(r"(o_proj|down_proj)", key) else parameter.T
        )
        transposed.data[..., dead] = 0
    student = init_student_from_teacher(teacher, hidden=alive, heads=HEADS, intermediate=UNITS)
    factor = math.sqrt(HIDDEN / alive)
    assert not torch.allclose(outputs_of(student)["logits"], outputs_of(teacher)["logits"])
    corrected = copy.deepcopy(student)
    for key, parameter in corrected.named_parameters():
        if "norm" in key:
            parameter.data *= factor
    torch.testing.assert_close(outputs_of(corrected)["logits"], outputs_of(teacher)["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("bert-lm", {"hidden": 16}, {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 15}),
        ("bert-lm", {"hidden": 16, "intermediate": 9}, {"hidden_size": 16, "intermediate_size": 9}),
        ("bert-lm", {"intermediate": 9}, {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 9}),
        ("electra", {"hidden": 16}, {"hidden_size": 16, "embedding_size": 10}),
        ("electra-base", {"hidden": 16}, {"hidden_size": 16, "embedding_size": 16}),
        ("llama", {"hidden": 16}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
        ("llama", {"hidden": 18, "heads": 6}, {"hidden_size": 18, "num_attention_heads": 6, "head_dim": 4}),
        ("qwen2", {"hidden": 18, "heads": 6}, {"hidden_size": 18, "num_key_value_heads": 3, "head_dim": 4}),
        ("t5", {"hidden": 20}, {"d_model": 20, "num_heads": 5, "d_kv": 4, "d_ff": 19}),
        ("bart", {"hidden": 16}, {"d_model": 16, "decoder_attention_heads": 4, "encoder_ffn_dim": 15}),
        ("vit-pooled", {"hidden": 16}, {"hidden_size": 16, "pooler_output_size": 16}),
        ("distilbert", {"hidden": 8, "layers": 1}, {"dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 1}),
    ],
)
def test_widths_in_the_config(name, arguments, expected):
    student = init_student_from_teacher(make(name), **arguments)
    assert {key: getattr(student.config, key) for key in expected} == expected
    assert outputs_of(student)
