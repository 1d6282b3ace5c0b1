import re
import xml.etree.ElementTree as ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from leakfree.report.svg import MARKERS, NUM_COLORS, STYLE, color, dashes, marker, to_svg


def draw(name, label="a & b <c> --> $d$"):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2, 2))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for index in range(NUM_COLORS):
            axes.plot([0, 1], [index, 1], color=color(index), marker=marker(index))
        axes.set_xlabel(label)
        return to_svg(figure, name)


def test_the_svg_is_one_element_without_header_comments_or_addresses():
    svg = draw("one")
    ElementTree.fromstring(svg)
    assert svg.startswith("<svg ")
    assert not re.search(r"<!|<\?|http|xmlns|metadata", svg)


def test_every_colour_is_a_variable_of_the_page():
    svg = draw("one")
    assert not re.search(r"(?:fill|stroke): #", svg)
    for index in range(NUM_COLORS):
        assert f"var(--series-{index})" in svg


def test_two_figures_on_a_page_share_no_ids_and_point_to_their_own():
    ids = []
    for name in ("one", "two"):
        svg = draw(name)
        own = set(re.findall(r'\bid="([^"]+)"', svg))
        used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert used <= own
        ids.append(own)
    assert not ids[0] & ids[1]


def test_the_same_figure_is_the_same_text():
    assert draw("one") == draw("one")


def test_signs_without_a_glyph_do_not_warn(recwarn):
    draw("one", "名前 🦔")
    assert not [item for item in recwarn if "Glyph" in str(item.message)]


def test_variants_beyond_the_palette_are_still_told_apart():
    looks = {(color(index), marker(index), str(dashes(index))) for index in range(3 * NUM_COLORS)}
    assert len(looks) == 3 * NUM_COLORS
    assert {marker(index) for index in range(NUM_COLORS)} == set(MARKERS)
