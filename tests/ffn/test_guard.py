"""Prompts that clusters do not fit are answered dense, each sequence by itself."""

import copy
import pickle

import pytest
import torch
from helpers import audited, random_cluster_set

from sparse_runtime import cost_report, dense, reset_cost, sparse_modules, sparsify, unsparsify
from sparse_runtime.artifact.measured import AuditLevels, MeasuredCut, MeasuredCuts, audited_layers
from sparse_runtime.ffn.guard import Guard, dense_rows

ONE, OTHER = torch.randint(0, 250, (2, 1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(tiny_model):
    """The tiny model, sparse, with a build's levels; its guard."""
    clusters = random_cluster_set(tiny_model, 0.5)
    tiny_model.generation_config.eos_token_id = None

    def call(error, **options):
        clusters.measured = audited(error)
        sparsify(tiny_model, clusters, backend="reference", **options)
        return tiny_model, sparse_modules(tiny_model)[0].state.guard

    return call


def generated(model, *prompts, **options):
    ids = torch.cat(prompts)
    options = {"attention_mask": torch.ones_like(ids), **options}
    reset_cost(model)
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    return found[:, ids.shape[1] :]


def scores_of(model, guard, *prompts, **options):
    with torch.no_grad():
        model(torch.cat(prompts), **options)
    return guard.scores


@pytest.mark.filterwarnings("ignore:a prompt is decoded by all neurons")
def test_a_prompt_above_the_limit_decodes_dense(make):
    model, guard = make(1e-12)
    found = generated(model, ONE)
    report = cost_report(model)
    assert report.dense_reasons == {"long call": 24 * 3, "guard": 5 * 3}
    assert (report.sparse_tokens, guard.audited, guard.dense) == (0, 1, 1)
    assert (report.audited_prompts, report.guarded_prompts) == (1, 1)
    assert str(report).endswith("; 1 of 1 audited prompts decode dense")
    reset_cost(model)
    assert cost_report(model).audited_prompts == 0
    with dense(model):
        assert torch.equal(found, generated(model, ONE))
    assert guard.audited == 0


def test_it_is_said_once(make, recwarn):
    model, _ = make(1e-12)
    for _ in range(2):
        generated(model, ONE)
    said = [w for w in recwarn if "decoded by all neurons" in str(w.message)]
    assert len(said) == 1
    assert "and 1.25 is the limit" in str(said[0].message)


def test_a_prompt_at_the_level_decodes_sparse(make):
    model, guard = make(1e6)
    found = generated(model, ONE)
    assert (guard.audited, guard.dense) == (1, 0)
    report = cost_report(model)
    assert report.dense_reasons == {"long call": 24 * 3}
    assert report.sparse_tokens == 5 * 3
    unsparsify(model)
    make(1e6, guard=False)
    assert sparse_modules(model)[0].state.guard is None
    assert torch.equal(found, generated(model, ONE))
    # Audits are counted apart.
    assert cost_report(model).sparse_bytes == report.sparse_bytes


@pytest.mark.filterwarnings("ignore:a prompt is decoded by all neurons")
def test_sequences_of_a_batch_do_not_touch_each_other(make):
    model, guard = make(1.0)
    each = [scores_of(model, guard, prompt)[0] for prompt in (ONE, OTHER)]
    together = scores_of(model, guard, ONE, OTHER)
    assert together == pytest.approx(each, rel=1e-4)
    # A level between the two: one of them is above the limit.
    unsparsify(model)
    model, guard = make(sum(each) / 2 / 1.25)
    alone, counts = [], []
    for prompt in (ONE, OTHER):
        alone.append(generated(model, prompt))
        counts.append((guard.audited, guard.dense))
    assert sorted(counts) == [(1, 0), (1, 1)]
    assert torch.equal(generated(model, ONE, OTHER), torch.cat(alone))
    report = cost_report(model)
    assert report.dense_reasons == {"long call": 48 * 3, "guard": 5 * 3}
    assert report.sparse_tokens == 5 * 3


def test_padding_is_not_audited(make):
    model, guard = make(1.0)
    plain = scores_of(model, guard, ONE)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.int64), ONE], 1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.int64), torch.ones_like(ONE)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = scores_of(model, guard, padded, attention_mask=mask, position_ids=positions)
    assert found == pytest.approx(plain, rel=1e-4)


@pytest.mark.filterwarnings("ignore:a prompt is decoded by all neurons")
def test_the_choice_goes_where_the_cache_goes(make):
    model, _ = make(1e-12)
    with torch.no_grad():
        cache = model(ONE, use_cache=True).past_key_values
        assert dense_rows(cache) == dense_rows(copy.deepcopy(cache)) == (True,)
        other = make_copy(model)
        reset_cost(other)
        other(ONE[:, :1], past_key_values=copy.deepcopy(cache))
        assert cost_report(other).dense_reasons == {"guard": 3}
        # Of another sequence, nothing is known.
        other(ONE[:, :1], use_cache=True)
    assert cost_report(other).sparse_tokens == 3


def make_copy(model):
    other = copy.deepcopy(model)
    guard = sparse_modules(other)[0].state.guard
    assert guard is not sparse_modules(model)[0].state.guard
    before = guard.audited
    with torch.no_grad():
        other(ONE)
    assert guard.audited == before + 1
    return other


@pytest.mark.filterwarnings("ignore:a prompt is decoded by all neurons")
def test_a_step_that_fails_leaves_nothing_dense(make):
    model, _ = make(1e-12)
    with torch.no_grad():
        cache = model(ONE, use_cache=True).past_key_values
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ONE[:, :1], past_key_values=cache)
        handle.remove()
        reset_cost(model)
        model(ONE[:, :1])
    assert cost_report(model).dense_reasons == {}


@pytest.mark.parametrize(
    "of", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_nothing_is_left_of_it(make, of):
    model = of(make(1.0)[0])
    assert model.model._forward_hooks
    unsparsify(model)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_the_limit_leaves_room_where_a_build_had_few_windows():
    for spread, limit in ((0.0, 1.25), (0.02, 1.25), (0.2, 1.5)):
        assert Guard(AuditLevels({0: 1.0}, spread), None).limit == limit


def test_short_prompts_are_not_audited(make):
    model, guard = make(1e-12)
    generated(model, ONE[:, :7])
    assert guard.audited == 0
    assert "guard" not in cost_report(model).dense_reasons


def test_levels_lie_between_those_of_cuts():
    cuts = MeasuredCuts(("text",), (64,))
    for share, error in ((0.4, 4.0), (0.6, 1.0)):
        levels = AuditLevels({1: error, 5: error}, error / 10)
        cuts = cuts.with_cut(MeasuredCut(share, (share,), (0.1,), (0.1,), levels))
    assert cuts.audit_for(0.5, verified=True).errors == pytest.approx({1: 2.0, 5: 2.0})
    assert cuts.audit_for(0.1, verified=True).errors == {1: 4.0, 5: 4.0}
    assert cuts.audit_for(0.9, verified=True).errors == {1: 1.0, 5: 1.0}
    assert cuts.audit_for(0.5, verified=False) is None
    assert cuts.without_audits().audit_for(0.5, verified=True) is None
    assert MeasuredCuts.from_record(cuts.record()) == cuts
    turned = AuditLevels({5: 0.3, 1: 0.2}, 0.1)
    record = MeasuredCuts(("text",), (64,), (MeasuredCut(0.5, (0.5,), audit=turned),)).record()
    assert record["cuts"][0]["audit"]["layers"] == [1, 5]
    assert MeasuredCuts.is_record(record)
    assert audited_layers([4, 2, 9]) == (2, 4, 9)
    assert len(audited_layers(range(30))) == 8
