"""schemathesis makes requests out of the OpenAPI document and checks every answer against it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import client_server
import pytest
from client_server import Server

EXAMPLES = os.environ.get("HASTEN_SCHEMATHESIS_EXAMPLES", "6")
"""Requests an operation; set it to 500 for a long run by hand."""

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)

CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "503", "504"]
"""
"""503 and 504 are what a deadline that cannot be met is answered with; any other 5xx is a fault."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = client_server.tiny_folder(tmp_path_factory.mktemp("schemathesis"))
    with client_server.running(folder, "--max-output-tokens", "8") as running:
        yield running


@pytest.mark.slow
def test_answers_are_as_the_document_says(server: Server, tmp_path: Path) -> None:
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    options = ["--max-examples", EXAMPLES, "--checks", ",".join(CHECKS), "--seed", "1", "--phases", "fuzzing"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "--config-file",
            str(config),
            "run",
            f"{server.url}/openapi.json",
            *options,
            "--no-color",
        ],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert server.settled()["running"] == 0
