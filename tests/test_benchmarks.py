"""The parts of the benchmarks that write results; the measurements themselves run under `make benchmark`."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report

    yield report
    del sys.modules["report"]


def test_a_section_is_replaced_and_the_rest_stays(report, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n")
    for text in ("new \\1 table", "newer"):
        report.write_section("speed", text, path)
        assert path.read_text() == f"before\n<!-- speed -->\n\n{text}\n\n<!-- end of speed -->\nafter\n"


@pytest.mark.parametrize("content", ["", "<!-- speed -->\n", 2 * "<!-- speed -->\n<!-- end of speed -->\n"])
def test_a_missing_or_repeated_section_is_refused(report, tmp_path, content):
    path = tmp_path / "README.md"
    path.write_text(content)
    with pytest.raises(ValueError, match="one section between"):
        report.write_section("speed", "new", path)
    assert path.read_text() == content


def test_a_run_replaces_its_own_row_alone(report, tmp_path):
    path = tmp_path / "runs.csv"
    for row in ({"seed": 0, "tv": 0.5}, {"seed": 1, "tv": 0.25}, {"seed": 0, "tv": 0.75, "kl": 1.0}):
        report.add_row(path, row, key=("seed",))
    assert report.read_rows(path) == [{"seed": "1", "tv": "0.25", "kl": ""}, {"seed": "0", "tv": "0.75", "kl": "1.0"}]
    assert report.summarise(report.read_rows(path), "tv", 2) == "0.50 (0.25 to 0.75)"
    assert report.summarise(report.read_rows(path), "kl", 2) == ""  # one run has none
    assert [path] == list(tmp_path.iterdir())


def test_a_table_made_anew_keeps_the_date_of_its_runs(report, tmp_path):
    path, line = tmp_path / "README.md", report.describe_run(["numpy", "scipy", "keras", "tensorflow", "matplotlib"])
    path.write_text("<!-- speed -->\n<!-- end of speed -->\n")
    report.write_section("speed", f"| a |\n\nMean over 2 seeds. {line}", path)
    assert report.read_run_line("speed", path) == line
    with pytest.raises(ValueError, match="one line with date and machine"):
        report.read_run_line("size", path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["targets not averaged", "no base measure", "generator starts at random"])
def test_variants_of_the_ablation_train(report, monkeypatch, variant):
    import ablation

    monkeypatch.setattr(ablation.train_models, "measure", lambda _, model, *__, **___: {"steps_made": model.num_steps})
    assert ablation.run(variant, "rings", 0, steps=3)["steps_made"] == 3


def test_a_table_has_a_row_for_each_row(report):
    table = report.make_table(["name", "value"], [("a", 1), ("b", 2)])
    assert table.splitlines() == ["| name | value |", "| --- | ---: |", "| a | 1 |", "| b | 2 |"]


def test_every_script_has_a_section_and_is_named(report):
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for name in (
        "quality",
        "images",
        "peers",
        "published_recipe",
        "ablation",
        "step_time",
        "image_step_time",
        "scaling",
    ):
        assert (BENCHMARKS / f"{name}.py").exists()
        assert f"`{name}.py`" in text
        assert text.count(f"<!-- {name.replace('_', ' ')} -->") == 1
        assert text.count(f"<!-- end of {name.replace('_', ' ')} -->") == 1
