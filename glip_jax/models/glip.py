"""GLIP: image and text encoders, feature pyramid, and the detection head with deep fusion (paper section 3, glip-reference 2).

`encode_image`, `encode_text` and `ground` can be applied separately, so that the features of an image are reused for several
prompts, and those of a prompt for several images. Without fusion the blocks of the head do not read the text: `refine` runs them
once for all prompts.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from glip_jax.config import HeadConfig, InputConfig, ModelConfig
from glip_jax.models.bert import Bert, BertLayer, TextMask, clamped, text_mask
from glip_jax.models.dynamic_head import DynamicConvolution
from glip_jax.models.efficientnet import EfficientNetLite0
from glip_jax.models.extents import grid, level_size, pack, place_features, unpack, valid_mask
from glip_jax.models.fusion import Fusion
from glip_jax.models.initializers import small_normal, torch_dense
from glip_jax.models.pyramid import Pyramid
from glip_jax.models.remat import rematerialized
from glip_jax.models.swin import Swin
from glip_jax.models.tuned_prompts import TunedPrompts
from glip_jax.structures.batch import Predictions
from glip_jax.structures.canvas import PATCH

__all__ = ["GLIP", "normalize"]


def normalize(
    image: UInt8[Array, "B H W values"], size: Int[Array, "B 2"], config: InputConfig
) -> Float32[Array, "B H W values"]:
    """Input of the network from bytes: channel order, mean and standard deviation; zero beyond `size` of each image.

    `image`: RGB pixels, or patches whose channels are in the order of the network (`Batch.image`).
    """
    x, values = image.astype(jnp.float32), image.shape[-1]
    mean, std = (jnp.tile(jnp.asarray(x), values // 3) for x in (config.mean, config.std))
    if values == 3:
        x = x[..., ::-1] if config.order == "bgr" else x
        inside = valid_mask(size, *image.shape[1:3])
    else:
        place = np.arange(values) // 3
        rows = PATCH * jnp.arange(image.shape[1])[:, None] + place // PATCH
        columns = PATCH * jnp.arange(image.shape[2])[:, None] + place % PATCH
        inside = (rows < size[:, :1, None])[:, :, None] & (columns < size[:, 1:, None])[:, None]
    return jnp.where(inside, (x - mean) / std, 0.0)


class _Block(nn.Module):
    """One block of the head: fusion, BERT layer and dynamic convolution, or dynamic convolution alone without fusion."""

    config: ModelConfig
    train: bool
    dtype: Any

    @nn.compact
    def __call__(
        self,
        state: tuple[tuple[Float[Array, "B _ _ C"], ...], Float[Array, "B T D"] | None],
        sizes: tuple[Int[Array, "B 2"], ...],
        mask: TextMask | None,
    ) -> tuple[tuple[tuple[Float[Array, "B _ _ C"], ...], Float[Array, "B T D"] | None], None]:
        levels, text = state
        if self.config.fusion.enabled and text is not None and mask is not None:
            shapes = [grid(x) for x in levels]
            valid = pack([valid_mask(size, *shape) for size, shape in zip(sizes, shapes)])[..., 0]
            fusion = Fusion(self.config.fusion, self.train, self.dtype, self.config.lora, name="fusion")
            visual, text = fusion(pack(levels), text, valid, mask != 0)
            layer = BertLayer(self.config.text, self.train, self.dtype, True, "torch", self.config.lora, name="text")
            text, _ = layer(text, mask)
            levels = tuple(unpack(visual, shapes))
        levels = DynamicConvolution(self.config.head, self.dtype, name="convolution")(levels, sizes)
        return (levels, text), None


class _Head(nn.Module):
    """The blocks of the head and the three outputs of every location (glip-reference 2.4, 2.8)."""

    config: ModelConfig
    train: bool
    dtype: Any

    def _blocks(self, head: HeadConfig) -> Any:
        block = rematerialized(_Block, self.config.remat)
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=head.blocks,
            unroll=head.unroll,
        )
        return scan(self.config, self.train, self.dtype, name="tower")

    @nn.compact
    def __call__(
        self, levels: tuple[Float[Array, "B _ _ C"], ...], extent: Int[Array, "B 2"], text: Float[Array, "B T D"] | None = None,
        mask: TextMask | None = None, refined: bool = False,
    ) -> tuple[Predictions | None, tuple[Float[Array, "B _ _ C"], ...]]:  # fmt: skip
        """Predictions (None without text) and the levels after the blocks; `refined`: `levels` are those already."""
        config, channels, levels, fused = self.config, self.config.pyramid.channels, tuple(levels), text
        sizes = tuple(level_size(extent, stride) for stride in config.pyramid.strides)
        places = [place_features(size, *grid(x)) for x, size in zip(levels, sizes)] if config.head.positions else []
        if not refined:
            if places:
                placed = nn.Dense(
                    channels, use_bias=False, dtype=self.dtype, kernel_init=small_normal, name="positions"
                )
                levels = tuple(x + placed(place) for x, place in zip(levels, places))
            (levels, fused), _ = self._blocks(config.head)((levels, text), sizes, mask)
        if text is None or mask is None or fused is None:
            return None, levels
        embedding = fused if config.fusion.enabled else text * (mask != 0)[..., None]
        embedding = embedding.astype(jnp.float32)
        norm = jnp.sqrt(jnp.maximum(jnp.square(embedding).sum(-1, keepdims=True), 1e-24))
        embedding = embedding / norm
        tokens = torch_dense(channels, embedding.shape[-1], jnp.float32, "projection")(embedding / 2.0)
        bias_text = self.param("bias_text", nn.initializers.zeros, (embedding.shape[-1],))
        bias = self.param("bias0", nn.initializers.constant(-math.log(99)), (1,))
        log_scale = self.param("log_scale", nn.initializers.constant(config.head.log_scale), (1,))
        scales = self.param("scales", nn.initializers.constant(config.head.box_scale), (len(levels),))
        exact = jax.lax.Precision.HIGHEST
        box = nn.Dense(4, dtype=jnp.float32, kernel_init=small_normal, precision=exact, name="box")
        center = nn.Dense(1, dtype=jnp.float32, kernel_init=small_normal, precision=exact, name="centerness")

        visual = pack(levels)
        # Kept only where that collection is mutable: for the side loss on descriptions.
        self.sow("visual", "features", visual)
        per_anchor = jnp.repeat(scales, np.array([h * w for h, w in map(grid, levels)]))
        deltas = box(visual) * per_anchor[:, None]
        aligned = jnp.einsum("bac,btc->bat", visual, tokens.astype(visual.dtype), preferred_element_type=jnp.float32)
        if places:
            # The blocks leave little of the place in the features. A token says itself where it is sought.
            features = nn.Dense(
                places[0].shape[-1],
                use_bias=False,
                dtype=jnp.float32,
                kernel_init=nn.initializers.zeros,
                name="directions",
            )
            aligned += jnp.einsum("baf,btf->bat", pack(places), features(embedding))
        logits = clamped(aligned / jnp.exp(log_scale) + (embedding @ bias_text + bias)[:, None, :])
        found = Predictions(logits, deltas, center(visual)[..., 0])
        if config.head.presence:
            shows = nn.Dense(1, dtype=jnp.float32, kernel_init=small_normal, name="presence")
            found = found._replace(presence=shows(fused.astype(jnp.float32))[..., 0])
        return found, levels


class GLIP(nn.Module):
    """The whole network. `train` enables dropout, stochastic depth and DropBlock (rng collection "dropout")."""

    config: ModelConfig
    train: bool = False

    def setup(self) -> None:
        """Creates the submodules: backbone, pyramid, text, head."""
        config, dtype, remat = self.config, jnp.dtype(self.config.dtype), self.config.remat
        match config.backbone.kind:
            case "swin":
                self.backbone = Swin(config.backbone, self.train, dtype, remat)
            case "efficientnet_lite0":
                self.backbone = EfficientNetLite0(config.backbone, self.train, dtype)
        self.pyramid = Pyramid(config.pyramid, self.train, dtype)
        self.text = Bert(config.text, self.train, dtype, remat, config.lora)
        if config.prompts.names:
            self.prompts = TunedPrompts(config.prompts, config.text.width)
        self.head = _Head(config, self.train, dtype)

    def encode_image(
        self, image: Float[Array, "B H W values"], extent: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B _ _ C"], ...]:
        """Pyramid levels of normalized images (pixels or patches), zero beyond the extent of each image."""
        return self.pyramid(self.backbone(image, extent), extent)

    def encode_text(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Hidden states of the last layer of the text encoder; with tuned prompts theirs at the tokens of the tuned names.

        BERT does not run where no token of the batch needs it.
        """
        if not self.config.prompts.names:
            return self.text(tokens, mask)
        found = self.prompts(tokens, mask)
        if self.is_initializing():
            return found.applied(self.text(tokens, mask))
        needed = jnp.any(mask & ~found.covered)
        states = nn.cond(
            needed,
            lambda network: network.text(tokens, mask),
            lambda _: jnp.zeros_like(found.states, self.text.dtype),
            self,
        )
        return found.applied(states)

    def tuned_text(
        self, states: Float[Array, "B T D"], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """BERT's `states` with those of the tuned prompts in their place, where there are any."""
        return self.prompts(tokens, mask).applied(states) if self.config.prompts.names else states

    def refine(
        self, levels: tuple[Float[Array, "B _ _ C"], ...], extent: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B _ _ C"], ...]:
        """Levels after the blocks of the head, for `ground` with `refined`; for a network without fusion."""
        return self.head(levels, extent)[1]

    def ground(
        self, levels: tuple[Float[Array, "B _ _ C"], ...], extent: Int[Array, "B 2"], text: Float[Array, "B T D"],
        mask: TextMask, refined: bool = False,
    ) -> Predictions:  # fmt: skip
        """Predictions for every anchor from levels (of the pyramid, or `refined` by `refine`), text states and their `bert.text_mask`."""
        predictions: Any = self.head(levels, extent, text, mask, refined)[0]
        return predictions

    def __call__(
        self,
        image: Float[Array, "B H W values"],
        extent: Int[Array, "B 2"],
        tokens: Int[Array, "B T"],
        token_mask: Bool[Array, "B T"],
    ) -> Predictions:
        """Predictions for every anchor from normalized images (zero beyond their size), their extents, and tokens."""
        levels = self.encode_image(image, extent)
        text = self.encode_text(tokens, token_mask)
        return self.ground(levels, extent, text, text_mask(tokens, token_mask, self.config.text))
