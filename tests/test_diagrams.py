"""Arc diagrams: the files, what is in them, and what is refused."""

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from thresholdnet import links
from thresholdnet.diagrams import DENSE_COLOUR, DPI, HARMONIC_COLOUR, MAX_LAYERS, MAX_PANELS, arc_diagram

SVG = "{http://www.w3.org/2000/svg}"


def groups(path, prefix):
    """id -> group element of an SVG, for ids that begin with `prefix`."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    return {g.get("id"): g for g in root.iter(f"{SVG}g") if (g.get("id") or "").startswith(prefix)}


def stroke(group):
    style = group.find(f"{SVG}path").get("style")
    return dict(part.strip().split(": ") for part in style.split(";"))["stroke"]


@pytest.mark.parametrize("pattern", links.PATTERNS)
def test_svg_has_one_path_a_link(tmp_path, pattern):
    rows = links.make(pattern, 16, threshold=8, n=2)
    found = groups(arc_diagram(rows, tmp_path / "one.svg"), "link-")
    assert set(found) == {f"link-0-{k}-{i}" for i, row in enumerate(rows, start=1) for k in row}
    assert all(len(group.findall(f"{SVG}path")) == 1 for group in found.values())


def test_the_two_sides_have_their_colours_and_the_threshold_a_line(tmp_path):
    path = arc_diagram(links.threshold_ab(12, 5), tmp_path / "sides.svg")
    for name, group in groups(path, "link-").items():
        layer = int(name.rsplit("-", 1)[1])
        assert stroke(group) == (DENSE_COLOUR if layer <= 5 else HARMONIC_COLOUR)
    assert len(groups(path, "threshold-")) == 1
    whole = arc_diagram([links.dense(4), links.harmonic(4)], tmp_path / "whole.svg")
    assert not groups(whole, "threshold-")  # one side only: nothing to mark


def test_output_nodes_are_full_and_the_others_hollow(tmp_path):
    found = groups(arc_diagram(links.harmonic(8), tmp_path / "nodes.svg"), "node-")
    full = {name for name, group in found.items() if "fill: #ffffff" not in group.find(f"{SVG}path").get("style")}
    assert len(found) == 9
    assert full == {f"node-0-{node}" for node in (1, 3, 5, 7, 8)}  # odd layers and the last


def test_side_by_side_patterns_keep_their_own_links(tmp_path):
    several = [links.dense(6), links.harmonic(16), ((0,), (0, 1))]
    path = arc_diagram(several, tmp_path / "several.svg", ["a", "b", "c"])
    assert [len(groups(path, f"link-{i}-")) for i in range(3)] == [21, 31, 3]


@pytest.mark.parametrize(
    ("patterns", "inches"),
    [
        # width: 2 x 0.2 margin + a panel of 0.45 labels + 8 steps of 0.36 arc + 0.2 gap; height: 0.75 title +
        # 17 steps + 3 legend rows of 0.24 + 0.2
        (links.threshold_bc(16, 8), (3.93, 0.75 + 17 * 0.36 + 3 * 0.24 + 0.2)),
        # seven panels whose arcs end at 1.9, one legend row
        ([links.make(p, 16, threshold=8, n=2) for p in links.PATTERNS], (18.25, 0.75 + 17 * 0.36 + 0.24 + 0.2)),
    ],
    ids=["single", "seven"],
)
def test_png_has_its_size_and_is_not_blank(tmp_path, patterns, inches):
    image = imread(arc_diagram(patterns, tmp_path / "picture.png"))[..., :3]
    assert image.shape[1::-1] == tuple(int(side * DPI) for side in inches)
    inked = (image < 0.9).any(axis=2)
    assert 0.02 < inked.mean() < 0.5
    border = 10
    assert not inked[:border].any() and not inked[:, :border].any() and not inked[:, -border:].any()
    blue, orange = ([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in (DENSE_COLOUR, HARMONIC_COLOUR))
    for colour in (blue, orange):
        assert (np.abs(image - colour).max(axis=2) < 0.02).sum() > 100


@pytest.mark.parametrize("rows", [links.dense(1), links.dense(48), links.harmonic(MAX_LAYERS)], ids=repr)
def test_no_label_or_arc_is_cut_off(tmp_path, rows):
    image = imread(arc_diagram(rows, tmp_path / "edge.png", ["a name that is far too long for the room above it"]))
    inked = (image[..., :3] < 0.9).any(axis=2)
    assert not inked[:8].any() and not inked[-4:].any() and not inked[:, :8].any() and not inked[:, -8:].any()


def test_equal_calls_write_equal_pictures(tmp_path):
    first, second = (arc_diagram(links.even_log(8), tmp_path / name) for name in ("1.png", "2.png"))
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in arc_diagram(links.even_log(8), tmp_path / "1.svg").read_bytes()


def test_path_forms_and_no_global_state(tmp_path):
    had_pyplot = "matplotlib.pyplot" in sys.modules
    path = arc_diagram(links.dense(3), str(tmp_path / "UPPER.SVG"), ["costs $5 & <more>"])
    assert path.exists() and groups(path, "link-")
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((links.dense(3), "x.pdf"), ValueError, r"path must end in .png or .svg, got suffix '.pdf'"),
        ((links.dense(3), "x"), ValueError, "got suffix ''"),
        ((links.dense(3), 3), TypeError, "path must be a string or a Path"),
        (("dense", "x.png"), TypeError, "links_list must be"),
        (([], "x.png"), ValueError, f"from 1 to {MAX_PANELS} patterns, got 0"),
        (([links.dense(2)] * (MAX_PANELS + 1), "x.png"), ValueError, f"got {MAX_PANELS + 1}"),
        ((links.harmonic(MAX_LAYERS + 1), "x.png"), ValueError, f"at most {MAX_LAYERS} layers"),
        (([((1,),)], "x.png"), ValueError, "source of layer 1"),
        ((links.dense(3), "x.png", ["a", "b"]), ValueError, "names must hold one title"),
        ((links.dense(3), "x.png", "a"), TypeError, "names must be a sequence of strings"),
    ],
)
def test_bad_input_gets_one_sentence_and_no_file(tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words) as caught:
        arc_diagram(*arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib: pip install 'thresholdnet\[cli\]'"):
        arc_diagram(links.dense(3), tmp_path / "x.png")
