import re
from html.parser import HTMLParser

import pytest

from tests.report.models import Linear, bert, bert_batches, linear_batches
from textbrewer.report import Measured, report

EMPTY = {"meta", "circle", "line", "br", "img"}
NAMES = ["a <b> & 'c' \"d\" <script>alert(1)</script>", 'url(http://x.org) src="http://x.org"', "sparse | model"]


class Reader(HTMLParser):
    """Notes texts, attributes and tags, and whether all tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.texts, self.attributes, self.tags, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    path.write_bytes(b"x" * 1000)
    dense, sparse = bert(), bert()
    for model in (dense, sparse):
        model.bert.embeddings.word_embeddings.weight.data[0] = 1.0  # padding's row, which begins as zeros
    sparse.bert.encoder.layer[1].intermediate.dense.weight.data[:24] = 0.0  # half of the units
    sparse.bert.pooler.dense.weight.data[:8] = 0.0
    session = Measured(lambda **batch: dense(**batch), path)
    models = dict(zip(NAMES, [dense, session, sparse], strict=True))
    scores = {id(dense): 0.91, id(session): 0.9, id(sparse): 0.87}
    return report(models, bert_batches((4, 4)), score=lambda model: scores[id(model)], repeats=3, warmup=1)


@pytest.fixture(scope="module")
def page(found):
    reader = Reader()
    reader.feed(found.to_html())
    reader.close()
    assert not reader.open
    return reader


def test_nothing_leaves_the_page(found, page):
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video", "a"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert name not in ("src", "href", "xlink:href", "srcset", "action", "poster", "background", "data")
        assert not name.startswith("on")
        assert name != "style" or "url(" not in value, (tag, value)
    style = re.search(r"<style>(.*?)</style>", found.to_html(), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style
    policy = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy
    assert policy[0].startswith("default-src 'none'")


def test_all_models_are_named_and_markup_in_names_is_text(page):
    text = "".join(page.texts)
    for name in NAMES:
        assert text.count(name) >= 3  # in the table, the pictures, the bars


def test_values_of_the_table_are_there(found, page):
    text = "|".join(page.texts)
    for model in found.models:
        if model.parameters:
            assert f"{model.parameters:,}" in text
    assert f"{found.smaller(NAMES[1]):.2f}" in text
    assert "0.9100" in text
    assert "0.8700" in text


def test_sparsity_is_drawn_for_sparse_models_only(page):
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("td", "title")]
    assert "bert.encoder.layer.1.intermediate.dense.weight: 768 of 1,536 are zero" in titles
    maps = [value for tag, name, value in page.attributes if (tag, name, value) == ("table", "class", "map")]
    assert len(maps) == 1
    text = "".join(page.texts)
    assert "bert.pooler.dense.weight 25%" in text
    assert "No matrix with 5% zeros or more: a <b>" in text


def test_pictures_have_a_point_for_each_model(page):
    dots = [value for tag, name, value in page.attributes if (tag, name, value) == ("circle", "class", "dot")]
    rings = [value for tag, name, value in page.attributes if (tag, name, value) == ("circle", "class", "ring")]
    assert (len(dots), len(rings)) == (2 * 3, 2)


def test_it_adapts_to_the_reader(found):
    content = found.to_html()
    assert "prefers-color-scheme: dark" in content
    assert 'name="viewport" content="width=device-width' in content


def test_one_model_without_a_score_makes_a_page():
    reader = Reader()
    reader.feed(report([Linear()], linear_batches(), repeats=2, warmup=0).to_html())
    assert not reader.open
    assert "Linear" in "".join(reader.texts)


# ---- tables


def cells(line):
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_tables_can_be_read(found):
    first, components = [
        [cells(line) for line in block.splitlines()]
        for block in found.to_markdown().split("\n\n")
        if block.startswith("|")
    ]
    for table in (first, components):
        assert len({len(row) for row in table}) == 1
        assert [row[0] for row in table[2:]] == NAMES
        assert all(re.fullmatch("-+:?", cell) for cell in table[1])
    header, _, *rows = first
    sizes = [float(row[header.index("on disk, kB")]) for row in rows]
    assert sizes == pytest.approx([model.file_bytes / 1000 for model in found.models], rel=0.006)
    zeros = [row[header.index("zero, %")] for row in rows]
    expected = [f"{100 * model.zeros / model.parameters:.1f}" for model in (found.models[0], found.models[2])]
    assert zeros == [expected[0], "\N{EN DASH}", expected[1]]
    faster = [float(row[header.index("x faster")]) for row in rows]
    assert faster == pytest.approx([found.faster(name) for name in NAMES], abs=0.006)
    assert float(rows[0][header.index("score")]) == 0.91


def test_text_tables_are_aligned(found):
    lines = found.to_text().split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(NAMES)
    assert len({len(line) for line in lines}) == 1
    assert str(found) == found.to_text()
    assert "threads" in found.to_text() or "1 thread." in found.to_text()
