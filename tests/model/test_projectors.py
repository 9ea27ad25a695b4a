"""Projectors: published names, exact parameter counts, and the same numbers as the published description computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilevlm_ros.model.config import ProjectorConfig
from mobilevlm_ros.model.projectors import build_projector

WIDTH, N_EMBD = 12, 40  # a squeeze of 16: not a quarter of 40, but the multiple of 8 above


def random_projector(name: str, width: int = WIDTH, n_embd: int = N_EMBD) -> torch.nn.Module:
    """A projector none of whose parameters is 0 or 1."""
    torch.manual_seed(0)
    projector = build_projector(ProjectorConfig(name), width, n_embd)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(std=0.5)
    return projector


def features(n: int, width: int = WIDTH) -> Tensor:
    return torch.randn(2, n, width, generator=torch.Generator().manual_seed(1))


def shapes(name: str, width: int, n_embd: int) -> dict[str, tuple[int, ...]]:
    with torch.device('meta'):
        state = build_projector(ProjectorConfig(name), width, n_embd).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    ('name', 'n_embd', 'n_parameters'),
    [
        ('linear', 2048, 2_099_200),
        ('mlp2x_gelu', 2048, 6_295_552),
        ('mlp2x_gelu', 2560, 9_180_160),
        ('mlp2x_gelu', 4096, 20_979_712),
        ('ldpnet', 2048, 18_936_832),
        ('ldpnet', 2560, 28_913_920),
        ('ldpnet', 4096, 71_428_096),
        ('ldpnetv2', 2048, 6_316_032),
        ('ldpnetv2', 2560, 9_205_760),
        ('ldpnetv2', 4096, 21_020_672),
    ],
)
def test_published_projectors_have_their_parameters(name: str, n_embd: int, n_parameters: int) -> None:
    with torch.device('meta'):
        projector = build_projector(ProjectorConfig(name), 1024, n_embd)

    assert sum(parameter.numel() for parameter in projector.parameters()) == n_parameters


@pytest.mark.parametrize(('n_embd', 'n_parameters'), [(2048, 6_320_640), (2560, 9_866_880)])
@pytest.mark.parametrize('block', [1, 2])
def test_each_block_of_ldp_has_its_parameters(n_embd: int, n_parameters: int, block: int) -> None:
    with torch.device('meta'):
        projector = build_projector(ProjectorConfig('ldpnet'), 1024, n_embd)

    found = projector.get_submodule(f'model.mb_block.{block}')
    assert sum(parameter.numel() for parameter in found.parameters()) == n_parameters


def test_ldp_has_its_published_names() -> None:
    d, s = 2048, 512
    expected = {
        'model.mlp.1.weight': (d, 1024),
        'model.mlp.1.bias': (d,),
        'model.mlp.3.weight': (d, d),
        'model.mlp.3.bias': (d,),
    }
    for block in ('model.mb_block.1.block', 'model.mb_block.2.block'):
        expected |= {
            f'{block}.0.0.weight': (d, 1, 3, 3),
            f'{block}.0.1.weight': (d,),
            f'{block}.0.1.bias': (d,),
            f'{block}.1.fc1.weight': (s, d, 1, 1),
            f'{block}.1.fc1.bias': (s,),
            f'{block}.1.fc2.weight': (d, s, 1, 1),
            f'{block}.1.fc2.bias': (d,),
            f'{block}.2.0.weight': (d, d, 1, 1),
            f'{block}.2.1.weight': (d,),
            f'{block}.2.1.bias': (d,),
        }

    assert shapes('ldpnet', 1024, d) == expected


def test_the_other_projectors_have_their_published_names() -> None:
    d = 64

    assert shapes('linear', 16, d) == {'weight': (d, 16), 'bias': (d,)}
    assert shapes('mlp3x_gelu', 16, d) == {
        '0.weight': (d, 16), '0.bias': (d,), '2.weight': (d, d), '2.bias': (d,), '4.weight': (d, d), '4.bias': (d,)
    }  # fmt: skip
    assert shapes('ldpnetv2', 16, d) == {
        'mlp.mlp.0.weight': (d, 16),
        'mlp.mlp.0.bias': (d,),
        'mlp.mlp.2.weight': (d, d),
        'mlp.mlp.2.bias': (d,),
        'peg.peg.0.weight': (d, 1, 3, 3),
        'peg.peg.0.bias': (d,),
    }


def test_pw2_dw1_dws1_is_ldp() -> None:
    assert list(shapes('pw2_dw1_dws1', 1024, 2048).items()) == list(shapes('ldpnet', 1024, 2048).items())

    light, published = random_projector('pw2_dw1_dws1'), random_projector('ldpnet')
    light.load_state_dict(published.state_dict())
    torch.testing.assert_close(light(features(36)), published(features(36)), rtol=0, atol=0)


# -- the published description, in functions ----------------------------------------------------------------------


def reference_mlp(w: dict[str, Tensor], x: Tensor, layers: list[str]) -> Tensor:
    for index, layer in enumerate(layers):
        x = F.gelu(x, approximate='none') if index else x
        x = F.linear(x, w[f'{layer}.weight'], w[f'{layer}.bias'])
    return x


def reference_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = x.var(dim=1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f'{name}.weight'][:, None, None] + w[f'{name}.bias'][:, None, None]


def reference_block(w: dict[str, Tensor], name: str, x: Tensor, stride: int) -> Tensor:
    y = F.conv2d(x, w[f'{name}.0.0.weight'], stride=stride, padding=1, groups=x.shape[1])
    y = F.hardswish(reference_norm(w, f'{name}.0.1', y))
    squeezed = F.relu(F.conv2d(F.adaptive_avg_pool2d(y, 1), w[f'{name}.1.fc1.weight'], w[f'{name}.1.fc1.bias']))
    y = y * F.hardsigmoid(F.conv2d(squeezed, w[f'{name}.1.fc2.weight'], w[f'{name}.1.fc2.bias']))
    y = reference_norm(w, f'{name}.2.1', F.conv2d(y, w[f'{name}.2.0.weight']))
    return y + x if stride == 1 and y.shape == x.shape else y


def on_grid(x: Tensor, side: int) -> Tensor:
    return x.permute(0, 2, 1).reshape(x.shape[0], x.shape[2], side, side)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).permute(0, 2, 1)


def reference_light(w: dict[str, Tensor], x: Tensor, side: int, n_pointwise: int, strides: tuple[int, ...]) -> Tensor:
    x = on_grid(reference_mlp(w, x, [f'model.mlp.{2 * i + 1}' for i in range(n_pointwise)]), side)
    for index, stride in enumerate(strides, 1):
        x = reference_block(w, f'model.mb_block.{index}.block', x, stride)
    return as_tokens(x)


@pytest.mark.parametrize('side', [4, 5, 6])
def test_ldp_computes_what_is_published(side: int) -> None:
    projector = random_projector('ldpnet')

    expected = reference_light(projector.state_dict(), features(side * side), side, 2, (1, 2))
    torch.testing.assert_close(projector(features(side * side)), expected)


@pytest.mark.parametrize('side', [2, 4, 6])
def test_ldpv2_computes_what_is_published(side: int) -> None:
    projector = random_projector('ldpnetv2')
    w = projector.state_dict()

    x = on_grid(reference_mlp(w, features(side * side), ['mlp.mlp.0', 'mlp.mlp.2']), side)
    x = F.avg_pool2d(x, 2, stride=2)
    x = F.conv2d(x, w['peg.peg.0.weight'], w['peg.peg.0.bias'], padding=1, groups=N_EMBD) + x
    torch.testing.assert_close(projector(features(side * side)), as_tokens(x))


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_mlp_computes_what_is_published(depth: int) -> None:
    projector = random_projector(f'mlp{depth}x_gelu')

    expected = reference_mlp(projector.state_dict(), features(9), [str(2 * i) for i in range(depth)])
    torch.testing.assert_close(projector(features(9)), expected)


@pytest.mark.parametrize(
    ('name', 'n_pointwise', 'strides'),
    [
        ('pw0_dw1_dws1', 0, (1, 2)),
        ('pw2_dw3_dws1', 2, (1, 1, 1, 2)),
        ('pw2_dws1_dw1', 2, (2, 1)),
        ('pw1_dw0_dws2', 1, (2, 2)),
        ('pw3_dw0_dws0', 3, ()),
    ],
)
def test_the_family_of_table_9_computes_what_its_name_says(
    name: str, n_pointwise: int, strides: tuple[int, ...]
) -> None:
    projector = random_projector(name)

    expected = reference_light(projector.state_dict(), features(36), 6, n_pointwise, strides)
    torch.testing.assert_close(projector(features(36)), expected)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ['linear', 'mlp2x_gelu', 'ldpnet', 'ldpnetv2', 'pw0_dw1_dws1', 'pw1_dws2_dw1', 'pw2_dw3_dws1']
    ),
    half_grid=st.integers(1, 6),
)
def test_tokens_are_as_many_as_the_configuration_says(name: str, half_grid: int) -> None:
    grid = 2 * half_grid
    with torch.no_grad():
        tokens = random_projector(name)(features(grid * grid))

    assert tuple(tokens.shape) == (2, ProjectorConfig(name).grid_out(grid) ** 2, N_EMBD)
