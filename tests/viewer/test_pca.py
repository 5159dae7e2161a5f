import torch

from snd_nerfstudio.viewer.pca import fit_pca


def test_components_are_the_principal_axes_with_their_largest_loading_positive():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    features = torch.randn(4000, 5, dtype=torch.float64) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1]) @ axes.T + 7
    basis = fit_pca(features)
    cosines = (basis.components @ axes[:, :3]).abs()
    assert (cosines.diagonal() > 0.99).all()
    largest = basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(basis.mean, features.mean(0))


def test_the_basis_does_not_depend_on_the_order_of_the_rows():
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    first, second = fit_pca(features), fit_pca(features.flip(0))
    torch.testing.assert_close(first.components, second.components, rtol=0, atol=1e-5)


def test_colours_lie_in_the_unit_interval_and_outliers_do_not_squeeze_them():
    features = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    basis = fit_pca(torch.cat([features, torch.full((2, 6), 1e4)]))
    colours = basis.colour(basis.project(features))
    assert colours.min() >= 0 and colours.max() <= 1 and (colours.std(0) > 0.1).all()


def test_degenerate_features_give_finite_colours():
    for features in (torch.zeros(10, 6), torch.ones(1, 2), torch.full((3, 4), float("nan"))):
        basis = fit_pca(features)
        assert basis.components.shape == (3, features.shape[1])
        assert torch.isfinite(basis.colour(basis.project(torch.zeros_like(features)))).all()
