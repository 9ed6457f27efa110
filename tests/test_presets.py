"""Where presets are looked for."""

from lumen_ray import presets


def test_a_checkout_has_its_configs_beside_the_package():
    assert presets.recipe_path("quickstart").parent.parent in presets.ROOTS


def test_configs_beside_an_installed_package_are_somebody_elses(tmp_path):
    package = tmp_path / "site-packages" / "lumen_ray"
    (package / "configs").mkdir(parents=True)
    (package.parent / "configs").mkdir()
    assert presets.config_roots(package) == (package / "configs",)
    (package.parent / "pyproject.toml").write_text("")
    assert presets.config_roots(package) == (package.parent / "configs", package / "configs")


def test_a_checkout_has_no_packaged_copy(tmp_path):
    (tmp_path / "pyproject.toml").write_text("")
    assert presets.config_roots(tmp_path / "lumen_ray") == (tmp_path / "configs",)
