"""Reports on models: what can be seen of them before and after a distillation or compression.

:func:`report` measures models beside each other, to choose one by looking:

>>> from textbrewer.report import Measured, report
>>> found = report(
...     {"teacher": teacher, "student": student, "pruned": small, "int8": Measured(session_call, file="int8.onnx")},
...     dataloader,  # batches as the models take them
...     score=lambda model: accuracy(model, dev_rows),
...     threads=2,
... )
>>> print(found)  # the first model is the baseline: the others are so many times smaller and faster
>>> found.save_html("report.html")  # one page with tables and pictures
>>> found.save_json("report.json")  # Report.load("report.json") reads it
>>> found.plot("report.png")
>>> found["student"].file_bytes, found.faster("student")

:func:`layer_similarity` shows how alike the layers of a teacher and a student are.
"""

from textbrewer.report.entries import Measured
from textbrewer.report.latency import Timing
from textbrewer.report.layer_similarity import LayerSimilarity, layer_similarity, plot_layer_similarity
from textbrewer.report.measure import report
from textbrewer.report.result import ModelReport, Report
from textbrewer.report.weights import COMPONENTS, Zeros, component_of, parameters_by_component, zeros_by_matrix

__all__ = [
    "COMPONENTS",
    "LayerSimilarity",
    "Measured",
    "ModelReport",
    "Report",
    "Timing",
    "Zeros",
    "component_of",
    "layer_similarity",
    "parameters_by_component",
    "plot_layer_similarity",
    "report",
    "zeros_by_matrix",
]
