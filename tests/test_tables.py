"""The paper's tables: printed rows held, ours computed, every format readable again."""

import csv
import io
import json
import sys
from dataclasses import FrozenInstanceError

import pytest

from thresholdnet import ThresholdBlock, create_model, tables
from thresholdnet.tables import FORMATS, TABLES, Table, table, to_csv, to_json, to_markdown, to_text

# name -> threshold, rows as the paper prints them, total of the printed rows, total of ours
LINKS = {
    "I": ("0 0-1 0-1-2 0-1-2-3 4 4-5 6 0-4-6-7 8 2-6-8-9 10 4-8-10-11 12 6-10-12-13 14 0-8-12-14-15", 39, 40),
    "II": (
        "0 0-1 0-1-2 0-1-2-3 0-1-2-3-4 0-1-2-4-5 0-1-2-5-6 0-1-2-6-7 "
        "8 2-6-8-9 10 4-8-10-11 12 6-10-12-13 14 0-8-12-14-15",
        51,
        51,
    ),
    "III": (
        "0 0-1 0-1-2 0-1-2-3 0-1-2-3-4 0-1-2-3-4-5 0-1-2-3-4-5-6 0-1-2-3-5-6-7 0-1-2-3-6-7-8 0-1-2-3-7-8-9 "
        "0-1-2-3-8-9-10 0-1-2-3-9-10-11 12 6-10-12-13 14 0-8-12-14-15",
        74,
        74,
    ),
}

# network -> parameters, #MAdds, #FLOPS as printed; ours is to round to the last two at two decimals (10^9)
NETWORKS = {
    "DenseNet121": ("7.97M", "2.88G", "2.88G", 5.74, 2.88),
    "DenseNet169": ("14.15M", "3.42G", "3.42G", 6.81, 3.42),
    "DenseNet201": ("20.01M", "8.70G", "4.37G", 8.70, 4.37),
    "DenseNet161": ("28.68M", "15.6G", "7.82G", 15.60, 7.82),
    "ResNet50": ("25.55M", "8.22G", "4.12G", 8.22, 4.12),
    "ResNet101": ("44.55M", "15.66G", "7.84G", 15.66, 7.84),
    "HarDNet68": ("17.57M", "8.51G", "4.26G", 8.51, 4.26),
    "ThresholdNet_v1": ("15.32M", "6.90G", "3.46G", 6.90, 3.46),
    "ThresholdNet_v2": ("17.14M", "8.12G", "4.07G", 8.12, 4.07),
    "ResNeXt50_32x4d": ("25.03M", "8.51G", "4.27G", 8.51, 4.27),
    "ResNeXt101_32x8d": ("88.79M", "3293", "16.49G", 32.93, 16.49),
    "Wide_ResNet50_2": ("68.88M", "22.85G", "11.43G", 22.85, 11.43),
    "Wide_ResNet101_2": ("126.89M", "45.58G", "22.81G", 45.58, 22.81),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Table]:
    return {name: table(name) for name in TABLES}


def records(source: Table) -> list[dict]:
    return [dict(zip(source.header, row, strict=True)) for row in source.rows]


def test_all_tables_are_there_and_rectangular(made):
    assert TABLES == ("I", "II", "III", "IV", "V", "VIII")
    for name, source in made.items():
        assert source.title.startswith(f"Table {name}. ")
        assert len(set(source.header)) == len(source.header)
        assert source.rows and {len(row) for row in source.rows} == {len(source.header)}
    with pytest.raises(FrozenInstanceError):
        made["I"].title = "other"


@pytest.mark.parametrize("name", LINKS)
def test_link_tables_hold_every_printed_row(made, name):
    printed, total, ours_total = LINKS[name]
    *rows, last = records(made[name])
    assert [row["paper"] for row in rows] == printed.split()
    assert [row["layer"] for row in rows] == list(range(1, 17))
    slips = [(row["layer"], row["ours"], row["difference"]) for row in rows if row["difference"] != "same"]
    assert slips == ([(6, "2-4-5", "+2")] if name == "I" else [])
    assert all((row["ours"] == row["paper"]) == (row["difference"] == "same") for row in rows)
    assert (last["layer"], last["paper"], last["ours"]) == ("total", total, ours_total)


def test_link_tables_name_the_slips_of_the_paper(made):
    assert "Row 6 is a slip of the paper: it prints 4-5, the rule gives 2-4-5." in made["I"].notes
    assert "The printed rows sum to 39 links; the paper's text says 38." in made["I"].notes
    assert len(made["II"].notes) == len(made["III"].notes) == 1


def test_architecture_comparison(made):
    first, second = records(made["IV"])
    assert (first["DenseNet (paper)"][:2], first["blocks 3, 4 (ours)"]) == ("24", "12 dense + 16 harmonic")
    assert (second["DenseNet (paper)"][:2], second["blocks 3, 4 (ours)"]) == ("32", "16 dense + 16 harmonic")
    # dense: L (L + 1) / 2 links; 16 harmonic layers: 31
    assert (first["DenseNet links"], first["our links"], first["depths"]) == (300, 78 + 31, "same")
    assert (second["DenseNet links"], second["our links"], second["depths"]) == (528, 136 + 31, "same")
    assert any("8 and 16" in note for note in made["IV"].notes)


def test_layers_of_v1_and_v2(made):
    rows = records(made["V"])
    sizes = [112, 112, 56, 56, 56, 28, 28, 28, 14, 14, 14, 14, 14, 7, 7, 7, 1, 1]
    assert [row["size (ours)"] for row in rows] == [f"{side}x{side}" for side in sizes]
    assert all(row["size (paper)"] in (None, row["size (ours)"]) for row in rows)
    blocks = [row for row in rows if row["layer"].startswith("Threshold Block")]
    assert [row["v1 (paper)"] for row in blocks] == [f"[3x3 conv] x {n}" for n in (6, 8, 12, 16, 4)]
    assert [row["v2 (paper)"] for row in blocks] == [f"[3x3 conv] x {n}" for n in (6, 12, 16, 16, 4)]
    assert [row["v1 (ours)"] for row in blocks] == [
        "[1x1, 3x3 conv] x 6, dense -> 256",
        "[1x1, 3x3 conv] x 8, dense -> 384",
        "[1x1, 3x3 conv] x 12, dense -> 576",
        "[3x3 conv] x 16, harmonic -> 654",
        "[3x3 conv] x 4, harmonic -> 782",
    ]
    assert [row["v2 (ours)"].split()[-1] for row in blocks] == ["256", "512", "768", "654", "782"]
    transitions = [row for row in rows if row["layer"].startswith("Transition") and "1x1" in row["v1 (ours)"]]
    assert [row["v1 (ours)"].split()[-1] for row in transitions] == ["128", "192", "288", "480", "960"]
    assert [row["v2 (ours)"].split()[-1] for row in transitions] == ["128", "256", "384", "480", "960"]


def test_plain_layers_would_give_the_parameters_that_the_note_says(made):
    for name, figure in {"thresholdnet_v1": "15,497,392", "thresholdnet_v2": "17,847,472"}.items():
        network = create_model(name, device="meta")
        total = sum(p.numel() for p in network.parameters())
        for stage in list(network.stages)[:3]:
            block = stage.block
            plain = ThresholdBlock(
                block.in_channels, block.links, 32, width_rule="constant", outputs="all", device="meta"
            )
            assert plain.out_channels == block.out_channels
            total += sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in block.parameters())
        assert any(figure in note for note in made["V"].notes) and f"{total:,}" == figure


def test_differences_from_the_papers_layers_are_named(made):
    named = {row["layer"]: row["difference"] for row in records(made["V"]) if row["difference"] != "same"}
    bottleneck = "bottleneck units, not plain 3x3"
    assert named == {
        "Threshold Block (1)": bottleneck,
        "Threshold Block (2)": bottleneck,
        "Threshold Block (3)": bottleneck,
        "Transition Layer (5)": "not in the paper's table",
        "Classification Layer": "softmax is left to the loss",
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_beside_the_papers(made, name):
    if name.startswith(("Res", "Wide")):
        pytest.importorskip("torchvision")
    parameters, madds, flops, our_madds, our_flops = NETWORKS[name]
    row = {record["network"]: record for record in records(made["VIII"])}[name]
    assert (row["#Params (paper)"], row["#MAdds (paper)"], row["#FLOPS (paper)"]) == (parameters, madds, flops)
    assert round(row["#MAdds (ours)"] / 1e9, 2) == our_madds
    assert round(row["#FLOPS (ours)"] / 1e9, 2) == our_flops
    assert abs(row["#Params (ours)"] / 1e6 - float(parameters[:-1])) < 0.01  # the paper cuts some, rounds others
    assert all(0.998 < row[f"{figure} ratio"] < 1.002 for figure in ("#Params", "#MAdds", "#FLOPS"))
    assert row["MACs (ours)"] < row["#FLOPS (ours)"]
    assert bool(row["note"]) == (name in ("DenseNet121", "DenseNet169", "ResNeXt101_32x8d"))


def test_table_viii_is_complete_and_its_depths_are_those_of_our_networks(made):
    rows = records(made["VIII"])
    assert [row["network"] for row in rows] == list(NETWORKS)
    for printed in tables.PRINTED_NETWORKS:
        if not printed.model.startswith(("res", "wide")):
            stages = create_model(printed.model, device="meta").stages
            assert ",".join(str(len(stage.block.links)) for stage in stages) == printed.depths
    v1 = next(row for row in rows if row["network"] == "ThresholdNet_v1")
    assert (v1["#FLOPS (ours)"], v1["#MAdds (ours)"]) == (3_458_096_690, 6_897_860_304)
    assert (v1["MACs (ours)"], v1["#Params (ours)"]) == (3_424_057_664, 15_323_248)


def test_without_torchvision_its_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    source = table("VIII")
    rows = records(source)
    without = {row["network"] for row in rows if row["#FLOPS (ours)"] is None}
    assert without == {name for name in NETWORKS if name.startswith(("Res", "Wide"))}
    assert all(row["note"].endswith("ours needs torchvision") for row in rows if row["network"] in without)
    assert sum("pip install torchvision" in note for note in source.notes) >= 1
    assert " - " in to_text(source)


@pytest.mark.parametrize("name", TABLES)
def test_json_and_csv_parse_back(made, name):
    source = made[name]
    parsed = json.loads(to_json(source))
    assert parsed["title"] == source.title
    assert tuple(parsed["header"]) == source.header
    assert tuple(map(tuple, parsed["rows"])) == source.rows
    assert tuple(parsed["notes"]) == source.notes
    header, *rows = csv.reader(io.StringIO(to_csv(source), newline=""))
    assert tuple(header) == source.header
    assert rows == [["" if cell is None else str(cell) for cell in row] for row in source.rows]


@pytest.mark.parametrize("name", TABLES)
def test_text_and_markdown_hold_every_cell(made, name):
    source = made[name]
    text, lines = to_text(source), to_markdown(source).splitlines()
    body = [line for line in lines if line.startswith("|")]
    assert [len(line.split(" | ")) for line in body] == [len(source.header)] * (len(source.rows) + 2)
    for row in source.rows:
        for cell in row:
            shown = "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell
            shown = f"{shown:.3f}" if isinstance(shown, float) else shown
            assert shown in text and any(shown in line for line in body)
    for note in source.notes:
        assert note in text and f"- {note}" in lines


def test_text_wraps_to_a_width_and_keeps_brackets(made):
    narrow = to_text(made["VIII"], width=120)
    assert max(map(len, narrow.splitlines())) <= 120
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow  # folded, nothing cut
    assert "[3x3 conv] x 16" in to_text(made["V"])


def test_markdown_escapes_the_bar_and_aligns_numbers():
    source = Table("T", ("a|b", "n"), (("x|y", 1234567), ("z", None)))
    assert to_markdown(source) == "**T**\n\n| a\\|b | n |\n| --- | ---: |\n| x\\|y | 1,234,567 |\n| z | - |\n"


def test_csv_quotes_what_needs_it():
    source = Table("T", ("a", "b"), (('say "hi", twice', 0.5),))
    assert to_csv(source) == 'a,b\n"say ""hi"", twice",0.5\n'


def test_formats_are_the_four():
    assert list(FORMATS) == ["text", "markdown", "csv", "json"]


def test_missing_rich_is_said_in_one_sentence(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.box", None)
    with pytest.raises(ImportError, match=r"text tables need rich: pip install 'thresholdnet\[cli\]'"):
        to_text(made["I"])


@pytest.mark.parametrize(("name", "error"), [("VI", ValueError), ("i", ValueError), ("", ValueError), (1, TypeError)])
def test_an_unknown_table_is_refused(name, error):
    with pytest.raises(error, match="table"):
        table(name)


def test_printed_results_say_what_the_text_says():
    """Rows of Tables VI and VII against each other: an epoch is 500 or 50 steps, and the text's 60, 20 and 10 %."""
    for part, steps, tolerance in (("VI", 500, 0.05), ("VII", 50, 0.2)):
        for row in tables.PRINTED_RESULTS[part]:
            assert row.epoch_s == pytest.approx(row.step_ms * steps / 1000, rel=tolerance), row
    cifar = {row.model: row for row in tables.PRINTED_RESULTS["VI"]}
    harder = cifar["hardnet68"]
    assert cifar["thresholdnet_v1"].step_ms / harder.step_ms == pytest.approx(1 - 0.175, abs=1e-3)
    assert cifar["thresholdnet_v2"].error / harder.error == pytest.approx(1 - 0.092, abs=1e-3)
    assert 1 - cifar["thresholdnet_v1"].step_ms / cifar["densenet121"].step_ms == pytest.approx(0.6, abs=0.01)
