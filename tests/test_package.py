"""The package as it is installed: what importing it loads, and what the wheel carries."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


def test_importing_it_registers_the_method_and_loads_none_of_the_large_libraries():
    heavy = "{'torch', 'peft', 'transformers', 'trl', 'datasets', 'numpy', 'huggingface_hub', 'matplotlib', 'typer'}"
    assert python(f"import sys, peft_onelayer; print(sorted({heavy} & set(sys.modules)))") == "[]"
    ours = python(
        "import sys, peft_onelayer; print(sorted(name for name in sys.modules if name.startswith('peft_onelayer')))"
    )
    assert ours == "['peft_onelayer', 'peft_onelayer.registration']"
    assert python("import peft_onelayer as p; print(p.probe_layers.__name__, p.LayerRanking.__name__)") == (
        "probe_layers LayerRanking"
    )
    tuner = python("import peft_onelayer, peft; print(peft.PEFT_TYPE_TO_TUNER_MAPPING['SINGLE_LAYER'].__name__)")
    assert tuner == "SingleLayerModel"


def test_a_wheel_carries_the_demo_model_the_profiles_and_the_card(tmp_path):
    source = tmp_path / "source"  # building writes beside the sources
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.stat().st_size < 4_000_000
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = """
import onelayer_cli.main, peft_onelayer
from importlib.resources import files
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(str(files("peft_onelayer") / "demo_model"))
AutoTokenizer.from_pretrained(str(files("peft_onelayer") / "demo_model"))
profiles = len(list((files("peft_onelayer") / "profiles").iterdir()))
card = (files("peft_onelayer.model_cards") / "adapter.md").is_file()
typed = all((files(package) / "py.typed").is_file() for package in ("peft_onelayer", "onelayer_cli"))
for name in peft_onelayer.__all__:
    getattr(peft_onelayer, name)
print(peft_onelayer.__file__, onelayer_cli.__file__, model.num_parameters(), profiles, card, typed)
"""
    found = python(code, PYTHONPATH=str(site)).split()
    assert found == [
        f"{site}/peft_onelayer/__init__.py",
        f"{site}/onelayer_cli/__init__.py",
        "519168",
        "7",
        "True",
        "True",
    ]
