"""Every seam of the table holds in the installed libraries, and its loss is refused in one line."""

import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from peft_onelayer.seams import SEAMS, TESTED, Seam, check

ROOT = Path(__file__).parents[1]
ALL = [(user, seam) for user, seams in SEAMS.items() for seam in seams]
IDS = [f"{user.rpartition('.')[2]}-{seam.path}" for user, seam in ALL]


def source(user: str) -> str:
    """The text of the module `user`; of a package, its __init__."""
    package, _, rest = user.partition(".")
    path = ROOT / {"onelayer_cli": "cli"}.get(package, package) / rest.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")  # trl.experimental says that it is
@pytest.mark.parametrize(("user", "seam"), ALL, ids=IDS)
def test_it_holds(user, seam):
    if find_spec(seam.library) is None:
        pytest.skip(f"{seam.library} is not installed")
    assert seam.problem() is None
    if seam.says:
        text = inspect.getsource(seam.find())
        assert [says for says in seam.says if says not in text] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("user", "seam"), ALL, ids=IDS)
def test_without_it_one_line_says_so(user, seam, monkeypatch):
    if find_spec(seam.library) is None:
        pytest.skip(f"{seam.library} is not installed")
    find = Seam.find

    def lost(each):
        if each is seam:
            raise AttributeError
        return find(each)

    monkeypatch.setattr(Seam, "find", lost)
    with pytest.raises(ImportError) as error:
        check(user)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{user} needs {seam.path} ({seam.why}), which is not there in {seam.library} ")
    lowest, highest = TESTED[seam.library]
    assert message.endswith(f" {version(seam.library)}; {seam.library} {lowest} to {highest} have it.")


def test_parameters_that_have_changed_are_named(monkeypatch):
    def moved(self, adapter_name, dtype):
        raise NotImplementedError

    from peft.tuners.tuners_utils import BaseTuner

    monkeypatch.setattr(BaseTuner, "_cast_adapter_dtype", moved)
    with pytest.raises(ImportError, match=r"_cast_adapter_dtype .* does not take autocast_adapter_dtype in peft"):
        check("peft_onelayer.tuner")

    def one_more(self, adapter_name, autocast_adapter_dtype, more):
        raise NotImplementedError

    monkeypatch.setattr(BaseTuner, "_cast_adapter_dtype", one_more)
    with pytest.raises(ImportError, match="takes adapter_name, autocast_adapter_dtype, more instead of adapter_name"):
        check("peft_onelayer.tuner")


@pytest.mark.more
def test_a_moved_seam_ends_the_import_in_that_line():
    code = """
import peft.tuners.tuners_utils as utils
del utils.check_adapters_to_merge
import peft_onelayer
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    seam = "peft.tuners.tuners_utils:check_adapters_to_merge (to merge)"
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: peft_onelayer.tuner needs {seam}, which is ")


@pytest.mark.parametrize("user", SEAMS)
def test_its_user_checks_it(user):
    if all(seam.says and not seam.takes for seam in SEAMS[user]):
        pytest.skip("only its text is looked at, by the test above")
    assert "check(__name__)" in source(user)


def test_who_checks_stands_in_the_table():
    paths = [*ROOT.glob("peft_onelayer/**/*.py"), *ROOT.glob("cli/*.py")]
    checking = {path for path in paths if re.search(r"^\s*check\(__name__\)", path.read_text(encoding="utf-8"), re.M)}
    assert len(checking) == sum("check(__name__)" in source(user) for user in SEAMS)


def test_the_tested_versions_are_those_declared_and_developed_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {
        requirement.name.replace("-", "_"): requirement
        for requirement in map(Requirement, [*project["dependencies"], *extras])
    }
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    for library, (lowest, highest) in TESTED.items():
        assert str(declared[library].specifier).split(",")[-1] == f">={lowest}", library
        assert Version(lowest) <= Version(pins[library.replace("-", "_")]) <= Version(highest), library
    assert {seam.library for _, seam in ALL} == TESTED.keys()


def test_a_module_that_is_not_there():
    assert Seam("peft.no_such_module:name", "nothing").problem() == "is not there"
