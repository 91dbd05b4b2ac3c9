"""The report: every figure is the record's, nothing is loaded, and a browser shows it."""

import dataclasses
import json
import re
import shutil
import subprocess
import warnings
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from peft_onelayer.records.evaluation import EvaluationRecord, Example
from peft_onelayer.records.files import read_fields
from peft_onelayer.records.movement import Movement, TensorMovement
from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.records.run import RunRecord
from peft_onelayer.report import drawing
from peft_onelayer.report.page import Subject, report_page
from peft_onelayer.runs.report import read_subject

OLD = Path(__file__).parents[1] / "records" / "old"
HOSTILE = "</pre><script>document.title='taken'</script>&\"'"


class Page(HTMLParser):
    """The tables of a page by their names, each a list of rows of values; ids, marks and addresses."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.ids, self.tips, self.addresses, self.scripts, self.row = {}, [], [], [], 0, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.tips += [found["data-tip"]] if "data-tip" in found else []
        self.addresses += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        self.scripts += tag == "script"
        if tag == "div" and found.get("class") == "table":
            self.rows = self.tables[found["aria-label"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and "data-value" in found:
            self.rows[-1].append(json.loads(found["data-value"]))
        elif tag == "td":
            self.rows[-1].append(None)


@pytest.fixture
def subject():
    run = RunRecord.from_file(OLD / "train" / "run.json")
    tensors = [
        TensorMovement(f"model.layers.{k}.{name}", "float32", "float32", 100, 90, 10 * k, 9 * k, 0.5 * k, 0.1)
        for k in (1, 5)
        for name in ("mlp.weight", "norm.weight")
    ]
    results = dataclasses.replace(run.results, movement=Movement(tensors))
    evaluation = EvaluationRecord.from_file(OLD / "train" / "eval.json")
    examples = [Example("greedy", HOSTILE, "1", 0.0, "2", 1.0)]
    return Subject(
        "my <run>",
        dataclasses.replace(run, results=results, why=HOSTILE),
        dataclasses.replace(evaluation, examples=examples),
        LayerRanking.from_file(OLD / "sweep.json"),
        [{"step": 1, "reward": 0.123456789, "entropy": 1.5}, {"step": 2, "reward": 0.25}],
        bytes=12345,
        beside={"depth prior": [0.1 * k for k in range(8)]},
    )


@pytest.fixture
def page(subject):
    return report_page([subject])


def test_every_figure_is_the_records(subject, page):
    tables = Page(page).tables
    profile, sweep = subject.ranking, subject.ranking.sweep
    rows = tables["Layer profile"][1:]
    assert [row[0] for row in rows] == sweep.contribution
    assert [row[1] for row in rows] == sweep.contribution_errors
    assert [row[2] for row in rows] == profile.scores and [row[3] for row in rows] == profile.errors
    assert [row[4] for row in rows] == subject.beside["depth prior"]
    assert tables["Training"][1:] == [[0.123456789, 1.5], [0.25, None]]
    moved = subject.run.results.movement.tensors
    assert tables["Where the change sits"][1:] == [
        [t.entries, t.changed, t.changed / t.entries, t.norm, t.relative] for t in moved
    ]
    rows = tables["Mean reward, with standard errors"][1:]
    expected = [
        [measured.n, figures.mean, figures.standard_error]
        for measured in subject.evaluation.results.values()
        for figures in (measured.base, measured.adapter, measured.difference)
    ]
    assert expected and rows[: len(expected)] == expected
    assert [12345] in tables["Sizes and costs"]


def test_it_loads_nothing_and_every_bar_says_its_value(subject, page):
    found = Page(page)
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org|purl|creativecommons)", page)
    assert len(found.ids) == len(set(found.ids))
    blocks = [tip for tip in found.tips if tip.startswith("block ")]
    panels, cells = 3, 4  # contribution, gain and prior of 8 blocks each; two tensors of two blocks
    assert len(blocks) == panels * 8 + cells
    contribution, error = subject.ranking.sweep.contribution[2], subject.ranking.sweep.contribution_errors[2]
    assert f"block 2: {contribution:.4g} ± {error:.2g}" in found.tips
    assert "block 5, mlp.weight: 50.00%" in found.tips


def test_where_every_entry_changed_the_map_shows_how_far(subject):
    run = subject.run
    tensors = [
        dataclasses.replace(tensor, changed=tensor.entries, relative=0.1 * (i + 1))
        for i, tensor in enumerate(run.results.movement.tensors)
    ]
    results = dataclasses.replace(run.results, movement=Movement(tensors))
    html = report_page([dataclasses.replace(subject, run=dataclasses.replace(run, results=results))])
    assert "block 5, norm.weight: 40.00%" in Page(html).tips and "block 1, mlp.weight: 10.00%" in Page(html).tips


def test_the_learning_rate_stands_in_the_provenance(subject, page):
    rate = subject.run.settings.config["learning_rate"]
    assert rate and f'<th scope="row">learning rate</th><td>{rate:g}</td>' in page


def test_what_a_record_says_is_text(page):
    assert Page(page).scripts == 1 and "<script>document" not in page and "my &lt;run&gt;" in page


@pytest.mark.more
def test_several_stand_side_by_side(subject):
    other = dataclasses.replace(subject, name="other", run=None, evaluation=None, log=[])
    rows = Page(report_page([subject, other])).tables["Side by side"]
    first = next(iter(subject.evaluation.results.values()))
    assert rows[1][2:5] == [first.base.mean, first.adapter.mean, first.difference.mean]
    assert rows[2][2:] == [None] * 5


def test_the_command(onelayer, tmp_path):
    for name, source in (("run", OLD / "train"), ("sweep", OLD)):
        (tmp_path / name).mkdir()
        for file in ("run.json", "eval.json"):
            if (source / file).exists():
                shutil.copy(source / file, tmp_path / name)
    shutil.copy(OLD / "sweep.json", tmp_path / "sweep" / "layer_profile.json")
    html = tmp_path / "new" / "report.html"
    code, _, out = onelayer("report", tmp_path / "run", tmp_path / "sweep", "--html", html)
    assert code == 0 and out == "" and "<title>onelayer: " in html.read_text()
    assert onelayer("report", tmp_path / "run", "--html", html)[0] == 0  # replaced by a later one
    code, _, out = onelayer("report", tmp_path / "run", tmp_path / "sweep")
    assert code == 0 and ", block 5, 3 steps" in out and out.count("--html") == 1
    code, _, out = onelayer("report", tmp_path / "sweep")
    scores = read_fields(OLD / "sweep.json")["contribution"]
    assert code == 0 and all(f"{score:+.3g}" in out for score in scores)
    (tmp_path / "mine.html").write_text("mine")
    for arguments, message in (
        (["nowhere"], "no file or folder nowhere"),
        ([tmp_path], "holds no run.json, layer_profile.json or eval.json"),
        ([tmp_path / "run", "--html", "x.pdf"], "such as report.html"),
        ([tmp_path / "run", "--html", tmp_path / "mine.html"], "exists and is another file"),
    ):
        code, lines, _ = onelayer("report", *arguments)
        assert code == 1 and len(lines) == 1 and message in lines[0], lines


def test_the_bars_are_what_their_title_says(onelayer, tmp_path):
    fields = read_fields(OLD / "sweep.json")
    file = tmp_path / "profile.json"
    for full_gain, what, values, errors in (
        (fields["full_gain"], "layer contribution C of each block", "contribution", "contribution_errors"),
        ([-0.4, 0.01], "what each block gains", "scores", "errors"),  # all parameters lost: C is undefined
    ):
        file.write_text(json.dumps(fields | {"full_gain": full_gain}))
        code, _, out = onelayer("report", file)
        title, *bars = out.splitlines()[1:-1]
        assert code == 0 and title == f"  sweep on {fields['task']}: {what}"
        pairs = zip(fields[values], fields[errors], strict=True)
        assert [bar.split("  ")[-1] for bar in bars] == [f"{value:+.3g} ± {error:.2g}" for value, error in pairs]


def test_what_is_known_without_a_measurement_stands_beside():
    subject = read_subject(str(OLD / "race.json"))
    assert list(subject.beside) == ["depth prior"]
    assert len(subject.beside["depth prior"]) == subject.ranking.num_layers


PROBE = """
<script>
addEventListener("load", () => {
  const said = [];
  for (const mark of [...document.querySelectorAll(".tip")].slice(0, 3)) {
    mark.focus();
    said.push([mark.dataset.tip, tip.hidden ? "" : tip.textContent, document.activeElement === mark]);
  }
  document.querySelector("h1").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.body.dataset.said = JSON.stringify({said, hidden: tip.hidden, wide, title: document.title});
});
</script>
"""


@pytest.mark.more
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_browser_shows_it(page, tmp_path, size):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--window-size={size}", f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    said = json.loads(unescape(re.search(r"data-said=\"(.*?)\"", done.stdout)[1]))
    assert len(said["said"]) == 3 and all(tip == shown and active for tip, shown, active in said["said"])
    assert said["hidden"] and said["wide"] <= 0 and said["title"] == "onelayer: my <run>"
    tables = Page(done.stdout).tables
    assert tables["Layer profile"] == Page(page).tables["Layer profile"]


@pytest.mark.parametrize("name", [r"run$a^{$", "_run", r"C:\runs\_1", "数学", "two\nlines", "long/" * 60])
def test_a_name_is_drawn_as_it_is(name):
    panels = {"mean reward": {name: [(1, 0.1), (2, 0.2)], "other": [(1, 0.2), (2, 0.1)]}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = drawing.curves(panels)
        drawn += drawing.heat_map([name, "other"], ["3"], {(name, "3"): 0.5, ("other", "3"): 1.0}, "change")
    texts = [unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", drawn)]
    shown = "…" + name[-39:] if len(name) > 40 else " ".join(name.split())
    assert texts.count(shown) == 2 and texts.count("other") == 2
    said = {unescape(tip) for tip in re.findall(r'data-tip="(.*?)"', drawn, re.DOTALL)}
    assert f"{name}, step 1: 0.1" in said and f"block 3, {name}: 50.00%" in said


def test_runs_of_one_colour_differ_in_their_lines():
    points = [(1, 0.1), (2, 0.2)]
    drawn = drawing.curves({"mean reward": {str(run): points for run in range(4)}})
    blue = [style for style in re.findall(r'style="(fill: none; [^"]*)"', drawn) if "stroke: var(--blue)" in style]
    assert len({"dasharray" in style for style in blue}) == 2


def test_the_names_of_many_runs_leave_the_curves_their_room():
    def panel(runs):
        drawn = drawing.curves({"reward": {str(run): [(1, 0.1), (2, 0.2)] for run in range(runs)}})
        low, high = re.search(r'patch_2">\s*<path d="M \S+ (\S+)\s+L \S+ \S+\s+L \S+ (\S+)', drawn).groups()
        return float(low) - float(high)

    assert panel(30) > panel(2) > 0.9 * panel(1) > 90


def test_a_log_of_anything_else_is_one_line(onelayer, tmp_path):
    shutil.copy(OLD / "train" / "run.json", tmp_path / "run.json")
    for value, said in (("null", "None"), ('"much"', "much"), ("true", "True")):
        (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "reward": 0.5}}\n{{"step": 2, "reward": {value}}}\n')
        code, lines, _ = onelayer("report", tmp_path)
        assert code == 1 and len(lines) == 1 and f"log.jsonl: reward of step 2 is {said}, expected a number" in lines[0]
    (tmp_path / "log.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')  # torn by a kill
    assert onelayer("report", tmp_path)[0] == 0


def test_a_drawing_fits_a_telephone_and_its_steps_are_whole():
    drawn = drawing.curves({"reward": {"reward": [(step, step / 4) for step in (1, 2, 3, 4)]}})
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawn)[1])
    assert width < 360 and ">2.5<" not in drawn and ">3<" in drawn
    columns = [str(block) for block in range(48)]
    drawn = drawing.heat_map(["q"], columns, {("q", column): 0.5 for column in columns}, "change")
    assert ">4<" in drawn and ">5<" not in drawn and "full colour: 50.00%" in drawn
