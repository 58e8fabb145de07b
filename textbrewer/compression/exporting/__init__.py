"""Models exported: to ONNX Runtime, OpenVINO and ``torch.export``, checked against the model, and run again."""

from textbrewer.compression.exporting.exporter import export
from textbrewer.compression.exporting.manifest import InputSpec, Manifest
from textbrewer.compression.exporting.result import ExportReport
from textbrewer.compression.exporting.runner import Outputs, Runner, load_exported

__all__ = ["ExportReport", "InputSpec", "Manifest", "Outputs", "Runner", "export", "load_exported"]
