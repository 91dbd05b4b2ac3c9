import gzip
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse

import datasets
import pytest

from peft_onelayer.tasks.files import is_held_out, load_problems

COLUMNS = ("question", "answer")


def problems(n, start=0):
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + n)]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def everything(loaded, split):
    return {row["question"] for row in loaded.rows(split, 10**6, seed=0)}


@pytest.mark.parametrize(
    "name", ["problems.jsonl", "problems.jsonl.gz", "latest.jsonl", "constrained_train_test.jsonl"]
)
def test_a_file_without_a_split_in_its_name_is_split_by_the_problem(tmp_path, name):
    source = write(tmp_path / name, problems(800) + problems(800))  # every line is there twice
    loaded = load_problems(source, COLUMNS)
    train, test = everything(loaded, "train"), everything(loaded, "test")
    assert not train & test and len(train | test) == 800
    assert 60 < len(test) < 140  # one in eight: 100, standard deviation 9.4
    assert len(loaded.rows("test", 10**6, seed=0)) == len(test)
    assert all(is_held_out(problem) for problem in test)
    content = (tmp_path / name).read_bytes()
    assert loaded.data == {name: f"sha256:{hashlib.sha256(content).hexdigest()}"}


def test_where_a_problem_belongs_does_not_depend_on_the_rest_of_the_file(tmp_path):
    few = load_problems(write(tmp_path / "few.jsonl", problems(100, start=300)), COLUMNS)
    many = load_problems(write(tmp_path / "many.jsonl", problems(800)), COLUMNS)
    assert everything(few, "test") < everything(many, "test")
    assert everything(few, "train") < everything(many, "train")


@pytest.mark.parametrize(
    ("name", "split", "other"), [("my_test.jsonl", "test", "train"), ("Train.jsonl", "train", "test")]
)
def test_a_file_named_after_a_split_is_that_split_alone(tmp_path, name, split, other):
    loaded = load_problems(write(tmp_path / name, problems(20)), COLUMNS)
    assert len(everything(loaded, split)) == 20
    with pytest.raises(ValueError, match=f"{name} has no '{other}' problems"):
        loaded.rows(other, 1, seed=0)


def test_a_folder_holds_a_file_for_each_split(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", problems(30))
    write(tmp_path / "gsm8k_test.jsonl.gz", problems(10, start=30))
    write(tmp_path / "other.jsonl", problems(5, start=90))
    loaded = load_problems(str(tmp_path), COLUMNS)
    assert everything(loaded, "train") == {row["question"] for row in problems(30)}
    assert everything(loaded, "test") == {row["question"] for row in problems(10, start=30)}
    assert set(loaded.data) == {"gsm8k_train.jsonl", "gsm8k_test.jsonl.gz"}


def test_a_train_problem_that_is_a_test_problem_too_is_left_out(tmp_path):
    write(tmp_path / "train.jsonl", problems(30))
    write(tmp_path / "test.jsonl", problems(10, start=25))
    with pytest.warns(UserWarning, match="5 train problems are test problems too"):
        loaded = load_problems(str(tmp_path), COLUMNS)
    assert len(everything(loaded, "train")) == 25 and len(everything(loaded, "test")) == 10


def test_rows_are_drawn_by_the_seed(tmp_path):
    loaded = load_problems(write(tmp_path / "train.jsonl", problems(50)), COLUMNS)
    drawn = loaded.rows("train", 20, seed=1)
    assert drawn == loaded.rows("train", 20, seed=1) == loaded.rows("train", 40, seed=1)[:20]
    assert drawn != loaded.rows("train", 20, seed=2)
    assert len({row["question"] for row in drawn}) == 20
    assert len(loaded.rows("train", 51, seed=1)) == 50
    drawn[0]["answer"] = "changed"
    assert "changed" not in {row["answer"] for row in loaded.rows("train", 50, seed=1)}
    for split, n, message in [("dev", 1, "'train' or 'test', got 'dev'"), ("train", 0, "at least 1, got 0")]:
        with pytest.raises(ValueError, match=message):
            loaded.rows(split, n, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'question': 1}", "{file}:2: not one JSON object: Expecting property name"),
        (b'{"question": "q", "answer": "a"} {}', "{file}:2: not one JSON object: Extra data"),
        (b'["question", "answer"]', '{file}:2: expected a JSON object, got \'["question", "answer"]\''),
        (b'{"question": "q"}', "{file}:2: no column 'answer'; found question"),
        (b'{"question": "q", "answer": "a", "more": 1}', "{file}:2: has the columns question, answer, more"),
        (b'{"question": "\xff"}', "{file}:2: not one JSON object: 'utf-8' codec can't decode"),
        (b'{"question": ' + b"[" * 200_000, "{file}:2: not one JSON object: "),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(problems(1)[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(message.format(file=path))) as raised:
        load_problems(str(path), COLUMNS)
    assert "\n" not in str(raised.value)


def test_what_is_no_data_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": 1}' * 99)[:-9])
    (tmp_path / "folder").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("train.jsonl", "train_socratic.jsonl"):
        write(tmp_path / "two" / name, problems(1))
    for name, message in [
        ("empty.jsonl", "empty.jsonl is empty"),
        ("cut.jsonl.gz", "cut.jsonl.gz cannot be read"),
        ("folder", "holds no *train*.jsonl and no *test*.jsonl"),
        ("two", "holds several files named train (train.jsonl, train_socratic.jsonl)"),
        ("missing.jsonl", "no file or folder"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            load_problems(str(tmp_path / name), COLUMNS)
    with pytest.raises(ValueError, match="no file or folder data/missing"):
        load_problems("data/missing.jsonl", COLUMNS)


COMMIT = "a1" * 20
FILES = {
    "README.md": "---\nconfigs:\n- config_name: main\n  data_files:\n"
    "  - {split: train, path: main/train.jsonl}\n  - {split: test, path: main/test.jsonl}\n---\n",
    "main/train.jsonl": "".join(json.dumps(row) + "\n" for row in problems(9)),
    "main/test.jsonl": "".join(json.dumps(row) + "\n" for row in problems(4, start=20)),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What the datasets library asks of the Hub, for one data set org/sums with one commit."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path
        resolve = re.fullmatch(r"/datasets/org/sums/resolve/[^/]+/(.+)", path)
        entry = [{"type": "file", "path": f, "size": len(text), "oid": "b" * 40} for f, text in FILES.items()]
        if resolve and resolve[1] in FILES:
            self.answer(200, FILES[resolve[1]], ETag=f'"{hashlib.sha1(resolve[1].encode()).hexdigest()}"')
        elif resolve:
            self.answer(404, "{}", **{"X-Error-Code": "EntryNotFound"})
        elif tree := re.fullmatch(r"/api/datasets/org/sums/tree/[^/]+/?(.*)", path):
            self.answer(200, json.dumps([one for one in entry if one["path"].startswith(tree[1])]))
        elif path.startswith("/api/datasets/org/sums"):
            siblings = [{"rfilename": f} for f in FILES]
            self.answer(200, json.dumps({"id": "org/sums", "sha": COMMIT, "siblings": siblings, "tags": []}))
        else:
            self.answer(404, "{}", **{"X-Error-Code": "RepoNotFound"})

    def answer(self, status, text, **headers):
        self.send_response(status)
        headers = {"Content-Length": str(len(text)), "X-Repo-Commit": COMMIT, **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())


def load_in_process(sources, home, endpoint, **environment):
    """Load `sources` in a process of its own, because the Hub's address is read when huggingface_hub is imported."""
    code = (
        "import json, sys; from peft_onelayer.tasks.files import load_problems\n"
        "def load(source):\n"
        "    try: loaded = load_problems(source, ('question', 'answer'))\n"
        "    except ValueError as error: return str(error)\n"
        "    return [loaded.rows('train', 99, 0), loaded.rows('test', 99, 0), loaded.data]\n"
        "print(json.dumps([load(source) for source in sys.argv[1:]]))"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    command = [sys.executable, "-c", code, *sources]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.more
def test_a_hub_data_set_has_its_own_splits_and_its_commit(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    online, missing = load_in_process(["org/sums:main", "org/nothing"], tmp_path, endpoint)
    server.shutdown()
    server.server_close()
    train, test, data = online
    assert sorted(row["answer"] for row in test) == ["40", "42", "44", "46"] and len(train) == 9
    assert data == {"org/sums:main": COMMIT}
    assert missing.startswith("data set org/nothing is no local path and could not be loaded from the Hub: ")

    sources = ["org/sums:main", f"org/sums:main@{'c3' * 20}"]
    offline, other = load_in_process(sources, tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert offline == online  # from the cache, with the same commit
    assert other == f"data set {sources[1]} was asked for, but only commit {COMMIT} is in the cache"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_holds_the_same_problems_as_json_lines(tmp_path, suffix):
    rows = [{"question": f'{i:03}, say\n"{i}"?', "answer": f"{i:03}"} for i in range(40)] + [
        {"question": "NA", "answer": ""}
    ]
    lines = load_problems(write(tmp_path / "problems.jsonl", rows), COLUMNS)
    table = datasets.Dataset.from_list(rows)
    (table.to_csv if suffix == ".csv" else table.to_parquet)(str(tmp_path / f"problems{suffix}"))
    loaded = load_problems(str(tmp_path / f"problems{suffix}"), COLUMNS)
    assert loaded.splits == lines.splits and loaded.data.keys() == {f"problems{suffix}"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"question,solution\n1,2\n", "no column 'answer'; found question, solution"),
        ("x.csv", b"question,answer\n", "is empty"),
        ("x.csv", b"question,answer\n1,2,3,4\n", "line 2 has not one value for each of the columns question, answer"),
        ("x.parquet", b"PAR1 not", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_problems(str(tmp_path / name), COLUMNS)
    assert "\n" not in str(raised.value)
