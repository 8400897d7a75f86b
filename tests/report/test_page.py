from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from autocompress.errors import RunFolderError
from autocompress.report.page import write_report
from autocompress.report.plots import pareto_png
from autocompress.results import Results

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Text, references to other files, inline scripts and style of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.references, self.handlers, self.text, self.inside = [], [], [], {"script": [], "style": [], "": []}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag if tag in ("script", "style") else self.inside
        self.references += [v for k, v in attributes if k in ("src", "href", "action", "srcset", "data", "poster")]
        self.handlers += [k for k, _ in attributes if k.startswith("on")]

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        self.text[self.inside].append(data)


def write(content, run):
    write_report(Results.read(content), run)
    return Page((run / "report.html").read_text(encoding="utf-8"))


def hostile(content):
    """The fixture with markup in everything that a run may name."""
    evil_layer = {"name": EVIL, "kind": EVIL, "teacher_channels": 4, "channels": 2}
    score = {"name": EVIL, "value": 0.5, "n": 3}
    entry = content["front"][0] | {"id": EVIL, "val_score": score, "test_score": score, "layers": [evil_layer]}
    entry["policy"] = entry["policy"] | {"student": {"reference": EVIL}}
    failure = {"id": EVIL, "stage": EVIL, "reason": EVIL}
    task = content["task"] | {"model": EVIL, "data": EVIL, "batch": EVIL}
    return content | {"task": task, "device": EVIL, "environment": {EVIL: EVIL}, "front": [entry], "points": [entry], "best": EVIL,
                      "failures": [failure], "ladder": {EVIL: 0.5}, "prediction": {EVIL: EVIL}, "spent_s": {EVIL: 1.0},
                      "elapsed_s": 2.0}  # fmt: skip


def test_the_report_is_one_file_that_needs_no_network(content, tmp_path):
    page = write(content, tmp_path)
    assert page.references == []
    assert not re.search(r"url\(|@import", "".join(page.text["style"]))
    assert not {"iframe", "img", "link", "object", "embed"} & set(page.tags)
    text = " ".join("".join(page.text[""]).split())
    best = next(point for point in content["points"] if point["id"] == content["best"])
    assert f"{best['speedup']:.2f} times faster" in text
    for entry in content["front"]:
        assert entry["id"] in text
    for failure in content["failures"]:
        assert failure["reason"] in text


def test_caveats_stand_above_the_plots(content, tmp_path):
    scores = {key: {"name": "accuracy", "value": value, "n": 5000} for key, value in (("val_score", 0.999), ("test_score", 0.93))}
    write_report(Results.read(content | {"baseline": content["baseline"] | scores}), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "probably trained on the validation examples" in page.partition("The Pareto front")[0]


def test_the_picture_is_a_png(content, tmp_path):
    write(content, tmp_path)
    picture = (tmp_path / "pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")


def test_what_a_run_names_is_never_markup(content, tmp_path):
    plain, page = write(content, tmp_path), write(hostile(content), tmp_path)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert EVIL not in raw
    assert page.tags.count("script") == plain.tags.count("script")
    assert page.handlers == plain.handlers
    assert "".join(page.text[""]).count(EVIL) >= 5, "it is shown as text"


def test_plotly_is_given_no_markup_either(content, tmp_path):
    page = write(hostile(content), tmp_path)
    figures = "".join(page.text["script"]).replace("\\u003c", "<").replace("\\u003e", ">")
    named = [value for key in ("text", "title") for value in re.findall(rf'"{key}":"([^"]*)"', figures)]
    assert any("alert(1)" in value for value in named)
    assert not any(EVIL in value for value in named)


@pytest.mark.parametrize(
    "change",
    [
        {"front": [], "points": [], "best": None, "progress": [], "failures": []},
        {"front": [], "best": None},
        {"budget": {}},
        {"prediction": {"median_error": None, "spearman": float("nan")}, "ladder": {"short_full_spearman": None}},
        {"task": {}, "device": "", "environment": {}},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_search_that_found_little_has_a_report_too(content, tmp_path, change):
    page = write(content | change, tmp_path)
    assert "NaN" not in "".join(page.text["script"][-1:])
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_a_baseline_without_scores_and_losses_instead_of_accuracies(content, tmp_path):
    baseline = content["baseline"] | {"val_score": None, "test_score": None}
    loss = {"val_score": {"name": "loss $x_", "value": 2.5, "direction": "minimize", "n": 5}, "test_score": None}
    points = [point | loss for point in content["points"][:3]]
    write(content | {"baseline": baseline, "points": points, "front": points[:1], "best": points[0]["id"]}, tmp_path)


def test_damaged_content_and_folders_that_are_gone(content, tmp_path):
    with pytest.raises(RunFolderError, match="baseline"):
        Results.read({"schema": 1})
    with pytest.raises(RunFolderError, match="cannot be written"):
        pareto_png(Results.read(content), tmp_path / "absent" / "pareto.png")


def test_it_says_where_the_time_went_largest_share_first(content, tmp_path):
    spent = {"train": 30.0, "measure": 50.0, "teach": 0.1}
    text = " ".join(" ".join(write(content | {"elapsed_s": 100.0, "spent_s": spent}, tmp_path).text[""]).split())
    assert "Where the time went: measuring 50 % training 30 % the search itself 20 %" in text
    assert "answers of the original" not in text
    assert "Where the time went" not in " ".join(write(content | {"spent_s": {}}, tmp_path).text[""])
