"""Keys of the scale-space banks at any sigmas, differentiable in them, and their fit to kernels."""

import math

import torch

from .projection import Projection, check_finite, constant_kernels, unfilled_projection

SMALLEST, LARGEST, STEPS = 0.1, 4.0, 24  # the grid of sigmas, in taps, from which a fit starts
FLATTEST = 10.0  # taps; larger sigmas are clamped to this
_CHUNK = 128  # kernels refined at a time


def sigma_kernels(operator: torch.Tensor, log_sigma: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The keys of the scale-space banks at any sigmas: mean 0, norm 1, differentiable in the sigmas.

    Key k of Lindeberg et al. (JMIV 68(3), 2026) is ``P_y x P_x + Q_y x Q_x``, each factor a discrete Gaussian
    ``exp(-s^2) I_n(s^2)`` under a stencil of three taps; gamma of key 7 is fixed at 1/2. The Gaussian's taps are
    Fourier coefficients of ``exp(s^2 (cos(angle) - 1))``.

    Args:
        operator: (C,) int64, 0 to 7 for keys 1 to 8.
        log_sigma: (C, 2), the logarithms of sigma_x and sigma_y in taps; sigmas above 10 taps count as 10.
        height: Height of the kernels in taps.
        width: Width of the kernels in taps.

    Returns:
        (C, height, width) in the dtype of ``log_sigma``, computed at least in float32.
    """
    sigma = log_sigma.to(torch.promote_types(log_sigma.dtype, torch.float32))
    sigma = sigma.clamp_max(math.log(FLATTEST)).exp()
    stencils = torch.tensor(
        [  # P_y, P_x, Q_y, Q_x of keys 1 to 8; rows go down, columns to the right
            [[1.0, -1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[0.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[0.0, 1.0, -1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[0.0, 1.0, 0.0], [0.0, -1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[0.0, 1.0, 0.0], [-0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[0.5, 0.0, -0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            [[-0.5, 2.0, -0.5], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [-0.5, 1.0, -0.5]],
            [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        ],
        dtype=sigma.dtype,
        device=sigma.device,
    )
    chosen = stencils[operator]
    x, y = _windows(sigma[:, 0], width), _windows(sigma[:, 1], height)
    p_y, q_y = (y * chosen[:, 0:1]).sum(2), (y * chosen[:, 2:3]).sum(2)
    p_x, q_x = (x * chosen[:, 1:2]).sum(2), (x * chosen[:, 3:4]).sum(2)
    kernels = p_y[:, :, None] * p_x[:, None, :] + q_y[:, :, None] * q_x[:, None, :]
    kernels = kernels - kernels.mean((1, 2), keepdim=True)
    norm = kernels.square().sum((1, 2), keepdim=True).clamp_min(1e-30).sqrt()
    return (kernels / norm).to(log_sigma.dtype)


def _windows(sigma: torch.Tensor, taps: int) -> torch.Tensor:
    """The discrete Gaussians of sigmas (C,) at every tap and its two neighbours, (C, taps, 3)."""
    place = torch.arange(-1, taps + 1, device=sigma.device, dtype=sigma.dtype) - taps // 2
    half = taps + 32  # the spectrum is even: of angles 0 to pi all but the ends count twice
    angle = torch.arange(half + 1, device=sigma.device, dtype=sigma.dtype) * (math.pi / half)
    waves = torch.cos(place[:, None] * angle) / half
    waves[:, [0, half]] /= 2
    spectrum = torch.exp(sigma[:, None].square() * (torch.cos(angle) - 1))
    values = (spectrum[:, None] * waves).sum(2)  # no matrix product: autocast would round it to half precision
    return torch.stack([values[:, :-2], values[:, 1:-1], values[:, 2:]], 2)


@torch.no_grad()
def fit_sigmas(weight: torch.Tensor, operators: tuple[int, ...]) -> tuple[Projection, torch.Tensor]:
    """Least squares ``a * key(sigma_x, sigma_y) + b`` over operators and sigmas, kernel by kernel.

    The two best operators on a grid (24 sigmas per direction, from .1 to 4 taps, 17 % apart) are refined in three
    rounds, to half a percent in sigma; the better one is taken.

    Args:
        weight: (C, 1, kh, kw), the kernels.
        operators: The operators to choose from, of 0 to 7.

    Returns:
        The projection, with indices into ``operators`` as key_index; and the logarithms of sigma_x and sigma_y (C, 2).

    Raises:
        ProjectionError: NaN or Inf in a kernel.
    """
    if weight.is_meta:
        return unfilled_projection(weight, 1), weight.new_empty(len(weight), 2)
    check_finite(weight)
    height, width = weight.shape[2:]
    flat = weight.detach().double().flatten(1)
    shift = flat.mean(1)
    centred = flat - shift[:, None]
    norm = centred.norm(dim=1)
    unit = centred / norm.clamp_min(1e-300)[:, None]
    line = torch.linspace(math.log(SMALLEST), math.log(LARGEST), STEPS, dtype=torch.float64, device=weight.device)
    grid = torch.cartesian_prod(line, line)
    fits, starts = [], []
    for operator in operators:
        keys = sigma_kernels(torch.full((len(grid),), operator, device=weight.device), grid, height, width)
        fit, index = (unit @ keys.flatten(1).T).abs().max(1)
        fits.append(fit)
        starts.append(grid[index])
    candidates = torch.stack(fits, 1).topk(min(2, len(operators)), 1).indices  # indices into operators, the best two
    known = torch.tensor(operators, device=weight.device)
    channels = torch.arange(len(flat), device=weight.device)
    refined = []
    for row in candidates.unbind(1):
        start = torch.stack(starts, 1)[channels, row]
        parts = zip(unit.split(_CHUNK), known[row].split(_CHUNK), start.split(_CHUNK), strict=True)
        results = [_refine(*part, float(line[1] - line[0]), height, width) for part in parts]
        refined.append([torch.cat(column) for column in zip(*results, strict=True)])
    best = torch.stack([fit for _, fit in refined], 1).argmax(1)
    row = candidates.gather(1, best[:, None])[:, 0]
    chosen = known[row]
    log_sigma = torch.stack([sigmas for sigmas, _ in refined], 1)[channels, best]
    keys = sigma_kernels(chosen, log_sigma, height, width).flatten(1)
    scale = (centred * keys).sum(1)
    constant = constant_kernels(weight)
    scale = torch.where(constant, 0.0, scale)
    r2 = torch.where(constant, 1.0, (scale / norm.clamp_min(1e-300)).square())
    projection = Projection(
        row[:, None], scale[:, None].to(weight.dtype), shift.to(weight.dtype), r2.clamp(0, 1).float(), constant
    )
    return projection, log_sigma.to(weight.dtype)


def _refine(
    unit: torch.Tensor, operator: torch.Tensor, log_sigma: torch.Tensor, step: float, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best log sigmas near the given ones, in three rounds of 25 each; and their absolute correlations."""
    line = torch.linspace(-1, 1, 5, dtype=unit.dtype, device=unit.device)
    around = torch.cartesian_prod(line, line)
    fit = torch.zeros_like(unit[:, 0])
    for _ in range(3):
        step /= 3
        tried = (log_sigma[:, None] + 2 * step * around).clamp(math.log(SMALLEST), math.log(LARGEST))
        keys = sigma_kernels(operator.repeat_interleave(len(around)), tried.flatten(0, 1), height, width)
        fits = torch.einsum("np,njp->nj", unit, keys.flatten(1).unflatten(0, (len(unit), -1))).abs()
        fit, index = fits.max(1)
        log_sigma = tried[torch.arange(len(unit), device=unit.device), index]
    return log_sigma, fit
