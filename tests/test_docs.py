"""README and docs: links lead somewhere, Python recipes run, commands name files and keys that exist."""

import re
import runpy
from pathlib import Path

import pytest

from leakfree.cli import main
from leakfree.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "projects").rglob("*.md"))]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize(
    "recipe", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=lambda code: code.splitlines()[1]
)
def test_python_recipes_run(recipe, tmp_path):
    (tmp_path / "recipe.py").write_text(recipe)
    runpy.run_path(str(tmp_path / "recipe.py"))


COMMANDS = [
    line
    for page in PAGES
    for line in re.findall(r"^leakfree (?:train|check) (.*)$", page.read_text().replace("\\\n", " "), re.MULTILINE)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_name_configs_and_keys_that_exist(line):
    words = line.partition("#")[0].split()
    overrides = [word for word in words if "=" in word]
    load_config(str(ROOT / words[words.index("--config-file") + 1]), overrides)


LAUNCHES = [
    line
    for page in PAGES
    for line in re.findall(r"^leakfree launch (.*)$", page.read_text().replace("\\\n", " "), re.MULTILINE)
]


@pytest.mark.parametrize("line", LAUNCHES)
def test_launches_are_lines_that_the_command_takes(line, capsys, monkeypatch, tmp_path):
    """As a dry run without Slurm: all that is checked but the data and weights, which are not here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("_check_data", "_check_weights"):
        monkeypatch.setattr(f"leakfree.launch.validate.{name}", lambda config: None)
    words = line.partition(" #")[0].split()
    assert main(["launch", *words, *(["--dry-run"] if "--dry-run" not in words else [])]) == 0
    assert "not submitted" in (out := capsys.readouterr().out) or "not started" in out


def test_the_two_commands_are_shown_and_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in ("demo", "test"):
        assert f"make {name}" in README
        assert re.search(rf"^{name}:", makefile, re.MULTILINE)
