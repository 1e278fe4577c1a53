"""The fused losses in float32 on rows that hypothesis makes up; skipped where hypothesis is not installed."""

import pytest
import torch

from tests.test_kernels import NAMES, assert_close, losses

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = pytest.importorskip("hypothesis.strategies")
given, settings, HealthCheck = hypothesis.given, hypothesis.settings, hypothesis.HealthCheck

SIZES = st.one_of(st.sampled_from([1, 2, 3, 127, 128, 129, 257]), st.integers(1, 300))
WIDTHS = st.one_of(st.sampled_from([1, 3, 96, 127, 128, 129, 257, 700]), st.integers(1, 700))
SHAPES = ["random", "identical", "opposite", "tiny", "huge", "mixed", "zero row", "clustered"]


def adversarial(shape, z):
    if shape == "identical":
        z = z[:1].expand_as(z) * 1
    elif shape == "opposite":
        z = z[:1] * torch.tensor([1.0, -1.0])[torch.arange(len(z)) % 2, None]
    elif shape == "tiny":
        z = z * 1e-9
    elif shape == "huge":
        z = z * 1e15
    elif shape == "mixed":
        z = z * torch.logspace(-6, 6, len(z))[:, None]
    elif shape == "zero row":
        z = torch.cat([z[:-1], z[:1] * 0])
    elif shape == "clustered":
        z = z[torch.arange(len(z)) % 3 % len(z)] + 1e-3 * z
    return z


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    m=SIZES,
    d=WIDTHS,
    t=st.sampled_from([0.001, 0.01, 0.0155, 0.0157, 0.07, 0.5, 10.0]),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
)
def test_float32_errs_by_rounding_alone(name, m, d, t, shape, seed):
    torch.manual_seed(seed)
    z1, z2 = adversarial(shape, torch.randn(2 * m, d)).chunk(2)
    ours, naive = losses("blocked", torch.randint(0, 1 + m // 2, (2 * m,)))[name]
    # The sum over rows that are equal up to the sign, which cancels, is rounded the same way at each step.
    ulps = 8 + (2 * m) ** 0.5 * (shape in ("identical", "opposite"))
    assert_close(lambda a, b: ours(a, b, t), lambda a, b: naive(a, b, t), [z1, z2], temperature=t, ulps=ulps)
