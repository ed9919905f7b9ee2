"""Where the papers' code starts: the head, and the positions (`as_published=True`)."""

from flax import nnx
from jax.nn.initializers import Initializer, normal

from aatjax import surgery
from aatjax.models.ast import AST
from aatjax.petl.base import zero_positions
from aatjax.petl.bottleneck import make_uniform


def start_as_petl(model: AST, *, rngs: nnx.Rngs) -> None:
    """Start a model as the code of arXiv 2312.03694 and 2402.00828 does, in place.

    Zero positions (`zero_positions`), and a head whose weight and bias are PyTorch's default,
    U(-1/sqrt(D), 1/sqrt(D)), whatever head the model had.
    """
    zero_positions(model)
    _start_head(model, make_uniform(model.config.dim), rngs)


def start_as_aat(model: AST, *, rngs: nnx.Rngs) -> None:
    """Start the head as AAT's code does (arXiv 2401.10544), in place, whatever it was.

    The weight of its linear layer from a normal of standard deviation 0.01 (the code truncates it
    at 2, 200 deviations away), the bias PyTorch's default, U(-1/sqrt(D), 1/sqrt(D)): the branches
    of that code for AudioSet and SSAST weights. (Its branch for ImageNet weights alone draws
    another tensor by mistake and leaves this weight uniform.)
    """
    _start_head(model, normal(0.01), rngs)


def _start_head(model: AST, weight: Initializer, rngs: nnx.Rngs) -> None:
    values = surgery.variables(model.head)
    for path, draw in (("linear/kernel", weight), ("linear/bias", make_uniform(model.config.dim))):
        variable = values[path]
        variable.set_raw_value(draw(rngs.params(), variable.shape, variable.dtype))
