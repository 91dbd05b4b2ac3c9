import sys

import pytest

from onelayer_cli.main import main


@pytest.fixture
def onelayer(tmp_path, monkeypatch, capfd):
    """Runs the command in an empty folder and returns (exit code, lines on stderr, stdout)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["onelayer", *map(str, arguments)])
        capfd.readouterr()  # what the test itself printed
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, err.splitlines(), out

    yield run
    assert list(work.iterdir()) == []  # nothing half-written, whatever happened
