"""The soft mixture in float64 PyTorch, differentiated by it: independent of everything of ours."""

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
    read = torch.softmax(logits.flatten(2), dim=-1).reshape(logits.shape)
    if mask is None:
        sent = torch.softmax(logits, dim=1)
    else:
        seen = torch.tensor(mask)[:, :, None, None]
        read = torch.where(seen, read, 0.0)
        sent = torch.where(seen, logits, -torch.inf)
        # A clip without tokens has no softmax; its weights are zero.
        empty = ~torch.tensor(mask).any(dim=1)
        sent = torch.where(empty[:, None, None, None], 0.0, sent)
        sent = torch.where(seen, torch.softmax(sent, dim=1), 0.0)
    inside = torch.einsum("bnep,bnd->bepd", sent, tokens)
    hidden = torch.einsum("bepd,edr->bepr", inside, down) + down_bias[None, :, None]
    hidden = torch.nn.functional.gelu(hidden)
    outputs = torch.einsum("bepr,erd->bepd", hidden, up) + up_bias[None, :, None]
    out = torch.einsum("bnep,bepd->bnd", read, outputs)
    out.backward(torch.tensor(np.asarray(cotangent, np.float64)))
    grads = [np.asarray(tensor.grad) for tensor in given]
    return out.detach().numpy(), grads
