"""report.html: one page that loads nothing, every text escaped; and what it draws."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pipeline import PATIENCE

from minimind.common.charts import font_families, line_chart
from minimind.evaluation import token_loss_distribution
from minimind.training.plots import chart, curve, plot_loss, read_log, thin
from minimind.training.report import histogram, report_page, title_of, write_report

HOSTILE = (
    "<script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)>\" '"
    " & 中文"
)
VOID = {"meta"}

pytestmark = pytest.mark.pictures


class Page(HTMLParser):
    """Collects tags, attributes and text; complains where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


@pytest.fixture
def stage(tmp_path):
    """A stage directory whose every text is hostile, with a parent."""
    parent = tmp_path / "base"
    parent.mkdir()
    raw = {"train": {"files": ["raw <corpus>.jsonl"], "hash": "feed"}}
    record = {"stage": "pretrain", "parent": None, "weights": "cafe", "data": raw}
    (parent / "stage.json").write_text(json.dumps(record))
    directory = tmp_path / "sft"
    directory.mkdir()
    log = [
        {
            "step": 0,
            "eval_loss": 3.0,
            "eval_bits_per_byte": 1.5,
            "eval_runtime": 4.0,
            "eval_steps_per_second": 9,
        }
    ]
    log += [
        {
            "step": n,
            "loss": 3 - n / 10,
            "learning_rate": 1e-3 / n,
            "tokens_per_second": 1000.0 + n,
            "elapsed": 1.0 * n,
        }
        for n in range(1, 11)
    ]
    log += [
        {
            "step": 10,
            "eval_loss": 2.0,
            "eval_bits_per_byte/zh<b>": 1.1,
            "eval_bits_per_byte/en": 1.2,
        }
    ]
    (directory / "train_log.jsonl").write_text(
        "\n".join(map(json.dumps, log)) + '\n{"step": 11, "lo'
    )
    rows = [{"step": step, "prompt": HOSTILE, "text": f"{HOSTILE}\n{step}"} for step in (5, 10)]
    (directory / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    roles = {HOSTILE: {"tokens": 4, "trained": 2, "trained_share": 0.5}}
    findings = [
        {
            "severity": "warning",
            "name": "x",
            "count": 1,
            "text": HOSTILE,
            "advice": "none",
            "places": [],
        }
    ]
    (directory / "mask_report.json").write_text(
        json.dumps({"rows": 2, "roles": roles, "findings": findings})
    )
    record = {
        "stage": "sft",
        "parent": {"directory": str(parent), "stage": "pretrain", "weights": "cafe"},
        "weights": "beef",
        "data": {
            "train": {"files": [HOSTILE], "rows": 7, "hash": "f00d"},
            "eval": {"files": [], "rows": 1},
        },
        "options": {"learning_rate": 1e-3, "run_name": HOSTILE},
        "command": HOSTILE,
        "metrics": {"before": {"loss": 3.0}, "after": {"loss": 2.0}},
        "best": {"metric": "eval_loss", "value": 2.0, "step": 10},
        "token_loss": token_loss_distribution(torch.tensor([0.1, 0.2, 3.0, 99.0])),
    }
    (directory / "stage.json").write_text(json.dumps(record))
    return directory


def test_the_page_is_valid_html_and_loads_nothing(stage):
    text = write_report(stage).read_text()
    page = Page(text)
    assert not {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
    } & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "onerror", "srcset")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_hostile_texts_are_shown_as_they_are(stage):
    page = Page(report_page(stage, json.loads((stage / "stage.json").read_text())))
    shown = "".join(page.words)
    # prompt and text of two samples, role, finding, file twice, command; and the option, its quotes
    # escaped
    assert shown.count("<script>document.title='owned'</script>") == 10
    assert shown.count(HOSTILE) == 9


def test_the_lineage_leads_back_to_the_raw_text(stage):
    page = report_page(stage, json.loads((stage / "stage.json").read_text()))
    lineage = page[page.index("Lineage") :]
    assert lineage.index("beef") < lineage.index("cafe") < lineage.index("raw &lt;corpus&gt;.jsonl")
    assert "feed" in lineage


def test_a_parent_that_holds_other_weights_by_now_is_reported(stage):
    record = json.loads((stage.parent / "base" / "stage.json").read_text())
    (stage.parent / "base" / "stage.json").write_text(json.dumps(record | {"weights": "new"}))
    assert "holds other weights by now" in write_report(stage).read_text()
    shutil.rmtree(stage.parent / "base")
    assert "no longer there" in write_report(stage).read_text()


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_a_run_that_is_not_complete_says_so_and_when(stage, status):
    record = json.loads((stage / "stage.json").read_text())
    del record["metrics"]
    page = report_page(stage, record | {"steps": 10, "max_steps": 40, "state": status})
    assert f"<b>{status}</b>" in page
    assert "10 of 40" in page
    assert re.search(r"written<b>\d{4}-\d\d-\d\d \d\d:\d\d</b>", page)
    assert "<b>complete</b>" in write_report(stage).read_text()


def test_how_long_an_evaluation_took_is_no_metric(stage):
    record = json.loads((stage / "stage.json").read_text())
    del record["metrics"]  # then the table is made of the log's evaluations
    metrics = report_page(stage, record).partition("Held-out metrics")[2].partition("<h2>")[0]
    assert "<td>loss</td>" in metrics
    assert "runtime" not in metrics
    assert "per_second" not in metrics


def test_the_loss_of_pairs_is_not_called_one_of_tokens(stage):
    record = json.loads((stage / "stage.json").read_text())
    assert "Loss <small>nats per token" in report_page(stage, record)
    assert "Loss <small>per pair" in report_page(stage, record | {"stage": "dpo"})


def test_a_title_says_a_directory_once():
    assert title_of("sft", Path("/home/me/runs/26m/sft")) == "26m/sft"
    assert title_of("sft", Path("runs/jokes")) == "sft: runs/jokes"


def test_a_report_that_cannot_be_written_ends_no_run(stage, capsys):
    assert write_report(stage / "missing", {"stage": "sft"}) is None
    assert "notice: the report failed (FileNotFoundError: " in capsys.readouterr().err


def test_a_log_that_went_back_to_a_checkpoint_counts_its_later_entries(tmp_path):
    entries = [{"step": n, "loss": 1.0} for n in (1, 2, 3, 4)] + [
        {"step": n, "loss": 2.0} for n in (3, 4, 5)
    ]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, entries)) + '\n{"ste')
    assert [(e["step"], e["loss"]) for e in read_log(tmp_path / "log")] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]


def test_a_curve_of_many_points_is_thinned_to_their_means():
    points = thin([(float(n), float(n)) for n in range(10_000)], limit=100)
    assert len(points) == 100
    assert points[0] == (49.5, 49.5)


def test_a_mean_since_the_last_log_stands_in_the_middle_of_its_steps():
    log = [
        {"step": 0, "eval_loss": 9},
        {"step": 10, "loss": 5, "grad_norm": 1},
        {"step": 10, "eval_loss": 4},
    ]
    log += [{"step": 30, "loss": 3, "grad_norm": 2}, {"step": 30, "eval_loss": 2}]
    assert curve(log, "loss") == [(5, 5), (20, 3)]
    assert curve(log, "eval_loss") == [(0, 9), (10, 4), (30, 2)]
    assert curve(log, "grad_norm") == [(10, 1), (30, 2)]


def test_rare_logs_do_not_lift_training_above_a_held_out_loss_that_is_higher():
    """A falling loss, logged once in 100 steps; the held-out loss is higher everywhere by 0.1."""
    loss = [10 * 0.99**step for step in range(501)]
    log = [{"step": n, "loss": sum(loss[n - 99 : n + 1]) / 100} for n in range(100, 501, 100)]
    for step, value in curve(log, "loss"):
        assert value < loss[int(step)] + 0.5
        assert abs(value - loss[int(step)]) < abs(value - loss[int(step) + 50])


def ticks_beside(svg):
    """The numbers at the vertical axis of a chart, which has no other text aligned to its end."""
    texts = re.findall(r"text-anchor: end[^>]*>([^<]*)<", svg)
    return [float(text.replace(",", "").replace("\u2212", "-")) for text in texts]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1e-9, 5e-4), (-3, 12), (2, 2), (0, 0), (99_000, 101_000)]
)
def test_ticks_are_round_and_cover_the_values(low, high):
    ticks = ticks_beside(line_chart("x", {"a": [(0, low), (1, high)]}))
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_an_axis_that_begins_at_zero_does_so_whatever_the_values():
    ticks = ticks_beside(line_chart("x", {"a": [(0, 3.2), (1, 3.3)]}, from_zero=True))
    assert ticks[0] == 0
    assert ticks[-1] >= 3.3


def lines(svg):
    """The points of each curve of a chart."""
    paths = re.findall(r'<path d="(M [^"]*)" style="[^"]*stroke: (?!#888888)#', svg)
    return [
        [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]] for path in paths
    ]


def test_a_curve_leaves_a_gap_where_a_value_is_not_finite():
    points = [(1, 1.0), (2, 2.0), (3, float("nan")), (4, 3.0), (5, 2.0)]
    assert list(map(len, lines(chart("Loss", "", {"loss": points})))) == [2, 2]
    assert "no finite value" in chart("Loss", "", {"loss": [(1, float("inf"))]})


def test_a_point_between_two_gaps_is_drawn_too():
    ((first, second),) = lines(chart("Loss", "", {"loss": [(1, 1.0), (2, float("nan"))]}))
    assert first == second


def test_a_curve_rises_where_its_values_do():
    (((x0, y0), (x1, y1)),) = lines(chart("x", "", {"a": [(0, 0.0), (1, 1.0)]}))
    assert x0 < x1
    assert y0 > y1  # the origin of SVG is at the top


def test_the_same_values_give_the_same_picture_to_the_byte():
    drawn = {chart("x", "", {"a": [(0, 0.0), (n, 1.0)]}) for n in (1, 2, 1)}
    assert len(drawn) == 2


def test_the_distribution_of_token_losses_counts_every_token_once():
    losses = torch.tensor([0.0, 0.49, 0.5, 1.0, 1.0, 15.9, 16.0, 40.0])
    found = token_loss_distribution(losses)
    assert sum(found["counts"]) == found["tokens"] == 8
    assert found["counts"][0] == 2
    assert found["counts"][1] == 1
    assert found["counts"][2] == 2
    assert found["counts"][-1] == 3
    assert found["mean"] == pytest.approx(losses.mean().item())
    assert found["median"] == pytest.approx(1.0)
    assert histogram(found).count(" tokens</title>") == 32


def test_the_labels_of_a_histogram_lie_within_it():
    drawn = histogram(token_loss_distribution(torch.rand(1000) * 20))
    width = float(re.search(r'viewBox="0 0 (\d+)', drawn)[1])
    labels = re.findall(r'text-anchor: middle" x="([\d.]+)"[^>]*>([^<]*)<', drawn)
    beneath = sorted((float(x), text) for x, text in labels)
    assert beneath[0][1] == "0"
    assert beneath[-1][1] == "16"
    assert beneath[-1][0] + 8 * len("16") / 2 <= width  # a digit is at most 8 wide at this size
    beside = ticks_beside(drawn)
    assert beside[0] > 0 or beside[-1] > 0  # the axis of counts
    assert len(beside) >= 3


def test_nothing_on_the_page_is_wider_than_a_narrow_screen(stage):
    text = write_report(stage).read_text()
    page = Page(text)
    names = [name for name, _ in page.attributes]
    assert names.count("viewbox") == page.tags.count("svg") > 4
    assert not {"width", "style"} & {
        name for name, value in page.attributes if (value or "").endswith("px")
    }
    style = text[text.index("<style>") : text.index("</style>")]
    least = re.findall(r"(?<!max-)(?:min-)?width: ?(\d+)px|minmax\((\d+)px", style)
    assert not least
    assert "svg { width: 100%; max-width: 100%;" in style


def test_a_chinese_name_gives_no_warning_whatever_fonts_there_are(tmp_path):
    log = [{"step": n, "loss": 5.0 - n, "learning_rate": 0.1} for n in (1, 2, 3)]
    plot_loss(log, tmp_path / "loss.png", "训练/sft", "nats per token")  # warnings are errors
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_fonts_with_chinese_glyphs_stand_in_for_what_the_first_one_lacks():
    assert font_families(["DejaVu Sans", "SimHei", "Arial"]) == ["DejaVu Sans", "SimHei"]
    assert font_families(["DejaVu Sans"]) == ["DejaVu Sans"]


def browser():
    return (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )


@pytest.mark.skipif(browser() is None, reason="no chromium is installed")
def test_a_real_browser_shows_the_page_and_runs_nothing_of_it(stage, tmp_path):
    path = write_report(stage)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [browser(), *options, "--virtual-time-budget=2000", "--window-size=1400,1800"]
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            *command,
            f"--screenshot={picture}",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dom = done.stdout
    assert f"<title>{stage.parent.name}/sft</title>" in dom  # no script has changed it
    assert len(lines(dom)) >= 4
    assert "CONSOLE" not in done.stderr  # no refused request, no error of a script
    assert Path(picture).stat().st_size > 20_000
