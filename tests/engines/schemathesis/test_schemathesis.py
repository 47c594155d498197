"""schemathesis against a `poise serve`: whatever it makes of the document, no answer is one that is not said."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engines_kit import CONVERSATIONS, Reference, Server, remember
from poise.serve.client import Client

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.timeout(400)
def test_no_request_gets_what_the_document_does_not_say(server: Server, reference: Reference) -> None:
    command = [str(Path(sys.executable).with_name("st")), "run", f"{server.url}/openapi.json", "--checks", CHECKS]
    command += ["--max-examples", "60", "--seed", "1", "--mode", "all", "--phases", "examples,coverage,fuzzing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=os.environ.copy())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = int(re.findall(r"(\d+) generated", done.stdout)[-1])
    assert cases > 300, done.stdout[-3000:]  # of seven operations
    rewards = [Client(server.url).score(prompt, [answer])[0]["reward"] for prompt, answer in CONVERSATIONS]
    difference = reference.difference_to(rewards)  # the server is as it was
    remember("schemathesis", [], cases=cases, checks=CHECKS.split(","), largest_difference=difference)
