"""The pages: what is generated is up to date, links lead somewhere, commands and imports exist, and the script of a run
does what the command beside it does."""

import ast
import importlib
import json
import re
import shlex
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import typer

from onelayer_cli.main import app, main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
CODE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
GROUP = typer.main.get_command(app)
OTHERS = {"--enable-lora", "--security-opt", "--help", "--version", "--quick", "--part"}  # of vLLM, Docker, the study
DEMO_MODEL = str(files("peft_onelayer") / "demo_model")


@pytest.fixture(scope="module")
def generate():
    sys.path.insert(0, str(ROOT / "docs"))
    yield importlib.import_module("generate")
    sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize("name", ["cli.md", "python.md", "formats.md", "algorithms.md"])
def test_what_is_generated_is_up_to_date(generate, name):
    page = ROOT / "docs" / name
    assert page.read_text(encoding="utf-8") == generate.pages()[page], "run make docs"


def test_every_package_with_public_names_is_listed(generate):
    packages = [path for path in (ROOT / "peft_onelayer").rglob("__init__.py") if "__all__" in path.read_text("utf-8")]
    assert {".".join(path.parent.relative_to(ROOT).parts) for path in packages} == set(generate.MODULES)


def test_contributing_says_what_each_folder_holds():
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "peft_onelayer").glob("*/__init__.py")}
    named = re.findall(r"^\| `(peft_onelayer/\w+)/` \|", TEXTS["CONTRIBUTING.md"], re.MULTILINE)
    assert set(named) == rooms


def test_a_field_that_the_docstring_does_not_explain_is_an_error(generate):
    from peft_onelayer.runs.demo import DemoRecord

    with pytest.raises(ValueError, match="the docstring of DemoRecord explains"):
        generate.field_table(DemoRecord)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", TEXTS[name])):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{name}: {target}"


def commands(text: str) -> list[list[str]]:
    """The words of every onelayer command in the code blocks."""
    blocks = [body.replace("\\\n", " ") for _, language, body in CODE.findall(text) if language in ("", "bash")]
    indented = re.findall(r"^    (onelayer .*)$", text, re.MULTILINE)
    found = []
    for line in [*"\n".join(blocks).splitlines(), *indented]:
        if match := re.search(r"(?:^ *|&& |-m )(?:onelayer|onelayer_cli\.main) (\w+ [^\"]+)", line):
            words = shlex.split(match[1], comments=True)
            found += [words] if len(words) > 1 and words[1] != "[OPTIONS]" else []
    return found


def test_the_commands_that_are_found():
    assert ["probe", "Qwen/Qwen3-1.7B-Base", "--task", "gsm8k", "--out", "ranking.json"] in commands(TEXTS["README.md"])
    assert sum(len(commands(text)) for text in TEXTS.values()) >= 15


@pytest.mark.parametrize("name", TEXTS)
def test_commands_parse(name):
    for name_of_command, *arguments in commands(TEXTS[name]):
        command = GROUP.commands[name_of_command]
        command.make_context(name_of_command, [word for word in arguments if word != "..."])


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith("examples/")])
def test_options_exist(name):
    options = {option for command in GROUP.commands.values() for p in command.params for option in p.opts}
    options |= {option for command in GROUP.commands.values() for p in command.params for option in p.secondary_opts}
    for span in re.findall(r"`([^`\n]+)`", CODE.sub("", TEXTS[name])):
        if not span.startswith(("torchrun", "accelerate", "pip", "python", ".venv")):
            used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span))
            assert used <= options | OTHERS, f"{name}: `{span}`"


@pytest.mark.parametrize("name", TEXTS)
def test_what_python_code_imports_from_the_package_is_there(name):
    for indent, language, body in CODE.findall(TEXTS[name]):
        if language != "python" or name == "docs/python.md":
            continue
        code = "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("peft_onelayer"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{name}: {ast.unparse(node)}"


def without_times(text: str) -> dict:
    """run.json without the command line and without all seconds."""

    def untimed(value: dict) -> dict:
        return {k: v for k, v in value.items() if k != "seconds"}

    run = json.loads(text, object_hook=untimed)
    del run["command"]
    return {**run, "why": re.sub(r"\d+ s:", "s:", run["why"])}


@pytest.mark.more
def test_the_script_does_what_the_command_does(tmp_path, monkeypatch):
    page = TEXTS["docs/runs.md"]
    (script,) = [body for _, _, body in CODE.findall(page) if 'layer="auto"' in body]
    (command,) = [words for words in commands(page) if "auto" in words]
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    (tmp_path / "run").rename("of-the-script")
    arguments = [DEMO_MODEL if word == "MODEL" else word for word in command]
    monkeypatch.setattr(sys, "argv", ["onelayer", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    mine, theirs = ((tmp_path / folder / "run.json").read_text(encoding="utf-8") for folder in ("of-the-script", "run"))
    assert json.loads(mine)["command"] is None and json.loads(theirs)["command"].startswith("onelayer train")
    assert without_times(mine) == without_times(theirs)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "of-the-script" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()
