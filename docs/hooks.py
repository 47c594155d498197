"""What `mkdocs build` does beyond its plugins: the page of commands, and links that lead out of the documentation.

Links to sources and results work in a checkout. In the built pages, which are read without one, they become plain text.
"""

import contextlib
import importlib
import io
import os
import re
import textwrap
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds reference/commands.md: every command with what its `--help` prints."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def commands_page() -> str:
    """Markdown of all commands."""
    cli = importlib.import_module("poise.cli.main")
    parts = ["# Commands", "", "What `poise COMMAND --help` prints.", ""]
    for name, (_, summary) in cli.COMMANDS.items():
        parts += [
            f"## poise {name}",
            "",
            f"{summary[0].upper()}{summary[1:]}.",
            "",
            "```text",
            help_text(cli, name),
            "```",
            "",
        ]
    return "\n".join(parts)


def help_text(cli: Any, command: str) -> str:
    """What a command's `--help` prints, in plain text of 74 columns, which is what a page shows without scrolling."""
    os.environ |= {"COLUMNS": "74", "NO_COLOR": "1", "TERM": "dumb"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).strip().splitlines()
    return "\n".join(line if line[:1] in " │|-+" else textwrap.fill(line, 74) for line in lines)


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links to files outside the documentation as their text alone."""

    def plain(match: re.Match[str]) -> str:
        target = match["target"].split("#")[0]
        if re.match(r"[a-z]+:", target) or not target:
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(page.file.src_uri), target))
        if path.startswith(".."):
            text = match["text"]
            return text if text.startswith(("`", "!")) else f"`{text}`"
        return match[0]

    return LINK.sub(plain, markdown)
