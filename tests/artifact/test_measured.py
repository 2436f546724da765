"""What measured cuts promise of budgets and losses between them."""

import dataclasses

import pytest
from helpers import measured_cuts

from sparse_runtime.artifact.measured import MeasuredCut, MeasuredCuts
from sparse_runtime.errors import ConfigError

CUTS = measured_cuts((0.3, 0.34, 0.4), (0.5, 0.52, 0.1), (0.7, 0.69, 0.02))


def test_a_cut_promises_its_mean_share_and_no_domain_far_above_it():
    assert MeasuredCut(0.5, (0.50, 0.51)).promised == pytest.approx(0.505)
    assert MeasuredCut(0.5, (0.40, 0.51)).promised == pytest.approx(0.50)


def test_aims_lie_between_those_of_measured_cuts():
    for cut in CUTS.cuts:
        assert CUTS.aim_for(cut.promised) == pytest.approx(cut.aim)
    assert CUTS.aim_for(0.0) == 0
    assert CUTS.aim_for(1.0) == 1
    assert CUTS.aim_for(0.175) == pytest.approx(0.15)
    # All neurons in planes read less than floats would.
    assert CUTS.aim_for(0.75, whole=0.8) == pytest.approx(0.75)
    assert CUTS.aim_for(0.9, whole=0.8) == 0.9
    aims = [CUTS.aim_for(i / 100) for i in range(101)]
    assert aims == sorted(aims)
    assert MeasuredCuts((), ()).aim_for(0.4) == 0.4


@pytest.mark.parametrize("excess", [-0.03, 0.0, 0.02])
def test_formats_before_5_keep_their_aims(excess):
    measured = MeasuredCuts.from_excess(excess) or MeasuredCuts((), ())
    for budget in (0.01, 0.1, 0.25, 0.3, 0.5, 0.8, 0.99, 1.0):
        aim = budget - excess * min(1.0, 2 * (1 - budget), 4 * budget)
        assert measured.aim_for(budget) == pytest.approx(aim)
    with pytest.raises(ConfigError, match="before format 5"):
        measured.budget_for(0.1)


def test_a_new_cut_counts_before_those_that_contradict_it():
    assert CUTS.with_cut(MeasuredCut(0.51, (0.5, 0.5))).cuts[1:2] == (
        MeasuredCut(0.51, (0.5, 0.5)),
    )
    assert len(CUTS.with_cut(MeasuredCut(0.51, (0.5, 0.5))).cuts) == 3
    assert len(CUTS.with_cut(MeasuredCut(0.6, (0.6, 0.6))).cuts) == 4
    again = CUTS.with_cut(dataclasses.replace(CUTS.cuts[0], shares=(0.3, 0.3)))
    assert again.cuts[0].shares == (0.3, 0.3)
    assert len(again.cuts) == 3


def test_a_loss_gives_the_budget_of_the_worst_domain():
    prose, code = CUTS.budget_for(0.1, "prose"), CUTS.budget_for(0.2)
    assert prose.budget == code.budget == pytest.approx(CUTS.cuts[1].promised)
    assert (prose.domain, code.domain) == ("prose", "code")
    assert prose.interval == pytest.approx((0.1 - 0.0196, 0.1 + 0.0196))
    # In the middle of the way the loss is the geometric mean.
    between = CUTS.budget_for(0.2, "prose")
    assert between.budget == pytest.approx((CUTS.cuts[0].promised + CUTS.cuts[1].promised) / 2)
    # More than anything that was measured has lost: the smallest of these, which is known.
    assert CUTS.budget_for(9.0, "prose").budget == CUTS.cuts[0].promised
    assert CUTS.budget_for(9.0, "prose").kl == 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.01,), r"0\.01.*least loss that was measured on 'prose' is 0\.0200, at budget 0\.70"),
        ((0.1, "verse"), "no domain 'verse'; expected one of 'prose', 'code'"),
        ((float("nan"),), "max_loss is nan"),
        (("x",), "max_loss is 'x'"),
    ],
)
def test_losses_that_were_not_measured(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CUTS.budget_for(*arguments)


def test_is_what_its_record_says():
    assert MeasuredCuts.is_record(CUTS.record())
    assert MeasuredCuts.from_record(CUTS.record()) == CUTS
