"""The method is registered whenever PEFT gets imported, and nobody notices how."""

import subprocess
import sys

import pytest

from peft_onelayer import registration

# A package that is called peft and takes milliseconds, a method that enters itself as ours does, and `registration`.
STANDIN = {
    "peft/__init__.py": "import time\nfrom .config import CONFIG\ntime.sleep(0.05)\nfrom .mapping import METHODS\n",
    "peft/config.py": "CONFIG = 1\n",
    "peft/mapping.py": "import time\nfrom .config import CONFIG\ntime.sleep(0.05)\nMETHODS = {}\n",
    "peft/tuners/__init__.py": "",
    "peft/tuners/lora.py": "from ..mapping import METHODS\nLORA = 1\n",
    "peft/data.txt": "text",
    "method.py": "import peft\nfrom peft.mapping import METHODS as M\nM['SINGLE_LAYER'] = len(M) + 1\n",
    "setting.py": f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("registration", {registration.__file__!r})
registration = importlib.util.module_from_spec(spec)
sys.modules["registration"] = registration
spec.loader.exec_module(registration)
registration.METHOD = "method"
""",
}
REGISTER = "from setting import registration\nregistration.register()\n"
CHECK = "\nimport peft\nassert peft.METHODS == {'SINGLE_LAYER': 1}, peft.METHODS\n"
NO_TRACE = """
assert type(peft.__loader__).__name__ == type(peft.__spec__.loader).__name__ == "SourceFileLoader"
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "registration"]
"""
HOOK = """
class Hook:
    def find_spec(self, name, path=None, target=None):
        asked.append(name)
asked = []
"""
THREADS = """
import threading
errors = []
def run(code):
    try:
        exec(code, {})
    except BaseException as error:
        errors.append((code, repr(error)))
threads = [threading.Thread(target=run, args=(code,)) for code in CODES * 4]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
"""


@pytest.fixture
def run(tmp_path):
    for name, text in STANDIN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def python(code):
        command = [sys.executable, "-I", "-S", "-c", f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{code}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr

    return python


@pytest.mark.parametrize(
    "code",
    {
        "later": "import peft",
        "from": "from peft import CONFIG",
        "submodule": "import peft.tuners.lora",
        "from a submodule": "from peft.tuners.lora import LORA",
        "only looked for": "import importlib.util\nassert importlib.util.find_spec('peft') is not None",
        "looked for in its source": (
            "import importlib.util\nspec = importlib.util.find_spec('peft')\n"
            "assert 'METHODS' in spec.loader.get_source('peft') and spec.loader.is_package('peft')"
        ),
        "submodule looked for": "import importlib.util\nassert importlib.util.find_spec('peft.tuners.lora')",
        "the method itself": "import method",
        "reloaded": "import importlib, peft\nimportlib.reload(peft)",
        "registered twice": "registration.register()\nimport peft\nregistration.register()",
        "a hook before": f"{HOOK}sys.meta_path.insert(0, Hook())\nimport peft\nassert 'peft' in asked",
        "a hook behind": f"{HOOK}sys.meta_path.insert(1, Hook())\nimport peft\nassert asked.count('peft') == 1",
        "lazily": (
            "import importlib.util as util\nspec = util.find_spec('peft')\n"
            "loader = spec.loader = util.LazyLoader(spec.loader)\npeft = util.module_from_spec(spec)\n"
            "sys.modules['peft'] = peft\nloader.exec_module(peft)\nassert 'method' not in sys.modules\npeft.CONFIG"
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_however_it_is_imported(run, code):
    run(REGISTER + code[1] + CHECK + NO_TRACE)


def test_peft_may_be_there_already(run):
    run("import peft\n" + REGISTER + CHECK + NO_TRACE)


def test_what_looks_into_a_module_finds_it_as_it_is(run):
    run(
        f"""{REGISTER}
import importlib.resources, inspect, pickle, pkgutil, peft
assert "METHODS" in inspect.getsource(peft)
assert importlib.resources.files("peft").joinpath("data.txt").read_text(encoding="utf-8") == "text"
assert {{module.name for module in pkgutil.iter_modules(peft.__path__)}} == {{"config", "mapping", "tuners"}}
assert pkgutil.get_data("peft", "data.txt") == b"text"
assert peft.__spec__.submodule_search_locations == list(peft.__path__) and peft.__file__.endswith("__init__.py")
{CHECK}{NO_TRACE}"""
    )


def test_without_peft(run):
    absent = "try:\n    import peft\nexcept ModuleNotFoundError as error:\n    assert error.name == 'peft', error\n"
    absent += "else:\n    raise AssertionError\n"
    gone = "import importlib.util, shutil\nshutil.rmtree(sys.path[0] + '/peft')\n"
    run(f"{REGISTER}{gone}{absent}assert importlib.util.find_spec('peft') is None")
    run("sys.modules['peft'] = None\n" + REGISTER + absent)


def test_an_import_that_failed_can_be_tried_again(run):
    run(
        f"""{REGISTER}
sys.modules["peft.mapping"] = None
try:
    import peft
except ImportError:
    pass
else:
    raise AssertionError
del sys.modules["peft.mapping"]
{CHECK}{NO_TRACE}"""
    )


@pytest.mark.parametrize(
    "codes",
    [
        ["import peft", "from peft import METHODS; assert METHODS"],
        ["import peft", "import time; time.sleep(0.03); import method"],
        ["import method", "import time; time.sleep(0.03); import peft"],
    ],
    ids=["peft", "peft first", "method first"],
)
def test_threads_that_import_at_once(run, codes):
    run(f"{REGISTER}{THREADS.replace('CODES', repr(codes))}{CHECK}{NO_TRACE}")


@pytest.mark.more
def test_the_real_peft_after_us_with_transformers_looking_for_it_first():
    code = """
import pickle, sys, peft_onelayer
from transformers.utils import is_peft_available
assert is_peft_available() and "peft" not in sys.modules
from transformers.integrations.peft import PeftAdapterMixin  # what gives every model `load_adapter`
import peft.tuners.lora
assert peft.PEFT_TYPE_TO_TUNER_MAPPING["SINGLE_LAYER"] is peft_onelayer.SingleLayerModel
config = peft_onelayer.SingleLayerConfig(layer=3)
assert pickle.loads(pickle.dumps(config)) == config
assert peft_onelayer.probe_layers.__name__ == "probe_layers"
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
