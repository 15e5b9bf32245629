"""`--to openvino`: a folder with an IR that openvino, optimum-intel and OpenVINO GenAI load.

The graph is written here, not traced: the artifact's integers, scales and minimums go into it as they are.
Needs the package openvino; with openvino-tokenizers and transformers too, GenAI's tokenizer comes along.

Source: OpenVINO's opset 13 and the inputs, outputs and variables of optimum-intel's stateful text generation.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from hasten.cache import new_folder
from hasten.errors import DiskError
from hasten.export import graph as graphs
from hasten.export.exporters import MARKER, Exported, Progress, write_companions
from hasten.export.graph import GraphPlan
from hasten.export.huggingface import carrier
from hasten.models.artifact import Artifact

NAME = "openvino"
MODEL = "openvino_model"

_NO_TOKENIZER = (
    "no tokenizer of GenAI's own (openvino and optimum-intel need none): pip install openvino-tokenizers "
    "transformers, export again"
)

_CONVERT = """
import sys, openvino
from openvino_tokenizers import convert_tokenizer
from transformers import AutoTokenizer
made = convert_tokenizer(AutoTokenizer.from_pretrained(sys.argv[1]), with_detokenizer=True)
for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), made):
    openvino.serialize(model, f"{sys.argv[1]}/{name}.xml", f"{sys.argv[1]}/{name}.bin")
"""

_SLIDES = (
    "attention is written out, because OpenVINO GenAI's paged attention leaves sliding windows out without a "
    "word: so it refuses the model, and LLMPipeline takes its other way by itself"
)


def plan(artifact: Artifact) -> GraphPlan:
    """Decide what the folder will hold; reads no weights.

    Raises:
        UsageError: the format cannot carry something of the model.
        MachineError: openvino is not installed.
    """
    linears, config = artifact.packed.linears, artifact.packed.config
    made = graphs.plan(artifact, NAME, "openvino", lambda name: carrier(linears[name].layout))
    return replace(made, notes=(*made.notes, _SLIDES)) if graphs.slides(config) else made


def write(made: GraphPlan, path: Path, progress: Progress) -> Exported:
    """Write the folder: all of it or nothing.

    Raises:
        DiskError: full, read-only or forbidden disk, or a folder that is no model stands there.
    """
    artifact = made.artifact
    with new_folder(path, marker=MARKER) as fresh:
        write_companions(fresh, artifact, made.values)
        _write_model(made, fresh, progress)
        lacks = _write_tokenizer(fresh)
    return graphs.exported(made, NAME, path, *([lacks] if lacks else []))


def _write_model(made: GraphPlan, folder: Path, progress: Progress) -> None:
    import openvino

    from hasten.export.openvino_graph import OpenVinoGraph

    packed = made.artifact.packed
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, len(packed.linears))

    graph = OpenVinoGraph(packed, count)
    graphs.build(graph, packed.config, packed.vectors)
    try:
        openvino.serialize(graph.model(made.artifact.name), folder / f"{MODEL}.xml", folder / f"{MODEL}.bin")
        openvino.Core().read_model(folder / f"{MODEL}.xml")  # it does not say itself that the disk is full
    except (OSError, RuntimeError) as wrong:
        raise DiskError(
            f"{folder.parent}: the OpenVINO model cannot be written: {' '.join(str(wrong).split())[:300]}",
            hint="free some space or choose another --out",
        ) from None


def _write_tokenizer(folder: Path) -> str | None:
    """Write GenAI's tokenizer and detokenizer; where that cannot be, say why.

    In a process of its own: the converter imports transformers and torch.
    """
    if find_spec("openvino_tokenizers") is None or find_spec("transformers") is None:
        return _NO_TOKENIZER
    command = [sys.executable, "-c", _CONVERT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = [
        f"openvino_{kind}.{suffix}" for kind in ("tokenizer", "detokenizer") for suffix in ("xml", "bin")
    ]
    if done.returncode == 0 and all((folder / name).is_file() for name in names):
        return None
    for name in names:
        (folder / name).unlink(missing_ok=True)
    said = " ".join(done.stderr.split())[-200:]
    return f"no tokenizer for OpenVINO GenAI: openvino-tokenizers cannot carry it: {said}"
