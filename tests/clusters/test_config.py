"""Options of a build: each one means something or is refused by name."""

import re
from dataclasses import replace

import pytest

from sparse_runtime.clusters import BuildConfig
from sparse_runtime.errors import ConfigError

PAPER = {"method": "awc-paper"}
UNIFORM = {"allocation": "uniform"}


@pytest.mark.parametrize(
    ("name", "value", "beside", "because"),
    [
        ("importance", "fisher", PAPER, "method 'awc-paper'"),
        ("importance", "norm", PAPER, "method 'awc-paper'"),
        ("allocation", "global", PAPER, "method 'awc-paper'"),
        ("verify", True, PAPER, "method 'awc-paper'"),
        ("distill", 5, PAPER, "method 'awc-paper'"),
        ("loop_weights", True, PAPER, "method 'awc-paper'"),
        ("cluster_bias", True, PAPER, "method 'awc-paper'"),
        ("router_rounds", 2, PAPER, "method 'awc-paper'"),
        ("clustering_tokens", 100, PAPER, "method 'awc-paper'"),
        ("fisher_tokens", 100, PAPER, "importance 'binary'"),
        ("verify", True, UNIFORM, "allocation 'uniform'"),
        ("distill", 5, UNIFORM, "allocation 'uniform'"),
        ("loop_weights", True, UNIFORM, "allocation 'uniform'"),
        ("distill", 5, {"cluster_bias": False}, "cluster_bias False"),
        ("correction_rank", 8, {"distill": 0}, "distill 0"),
        ("correction_rank", 8, UNIFORM, "distill 0"),
        ("fisher_tokens", 100, {"importance": "norm"}, "importance 'norm'"),
        ("percentile", 40.0, {}, "importance 'fisher'"),
        ("percentile", 40.0, {"importance": "norm"}, "importance 'norm'"),
        ("paper_init", "kmeans++", {}, "method 'awc'"),
        ("paper_pooled", True, {}, "method 'awc'"),
    ],
)
def test_an_option_without_effect_is_refused(name, value, beside, because):
    with pytest.raises(
        ConfigError, match=rf"^{name} is {re.escape(repr(value))}, .* with {because};"
    ):
        BuildConfig(**{name: value}, **beside)
    # The others alone are fine, and what they come to can be given back.
    settings = BuildConfig(**beside).resolved()
    assert getattr(settings, name) in (None, 0, False, "binary", "uniform")
    assert BuildConfig(**settings.record()).resolved() == settings


def test_what_follows_from_the_method():
    settings = BuildConfig().resolved()
    assert (settings.importance, settings.allocation, settings.fisher_tokens) == (
        "fisher", "global", 8192,
    )  # fmt: skip
    assert settings.verify is settings.loop_weights is settings.cluster_bias is True
    assert (settings.tune_tokens, settings.distill) == (16_384, 20)
    assert (settings.percentile, settings.paper_init) == (None, None)
    paper = BuildConfig(method="awc-paper").resolved()
    assert (paper.importance, paper.allocation, paper.percentile) == ("binary", "uniform", 50.0)
    assert paper.verify is paper.loop_weights is paper.cluster_bias is False
    assert (paper.distill, paper.router_rounds, paper.paper_init) == (0, 0, "random")
    assert BuildConfig(importance="binary").resolved().percentile == 50.0
    # Changing an option changes what follows from it.
    assert replace(BuildConfig(), method="awc-paper").resolved() == paper


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", True), ("budget", float("nan")), ("budget", "0.5"), ("weights", 6.0),
        ("verify", "no"), ("verify", 1), ("loop_weights", "yes"), ("save_centroids", 0),
        ("cluster_bias", "false"), ("paper_pooled", "no"), ("num_clusters", True),
        ("num_clusters", 8.0), ("distill", True), ("distill", float("inf")), ("seed", "0"),
        ("held_out_share", float("nan")), ("percentile", True), ("router", 16), ("method", None),
        ("importance", 3), ("max_tokens", 1e4), ("window", False),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is "):
        BuildConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", 0), ("budget", 1.01), ("num_clusters", 0), ("num_clusters", 20_000),
        ("window", 1), ("held_out_share", 1.0), ("distill", -1), ("percentile", 100),
        ("router", "0"), ("router", "wide"), ("seed", -1), ("seed", 2**32), ("seed", 2**70),
        ("max_tokens", 0), ("max_tokens", 511),
        ("method", "kmeans"), ("importance", "magnitude"), ("allocation", "some"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is {value!r}; expected"):
        BuildConfig(**{name: value})


def test_a_whole_number_is_a_budget():
    assert isinstance(BuildConfig(budget=1).budget, float)
