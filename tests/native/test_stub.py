"""_native.pyi names what the compiled module has, argument by argument."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from hasten import _native

STUB = Path(__file__).parents[2] / "src" / "hasten" / "_native.pyi"


def arguments(function: Any) -> list[str]:
    """Argument names of a bound function, from the signature nanobind keeps."""
    signature = function.__nb_signature__[0][0]
    return re.findall(r"(?:\(|, )(?:(self)|(\w+):)", signature.replace("numpy.ndarray[dtype", "["))


def stubbed(body: list[ast.stmt]) -> dict[str, list[str]]:
    return {f.name: [a.arg for a in f.args.args] for f in body if isinstance(f, ast.FunctionDef)}


def test_the_stub_is_in_step() -> None:
    tree = ast.parse(STUB.read_text())
    decoder = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Decoder")
    names = set(stubbed(tree.body)) | {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    names |= {
        n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    assert names == {n for n in dir(_native) if not n.startswith("_")}
    assert set(stubbed(decoder.body)) - {"__init__"} == {
        n for n in dir(_native.Decoder) if not n.startswith("_")
    }
    for scope, functions in ((_native, stubbed(tree.body)), (_native.Decoder, stubbed(decoder.body))):
        for name, expected in functions.items():
            found = getattr(scope, name)
            if hasattr(found, "__nb_signature__"):
                assert ["".join(pair) for pair in arguments(found)] == expected, name
