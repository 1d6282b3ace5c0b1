import os
import subprocess
import sys
from pathlib import Path

import pytest

from leakfree.errors import RunError
from leakfree.report import compare

ROOT = Path(__file__).parents[2]


def test_compare_prints_and_writes_the_same_numbers(regime_runs, tmp_path, capsys):
    output = tmp_path / "new" / "report.html"
    compare(regime_runs(3), str(output))
    text, page = capsys.readouterr().out, output.read_text()
    for number in ("59.5", "34.0", "30.8–37.0", "+43.2", "−12.0"):
        assert number in text
        assert number in page
    assert f"report: {output}" in text
    assert [item.name for item in output.parent.iterdir()] == ["report.html"]


def test_without_output_nothing_is_written(regime_runs, tmp_path, capsys):
    paths = regime_runs(1)
    before = sorted(tmp_path.rglob("*"))
    compare(paths)
    assert "53.1" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_title_baseline_and_command_are_on_the_page(regime_runs, tmp_path, capsys):
    output = tmp_path / "report.html"
    paths = regime_runs(1)
    compare(paths, str(output), title="My study", baseline="gn_seed0")
    page = output.read_text()
    assert "<title>My study</title>" in page
    assert 'difference from <b class="run">gn_seed0</b>' in page
    assert "--baseline gn_seed0" in page
    assert f"leakfree compare {paths[0]}" in page


@pytest.mark.parametrize(
    ("name", "words"), [("folder", "is a folder; give a file"), ("record.json", "give a name that ends in .html")]
)
def test_an_output_that_is_no_page_is_refused_before_anything_is_read(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=words):
        compare(["no such run"], str(tmp_path / name))


def test_an_output_that_cannot_be_written_is_one_line(regime_runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/report\.html: the report cannot be written"):
        compare(regime_runs(1, ("gn",)), str(tmp_path / "file" / "report.html"))


def test_a_failed_comparison_leaves_the_old_report(regime_runs, tmp_path):
    output = tmp_path / "report.html"
    output.write_text("old")
    with pytest.raises(RunError):
        compare([*regime_runs(1), str(tmp_path / "missing")], str(output))
    assert output.read_text() == "old"


def test_reports_never_load_torch(regime_runs, tmp_path):
    code = (
        "import sys\n"
        "from leakfree.report import compare\n"
        "compare(sys.argv[2:], sys.argv[1])\n"
        "heavy = {'torch', 'torchvision', 'lightning', 'omegaconf'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "report.html"), *regime_runs(1)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_does_not_cost_the_page(regime_runs, tmp_path):
    output = tmp_path / "report.html"
    code = "import sys; from leakfree.report import compare; compare(sys.argv[2:], sys.argv[1])"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code, str(output), *regime_runs(1, ("gn",))]
    subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.DEVNULL, timeout=120)
    os.close(writer)
    assert output.read_text().rstrip().endswith("</html>")
