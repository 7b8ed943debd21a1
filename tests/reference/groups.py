"""Single groups through the writer op and back."""

import numpy as np
import torch
from reference import nvfp4_ref as ref
from reference.pools import make_pool, scalar

from vllm_xlayer import nvfp4, ops
from vllm_xlayer.nvfp4 import ScaleChoice, ScaleOrder


def write_groups(
    device: torch.device, groups: torch.Tensor, choice: ScaleChoice
) -> tuple[np.ndarray, np.ndarray]:
    """Write groups [G, 16] as K and their negatives as V; returns K's (nibbles [G, 16], scale codes [G])."""
    count = groups.shape[0]
    pool = make_pool(device, blocks=-(-count // 16), heads=1, head_size=16, layers=1, layer=0)
    key = groups.to(device).unsqueeze(1)
    slots, one = torch.arange(count, device=device), scalar(1.0, device)
    ops.reshape_and_cache_nvfp4(key, -key, pool.cache, slots, one, one, ScaleOrder.LINEAR, choice)
    views = nvfp4.page_views(pool.cache)
    data = views.k_data.flatten(0, 2)[:count].cpu().numpy()
    k_scale = views.k_scale.flatten()[:count].cpu().numpy()
    assert np.array_equal(k_scale, views.v_scale.flatten()[:count].cpu().numpy())
    return ref.unpacked(data), k_scale
