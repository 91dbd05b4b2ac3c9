"""The package as it is installed: what importing it loads, and what the wheel carries."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "peft", "transformers", "trl", "datasets", "numpy", "huggingface_hub", "matplotlib", "typer"]
HEAVY += ["peft_onelayer.tasks", "peft_onelayer.rollouts.evaluation"]
LIGHT = {  # in this order in one process: what each loads in addition, of HEAVY
    "import peft_onelayer": [],
    "assert {n for n in sys.modules if n.startswith('peft_onelayer.')} == {'peft_onelayer.registration'}": [],
    "peft_onelayer.LayerRanking": [],
    "import peft_onelayer.tasks.arithmetic, peft_onelayer.tasks.sort": ["peft_onelayer.tasks"],
    "import peft_onelayer.rl; peft_onelayer.rl.gigpo_advantages": [],
}
IMPORTS = {  # which take ten seconds
    **LIGHT,
    "peft_onelayer.rl.EMATeacherMixin": ["torch", "peft", "transformers", "numpy", "huggingface_hub"],
    "import peft_onelayer.rollouts.evaluation": ["peft_onelayer.rollouts.evaluation"],
    "import peft; assert peft.PEFT_TYPE_TO_TUNER_MAPPING['SINGLE_LAYER'].__name__ == 'SingleLayerModel'": [],
    "peft_onelayer.probe_layers": ["datasets"],
}


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports", [LIGHT, pytest.param(IMPORTS, marks=pytest.mark.more)], ids=["light", "those that load torch too"]
)
def test_an_import_registers_the_method_and_loads_no_more_than_it_needs(imports):
    code = f"""
import json, sys
found, before = {{}}, set()
for statement in {list(imports)}:
    exec(statement)
    loaded = [name for name in {HEAVY} if name in sys.modules and name not in before]
    found[statement] = loaded
    before.update(loaded)
print(json.dumps(found))
"""
    assert json.loads(python(code)) == imports


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building writes beside the sources
    for name in _files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def _files() -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
    return [name for name in found if (ROOT / name).is_file()]


def test_a_wheel_carries_every_file_of_the_package_and_of_the_commands(wheel):
    folders = {"peft_onelayer": "peft_onelayer", "cli": "onelayer_cli", "model_cards": "peft_onelayer/model_cards"}
    expected = {
        f"{folders[top]}/{rest}" for top, _, rest in (name.partition("/") for name in _files()) if top in folders
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected
    assert wheel.stat().st_size < 4_000_000


@pytest.mark.more
def test_an_installed_wheel_works(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = """
import onelayer_cli.main, peft_onelayer
from importlib.resources import files
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(str(files("peft_onelayer") / "demo_model"))
AutoTokenizer.from_pretrained(str(files("peft_onelayer") / "demo_model"))
for name in peft_onelayer.__all__:
    getattr(peft_onelayer, name)
print(peft_onelayer.__file__, onelayer_cli.__file__, model.num_parameters(), peft_onelayer.__version__)
"""
    found = python(code, PYTHONPATH=str(site)).split()
    assert found[:2] == [f"{site}/peft_onelayer/__init__.py", f"{site}/onelayer_cli/__init__.py"]
    assert found[2:] == ["519168", version("peft-onelayer")]
