import os

import pytest

from peft_onelayer.records.files import check_folder, staged_directory


def ours(folder):
    return (folder / "mark").exists()


def never(folder):
    return False


def test_the_folder_appears_complete_and_leaves_nothing_beside_it(tmp_path):
    with staged_directory(tmp_path / "out", never) as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_it_has_the_permissions_of_plain_folders_and_files(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a").write_text("1")
    with staged_directory(tmp_path / "out", never) as folder:
        (folder / "a").write_text("1")
        (folder / "a").chmod(0o600)
    for name in ("", "a"):
        assert (tmp_path / "out" / name).stat().st_mode == (tmp_path / "plain" / name).stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_and_keeps_the_old_folder(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").write_text("old")
    with pytest.raises(error), staged_directory(tmp_path / "out", ours) as folder:
        (folder / "mark").write_text("new")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mark").read_text() == "old"


def test_our_own_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").write_text("old")
    (tmp_path / "out" / "stale").write_text("old")
    with staged_directory(tmp_path / "out", ours) as folder:
        (folder / "mark").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"mark": "new"}


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out", never) as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "out" / "a").exists()


def test_a_file_that_appears_in_the_target_meanwhile_is_not_lost(tmp_path):
    with pytest.raises(ValueError, match="holds other files"), staged_directory(tmp_path / "out", never):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("precious")
    assert (tmp_path / "out" / "theirs").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_refused_on_entry(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name, message in {
        "../file": "not a folder",
        "../full": "holds other files",
        ".": "current folder",
        "../file/such": "is not a folder",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            check_folder(tmp_path / "empty" / name, never)
        assert "\n" not in str(caught.value)


def test_a_folder_behind_a_link_is_the_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged_directory(tmp_path / "link", never) as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
@pytest.mark.parametrize("locked", [".", "out"])
def test_a_read_only_output_is_refused_before_the_work(tmp_path, locked):
    (tmp_path / "out").mkdir()
    (tmp_path / locked).chmod(0o500)
    with pytest.raises(ValueError, match="is read-only"), staged_directory(tmp_path / "out", never):
        raise AssertionError("the block must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
