"""Muon: orthogonalised updates, equal at every scale, skipped where gradients aren't finite."""

import pytest
import torch
from tiny import equal, save, tiny_distillation, weights

from dnnlib import UserError
from torch_utils.adam import MomentumFreeAdam
from torch_utils.muon import DECAY, VECTOR_RATE, Muon, orthogonalise, split


def conditioned(*shape):
    """Matrices whose singular values lie between 0.3 and 1."""
    u, _, v = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    return u * (0.3 + 0.7 * torch.rand(*shape[:-2], 1, u.shape[-1])) @ v


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6), (2, 1, 9)], ids=str)
def test_singular_vectors_stay_and_values_become_about_one(shape):
    torch.manual_seed(0)
    matrices = conditioned(*shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonalise(1e-6 * matrices) @ v.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-4


def step(weights, gradients, found_inf=None, lr=0.1):
    """The optimiser after one step, whose weights become parameters."""
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Muon([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2], lr)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    optimizer.found_inf = found_inf
    optimizer.step()
    return optimizer, [p.detach() for p in parameters]


def test_the_size_of_an_update():
    torch.manual_seed(0)
    gradient, weight = torch.randn(4, 36), torch.randn(4, 36)
    expected = 0.1 * 2 * orthogonalise(gradient[None])[0]
    for scale in (1.0, 20.0):  # large weights: in proportion to their root mean square
        rms = scale * weight.square().mean().sqrt()
        _, [moved] = step([scale * weight], [gradient])
        assert torch.allclose(scale * weight - moved, expected * rms, rtol=1e-4, atol=1e-5)
    _, [moved] = step([0 * weight], [gradient])  # small ones: as if at the size of a random start
    assert torch.allclose(-moved, expected / 6, rtol=1e-4, atol=1e-6)


def test_a_kernel_is_the_matrix_of_its_columns_in_any_memory_layout():
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 5, 4, 3, 3)
    _, [kernel, matrix, last] = step(
        [weight, weight.flatten(1), weight.to(memory_format=torch.channels_last)],
        [gradient, gradient.flatten(1), gradient.to(memory_format=torch.channels_last)],
    )
    assert torch.equal(kernel.flatten(1), matrix)
    assert torch.allclose(kernel, last, atol=1e-6)


def test_several_matrices_are_updated_as_each_alone():
    torch.manual_seed(0)
    weights = [torch.randn(s) for s in ((4, 6), (6, 4), (4, 6), (4, 3, 2), (2, 2))]
    gradients = [torch.randn_like(weight) for weight in weights]
    _, together = step(weights, gradients)
    for weight, gradient, moved in zip(weights, gradients, together):
        assert torch.allclose(step([weight], [gradient])[1][0], moved, atol=1e-6)


def test_vectors_are_updated_by_adam_and_matrices_keep_no_state():
    torch.manual_seed(0)
    weights, gradients = [torch.randn(4, 6), torch.randn(6)], [torch.randn(4, 6), torch.randn(6)]
    optimizer, [_, vector] = step(weights, gradients)
    other = torch.nn.Parameter(weights[1].clone())
    other.grad = gradients[1].clone()
    MomentumFreeAdam([other], 0.1 * VECTOR_RATE).step()
    assert torch.equal(vector, other.detach())
    assert [list(state) for state in optimizer.state.values()] == [["updates", "exp_avg_sq"]]


def test_tables_of_embeddings_count_as_vectors():
    net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3), torch.nn.Conv2d(3, 2, 3))
    matrices, vectors = split(net.requires_grad_(True))
    assert [tuple(p.shape) for p in matrices] == [(3, 4), (2, 3, 3, 3)]
    assert [tuple(p.shape) for p in vectors] == [(10, 4), (3,), (2,)]
    net[1].requires_grad_(False)
    assert [tuple(p.shape) for group in Muon.of(net, 0.1).param_groups for p in group["params"]] == [
        (2, 3, 3, 3),
        (10, 4),
        (2,),
    ]


def with_momentum(weights, gradients, momentum):
    """(weights, state) after one step per tuple of gradients; None: those of a step that must change nothing."""
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Muon(parameters, [], 0.1, momentum=momentum)
    for given in gradients:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, torch.nan)
        for parameter, gradient in zip(parameters, given or []):
            parameter.grad = gradient.clone()
        optimizer.found_inf = torch.tensor(float(given is None))
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def test_momentum_is_nesterovs_of_the_gradients_before_they_are_orthogonalised():
    torch.manual_seed(0)
    weight, first, second = torch.randn(3, 4, 6)
    [moved], _ = with_momentum([weight], [[first], [second]], 0.9)
    expected, average = weight, torch.zeros(4, 6)
    for gradient in (first, second):
        average = average + 0.1 * (gradient - average)
        [moved_alone] = step([weight], [gradient + 0.9 * (average - gradient)])[1]  # the size is the first weight's
        expected = (1 - DECAY * 0.1) * expected + (moved_alone - weight)
    assert torch.allclose(moved, expected, atol=1e-5)
    assert not torch.allclose(moved, with_momentum([weight], [[first], [second]], 0.0)[0][0], atol=1e-2)


def test_with_momentum_weights_stay_of_one_size():
    """However long the gradients agree; without, they grow exponentially."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 8, 8)
    [moved], _ = with_momentum([weight], [[gradient]] * 300, 0.9)
    assert moved.norm() < 12 * weight.norm() < with_momentum([weight], [[gradient]] * 300, 0.0)[0][0].norm()


@pytest.mark.parametrize("device", ["cpu", "meta-like"])
def test_momentum_forgets_gradients_that_are_not_finite(device, monkeypatch):
    if device != "cpu":
        monkeypatch.setattr("torch_utils.adam.AT_ONCE", set())
    torch.manual_seed(0)
    weight, first, second = torch.randn(3, 4, 6)
    [moved], _ = with_momentum([weight], [[first], None, [second]], 0.9)
    assert torch.equal(moved, with_momentum([weight], [[first], [second]], 0.9)[0][0])


@pytest.mark.parametrize("device", ["cpu", "meta-like"])
def test_gradients_that_are_not_finite_change_nothing(device, monkeypatch):
    if device != "cpu":  # a device whose results the host would have to wait for
        monkeypatch.setattr("torch_utils.adam.AT_ONCE", set())
    weights = [torch.ones(4, 6), torch.ones(6)]
    gradients = [torch.full([4, 6], torch.nan), torch.full([6], torch.inf)]
    _, moved = step(weights, gradients, found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(weights, moved))
    _, moved = step(weights, [torch.randn(4, 6), torch.randn(6)], found_inf=torch.tensor(0.0))
    assert not any(torch.equal(a, b) for a, b in zip(weights, moved))


def test_a_gradient_of_zeros_changes_nothing():
    _, [moved] = step([torch.ones(4, 6)], [torch.zeros(4, 6)])
    assert torch.equal(moved, torch.ones(4, 6))


def run(iterations, resume=None, **changes):
    distillation = tiny_distillation(resume=resume, optimizer="muon", lr=0.02, glr=0.02, **changes)
    for _ in range(iterations):
        distillation.iteration()
    return distillation


@pytest.mark.parametrize("changes", [{}, {"share_noise": True, "augment": 0.0, "lora_rank": 2}], ids=str)
def test_a_resumed_run_is_bit_equal(changes, tmp_path):
    unbroken = run(2, **changes)
    path = save(unbroken, tmp_path)
    for _ in range(2):
        unbroken.iteration()
    assert equal(weights(run(2, resume=path, **changes)), weights(unbroken))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=str)
@pytest.mark.parametrize("before", ["adam", "muon"])
def test_a_state_of_the_other_optimiser_is_refused(before, changes, tmp_path):
    saved = tiny_distillation(optimizer=before, **changes)
    saved.iteration()
    path, other = save(saved, tmp_path), "muon" if before == "adam" else "adam"
    with pytest.raises(UserError, match="its optimizer was another one"):
        tiny_distillation(resume=path, optimizer=other, **changes)
