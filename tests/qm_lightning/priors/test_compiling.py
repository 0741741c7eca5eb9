"""Shapes of a compiled prior come from few buckets, and its outputs stay what they were."""

import copy

import pytest
import torch
from prior_cases import make_merged
from torch import nn
from torch._dynamo.testing import CompileCounter

from qm_lightning.modules.compiling import CompileOptions, call_in_buckets, compile_in_place, in_buckets
from qm_lightning.priors import ARPrior


def test_buckets_bound_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, but run eagerly: no compiler is needed."""
    counter, plain = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: plain(self, backend=counter, **kw))
    torch.compiler.reset()
    torch.manual_seed(0)
    prior = ARPrior(12, 7, dim=16, depth=1, heads=2).eval()
    compiled = copy.deepcopy(prior)
    options = CompileOptions(prior=True, bucket=8)
    compile_in_place(compiled, nn.Identity(), options)

    def graphs(lengths: range, targets: int) -> int:
        before = counter.frame_count
        for K in lengths:
            merged = make_merged([K, K - 3])
            ids = torch.randint(0, 7, (2, targets))
            ids[1, 1:] = -100
            for part in (merged, in_buckets(merged, 8)):
                torch.testing.assert_close(
                    call_in_buckets(compiled, part, ids, options)[1].logits,
                    prior(merged, ids).logits,
                    rtol=0,
                    atol=1e-5,
                )
        return int(counter.frame_count - before)

    one = graphs(range(5, 9), 3)
    assert one > 0
    assert graphs(range(5, 9), 5) == 0  # the same buckets
    assert graphs(range(9, 17), 8) == one
    assert graphs(range(9, 17), 9) == one
