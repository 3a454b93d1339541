"""Convolutions in the forms that each backend is fast at.

Values, parameters and derivatives are those of `nn.Conv` and
`nn.ConvTranspose`, up to rounding. What is measured stands in docs/scale.md.
"""

import jax
import jax.numpy as jnp

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def convolve(x, kernel, strides, padding, **options) -> jax.Array:
  """`lax.conv_general_dilated`, as `nn.Conv` calls it, for 2-D and NHWC.

  On CPU the gradient to the kernel of a large feature map is one matrix product
  per tap of the kernel: XLA's own, a convolution by a kernel as large as the
  map, is three to five times slower.

  Args:
    x: [B, h, w, C].
    kernel: [k, k, C, F].
    strides: of the window.
    padding: as `lax.conv_general_dilated` takes it.
    **options: the other arguments of `lax.conv_general_dilated`.
  """

  def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

  height, width = (
    -(-side // stride)
    for side, stride in zip(x.shape[1:3], strides, strict=True)
  )
  positions = height * width
  large = positions >= 32**2 or len(x) * positions >= 2**13
  if x.shape[-1] < 32 or not large:
    return convolution(x, kernel)
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=lambda x, kernel: _by_matmuls(convolution, strides, padding)(
      x, _alike(kernel, x)
    ),
    default=convolution,
  )


def _alike(kernel, x):
  """The kernel, varying over the devices of `shard_map` as x does.

  Else a custom derivative would not be summed over the devices.
  """
  zero = jnp.logical_and(jnp.any(x[:1, :1, :1, :1] > 0), False)
  return kernel + zero.astype(kernel.dtype)


def _by_matmuls(convolution, strides, padding):
  """The convolution, with its kernel's gradient as matrix products."""

  @jax.custom_vjp
  def function(x, kernel):
    return convolution(x, kernel)

  def backward(saved, g):
    x, kernel = saved
    (d_x,) = jax.vjp(lambda x: convolution(x, kernel), x)[1](g)
    size = kernel.shape[:2]
    if isinstance(padding, str):
      pads = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    else:
      pads = padding
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    batch, height, width, features = g.shape
    span = (strides[0] * (height - 1) + 1, strides[1] * (width - 1) + 1)
    g = g.reshape(-1, features)

    def tap(start):  # one after another: each needs a copy of x
      window = jax.lax.dynamic_slice(
        x, (0, *start, 0), (batch, *span, x.shape[-1])
      )[:, :: strides[0], :: strides[1]]
      return jnp.matmul(
        window.reshape(len(g), -1).T, g, preferred_element_type=jnp.float32
      )

    starts = jnp.indices(size, jnp.int32).reshape(2, -1)
    d_kernel = jax.lax.map(tap, tuple(starts)).reshape(kernel.shape)
    return d_x, d_kernel.astype(kernel.dtype)

  function.defvjp(lambda *args: (convolution(*args), args), backward)
  return function


def upsample(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Transposed convolution, kernel 4, stride 2.

  On CPU, where XLA's is many times slower than a matrix product, it is one
  product to the 16 taps, which are then added where they overlap. On GPUs it is
  cuDNN's own.

  Args:
    x: [B, H, W, C].
    kernel: [4, 4, C, F].

  Returns:
    [B, 2H, 2W, F].
  """
  return jax.lax.platform_dependent(
    x, kernel, cpu=_upsample_by_matmul, default=_upsample_by_convolution
  )


def _downsample(y, kernel):
  """Strided convolution [B, 2H, 2W, F] -> [B, H, W, C], kernel [4, 4, F, C]."""
  return jax.lax.conv_general_dilated(
    y, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=_DIMENSIONS
  )


def _upsample_by_convolution(x, kernel):
  return _transposed(x, _alike(kernel, x))


@jax.custom_vjp
def _transposed(x, kernel):
  """The transpose of `_downsample`; cuDNN has it and both its derivatives.

  The derivatives of `lax.conv_transpose` would first write x with zeros between
  its values: four times the memory and the operations.
  """
  return jax.lax.conv_transpose(
    x,
    _turned(kernel),
    strides=(2, 2),
    padding='SAME',
    dimension_numbers=_DIMENSIONS,
    transpose_kernel=True,
  )


def _turned(kernel):
  # Transposing a convolution turns its kernel again; without the barrier XLA
  # cancels the two and does not see a transposed convolution.
  return jax.lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))


def _transposed_backward(saved, g):
  x, kernel = saved
  turned = _turned(kernel)
  (d_turned,) = jax.vjp(lambda k: _downsample(g, k), turned)[1](x)
  return _downsample(g, turned), d_turned.swapaxes(2, 3)[::-1, ::-1]


_transposed.defvjp(
  lambda x, kernel: (_transposed(x, kernel), (x, kernel)), _transposed_backward
)


def _upsample_by_matmul(x, kernel):
  """Input i adds to outputs 2i - 1 ... 2i + 2, in each direction."""
  batch, height, width, channels = x.shape
  features = kernel.shape[-1]
  taps = jnp.moveaxis(kernel[::-1, ::-1], 2, 0).reshape(channels, -1)
  y = x.reshape(-1, channels) @ taps
  y = y.reshape(batch, height, width, 4, 4, features)
  y = _overlap_add(y, 1, 3)  # [B, 2H, W, 4, features]
  return _overlap_add(y, 2, 3)  # [B, 2H, 2W, features]


def _overlap_add(y, axis, tap_axis):
  """Adds the four taps of each input along one direction."""
  tap = [jax.lax.index_in_dim(y, t, tap_axis, keepdims=False) for t in range(4)]

  def shifted(x, by):
    zero = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
    if by > 0:
      parts = [zero, jax.lax.slice_in_dim(x, 0, -1, axis=axis)]
    else:
      parts = [jax.lax.slice_in_dim(x, 1, None, axis=axis), zero]
    return jnp.concatenate(parts, axis)

  even = tap[1] + shifted(tap[3], 1)
  odd = tap[2] + shifted(tap[0], -1)
  shape = list(even.shape)
  shape[axis] *= 2
  return jnp.stack([even, odd], axis + 1).reshape(shape)
