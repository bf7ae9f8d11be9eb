"""SPEC section 1: the paper's printed tables row by row, the totals, validation."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresholdnet import links

# Tables I, II and III of arXiv 2108.12604 as printed, and HarDNet's own rule.
TABLE_I = """0 0-1 0-1-2 0-1-2-3 4 4-5 6 0-4-6-7 8 2-6-8-9 10 4-8-10-11 12 6-10-12-13 14 0-8-12-14-15"""
TABLE_II = """0 0-1 0-1-2 0-1-2-3 0-1-2-3-4 0-1-2-4-5 0-1-2-5-6 0-1-2-6-7 8 2-6-8-9 10 4-8-10-11 12 6-10-12-13 14
0-8-12-14-15"""
TABLE_III = """0 0-1 0-1-2 0-1-2-3 0-1-2-3-4 0-1-2-3-4-5 0-1-2-3-4-5-6 0-1-2-3-5-6-7 0-1-2-3-6-7-8 0-1-2-3-7-8-9
0-1-2-3-8-9-10 0-1-2-3-9-10-11 12 6-10-12-13 14 0-8-12-14-15"""
HARMONIC = """0 0-1 2 0-2-3 4 4-5 6 0-4-6-7 8 8-9 10 8-10-11 12 12-13 14 0-8-12-14-15"""


def _rows(links_):
    return [text for _, text in links_.rows()]


def test_table_ii_and_iii_are_threshold_bc():
    assert _rows(links.threshold_bc(16, 8)) == TABLE_II.split()
    assert _rows(links.threshold_bc(16, 12)) == TABLE_III.split()


def test_table_i_is_threshold_ab_but_for_the_slip_in_row_6():
    ours, printed = _rows(links.threshold_ab(16, 4)), TABLE_I.split()
    assert [i for i in range(16) if ours[i] != printed[i]] == [5]
    assert (printed[5], ours[5]) == ("4-5", "2-4-5")  # the paper's slip: its own rule gives 2-4-5


def test_printed_totals():
    printed = [sum(row.count("-") + 1 for row in table.split()) for table in (TABLE_I, TABLE_II, TABLE_III)]
    assert printed == [39, 51, 74]  # the paper's text says 38, 51, 74


def test_harmonic_column():
    assert _rows(links.harmonic(16)) == HARMONIC.split()


@pytest.mark.parametrize(
    ("pattern", "arguments", "total"),
    [
        ("dense", {}, 136),
        ("log_dense", {}, 54),
        ("even_log", {}, 37),
        ("harmonic", {}, 31),
        ("sparse_dense", {"n": 1}, 45),
        ("sparse_dense", {"n": 2}, 70),
        ("sparse_dense", {"n": 3}, 91),
        *(("threshold_ab", {"threshold": t}, n) for t, n in ((4, 40), (8, 57), (12, 89))),
        *(("threshold_ab", {"threshold": t, "above": "harmonic"}, n) for t, n in ((4, 34), (8, 52), (12, 87))),
        *(("threshold_bc", {"threshold": t}, n) for t, n in ((4, 39), (8, 51), (12, 74))),
        *(("threshold_bc", {"threshold": t, "above": "harmonic"}, n) for t, n in ((4, 33), (8, 46), (12, 72))),
    ],
)
def test_totals_of_16_layers(pattern, arguments, total):
    made = links.make(pattern, 16, **arguments)
    assert made.total == total
    assert made.pattern == pattern


@pytest.mark.parametrize("layers", [1, 2, 5, 31, 64])
def test_rules_as_the_spec_words_them(layers):
    powers = [2**n for n in range(12)]
    for i in range(1, layers + 1):
        assert set(links.dense(layers)[i - 1]) == set(range(i))
        assert set(links.log_dense(layers)[i - 1]) == {i - p for p in powers if p <= i}
        assert set(links.harmonic(layers)[i - 1]) == {i - p for p in powers if i % p == 0}
        assert set(links.even_log(layers)[i - 1]) == ({i - 1} if i % 2 else {i - p for p in powers if p <= i})
        for n in (1, 2, 7):
            assert set(links.sparse_dense(layers, n)[i - 1]) == {k for k in range(i) if k <= n or k >= i - n}


def test_order_of_sources():
    assert links.dense(4)[3] == (0, 1, 2, 3)
    assert links.sparse_dense(8, 2)[7] == (0, 1, 2, 6, 7)
    assert links.harmonic(8)[7] == (7, 6, 4, 0)
    assert links.even_log(10)[9] == (9, 8, 6, 2)
    assert links.log_dense(7)[6] == (6, 5, 3)
    assert links.threshold_ab(10, 4)[3] == (0, 1, 2, 3)
    assert links.threshold_ab(10, 4)[9] == (9, 8, 6, 2)


def test_the_layer_at_the_threshold_is_on_the_dense_side():
    assert links.threshold_ab(8, 5)[4] == (0, 1, 2, 3, 4)
    assert links.threshold_ab(8, 5)[6] == (6,)


def test_threshold_beyond_the_last_layer_is_dense_and_zero_is_the_sparse_rule():
    assert links.threshold_ab(4, 8) == links.dense(4)
    assert links.threshold_ab(16, 0) == links.even_log(16)
    assert links.threshold_ab(16, 0, above="harmonic") == links.harmonic(16)


def test_links_behave_as_the_plain_tuple_and_keep_their_name():
    made = links.threshold_bc(9, 4)
    plain = tuple(made)
    assert made == plain and hash(made) == hash(plain) and type(plain) is tuple
    for copied in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied == made
        assert (copied.pattern, copied.threshold) == ("threshold_bc", 4)


def test_custom_links():
    made = links.custom([[0], [0, 1], (2, 0)])
    assert made == ((0,), (0, 1), (2, 0))
    assert (made.pattern, made.threshold) == ("custom", 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: links.custom([(0,), (2,)]),
            ValueError,
            "source of layer 2 must be a node from 0 to 1, got 2",
        ),
        (
            lambda: links.custom([(0,), (-1,)]),
            ValueError,
            "source of layer 2 must be a node from 0 to 1, got -1",
        ),
        (lambda: links.custom([(1,)]), ValueError, "source of layer 1 must be a node from 0 to 0, got 1"),
        (lambda: links.custom([(0,), (0, 0)]), ValueError, "must name each source once"),
        (lambda: links.custom([(0,), ()]), ValueError, "layer 2 must name at least one source"),
        (lambda: links.custom([]), ValueError, "from 1 to 1024 layers, got 0"),
        (lambda: links.custom([(0,), (0.0,)]), TypeError, "source of layer 2 must be an integer, got 0.0"),
        (lambda: links.custom([(0,), "01"]), TypeError, "links of layer 2 must be a sequence"),
        (lambda: links.custom(7), TypeError, "links must be a sequence of source tuples"),
        (lambda: links.dense(0), ValueError, "layers must be from 1 to 1024, got 0"),
        (lambda: links.dense(10**9), ValueError, "layers must be from 1 to 1024"),
        (lambda: links.dense(True), TypeError, "layers must be an integer, got True"),
        (lambda: links.dense(4.0), TypeError, "layers must be an integer, got 4.0"),
        (lambda: links.threshold_ab(16, -1), ValueError, "threshold must be at least 0, got -1"),
        (lambda: links.threshold_bc(16, "8"), TypeError, "threshold must be an integer, got '8'"),
        (lambda: links.threshold_ab(16, 8, above="harmonics"), ValueError, "did you mean harmonic"),
        (lambda: links.sparse_dense(16, 0), ValueError, "n must be at least 1, got 0"),
        (lambda: links.make("sparse_dense", 16), ValueError, "n is required by the pattern sparse_dense"),
        (lambda: links.make("treshold_ab", 16), ValueError, "did you mean threshold_ab"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


@given(st.integers(1, 80), st.integers(0, 100), st.sampled_from(["even_log", "harmonic"]))
def test_every_pattern_validates_and_reads_the_node_before(layers, threshold, above):
    for made in (links.threshold_ab(layers, threshold, above), links.threshold_bc(layers, threshold, above)):
        assert links.custom(tuple(made)) == made
        assert all(i - 1 in row for i, row in enumerate(made, start=1))
