"""The check of nvfp4_paged_attention's results against float64 attention on the dequantised pages."""

import torch
from reference import attention_ref as ref
from reference import nvfp4_ref as ref4
from reference.attention_batches import Batch, keys_of, make_batch
from reference.attention_cases import TILE, Case

LSE_ERROR = 1e-3
FLOAT32_ERROR = 1e-6  # relative: an LSE in the tens of thousands is a float32, too


def rounding(dtype: torch.dtype, exact: torch.Tensor) -> float:
    """The error of rounding a result once."""
    info = torch.finfo(dtype)
    return max(info.eps / 2 * float(exact.abs().max()), info.smallest_normal * info.eps / 2)


def assert_accurate(
    what: str, got: torch.Tensor, exact: torch.Tensor, plain: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """flash-attention's rule: at most twice the error of plain PyTorch in the dtype, and one rounding.

    Plain PyTorch may be asked in several ways, of which the worst counts. A NaN must be where the exact
    result has one, and only there. Plain PyTorch may spread one further (some matrix products do): its error
    counts where it has a number.
    """
    nan = exact.isnan()
    assert torch.equal(got.isnan(), nan), f"{what}: NaN at {(got.isnan() != nan).nonzero()[:5].tolist()}"
    if nan.all():
        return
    finite = ~nan
    error = float((got[finite].double() - exact[finite]).abs().max())
    plain_errors = [(way.double() - exact)[finite & way.isfinite()].abs() for way in plain]
    allowed = 2 * max(float(errors.max()) if errors.numel() else 0.0 for errors in plain_errors)
    allowed += rounding(dtype, exact[finite])
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def assert_lse(what: str, got: torch.Tensor, exact: torch.Tensor, query_error: float = 0.0) -> None:
    bounds = {"rtol": FLOAT32_ERROR, "atol": LSE_ERROR + query_error, "equal_nan": True}
    torch.testing.assert_close(got.double(), exact, **bounds, msg=lambda m: f"{what}, LSE: {m}")


def check_batch(batch: Batch, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compares a batch's results, request by request, with float64 attention."""
    c, dtype = batch.case, batch.q.dtype
    k_pool, v_pool = batch.dequantised()
    q, table = batch.q.cpu(), batch.block_table.cpu().long()
    sinks = None if batch.sinks is None else batch.sinks.cpu()
    softmax = ref.Softmax(c.softmax_scale, c.window, c.soft_cap, sinks, c.sees_all)
    for r, length in enumerate(batch.seq_lens.tolist()):
        rows = c.rows(r)
        if rows.start == rows.stop:
            continue
        tokens = torch.arange(c.first_seen(r), length)
        blocks = table[r, tokens // c.block_size]
        k, v = k_pool[blocks, tokens % c.block_size], v_pool[blocks, tokens % c.block_size]
        if batch.newest is not None:
            newest = tokens // TILE * TILE >= batch.newest_from[r].item()
            if newest.any():
                memory = batch.newest.cpu()[int(batch.newest_rows[r])].double()
                kept, v[newest] = memory[:, :, tokens[newest] % c.newest].transpose(1, 2)
                k[newest] = keys_of(c, kept)
        exact, exact_lse = ref.attention(q[rows], k, v, softmax)
        given = as_given_to_products(c, q[rows], k)
        plain = [ref.attention_in(dtype, *given, v, softmax)]
        if (
            c.rotated_keys
        ):  # as they come, queries fit fp16; the roundings that plain adds may cancel this one
            plain.append(ref.attention(given[0].half().double(), given[1], v, softmax)[0])
        what = f"request {r} of {length} tokens in {c}"
        assert_accurate(what, out[rows], exact, plain, dtype)
        assert_lse(what, lse[:, rows], exact_lse, rotated_query_error(c, q[rows], k))


def as_given_to_products(case: Case, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K that plain PyTorch has to multiply: both rotated where K is kept so, float64."""
    if not case.rotated_keys:
        return q, k
    kept, back = (torch.from_numpy(m(case.head_size)) for m in (ref4.kept_keys, ref4.keys_from_kept))
    return q.double() @ back.T, k @ kept


def rotated_query_error(case: Case, q: torch.Tensor, k: torch.Tensor) -> float:
    """The most that rounding rotated queries to fp16 can change a score by. As they come, they fit fp16."""
    if not case.rotated_keys or not len(k):
        return 0.0
    rotated, kept = as_given_to_products(case, q, k)
    rotated = rotated.unflatten(1, (case.kv_heads, -1)).abs()
    most = torch.einsum("ihgd,nhd->ihgn", rotated, kept.abs().nan_to_num(0.0)).nan_to_num(0.0).amax()
    return float(most) * case.softmax_scale * 2.0**-12


def check_case(case: Case, device: torch.device) -> None:
    batch = make_batch(case, device)
    check_batch(batch, *batch.run())


def check_one_newest(batch: Batch) -> None:
    """Of a batch of one token, which is among the newest: the output is its V, bit for bit."""
    newest_from = batch.newest_from
    assert batch.case.lengths == (1,) and newest_from is not None and int(newest_from[0]) == 0
    values = batch.newest[int(batch.newest_rows[0]), 1, :, 0].cpu()
    out, _ = batch.run()
    assert torch.equal(out[0], values.repeat_interleave(batch.case.group, 0))
