"""Every export of one artifact, loaded in another engine: its next-token distributions and the artifact's.

    python benchmarks/exports.py ARTIFACT [--formats gguf,onnx] [--tokens 256] [--keep DIR]

What is compared with is the plain decoder in float32 on the artifact's own values, so a row shows what the
file and the other engine's rounding cost, not ours. HASTEN_PEER_PYTHON names an interpreter that has
llama-cpp-python and optimum-intel, HASTEN_GPTQ_PYTHON one that has gptqmodel; a format whose engine is
missing is recorded as such.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bar import RESULTS, say
from hasten import _native
from hasten.core import SCHEMA_VERSION
from hasten.export import FORMATS, export
from hasten.models.artifact import load_artifact
from hasten.quality.divergence import divergence
from hasten.quality.text import default_text

SCRIPT = Path(__file__).parents[1] / "tests" / "export" / "peer_logits.py"
FIRST = 5000  # characters of the text that are passed over


@dataclass(frozen=True)
class Peer:
    """Who reads a format: `engine` of peer_logits.py, in the interpreter that a variable names, or ours."""

    format: str
    engine: str
    variable: str | None
    package: str
    distribution: str

    def python(self) -> str | None:
        """The interpreter, if it has the package."""
        python = os.environ.get(self.variable, "") if self.variable else sys.executable
        if not python:
            return None
        found = subprocess.run([python, "-c", f"import {self.package}"], capture_output=True, check=False)
        return python if found.returncode == 0 else None


PEERS = (
    Peer("gguf", "llama", "HASTEN_PEER_PYTHON", "llama_cpp", "llama-cpp-python"),
    Peer("compressed-tensors", "transformers", None, "compressed_tensors", "compressed-tensors"),
    Peer("gptq", "gptqmodel", "HASTEN_GPTQ_PYTHON", "gptqmodel", "gptqmodel"),
    Peer("openvino", "openvino", "HASTEN_PEER_PYTHON", "optimum.intel", "optimum-intel"),
    Peer("onnx", "onnx", None, "onnxruntime", "onnxruntime"),
)


def plain_logits(artifact: Path, ids: list[int]) -> np.ndarray:
    """The plain decoder's, float32 [T, V], matrices as the artifact means them."""
    from hasten.runtime.reference import ReferenceDecoder

    packed = load_artifact(artifact).packed
    values = {
        name: _native.unpack(x.data, x.rows, x.cols, x.layout.bits, x.layout.group, x.layout.symmetric)
        for name, x in packed.linears.items()
    }
    return ReferenceDecoder(packed.config, {**values, **packed.vectors}).logits(ids)


def measured(peer: Peer, artifact: Path, ids: list[int], ours: Path, folder: Path) -> dict[str, Any]:
    """One row: the export's size and time, and KL of the peer against the plain decoder."""
    python = peer.python()
    if python is None:
        return {"format": peer.format, "engine": peer.distribution, "missing": True}
    place = folder / (
        artifact.stem + FORMATS[peer.format].suffix + f"-{peer.format}" * (peer.format != "gguf")
    )
    start = time.perf_counter()
    written = export(artifact, peer.format, place, force=True)
    took = time.perf_counter() - start
    (folder / "ids.json").write_text(json.dumps({"ids": ids[:-1]}))
    places = [str(place), str(folder / "ids.json"), str(folder / "theirs.npy")]
    done = subprocess.run(
        [python, str(SCRIPT), peer.engine, *places], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return {"format": peer.format, "engine": peer.distribution, "failed": done.stderr[-800:]}
    reference = np.load(ours)
    theirs = np.ascontiguousarray(np.load(folder / "theirs.npy")[:, : reference.shape[1]])
    found = divergence(reference, theirs, np.array(ids[1:], np.int32))
    rounded = [one.relative_error for one in written.rounding if one.relative_error > 0]
    return {
        "format": peer.format,
        "engine": peer.distribution,
        "version": _version(python, peer.distribution),
        "megabytes": written.bytes / 1e6,
        "export_s": took,
        "rounded_tensors": len(rounded),
        "largest_relative_error": max(rounded, default=0.0),
        "kl_mean": float(found.kl.mean()),
        "kl_p99": float(np.quantile(found.kl, 0.99)),
        "top1_agreement": float(found.agree.mean()),
        "largest_logit_difference": float(np.abs(reference - theirs).max()),
        "tokens": found.tokens,
    }


def _version(python: str, distribution: str) -> str:
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    if "missing" in row or "failed" in row:
        return f"{row['format']:<19} {row['engine']} " + (
            "is not installed" if "missing" in row else "failed"
        )
    return (
        f"{row['format']:<19} {row['engine']:<19} {row['version']:<12} {row['megabytes']:7.1f} MB  "
        f"KL {row['kl_mean']:.2e}  p99 {row['kl_p99']:.2e}  top-1 {row['top1_agreement']:.1%}  "
        f"logits within {row['largest_logit_difference']:.2g}"
    )


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="folder for the exports; default: a temporary one")
    arguments = parser.parse_args()
    loaded = load_artifact(arguments.artifact)
    text = default_text()
    ids = loaded.tokenizer.encode(text.evaluation[FIRST : FIRST + 12 * arguments.tokens], add_special=False)
    ids = ids[: arguments.tokens + 1]
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": loaded.name,
        "recipe": loaded.packed.recipe.name,
        "bits_per_weight": loaded.packed.bits_per_weight,
        "text_sha256": text.sha256,
        "rows": [],
    }
    del loaded
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        say("the plain decoder")
        np.save(Path(temporary) / "ours.npy", plain_logits(arguments.artifact, ids[:-1]))
        for peer in PEERS:
            if peer.format in arguments.formats.split(","):
                say(peer.format)
                row = measured(peer, arguments.artifact, ids, Path(temporary) / "ours.npy", folder)
                record["rows"].append(row)
                print(line(row), flush=True)
    (RESULTS / "exports.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
