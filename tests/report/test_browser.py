"""The page in a real browser: no overflow at phone and desktop width, nothing on the console."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from leakfree.report.html import render
from leakfree.report.runs import group_runs, load_runs
from tests.report.pretext_regime import write_pretext_runs
from tests.report.regime import make_config, regime_record, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=2000",
    "--dump-dom",
]  # fmt: skip
# a frame from srcdoc shares the wrapper's origin, so the wrapper may measure it; a frame can be narrower
# than the narrowest window of a headless browser
WRAPPER = """<!doctype html><iframe id="frame" style="border:0;width:{width}px;height:800px" srcdoc="{page}"></iframe>
<pre id="facts"></pre><script>
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const small = [...page.querySelectorAll("svg.plot")].filter((svg) => svg.getBoundingClientRect().width < 200);
  const outside = [...page.querySelectorAll("main *")].filter((element) =>
    !element.closest(".scroll, svg") && element.getBoundingClientRect().right > root.clientWidth + 1);
  facts.textContent = JSON.stringify({{
    page: root.scrollWidth, room: root.clientWidth, small: small.length,
    outside: outside.map((element) => element.outerHTML.slice(0, 80)),
    headlines: page.querySelectorAll("[id^=headline]:not([id$=caption])").length,
    headline: page.querySelector("#headline").scrollWidth,
    pane: page.querySelector("#headline").closest(".scroll").clientWidth,
  }});
}};
</script>"""


def look(tmp_path, text, width):
    (tmp_path / "wrapper.html").write_text(WRAPPER.format(width=width, page=html.escape(text)))
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500) + 40},900"]
    done = subprocess.run(
        [*command, f"file://{tmp_path / 'wrapper.html'}"], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="facts">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_sticks_out_and_nothing_complains(tmp_path, regime_runs, width):
    facts, complaints = look(tmp_path, render(group_runs(load_runs(regime_runs(3)))), width)
    assert facts["page"] <= facts["room"]
    assert facts["outside"] == []
    assert facts["small"] == 0
    assert complaints == []
    if width == 375:
        assert facts["headline"] > facts["pane"]  # a wide table scrolls inside its own pane
    else:
        assert facts["headline"] <= facts["pane"]


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("mixed", [False, True], ids=["contrastive", "mixed"])
def test_contrastive_runs_alone_and_beside_others_fit(tmp_path, regime_runs, width, mixed):
    paths = write_pretext_runs(tmp_path / "moco", ("bn", "shuffle_bn", "sync_bn", "gn"), 3)
    paths = [*regime_runs(3), *paths] if mixed else paths
    variants = group_runs(load_runs(paths))
    facts, complaints = look(tmp_path, render(variants, baseline=variants[1]), width)
    assert facts["page"] <= facts["room"]
    assert facts["outside"] == []
    assert facts["small"] == 0
    assert complaints == []
    assert facts["headlines"] == (2 if mixed else 1)
    if width == 1280 and not mixed:
        assert facts["headline"] <= facts["pane"]


def test_long_names_and_values_do_not_widen_a_phone_page(tmp_path):
    long = "x" * 180
    records = [regime_record("bn_image", 0), regime_record("gn", 0)]
    records[0] = replace(records[0], config=make_config(model__weights=long), environment={"host": long}, notes=[long])
    paths = [write_run(tmp_path / (long + str(index)), record) for index, record in enumerate(records)]
    facts, _ = look(tmp_path, render(group_runs(load_runs(paths)), title=long, command=long), 375)
    assert facts["page"] <= facts["room"]
    assert facts["outside"] == []
