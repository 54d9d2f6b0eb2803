"""glip_jax: pretraining GLIP (arXiv 2112.03857) in JAX, on a laptop, GPUs or TPU pods."""
