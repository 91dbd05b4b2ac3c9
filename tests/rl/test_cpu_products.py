"""Half-precision products by float32 units: exact where the sum is, torch's own elsewhere, and only where it pays."""

import pytest
import torch
from torch.nn import functional as F

from peft_onelayer.rl import cpu_products, use_float32_units
from peft_onelayer.runs.models import SMALL, to_device

BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
pytestmark = pytest.mark.skipif(not cpu_products.REPLACEABLE, reason="torch before 2.9")


@pytest.fixture
def replaced():
    cpu_products.replace_kernels()
    yield
    cpu_products.restore_kernels()


def whole(*shape, dtype=torch.bfloat16):
    """Whole numbers: their products and sums are exact in float32, in any order."""
    return torch.randint(-9, 10, shape).to(dtype).requires_grad_()


def products(x, w, bias, many, heads, one):
    """Products of x (n, k), w (m, k), bias (m), many (r, n, k), heads (r, k, j), one (1, k, j)."""
    same = one.expand(len(many), *one.shape[1:])
    return F.linear(x, w, bias), x @ w.T, torch.bmm(many, heads), torch.bmm(many, same), many @ heads[0]


def operands(rows, dtype):
    torch.manual_seed(0)
    shapes = ((rows, 33), (2500, 33), (2500,), (3, rows, 33), (3, 33, 6), (1, 33, 6))
    return [whole(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", cpu_products.HALVES)
@pytest.mark.parametrize("rows", [4, 64])
def test_products_are_those_of_float64_rounded_once(replaced, dtype, rows):
    given = operands(rows, dtype)
    exact = [t.detach().double() for t in given]
    for got, expected in zip(products(*given), products(*exact), strict=True):
        assert got.dtype is dtype and torch.equal(got, expected.to(dtype))
    grad = whole(rows, 2500, dtype=dtype)
    F.linear(*given[:3]).backward(grad)
    assert torch.equal(given[0].grad, (grad.double() @ exact[1]).to(dtype))
    assert torch.equal(given[1].grad, (grad.double().T @ exact[0]).to(dtype))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows_and_scaled_sums_are_torchs_own(replaced, rows):
    given = [torch.randn(t.shape).bfloat16() for t in operands(rows, torch.bfloat16)]
    many, w, added = torch.randn(8, 33).bfloat16(), given[1].T, given[2]

    def results():
        few = products(*given)[:4]  # the last joins the rows of all three
        return *few, torch.addmm(added, many, w, beta=0.5), torch.addmm(added, many, w, alpha=2)

    ours = results()
    cpu_products.restore_kernels()
    assert all(torch.equal(a, b) for a, b in zip(ours, results(), strict=True))


def test_large_operands_are_copied_in_parts(replaced, monkeypatch):
    monkeypatch.setattr(cpu_products, "LARGEST", 7 * 33)
    x, w, bias = whole(20, 33), whole(50, 33), whole(50)
    copies = []
    own = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: copies.append(t.numel()) or own(t))
    got = F.linear(x, w, bias)
    monkeypatch.undo()
    assert torch.equal(got, F.linear(x.double(), w.double(), bias.double()).bfloat16())
    assert len(copies) > 20 and max(copies) == 7 * 33


def test_empty_products(replaced):
    assert torch.equal(whole(8, 0) @ whole(0, 3), torch.zeros(8, 3).bfloat16())
    assert torch.equal(torch.bmm(whole(2, 8, 0), whole(2, 0, 3)), torch.zeros(2, 8, 3).bfloat16())
    assert torch.bmm(whole(0, 8, 5), whole(1, 5, 3).expand(0, 5, 3)).shape == (0, 8, 3)


REFUSED = [
    lambda x, w, bias: x @ w.detach().float(),
    lambda x, w, bias: x.half() @ w,
    lambda x, w, bias: F.linear(x, w.detach().float().T),
    lambda x, w, bias: F.linear(x, w.T, bias.detach().float()),
    lambda x, w, bias: torch.addmm(bias, x, w.half()),
    lambda x, w, bias: torch.mm(x[:, 0], w),
    lambda x, w, bias: torch.mm(x, w[0]),
    lambda x, w, bias: torch.mm(x, w[:4, :0]),
    lambda x, w, bias: torch.addmm(bias[:2], x, w),
    lambda x, w, bias: torch.bmm(x[None], w[None].half()),
    lambda x, w, bias: torch.bmm(x.expand(2, 8, 5), w.expand(3, 5, 3)),
    lambda x, w, bias: torch.bmm(x.expand(2, 8, 5), w[:4].expand(2, 4, 3)),
]


def test_what_torch_refuses_it_refuses_in_the_same_words(replaced):
    def errors():
        given = whole(8, 5), whole(5, 3), whole(3)
        for product in REFUSED:
            with pytest.raises(RuntimeError) as error:
                product(*given)
            yield str(error.value)

    ours = list(errors())
    cpu_products.restore_kernels()
    assert ours == list(errors())


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_attention_is_that_of_float32_rounded_once(replaced, masked):
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, 20, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    mask = torch.ones(2, 1, 20, 20).tril().log().bfloat16() if masked else None
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, scales = forward(q.detach(), k.detach(), v.detach(), 0.0, not masked, attn_mask=mask)
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked).backward(grad)
    half = (grad.detach(), q.detach(), k.detach(), v.detach(), out)
    mask = None if mask is None else mask.float()
    expected = BACKWARD(*(t.float() for t in half), scales, 0.0, not masked, attn_mask=mask)
    for tensor, gradient in zip((q, k, v), expected, strict=True):
        assert torch.equal(tensor.grad, gradient.bfloat16())


def test_float32_is_untouched_and_torchs_kernels_come_back():
    def results():
        torch.manual_seed(0)
        return [
            torch.randn(64, 333, dtype=dtype) @ torch.randn(333, 77, dtype=dtype)
            for dtype in (torch.float32, torch.float64, torch.bfloat16)
        ]

    before = results()
    cpu_products.replace_kernels()
    during = results()
    cpu_products.restore_kernels()
    assert all(torch.equal(a, b) for a, b in zip(before, results(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[:2], during[:2], strict=True))


def test_only_where_the_cpu_lacks_the_instructions(monkeypatch):
    replacements = []
    monkeypatch.setattr(cpu_products, "replace_kernels", lambda: replacements.append(1))
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for supported in (True, False):
            monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda it=supported: it)
            assert use_float32_units(dtype) is not supported
    assert not use_float32_units(torch.float32) and len(replacements) == 2


class Model(torch.nn.Linear):
    dtype, device = torch.bfloat16, torch.device("cpu")


def test_for_a_model_large_enough(monkeypatch):
    used = []
    monkeypatch.setattr("peft_onelayer.runs.models.use_float32_units", used.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    for parameters in (SMALL // 2, 2 * SMALL):
        to_device(Model(1, parameters // 2, dtype=torch.bfloat16, device="meta"))
    assert used == [torch.bfloat16]
