import pytest

from peft_onelayer.records.locate import (
    adapter_folder,
    base_folder,
    cached_base,
    cached_commit,
    cached_model,
    cached_snapshot,
    hub_identity,
    is_local,
    last_part,
)


def test_names_of_folders_and_of_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local("org/name") and not is_local("gpt2")
    assert is_local("models/mine/qwen") and is_local("C:\\models\\qwen")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert is_local("org/name")
    assert [last_part(path) for path in ("a/b/", "C:\\a\\b", "/", "b")] == ["b", "b", "/", "b"]


def test_a_name_that_is_nothing_is_one_line_that_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    for find, name, message in (
        (
            adapter_folder,
            "nowhere",
            "no adapter folder at nowhere; give a folder with adapter_config.json, or a Hub id",
        ),
        (adapter_folder, "./nowhere", "no adapter folder at nowhere; give a folder, or an id on the Hub"),
        (adapter_folder, "run", "run holds no adapter_config.json; did you mean run/adapter?"),
        (base_folder, "/no/such/model", "no model folder at /no/such/model; give a folder, or an id on the Hub"),
    ):
        with pytest.raises(ValueError) as error:
            find(name)
        assert str(error.value).startswith(message)


def test_a_base_is_looked_for_in_the_hubs_cache_alone(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repo = tmp_path / "models--org--tiny"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "snapshots" / commit / "model.safetensors").touch()
    found = cached_base({"base_model_name_or_path": "org/tiny"})
    assert found == repo / "snapshots" / commit and hub_identity(found) == ("org/tiny", commit)
    for name in ("org/other", None, "", 3, ["org/tiny"], "./org/tiny", "not a name"):
        assert cached_base({"base_model_name_or_path": name}) is None
    assert cached_base({"base_model_name_or_path": "org/tiny", "revision": "1" * 40}) is None


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "{", "{}", None])
def test_a_base_of_which_the_hubs_cache_has_a_part_is_not_there(tmp_path, monkeypatch, index):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(folder.name)
    (folder / "config.json").write_text("{}")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    for name in ("1.safetensors", "consolidated.safetensors"):
        (folder / name).touch()
        assert cached_model("org/tiny") is None
    assert cached_snapshot("org/tiny") == folder and cached_commit("org/tiny") == folder.name
    (folder / "2.safetensors").touch()
    assert (cached_model("org/tiny") == folder) == ("2.safetensors" in (index or ""))
