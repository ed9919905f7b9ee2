"""The soft mixture in float64 PyTorch, differentiated by it: independent of the package."""

import numpy as np
import torch


def soft_moe(
    x: np.ndarray,
    phi: np.ndarray,
    w_down: np.ndarray,
    b_down: np.ndarray,
    w_up: np.ndarray,
    b_up: np.ndarray,
    *,
    cotangent: np.ndarray,
    mask: np.ndarray | None = None,
    normalize: bool = False,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output and the gradient of each argument."""
    arrays = (x, phi, w_down, b_down, w_up, b_up)
    given = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in arrays]
    tokens, slots, down, down_bias, up, up_bias = given
    scored = tokens
    if normalize:
        scored = tokens / torch.sqrt((tokens**2).sum(-1, keepdim=True) + 1e-6)
    logits = torch.einsum("bnd,dep->bnep", scored, slots)
    combine = torch.softmax(logits.flatten(2), dim=-1).reshape(logits.shape)
    if mask is None:
        dispatch = torch.softmax(logits, dim=1)
    else:
        valid = torch.tensor(mask)[:, :, None, None]
        combine = torch.where(valid, combine, 0.0)
        dispatch = torch.where(valid, logits, -torch.inf)
        # A clip without tokens has no softmax: its weights are zero.
        empty = ~torch.tensor(mask).any(dim=1)
        dispatch = torch.where(empty[:, None, None, None], 0.0, dispatch)
        dispatch = torch.where(valid, torch.softmax(dispatch, dim=1), 0.0)
    gathered = torch.einsum("bnep,bnd->bepd", dispatch, tokens)
    hidden = torch.einsum("bepd,edr->bepr", gathered, down) + down_bias[None, :, None]
    hidden = torch.nn.functional.gelu(hidden)
    outputs = torch.einsum("bepr,erd->bepd", hidden, up) + up_bias[None, :, None]
    out = torch.einsum("bnep,bepd->bnd", combine, outputs)
    out.backward(torch.tensor(np.asarray(cotangent, np.float64)))
    grads = [np.asarray(tensor.grad) for tensor in given]
    return out.detach().numpy(), grads
