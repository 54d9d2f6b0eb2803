"""Deep fusion (paper section 3.2, equations 4-6): image and text attend to each other with one shared map of logits.

Parameters are those of the original (glip-reference 2.5), the order of the products is not. The query projection is folded into
the text keys, the visual output projection into the text values, and the visual value projection is applied after the attention of
the text. This leaves three products over the A locations of the image instead of six dense layers. The backward pass recomputes the
logits. On a TPU they are never in memory (`kernels.attention`); elsewhere those of one attention head and block of locations at a time
are (`kernels.blockwise`).

Softmax over the text excludes padding tokens; softmax over the image excludes locations beyond the extent.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from glip_jax.config import FusionConfig, LoraConfig
from glip_jax.models.dropout import drop_path, example_keys, words_of
from glip_jax.models.initializers import xavier_uniform
from glip_jax.models.kernels.attention import Read, attention_backward, attention_forward
from glip_jax.models.kernels.blocks import LANES, is_possible, per_device
from glip_jax.models.kernels.blockwise import Attended, Operands, blockwise_backward, blockwise_forward
from glip_jax.models.lora import with_low_rank_delta
from glip_jax.models.remat import images_at_once, save_activation

__all__ = ["Attended", "Fusion", "Implementation", "Operands", "attend"]

Implementation = Literal["auto", "scan", "kernel"]

_MAX_LOGITS_BYTES = 32 * 2**20
"""Maximum bytes of logits of a head at once, of a block of an image and of several images. One image of 800 x 1344 with 256 tokens has 23 MB."""
_CACHED_LOGITS_BYTES = 1310720
"""Maximum bytes of logits of a block on a CPU: so many stay in the cache."""


class _Dense(NamedTuple):
    kernel: Array
    bias: Array


class Fusion(nn.Module):
    """Bidirectional attention between all locations and tokens."""

    config: FusionConfig
    train: bool
    dtype: Any
    lora: LoraConfig = LoraConfig()

    def _dense(self, name: str, inputs: int, outputs: int) -> _Dense:
        kernel = self.param(f"{name}_kernel", xavier_uniform, (inputs, outputs))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (outputs,))
        return _Dense(with_low_rank_delta(self, name, kernel, self.lora), bias)

    @nn.compact
    def __call__(
        self,
        visual: Float[Array, "B A C"],
        text: Float[Array, "B T D"],
        valid: Bool[Array, "B A"],
        mask: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B A C"], Float[Array, "B T D"]]:
        """New (visual, text). The residual connection starts at the normalized inputs, as in the original."""
        config, channels, text_width = self.config, visual.shape[-1], text.shape[-1]
        heads, depth = config.heads, config.width // config.heads
        norm = {"epsilon": 1e-5, "dtype": self.dtype, "use_fast_variance": False}
        visual = nn.LayerNorm(**norm, name="visual_norm")(visual)
        text = nn.LayerNorm(**norm, name="text_norm")(text)
        query = self._dense("visual_query", channels, config.width)
        key = self._dense("text_key", text_width, config.width)
        value = self._dense("visual_value", channels, config.width)
        text_value = self._dense("text_value", text_width, config.width)
        output = self._dense("visual_output", config.width, channels)
        text_output = self._dense("text_output", config.width, text_width)
        start = nn.initializers.constant(config.gamma)
        gamma, text_gamma = (
            self.param("visual_gamma", start, (channels,)),
            self.param("text_gamma", start, (text_width,)),
        )

        # Folding is over few text rows and wide sums: float32.
        exact = jax.lax.Precision.HIGHEST
        text32 = text.astype(jnp.float32)
        by_head = (*text.shape[:2], heads, depth)
        keys = (jnp.matmul(text32, key.kernel, precision=exact) + key.bias).reshape(by_head) * depth**-0.5
        values = (jnp.matmul(text32, text_value.kernel, precision=exact) + text_value.bias).reshape(by_head)
        operands = Operands(
            jnp.einsum("bthd,chd->hbtc", keys, query.kernel.reshape(channels, heads, depth), precision=exact).astype(
                self.dtype
            ),
            jnp.einsum("bthd,hd->hbt", keys, query.bias.reshape(heads, depth), precision=exact),
            jnp.einsum("bthd,hdc->hbtc", values, output.kernel.reshape(heads, depth, channels), precision=exact).astype(
                self.dtype
            ),
        )
        rate = config.dropout if self.train else 0.0
        words = None
        if rate > 0:
            keys_of_heads = jax.random.split(self.make_rng("dropout"), heads)
            words = jax.vmap(lambda key: jax.vmap(words_of)(example_keys(key, len(visual))))(keys_of_heads)
        for_image, for_text, weight_sum = attend(visual, operands, valid, mask, words, rate)

        # With dropout the attention weights over the image sum to `weight_sum`, not to 1; so the bias is scaled by it.
        read = jnp.einsum("hbtc,chd->bthd", for_text, value.kernel.reshape(channels, heads, depth), precision=exact)
        read += jnp.moveaxis(weight_sum, 0, 2)[..., None] * value.bias.reshape(heads, depth)
        new_text = jnp.matmul(read.reshape(*text.shape[:2], -1), text_output.kernel, precision=exact) + text_output.bias
        changes = ((gamma * (for_image + output.bias)).astype(self.dtype), (text_gamma * new_text).astype(self.dtype))
        if config.drop_path:
            changes = [drop_path(self, change, config.drop_path, self.train) for change in changes]
        return visual + changes[0], text + changes[1]


class _Settings(NamedTuple):
    """Static settings of the attention."""

    rate: float
    implementation: Implementation
    mesh: Any
    """The mesh of the enclosing program, whose BATCH_AXES split the images; empty if none is set."""


def attend(
    visual: Float[Array, "B A C"], operands: Operands, valid: Bool[Array, "B A"], mask: Bool[Array, "B T"],
    words: UInt32[Array, "heads B 2"] | None, rate: float, implementation: Implementation = "auto",
) -> Attended:  # fmt: skip
    """Both directions of the attention.

    Args:
        words: `dropout.words_of` a key for each head and image; None with a `rate` of 0.
        implementation: `kernel` is the one for TPUs (`kernels.attention`), and runs elsewhere, but slowly; `scan` runs everywhere; `auto` selects
            by the platform. The kernel does not clamp logits.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    return _attend(visual, operands, valid, mask, words, _Settings(rate, implementation, mesh))


def _run(settings: _Settings, scan: Any, kernel: Any, arrays: tuple[Any, ...], inputs: Any, outputs: Any) -> Any:
    """The selected implementation of a pass. `inputs`, `outputs`: dimension of the images, see `kernels.per_device`."""

    def on_each(interpret: bool) -> Any:
        return per_device(partial(kernel, interpret=interpret), settings.mesh, inputs, outputs)

    def blockwise(logits_bytes: int) -> Any:
        images, locations, tokens = *arrays[0].shape[:2], arrays[3].shape[1]
        group = images_at_once(images, min(4 * locations * tokens, logits_bytes), _MAX_LOGITS_BYTES)
        return _in_groups(partial(scan, logits_bytes=logits_bytes), images // group, inputs, outputs)

    plain = {"cpu": blockwise(_CACHED_LOGITS_BYTES), "default": blockwise(_MAX_LOGITS_BYTES)}
    match settings.implementation:
        case "kernel":
            return jax.lax.platform_dependent(*arrays, tpu=on_each(False), default=on_each(True))
        case "auto" if is_possible(settings.mesh, len(arrays[0])) and arrays[0].shape[-1] % LANES == 0:
            return jax.lax.platform_dependent(*arrays, tpu=on_each(False), **plain)
        case _:
            return jax.lax.platform_dependent(*arrays, **plain)


def _in_groups(run: Any, groups: int, inputs: Any, outputs: Any) -> Any:
    """`run` for one group of images after the other. `inputs`, `outputs`: dimension of the images."""

    def split(axis: int, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]), axis, 0), tree
        )

    def join(axis: int, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.moveaxis(x, 0, axis).reshape(*x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :]), tree
        )

    def on_all(*arrays: Any) -> Any:
        results = jax.lax.map(lambda part: run(*part), jax.tree.map(split, inputs, arrays))
        return jax.tree.map(join, outputs, results)

    return run if groups == 1 else on_all


_INPUTS = (0, Operands(1, 1, 1), 0, 0, 1)  # pyright: ignore[reportArgumentType]
_OUTPUTS = (Attended(0, 1, 1), 1)  # pyright: ignore[reportArgumentType]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, settings: _Settings) -> Attended:
    return _attend_forward(visual, operands, valid, mask, words, settings)[0]


def _attend_forward(
    visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, settings: _Settings
) -> tuple[Attended, Any]:
    def kernel(visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, interpret: bool) -> Any:
        for_image, read = attention_forward(visual, *operands, valid, mask, words, settings.rate, interpret)
        return Attended(for_image, read.features, read.weight), read.log_sum

    arrays = (visual, operands, valid, mask, words)
    plain = partial(blockwise_forward, rate=settings.rate)
    found, log_sum = save_activation(_run(settings, plain, kernel, arrays, _INPUTS, _OUTPUTS))
    return found, (*arrays, (found.for_text, found.weight_sum, log_sum))


def _attend_backward(settings: _Settings, saved: Any, gradients: Attended) -> tuple[Any, ...]:
    def kernel(
        visual: Array, operands: Operands, valid: Array, mask: Array, words: Any, read: Any, gradients: Attended, interpret: bool
    ) -> Any:  # fmt: skip
        dvisual, *rest = attention_backward(
            visual, *operands, valid, mask, words, settings.rate, Read(*read), gradients, interpret
        )
        return dvisual, Operands(*rest)

    inputs = (*_INPUTS, (1, 1, 1), _OUTPUTS[0])
    dvisual, doperands = _run(
        settings, partial(blockwise_backward, rate=settings.rate), kernel, (*saved, gradients), inputs, _INPUTS[:2]
    )
    # Integers have no gradient; JAX represents it as zeros of type float0.
    return dvisual, doperands, *(jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), x) for x in saved[2:5])


_attend.defvjp(_attend_forward, _attend_backward)
